"""Every cell: what its header knows (``csrc/cells``), and its step in plain PyTorch.

`rnnkern.own_cells` adds those that a user has written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from rnnkern import _C

State = tuple[Tensor, ...]
Step = Callable[..., State]
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


@dataclass(frozen=True)
class Cell:
    """What the Python side must know of a cell. All but the step comes from the header.

    Attributes:
        gates: blocks of ``hidden_size`` rows in the weights.
        slots: numbers that the cell keeps for each unit (`csrc/cells/cell.h`).
        names: of the gates, in the order of the weights; none if the only one is the state itself.
        has_cell_state: the state is ``(h, c)``, else ``h``.
        more_states: states beside h and c. They lie behind c, as more features of it, wherever a
            layer has c; only the module and the step see them apart.
        saves_slots: backward needs the slots.
        reads_h: the cell itself reads h, beside the product with it.
        recurrent: there is a product with h. If not, there are no W_hh and b_hh, and ``b`` is zero.
        normalises_c: layer normalisation takes c too, before the output.
        parameters: how many parameters of its own the cell has, of one number for each unit.
        may_be_projected: a layer of the cell may have ``proj_size``.
        number: of the cell in the codes of layers (`rnnkern.layer.Layer.code`).
        step: ``step(a, b, state, *own) -> state`` with ``a = W_ih x + b_ih`` and
            ``b = W_hh h + b_hh``, both ``[..., gates * H]``, ``state`` a tuple of ``[..., H]``
            tensors, and ``own`` the parameters, ``[H]``. A step uses
            ``a`` and ``b`` of a gate only as their sum, unless the gate has a slot for each
            product. It returns h before any projection. A cell that normalises c takes the
            function ``normalise`` too, which makes of c what the output reads.
    """

    gates: int
    slots: int
    names: tuple[str, ...]
    has_cell_state: bool
    saves_slots: bool
    reads_h: bool
    recurrent: bool
    normalises_c: bool
    more_states: int
    parameters: int
    may_be_projected: bool
    number: int
    step: Step

    @property
    def planes(self) -> int:
        """The states beside h: numbers of a unit that c has."""
        return self.has_cell_state + self.more_states

    def apart(self, h: Tensor, c: Tensor | None) -> State:
        """All states of a step."""
        if not self.has_cell_state:
            return (h,)
        assert c is not None
        return (h, c) if self.planes == 1 else (h, *c.chunk(self.planes, -1))

    def joined(self, state: State) -> State:
        """``(h,)`` or ``(h, c)``, with the other states as features of c."""
        return state if self.planes <= 1 else (state[0], torch.cat(tuple(state[1:]), -1))

    @property
    def stored(self) -> int:
        """The numbers that forward saves for each unit, if it saves any: slots and parameters."""
        return self.slots + self.parameters


def _tanh(a: Tensor, b: Tensor, state: State) -> State:
    return (torch.tanh(a + b),)


def _relu(a: Tensor, b: Tensor, state: State) -> State:
    return (torch.relu(a + b),)


def _lstm(
    a: Tensor, b: Tensor, state: State, normalise: Callable[[Tensor], Tensor] | None = None
) -> State:
    i, f, g, o = (a + b).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(normalise(c) if normalise else c), c


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
        f"rnnkern/known_cells.py has steps of {sorted(_STEPS)}, csrc/cells/list.h has "
        f"{sorted(_C.CELLS)}: they must be the same cells"
    )


class UnknownCellError(LookupError):
    """A program was exported or compiled with a cell that this process does not know."""


class _Known(dict[_Key, _Value]):
    """A dictionary whose error says how a cell becomes known."""

    def __missing__(self, key: _Key) -> _Value:
        name = f"the cell {key.rpartition('-')[0] or key!r}" if isinstance(key, str) else "a cell"
        raise UnknownCellError(
            f"this program runs {name} of your own, which is not known here ({key}): import the "
            "module in which rnnkern.cell makes it before you run the program. If you have done "
            "so, the cell has changed since the program was made; make it again"
        )


CELLS: dict[str, Cell] = _Known(
    (mode, Cell(step=_STEPS[mode], number=i, **own))
    for i, (mode, own) in enumerate(_C.CELLS.items())
)
"""Cells by their ``mode``, which is torch's name if ``torch.nn`` has the cell."""

FIRST_OF_OWN = 1 << 44
"""The numbers of cells that users have written begin here."""

MODES: dict[int, str] = _Known((cell.number, mode) for mode, cell in CELLS.items())
"""Modes by the number of the cell."""


def add_cell(
    mode: str,
    gates: Sequence[str],
    parameters: Sequence[str],
    *,
    number: int,
    step: Step,
    **shape: Any,
) -> None:
    """Makes a cell known. Its kernels are loaded when they are needed.

    ``number`` must follow from what the cell computes, because torch keeps programs with such
    numbers on disk. ``shape`` are the other fields of a ``CellShape`` (`csrc/cells/cell.h`).
    """
    number += FIRST_OF_OWN
    own = _C.add_cell(mode=mode, gates=list(gates), parameters=list(parameters), **shape)
    CELLS[mode] = Cell(step=step, number=number, **own)
    MODES[number] = mode


def is_own(mode: str) -> bool:
    """Whether a user has written the cell."""
    return CELLS[mode].number >= FIRST_OF_OWN


def name_of(mode: str) -> str:
    """The name of a cell for people. The mode of a user's cell has a digest behind its name."""
    return mode.rpartition("-")[0] if is_own(mode) else mode
