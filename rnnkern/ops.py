"""The traced door: the scan of a layer and its backward pass as operators of torch.

``torch.ops.rnnkern.scan`` and ``scan_backward`` are differentiable: they are what Dynamo and
`torch.export` see. Their derivatives are those of `_Scan` and `_ScanBackward`, which also run under
the transforms of `torch.func` and in forward mode, because torch's operators cannot carry such
rules. Inside, ``scan_kernel`` and ``scan_backward_kernel`` run the kernels: they are what compiled
graphs call, and what dispatch modes see.

Operators take no alias of what they return and change nothing in place.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from rnnkern import kernels
from rnnkern.cells import CELLS
from rnnkern.exporting import to_torch
from rnnkern.on_import import on_import
from rnnkern.sequence import Steps, active_rows, check_range, ranked
from rnnkern.spec import PACKED, Gradients, Maybe, Point, Spec, dense, pieces, unflatten

_OPERANDS = "Tensor x, Tensor? h0, Tensor? c0, Tensor[] weights"
STEPS, SPEC = 5, 7  # arguments of each


def scan(
    layer: Spec,
    steps: Steps | None,
    x: Tensor,
    h0: Maybe,
    c0: Maybe,
    weights: Sequence[Tensor],
    training: bool,
) -> tuple[Tensor, Tensor, Maybe]:
    """``y, h_n, c_n`` of a layer, in a mode of torch that sees operators only."""
    if to_torch():
        lengths, reset = (None, None) if steps is None else (steps.lengths, steps.reset)
        from rnnkern import aten

        y, hn, cn = aten.exported(x, h0, c0, list(weights), lengths, reset, *layer, training)
        return y, hn, cn if layer.has_cell_state else None
    own = arguments(steps)
    if transformed() and not is_compiling() and _forward_levels() > 1:
        # torch runs the jvp of a Function with the outer levels switched off.
        from rnnkern import reference

        y, hn, *cns = reference.layer(
            layer.mode,
            x,
            h0,
            c0,
            weights,
            directions=layer.directions,
            bias=layer.bias,
            batch_first=layer.batch_first,
            steps=steps,
        )
        return y, hn, cns[0] if cns else None
    if transformed():
        y, hn, cn, _ = _apply(_Scan, layer, x, h0, c0, *own, *weights)
    else:
        y, hn, cn, _ = torch.ops.rnnkern.scan(x, h0, c0, weights, *own, *layer, training)
    if training and not is_compiling():
        y = y.clone()  # y itself is what backward reads, and the caller may change it in place
    return y, hn, cn if layer.has_cell_state else None


def scan_backward(
    layer: Spec,
    steps: Steps | None,
    incoming: Sequence[Maybe],
    x: Tensor,
    h0: Maybe,
    c0: Maybe,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    wanted: Sequence[bool],
) -> list[Maybe]:
    """Differentiable gradients of ``x, *weights`` and the initial states that are not None.

    None where they are not ``wanted``; and those of the slots, ``[D, rows, S * H]``.
    """
    own = arguments(steps)
    flags = list(wanted)
    if not has_modes() or transformed():
        made = _apply(
            _ScanBackward, layer, tuple(flags), *incoming, x, h0, c0, y, saved, *own, *weights
        )
    else:
        made = torch.ops.rnnkern.scan_backward(
            *incoming, x, h0, c0, weights, y, saved, *own, *layer, flags
        )
    return [part if flag else None for part, flag in zip(made, [*flags, True], strict=True)]


def transformed() -> bool:
    """Under a transform of `torch.func`, or in forward mode."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _forward_levels() -> int:
    """Transforms of forward mode that are one inside the other."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return sum(each.key() == torch._C._functorch.TransformType.Jvp for each in stack)


def only_differentiated() -> bool:
    """Under transforms of `torch.func` that are gradients, and no others."""
    if not torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return all(each.key() == torch._C._functorch.TransformType.Grad for each in stack)


def are_batches(*gradients: Maybe) -> bool:
    """Of ``torch.autograd.grad(..., is_grads_batched=True)``, which has a vmap of its own."""
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)


def in_batches(run: Callable[..., Sequence[Maybe]], *gradients: Maybe) -> Sequence[Maybe]:
    """``run(*gradients)``; where they are such batches, under `torch.func.vmap` instead."""
    if not are_batches(*gradients):
        return run(*gradients)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = tuple(0 if are_batches(g) else None for g in gradients)
    plain = [
        g if dim is None else torch._remove_batch_dim(g, level, 0, 0)  # type: ignore[arg-type]
        for g, dim in zip(gradients, dims, strict=True)
    ]
    is_made: list[bool] = []

    def made(*given: Maybe) -> tuple[Tensor, ...]:
        parts = run(*given)
        is_made[:] = [part is not None for part in parts]
        return tuple(part for part in parts if part is not None)

    parts = iter(torch.func.vmap(made, dims)(*plain))
    return [torch._add_batch_dim(next(parts), 0, level) if flag else None for flag in is_made]


def has_modes() -> bool:
    """A mode of torch sees every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def arguments(steps: Steps | None) -> tuple[Maybe, Maybe, Maybe, Maybe, bool]:
    if steps is None:
        return None, None, None, None, False
    return steps.active, steps.order, steps.reset, steps.placed, steps.packed


