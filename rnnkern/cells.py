"""The registry of cells: one row each, with the step in plain PyTorch.

Adding a cell: a header in ``csrc/cells`` and its line in ``cells.h``, a row here, a module class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Step = Callable[[Tensor, Tensor, State], State]


@dataclass(frozen=True)
class Cell:
    """What the Python side must know of a cell.

    Attributes:
        gates: blocks of ``hidden_size`` rows in the weights.
        names: of the gates, in torch's order; none where there is one that is the state itself.
        states: 1 for ``h``, 2 for ``(h, c)``.
        step: ``step(a, b, state) -> state`` with ``a = W_ih x + b_ih`` and ``b = W_hh h + b_hh``,
            both ``[N, gates * H]``; ``state`` as ``[N, H]`` tensors (``h`` before any projection).
    """

    gates: int
    names: tuple[str, ...]
    states: int
    step: Step


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


CELLS: dict[str, Cell] = {
    "RNN_TANH": Cell(gates=1, names=(), states=1, step=_tanh),
    "RNN_RELU": Cell(gates=1, names=(), states=1, step=_relu),
    "LSTM": Cell(gates=4, names=("i", "f", "g", "o"), states=2, step=_lstm),
    "GRU": Cell(gates=3, names=("r", "z", "n"), states=1, step=_gru),
}
"""Cells by the ``mode`` that ``torch.nn`` calls them."""
