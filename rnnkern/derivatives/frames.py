"""Operands as ``[T, N, ...]`` in the order in which a direction takes its steps, and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnnkern.layer import Gradients, Layer, Maybe, Operands
from rnnkern.sequence import Steps, active_mask, is_packed

if TYPE_CHECKING:
    from rnnkern.derivatives.direction import Moved


# A slice of everything is an alias. The vmap of torch.autograd.functional has no rule for that, nor
# for flatten.
def columns(z: Tensor, begin: int, end: int) -> Tensor:
    """``z[..., begin:end]``"""
    return z.narrow(-1, begin, end - begin)


def rows_of(z: Tensor) -> Tensor:
    """``[T, N, features]`` as ``[T * N, features]``."""
    return z.reshape(z.shape[0] * z.shape[1], z.shape[2])


class Frames:
    """Operands as ``[T, N, ...]`` in the order in which a direction takes its steps, and back."""

    def __init__(self, layer: Layer, steps: Steps | None, at: Operands) -> None:
        x = at.x
        assert x is not None
        self.layer, self.steps = layer, steps
        self.dtype = x.dtype
        self.computed = torch.promote_types(x.dtype, torch.float32)
        self.packed = is_packed(steps)
        if self.packed:
            active = steps.active.to(x.device)  # type: ignore[union-attr]
            self.T, self.N = active.shape[0], int(active[0])
            start = active.cumsum(0) - active
            ranks = torch.arange(self.N, device=x.device)
            self.rows = (start[:, None] + ranks).clamp(max=x.shape[0] - 1)
            step = torch.repeat_interleave(
                torch.arange(self.T, device=x.device), active, output_size=x.shape[0]
            )
            self.row_of = step, torch.arange(x.shape[0], device=x.device) - start[step]
            self.mask: Maybe = ranks < active[:, None]
        else:
            self.T, self.N = (x.shape[1], x.shape[0]) if layer.batch_first else x.shape[:2]
            self.mask = None
            if steps is not None and steps.active is not None:
                self.mask = active_mask(steps).to(x.device)
        self.reset: Maybe = None
        if steps is not None and steps.reset is not None:
            reset = steps.reset.to(x.device)
            self.reset = reset.t() if layer.batch_first else reset

    def directed(self, z: Tensor, d: int) -> Tensor:
        return z.flip(0) if d else z

    def of(self, z: Any, d: int) -> Any:
        """The frames of rows as the layer has them; None stays None."""
        if z is None:
            return None
        z = as_dtype(self.computed, z)
        if self.packed:
            z = z[self.rows]
        elif self.layer.batch_first:
            z = z.transpose(0, 1)
        return self.directed(self._masked(z), d)

    def from_rows(self, z: Tensor, d: int) -> Tensor:
        z = self.directed(z, d)
        if self.packed:
            z = z[self.row_of]
        elif self.layer.batch_first:
            z = z.transpose(0, 1)
        return as_dtype(self.dtype, z)

    def saved(self, z: Any, d: int) -> Any:
        """The frames of a saved buffer ``[D, rows, ...]``; None stays None."""
        if z is None:
            return None
        z = as_dtype(self.computed, z[d])
        z = z[self.rows] if self.packed else z.reshape(self.T, self.N, z.shape[-1])
        return self.directed(self._masked(z), d)

    def to_saved(self, z: Tensor, d: int) -> Tensor:
        z = self.directed(z, d)
        return as_dtype(self.dtype, z[self.row_of] if self.packed else rows_of(z))

    def _masked(self, z: Tensor) -> Tensor:
        """z, with zeros past the end of a row, because padding may be NaN."""
        return z if self.mask is None else torch.where(self._of_mask(), z, 0)

    def _of_mask(self) -> Tensor:
        assert self.mask is not None
        return self.mask[..., None]

    def active(self, d: int) -> Maybe:
        """``[T, N, 1]``, whether a row is active."""
        return None if self.mask is None else self.directed(self._of_mask(), d)

    def goes_on(self, d: int) -> Maybe:
        """``[T, N, 1]``, whether no beginning of an episode cuts a step off from the one before."""
        if self.reset is None:
            return None
        reset = self.reset
        if d:  # nothing passes from an episode's first step to the step before it
            if self.mask is not None:
                reset = reset & self.mask
            reset = torch.cat((reset[1:], torch.zeros_like(reset[:1])))
        return self.directed(~reset[..., None], d)

    def state(self, z: Maybe, d: int, like: Tensor, width: int) -> Tensor:
        if z is None:
            return like.new_zeros(self.N, width, dtype=self.computed)
        own = as_dtype(self.computed, z[d])
        if self.packed and self.steps is not None and self.steps.order is not None:
            own = own.index_select(0, self.steps.order.to(z.device))
        return own

    def from_states(self, parts: Sequence[Tensor]) -> Tensor:
        z = as_dtype(self.dtype, stacked(parts))
        if self.packed and self.steps is not None and self.steps.order is not None:
            z = z.index_select(1, torch.argsort(self.steps.order).to(z.device))
        return z

    def incoming(self, gradients: Gradients, d: int) -> tuple[Maybe, Maybe, Maybe]:
        """Gradients of a direction's outputs and final states."""
        y = gradients.y
        if y is not None:
            width = y.shape[-1] // self.layer.directions
            y = columns(y, d * width, (d + 1) * width)
        hn, cn = (
            None if z is None else self.state(z, d, z, z.shape[-1])
            for z in (gradients.hn, gradients.cn)
        )
        return self.of(y, d), hn, cn

    def outputs(self, found: Sequence[Moved]) -> tuple[Tensor, Tensor, Maybe]:
        """Changes of ``y, h_n, c_n``."""
        y = []
        for d, moved in enumerate(found):
            active = self.active(d)
            own = moved.h if active is None else torch.where(active, moved.h, 0)
            y.append(self.from_rows(own, d))
        return (
            y[0] if len(y) == 1 else torch.cat(y, -1),
            self.from_states([moved.hn for moved in found]),
            self.from_states([moved.cn for moved in found]) if self.layer.has_cell_state else None,
        )


def as_dtype(dtype: torch.dtype, z: Tensor) -> Tensor:
    return z if z.dtype == dtype else z.to(dtype)


def stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(tuple(parts))