def _steps(active: Maybe, order: Maybe, reset: Maybe, placed: Maybe, packed: bool) -> Steps | None:
    if active is None and reset is None:
        return None
    return Steps(active, order, reset, packed, placed)


def _kernel(code: int, weights: Sequence[Tensor]) -> kernels.Layer:
    """The layer of that code, of the sizes that its weights have."""
    return _layer(code, *weights[1].shape)


@functools.lru_cache(maxsize=256)
def _layer(code: int, rows: int, columns: int) -> kernels.Layer:
    layer = Spec.of_code(code)
    return kernels.layer(
        layer.mode,
        directions=layer.directions,
        hidden=rows // CELLS[layer.mode].gates,
        proj=columns if layer.proj else 0,
        bias=layer.bias,
        batch_first=layer.batch_first,
        by_bfloat16=layer.by_bfloat16,
        is_cell=layer.is_cell,
    )


@functools.lru_cache(maxsize=256)
def _width_of_slots(code: int, rows: int) -> int:
    """Of all units, of weights that have that many rows."""
    layer = Spec.of_code(code)
    return layer.slots * (rows // CELLS[layer.mode].gates)


@functools.cache
def _saves(code: int) -> bool:
    """Whether forward saves something for backward besides its outputs."""
    layer = Spec.of_code(code)
    return layer.saves_slots or layer.proj


def _ended(steps: Steps | None) -> Maybe:
    """``[rows, 1]``: rows whose sequence has ended, which kernels leave as they find them."""
    if steps is None or steps.active is None or steps.packed:
        return None
    return ~active_rows(steps).reshape(-1, 1)


# What runs the kernels, and what compiled programs call. Each argument and each output costs time:
# so what a layer is is one number, what there may not be is left out at the end, there are no more
# outputs than needed, and no derivatives.


def _run(
    x: Tensor,
    weights: list[Tensor],
    code: int,
    training: bool,
    h0: Maybe = None,
    c0: Maybe = None,
    active: Maybe = None,
    order: Maybe = None,
    reset: Maybe = None,
    placed: Maybe = None,
) -> list[Tensor]:
    """y, h_n, c_n if there is one, and what backward needs if that is anything."""
    kernel = _kernel(code, weights)
    steps = _steps(active, order, reset, placed, bool(code & PACKED))
    run = kernels.profiled(kernel.forward, kernel.mode)
    try:
        outputs, _, _, saved = run(x, h0, c0, weights, steps, training)
    except kernels.RefusedError:
        x, h0, c0, *weights = (dense(t) for t in (x, h0, c0, *weights))
        outputs, _, _, saved = run(x, h0, c0, weights, steps, training)
    if saved is None:  # nothing, or nothing of anything
        return [*outputs, x.new_empty(0)] if training and _saves(code) else list(outputs)
    ended = _ended(steps)
    if ended is not None:
        layer = Spec.of_code(code)
        for piece in pieces(saved, layer, layer.hidden(weights)):
            piece.masked_fill_(ended, 0)
    return [*outputs, saved]


def _fake_run(
    x: Tensor,
    weights: list[Tensor],
    code: int,
    training: bool,
    h0: Maybe = None,
    c0: Maybe = None,
    active: Maybe = None,
    order: Maybe = None,
    reset: Maybe = None,
    placed: Maybe = None,
) -> list[Tensor]:
    layer, packed = Spec.of_code(code), bool(code & PACKED)
    H, O = layer.hidden(weights), weights[1].shape[1]
    D = layer.directions
    N = _batch(layer, x, active, order, h0, packed)
    made = [_rows_like(layer, x, D * O, packed), x.new_empty(D, N, O)]
    if layer.has_cell_state:
        made.append(x.new_empty(D, N, H))
    if training and _saves(code):
        widths = layer.slots * layer.saves_slots + layer.has_cell_state + layer.proj
        made.append(x.new_empty(D * _count(x) * H * widths))
    return made


def _batch(layer: Spec, x: Tensor, active: Maybe, order: Maybe, h0: Maybe, packed: bool) -> Any:
    if not packed:
        return x.shape[0 if layer.batch_first else 1]
    if order is not None or h0 is not None:
        return order.shape[0] if order is not None else h0.shape[1]  # type: ignore[union-attr]
    assert active is not None
    return int(active[0])


def _count(x: Tensor) -> Any:
    return x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]


