"""What a layer is, its operands and results, in values that torch can trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.cells import CELLS

Maybe = Tensor | None

PACKED = 1
"""Added to the code of a layer: its input is a packed sequence."""

_MODES = tuple(CELLS)


class Spec(NamedTuple):
    """What a layer is, as `rnnkern.kernels.Layer`, in values that torch can trace."""

    mode: str
    directions: int
    bias: bool
    batch_first: bool
    proj: bool
    by_bfloat16: bool
    is_cell: bool

    @classmethod
    def of(cls, layer: Any) -> Spec:
        """Of a `rnnkern.kernels.Layer`."""
        return cls(*(getattr(layer, name) for name in cls._fields))

    @property
    def code(self) -> int:
        """The same as one number, with room for `PACKED`."""
        code = _MODES.index(self.mode) + len(_MODES) * (self.directions - 1)
        for flag in self[2:]:
            code = 2 * code + flag
        return 2 * code

    @classmethod
    def of_code(cls, code: int) -> Spec:
        """Of a number, whether `PACKED` is in it or not."""
        flags = [bool(code >> place & 1) for place in range(len(cls._fields) - 2, 0, -1)]
        directions, mode = divmod(code >> (len(flags) + 1), len(_MODES))
        return cls(_MODES[mode], directions + 1, *flags)

    @property
    def tensors(self) -> int:
        """Weights of one direction."""
        return 2 + 2 * self.bias + self.proj

    @property
    def has_cell_state(self) -> bool:
        return CELLS[self.mode].has_cell_state

    @property
    def slots(self) -> int:
        """Numbers that the cell makes of its sums for each unit."""
        return CELLS[self.mode].slots

    @property
    def saves_slots(self) -> bool:
        return CELLS[self.mode].saves_slots

    def hidden(self, weights: Sequence[Tensor]) -> int:
        return weights[1].shape[0] // CELLS[self.mode].gates


class Point(NamedTuple):
    """What a layer was given and has made, or a direction in which all that changes.

    Shapes are those of torch: ``x`` and ``y`` as the layer has them, states ``[D, N, ...]``,
    weights flat. None stands for zeros.
    """

    x: Maybe
    h0: Maybe
    c0: Maybe
    weights: Sequence[Maybe]
    y: Maybe = None


class Gradients(NamedTuple):
    """Of a scalar: with respect to outputs and, of the slots, ``[D, rows, S * H]``."""

    y: Maybe
    hn: Maybe
    cn: Maybe
    slots: Maybe = None


def unflatten(z: Tensor, axis: int, sizes: tuple[int, ...]) -> Tensor:
    return z.unflatten(axis, sizes)  # type: ignore[no-untyped-call, no-any-return]


def pieces(saved: Tensor, layer: Spec, hidden: int) -> list[Tensor]:
    """Views ``[..., D, rows, width]`` of what was saved, ``[..., elements]``."""
    widths = [layer.slots * layer.saves_slots, int(layer.has_cell_state), int(layer.proj)]
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
    """What a cell has, ``[N, F]`` or ``[F]``, as a layer of one step has it: ``[1, N, F]``."""
    if z is None:
        return None
    return z.unsqueeze(0) if z.dim() == 2 else z.unsqueeze(0).unsqueeze(0)


def dense(z: Any) -> Any:
    """Without gaps or lazy signs; of None none."""
    return None if z is None else z.resolve_neg().contiguous()
