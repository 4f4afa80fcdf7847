"""Wrong calls, and their comparison with what torch.nn makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import ModuleType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import rnnkern

T, N, I, H = 5, 2, 3, 4

# In the words of a case: the type of device that the test runs on.
HERE = "the device of the test"

# A call, given how to make a module; then what the message must name: what was given and what was
# wanted.
Make: TypeAlias = Callable[..., nn.Module]
Case: TypeAlias = tuple[Callable[[Make], Any], Sequence[str]]


def maker(library: ModuleType, kind: str) -> Make:
    def make(*sizes: int, **options: Any) -> nn.Module:
        torch.manual_seed(0)
        return getattr(library, kind)(*(sizes or (I, H)), **options)

    return make


def check_as_torch(kind: str, call: Callable[[Make], Any], words: Sequence[str] = ()) -> None:
    """`call` raises with rnnkern what it raises with torch.nn, or gives the same.

    On a GPU torch.nn lacks some of what it has on the CPU, as LSTM of complex numbers or of no
    rows: to do as it does there is right too.
    """
    here = torch.get_default_device()
    actual = outcome(rnnkern, kind, call, here)
    wanted = outcome(nn, kind, call, torch.device("cpu"))
    if here.type != "cpu" and not alike(actual, wanted):
        wanted = outcome(nn, kind, call, here)
    if not alike(actual, wanted) and isinstance(actual, Exception):
        raise actual
    assert alike(actual, wanted), wanted
    if isinstance(actual, Exception):
        for word in words:
            assert (here.type if word == HERE else word) in str(actual)
    elif isinstance(actual, str):
        assert actual == wanted
    else:
        torch.testing.assert_close(actual, wanted, equal_nan=True, check_device=False)


def outcome(
    library: ModuleType, kind: str, call: Callable[[Make], Any], device: torch.device
) -> Any:
    """What the call gives, or the exception it raises, with all that it makes on that device."""
    torch.manual_seed(0)
    elsewhere = device != torch.get_default_device()
    with torch.device(device) if elsewhere else nullcontext():
        try:
            return call(maker(library, kind))
        except Exception as error:
            return error


def alike(actual: Any, wanted: Any) -> bool:
    """Both are results, or the exception is of the type that is wanted."""
    if isinstance(wanted, Exception):
        return isinstance(actual, type(wanted))
    return not isinstance(actual, Exception)


def x(*shape: int, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(shape or (T, N, I), generator=generator, device="cpu")
    return value.to(**({"device": torch.get_default_device()} | options))


def both(state: Tensor, kind: str) -> Any:
    return (state, state.clone()) if kind.startswith("LSTM") else state


def zeros(kind: str, *shape: int, **options: Any) -> Any:
    return both(torch.zeros(shape, **options), kind)


def packed(*sizes: int, data: Tensor | None = None, **indices: Any) -> PackedSequence:
    """A PackedSequence put together by hand."""
    return PackedSequence(x(sum(sizes), I) if data is None else data, on_cpu(sizes), **indices)


def on_cpu(values: Sequence[Any]) -> Tensor:
    """Batch sizes, which are on the CPU whatever the data are on."""
    return torch.tensor(values, device="cpu")


# Put together against the rules; torch.nn reads what it likes, some of it out of bounds.
BROKEN: dict[str, Callable[[], PackedSequence]] = {
    "too-many-rows": lambda: packed(2, 2, 2, data=x(5, I)),
    "increasing": lambda: packed(1, 2, 3),
    "increasing-later": lambda: packed(3, 1, 2),
    "negative": lambda: packed(6, 1, -1),
    "huge-and-negative": lambda: packed(2**40, -(2**40), data=x(6, I)),
    "overflowing": lambda: packed(2**62, 2**62, 2**62, 2**62, data=x(6, I)),
    "more-than-there-is": lambda: packed(2**40, data=x(6, I)),
    "float-sizes": lambda: PackedSequence(x(6, I), on_cpu([3.0, 3.0])),
    "2D-sizes": lambda: PackedSequence(x(6, I), on_cpu([[3, 3]])),
}
BROKEN_INDICES = ([0, 1, -7], [0, 0, 0, 0, 0, 9], [2**40, 0, 1], [0, 1])


def with_indices(indices: Sequence[int]) -> PackedSequence:
    """Two steps of three rows, in an order of their own."""
    return packed(3, 3, sorted_indices=torch.tensor(indices), unsorted_indices=torch.arange(3))
