"""Packed sequences, ``lengths`` and ``reset`` as one description of which row is active when."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from rnnkern.interop.exporting import to_torch


class Steps(NamedTuple):
    """Which rows of a batch are active at which step.

    In the order ``order``, the rows that are active at a step always come first. C++ reads the
    first five fields by their place (``read_steps``). Their tensors are on the device of the
    kernels, except the batch sizes of a packed sequence.

    Attributes:
        active: int64 ``[T]``, the number of rows active at each step, never increasing. None means
            all rows at every step. For a packed sequence, its ``batch_sizes``, on the CPU.
        order: int64 ``[N]``, the row of the batch at each rank. None means the order of the batch.
        reset: bool ``[T, N]`` (``[N, T]`` batch first), whether an episode begins at that step.
            None means never.
        packed: the data is a packed sequence: only active rows are stored, step after step.
        placed: for a packed sequence on a GPU, int64 ``[2, T]`` on that device: ``active``, and the
            row at which each step begins. Otherwise None.
        lengths: int64 ``[N]``, instead of ``active`` and ``order`` while a program of torch's own
            operators is exported. Otherwise None.
    """

    active: Tensor | None
    order: Tensor | None
    reset: Tensor | None
    packed: bool
    placed: Tensor | None = None
    lengths: Tensor | None = None


def is_packed(steps: Steps | None) -> TypeGuard[Steps]:
    """Whether the steps are those of a packed sequence."""
    return steps is not None and steps.packed


def device_of(x: Tensor) -> torch.device:
    """The device from which kernels read the `Steps` of an input: its GPU, or the CPU."""
    return x.device if x.device.type == "cuda" else torch.device("cpu")


def packed_steps(batch_sizes: Tensor, sorted_indices: Tensor | None, device: torch.device) -> Steps:
    """Steps of a ``torch.nn.utils.rnn.PackedSequence`` whose data is on the device."""
    # Copies, because backward reads them again and the caller may change them in between.
    order = None if sorted_indices is None else _copy(sorted_indices, device)
    active = batch_sizes.to("cpu", copy=True).contiguous()
    if device.type == "cpu":
        return Steps(active, order, None, True)
    if order is not None:
        rows = torch.arange(order.numel(), device=device)
        # An assertion on the GPU, because a check on the CPU would wait for it.
        torch._assert_async(
            order.sort().values.eq(rows).all(),
            "order of rows must be a permutation of the batch",
        )
    starts = active.cumsum(0) - active
    return Steps(active, order, None, True, _copy(torch.stack([active, starts]), device))


def padded_steps(
    lengths: Tensor | None,
    reset: Tensor | None,
    T: int,
    N: int,
    batch_first: bool,
    device: torch.device,
) -> Steps | None:
    """Steps of a padded batch whose kernels run on the device.

    Args:
        lengths: int64 ``[N]`` with ``0 <= lengths[n] <= T``, any device, any order.
        reset: bool ``[T, N]``, or ``[N, T]`` with ``batch_first``, any device.

    Raises:
        TypeError: ``lengths`` or ``reset`` is not a tensor, or has the wrong dtype.
        ValueError: the shape is wrong, or a length is out of range. If ``lengths`` and ``device``
            are a GPU's, a length out of range is an assertion there, as an index out of range is
            for torch, because a check on the CPU would wait for the GPU.
    """
    if lengths is None and reset is None:
        return None
    active = order = None
    if reset is not None:
        wanted = (N, T) if batch_first else (T, N)
        _expect("reset", reset, torch.bool, wanted, "(N, T)" if batch_first else "(T, N)")
        # A copy, because backward reads it again, and the caller may change it in between.
        reset = _copy(reset, device)
    if lengths is not None:
        _expect("lengths", lengths, torch.int64, (N,), "(N,)")
        compiling = torch.compiler.is_compiling()
        if compiling and to_torch():
            return Steps(None, None, reset, False, lengths=lengths)
        if compiling:  # only an operator may look into the lengths
            active, order = torch.ops.rnnkern.ranked(lengths.to(device), T)
        else:
            if device.type == "cpu":
                lengths = lengths.cpu()
            check_range(lengths, T)
            active, order = ranked(lengths.to(device, non_blocking=True), T)
    return Steps(active, order, reset, False)


def ranked(lengths: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """``active`` and ``order`` of `Steps`.

    ``active[t]`` counts the lengths above t, and ``order`` lists the rows, the longest first.
    """
    descending, order = lengths.sort(descending=True, stable=True)
    steps = torch.arange(T, device=lengths.device)
    return lengths.numel() - torch.searchsorted(descending.flip(0), steps, right=True), order


def active_mask(steps: Steps) -> Tensor:
    """Bool ``[T, N]`` for a padded batch with ``lengths``: the row is active at that step."""
    assert steps.active is not None
    assert steps.order is not None
    return torch.argsort(steps.order) < steps.active[:, None]


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, copy=True, non_blocking=device.type != "cpu")


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
