"""The eager door: one ``torch.autograd.Function`` around the scan of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from rnnkern import kernels, reference
from rnnkern.kernels import Layer
from rnnkern.sequence import Steps

Scanned = tuple[Layer, Steps | None, int]
"""A layer, its steps, and the number of initial states given: 0, or as many as the cell has."""


def _graph_is_kept() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


class Scan(torch.autograd.Function):
    """Makes the outputs of a layer differentiable, any number of times.

    The first derivative is a kernel. Asked for a derivative of the derivative
    (``create_graph=True``), or under a transform such as vmap, backward recomputes the layer in
    plain PyTorch and differentiates that.

    The outputs have been computed before (`Layer.forward`): a refusal leaves no node behind, and
    the plain call has one crossing of the boundary instead of two.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scanned: Scanned,
        outputs: tuple[Tensor, ...],
        saved: Tensor | None,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.scanned = scanned
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(outputs[0], saved, x, *tensors)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        y, saved, x, *tensors = ctx.saved_tensors
        layer, steps, states = scanned = ctx.scanned
        h0, c0, weights = _initial_states(tensors, states)
        wanted = ctx.needs_input_grad[3:]
        if (
            torch.is_grad_enabled()
            or torch._C._are_functorch_transforms_active()
            or torch._C._len_torch_dispatch_stack()
            or forward_ad._current_level >= 0
        ):
            return _differentiable_backward(scanned, x, tensors, (dy, dhn, dcn), wanted)
        overwrite = not _graph_is_kept()
        try:
            gradients = layer.backward(
                x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite
            )
        except kernels.RefusedError:
            # Saved tensors come back as their hooks return them: any of them may be at fault.
            given = [g for g in (y, saved, dy, dhn, dcn) if g is not None]
            reason = kernels.refusal(x, h0, c0, [*weights, *given])
            if reason is None:
                raise
            if reason != kernels.GAPS:
                return _differentiable_backward(scanned, x, tensors, (dy, dhn, dcn), wanted)
            dense: list[Any] = [
                None if t is None else t.contiguous() for t in (x, y, saved, dy, dhn, dcn, *tensors)
            ]
            x, y, saved, dy, dhn, dcn, *tensors = dense
            h0, c0, weights = _initial_states(tensors, states)
            gradients = layer.backward(
                x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite
            )
        return (None, None, None, *gradients)


record: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, Scan).apply
"""``record(scanned, outputs, saved, x, *weights, *initial_states)``: differentiable ``outputs``.

``Scan.apply`` without its look for functorch transforms: the caller has looked already.
"""


def _initial_states(
    tensors: Sequence[Tensor], states: int
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor]]:
    """``h0, c0, weights`` of what was recorded."""
    if not states:
        return None, None, tensors
    count = len(tensors) - states
    return tensors[count], (tensors[count + 1] if states == 2 else None), tensors[:count]


def _differentiable_backward(
    scanned: Scanned,
    x: Tensor,
    tensors: Sequence[Tensor],
    incoming: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    layer, steps, states = scanned
    create_graph = torch.is_grad_enabled()
    # Backward may run under autocast, the layer did not.
    with torch.autocast(x.device.type, enabled=False):
        with torch.enable_grad():
            # Aliases, so that one input being a function of another does not count twice.
            x, *tensors = inputs = [t.view_as(t) for t in (x, *tensors)]
            outputs = reference.layer(
                layer.mode,
                x,
                *_initial_states(tensors, states),
                directions=layer.directions,
                bias=layer.bias,
                batch_first=layer.batch_first,
                steps=steps,
            )
        needed = [t for t, need in zip(inputs, wanted, strict=True) if need]
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
    return (None, None, None, *(next(found) if need else None for need in wanted))
