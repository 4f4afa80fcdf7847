"""The operators that run the kernels, and what compiled graphs call.

Each argument and each output costs time. So a layer is one number, what may be missing is left out
at the end, there are no more outputs than needed, and the operators have no derivatives.

torch keeps compiled graphs on disk by the names of operators. If the schema or the meaning of one
changes, give it a new name.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import kernels
from rnnkern.interop.on_import import on_import
from rnnkern.kernels import Kernel, Why
from rnnkern.known_cells import CELLS
from rnnkern.layer import PACKED, Layer, Maybe, Operands, dense, pieces
from rnnkern.sequence import Steps, active_mask, check_range, ranked


def arguments(steps: Steps | None) -> tuple[Maybe, Maybe, Maybe, Maybe, bool]:
    """The steps as operators take them: ``active, order, reset, placed, packed``."""
    if steps is None:
        return None, None, None, None, False
    return steps.active, steps.order, steps.reset, steps.placed, steps.packed


def steps_of(
    active: Maybe, order: Maybe, reset: Maybe, placed: Maybe, packed: bool
) -> Steps | None:
    if active is None and reset is None:
        return None
    return Steps(active, order, reset, packed, placed)


def kernel_for(code: int, weights: Sequence[Tensor]) -> Kernel:
    """The kernels for the layer of that code, of the sizes that its weights have."""
    return _kernel(code, weights[0].shape[0], Layer.of_code(code).out(weights))


@functools.lru_cache(maxsize=256)
def _kernel(code: int, rows: int, columns: int) -> Kernel:
    layer = Layer.of_code(code)
    return kernels.kernel_of(layer, rows // CELLS[layer.mode].gates, columns if layer.proj else 0)


@functools.lru_cache(maxsize=256)
def _width_of_slots(code: int, rows: int) -> int:
    """How many slots all units have, for weights of that many rows."""
    layer = Layer.of_code(code)
    return layer.stored * (rows // CELLS[layer.mode].gates)


@functools.cache
def saves(code: int) -> bool:
    """Whether forward saves something for backward besides its outputs."""
    layer = Layer.of_code(code)
    return layer.saves_slots or layer.has_cell_state or layer.proj


def ended_rows(steps: Steps | None) -> Maybe:
    """``[rows, 1]``: the rows past the end of their sequence.

    The kernels write zeros there to y and dx, but nothing to what is saved.
    """
    if steps is None or steps.active is None or steps.packed:
        return None
    return ~active_mask(steps).reshape(-1, 1)


def run_forward(
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
    """``y, h_n``, then c_n if the cell has one, then what backward needs if it needs anything."""
    kernel = kernel_for(code, weights)
    steps = steps_of(active, order, reset, placed, bool(code & PACKED))
    run = kernels.profiled(kernel.forward, kernel.mode)
    try:
        outputs, _, _, saved = run(x, h0, c0, weights, steps, training)
    except kernels.RefusedError:
        x, h0, c0, *weights = (dense(t) for t in (x, h0, c0, *weights))
        outputs, _, _, saved = run(x, h0, c0, weights, steps, training)
    if saved is None:  # nothing is saved, or it has no elements
        return [*outputs, x.new_empty(0)] if training and saves(code) else list(outputs)
    ended = ended_rows(steps)
    if ended is not None:
        layer = Layer.of_code(code)
        for piece in pieces(saved, layer, layer.hidden(weights)):
            piece.masked_fill_(ended, 0)
    return [*outputs, saved]


def _fake_run_forward(
    x: Tensor,
    weights: list[Tensor],
    code: int,
    training: bool,
    h0: Maybe = None,
    c0: Maybe = None,
    active: Maybe = None,
    order: Maybe = None,
    *_: Maybe,
) -> list[Tensor]:
    layer = Layer.of_code(code)
    y, hn, cn = fake_outputs(x, weights, code, active, order, h0)
    made = [y, hn]
    if cn is not None:
        made.append(cn)
    if training and saves(code):
        H, D = layer.hidden(weights), layer.directions
        widths = layer.stored * layer.saves_slots + CELLS[layer.mode].planes + layer.proj
        made.append(x.new_empty(D * _count(x) * H * widths))
    return made


def fake_outputs(
    x: Tensor, weights: list[Tensor], code: int, active: Maybe, order: Maybe, h0: Maybe
) -> tuple[Tensor, Tensor, Maybe]:
    """Empty ``y, h_n, c_n``."""
    layer, packed = Layer.of_code(code), bool(code & PACKED)
    H, O = layer.hidden(weights), layer.out(weights)
    D = layer.directions
    N = batch_of(layer, x, active, order, h0, packed)
    cn = x.new_empty(D, N, H * CELLS[layer.mode].planes) if layer.has_cell_state else None
    return rows_like(layer, x, D * O, packed), x.new_empty(D, N, O), cn


def batch_of(
    layer: Layer | Kernel, x: Tensor, active: Maybe, order: Maybe, h0: Maybe, packed: bool
) -> Any:
    """The number of rows."""
    if not packed:
        return x.shape[0 if layer.batch_first else 1]
    if order is not None or h0 is not None:
        return order.shape[0] if order is not None else h0.shape[1]  # type: ignore[union-attr]
    assert active is not None
    return int(active[0])


def _count(x: Tensor) -> Any:
    return x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]


def rows_like(layer: Layer | Kernel, x: Tensor, features: Any, packed: bool) -> Tensor:
    """Empty rows, time first in memory, whichever axis comes first."""
    if packed:
        return x.new_empty(x.shape[0], features)
    if layer.batch_first:
        return x.new_empty(x.shape[1], x.shape[0], features).transpose(0, 1)
    return x.new_empty(x.shape[0], x.shape[1], features)


def run_backward(
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
    """Gradients of ``x, *weights`` and the given initial states, if wanted; then of the slots."""
    kernel = kernel_for(code, weights)
    steps = steps_of(active, order, reset, placed, bool(code & PACKED))
    run = kernels.profiled(kernel.backward, kernel.mode, " backward")
    try:
        made, slots = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, False)
    except kernels.RefusedError:
        x, h0, c0, *weights = (dense(t) for t in (x, h0, c0, *weights))
        y, saved, dy, dhn, dcn = (dense(t) for t in (y, saved, dy, dhn, dcn))
        made, slots = run(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, False)
    slots = slots.view(kernel.directions, _count(x), _width_of_slots(code, weights[0].shape[0]))
    ended = ended_rows(steps)
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
    *_: Maybe,
) -> list[Tensor]:
    layer = Layer.of_code(code)
    shapes = [w.shape for w in weights] + [s.shape for s in (h0, c0) if s is not None]
    made = [rows_like(layer, x, x.shape[-1], bool(code & PACKED))] if wanted[0] else []
    made += [x.new_empty(shape) for shape, flag in zip(shapes, wanted[1:], strict=True) if flag]
    width = layer.stored * layer.hidden(weights)
    return [*made, x.new_empty(layer.directions, _count(x), width)]


LIBRARY: Any = torch.library.Library("rnnkern", "DEF")  # type: ignore[no-untyped-call]
_IF_GIVEN = (
    "Tensor? h0=None, Tensor? c0=None, Tensor? active=None, Tensor? order=None, "
    "Tensor? reset=None, Tensor? placed=None"
)
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
"""The kernels take operands in any memory layout."""


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=TAGS)
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, key)
    # `register_fake` would read this source, which takes a millisecond.
    LIBRARY.impl(name, fake, "Meta")


_define(
    f"scan_kernel(Tensor x, Tensor[] weights, int layer, bool training, {_IF_GIVEN}) -> Tensor[]",
    run_forward,
    _fake_run_forward,
)
_define(
    "scan_backward_kernel(Tensor x, Tensor[] weights, Tensor y, int layer, bool[] wanted, "
    "Tensor? dy=None, Tensor? dhn=None, Tensor? dcn=None, Tensor? saved=None, "
    f"{_IF_GIVEN}) -> Tensor[]",
    run_backward,
    _fake_run_backward,
)


def _ranked(lengths: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """Checks the lengths; then as `rnnkern.sequence.ranked`."""
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
    counter.register_flop_formula(torch.ops.rnnkern.scan_with_options)(_scan_flops)
    counter.register_flop_formula(torch.ops.rnnkern.scan_with_options_backward)(
        lambda dy, dhn, dcn, dcells, x, weights, *rest, **_: _scan_backward_flops(x, weights)
    )


on_import("torch.utils.flop_counter", _count_operations)


def runs_on_kernels(x: Tensor) -> bool:
    """Whether a kernel covers this tensor, or would cover a dense copy of it."""
    refusal = kernels.refusal(Operands(x, None, None, ()))
    return refusal is None or refusal.why is Why.GAPS
