"""`torch.func.vmap` over a scan: the batches become rows of one batch, or run one by one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern.layer import Layer, Maybe, Operands, pieces, unflatten
from rnnkern.ops.differentiable import STEPS
from rnnkern.ops.kernel_ops import steps_of
from rnnkern.ops.modes import apply

Function = type[torch.autograd.Function]


def scan(function: Function, size: int, in_dims: Any, operands: Any) -> tuple[Any, Any]:
    """The rule of ``scan``, which is that function, for a batch of that size."""
    layer, x, h0, c0, *rest = operands
    if not _folds(in_dims[4:]):
        return _one_by_one(function, size, in_dims, operands)
    fold = _Fold(size, layer, rest[STEPS - 1])
    y, hn, cn, saved = apply(
        function,
        layer,
        fold.rows(x, in_dims[1]),
        fold.states(h0, in_dims[2]),
        fold.states(c0, in_dims[3]),
        *fold.steps(rest[:STEPS], in_dims[4 + 2]),
        *rest[STEPS:],
    )
    cell = layer.has_cell_state
    outputs = (
        fold.from_rows(y),
        fold.from_states(hn),
        fold.from_states(cn) if cell else cn,
        fold.from_saved(saved, layer, layer.hidden(rest[STEPS:])),
    )
    return outputs, (0, 0, 0 if cell else None, 0)


def scan_backward(function: Function, size: int, in_dims: Any, operands: Any) -> tuple[Any, Any]:
    """The rule of ``scan_backward``, which is that function, for a batch of that size."""
    layer, wanted, dy, dhn, dcn, x, h0, c0, y, saved, *rest = operands
    steps, weights = rest[:STEPS], rest[STEPS:]
    of_weights = wanted[1 : 1 + len(weights)]
    if not _folds(in_dims[10:]) or (layer.proj and any(of_weights)):
        return _one_by_one(function, size, in_dims, operands)
    fold = _Fold(size, layer, rest[STEPS - 1])
    dims = in_dims[2:]
    incoming = (fold.rows(dy, dims[0]), fold.states(dhn, dims[1]), fold.states(dcn, dims[2]))
    own_x, own_y = fold.rows(x, dims[3]), fold.rows(y, dims[6])
    own_h0, own_c0 = fold.states(h0, dims[4]), fold.states(c0, dims[5])
    own_steps = fold.steps(steps, in_dims[10 + 2])
    own_saved = fold.saved(saved, dims[7], layer, layer.hidden(weights))
    flags = (wanted[0], *[False] * len(weights), *wanted[1 + len(weights) :])
    # One pass for all samples. The gradients of the weights are separate products for each sample.
    made = apply(
        function,
        layer,
        flags,
        *incoming,
        own_x,
        own_h0,
        own_c0,
        own_y,
        own_saved,
        *own_steps,
        *weights,
    )
    parts: list[Tensor] = list(made)
    out_dims: list[int | None] = [None] * len(made)
    for i, flag in enumerate(flags):
        if flag:
            unfold = fold.from_states if i else fold.from_rows
            parts[i], out_dims[i] = unfold(made[i]), 0
    parts[-1], out_dims[-1] = fold.from_states(made[-1]), 0
    if any(of_weights):
        at = Operands(own_x, own_h0, own_c0, weights, own_y)
        from rnnkern import derivatives

        found = derivatives.weight_gradients(layer, steps_of(*own_steps), at, made[-1], size)
        for i, flag in enumerate(of_weights):
            if flag:
                parts[1 + i], out_dims[1 + i] = found[i], 0
    return tuple(parts), tuple(out_dims)


def _folds(in_dims: Sequence[Any]) -> bool:
    """Whether the batches can be rows of one batch: only data and ``reset`` differ."""
    active, order, _, placed, *_ = in_dims
    return all(dim is None for dim in (active, order, placed, *in_dims[STEPS:]))


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
        self.size = size
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

    def steps(self, steps: Sequence[Any], dim: int | None) -> tuple[Any, ...]:
        active, order, reset, placed, packed = steps
        if order is not None:
            own = torch.arange(self.size, device=order.device)
            order = (order[:, None] * self.size + own).flatten()
        if reset is not None:
            reset = self.rows(reset[..., None], dim).squeeze(-1).contiguous()  # type: ignore[union-attr]
        active, placed = (None if z is None else z * self.size for z in (active, placed))
        return active, order, reset, placed, packed

    def saved(self, z: Tensor, dim: int | None, layer: Layer, hidden: int) -> Tensor:
        parts = pieces(self._first(z, dim), layer, hidden)
        return torch.cat([part.movedim(0, 2).flatten() for part in parts] or [z.new_empty(0)])

    def from_saved(self, z: Tensor, layer: Layer, hidden: int) -> Tensor:
        parts = [self.from_states(part).flatten(1) for part in pieces(z, layer, hidden)]
        return torch.cat(parts or [z.new_empty(self.size, 0)], -1)
