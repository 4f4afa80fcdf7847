"""The eager door: one ``torch.autograd.Function`` around the scan of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import kernels, ops
from rnnkern.derivatives import Spec, dense
from rnnkern.kernels import Layer
from rnnkern.sequence import Steps

Scanned = tuple[Layer, Steps | None, int]
"""A layer, its steps, and the number of initial states given: 0, or as many as the cell has."""


def _graph_is_kept() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What forward saved, y, x, and the other operands."""
    saved, *others = ctx.saved_tensors
    return ctx.saved if saved is None else saved, *others


class Scan(torch.autograd.Function):
    """Makes the outputs of a layer differentiable, any number of times.

    The first derivative is a kernel. Asked for a derivative of the derivative
    (``create_graph=True``), or under a transform such as vmap, backward is the operator of
    `rnnkern.ops`, which is differentiable itself.

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
        # Backward may write over what forward saved, but not if a hook has been given it.
        ctx.is_shared = _saved_tensor_hooks(True) is not None
        ctx.saved = None if ctx.is_shared else saved
        kept_y = outputs[-1] if len(outputs) > 2 + scanned[0].has_cell_state else outputs[0]
        ctx.save_for_backward(saved if ctx.is_shared else None, kept_y, x, *tensors)
        return outputs

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, *others: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        dcn, *of_kept_y = others if ctx.scanned[0].has_cell_state else (None, *others)
        if of_kept_y and of_kept_y[0] is not None:
            dy = of_kept_y[0] if dy is None else dy + of_kept_y[0]
        if dy is None and dhn is None and dcn is None:  # as where y was an operand of backward
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or ops.transformed() or ops.has_modes():
            return _by_operators(ctx, dy, dhn, dcn)
        saved, y, x, *tensors = _saved(ctx)
        layer, steps, states = ctx.scanned
        h0, c0, weights = _initial_states(tensors, states)
        wanted = ctx.needs_input_grad[3:]
        overwrite = not (ctx.is_shared or _graph_is_kept())
        run = kernels.profiled(layer.backward, layer.mode, " backward")
        try:
            gradients, _ = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite)
        except kernels.RefusedError:
            if ops.are_batches(dy, dhn, dcn):
                return _by_operators(ctx, dy, dhn, dcn)
            # Saved tensors come back as their hooks return them: any of them may be at fault.
            dtype = next(g.dtype for g in (dy, dhn, dcn) if g is not None)
            plain: list[Any] = [
                None if t is None else dense(t.to(dtype))
                for t in (x, y, saved, dy, dhn, dcn, *tensors)
            ]
            x, y, saved, dy, dhn, dcn, *tensors = plain
            h0, c0, weights = _initial_states(tensors, states)
            gradients, _ = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite)
        _forget(ctx)
        return (None, None, None, *gradients)


record: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, Scan).apply
"""``record(scanned, outputs, saved, x, *weights, *initial_states)``: differentiable ``outputs``.

These are ``y, h_n``, ``c_n`` if the cell has it, and y once more as backward will want it, whatever
the caller does to the first one. Without the latter, backward wants the first one. The second y is
an output too because derivatives of backward depend on what made it.

``Scan.apply`` without its look for functorch transforms: the caller has looked already.
"""


def _by_operators(ctx: Any, *incoming: Tensor | None) -> tuple[Tensor | None, ...]:
    """Backward for all who look on, and for derivatives of it, which read what was saved later."""
    ctx.is_shared = True
    saved, y, x, *tensors = _saved(ctx)
    layer, steps, states = ctx.scanned
    dtype = next(g.dtype for g in incoming if g is not None)
    y, saved, x, *tensors = (  # as hooks of saved tensors have returned them
        t if t is None or t.dtype == dtype else t.to(dtype) for t in (y, saved, x, *tensors)
    )
    h0, c0, weights = _initial_states(tensors, states)
    kept = x.new_empty(0) if saved is None else saved
    wanted, spec = ctx.needs_input_grad[3:], Spec.of(layer)

    def run(*gradients: Tensor | None) -> list[Tensor | None]:
        return ops.scan_backward(spec, steps, gradients, x, h0, c0, weights, y, kept, wanted)

    gradients = ops.in_batches(run, *incoming)[:-1]
    _forget(ctx)
    return (None, None, None, *gradients)


def _forget(ctx: Any) -> None:
    """Frees what forward saved, as torch does with the tensors that it knows of."""
    if not _graph_is_kept():
        ctx.saved = None


def _initial_states(
    tensors: Sequence[Tensor], states: int
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor]]:
    """``h0, c0, weights`` of what was recorded."""
    if not states:
        return None, None, tensors
    count = len(tensors) - states
    return tensors[count], (tensors[count + 1] if states == 2 else None), tensors[:count]
