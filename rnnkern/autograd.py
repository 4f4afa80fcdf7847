"""The eager door: one ``torch.autograd.Function`` around the scan of one layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import kernels, reference
from rnnkern.kernels import Layer
from rnnkern.sequence import Steps


def _graph_is_kept() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


class Scan(torch.autograd.Function):
    """Output and final states of one layer, differentiable any number of times.

    The first derivative is a kernel. Asked for a derivative of the derivative
    (``create_graph=True``), or under a transform such as vmap, backward recomputes the layer in
    plain PyTorch and differentiates that.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layer: Layer,
        steps: Steps | None,
        x: Tensor,
        h0: Tensor | None,
        c0: Tensor | None,
        *weights: Tensor,
    ) -> tuple[Tensor, ...]:
        y, hn, cn, saved = kernels.forward(layer, x, h0, c0, weights, steps, True)
        ctx.layer = layer
        ctx.steps = steps
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h0, c0, y, saved, *weights)
        return (y, hn) if cn is None else (y, hn, cn)

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        x, h0, c0, y, saved, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if (
            torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or forward_ad._current_level >= 0
        ):
            return _differentiable_backward(ctx, x, h0, c0, weights, (dy, dhn, dcn), wanted)
        operands = (ctx.layer, x, h0, c0, weights, ctx.steps, y, saved)
        overwrite = not _graph_is_kept()
        try:
            gradients = kernels.backward(*operands, dy, dhn, dcn, wanted, overwrite)
        except kernels.RefusedError:
            # Saved tensors come back as their hooks return them: any of them may be at fault.
            given = [g for g in (y, saved, dy, dhn, dcn) if g is not None]
            reason = kernels.refusal(x, h0, c0, [*weights, *given])
            if reason is None:
                raise
            if reason != kernels.GAPS:
                return _differentiable_backward(ctx, x, h0, c0, weights, (dy, dhn, dcn), wanted)
            dense: list[Any] = [
                None if t is None else t.contiguous()
                for t in (x, h0, c0, y, saved, dy, dhn, dcn, *weights)
            ]
            x, h0, c0, y, saved, dy, dhn, dcn, *weights = dense
            gradients = kernels.backward(
                ctx.layer, x, h0, c0, weights, ctx.steps, y, saved, dy, dhn, dcn, wanted, overwrite
            )
        return (None, None, *gradients)


scan: Callable[..., Any] = super(torch.autograd.Function, Scan).apply
"""``Scan.apply`` without its look for functorch transforms: `functional` has looked already."""


def _differentiable_backward(
    ctx: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    incoming: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    layer: Layer = ctx.layer
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # Aliases, so that one input being a function of another does not count twice.
        inputs = [None if t is None else t.view_as(t) for t in (x, h0, c0, *weights)]
        needed = [t for t, need in zip(inputs, wanted, strict=True) if need and t is not None]
        outputs = reference.layer(
            layer.mode,
            inputs[0],  # type: ignore[arg-type]
            inputs[1],
            inputs[2],
            inputs[3:],  # type: ignore[arg-type]
            directions=layer.directions,
            bias=layer.bias,
            batch_first=layer.batch_first,
            steps=ctx.steps,
        )
    pairs = [(o, g) for o, g in zip(outputs, incoming, strict=False) if g is not None]
    found = iter(
        torch.autograd.grad(
            [o for o, _ in pairs],
            needed,
            [g for _, g in pairs],
            create_graph=create_graph,
            allow_unused=True,
        )
    )
    gradients = [
        next(found) if need and t is not None else None
        for t, need in zip(inputs, wanted, strict=True)
    ]
    return (None, None, *gradients)
