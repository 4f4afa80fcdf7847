"""The scan of a layer and its backward pass as differentiable operators.

The derivatives of ``torch.ops.rnnkern.scan`` and ``scan_backward`` are those of `_Scan` and
`_ScanBackward`. These also run under the transforms of `torch.func` and in forward mode, because
torch's operators cannot carry such rules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rnnkern.interop.exporting import to_torch
from rnnkern.known_cells import CELLS
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
from rnnkern.ops.modes import apply, has_modes, in_batches, transformed, without_rules
from rnnkern.sequence import Steps

STEPS = 5
"""How many arguments the steps of a layer are."""


# The operands of `_Scan` and `_ScanBackward`. torch.func visits each one about ten times, and a
# field of a tuple as often. So a layer is one number, and what is missing is left out at the end.

Four = tuple[Any, Any, Any, Any]


def of_scan(layer: Layer, steps: Steps | None, operands: Operands) -> tuple[Any, ...]:
    """The operands of `_Scan`: ``code, x, *weights``, and what there is of `parts_of_scan`."""
    x, h0, c0, weights, _ = operands
    *own, packed = arguments(steps)
    return (_code(layer, packed), x, *weights, *_cut(h0, c0, *own))


def parts_of_scan(code: int, rest: Sequence[Any]) -> tuple[Any, Any, Any, Four]:
    """``weights, h0, c0, (active, order, reset, placed)``, of operands after x."""
    weights, (h0, c0, *steps) = _parts(code, rest, 6)
    return weights, h0, c0, cast(Four, tuple(steps))


def of_scan_backward(
    recorded: Recorded, incoming: Gradients, wanted: Sequence[bool]
) -> tuple[Any, ...]:
    """The operands of `_ScanBackward`: ``code, flags, x, y, saved, *weights``, and what there is
    of `parts_of_scan_backward`. Bit i of ``flags`` is ``wanted[i]``.
    """
    layer, steps, (x, h0, c0, weights, y), saved = recorded
    *own, packed = arguments(steps)
    flags = sum(flag << i for i, flag in enumerate(wanted))
    given = _cut(*incoming[:3], h0, c0, *own)
    return (_code(layer, packed), flags, x, y, saved, *weights, *given)


def parts_of_scan_backward(code: int, rest: Sequence[Any]) -> tuple[Any, Any, Any, Any, Four]:
    """``weights, (dy, dhn, dcn), h0, c0, (active, order, reset, placed)``, of operands after
    ``saved``.
    """
    weights, (dy, dhn, dcn, h0, c0, *steps) = _parts(code, rest, 9)
    return weights, (dy, dhn, dcn), h0, c0, cast(Four, tuple(steps))


def _parts(code: int, rest: Sequence[Any], count: int) -> tuple[tuple[Any, ...], list[Any]]:
    """The weights, and as many other operands, None for those that were left out."""
    layer = Layer.of_code(code)
    weights = layer.directions * layer.tensors
    given = rest[weights:]
    return tuple(rest[:weights]), [*given, *[None] * (count - len(given))]


def _cut(*parts: Any) -> Sequence[Any]:
    """The parts without those at the end that are None."""
    count = len(parts)
    while count and parts[count - 1] is None:
        count -= 1
    return parts[:count]


def wanted_of(flags: int, weights: Sequence[Any], h0: Any, c0: Any) -> list[bool]:
    count = 1 + len(weights) + (h0 is not None) + (c0 is not None)
    return [bool(flags >> i & 1) for i in range(count)]


def scan(
    layer: Layer, steps: Steps | None, operands: Operands, training: bool
) -> tuple[Tensor, Tensor, Maybe]:
    """``y, h_n, c_n`` of a layer, in a mode of torch that sees operators only."""
    x, h0, c0, weights, _ = operands
    if to_torch():
        from rnnkern.interop import aten

        options = (None, None) if steps is None else (steps.lengths, steps.reset)
        y, hn, cn = aten.exported(x, h0, c0, list(weights), *options, *layer, training)
        return y, hn, cn if CELLS[layer.mode].has_cell_state else None
    if transformed() and not is_compiling() and without_rules():
        from rnnkern import reference

        y, hn, *cns = reference.layer(layer, operands, steps)
        return y, hn, cns[0] if cns else None
    if transformed():
        y, hn, cn, _ = apply(_Scan, *of_scan(layer, steps, operands))
    else:
        own = arguments(steps)
        y, hn, cn, _ = torch.ops.rnnkern.scan(x, h0, c0, weights, *own, *layer, training)
    if training and not is_compiling():
        y = y.clone()  # y itself is what backward reads, and the caller may change it in place
    return y, hn, cn if CELLS[layer.mode].has_cell_state else None


def scan_backward(recorded: Recorded, incoming: Gradients, wanted: Sequence[bool]) -> list[Maybe]:
    """Differentiable gradients of ``x, *weights`` and the initial states that are not None.

    None for those that are not ``wanted``. The last one is that of the slots ``[D, rows, S * H]``.
    """
    flags = list(wanted)
    if not has_modes() or transformed():
        made = apply(_ScanBackward, *of_scan_backward(recorded, incoming, flags))
    else:
        layer, steps, (x, h0, c0, weights, y), saved = recorded
        made = torch.ops.rnnkern.scan_backward(
            *incoming[:3], x, h0, c0, weights, y, saved, *arguments(steps), *layer, flags
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
        layer, steps = Layer(*rest[STEPS:-1]), steps_of(*rest[:STEPS])
        return apply(_Scan, *of_scan(layer, steps, Operands(x, h0, c0, weights)))  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(x, h0, c0, weights, *rest)


def _scan_backward_of_autograd(*operands: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        *incoming, x, h0, c0, weights, y, saved = operands[:9]
        steps, layer = steps_of(*operands[9 : 9 + STEPS]), Layer(*operands[9 + STEPS : -1])
        recorded = Recorded(layer, steps, Operands(x, h0, c0, weights, y), saved)
        own = of_scan_backward(recorded, Gradients(*incoming), operands[-1])
        return list(apply(_ScanBackward, *own))
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
    if all(z is None for z in incoming):  # as in `rnnkern.autograd`
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


def with_recorded_outputs(layer: Layer, steps: Steps | None, at: Operands) -> Operands:
    """The operands with outputs that depend on the others. Backward may have been given a copy of
    y, of which autograd knows nothing.
    """
    others = (at.x, at.h0, at.c0, *at.weights)
    is_copy = not at.y.requires_grad and any(z is not None and z.requires_grad for z in others)
    if not torch.is_grad_enabled() or not is_copy:
        return at
    return at._replace(y=scan(layer, steps, at, training=True)[0])


def _derivative_of_backward(
    ctx: Any, change: Operands, changes: Gradients, wanted: Sequence[bool] | None = None
) -> tuple[Any, Any]:
    from rnnkern import derivatives
    from rnnkern.ops import second_order

    recorded, incoming = _kept(ctx)
    layer, steps, at, _ = recorded
    at = with_recorded_outputs(layer, steps, at)
    gradients = Gradients(*incoming)
    # The kernel takes changes of the sums, but none of the cell's own parameters row by row.
    by_row = changes.slots is not None and CELLS[layer.mode].parameters
    if second_order.has_kernel(at.x) and not by_row:
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
    def forward(code: int, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        weights, h0, c0, own = parts_of_scan(code, rest)
        layer, packed = Layer.of_code(code), bool(code & PACKED)
        return _forward(x, h0, c0, weights, *own, packed, *layer, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        code, x, *rest = inputs
        weights, h0, c0, steps = parts_of_scan(code, rest)
        layer = Layer.of_code(code)
        y, _, cn, saved = output
        ctx.mark_non_differentiable(*([saved] if layer.has_cell_state else [cn, saved]))
        own = steps_of(*steps, bool(code & PACKED))
        ctx.code, ctx.others = code, len(rest) - len(weights)
        _keep(ctx, Recorded(layer, own, Operands(x, h0, c0, weights, y), saved))

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dhn: Maybe, dcn: Maybe, _: Maybe) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        of_weights, of_h0, of_c0, _steps = parts_of_scan(ctx.code, needs[2:])
        wanted = [needs[1], bool(of_h0), bool(of_c0), *of_weights]

        def run(*given: Maybe) -> list[Maybe]:
            (x, *states), weights = _backward_of_scan(ctx, wanted, Gradients(*given))
            return [x, *weights, *states]

        dx, *made = in_batches(run, dy, dhn, dcn)
        return (None, dx, *[*made, *[None] * 4][: len(of_weights) + ctx.others])

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Maybe, ...]:
        from rnnkern import derivatives

        (layer, steps, at, _), _ = _kept(ctx)
        of_weights, of_h0, of_c0, _ = parts_of_scan(ctx.code, changes[2:])
        change = Operands(changes[1], of_h0, of_c0, of_weights)
        y, hn, cn = derivatives.tangent(layer, steps, at, change)
        return y, hn, cn, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
        from rnnkern.ops import batched

        return batched.scan(_Scan, info.batch_size, in_dims, operands)


class _ScanBackward(torch.autograd.Function):
    """``scan_backward`` for autograd, the transforms of `torch.func` and forward mode."""

    @staticmethod
    def forward(
        code: int, flags: int, x: Tensor, y: Tensor, saved: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        weights, incoming, h0, c0, steps = parts_of_scan_backward(code, rest)
        layer, wanted = Layer.of_code(code), wanted_of(flags, weights, h0, c0)
        # If no mode has to see the operator, it is left out: it costs more than the kernels of a
        # small layer.
        is_seen = has_modes() or not runs_on_kernels(x)
        own = (*steps, bool(code & PACKED), *layer, wanted)
        operands = (*incoming, x, h0, c0, weights, y, saved, *own)
        return tuple(_backward(*operands, run=None if is_seen else run_backward))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        code, flags, x, y, saved, *rest = inputs
        weights, incoming, h0, c0, steps = parts_of_scan_backward(code, rest)
        ctx.wanted = wanted_of(flags, weights, h0, c0)
        ctx.code, ctx.others = code, len(rest) - len(weights)
        own = steps_of(*steps, bool(code & PACKED))
        recorded = Recorded(Layer.of_code(code), own, Operands(x, h0, c0, weights, y), saved)
        _keep(ctx, recorded, [*incoming, output[-1]])
        made = zip(output, [*ctx.wanted, True], strict=True)
        ctx.mark_non_differentiable(*(part for part, flag in made if not flag))

    @staticmethod
    def backward(ctx: Any, *incoming: Maybe) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        of_weights, _, of_h0, of_c0, _ = parts_of_scan_backward(ctx.code, needs[5:])
        wanted = [needs[2], bool(of_h0), bool(of_c0), *of_weights]

        def run(*given: Maybe) -> list[Maybe]:
            outputs, (x, h0, c0, weights) = _backward_of_backward(ctx, given, wanted)
            return [x, *weights, *outputs, h0, c0]

        dx, *made = in_batches(run, *incoming)
        others = len(of_weights) + ctx.others
        return (None, None, dx, None, None, *[*made, *[None] * 4][:others])

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Maybe, ...]:
        of_weights, incoming, dh0, dc0, _ = parts_of_scan_backward(ctx.code, changes[5:])
        change = Operands(changes[2], dh0, dc0, of_weights)
        _, (x, h0, c0, weights, slots) = _derivative_of_backward(ctx, change, Gradients(*incoming))
        parts = [x, *weights, *(s for s in (h0, c0) if s is not None), slots]
        flags = [*ctx.wanted, True]
        return tuple(p if flag else None for p, flag in zip(parts, flags, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
        from rnnkern.ops import batched

        return batched.scan_backward(_ScanBackward, info.batch_size, in_dims, operands)