def _rows_like(layer: Spec, x: Tensor, features: Any, packed: bool) -> Tensor:
    """Time first in memory, whichever axis comes first."""
    if packed:
        return x.new_empty(x.shape[0], features)
    if layer.batch_first:
        return x.new_empty(x.shape[1], x.shape[0], features).transpose(0, 1)
    return x.new_empty(x.shape[0], x.shape[1], features)


def _run_backward(
    x: Tensor,
    weights: list[Tensor],
    y: Tensor,
    code: int,
    wanted: Sequence[bool],
    dy: Maybe = None,
    dhn: Maybe = None,
    dcn: Maybe = None,
    saved: Maybe = None,
    h0: Maybe = None,
    c0: Maybe = None,
    active: Maybe = None,
    order: Maybe = None,
    reset: Maybe = None,
    placed: Maybe = None,
) -> list[Tensor]:
    """Gradients of ``x, *weights`` and the initial states, as far as wanted; and of the slots."""
    kernel = _kernel(code, weights)
    steps = _steps(active, order, reset, placed, bool(code & PACKED))
    run = kernels.profiled(kernel.backward, kernel.mode, " backward")
    try:
        made, slots = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, False)
    except kernels.RefusedError:
        x, h0, c0, *weights = (dense(t) for t in (x, h0, c0, *weights))
        y, saved, dy, dhn, dcn = (dense(t) for t in (y, saved, dy, dhn, dcn))
        made, slots = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, False)
    slots = slots.view(kernel.directions, _count(x), _width_of_slots(code, weights[1].shape[0]))
    ended = _ended(steps)
    if ended is not None:
        slots.masked_fill_(ended, 0)
    return [*(part for part in made if part is not None), slots]


def _fake_run_backward(
    x: Tensor,
    weights: list[Tensor],
    y: Tensor,
    code: int,
    wanted: Sequence[bool],
    dy: Maybe = None,
    dhn: Maybe = None,
    dcn: Maybe = None,
    saved: Maybe = None,
    h0: Maybe = None,
    c0: Maybe = None,
    active: Maybe = None,
    order: Maybe = None,
    reset: Maybe = None,
    placed: Maybe = None,
) -> list[Tensor]:
    layer = Spec.of_code(code)
    shapes = [w.shape for w in weights] + [s.shape for s in (h0, c0) if s is not None]
    made = [_rows_like(layer, x, x.shape[-1], bool(code & PACKED))] if wanted[0] else []
    made += [x.new_empty(shape) for shape, flag in zip(shapes, wanted[1:], strict=True) if flag]
    width = layer.slots * layer.hidden(weights)
    return [*made, x.new_empty(layer.directions, _count(x), width)]


_LIBRARY: Any = torch.library.Library("rnnkern", "DEF")  # type: ignore[no-untyped-call]
_INCOMING = "Tensor? dy, Tensor? dhn, Tensor? dcn"
_IF_GIVEN = (
    "Tensor? h0=None, Tensor? c0=None, Tensor? active=None, Tensor? order=None, "
    "Tensor? reset=None, Tensor? placed=None"
)
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
"""The kernels take operands as they lie."""


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=_TAGS)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, run, key)
    # `register_fake` would read this source, which takes a millisecond.
    _LIBRARY.impl(name, fake, "Meta")


