"""Packed sequences, ``lengths`` and ``reset`` as one description of which row is active when."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from rnnkern.interop.exporting import to_torch


class Steps(NamedTuple):
    """Which rows of a batch take part in which step. The kernels read it as it is.

    Rows are looked at in the order ``order``, in which those active at a step are always
    the first ones. All tensors are where the kernels run, but for the batch sizes of a packed
    sequence.

    Attributes:
        active: int64 ``[T]``, rows active at each step, never increasing; None: all, always. Of a
            packed sequence its ``batch_sizes``, on the CPU.
        order: int64 ``[N]``, the batch row that stands in each place; None: as they come.
        reset: bool ``[T, N]`` (``[N, T]`` batch first), an episode begins at that step;
            None: never.
        packed: the data is a packed sequence: only active rows are stored, step after step.
        placed: of a packed sequence on a GPU, int64 ``[2, T]`` there: ``active``, and the row at
            which each step begins; else None.
        lengths: int64 ``[N]``, in place of ``active`` and ``order`` where a program of torch's own
            operators is exported; else None.
    """

    active: Tensor | None
    order: Tensor | None
    reset: Tensor | None
    packed: bool
    placed: Tensor | None = None
    lengths: Tensor | None = None


def place_of(x: Tensor) -> torch.device:
    """Where the steps of an input are wanted: where there may be kernels for it."""
    return x.device if x.device.type == "cuda" else torch.device("cpu")


def packed_steps(batch_sizes: Tensor, sorted_indices: Tensor | None, place: torch.device) -> Steps:
    """Steps of a ``torch.nn.utils.rnn.PackedSequence`` whose data is at ``place``."""
    # Copies: backward reads them again, whatever the caller does to them in between.
    order = None if sorted_indices is None else _copy(sorted_indices, place)
    active = batch_sizes.to("cpu", copy=True).contiguous()
    if place.type == "cpu":
        return Steps(active, order, None, True)
    if order is not None:
        rows = torch.arange(order.numel(), device=place)
        # The kernels cannot look before they run, and nobody waits for the GPU.
        torch._assert_async(
            order.sort().values.eq(rows).all(),
            "order of rows must be a permutation of the batch",
        )
    starts = active.cumsum(0) - active
    return Steps(active, order, None, True, _copy(torch.stack([active, starts]), place))


def padded_steps(
    lengths: Tensor | None,
    reset: Tensor | None,
    T: int,
    N: int,
    batch_first: bool,
    place: torch.device,
) -> Steps | None:
    """Steps of a padded batch whose kernels run at ``place``.

    Args:
        lengths: int64 ``[N]`` with ``0 <= lengths[n] <= T``, any device, any order.
        reset: bool ``[T, N]``, or ``[N, T]`` with ``batch_first``, any device.

    Raises:
        TypeError: not a tensor, or of the wrong dtype.
        ValueError: of the wrong shape, or lengths out of range. Where both lengths and ``place``
            are on a GPU nobody waits to look: lengths out of range are an assertion there, as an
            index out of range is for torch.
    """
    if lengths is None and reset is None:
        return None
    active = order = None
    if reset is not None:
        wanted = (N, T) if batch_first else (T, N)
        _expect("reset", reset, torch.bool, wanted, "(N, T)" if batch_first else "(T, N)")
        # A copy: backward reads it again, what the caller does to it later is no matter.
        reset = _copy(reset, place)
    if lengths is not None:
        _expect("lengths", lengths, torch.int64, (N,), "(N,)")
        compiling = torch.compiler.is_compiling()
        if compiling and to_torch():
            return Steps(None, None, reset, False, lengths=lengths)
        if compiling:  # what an operator alone may look into
            active, order = torch.ops.rnnkern.ranked(lengths.to(place), T)
        else:
            if place.type == "cpu":
                lengths = lengths.cpu()
            check_range(lengths, T)
            active, order = ranked(lengths.to(place, non_blocking=True), T)
    return Steps(active, order, reset, False)


def ranked(lengths: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """``active`` and ``order`` of `Steps`."""
    descending, order = lengths.sort(descending=True, stable=True)
    steps = torch.arange(T, device=lengths.device)
    return lengths.numel() - torch.searchsorted(descending.flip(0), steps, right=True), order


def active_rows(steps: Steps) -> Tensor:
    """Bool ``[T, N]`` of a padded batch with ``lengths``: the row takes part in that step."""
    assert steps.active is not None
    assert steps.order is not None
    return torch.argsort(steps.order) < steps.active[:, None]


def _copy(tensor: Tensor, place: torch.device) -> Tensor:
    return tensor.to(place, copy=True, non_blocking=place.type != "cpu")


def check_range(lengths: Tensor, T: int) -> None:
    wanted = f"lengths must be between 0 and the number of steps {T}"
    if lengths.device.type != "cpu":
        torch._assert_async(((lengths >= 0) & (lengths <= T)).all(), wanted)
    elif lengths.numel() and not 0 <= int(lengths.min()) <= int(lengths.max()) <= T:
        raise ValueError(f"{wanted}, got values from {int(lengths.min())} to {int(lengths.max())}")


def _expect(
    name: str, value: object, dtype: torch.dtype, shape: tuple[int, ...], axes: str
) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype != dtype:
        raise TypeError(f"{name} must be of dtype {dtype}, got {value.dtype}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {axes} = {shape}, got {tuple(value.shape)}")
