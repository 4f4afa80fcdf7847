"""What a layer is, and the only caller of ``rnnkern._C``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from rnnkern import _C
from rnnkern.cells import CELLS
from rnnkern.sequence import Steps


class Layer:
    """What a layer is, apart from the sizes of its input.

    Attributes:
        mode: the cell, as ``torch.nn`` calls it.
        out: features of one direction's output (the projected size, or ``hidden``).
        tensors: weights per direction.
    """

    __slots__ = (
        "batch_first",
        "bias",
        "directions",
        "handle",
        "has_cell_state",
        "mode",
        "out",
        "projected",
        "tensors",
    )

    def __init__(
        self, mode: str, directions: int, hidden: int, proj: int, bias: bool, batch_first: bool
    ) -> None:
        cell = CELLS[mode]
        self.mode = mode
        self.directions = directions
        self.out = proj or hidden
        self.bias = bias
        self.projected = proj > 0
        self.batch_first = batch_first
        self.has_cell_state = cell.states == 2
        self.tensors = 2 + 2 * bias + self.projected
        self.handle = _C.Layer(
            cell.index, directions, hidden, self.out, bias, self.projected, batch_first
        )


layer = lru_cache(maxsize=4096)(Layer)
"""The layer of that mode, directions, hidden size, projection, bias and layout: one object each."""

RefusedError = _C.RefusedError
"""Raised by `forward` and `backward`, a RuntimeError.

An operand does not fit, or no kernel covers it.
"""

refusal = _C.refusal
"""``refusal(x, h0, c0, weights)``: why no kernel covers these tensors, or None.

Looks at types, device, dtype, and whether there is plain memory behind them; the reason is ``GAPS``
where a dense copy is all that is missing.
"""

GAPS: str = _C.GAPS

mode_refusal = _C.mode_refusal
"""``mode_refusal()``: why no kernel may run in the present mode of torch, or None.

`forward` refuses by itself.
"""

compiler: str = _C.compiler
compiled_sets = _C.compiled_sets
instruction_set = _C.instruction_set
"""What the extension was built with, and the widest instruction set in use."""


def forward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    steps: Steps | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """One layer: output, ``h_n``, ``c_n`` or None, and what backward needs if ``training``.

    Raises:
        RefusedError: an operand does not fit, or no kernel covers it (`refusal` says why). Nothing
            is computed then.
    """
    return _C.forward(
        layer.handle,
        x,
        h0,
        c0,
        weights,
        steps,
        training,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def backward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    steps: Steps | None,
    y: Tensor,
    saved: Tensor | None,
    dy: Tensor | None,
    dhn: Tensor | None,
    dcn: Tensor | None,
    wanted: Sequence[bool],
    overwrite: bool,
) -> list[Tensor | None]:
    """Gradients of ``x, h0, c0, *weights``, None where not ``wanted``.

    Args:
        dy, dhn, dcn: gradients of output, ``h_n`` and ``c_n``; None stands for zeros.
        overwrite: what was saved is not needed again; gradients of the gates take its place.
    """
    return _C.backward(
        layer.handle,
        x,
        h0,
        c0,
        weights,
        y,
        saved,
        dy,
        dhn,
        dcn,
        wanted,
        overwrite,
        steps,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )


def describe(layer: Layer, x: Tensor, T: int, N: int, features: int, back: bool) -> str:
    """The plan of one layer in words."""
    return _C.describe_plan(
        layer.handle,
        T,
        N,
        x.numel() // x.size(-1),
        features,
        x.element_size(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        back,
    )
