"""What a layer is, what it reads and what it makes, in values that torch can trace."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rnnkern.known_cells import CELLS, MODES
from rnnkern.sequence import Steps

Maybe = Tensor | None

PACKED = 1
"""Added to the code of a layer: its input is a packed sequence."""

_FIRST, _BITS = 4, 9
"""Cells and bits of a layer's code without the bits that later cells add."""


class Layer(NamedTuple):
    """What a layer is, apart from its sizes.

    Attributes:
        mode: the name of its cell in `CELLS`.
        directions: 1 or 2.
        bias: each direction has the weights ``b_ih`` and ``b_hh``.
        batch_first: input and output are ``[N, T, ...]``.
        proj: each direction has the weight ``w_hr``.
        by_bfloat16: products may take float32 as bfloat16 (`rnnkern.kernels.kernel`).
        is_cell: the layer is one step of a cell, such as `LSTMCell`.
    """

    mode: str
    directions: int
    bias: bool
    batch_first: bool
    proj: bool
    by_bfloat16: bool
    is_cell: bool

    @classmethod
    def of(cls, kernel: Any) -> Layer:
        """The layer that a `rnnkern.kernels.Kernel` runs."""
        return cls(*(getattr(kernel, name) for name in cls._fields))

    @property
    def code(self) -> int:
        """The layer as one number, with room for `PACKED`: what `ops.scan_kernel` takes.

        torch keeps compiled programs with such numbers on disk. A cell that is added at the end of
        the list changes no number of the cells before it.
        """
        more, mode = divmod(CELLS[self.mode].number, _FIRST)
        code = mode + _FIRST * (self.directions - 1)
        for flag in self[2:]:
            code = 2 * code + flag
        return 2 * code + (more << _BITS)

    @classmethod
    @functools.cache
    def of_code(cls, code: int) -> Layer:
        """The layer of a number, whether `PACKED` is in it or not."""
        more, code = divmod(code, 1 << _BITS)
        flags = [bool(code >> place & 1) for place in range(len(cls._fields) - 2, 0, -1)]
        directions, mode = divmod(code >> (len(flags) + 1), _FIRST)
        return cls(MODES[_FIRST * more + mode], directions + 1, *flags)

    @property
    def tensors(self) -> int:
        """Weights of one direction."""
        cell = CELLS[self.mode]
        return (1 + cell.recurrent) * (1 + self.bias) + self.proj + cell.parameters

    @property
    def has_cell_state(self) -> bool:
        return CELLS[self.mode].has_cell_state

    @property
    def slots(self) -> int:
        """S, the number of slots of the cell."""
        return CELLS[self.mode].slots

    @property
    def stored(self) -> int:
        """The numbers that the cell stores for each unit: of its slots and of its parameters."""
        return CELLS[self.mode].stored

    @property
    def saves_slots(self) -> bool:
        return CELLS[self.mode].saves_slots

    def hidden(self, weights: Sequence[Any]) -> int:
        """H, from the shape of W_ih."""
        return weights[0].shape[0] // CELLS[self.mode].gates  # type: ignore[no-any-return]

    def out(self, weights: Sequence[Any]) -> int:
        """O, from the shape of W_hh, if there is one."""
        if not CELLS[self.mode].recurrent:
            return self.hidden(weights)
        return weights[1].shape[1]  # type: ignore[no-any-return]

    def of_stack(self, i: int, stack: Operands, x: Tensor) -> Operands:
        """The operands of layer i of a stack of such layers, whose input is x."""
        D = self.directions
        cell = CELLS[self.mode]
        count = D * ((1 + cell.recurrent) * (1 + self.bias) + self.proj + cell.parameters)
        return Operands(
            x,
            None if stack.h0 is None else stack.h0[i * D : (i + 1) * D],
            None if stack.c0 is None else stack.c0[i * D : (i + 1) * D],
            stack.weights[i * count : (i + 1) * count],
        )


class Operands(NamedTuple):
    """What a layer, or a stack of layers, reads.

    Attributes:
        x: the input, ``[T, N, I]``, ``[N, T, I]`` batch first, or ``[rows, I]`` packed.
        h0, c0: initial states ``[D, N, ...]``, or None for zeros.
        weights: as torch.nn's flat list has them.
        y: the output of the forward pass, which backward reads too.

    A change of the operands has the same form. None then means zeros everywhere.
    """

    x: Any
    h0: Any
    c0: Any
    weights: Sequence[Any]
    y: Any = None


class Gradients(NamedTuple):
    """Gradients of a scalar with respect to the outputs, and to the slots ``[D, rows, S * H]``."""

    y: Maybe
    hn: Maybe
    cn: Maybe
    slots: Maybe = None


class Recorded(NamedTuple):
    """The forward pass of a layer as its backward pass finds it.

    Attributes:
        operands: with y.
        saved: what forward has saved, as one flat tensor (`pieces`); without elements if nothing.
    """

    layer: Layer
    steps: Steps | None
    operands: Operands
    saved: Tensor


def unflatten(z: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    return z.unflatten(axis, sizes)  # type: ignore[no-untyped-call, no-any-return]


def pieces(saved: Tensor, layer: Layer, hidden: int) -> list[Tensor]:
    """Views ``[..., D, rows, width]`` of what was saved, ``[..., elements]``: slots, then cell
    states, then hidden states before a projection, as far as the layer saves them.
    """
    planes = CELLS[layer.mode].planes
    widths = [layer.stored * layer.saves_slots, planes, int(layer.proj)]
    widths = [width for width in widths if width]
    if not widths:
        return []
    elements = saved.shape[-1] // sum(widths)
    parts = torch.split(saved, [elements * width for width in widths], -1)
    return [
        unflatten(
            part, -1, (layer.directions, elements // (layer.directions * hidden), width * hidden)
        )
        for part, width in zip(parts, widths, strict=True)
    ]


def one_step(z: Maybe) -> Any:
    """A tensor of a cell, ``[N, F]`` or ``[F]``, as that of a layer of one step: ``[1, N, F]``."""
    if z is None:
        return None
    return z.unsqueeze(0) if z.dim() == 2 else z.unsqueeze(0).unsqueeze(0)


def dense(z: Any) -> Any:
    """The tensor, or a copy of it without gaps, lazy signs or lazy zeros; None stays None.

    An instance of a subclass becomes a plain tensor, unless the subclass sees operators itself.
    """
    if z is None:
        return None
    kind = type(z)
    if kind not in (Tensor, nn.Parameter) and kind.__torch_dispatch__ is Tensor.__torch_dispatch__:
        z = z.as_subclass(Tensor)
    return (z.clone() if z._is_zerotensor() else z).resolve_neg().contiguous()
