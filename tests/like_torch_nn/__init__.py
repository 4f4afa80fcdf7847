"""A table of small programs, each run on torch.nn and on rnnkern, that must give the same.

A row is a function of a `Side`: it makes modules of that library and returns what it saw, in
tensors, strings, numbers, exceptions, and containers of them.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch
from support import CELLS, DTYPES, LAYERS, flatten
from torch import Tensor, nn

import rnnkern
from rnnkern import tolerance

T, N, I, H = 5, 2, 3, 4

#: Options of a layer that change its text and its names.
FULL = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}


@dataclass(frozen=True)
class Side:
    """One library and one kind of module of it."""

    lib: ModuleType
    kind: str

    @property
    def type(self) -> type[nn.Module]:
        return getattr(self.lib, self.kind)  # type: ignore[no-any-return]

    @property
    def is_layer(self) -> bool:
        return self.kind in LAYERS

    @property
    def weight(self) -> str:
        """The name of the recurrent weight."""
        return "weight_hh_l0" if self.is_layer else "weight_hh"

    def make(self, *sizes: int, of: type[nn.Module] | None = None, **options: Any) -> Any:
        """A module, or one of the subclass `of`, whose weights are those of the other library's."""
        torch.manual_seed(0)
        return (of or self.type)(*(sizes or (I, H)), **options)

    def x(self, *shape: int, **options: Any) -> Tensor:
        """The input: ``[T, N, I]`` for a layer, ``[N, I]`` for a cell."""
        return drawn(1, *(shape or ((T, N, I) if self.is_layer else (N, I))), **options)

    def hx(self, *shape: int, **options: Any) -> Any:
        """A state, a pair of them for LSTM."""
        shape = shape or ((1, N, H) if self.is_layer else (N, H))
        h = drawn(2, *shape, **options)
        return (h, drawn(3, *shape, **options)) if self.kind.startswith("LSTM") else h

    def outcome(self, module: Any, *given: Any) -> list[Any]:
        """Outputs and the gradients of all parameters, of one call."""
        outputs = flatten(module(*(given or (self.x(),))))
        return [outputs, gradients(module, outputs)]


def drawn(seed: int, *shape: int, **options: Any) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(**options)


def first(outputs: Any) -> Tensor:
    """The first tensor of what a module returns."""
    return next(iter(flatten(outputs).values()))


def loss_of(outputs: Any) -> Tensor:
    return sum(output.square().sum() for output in flatten(outputs).values())


def gradients(module: nn.Module, outputs: Mapping[str, Tensor]) -> dict[str, Any]:
    module.zero_grad()
    loss_of(list(outputs.values())).backward()
    return {name: p.grad for name, p in module.named_parameters()}


def each_state(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tuple(change(h) for h in state) if isinstance(state, tuple) else change(state)


def names_of(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def same_objects(module: Any) -> list[bool]:
    """Which of a layer's `_flat_weights` are what its attributes say."""
    return [
        a is getattr(module, b, None)
        for a, b in zip(module._flat_weights, module._flat_weights_names, strict=True)
    ]


def attempt(call: Callable[[], Any]) -> Any:
    """What the call gives, or the exception it raises."""
    try:
        return call()
    except Exception as error:
        return error


def warned(call: Callable[[], Any]) -> tuple[Any, list[tuple[str, str]]]:
    """What the call gives, and the warnings on the way but rnnkern's own."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        result = attempt(call)
    told = [w for w in seen if w.category is not rnnkern.FallbackWarning]
    return result, [(w.category.__name__, plain_text(str(w.message))) for w in told]


def plain_text(text: str) -> str:
    """Without the package that a class is from, the class that `forward` is from, and addresses."""
    text = re.sub(r"rnnkern\.(modules\.)?|torch\.nn\.(modules\.rnn\.)?", "", text)
    return re.sub(r"\w+\.(?=forward\(\))|0x[0-9a-f]+", "", text)


Row: TypeAlias = Callable[[Side], Any]

#: Why a row is known not to be alike, and for which kinds of module.
Difference: TypeAlias = tuple[str, Sequence[str]]


class Table(dict[str, tuple[Row, tuple[str, ...]]]):
    """Rows by name, with the kinds of module that each is for."""

    def row(self, *kinds: str) -> Callable[[Row], Row]:
        """Adds a function; for all layers and cells if no kind is named."""

        def add(function: Row) -> Row:
            self.add({function.__name__: function}, *kinds)
            return function

        return add

    def add(self, rows: Mapping[str, Row], *kinds: str) -> None:
        for name, function in rows.items():
            assert name not in self, f"two rows {name}"
            self[name] = (function, kinds or (*LAYERS, *CELLS))

    def check(self, name: str, differences: Mapping[str, Difference]) -> None:
        """Runs a row for each of its kinds. What is named in `differences` must differ."""
        function, kinds = self[name]
        reason, known = differences.get(name, ("", ()))
        for kind in kinds:
            problem = problem_of(function, kind)
            if problem is not None and kind not in known:
                raise AssertionError(f"{name}: {kind} is not like torch.nn's") from problem
            if problem is None:
                assert kind not in known, (
                    f"{name}: {kind} is like torch.nn's, in spite of: {reason}"
                )


def problem_of(row: Row, kind: str) -> Exception | None:
    try:
        check_alike(row, kind)
    except Exception as error:
        return error
    return None


def check_alike(row: Row, kind: str) -> None:
    results = []
    for lib in (rnnkern, nn):
        torch.manual_seed(0)
        results.append(row(Side(lib, kind)))
    assert_same(*results)


def assert_same(ours: Any, theirs: Any, at: str = "result") -> None:
    if isinstance(theirs, Exception):
        if isinstance(ours, Exception) and type(ours).__name__ == type(theirs).__name__:
            assert plain_text(str(ours)) == plain_text(str(theirs)), at
        elif isinstance(ours, Exception):
            raise AssertionError(f"{at}: torch.nn raises {theirs!r}") from ours
        else:
            raise AssertionError(f"{at}: {ours!r}, torch.nn raises {theirs!r}")
        return
    if isinstance(ours, Exception):
        raise AssertionError(f"{at}: torch.nn gives {theirs!r}") from ours
    assert type(ours) is type(theirs), at
    if isinstance(theirs, Tensor):
        assert_near(ours, theirs, at)
        assert ours.requires_grad == theirs.requires_grad, at
    elif isinstance(theirs, Mapping):
        assert list(ours) == list(theirs), at
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{at}[{key!r}]")
    elif isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), f"{at}: {ours!r}, torch.nn gives {theirs!r}"
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{at}[{i}]")
    elif isinstance(theirs, str):
        assert plain_text(ours) == plain_text(theirs), at
    elif isinstance(theirs, nn.Module):
        raise TypeError(f"{at}: a module is no result")
    else:
        assert ours == theirs, at


def assert_near(ours: Tensor, theirs: Tensor, at: str) -> None:
    """Looks at what was computed, and not at how exactly, which is the matter of other tests."""
    if theirs.dtype not in DTYPES or theirs.layout != torch.strided or theirs.is_meta:
        torch.testing.assert_close(ours, theirs, equal_nan=True, msg=lambda text: f"{at}: {text}")
        return
    assert (ours.dtype, ours.shape, ours.device) == (theirs.dtype, theirs.shape, theirs.device), at
    eps = torch.finfo(theirs.dtype).eps
    with torch.no_grad():
        error = tolerance.error_eps(ours, theirs.double()) * eps
    assert error <= max(2**-13, 8 * eps), f"{at}: {ours}, torch.nn gives {theirs}"


ROWS = Table()
