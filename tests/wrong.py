"""Wrong calls, and their comparison with what torch.nn makes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor, nn

import rnnkern

T, N, I, H = 5, 2, 3, 4

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
    """`call` raises with rnnkern what it raises with torch.nn, or gives the same."""
    torch.manual_seed(0)
    try:
        expected = call(maker(nn, kind))
    except Exception as error:
        with pytest.raises(type(error)) as caught:
            call(maker(rnnkern, kind))
        for word in words:
            assert word in str(caught.value)
        return
    actual = call(maker(rnnkern, kind))
    if isinstance(expected, str):
        assert actual == expected
    else:
        torch.testing.assert_close(actual, expected, equal_nan=True)


def x(*shape: int, **options: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    value = torch.randn(shape or (T, N, I), generator=generator)
    return value.to(**options) if options else value


def both(state: Tensor, kind: str) -> Any:
    return (state, state.clone()) if kind.startswith("LSTM") else state


def zeros(kind: str, *shape: int, **options: Any) -> Any:
    return both(torch.zeros(shape, **options), kind)
