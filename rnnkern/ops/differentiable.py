"""The scan of a layer and its backward pass as differentiable operators.

The derivatives of ``torch.ops.rnnkern.scan`` and ``scan_backward`` are those of `_Scan` and
`_ScanBackward`. These also run under the transforms of `torch.func` and in forward mode, because
torch's operators cannot carry such rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rnnkern.interop.exporting import to_torch
from rnnkern.layer import PACKED, Gradients, Layer, Maybe, Operands, Recorded
from rnnkern.ops.kernel_ops import (
    LIBRARY,
    TAGS,
    arguments,
    run_backward,
    runs_on_kernels,
    saves,
    steps_of,
)
from rnnkern.ops.modes import apply, forward_levels, has_modes, in_batches, transformed
from rnnkern.sequence import Steps

STEPS = 5
"""How many arguments the steps of a layer are."""


def scan(
    layer: Layer, steps: Steps | None, operands: Operands, training: bool
) -> tuple[Tensor, Tensor, Maybe]:
    """``y, h_n, c_n`` of a layer, in a mode of torch that sees operators only."""
    x, h0, c0, weights, _ = operands
    if to_torch():
        from rnnkern.interop import aten

        options = (None, None) if steps is None else (steps.lengths, steps.reset)
        y, hn, cn = aten.exported(x, h0, c0, list(weights), *options, *layer, training)
        return y, hn, cn if layer.has_cell_state else None
    if transformed() and not is_compiling() and forward_levels() > 1:
        # torch runs the jvp of a Function with the outer levels switched off.
        from rnnkern import reference

        y, hn, *cns = reference.layer(layer, operands, steps)
        return y, hn, cns[0] if cns else None
    own = arguments(steps)
    if transformed():
        y, hn, cn, _ = apply(_Scan, layer, x, h0, c0, *own, *weights)
    else:
        y, hn, cn, _ = torch.ops.rnnkern.scan(x, h0, c0, weights, *own, *layer, training)
    if training and not is_compiling():
        y = y.clone()  # y itself is what backward reads, and the caller may change it in place
    return y, hn, cn if layer.has_cell_state else None


def scan_backward(recorded: Recorded, incoming: Gradients, wanted: Sequence[bool]) -> list[Maybe]:
    """Differentiable gradients of ``x, *weights`` and the initial states that are not None.

    None for those that are not ``wanted``. The last one is that of the slots ``[D, rows, S * H]``.
    """
    layer, steps, (x, h0, c0, weights, y), saved = recorded
    outputs, own, flags = incoming[:3], arguments(steps), list(wanted)
    if not has_modes() or transformed():
        data = (x, h0, c0, y, saved)
        made = apply(_ScanBackward, layer, tuple(flags), *outputs, *data, *own, *weights)
    else:
        made = torch.ops.rnnkern.scan_backward(
            *outputs, x, h0, c0, weights, y, saved, *own, *layer, flags
        )
    return [part if flag else None for part, flag in zip(made, [*flags, True], strict=True)]


# The operators


def _code(layer: Layer, packed: bool) -> int:
    return layer.code + PACKED * packed


def _forward(
    x: Tensor, h0: Maybe, c0: Maybe, weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``y, h_n, c_n`` and what backward needs; a tensor without elements if there is none."""
    *steps, packed = rest[:STEPS]
    layer, training = Layer(*rest[STEPS:-1]), rest[-1]
    made = torch.ops.rnnkern.scan_kernel(x, weights, _code(layer, packed), training, h0, c0, *steps)
    y, hn, *others = made
    cn = others.pop(0) if layer.has_cell_state else x.new_empty(0)
    return y, hn, cn, others[0] if others else x.new_empty(0)


def _backward(*operands: Any, run: Callable[..., list[Tensor]] | None = None) -> list[Tensor]:
    """`scan_backward` as an operator: a gradient that is not wanted has no elements."""
    *incoming, x, h0, c0, weights, y, saved = operands[:9]
    *steps, packed = operands[9 : 9 + STEPS]
    layer, wanted = Layer(*operands[9 + STEPS : -1]), operands[-1]
    code = _code(layer, packed)
    kept = saved if saves(layer.code) else None
    run = run or torch.ops.rnnkern.scan_backward_kernel
    made = iter(run(x, weights, y, code, wanted, *incoming, kept, h0, c0, *steps))
    return [next(made) if flag else x.new_empty(0) for flag in (*wanted, True)]


def _scan_of_autograd(
    x: Tensor, h0: Maybe, c0: Maybe, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, h0, c0, weights):
        layer = Layer(*rest[STEPS:-1])
        return apply(_Scan, layer, x, h0, c0, *rest[:STEPS], *weights)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(x, h0, c0, weights, *rest)


