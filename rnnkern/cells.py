"""The cells: what their headers in ``csrc/cells`` know, and their steps in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rnnkern import _C

State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], State]


@dataclass(frozen=True)
class Cell:
    """What the Python side must know of a cell: all but the step is the header's.

    Attributes:
        gates: blocks of ``hidden_size`` rows in the weights.
        slots: numbers that the cell makes of its sums for each unit.
        names: of the gates, in the order of the weights; none if the only one is the state itself.
        has_cell_state: the state is ``(h, c)``, else ``h``.
        saves_slots: backward needs the slots.
        reads_h: the cell itself reads h, beside the product with it.
        step: ``step(a, b, state) -> state`` with ``a = W_ih x + b_ih`` and ``b = W_hh h + b_hh``,
            both ``[N, gates * H]``; ``state`` as ``[N, H]`` tensors (``h`` before any projection).
    """

    gates: int
    slots: int
    names: tuple[str, ...]
    has_cell_state: bool
    saves_slots: bool
    reads_h: bool
    step: Step

    @property
    def states(self) -> int:
        return 1 + self.has_cell_state


def _tanh(a: Tensor, b: Tensor, state: State) -> State:
    return (torch.tanh(a + b),)


def _relu(a: Tensor, b: Tensor, state: State) -> State:
    return (torch.relu(a + b),)


def _lstm(a: Tensor, b: Tensor, state: State) -> State:
    i, f, g, o = (a + b).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


def _gru(a: Tensor, b: Tensor, state: State) -> State:
    a_r, a_z, a_n = a.chunk(3, -1)
    b_r, b_z, b_n = b.chunk(3, -1)
    r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
    n = torch.tanh(a_n + r * b_n)
    return ((1 - z) * n + z * state[0],)


_STEPS: dict[str, Step] = {
    "RNN_TANH": _tanh,
    "RNN_RELU": _relu,
    "LSTM": _lstm,
    "GRU": _gru,
}

if _STEPS.keys() != _C.CELLS.keys():
    raise ImportError(
        f"rnnkern/cells.py has steps of {sorted(_STEPS)}, csrc/cells/list.h has "
        f"{sorted(_C.CELLS)}: they must be the same cells"
    )

CELLS: dict[str, Cell] = {mode: Cell(step=_STEPS[mode], **own) for mode, own in _C.CELLS.items()}
"""Cells by their ``mode``, for those that ``torch.nn`` has its name for it."""
