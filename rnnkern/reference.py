"""One layer in plain PyTorch, step by step.

What the kernels must compute: the reference of the tests, and what runs for inputs that no kernel
covers together with ``lengths`` or ``reset``, and under forward mode inside forward mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from rnnkern.cells import CELLS, Cell, State
from rnnkern.sequence import Steps


def layer(
    mode: str,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    *,
    directions: int = 1,
    bias: bool = True,
    batch_first: bool = False,
    steps: Steps | None = None,
) -> tuple[Tensor, ...]:
    """Runs one layer, all its directions.

    Args:
        mode: ``"RNN_TANH"``, ``"RNN_RELU"``, ``"LSTM"`` or ``"GRU"``.
        x: ``[T, N, I]`` (``[N, T, I]`` batch first, ``[rows, I]`` packed).
        h0, c0: ``[D, N, O]`` and ``[D, N, H]``, or None for zeros; ``c0`` for LSTM only.
        weights: per direction ``w_ih, w_hh``, with ``bias`` also ``b_ih, b_hh``, then ``w_hr`` for
            a projection.

    Returns:
        The output ``[T, N, D * O]`` in the layout of ``x``, ``h_n`` and, for LSTM, ``c_n``.
    """
    cell = CELLS[mode]
    per_direction = len(weights) // directions
    data = _time_slices(x, batch_first, steps)
    outputs, finals = [], []
    for d in range(directions):
        w = weights[d * per_direction : (d + 1) * per_direction]
        w_hr = w[-1] if per_direction == 2 + 2 * bias + 1 else None
        state = _initial_state(cell, data, d, h0, c0, w, w_hr, steps)
        y, state = _scan(cell, data, state, w, bias, w_hr, d == 1, batch_first, steps)
        outputs.append(y)
        finals.append(
            state if steps is None or steps.order is None else _unsort(state, steps.order)
        )
    joined = [torch.cat(parts, -1) for parts in zip(*outputs, strict=True)]
    states = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    return (_join(joined, x, batch_first, steps), *states)


def _time_slices(x: Tensor, batch_first: bool, steps: Steps | None) -> list[Tensor]:
    """The rows of each step, those active first."""
    if steps is not None and steps.packed:
        assert steps.active is not None
        return list(x.split(steps.active.tolist()))  # type: ignore[no-untyped-call]
    slices = x.unbind(1 if batch_first else 0)
    if steps is None or steps.order is None:
        return list(slices)
    return [part.index_select(0, steps.order.to(x.device)) for part in slices]


def _initial_state(
    cell: Cell,
    data: list[Tensor],
    direction: int,
    h0: Tensor | None,
    c0: Tensor | None,
    w: Sequence[Tensor],
    w_hr: Tensor | None,
    steps: Steps | None,
) -> State:
    hidden = w[1].shape[0] // cell.gates
    widths = (hidden if w_hr is None else w_hr.shape[0], hidden)
    state = []
    for given, width in zip((h0, c0)[: cell.states], widths, strict=False):
        if given is None:
            state.append(data[0].new_zeros(data[0].shape[0], width))
        elif steps is None or steps.order is None:
            state.append(given[direction])
        else:
            state.append(given[direction].index_select(0, steps.order.to(given.device)))
    return tuple(state)


def _scan(
    cell: Cell,
    data: list[Tensor],
    state: State,
    w: Sequence[Tensor],
    bias: bool,
    w_hr: Tensor | None,
    backwards: bool,
    batch_first: bool,
    steps: Steps | None,
) -> tuple[list[Tensor], State]:
    b_ih, b_hh = (w[2], w[3]) if bias else (None, None)
    active = None if steps is None or steps.active is None else steps.active.tolist()
    outputs: list[Tensor] = [data[0]] * len(data)
    order = reversed(range(len(data))) if backwards else range(len(data))
    for t in order:
        count = data[t].shape[0] if active is None else active[t]
        now = tuple(part[:count] for part in state)
        begins = _episode_begins(t, count, backwards, batch_first, steps)
        if begins is not None:
            now = tuple(
                torch.where(begins.to(p.device)[:, None], torch.zeros_like(p), p) for p in now
            )
        after = cell.step(linear(data[t][:count], w[0], b_ih), linear(now[0], w[1], b_hh), now)
        if w_hr is not None:
            after = (linear(after[0], w_hr), *after[1:])
        state = tuple(torch.cat((new, old[count:])) for new, old in zip(after, state, strict=True))
        padding = data[t].shape[0] - count
        outputs[t] = torch.nn.functional.pad(after[0], (0, 0, 0, padding)) if padding else after[0]
    return outputs, state


def _episode_begins(
    t: int, count: int, backwards: bool, batch_first: bool, steps: Steps | None
) -> Tensor | None:
    """Which of the first ``count`` rows enter step t with a state of zero."""
    if steps is None or steps.reset is None:
        return None
    flags = steps.reset.t() if batch_first else steps.reset
    begin = t + 1 if backwards else t
    if begin >= flags.shape[0]:
        return None
    row = flags[begin] if steps.order is None else flags[begin].index_select(0, steps.order)
    if backwards and steps.active is not None:  # a row that ends at t starts from its initial state
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
