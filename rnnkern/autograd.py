"""Makes what the kernels have computed differentiable: one ``torch.autograd.Function`` a layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import kernels, ops
from rnnkern.kernels import Kernel
from rnnkern.layer import Gradients, Layer, Operands, Recorded, dense, one_step
from rnnkern.loops import go_on, loop_of
from rnnkern.sequence import Steps, is_packed

Scanned = tuple[Any, ...]
"""A kernel, its steps, and the number of initial states given: 0, or as many as the cell has.

For a step of a loop also the `Sums` of the graph.
"""

Saved = Tensor | bytearray | None
"""What forward saves: a flat tensor, or its bytes if it is small, because these are made faster."""


def _graph_is_kept() -> bool:
    return torch._C._autograd._get_current_graph_task_keep_graph()


_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


class Scan(torch.autograd.Function):
    """Makes the outputs of a layer differentiable, any number of times.

    The first derivative is a kernel. If it has to be differentiable (``create_graph=True``), or
    under a transform such as vmap, backward is the operator of `rnnkern.ops` instead.

    The outputs have been computed before (`Kernel.forward`). So a refusal leaves no node behind,
    and the plain call crosses the boundary to C++ once instead of twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        scanned: Scanned,
        outputs: tuple[Tensor, ...],
        y: Tensor | None,
        saved: Saved,
        x: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.scanned = scanned
        ctx.set_materialize_grads(False)
        # ctx.own is what forward saved, or False once backward has used it up. It is missing if a
        # hook has been given what was saved, which backward may then not write over.
        if _saved_tensor_hooks(True) is None:
            ctx.own = saved
            ctx.save_for_backward(y, x, *tensors)
        else:
            ctx.save_for_backward(y, x, *tensors, _as_tensor(saved, x.dtype))
        return outputs

    @staticmethod
    def backward(
        ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        return kernels.plain_backward(ctx, dy, dhn, dcn) or _backward(ctx, dy, dhn, dcn)


class ScanOfCell(torch.autograd.Function):
    """`Scan` for a cell, whose outputs are ``h`` or ``h, c``."""

    forward = Scan.forward

    @staticmethod
    def backward(
        ctx: Any, dh: Tensor | None, dc: Tensor | None = None
    ) -> tuple[Tensor | None, ...]:
        return kernels.plain_backward(ctx, dh, None, dc) or _backward(ctx, dh, None, dc)


def _backward(
    ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None
) -> tuple[Tensor | None, ...]:
    # Autograd calls backward without any gradient if what used the outputs has returned None for
    # all of them.
    if dy is None and dhn is None and dcn is None:
        return (None,) * len(ctx.needs_input_grad)
    if torch.is_grad_enabled() or ops.transformed() or ops.has_modes():
        return _by_operators(ctx, dy, dhn, dcn)
    dtype = next(g.dtype for g in (dy, dhn, dcn) if g is not None)
    y, saved, overwrite, x, tensors = _saved(ctx, dtype)
    kernel, steps, states, *sums = ctx.scanned
    h0, c0, weights = _initial_states(tensors, states)
    wanted = ctx.needs_input_grad[4:]
    run = kernels.profiled(kernel.backward, kernel.mode, " backward")
    if sums:
        run = sums[0].adding(run, kernel.tensors)
    try:
        gradients, _ = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite)
    except kernels.RefusedError:
        if ops.are_batches(dy, dhn, dcn):
            return _by_operators(ctx, dy, dhn, dcn)
        # Saved tensors come back as their hooks return them: any of them may be at fault.
        plain: list[Any] = [
            None if t is None else dense(t.to(dtype)) for t in (x, y, saved, dy, dhn, dcn, *tensors)
        ]
        x, y, saved, dy, dhn, dcn, *tensors = plain
        h0, c0, weights = _initial_states(tensors, states)
        gradients, _ = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite)
    _forget(ctx)
    return (None, None, None, None, *gradients)


record: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, Scan).apply
"""``record(scanned, outputs, y, saved, x, *weights, *initial_states)``: differentiable ``outputs``.

``y`` is the first output for backward to read, unchanged if the caller changes the output in place.
It is None if it is the last part of ``saved``.

This is ``Scan.apply`` without its check for functorch transforms, which the caller has made.
"""

record_cell: Callable[..., tuple[Tensor, ...]] = super(torch.autograd.Function, ScanOfCell).apply
"""`record` for a cell."""


