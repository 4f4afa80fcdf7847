"""`torch.func.vmap` over a scan: the batches become rows of one batch, or run one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern.layer import PACKED, Gradients, Layer, Maybe, Operands, Recorded, pieces, unflatten
from rnnkern.ops.differentiable import (
    of_scan,
    of_scan_backward,
    parts_of_scan,
    parts_of_scan_backward,
    wanted_of,
    with_recorded_outputs,
)
from rnnkern.ops.kernel_ops import steps_of
from rnnkern.ops.modes import apply
from rnnkern.sequence import Steps

Function = type[torch.autograd.Function]


def scan(function: Function, size: int, in_dims: Any, operands: Any) -> tuple[Any, Any]:
    """The rule of ``scan``, which is that function, for a batch of that size."""
    code, x, *rest = operands
    weights, h0, c0, steps = parts_of_scan(code, rest)
    of_weights, of_h0, of_c0, of_steps = parts_of_scan(code, in_dims[2:])
    if not _folds(of_weights, of_steps):
        return _one_by_one(function, size, in_dims, operands)
    layer = Layer.of_code(code)
    fold = _Fold(size, layer, bool(code & PACKED))
    own = Operands(
        fold.rows(x, in_dims[1]), fold.states(h0, of_h0), fold.states(c0, of_c0), weights
    )
    y, hn, cn, saved = apply(function, *of_scan(layer, fold.steps(steps, of_steps), own))
    cell = layer.has_cell_state
    outputs = (
        fold.from_rows(y),
        fold.from_states(hn),
        fold.from_states(cn) if cell else cn,
        fold.from_saved(saved, layer, layer.hidden(weights)),
    )
    return outputs, (0, 0, 0 if cell else None, 0)


def scan_backward(function: Function, size: int, in_dims: Any, operands: Any) -> tuple[Any, Any]:
    """The rule of ``scan_backward``, which is that function, for a batch of that size."""
    code, flags, x, y, saved, *rest = operands
    weights, incoming, h0, c0, steps = parts_of_scan_backward(code, rest)
    dims, of_incoming, of_h0, of_c0, of_steps = parts_of_scan_backward(code, in_dims[5:])
    layer, wanted = Layer.of_code(code), wanted_of(flags, weights, h0, c0)
    of_weights = wanted[1 : 1 + len(weights)]
    if not _folds(dims, of_steps) or (layer.proj and any(of_weights)):
        return _one_by_one(function, size, in_dims, operands)
    fold = _Fold(size, layer, bool(code & PACKED))
    dy, dhn, dcn = incoming
    outputs = Gradients(
        fold.rows(dy, of_incoming[0]),
        fold.states(dhn, of_incoming[1]),
        fold.states(dcn, of_incoming[2]),
    )
    at = Operands(
        fold.rows(x, in_dims[2]),
        fold.states(h0, of_h0),
        fold.states(c0, of_c0),
        weights,
        fold.rows(y, in_dims[3]),
    )
    own_saved = fold.saved(saved, in_dims[4], layer, layer.hidden(weights))
    recorded = Recorded(layer, fold.steps(steps, of_steps), at, own_saved)
    # One pass for all samples. The gradients of the weights are separate products for each sample.
    asked = [wanted[0], *[False] * len(weights), *wanted[1 + len(weights) :]]
    made = apply(function, *of_scan_backward(recorded, outputs, asked))
    parts: list[Tensor] = list(made)
    out_dims: list[int | None] = [None] * len(made)
    for i, flag in enumerate(asked):
        if flag:
            unfold = fold.from_states if i else fold.from_rows
            parts[i], out_dims[i] = unfold(made[i]), 0
    parts[-1], out_dims[-1] = fold.from_states(made[-1]), 0
    if any(of_weights):
        from rnnkern import derivatives

        at = with_recorded_outputs(layer, recorded.steps, at)
        found = derivatives.weight_gradients(layer, recorded.steps, at, made[-1], size)
        for i, flag in enumerate(of_weights):
            if flag:
                parts[1 + i], out_dims[1 + i] = found[i], 0
    return tuple(parts), tuple(out_dims)


def _folds(of_weights: Sequence[Any], of_steps: Sequence[Any]) -> bool:
    """Whether the batches can be rows of one batch: only data and ``reset`` differ."""
    active, order, _, placed = of_steps
    return all(dim is None for dim in (active, order, placed, *of_weights))


def _one_by_one(function: Function, size: int, in_dims: Any, operands: Any) -> tuple[Any, Any]:
    results = [
        apply(
            function,
            *(
                o.select(d, i) if isinstance(o, Tensor) and d is not None else o
                for o, d in zip(operands, in_dims, strict=True)
            ),
        )
        for i in range(size)
    ]
    outputs = tuple(torch.stack(parts) for parts in zip(*results, strict=True))
    return outputs, (0,) * len(outputs)


class _Fold:
    """A batch of operands as more rows of one: row n of sample b becomes row n * size + b."""

    def __init__(self, size: int, layer: Layer, packed: bool) -> None:
        self.size, self.packed = size, packed
        self.axis = 0 if packed or layer.batch_first else 1  # of the rows

    def _first(self, z: Tensor, dim: int | None) -> Tensor:
        return z.expand(self.size, *z.shape) if dim is None else z.movedim(dim, 0)

    def rows(self, z: Maybe, dim: int | None) -> Maybe:
        if z is None:
            return None
        return self._first(z, dim).movedim(0, self.axis + 1).flatten(self.axis, self.axis + 1)

    def from_rows(self, z: Tensor) -> Tensor:
        return unflatten(z, self.axis, (-1, self.size)).movedim(self.axis + 1, 0)

    def states(self, z: Maybe, dim: int | None) -> Maybe:
        return None if z is None else self._first(z, dim).movedim(0, 2).flatten(1, 2)

    def from_states(self, z: Tensor) -> Tensor:
        """Unfolds states ``[D, N, ...]``, or saved parts ``[D, rows, ...]``."""
        return unflatten(z, 1, (-1, self.size)).movedim(2, 0)

    def steps(self, steps: Sequence[Maybe], dims: Sequence[int | None]) -> Steps | None:
        active, order, reset, placed = steps
        if order is not None:
            own = torch.arange(self.size, device=order.device)
            order = (order[:, None] * self.size + own).flatten()
        if reset is not None:
            reset = self.rows(reset[..., None], dims[2]).squeeze(-1).contiguous()  # type: ignore[union-attr]
        active, placed = (None if z is None else z * self.size for z in (active, placed))
        return steps_of(active, order, reset, placed, self.packed)

    def saved(self, z: Tensor, dim: int | None, layer: Layer, hidden: int) -> Tensor:
        parts = pieces(self._first(z, dim), layer, hidden)
        return torch.cat([part.movedim(0, 2).flatten() for part in parts] or [z.new_empty(0)])

    def from_saved(self, z: Tensor, layer: Layer, hidden: int) -> Tensor:
        parts = [self.from_states(part).flatten(1) for part in pieces(z, layer, hidden)]
        return torch.cat(parts or [z.new_empty(self.size, 0)], -1)
