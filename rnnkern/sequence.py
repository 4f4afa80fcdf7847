"""Packed sequences, ``lengths`` and ``reset`` as one description of which row is active when."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Steps(NamedTuple):
    """Which rows of a batch take part in which step. The kernels read it as it is.

    Rows are looked at in the order ``order``, in which those active at a step are always
    the first ones.

    Attributes:
        active: int64 ``[T]``, rows active at each step, never increasing; None: all, always.
        order: int64 ``[N]``, the batch row that stands in each place; None: as they come.
        reset: bool ``[T, N]`` (``[N, T]`` batch first), an episode begins at that step;
            None: never.
        packed: the data is a packed sequence: only active rows are stored, step after step.
    """

    active: Tensor | None
    order: Tensor | None
    reset: Tensor | None
    packed: bool


def packed_steps(batch_sizes: Tensor, sorted_indices: Tensor | None) -> Steps:
    """Steps of a ``torch.nn.utils.rnn.PackedSequence``."""
    # Copies: backward reads them again, whatever the caller does to them in between.
    order = None if sorted_indices is None else sorted_indices.to("cpu", copy=True)
    return Steps(batch_sizes.to("cpu", copy=True).contiguous(), order, None, True)


def padded_steps(
    lengths: Tensor | None, reset: Tensor | None, T: int, N: int, batch_first: bool
) -> Steps | None:
    """Steps of a padded batch.

    Args:
        lengths: int64 ``[N]`` with ``0 <= lengths[n] <= T``, any device, any order.
        reset: bool ``[T, N]``, or ``[N, T]`` with ``batch_first``.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: of the wrong shape, or lengths out of range.
    """
    if lengths is None and reset is None:
        return None
    active = order = None
    if reset is not None:
        wanted = (N, T) if batch_first else (T, N)
        _expect("reset", reset, torch.bool, wanted, "(N, T)" if batch_first else "(T, N)")
        reset = reset.to(
            "cpu", copy=True
        )  # backward reads it again: what the caller does to it later is no matter
    if lengths is not None:
        _expect("lengths", lengths, torch.int64, (N,), "(N,)")
        lengths = lengths.cpu()
        if N and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
            raise ValueError(
                f"lengths must be between 0 and the number of steps {T}, "
                f"got values from {int(lengths.min())} to {int(lengths.max())}"
            )
        descending, order = lengths.sort(descending=True, stable=True)
        active = N - torch.searchsorted(
            descending.flip(0), torch.arange(T, device="cpu"), right=True
        )
    return Steps(active, order, reset, False)


def _expect(
    name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...], axes: str
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}, got {tuple(value.shape)}")
