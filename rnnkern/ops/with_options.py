"""The scan of a layer with `rnnkern.options.Options`, as an operator of torch with its gradient.

The kernels compute it and its first derivatives. Higher derivatives are those of the reference. The
transforms of `torch.func` never come here: they see the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rnnkern import autocast, kernels
from rnnkern.known_cells import CELLS
from rnnkern.layer import PACKED, Layer, Maybe, Operands, dense
from rnnkern.ops.kernel_ops import (
    LIBRARY,
    TAGS,
    arguments,
    ended_rows,
    fake_outputs,
    kernel_for,
    rows_like,
    runs_on_kernels,
    steps_of,
)
from rnnkern.ops.modes import apply, are_batches, has_modes, in_batches, transformed
from rnnkern.options import Options
from rnnkern.sequence import Steps, is_packed

Results = tuple[Tensor, Tensor, Maybe, Maybe]
"""``y, h_n, c_n, cells``"""

_STATES = 4
"""``h0, c0, reset_h, reset_c``"""

_OTHERS = _STATES + 5
"""These, the steps and the seed."""


def scan(
    layer: Layer, steps: Steps | None, operands: Operands, options: Options, training: bool
) -> Results:
    """A layer on the kernels. ``training``: something requires a gradient, and grad mode is on."""
    x, h0, c0, weights, _ = operands
    *own, packed = arguments(steps)
    code = layer.code + PACKED * packed
    gains = options.all_gains()
    given = (x, weights, h0, c0, options.reset_h, options.reset_c, *own, options.seed)
    values = (code, training, *_values(options))
    if _is_seen(x):
        made = torch.ops.rnnkern.scan_with_options(*given, gains, *values)
    elif training:
        made = apply(_Scan, values, len(gains), *given[:1], *given[2:], *weights, *gains)
    else:
        made = _run(*given, gains, *values)
    y, hn, cn, cells, _ = made
    if training and not is_compiling():
        y = y.clone()  # y itself is what backward reads, and the caller may change it in place
    return y, hn, cn if layer.has_cell_state else None, cells if options.cells else None


def _is_seen(x: Tensor) -> bool:
    """Whether a mode or transform has to see the operator itself, and not only its results."""
    return is_compiling() or has_modes() or not runs_on_kernels(x)


def _values(options: Options) -> tuple[Any, ...]:
    return (
        options.number,
        options.recurrent_dropout,
        options.zoneout,
        options.draws,
        options.cells,
    )


# What the operators take, in this order: `_GIVEN` and some of `_VALUES` below.


def _run(x: Any, weights: Any, h0: Any, c0: Any, reset_h: Any, reset_c: Any, *rest: Any) -> Any:
    """``y, h_n, c_n, cells`` and what backward needs; without elements if there is none."""
    active, order, reset, placed, seed, gains, code, training, *values, cells = rest
    layer, kernel = Layer.of_code(code), kernel_for(code, weights)
    steps = steps_of(active, order, reset, placed, bool(code & PACKED))
    run = kernels.profiled(kernel.forward, kernel.mode)
    values = [0 if seed is None else int(seed), *values]
    own = {"training": training, "cells": cells}
    try:
        made = run(x, h0, c0, weights, steps, options=(reset_h, reset_c, *values, gains), **own)
    except kernels.RefusedError:
        x, h0, c0, reset_h, reset_c, *weights = map(dense, (x, h0, c0, reset_h, reset_c, *weights))
        gains = [dense(gain) for gain in gains]
        made = run(x, h0, c0, weights, steps, options=(reset_h, reset_c, *values, gains), **own)
    outputs, _, _, saved = made
    y, hn, *cns = outputs
    found = None
    if cells:
        saved = x.new_empty(0) if saved is None else saved
        found = _cells_of(saved, layer, steps, x, training, cns[0].shape[-1])
    parts = (cns[0] if cns else None, found, saved if training else None)
    # No output may be another one.
    return [y, hn, *(x.new_empty(0) if z is None else z for z in parts)]


def _cells_of(
    saved: Tensor, layer: Layer, steps: Steps | None, x: Tensor, training: bool, hidden: int
) -> Tensor:
    """A copy of the cell states that were saved, laid out as the output."""
    D, count = layer.directions, x.shape[:-1].numel()
    first = layer.stored * D * count * hidden if training and layer.saves_slots else 0
    cells = saved[first : first + D * count * hidden].view(D, count, hidden).transpose(0, 1)
    ended = ended_rows(steps)
    if ended is not None:
        cells = cells.masked_fill(ended[:, None], 0)
    made = rows_like(layer, x, D * hidden, is_packed(steps))
    time_first = made.transpose(0, 1) if made.dim() == 3 and layer.batch_first else made
    time_first.view(count, D, hidden).copy_(cells)
    return made


def _fake_run(
    x: Any, weights: Any, h0: Any, c0: Any, reset_h: Any, reset_c: Any, *rest: Any
) -> list[Tensor]:
    active, order, _reset, _placed, _seed, gains, code, *others = rest
    training, _number, _p, zoneout, _draws, cells = others
    layer = Layer.of_code(code)
    y, hn, cn = fake_outputs(x, weights, code, active, order, h0)
    H, D = layer.hidden(weights), layer.directions
    keeps_h = layer.proj or (zoneout > 0 and not layer.saves_slots)
    planes = CELLS[layer.mode].planes
    widths = layer.stored * layer.saves_slots + planes * (1 + (zoneout > 0)) + keeps_h
    count = x.shape[0] if x.dim() == 2 else x.shape[0] * x.shape[1]
    width = H * widths + (_normalised_width(layer, H, x) if gains else 0)
    saved = x.new_empty(D * count * width if training else 0)
    all_cells = rows_like(layer, x, D * H, bool(code & PACKED)) if cells else x.new_empty(0)
    return [y, hn, x.new_empty(0) if cn is None else cn, all_cells, saved]


def _normalised_width(layer: Layer, hidden: int, x: Tensor) -> int:
    """What layer normalisation saves for a row (``normalised_width`` of ``csrc/cells/cell.h``)."""
    cell = CELLS[layer.mode]
    scales = 3 * max(1, 4 // x.element_size())
    return (2 * cell.gates + cell.normalises_c) * hidden + scales


def _run_backward(
    dy: Any, dhn: Any, dcn: Any, dcells: Any, x: Any, weights: Any, *rest: Any
) -> list[Tensor]:
    """Gradients of ``x, *weights``, the given states, and the gains, as far as wanted."""
    h0, c0, reset_h, reset_c, active, order, reset, placed, seed, gains, y, saved, *others = rest
    code, *values, wanted = others
    kernel = kernel_for(code, weights)
    steps = steps_of(active, order, reset, placed, bool(code & PACKED))
    run = kernels.profiled(kernel.backward, kernel.mode, " backward")
    values = [0 if seed is None else int(seed), *values]
    tensors = [x, h0, c0, reset_h, reset_c, y, saved, dy, dhn, dcn, dcells, *weights, *gains]
    count = len(weights)
    try:
        made = _gradients(run, steps, tensors, count, values, wanted)
    except kernels.RefusedError:  # gaps, or hooks of saved tensors have changed one
        tensors = [None if z is None else dense(z.to(x.dtype)) for z in tensors]
        made = _gradients(run, steps, tensors, count, values, wanted)
    return [part for part in made if part is not None]


def _gradients(run: Any, steps: Any, tensors: Any, count: int, values: Any, wanted: Any) -> Any:
    x, h0, c0, reset_h, reset_c, y, saved, dy, dhn, dcn, dcells, *own = tensors
    weights, gains = own[:count], own[count:]
    kept = saved if saved is not None and saved.numel() else None
    given = (x, h0, c0, weights, steps, y, kept, dy, dhn, dcn, wanted, False)
    return run(*given, options=(reset_h, reset_c, *values, gains), dcells=dcells)[0]


def _fake_run_backward(
    dy: Any, dhn: Any, dcn: Any, dcells: Any, x: Any, weights: Any, *rest: Any
) -> list[Tensor]:
    *_, code, _number, _p, _zoneout, _draws, wanted = rest
    layer = Layer.of_code(code)
    made = [rows_like(layer, x, x.shape[-1], bool(code & PACKED))] if wanted[0] else []
    gains = rest[_OTHERS]
    shapes = (z.shape for z in (*weights, *rest[:_STATES], *gains) if z is not None)
    return made + [
        x.new_empty(shape) for shape, flag in zip(shapes, wanted[1:], strict=True) if flag
    ]


_GIVEN = (
    "Tensor x, Tensor[] weights, Tensor? h0, Tensor? c0, Tensor? reset_h, Tensor? reset_c, "
    "Tensor? active, Tensor? order, Tensor? reset, Tensor? placed, Tensor? seed, Tensor[] gains"
)
_VALUES = "int number, float recurrent_dropout, float zoneout, bool draws"
LIBRARY.define(
    f"scan_with_options({_GIVEN}, int layer, bool training, {_VALUES}, bool cells) -> Tensor[]",
    tags=TAGS,
)
LIBRARY.define(
    "scan_with_options_backward(Tensor? dy, Tensor? dhn, Tensor? dcn, Tensor? dcells, "
    f"{_GIVEN}, Tensor y, Tensor saved, int layer, {_VALUES}, bool[] wanted) -> Tensor[]",
    tags=TAGS,
)
for _name, _kernel, _fake in (
    ("scan_with_options", _run, _fake_run),
    ("scan_with_options_backward", _run_backward, _fake_run_backward),
):
    LIBRARY.impl(_name, _kernel, "CPU")
    LIBRARY.impl(_name, _fake, "Meta")


def _run_with_autograd(x: Tensor, weights: list[Tensor], *rest: Any) -> Any:
    others, gains, values = rest[:_OTHERS], rest[_OTHERS], rest[_OTHERS + 1 :]
    given = (x, weights, gains, *others[:_STATES])
    if torch.is_grad_enabled() and torch._C._any_requires_grad(*given):
        return list(apply(_Scan, values, len(gains), x, *others, *weights, *gains))
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.rnnkern.scan_with_options(x, weights, *rest)


LIBRARY.impl("scan_with_options", _run_with_autograd, "Autograd")


class _Scan(torch.autograd.Function):
    """``scan_with_options`` for autograd: ``values``, the number of gains, ``x``, four states, the
    steps, the seed, weights, gains.

    ``values`` are ``code, training`` and those of `_values`.
    """

    @staticmethod
    def forward(
        ctx: Any, values: tuple[Any, ...], count: int, x: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        others, weights = rest[:_OTHERS], list(rest[_OTHERS : len(rest) - count])
        gains = list(rest[len(rest) - count :])
        run = torch.ops.rnnkern.scan_with_options if _is_seen(x) else _run
        y, hn, cn, cells, saved = run(x, weights, *others, gains, *values)
        ctx.values, ctx.count = values, count
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(saved, *(z for z in (cn, cells) if not z.numel()))
        ctx.save_for_backward(x, *others, y, saved, *weights, *gains)
        return y, hn, cn, cells, saved

    @staticmethod
    def backward(ctx: Any, *incoming: Maybe) -> tuple[Maybe, ...]:
        gradients = incoming[:4]
        needs = ctx.needs_input_grad
        if all(z is None for z in gradients):
            return (None,) * len(needs)
        x, *rest = ctx.saved_tensors
        others, (y, saved), own = rest[:_OTHERS], rest[_OTHERS : _OTHERS + 2], rest[_OTHERS + 2 :]
        count = len(own) - ctx.count
        weights, gains = own[:count], own[count:]
        of_states, of_own = needs[3 : 3 + _STATES], needs[3 + _OTHERS :]
        # In the order of the kernels: x, weights, given states, gains.
        wanted = [needs[2], *of_own[:count]]
        wanted += [
            flag for z, flag in zip(others[:_STATES], of_states, strict=True) if z is not None
        ]
        wanted += of_own[count:]
        if torch.is_grad_enabled() or transformed() or are_batches(*gradients):

            def differentiable(*given: Maybe) -> list[Maybe]:
                operands = (ctx.values, x, others, weights, gains)
                return _by_reference(*operands, incoming=given, wanted=wanted)

            made = list(in_batches(differentiable, *gradients))
        else:
            code, _, *values, _ = ctx.values
            run = torch.ops.rnnkern.scan_with_options_backward if _is_seen(x) else _run_backward
            given = (*gradients, x, weights, *others, gains, y, saved, code, *values)
            found = iter(run(*given, wanted))
            made = [next(found) if flag else None for flag in wanted]
        of_rest = iter(made[1 + count :])
        states = [None if z is None else next(of_rest) for z in others[:_STATES]]
        nothing = [None] * (_OTHERS - _STATES)
        return (None, None, made[0], *states, *nothing, *made[1 : 1 + count], *of_rest)


def _reference(
    x: Any, weights: Any, others: Sequence[Any], gains: Sequence[Tensor], values: tuple[Any, ...]
) -> Results:
    """The layer by torch's own operators, step by step."""
    from rnnkern import reference

    code, _, number, dropout, zoneout, draws, cells = values
    h0, c0, reset_h, reset_c, active, order, reset, placed, seed = others
    layer = Layer.of_code(code)
    steps = steps_of(active, order, reset, placed, bool(code & PACKED))
    each = len(gains) // layer.directions or 1
    by_direction = tuple(tuple(gains[i : i + each]) for i in range(0, len(gains), each))
    options = Options(reset_h, reset_c, cells, dropout, zoneout, draws, seed, number, by_direction)
    y, hn, *more = reference.layer(layer, Operands(x, h0, c0, weights), steps, options)
    cn = more.pop(0) if layer.has_cell_state else None
    return y, hn, cn, more[0] if more else None


