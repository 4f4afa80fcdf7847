"""Expressions of one unit in one time step, and the functions that a cell may call.

Each function works on expressions, while a cell is traced, and on tensors, when the very same cell
is the reference. Equal expressions of a `Graph` are one and the same object.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor


class CellError(ValueError):
    """A function that is no cell: what is wrong with it, and in which line."""


class Expression:
    """A number of one unit that is not known while a cell is traced.

    Attributes:
        op: ``"leaf"``, ``"constant"``, an operator, or one of the functions below.
        args: what it is computed from.
        value: the name of a leaf, the number of a constant, else None.
        index: its place in the graph. Arguments come before what is computed from them.
    """

    __slots__ = ("args", "graph", "index", "op", "value")
    __hash__ = object.__hash__

    def __init__(self, graph: Graph, op: str, args: tuple[Expression, ...], value: Any) -> None:
        self.graph, self.op, self.args, self.value = graph, op, args, value
        self.index = len(graph.nodes)

    def __repr__(self) -> str:
        if self.op in ("leaf", "constant"):
            return str.__str__(self.value) if self.op == "leaf" else repr(self.value)
        return f"{self.op}({', '.join(map(repr, self.args))})"

    @property
    def is_condition(self) -> bool:
        return self.op in ("lt", "le", "eq", "and", "or")

    def __add__(self, other: Any) -> Any:
        return self.graph.make("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return self.graph.make("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return self.graph.make("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return self.graph.make("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return self.graph.make("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return self.graph.make("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return self.graph.make("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return self.graph.make("div", other, self)

    def __neg__(self) -> Any:
        return self.graph.make("neg", self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self.graph.make("abs", self)

    def __lt__(self, other: Any) -> Any:
        return self.graph.make("lt", self, other)

    def __le__(self, other: Any) -> Any:
        return self.graph.make("le", self, other)

    def __gt__(self, other: Any) -> Any:
        return self.graph.make("lt", other, self)

    def __ge__(self, other: Any) -> Any:
        return self.graph.make("le", other, self)

    def __eq__(self, other: Any) -> Any:
        return self.graph.make("eq", self, other)

    def __and__(self, other: Any) -> Any:
        return self.graph.make("and", self, other)

    def __or__(self, other: Any) -> Any:
        return self.graph.make("or", self, other)

    # What cannot be traced

    def __bool__(self) -> bool:
        raise CellError(
            "a branch depends on a value, which is not known yet: use rnnkern.where, "
            "rnnkern.maximum or rnnkern.minimum"
        )

    def _no_number(self, *_: Any) -> Any:
        raise CellError("a value is not known yet, and cannot become a number")

    __float__ = __int__ = __index__ = __complex__ = __round__ = _no_number

    def _no_text(self, *_: Any) -> Any:
        raise CellError("a value is not known yet, and cannot be printed or written")

    __str__ = __format__ = _no_text

    def _not_of_a_unit(self, *_: Any, **__: Any) -> Any:
        raise CellError(
            "a cell computes one unit: it has no axes, and cannot be indexed or looped over"
        )

    __len__ = __iter__ = __getitem__ = __matmul__ = __rmatmul__ = _not_of_a_unit

    def __ne__(self, other: Any) -> Any:
        raise CellError("a cell has no !=: use rnnkern.where with ==")

    def __pow__(self, other: Any) -> Any:
        raise CellError("a cell has no **: write the product")

    __rpow__ = __pow__

    def __array_ufunc__(self, ufunc: Any, *_: Any, **__: Any) -> Any:
        raise CellError(
            f"numpy.{ufunc.__name__} is not known in a cell, and numpy's numbers are not: float() "
            f"makes Python's of them; {KNOWN}"
        )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise CellError(f".{name} is not known in a cell; {KNOWN}")

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        own = _OF_TORCH.get(function)
        if own is None or kwargs:
            name = getattr(function, "__name__", str(function))
            raise CellError(f"torch.{name} is not known in a cell; {KNOWN}")
        return own(*args)


class Graph:
    """Expressions, each of which is there once."""

    def __init__(self) -> None:
        self.nodes: list[Expression] = []
        self._made: dict[Any, Expression] = {}

    def leaf(self, name: str) -> Expression:
        return self._node("leaf", (), name)

    def constant(self, value: float) -> Expression:
        return self._node("constant", (), float(value))

    def make(self, op: str, *args: Any) -> Any:
        """The expression, simplified where that changes no bit."""
        given = [self._expression(op, arg) for arg in args]
        for arg, wants in zip(given, _conditions_of(op), strict=False):
            if arg.is_condition != wants:
                raise CellError(f"{op} wants a {'comparison' if wants else 'number'}, got {arg!r}")
        if op == "add":
            given = self._with_sums_first(given)
        simple = _simplified(op, given)
        return simple if simple is not None else self._node(op, tuple(given), None)

    def _node(self, op: str, args: tuple[Expression, ...], value: Any) -> Expression:
        # -0.0 and 0.0 are equal, and NaN is not; their texts are what is meant.
        key = (op, *(arg.index for arg in args), repr(value))
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = Expression(self, op, args, value)
            self.nodes.append(found)
        return found

    def _expression(self, op: str, arg: Any) -> Expression:
        if isinstance(arg, Expression):
            if arg.graph is not self:
                raise CellError("a value of another cell, or of an earlier call, is used")
            return arg
        if isinstance(arg, (int, float)):
            return self.constant(arg)
        raise CellError(
            f"{op} wants expressions and Python numbers, got {type(arg).__name__}: float() makes "
            "such a number of another, and what a cell learns is a parameter of its own, "
            "parameters=(...)"
        )

    def _with_sums_first(self, terms: list[Expression]) -> list[Expression]:
        """x.g and h.g of one gate side by side, because their sum is what the products compute."""
        flat: list[Expression] = []
        todo = list(reversed(terms))
        while todo:
            term = todo.pop()
            if term.op == "add" and not is_sum_of_gate(term):
                todo += reversed(term.args)
            else:
                flat.append(term)
        places = {term.value: i for i, term in enumerate(flat) if term.op == "leaf"}
        for name, i in places.items():
            if name.startswith("x.") and f"h.{name[2:]}" in places:
                j = places[f"h.{name[2:]}"]
                rest = [term for k, term in enumerate(flat) if k not in (i, j)]
                first = self._node("add", (flat[i], flat[j]), None)
                if not rest:
                    return [flat[i], flat[j]]
                return [
                    functools.reduce(lambda a, b: self.make("add", a, b), rest[:-1], first),
                    rest[-1],
                ]
        return terms


def is_sum_of_gate(node: Expression) -> bool:
    """x.g + h.g"""
    if node.op != "add" or any(arg.op != "leaf" for arg in node.args):
        return False
    a, b = (arg.value for arg in node.args)
    return bool({a[:2], b[:2]} == {"x.", "h."} and a[2:] == b[2:])


def _conditions_of(op: str) -> tuple[bool, ...]:
    """Which arguments are comparisons."""
    return {"where": (True, False, False), "and": (True, True), "or": (True, True)}.get(
        op, (False, False)
    )


def _simplified(op: str, args: Sequence[Expression]) -> Expression | None:
    graph = args[0].graph
    values = [arg.value if arg.op == "constant" else None for arg in args]
    if op in _ARITHMETIC and all(value is not None for value in values):
        try:
            return graph.constant(_ARITHMETIC[op](*values))
        except (ZeroDivisionError, OverflowError) as error:
            raise CellError(f"a constant cannot be computed: {error}") from None
    if op == "neg" and args[0].op == "neg":
        return args[0].args[0]
    if op == "mul" and 1.0 in values:
        return args[1 - values.index(1.0)]
    if op == "div" and values[1] == 1.0:
        return args[0]
    if op == "mul" and -1.0 in values:
        return graph.make("neg", args[1 - values.index(-1.0)])  # type: ignore[no-any-return]
    return None


_ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
}


def _graph_of(args: Iterable[Any]) -> Graph | None:
    return next((arg.graph for arg in args if isinstance(arg, Expression)), None)


def _function(op: str, names: str, of_tensors: Callable[..., Tensor], doc: str) -> Any:
    """A function of expressions, tensors and numbers, whose arguments have these names."""
    given = names.split()

    def function(*args: Any) -> Any:
        if len(args) != len(given):
            raise TypeError(
                f"rnnkern.{function.__name__}({', '.join(given)}) takes {len(given)} arguments, "
                f"got {len(args)}"
            )
        graph = _graph_of(args)
        if graph is not None:
            return graph.make(op, *args)
        tensors = [arg for arg in args if isinstance(arg, Tensor)]
        # Numbers beside a condition alone are of the default dtype.
        like = next((arg for arg in tensors if arg.dtype != torch.bool), None)
        if like is None and tensors:
            like = torch.empty((), device=tensors[0].device)
        if like is None:
            wide = [
                torch.tensor(arg, dtype=None if isinstance(arg, bool) else torch.float64)
                for arg in args
            ]
            return of_tensors(*wide).item()
        # Numbers as torch's operators take them beside a tensor: they change no dtype.
        return of_tensors(
            *(arg if isinstance(arg, (Tensor, bool)) else like.new_tensor(arg) for arg in args)
        )

    function.__name__ = function.__qualname__ = {"max": "maximum", "min": "minimum"}.get(op, op)
    function.__doc__ = doc
    function.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(name, inspect.Parameter.POSITIONAL_ONLY) for name in given]
    )
    return function


sigmoid = _function("sigmoid", "x", torch.sigmoid, "1 / (1 + exp(-x))")
tanh = _function("tanh", "x", torch.tanh, "The hyperbolic tangent.")
relu = _function("relu", "x", torch.relu, "max(x, 0). Its derivative at 0 is 0.")
exp = _function("exp", "x", torch.exp, "e to the power of x.")
log = _function("log", "x", torch.log, "The natural logarithm.")
rsqrt = _function("rsqrt", "x", torch.rsqrt, "1 / sqrt(x)")
softplus = _function(
    "softplus", "x", lambda x: torch.logaddexp(x, torch.zeros_like(x)), "log(1 + exp(x))"
)
# torch's hardsigmoid has no second derivative.
hard_sigmoid = _function(
    "hard_sigmoid",
    "x",
    lambda x: torch.where(x.abs() >= 3, (x > 0).to(x.dtype), x / 6 + 0.5),  # NaN stays NaN
    "x / 6 + 1 / 2, at least 0 and at most 1. Its derivative at -3 and 3 is 0.",
)
maximum = _function("max", "a b", torch.maximum, "The larger one. Equal ones share the gradient.")
minimum = _function("min", "a b", torch.minimum, "The smaller one. Equal ones share the gradient.")
where = _function("where", "condition a b", torch.where, "a where the condition holds, else b.")

FUNCTIONS = ("sigmoid", "tanh", "relu", "exp", "log", "rsqrt", "softplus", "hard_sigmoid",
             "maximum", "minimum", "where")  # fmt: skip
KNOWN = "known are + - * / abs, comparisons, and rnnkern." + ", rnnkern.".join(FUNCTIONS)

_OF_TORCH: dict[Any, Any] = {
    torch.sigmoid: sigmoid,
    torch.tanh: tanh,
    torch.relu: relu,
    torch.exp: exp,
    torch.log: log,
    torch.rsqrt: rsqrt,
    torch.maximum: maximum,
    torch.minimum: minimum,
    torch.where: where,
    torch.abs: abs,
}
