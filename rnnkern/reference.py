"""One layer in plain PyTorch, step by step: what the kernels must compute.

It runs for inputs that no kernel covers together with ``lengths`` or ``reset``, and under forward
mode inside forward mode.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkern.cells import CELLS, State
from rnnkern.layer import Layer, Operands
from rnnkern.sequence import Steps


def layer(layer: Layer, operands: Operands, steps: Steps | None = None) -> tuple[Tensor, ...]:
    """Runs one layer, all its directions.

    Returns:
        The output ``[T, N, D * O]`` in the layout of ``x``, ``h_n`` and, for LSTM, ``c_n``.
    """
    x, batch_first = operands.x, layer.batch_first
    data = _time_slices(x, batch_first, steps)
    outputs, finals = [], []
    for d in range(layer.directions):
        y, state = _scan(layer, operands, data, d, steps)
        outputs.append(y)
        finals.append(
            state if steps is None or steps.order is None else _unsort(state, steps.order)
        )
    joined = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return (_join(joined, x, batch_first, steps), *states)


def _time_slices(x: Tensor, batch_first: bool, steps: Steps | None) -> list[Tensor]:
    """The rows of each step, the active ones first."""
    if steps is not None and steps.packed:
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
    _, h0, c0, weights, _ = operands
    widths = (weights[1].shape[1], layer.hidden(weights))
    state = []
    for given, width in zip((h0, c0)[: CELLS[layer.mode].states], widths, strict=False):
        if given is None:
            state.append(first.new_zeros(first.shape[0], width))
        elif steps is None or steps.order is None:
            state.append(given[d])
        else:
            state.append(given[d].index_select(0, steps.order.to(given.device)))
    return tuple(state)


def _scan(
    layer: Layer, operands: Operands, data: list[Tensor], d: int, steps: Steps | None
) -> tuple[list[Tensor], State]:
    """The outputs of direction d by step, and its last state."""
    count, step, backwards = layer.tensors, CELLS[layer.mode].step, d == 1
    w = operands.weights[d * count : (d + 1) * count]
    b_ih, b_hh = (w[2], w[3]) if layer.bias else (None, None)
    state = _initial_state(layer, operands, data[0], d, steps)
    active = None if steps is None or steps.active is None else steps.active.tolist()
    outputs: list[Tensor] = [data[0]] * len(data)
    for t in reversed(range(len(data))) if backwards else range(len(data)):
        rows = data[t].shape[0] if active is None else active[t]
        now = tuple(part[:rows] for part in state)
        begins = _episode_begins(t, rows, backwards, layer.batch_first, steps)
        if begins is not None:
            now = tuple(
                torch.where(begins.to(p.device)[:, None], torch.zeros_like(p), p) for p in now
            )
        after = step(linear(data[t][:rows], w[0], b_ih), linear(now[0], w[1], b_hh), now)
        if layer.proj:
            after = (linear(after[0], w[-1]), *after[1:])
        state = tuple(torch.cat((new, old[rows:])) for new, old in zip(after, state, strict=True))
        padding = data[t].shape[0] - rows
        outputs[t] = torch.nn.functional.pad(after[0], (0, 0, 0, padding)) if padding else after[0]
    return outputs, state


def _episode_begins(
    t: int, count: int, backwards: bool, batch_first: bool, steps: Steps | None
) -> Tensor | None:
    """Which of the first ``count`` rows enter step t with a zero state; None if no row does."""
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


def _join(outputs: list[Tensor], x: Tensor, batch_first: bool, steps: Steps | None) -> Tensor:
    if steps is not None and steps.packed:
        return torch.cat(outputs)
    stacked = torch.stack(outputs)
    if steps is not None and steps.order is not None:
        stacked = stacked.index_select(1, torch.argsort(steps.order).to(x.device))
    return stacked.transpose(0, 1) if batch_first else stacked