def decomposed(x: Tensor, weights: Sequence[Tensor], *rest: Any) -> Any:
    """``rnnkern::scan_with_options`` in torch's operators, without what backward needs.

    An operator with lengths, or with a dynamic number of steps, stays. Then only a run of the
    program knows how many rows are active in a step, or how many steps there are.
    """
    others, gains, values = rest[:_OTHERS], rest[_OTHERS], rest[_OTHERS + 1 :]
    steps: Any = x.shape[1 if Layer.of_code(values[0]).batch_first else 0]
    if others[_STATES] is not None or isinstance(steps, torch.SymInt):
        return NotImplemented
    made = _reference(x, weights, others, gains, values)
    return [*(x.new_empty(0) if z is None else z for z in made), x.new_empty(0)]


def _by_reference(
    values: tuple[Any, ...],
    x: Tensor,
    others: Sequence[Maybe],
    weights: Sequence[Tensor],
    gains: Sequence[Tensor],
    *,
    incoming: Sequence[Maybe],
    wanted: Sequence[bool],
) -> list[Maybe]:
    """The gradients by torch's own operators, differentiable if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    # Autocast was off in the forward pass, and may be on where a derivative is taken.
    with torch.enable_grad(), autocast.switched_off(x.device.type):
        # Views, because an operand may depend on another one.
        operands = [None if z is None else z.view_as(z) for z in (x, *weights, *others[:_STATES])]
        own_gains = [gain.view_as(gain) for gain in gains]
        own_x, *own_weights = operands[: 1 + len(weights)]
        own_others = (*operands[1 + len(weights) :], *others[_STATES:])
        outputs = _reference(own_x, own_weights, own_others, own_gains, values)
        pairs = [
            (z, g)
            for z, g in zip(outputs, incoming, strict=True)
            if z is not None and g is not None
        ]
        given = [z for z in (*operands, *own_gains) if z is not None]
        asked = [z for z, flag in zip(given, wanted, strict=True) if flag]
        found = iter(
            torch.autograd.grad(
                [z for z, _ in pairs],
                asked,
                [g for _, g in pairs],
                create_graph=create_graph,
                allow_unused=True,
            )
        )
    return [next(found) if flag else None for flag in wanted]