def record_cell_in_loop(
    scanned: Scanned,
    outputs: tuple[Tensor, ...],
    y: Tensor | None,
    saved: Tensor | None,
    x: Tensor,
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """`record_cell` for a call that may be one of many in a graph (`rnnkern.loops`)."""
    weight = tensors[0]
    if weight.requires_grad and not any(t._is_view() for t in tensors[: scanned[0].tensors]):
        loop = loop_of(weight)
        if loop is not None:  # the first call may be the only one, and records no sums
            count = scanned[0].tensors
            sums, views = loop.sums_of(tensors[:count])
            scanned, tensors = (*scanned, sums), (*views, *tensors[count:])
        kept = y if saved is None else saved
        assert kept is not None  # one of the two is the graph's alone
        go_on(loop, weight, kept)
    return record_cell(scanned, outputs, y, saved, x, *tensors)


def _saved(ctx: Any, dtype: torch.dtype) -> tuple[Any, Any, bool, Tensor, list[Tensor]]:
    """``y, saved``, whether backward may write over what was saved, x, and the other operands."""
    y, x, *tensors = ctx.saved_tensors
    if not hasattr(ctx, "own"):
        return y, tensors.pop(), False, x, tensors
    if ctx.own is False:
        raise RuntimeError(
            "the backward pass of this layer or cell has used up what forward saved: it has run "
            "before, and something raised an error after it. Call the module again"
        )
    saved = _as_tensor(ctx.own, dtype)
    return y, saved, not (getattr(ctx, "is_shared", False) or _graph_is_kept()), x, tensors


def _as_tensor(saved: Saved, dtype: torch.dtype) -> Tensor | None:
    """A tensor over the bytes, whose numbers have the dtype of the layer.

    Gradients have it too. The input may come back from a hook with another one.
    """
    if isinstance(saved, bytearray):
        return torch.frombuffer(saved, dtype=dtype)
    return saved


def _forget(ctx: Any) -> None:
    """Frees what forward saved, as torch does with the tensors that it saves itself."""
    if hasattr(ctx, "own") and not _graph_is_kept():
        ctx.own = False


def _by_operators(
    ctx: Any, dy: Tensor | None, dhn: Tensor | None, dcn: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Backward if a mode or transform has to see it, or if it must be differentiable.

    Nothing that was saved is freed or overwritten, because derivatives of this may read it.
    """
    ctx.is_shared = True
    dtype = next(g.dtype for g in (dy, dhn, dcn) if g is not None)
    y, saved, _, x, tensors = _saved(ctx, dtype)
    kernel, steps, states = ctx.scanned[:3]
    y, saved, x, *tensors = (  # as hooks of saved tensors have returned them
        t if t is None or t.dtype == dtype else t.to(dtype) for t in (y, saved, x, *tensors)
    )
    h0, c0, weights = _initial_states(tensors, states)
    shapes = None
    if kernel.is_cell:  # the operators know layers: with an axis of time, and one of the batch
        shapes = [
            x.shape,
            *(w.shape for w in weights),
            *(s.shape for s in (h0, c0) if s is not None),
        ]
        x, y, h0, c0 = map(one_step, (x, y, h0, c0))
    if y is None:
        saved, y = _apart(saved, x, kernel, steps)
    kept = x.new_empty(0) if saved is None else saved
    wanted = ctx.needs_input_grad[4:]
    recorded = Recorded(Layer.of(kernel), steps, Operands(x, h0, c0, weights, y), kept)

    def run(*gradients: Tensor | None) -> list[Tensor | None]:
        if shapes is not None:
            gradients = tuple(map(one_step, gradients))
        made = ops.scan_backward(recorded, Gradients(*gradients), wanted)[:-1]
        if shapes is None:
            return made
        return [t if t is None else t.reshape(shape) for t, shape in zip(made, shapes, strict=True)]

    gradients = ops.in_batches(run, dy, dhn, dcn)
    _forget(ctx)
    return (None, None, None, None, *gradients)


def _apart(saved: Tensor, x: Tensor, kernel: Kernel, steps: Steps | None) -> tuple[Tensor, Tensor]:
    """What forward saved, and the output behind it, which has time first in memory."""
    *rows, _ = x.shape
    features = kernel.directions * kernel.out
    count = features * math.prod(rows)
    y = saved[saved.numel() - count :]
    if kernel.batch_first and not is_packed(steps):
        y = y.view(rows[1], rows[0], features).transpose(0, 1)
    else:
        y = y.view(*rows, features)
    return saved[: saved.numel() - count], y


def _initial_states(
    tensors: Sequence[Tensor], states: int
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor]]:
    """``h0, c0, weights`` of what was recorded."""
    if not states:
        return None, None, tensors
    count = len(tensors) - states
    return tensors[count], (tensors[count + 1] if states == 2 else None), tensors[:count]