def _scan_backward_of_autograd(*operands: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        *incoming, x, h0, c0, weights, y, saved = operands[:9]
        steps, spec, wanted = operands[9 : 9 + STEPS], operands[9 + STEPS : -1], operands[-1]
        layer, flags = Layer(*spec), tuple(wanted)
        data = (x, h0, c0, y, saved)
        return list(apply(_ScanBackward, layer, flags, *incoming, *data, *steps, *weights))
    with torch._C._AutoDispatchBelowAutograd():
        return _backward(*operands)


_OPERANDS = "Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights"
_STEPS = "Tensor? active, Tensor? order, Tensor? reset, Tensor? placed, bool packed"
_LAYER = (
    "str mode, int directions, bool bias, bool batch_first, bool proj, bool by_bfloat16, "
    "bool is_cell"
)
LIBRARY.define(
    f"scan({_OPERANDS}, {_STEPS}, {_LAYER}, bool training) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)
LIBRARY.define(
    f"scan_backward(Tensor? dy, Tensor? dhn, Tensor? dcn, {_OPERANDS}, Tensor y, Tensor saved, "
    f"{_STEPS}, {_LAYER}, bool[] wanted) -> Tensor[]",
    tags=TAGS,
)
for _name, _run_it, _differentiate_it in (
    ("scan", _forward, _scan_of_autograd),
    ("scan_backward", _backward, _scan_backward_of_autograd),
):
    LIBRARY.impl(_name, _run_it, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _differentiate_it, "Autograd")


# Their derivatives


def _keep(ctx: Any, recorded: Recorded, incoming: Sequence[Maybe] = ()) -> None:
    """``incoming``: what backward also keeps, gradients of the outputs and of the slots."""
    ctx.layer, steps, (x, h0, c0, weights, y), saved = recorded
    *own, ctx.packed = arguments(steps)
    ctx.set_materialize_grads(False)
    ctx.tensors = len(incoming)
    tensors = (x, h0, c0, y, saved, *incoming, *own, *weights)
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _kept(ctx: Any) -> tuple[Recorded, list[Maybe]]:
    """The forward pass, and ``incoming`` of `_keep`."""
    x, h0, c0, y, saved, *rest = ctx.saved_tensors
    incoming, rest = rest[: ctx.tensors], rest[ctx.tensors :]
    active, order, reset, placed, *weights = rest
    steps = steps_of(active, order, reset, placed, ctx.packed)
    return Recorded(ctx.layer, steps, Operands(x, h0, c0, weights, y), saved), incoming


def _backward_of_scan(
    ctx: Any, wanted: Sequence[bool], incoming: Gradients
) -> tuple[list[Maybe], list[Maybe]]:
    """Gradients of x, h0, c0; and of the weights."""
    recorded, _ = _kept(ctx)
    _, h0, c0, weights, _ = recorded.operands
    if all(z is None for z in incoming):  # as if y was an operand of backward
        return [None] * 3, [None] * len(weights)
    flags = [wanted[0], *wanted[3:]]
    flags += [flag for s, flag in zip((h0, c0), wanted[1:3], strict=True) if s is not None]
    if not recorded.layer.has_cell_state:
        incoming = incoming._replace(cn=None)
    made = scan_backward(recorded, incoming, flags)
    count = 1 + len(weights)
    states = iter(made[count:-1])
    of_h0, of_c0 = (None if s is None else next(states) for s in (h0, c0))
    return [made[0], of_h0, of_c0], made[1:count]


def _derivative_of_backward(
    ctx: Any, change: Operands, changes: Gradients, wanted: Sequence[bool] | None = None
) -> tuple[Any, Any]:
    from rnnkern import derivatives
    from rnnkern.ops import second_order

    recorded, incoming = _kept(ctx)
    layer, steps, at, _ = recorded
    if torch.is_grad_enabled() and not at.y.requires_grad:
        # A copy that backward was given; what follows is to depend on the operands through it.
        at = at._replace(y=scan(layer, steps, at, training=True)[0])
    gradients = Gradients(*incoming)
    if second_order.has_kernel(at.x):
        return second_order.by_kernel(recorded, gradients, change, changes, wanted)
    return derivatives.of_backward(layer, steps, at, gradients, change, changes)


def _backward_of_backward(
    ctx: Any, incoming: Sequence[Maybe], wanted: Sequence[bool]
) -> tuple[list[Maybe], tuple[Any, ...]]:
    """Gradients of what backward has read: dy, dhn, dcn; x, h0, c0, weights, as far as wanted."""
    recorded, made_of = _kept(ctx)
    _, h0, c0, weights, _ = recorded.operands
    count = 1 + len(weights)
    flags = [*ctx.wanted, True]
    parts = [part if flag else None for part, flag in zip(incoming, flags, strict=True)]
    states = iter(parts[count:-1])
    of_h0, of_c0 = (None if s is None else next(states) for s in (h0, c0))
    outputs, gradients = _derivative_of_backward(
        ctx,
        Operands(parts[0], of_h0, of_c0, parts[1:count]),
        Gradients(None, None, None, parts[-1]),
        wanted,
    )
    return (
        [None if own is None else z for own, z in zip(made_of[:3], outputs, strict=True)],
        gradients[:-1],
    )


class _Scan(torch.autograd.Function):
    """``scan`` for autograd, the transforms of `torch.func` and forward mode."""

    @staticmethod
    def forward(layer: Layer, x: Tensor, h0: Maybe, c0: Maybe, *rest: Any) -> tuple[Tensor, ...]:
        steps, weights = rest[:STEPS], rest[STEPS:]
        return _forward(x, h0, c0, weights, *steps, *layer, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layer, x, h0, c0, *rest = inputs
        y, _, cn, saved = output
        ctx.mark_non_differentiable(*([saved] if layer.has_cell_state else [cn, saved]))
        operands = Operands(x, h0, c0, rest[STEPS:], y)
        _keep(ctx, Recorded(layer, steps_of(*rest[:STEPS]), operands, saved))

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dhn: Maybe, dcn: Maybe, _: Maybe) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        wanted = [*needs[1:4], *needs[4 + STEPS :]]
        data, of_weights = _backward_of_scan(ctx, wanted, Gradients(dy, dhn, dcn))
        return (None, *data, *[None] * STEPS, *of_weights)

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Maybe, ...]:
        from rnnkern import derivatives

        (layer, steps, at, _), _ = _kept(ctx)
        change = Operands(changes[1], changes[2], changes[3], changes[4 + STEPS :])
        y, hn, cn = derivatives.tangent(layer, steps, at, change)
        return y, hn, cn, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
        from rnnkern.ops import batched

        return batched.scan(_Scan, info.batch_size, in_dims, operands)


class _ScanBackward(torch.autograd.Function):
    """``scan_backward`` for autograd, the transforms of `torch.func` and forward mode."""

    @staticmethod
    def forward(layer: Layer, wanted: tuple[bool, ...], *rest: Any) -> tuple[Tensor, ...]:
        dy, dhn, dcn, x, h0, c0, y, saved, *others = rest
        steps, weights = others[:STEPS], others[STEPS:]
        # If no mode has to see the operator, it is left out: it costs more than the kernels of a
        # small layer.
        is_seen = has_modes() or not runs_on_kernels(x)
        operands = (dy, dhn, dcn, x, h0, c0, weights, y, saved, *steps, *layer, list(wanted))
        return tuple(_backward(*operands, run=None if is_seen else run_backward))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layer, ctx.wanted, *incoming = inputs[:5]
        (x, h0, c0, y, saved), rest = inputs[5:10], inputs[10:]
        operands = Operands(x, h0, c0, rest[STEPS:], y)
        recorded = Recorded(layer, steps_of(*rest[:STEPS]), operands, saved)
        _keep(ctx, recorded, [*incoming, output[-1]])
        flags = zip(output, [*ctx.wanted, True], strict=True)
        ctx.mark_non_differentiable(*(part for part, flag in flags if not flag))

    @staticmethod
    def backward(ctx: Any, *incoming: Maybe) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        wanted = [*needs[5:8], *needs[10 + STEPS :]]

        def run(*given: Maybe) -> list[Maybe]:
            outputs, (x, h0, c0, weights) = _backward_of_backward(ctx, given, wanted)
            return [*outputs, x, h0, c0, *weights]

        made = in_batches(run, *incoming)
        return (None, None, *made[:6], None, None, *[None] * STEPS, *made[6:])

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Maybe, ...]:
        dx, dh0, dc0 = changes[5:8]
        change = Operands(dx, dh0, dc0, changes[10 + STEPS :])
        _, (x, h0, c0, weights, slots) = _derivative_of_backward(
            ctx, change, Gradients(*changes[2:5])
        )
        parts = [x, *weights, *(s for s in (h0, c0) if s is not None), slots]
        flags = [*ctx.wanted, True]
        return tuple(p if flag else None for p, flag in zip(parts, flags, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
        from rnnkern.ops import batched

        return batched.scan_backward(_ScanBackward, info.batch_size, in_dims, operands)
