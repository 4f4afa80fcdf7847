"""One layer in plain PyTorch, step by step: what the kernels must compute.

It runs calls with ``lengths``, ``reset`` or `Options` that no kernel covers or that
``torch.jit.trace`` records; exported calls with `Options`; cells of a user that are exported, or
that nothing compiles; forward mode inside forward mode; and higher derivatives and transforms of
calls with options.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import layer_norm, linear, pad

from rnnkern.known_cells import CELLS, State
from rnnkern.layer import Layer, Maybe, Operands
from rnnkern.noise import Purpose, happens
from rnnkern.options import Options
from rnnkern.sequence import Steps, is_packed

_NOTHING = Options()


def layer(
    layer: Layer, operands: Operands, steps: Steps | None = None, options: Options = _NOTHING
) -> tuple[Tensor, ...]:
    """Runs one layer, all its directions.

    Returns:
        The output ``[T, N, D * O]`` in the layout of ``x``, ``h_n``, for LSTM ``c_n`` and, if the
        options ask for them, the cell states of all steps ``[T, N, D * H]``, as the output.
    """
    x, batch_first = operands.x, layer.batch_first
    data = _time_slices(x, batch_first, steps)
    outputs, finals, cells = [], [], []
    for d in range(layer.directions):
        y, c, state = _scan(layer, operands, data, d, steps, options)
        outputs.append(y)
        cells.append(c)
        finals.append(
            state if steps is None or steps.order is None else _unsort(state, steps.order)
        )
    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    results = (_joined(outputs, x, batch_first, steps), *states)
    return (*results, _joined(cells, x, batch_first, steps)) if options.cells else results


def _time_slices(x: Tensor, batch_first: bool, steps: Steps | None) -> list[Tensor]:
    """The rows of each step, the active ones first."""
    if is_packed(steps):
        assert steps.active is not None
        return list(x.split(steps.active.tolist()))  # type: ignore[no-untyped-call]
    slices = x.unbind(1 if batch_first else 0)
    if steps is None or steps.order is None:
        return list(slices)
    return [part.index_select(0, steps.order.to(x.device)) for part in slices]


def _initial_state(
    layer: Layer, operands: Operands, first: Tensor, d: int, steps: Steps | None
) -> State:
    """The state of direction d before its first step, for the rows of ``first``."""
    return _ranked(layer, operands, (operands.h0, operands.c0), first, d, steps)


def _ranked(
    layer: Layer,
    operands: Operands,
    states: tuple[Maybe, Maybe],
    first: Tensor,
    d: int,
    steps: Steps | None,
) -> State:
    """States of direction d for the rows of ``first``, zeros instead of None."""
    weights, cell = operands.weights, CELLS[layer.mode]
    widths = (layer.out(weights), layer.hidden(weights) * cell.planes)
    state = []
    for given, width in zip(states[: 1 + cell.has_cell_state], widths, strict=False):
        if given is None:
            state.append(first.new_zeros(first.shape[0], width))
        elif steps is None or steps.order is None:
            state.append(given[d])
        else:
            state.append(given[d].index_select(0, steps.order.to(given.device)))
    return tuple(state)


def _scan(
    layer: Layer,
    operands: Operands,
    data: list[Tensor],
    d: int,
    steps: Steps | None,
    options: Options,
) -> tuple[list[Tensor], list[Tensor], State]:
    """The outputs and last states of direction d by step, and the state after the last one.

    "Last states" of a step are its cell states, or h for a cell without.
    """
    count, step, backwards = layer.tensors, CELLS[layer.mode].step, d == 1
    w = operands.weights[d * count : (d + 1) * count]
    cell = CELLS[layer.mode]
    own = w[count - cell.parameters :]
    biases = w[1 + cell.recurrent :] if layer.bias else (None, None)
    norms = _Norms(options.gains[d] if options.gains else (), biases, cell.recurrent)
    state = _initial_state(layer, operands, data[0], d, steps)
    reset_to = _ranked(layer, operands, (options.reset_h, options.reset_c), data[0], d, steps)
    noise = _Noise(options, d, state, steps)
    active = None if steps is None or steps.active is None else steps.active.tolist()
    outputs, cells = [data[0]] * len(data), [data[0]] * len(data)
    for t in reversed(range(len(data))) if backwards else range(len(data)):
        rows = data[t].shape[0] if active is None else active[t]
        now = tuple(part[:rows] for part in state)
        is_cut = _cut(t, rows, backwards, layer.batch_first, steps)
        if is_cut is not None:
            now = tuple(
                torch.where(is_cut.to(p.device)[:, None], to[:rows], p)
                for to, p in zip(reset_to, now, strict=True)
            )
        h = noise.dropped(now[0])
        a = norms.input(data[t][:rows], w[0])
        b = norms.recurrent(h, w[1]) if cell.recurrent else torch.zeros_like(a)
        after = cell.joined(step(a, b, cell.apart(now[0], now[-1]), *own, **norms.of_c))
        if layer.proj:
            after = (linear(after[0], w[2 + 2 * layer.bias]), *after[1:])
        after = noise.zoned_out(t, after, now)
        state = tuple(torch.cat((new, old[rows:])) for new, old in zip(after, state, strict=True))
        padding = data[t].shape[0] - rows
        outputs[t], cells[t] = (
            pad(z, (0, 0, 0, padding)) if padding else z for z in (after[0], after[-1])
        )
    return outputs, cells, state


class _Norms:
    """The sums of both products with their biases, and layer normalisation if there are gains."""

    def __init__(
        self, gains: Sequence[Tensor], biases: Sequence[Maybe], has_recurrent: bool
    ) -> None:
        self.gains, self.biases = gains, biases
        gain_c, *bias_c = gains[1 + has_recurrent :] or (None,)
        self.of_c: dict[str, Any] = {}
        if gain_c is not None:
            bias = bias_c[0] if bias_c else None
            self.of_c["normalise"] = lambda c: layer_norm(c, gain_c.shape, gain_c, bias)

    def input(self, x: Tensor, weight: Tensor) -> Tensor:
        return self._sums(0, x, weight)

    def recurrent(self, h: Tensor, weight: Tensor) -> Tensor:
        return self._sums(1, h, weight)

    def _sums(self, which: int, operand: Tensor, weight: Tensor) -> Tensor:
        bias = self.biases[which]
        if not self.gains:
            return linear(operand, weight, bias)
        gain = self.gains[which]
        return layer_norm(linear(operand, weight), gain.shape, gain, bias)


class _Noise:
    """Recurrent dropout and zoneout of one direction, for rows by rank."""

    def __init__(self, options: Options, d: int, state: State, steps: Steps | None) -> None:
        self.options, self.d = options, d
        h = state[0]
        order = None if steps is None else steps.order
        self.rows = (
            torch.arange(h.shape[0], device=h.device) if order is None else order.to(h.device)
        )
        self.mask: Maybe = None
        p = options.recurrent_dropout
        if p:
            is_hidden = self._happens(p, Purpose.DROPOUT, 0, h.shape)
            self.mask = (~is_hidden).to(torch.promote_types(h.dtype, torch.float32)) / (1 - p)

    def dropped(self, h: Tensor) -> Tensor:
        """What the recurrent product reads of h."""
        return h if self.mask is None else (h * self.mask[: h.shape[0]]).to(h.dtype)

    def zoned_out(self, t: int, made: State, before: State) -> State:
        """The states after step t, of what the cell has made and of the states before."""
        p = self.options.zoneout
        if not p:
            return made
        if not self.options.draws:
            return tuple((1 - p) * z + p * b for z, b in zip(made, before, strict=True))
        purposes = (Purpose.HIDDEN, Purpose.CELL)
        return tuple(
            torch.where(self._happens(p, purpose, t, z.shape), b, z)
            for purpose, z, b in zip(purposes, made, before, strict=False)
        )

    def _happens(self, p: float, purpose: Purpose, t: int, shape: torch.Size) -> Tensor:
        seed, rows = self.options.seed, self.rows[: shape[0]]
        assert seed is not None
        own = {"layer": self.options.number, "direction": self.d, "t": t}
        return happens(p, seed, purpose, **own, rows=rows, units=shape[1])


def _cut(
    t: int, count: int, backwards: bool, batch_first: bool, steps: Steps | None
) -> Tensor | None:
    """Which of the first ``count`` rows begin step t with the state of a reset, as ``cut`` in
    csrc/steps.h says; None if there is no flag to ask.
    """
    if steps is None or steps.reset is None:
        return None
    flags = steps.reset.t() if batch_first else steps.reset
    begin = t + 1 if backwards else t
    if begin >= flags.shape[0]:
        return None
    row = flags[begin] if steps.order is None else flags[begin].index_select(0, steps.order)
    if backwards and steps.active is not None:  # a row that ends at t starts with its initial state
        row = row & (torch.arange(row.shape[0], device=row.device) < steps.active[begin])
    return row[:count]


def _unsort(state: State, order: Tensor) -> State:
    inverse = torch.argsort(order)
    return tuple(part.index_select(0, inverse.to(part.device)) for part in state)


def _joined(
    of_directions: list[list[Tensor]], x: Tensor, batch_first: bool, steps: Steps | None
) -> Tensor:
    """What each direction has made at each step, laid out as x."""
    outputs = [torch.cat(parts, -1) for parts in zip(*of_directions, strict=True)]
    if is_packed(steps):
        return torch.cat(outputs)
    stacked = torch.stack(outputs)
    if steps is not None and steps.order is not None:
        stacked = stacked.index_select(1, torch.argsort(steps.order).to(x.device))
    return stacked.transpose(0, 1) if batch_first else stacked
