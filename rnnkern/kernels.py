"""Buffers for the kernels, and the only caller of ``rnnkern._C``."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from rnnkern import _C
from rnnkern.cells import CELLS
from rnnkern.sequence import Steps

Saved = tuple[Tensor | None, Tensor | None, Tensor | None]
"""What forward leaves for backward: slots, cell states, hidden states before the projection."""


class Layer:
    """What a layer is, apart from its sizes.

    Attributes:
        mode: the cell, as ``torch.nn`` calls it.
        tensors: weights per direction.
    """

    __slots__ = (
        "batch_first",
        "bias",
        "directions",
        "handle",
        "has_cell_state",
        "mode",
        "projected",
        "slots",
        "tensors",
    )

    def __init__(
        self, mode: str, directions: int, bias: bool, projected: bool, batch_first: bool
    ) -> None:
        cell = CELLS[mode]
        self.mode = mode
        self.directions = directions
        self.bias = bias
        self.projected = projected
        self.batch_first = batch_first
        self.slots = cell.slots
        self.has_cell_state = cell.states == 2
        self.tensors = 2 + 2 * bias + projected
        self.handle = _C.Layer(cell.index, directions, bias, projected, batch_first)


layer = cache(Layer)
"""The layer of that mode, directions, bias, projection and layout: one object each."""

refusal = _C.refusal
"""``refusal(x, h0, c0, weights)``: why no kernel covers these tensors, or None.

Looks at types, device, dtype, and whether there is plain memory behind them; the reason is ``GAPS`` where a dense copy is
all that is missing.
"""

GAPS: str = _C.GAPS


def forward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    steps: Steps | None,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Saved | tuple[()]]:
    """One layer: output, final states, and what backward needs if ``training``."""
    w_hh = weights[1]
    hidden = w_hh.size(0) // CELLS[layer.mode].gates
    out = weights[layer.tensors - 1].size(0) if layer.projected else hidden
    D = layer.directions
    packed = steps is not None and steps.packed
    if packed:
        rows, batch = x.size(0), _packed_batch(steps)
        y = x.new_empty(rows, D * out)
    else:
        first, second, _ = x.shape
        rows, batch = first * second, first if layer.batch_first else second
        y = x.new_empty(first, second, D * out)
    hn = x.new_empty(D, batch, out)
    cn = x.new_empty(D, batch, hidden) if layer.has_cell_state else None
    saved: Saved | tuple[()] = ()
    if training:
        saved = (
            x.new_empty(D, rows, layer.slots * hidden) if layer.slots else None,
            x.new_empty(D, rows, hidden) if layer.has_cell_state else None,
            x.new_empty(D, rows, hidden) if layer.projected else None,
        )
    _C.forward(
        layer.handle,
        x,
        h0,
        c0,
        weights,
        y,
        hn,
        cn,
        saved,
        steps,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return y, hn, cn, saved


def backward(
    layer: Layer,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: Sequence[Tensor],
    steps: Steps | None,
    y: Tensor,
    saved: Saved,
    incoming: tuple[Tensor | None, Tensor | None, Tensor | None],
    wanted: Sequence[bool],
    overwrite: bool,
) -> list[Tensor | None]:
    """Gradients of ``x, h0, c0, *weights``, None where not ``wanted``.

    Args:
        incoming: gradients of output, ``h_n`` and ``c_n``; None stands for zeros.
        overwrite: the saved slots are not needed again and take the gradients of the gates.
    """
    hidden = weights[1].size(0) // CELLS[layer.mode].gates
    rows = y.numel() // y.size(-1)
    slots = saved[0]
    if slots is None:
        dslots = x.new_empty(layer.directions, rows, hidden)
    else:
        dslots = slots if overwrite else torch.empty_like(slots)
    dprojected = (
        x.new_empty(layer.directions, rows, y.size(-1) // layer.directions)
        if layer.projected
        else None
    )
    gradients = [
        tensor.new_empty(tensor.shape) if need and tensor is not None else None
        for tensor, need in zip((x, h0, c0, *weights), wanted, strict=True)
    ]
    _C.backward(
        layer.handle,
        x,
        h0,
        c0,
        weights,
        y,
        saved,
        incoming,
        (dslots, dprojected),
        tuple(gradients[:3]),
        gradients[3:],
        steps,
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
    )
    return gradients


def describe(
    layer: Layer, x: Tensor, steps: tuple[int, int], sizes: tuple[int, int, int], back: bool
) -> str:
    """The plan of one layer in words, for ``steps = (T, N)`` and ``sizes = (I, H, O)``."""
    return _C.describe_plan(
        layer.handle,
        *steps,
        *sizes,
        x.element_size(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        back,
    )


def _packed_batch(steps: Steps | None) -> int:
    assert steps is not None and steps.active is not None
    return int(steps.active[0]) if steps.active.numel() else 0
