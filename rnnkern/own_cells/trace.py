"""Calls the function of a cell once, on symbols."""

from __future__ import annotations

import inspect
import linecache
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from rnnkern.own_cells.expression import CellError, Expression, Graph

_INSIDE = (str(Path(__file__).parent), str(Path(torch.__file__).parent))


class Traced(NamedTuple):
    """A cell as expressions: its new states, by name."""

    graph: Graph
    states: dict[str, Expression]


class Symbols:
    """One argument of a cell: its attributes are leaves of the graph, or tensors."""

    def __init__(self, name: str, what: str, own: dict[str, Any]) -> None:
        # Not by __dict__.update, which Dynamo of torch 2.10 cannot trace.
        for attribute, value in own.items():
            object.__setattr__(self, attribute, value)
        object.__setattr__(self, "_about", (name, what, tuple(own)))

    def __getattr__(self, attribute: str) -> Any:
        if attribute.startswith("__"):
            raise AttributeError(attribute)
        name, what, own = self.__dict__["_about"]
        there = ", ".join(own) or "none"
        raise CellError(f"{name}.{attribute}: the cell has no {what} {attribute!r}; it has {there}")

    def __setattr__(self, attribute: str, value: Any) -> None:
        raise CellError(f"{self._about[0]}.{attribute} cannot be set: return the new states")


def arguments(
    gates: Sequence[str], states: Sequence[str], parameters: Sequence[str], of: Callable[..., Any]
) -> list[Symbols]:
    """The arguments ``x, h, prev`` of a cell, and ``own`` if it has parameters.

    ``of(kind, i, name)`` is the i-th value of an argument.
    """
    made = []
    for name, what, names in (
        ("x", "gate", gates),
        ("h", "gate", gates),
        ("prev", "state", states),
        ("own", "parameter", parameters),
    ):
        values = {own: of(name, i, own) for i, own in enumerate(names)}
        made.append(Symbols(name, what, values))
    return made if parameters else made[:3]


def trace(
    function: Callable[..., Any],
    name: str,
    gates: Sequence[str],
    states: Sequence[str],
    parameters: Sequence[str],
) -> Traced:
    """The expressions that the function computes.

    Raises:
        CellError: the function does something that cannot be traced, in that line; or what it
            returns are not the new states.
    """
    graph = Graph()
    symbols = arguments(gates, states, parameters, lambda kind, _, own: graph.leaf(f"{kind}.{own}"))
    _expect_arguments(function, name, "(x, h, prev, own)" if parameters else "(x, h, prev)")
    try:
        made = function(*symbols)
    except Exception as error:
        raise CellError(f"{_place(function, error)}in the cell {name!r}: {_text(error)}") from error
    returned = f"{len(made)} values" if isinstance(made, tuple) else f"one {type(made).__name__}"
    if not isinstance(made, tuple):
        made = (made,)
    wanted = ", ".join(states)
    if len(made) != len(states):
        form = " as a tuple" if len(states) > 1 else ""
        raise CellError(
            f"{_start(function)}: the cell {name!r} must return its {len(states)} states "
            f"({wanted}){form}, returned {returned}"
        )
    for state, value in zip(states, made, strict=True):
        if not isinstance(value, Expression) or value.graph is not graph or value.is_condition:
            got = "a comparison" if isinstance(value, Expression) else type(value).__name__
            raise CellError(
                f"{_start(function)}: the cell {name!r} must return numbers that it computes from "
                f"its arguments ({wanted}), got {got} for {state}"
            )
    return Traced(graph, dict(zip(states, made, strict=True)))


def _expect_arguments(function: Callable[..., Any], name: str, wanted: str) -> None:
    """Raises a CellError if the function cannot be called with so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of a callable that does not tell
        return
    try:
        signature.bind(*wanted.split(","))
    except TypeError:
        raise CellError(
            f"{_start(function)}: the cell {name!r} is called with {wanted}, and takes {signature}"
        ) from None


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, CellError) else f"{type(error).__name__}: {error}"


def _place(function: Any, error: Exception) -> str:
    """The innermost line outside of this package and of torch: ``file:line: source``."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(_INSIDE)
    ]
    if not frames:
        return f"{_start(function)}: "
    last = frames[-1]
    line = linecache.getline(last.filename, last.lineno or 0).strip()
    return (
        f"{last.filename}:{last.lineno}: {line!r} " if line else f"{last.filename}:{last.lineno}: "
    )


def _start(function: Any) -> str:
    code = getattr(function, "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