_define(
    f"scan_kernel(Tensor x, Tensor[] weights, int layer, bool training, {_IF_GIVEN}) -> Tensor[]",
    _run,
    _fake_run,
)
_define(
    "scan_backward_kernel(Tensor x, Tensor[] weights, Tensor y, int layer, bool[] wanted, "
    "Tensor? dy=None, Tensor? dhn=None, Tensor? dcn=None, Tensor? saved=None, "
    f"{_IF_GIVEN}) -> Tensor[]",
    _run_backward,
    _fake_run_backward,
)


# The same with derivatives.


def _code(layer: Spec, packed: bool) -> int:
    return layer.code + PACKED * packed


def _forward(
    x: Tensor, h0: Maybe, c0: Maybe, weights: Sequence[Tensor], *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, h_n, c_n and what backward needs; without elements where there is none."""
    *steps, packed = rest[:STEPS]
    layer, training = Spec(*rest[STEPS:-1]), rest[-1]
    made = torch.ops.rnnkern.scan_kernel(x, weights, _code(layer, packed), training, h0, c0, *steps)
    y, hn, *others = made
    cn = others.pop(0) if layer.has_cell_state else x.new_empty(0)
    return y, hn, cn, others[0] if others else x.new_empty(0)


def _backward(
    dy: Maybe,
    dhn: Maybe,
    dcn: Maybe,
    x: Tensor,
    h0: Maybe,
    c0: Maybe,
    weights: Sequence[Tensor],
    y: Tensor,
    saved: Tensor,
    *rest: Any,
    run: Callable[..., list[Tensor]] | None = None,
) -> list[Tensor]:
    """As `scan_backward`; without elements where not wanted."""
    *steps, packed = rest[:STEPS]
    layer, wanted = Spec(*rest[STEPS:-1]), rest[-1]
    kept = saved if _saves(layer.code) else None
    run = run or torch.ops.rnnkern.scan_backward_kernel
    incoming = (dy, dhn, dcn)
    code = _code(layer, packed)
    made = iter(run(x, weights, y, code, wanted, *incoming, kept, h0, c0, *steps))
    return [next(made) if flag else x.new_empty(0) for flag in (*wanted, True)]


_STEPS = "Tensor? active, Tensor? order, Tensor? reset, Tensor? placed, bool packed"
_SPEC = (
    "str mode, int directions, bool bias, bool batch_first, bool proj, bool by_bfloat16, "
    "bool is_cell"
)
_LIBRARY.define(
    f"scan({_OPERANDS}, {_STEPS}, {_SPEC}, bool training) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
_LIBRARY.define(
    f"scan_backward({_INCOMING}, {_OPERANDS}, Tensor y, Tensor saved, {_STEPS}, {_SPEC}, "
    "bool[] wanted) -> Tensor[]",
    tags=_TAGS,
)


def _scan_of_autograd(
    x: Tensor, h0: Maybe, c0: Maybe, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, ...]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(x, h0, c0, weights):
        layer = Spec(*rest[STEPS:-1])
        return _apply(_Scan, layer, x, h0, c0, *rest[:STEPS], *weights)  # type: ignore[no-any-return]
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(x, h0, c0, weights, *rest)


def _scan_backward_of_autograd(*operands: Any) -> list[Tensor]:
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*operands):
        *incoming, x, h0, c0, weights, y, saved = operands[:9]
        steps, spec, wanted = operands[9 : 9 + STEPS], operands[9 + STEPS : -1], operands[-1]
        layer, flags = Spec(*spec), tuple(wanted)
        data = (x, h0, c0, y, saved)
        return list(_apply(_ScanBackward, layer, flags, *incoming, *data, *steps, *weights))
    with torch._C._AutoDispatchBelowAutograd():
        return _backward(*operands)


for _name, _run_it, _differentiate_it in (
    ("scan", _forward, _scan_of_autograd),
    ("scan_backward", _backward, _scan_backward_of_autograd),
):
    _LIBRARY.impl(_name, _run_it, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _differentiate_it, "Autograd")


def _ranked(lengths: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """As `rnnkern.sequence.ranked`, of lengths that nobody has checked."""
    check_range(lengths, T)
    return ranked(lengths, T)


def _fake_ranked(lengths: Tensor, T: int) -> tuple[Tensor, Tensor]:
    return lengths.new_empty(T), lengths.new_empty(lengths.shape)


_define("ranked(Tensor lengths, SymInt T) -> (Tensor, Tensor)", _ranked, _fake_ranked)


def _products(x: Any, weights: Any) -> int:
    """Floating-point operations of the products of a pass over all rows, from the shapes."""
    rows = x[0] if len(x) == 2 else x[0] * x[1]
    return sum(2 * rows * w[0] * w[1] for w in weights if len(w) == 2)


def _scan_flops(x: Any, weights: Any, *rest: Any, **_: Any) -> int:
    return _products(x, weights)


def _scan_backward_flops(x: Any, weights: Any, *rest: Any, **_: Any) -> int:
    return 2 * _products(x, weights)  # with the operands, and with the weights


def _count_operations(counter: Any) -> None:
    counter.register_flop_formula(torch.ops.rnnkern.scan_kernel)(_scan_flops)
    counter.register_flop_formula(torch.ops.rnnkern.scan_backward_kernel)(_scan_backward_flops)


on_import("torch.utils.flop_counter", _count_operations)


# What both doors of autograd keep and do.


def _keep(
    ctx: Any,
    layer: Spec,
    steps: Sequence[Any],
    data: Sequence[Maybe],
    weights: Sequence[Tensor],
    incoming: Sequence[Maybe] = (),
    for_forward: bool = False,
) -> None:
    """``data``: x, h0, c0, y, saved; backward also keeps gradients: incoming and of the slots."""
    ctx.layer, ctx.packed = layer, steps[-1]
    ctx.set_materialize_grads(False)
    ctx.tensors = len(incoming)
    tensors = (*data, *incoming, *steps[:-1], *weights)
    ctx.save_for_backward(*tensors)
    if for_forward:
        ctx.save_for_forward(*tensors)


def _refusal(x: Tensor) -> str | None:
    """Why a tensor is not one for kernels."""
    reason = kernels.refusal(x, None, None, ())
    return None if reason == kernels.GAPS else reason


# What torch leaves untyped.
def _apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    if torch._C._are_functorch_transforms_active():
        return function.apply(*operands)  # type: ignore[no-untyped-call]
    # What `torch.func.vjp` returns is called after its transform has ended. The saved tensors are
    # then still wrapped, and a wrapper says that it requires a gradient.
    operands = unwrap_dead_wrappers(operands)
    return super(torch.autograd.Function, function).apply(*operands)  # type: ignore[misc]


def _kept(ctx: Any) -> tuple[list[Any], list[Maybe], Steps | None, list[Tensor]]:
    saved: list[Any] = list(ctx.saved_tensors)
    data, saved = saved[:5], saved[5:]
    incoming, saved = saved[: ctx.tensors], saved[ctx.tensors :]
    active, order, reset, placed, *weights = saved
    return data, incoming, _steps(active, order, reset, placed, ctx.packed), weights


def _backward_of_scan(
    ctx: Any, wanted: Sequence[bool], incoming: tuple[Maybe, Maybe, Maybe]
) -> tuple[list[Maybe], list[Maybe]]:
    """Gradients of x, h0, c0; and of the weights."""
    (x, h0, c0, y, saved), _, steps, weights = _kept(ctx)
    layer = ctx.layer
    if all(z is None for z in incoming):  # as where y was an operand of backward
        return [None] * 3, [None] * len(weights)
    flags = [wanted[0], *wanted[3:]]
    flags += [flag for s, flag in zip((h0, c0), wanted[1:3], strict=True) if s is not None]
    dcn = incoming[2] if layer.has_cell_state else None
    made = scan_backward(layer, steps, (*incoming[:2], dcn), x, h0, c0, weights, y, saved, flags)
    count = 1 + len(weights)
    states = iter(made[count:-1])
    of_h0, of_c0 = (None if s is None else next(states) for s in (h0, c0))
    return [made[0], of_h0, of_c0], made[1:count]


def _derivative_of_backward(
    ctx: Any,
    change: Sequence[Maybe],
    of_weights: Sequence[Maybe],
    changes: Gradients,
    wanted: Sequence[bool] | None = None,
) -> tuple[Any, Any]:
    (x, h0, c0, y, saved), incoming, steps, weights = _kept(ctx)
    if torch.is_grad_enabled() and not y.requires_grad:
        # A copy that backward was given; what follows is to depend on the operands through it.
        y, _, _ = scan(ctx.layer, steps, x, h0, c0, weights, training=True)
    at, gradients = Point(x, h0, c0, weights, y), Gradients(*incoming)
    direction = Point(change[0], change[1], change[2], of_weights)
    if has_second_order(x):
        return second_order(ctx.layer, steps, at, saved, gradients, direction, changes, wanted)
    from rnnkern import derivatives

    return derivatives.of_backward(ctx.layer, steps, at, gradients, direction, changes)


def has_second_order(x: Tensor) -> bool:
    """A kernel has second derivatives here, and nobody looks on or differentiates further."""
    is_covered = x.device.type == "cpu" and not kernels.IS_STAND_IN and x.numel() > 0
    is_seen = torch.is_grad_enabled() or transformed() or has_modes()
    return is_covered and not is_seen and not _refusal(x)


def second_order(
    layer: Spec,
    steps: Steps | None,
    at: Point,
    saved: Tensor,
    gradients: Gradients,
    change: Point,
    changes: Gradients,
    wanted: Sequence[bool] | None = None,
) -> tuple[Any, Any]:
    """As `derivatives.of_backward`, by a kernel, from what forward has saved.

    ``wanted``: derivatives of the gradients of ``x, h_0, c_0, *weights``, else None; all by
    default.
    """
    x = at.x
    assert x is not None
    dtype, computed = x.dtype, torch.promote_types(x.dtype, torch.float32)

    def own(z: Maybe) -> Maybe:
        return None if z is None else dense(z.to(computed))

    def operands(given: Point) -> tuple[Any, ...]:
        return own(given.x), own(given.h0), own(given.c0), [own(w) for w in given.weights]

    def result(z: Any) -> Any:
        return None if z is None else z.to(dtype)

    point = (*operands(at), steps, own(at.y), own(saved))
    point += (own(gradients.slots), [own(z) for z in gradients[:3]])
    direction = (*operands(change), own(changes.slots), [own(z) for z in changes[:3]])
    of_x, of_h0, of_c0, *of_weights = wanted or [True] * (3 + len(at.weights))
    flags = [of_x, *of_weights]
    flags += [flag for s, flag in ((at.h0, of_h0), (at.c0, of_c0)) if s is not None]
    kernel = _kernel(layer.code, at.weights)  # type: ignore[arg-type]
    run = kernels.profiled(kernel.second_order, layer.mode, " second order")
    outputs, made, slots = run(point, direction, flags)
    ended = _ended(steps)
    if ended is not None:
        slots.masked_fill_(ended, 0)
    made = [result(z) for z in made]
    count = 1 + len(at.weights)
    states = iter(made[count:])
    h0, c0 = (None if s is None else next(states) for s in (at.h0, at.c0))
    y, hn, cn = map(result, outputs)
    return (y, hn, cn), (made[0], h0, c0, made[1:count], result(slots))


def _backward_of_backward(
    ctx: Any, incoming: Sequence[Maybe], wanted: Sequence[bool]
) -> tuple[list[Maybe], tuple[Any, ...]]:
    """Of what the gradients were made of: dy, dhn, dcn; x, h0, c0, weights, as far as wanted."""
    (_, h0, c0, _, _), made_of, _, weights = _kept(ctx)
    count = 1 + len(weights)
    flags = [*ctx.wanted, True]
    parts = [part if flag else None for part, flag in zip(incoming, flags, strict=True)]
    states = iter(parts[count:-1])
    of_h0, of_c0 = (None if s is None else next(states) for s in (h0, c0))
    outputs, gradients = _derivative_of_backward(
        ctx,
        (parts[0], of_h0, of_c0),
        parts[1:count],
        Gradients(None, None, None, parts[-1]),
        wanted,
    )
    return (
        [None if own is None else z for own, z in zip(made_of[:3], outputs, strict=True)],
        gradients[:-1],
    )


class _Scan(torch.autograd.Function):
    """``scan`` for the transforms of `torch.func` and forward mode."""

    @staticmethod
    def forward(layer: Spec, x: Tensor, h0: Maybe, c0: Maybe, *rest: Any) -> tuple[Tensor, ...]:
        steps, weights = rest[:STEPS], rest[STEPS:]
        return _forward(x, h0, c0, weights, *steps, *layer, True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layer, x, h0, c0, *rest = inputs
        y, _, cn, saved = output
        ctx.mark_non_differentiable(*([saved] if layer.has_cell_state else [cn, saved]))
        data = (x, h0, c0, y, saved)
        _keep(ctx, layer, rest[:STEPS], data, rest[STEPS:], for_forward=True)

    @staticmethod
    def backward(ctx: Any, dy: Maybe, dhn: Maybe, dcn: Maybe, _: Maybe) -> tuple[Any, ...]:
        needs = ctx.needs_input_grad
        data, of_weights = _backward_of_scan(
            ctx, [*needs[1:4], *needs[4 + STEPS :]], (dy, dhn, dcn)
        )
        return (None, *data, *[None] * STEPS, *of_weights)

    @staticmethod
    def jvp(ctx: Any, *changes: Any) -> tuple[Maybe, ...]:
        (x, h0, c0, y, _), _, steps, weights = _kept(ctx)
        change = Point(changes[1], changes[2], changes[3], changes[4 + STEPS :])
        from rnnkern import derivatives

        y, hn, cn = derivatives.tangent(ctx.layer, steps, Point(x, h0, c0, weights, y), change)
        return y, hn, cn, None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
        layer, x, h0, c0, *rest = operands
        if not _folds(in_dims[4:]):
            return _one_by_one(_Scan, info.batch_size, in_dims, operands)
        fold = _Fold(info.batch_size, layer, rest[STEPS - 1])
        y, hn, cn, saved = _apply(
            _Scan,
            layer,
            fold.rows(x, in_dims[1]),
            fold.states(h0, in_dims[2]),
            fold.states(c0, in_dims[3]),
            *fold.steps(rest[:STEPS], in_dims[4 + 2]),
            *rest[STEPS:],
        )
        cell = layer.has_cell_state
        outputs = (
            fold.from_rows(y),
            fold.from_states(hn),
            fold.from_states(cn) if cell else cn,
            fold.from_saved(saved, layer, layer.hidden(rest[STEPS:])),
        )
        return outputs, (0, 0, 0 if cell else None, 0)


class _ScanBackward(torch.autograd.Function):
    """``scan_backward`` for the transforms of `torch.func` and forward mode."""

    @staticmethod
    def forward(layer: Spec, wanted: tuple[bool, ...], *rest: Any) -> tuple[Tensor, ...]:
        dy, dhn, dcn, x, h0, c0, y, saved, *others = rest
        steps, weights = others[:STEPS], others[STEPS:]
        # Where nobody looks, not the operator: it costs more than the kernels of a small layer.
        is_seen = has_modes() or _refusal(x)
        operands = (dy, dhn, dcn, x, h0, c0, weights, y, saved, *steps, *layer, list(wanted))
        return tuple(_backward(*operands, run=None if is_seen else _run_backward))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        layer, wanted, *incoming = inputs[:5]
        data, rest = inputs[5:10], inputs[10:]
        incoming = [*incoming, output[-1]]
        _keep(ctx, layer, rest[:STEPS], data, rest[STEPS:], incoming, for_forward=True)
        ctx.wanted = wanted
        flags = zip(output, [*wanted, True], strict=True)
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
        _, (x, h0, c0, weights, slots) = _derivative_of_backward(
            ctx, changes[5:8], changes[10 + STEPS :], Gradients(*changes[2:5])
        )
        parts = [x, *weights, *(s for s in (h0, c0) if s is not None), slots]
        flags = [*ctx.wanted, True]
        return tuple(p if flag else None for p, flag in zip(parts, flags, strict=True))

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Any, Any]:
        layer, wanted, dy, dhn, dcn, x, h0, c0, y, saved, *rest = operands
        steps, weights = rest[:STEPS], rest[STEPS:]
        of_weights = wanted[1 : 1 + len(weights)]
        if not _folds(in_dims[10:]) or (layer.proj and any(of_weights)):
            return _one_by_one(_ScanBackward, info.batch_size, in_dims, operands)
        fold = _Fold(info.batch_size, layer, rest[STEPS - 1])
        dims = in_dims[2:]
        incoming = (fold.rows(dy, dims[0]), fold.states(dhn, dims[1]), fold.states(dcn, dims[2]))
        own_x, own_y = fold.rows(x, dims[3]), fold.rows(y, dims[6])
        own_h0, own_c0 = fold.states(h0, dims[4]), fold.states(c0, dims[5])
        own_steps = fold.steps(steps, in_dims[10 + 2])
        own_saved = fold.saved(saved, dims[7], layer, layer.hidden(weights))
        flags = (wanted[0], *[False] * len(weights), *wanted[1 + len(weights) :])
        # One pass for all; each one's gradients of the weights are products of their own.
        made = _apply(
            _ScanBackward,
            layer,
            flags,
            *incoming,
            own_x,
            own_h0,
            own_c0,
            own_y,
            own_saved,
            *own_steps,
            *weights,
        )
        parts: list[Tensor] = list(made)
        out_dims: list[int | None] = [None] * len(made)
        for i, flag in enumerate(flags):
            if flag:
                unfold = fold.from_states if i else fold.from_rows
                parts[i], out_dims[i] = unfold(made[i]), 0
        parts[-1], out_dims[-1] = fold.from_states(made[-1]), 0
        if any(of_weights):
            at = Point(own_x, own_h0, own_c0, weights, own_y)
            from rnnkern import derivatives

            found = derivatives.weight_gradients(
                layer, _steps(*own_steps), at, made[-1], info.batch_size
            )
            for i, flag in enumerate(of_weights):
                if flag:
                    parts[1 + i], out_dims[1 + i] = found[i], 0
        return tuple(parts), tuple(out_dims)


def _folds(in_dims: Sequence[Any]) -> bool:
    """Batches of data alone, and of ``reset``, can be rows of one batch."""
    active, order, _, placed, *_ = in_dims
    return all(dim is None for dim in (active, order, placed, *in_dims[STEPS:]))


def _one_by_one(
    function: type[torch.autograd.Function], size: int, in_dims: Any, operands: Any
) -> tuple[Any, Any]:
    results = [
        _apply(
            function,
            *(
                o.select(d, i) if isinstance(o, Tensor) and d is not None else o
                for o, d in zip(operands, in_dims, strict=True)
            ),
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


class _Fold:
    """A batch of operands as more rows of one: row n of sample b becomes row n * size + b."""

    def __init__(self, size: int, layer: Spec, packed: bool) -> None:
        self.size = size
        self.axis = 0 if packed or layer.batch_first else 1  # of the rows

    def _first(self, z: Tensor, dim: int | None) -> Tensor:
        return z.expand(self.size, *z.shape) if dim is None else z.movedim(dim, 0)

    def rows(self, z: Maybe, dim: int | None) -> Maybe:
        if z is None:
            return None
        return self._first(z, dim).movedim(0, self.axis + 1).flatten(self.axis, self.axis + 1)

    def from_rows(self, z: Tensor) -> Tensor:
        return unflatten(z, self.axis, (-1, self.size)).movedim(self.axis + 1, 0)

    def states(self, z: Maybe, dim: int | None) -> Maybe:
        return None if z is None else self._first(z, dim).movedim(0, 2).flatten(1, 2)

    def from_states(self, z: Tensor) -> Tensor:
        """Of ``[D, N, ...]``, and of what is saved, ``[D, rows, ...]``."""
        return unflatten(z, 1, (-1, self.size)).movedim(2, 0)

    def steps(self, steps: Sequence[Any], dim: int | None) -> tuple[Any, ...]:
        active, order, reset, placed, packed = steps
        if order is not None:
            own = torch.arange(self.size, device=order.device)
            order = (order[:, None] * self.size + own).flatten()
        if reset is not None:
            reset = self.rows(reset[..., None], dim).squeeze(-1).contiguous()  # type: ignore[union-attr]
        active, placed = (None if z is None else z * self.size for z in (active, placed))
        return active, order, reset, placed, packed

    def saved(self, z: Tensor, dim: int | None, layer: Spec, hidden: int) -> Tensor:
        parts = pieces(self._first(z, dim), layer, hidden)
        return torch.cat([part.movedim(0, 2).flatten() for part in parts] or [z.new_empty(0)])

    def from_saved(self, z: Tensor, layer: Spec, hidden: int) -> Tensor:
        parts = [self.from_states(part).flatten(1) for part in pieces(z, layer, hidden)]
        return torch.cat(parts or [z.new_empty(self.size, 0)], -1)
