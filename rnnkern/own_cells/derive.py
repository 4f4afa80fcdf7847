"""The derivatives of a cell as expressions, and what its forward pass saves for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rnnkern.own_cells.expression import CellError, Expression, is_sum_of_gate
from rnnkern.own_cells.trace import Traced

MAX_SLOTS = 8

_COSTS = {
    **dict.fromkeys(("exp", "sigmoid", "tanh", "hard_sigmoid"), 12),
    **dict.fromkeys(("log", "softplus"), 20),
    **dict.fromkeys(("div", "rsqrt"), 6),
}
"""Of operations that take longer than an addition."""


class Derived(NamedTuple):
    """All that a cell computes, as expressions. Leaves are named as in `trace`, and ``d.NAME`` is
    the gradient of a state.

    Attributes:
        slots: the leaf or the sum of two leaves that each slot holds before the cell runs.
        split: of the gates in their order, those from here on have two slots.
        states, new: the names of h and the others, and what they become.
        saved: what forward leaves in the slots; none if backward needs h alone.
        gradients: of the slots, in their order, then of the parameters.
        before: gradients of the states before; that of h is None if the cell does not read it.
        reads_h: the cell reads h.
        recurrent: it uses a product with h.
    """

    slots: tuple[Expression, ...]
    split: int
    states: tuple[str, ...]
    new: tuple[Expression, ...]
    saved: tuple[Expression, ...]
    gradients: tuple[Expression, ...]
    before: tuple[Expression | None, ...]
    reads_h: bool
    recurrent: bool


def derive(traced: Traced, name: str, gates: Sequence[str], parameters: Sequence[str]) -> Derived:
    """Everything that the struct of the cell needs.

    Raises:
        CellError: a gate, the state or a parameter is not used; or there are too many slots.
    """
    graph, new = traced.graph, tuple(traced.states.values())
    used = reachable(new)
    leaves = {node.value for node in used if node.op == "leaf"}
    for gate in gates:
        if f"x.{gate}" not in leaves and f"h.{gate}" not in leaves:
            raise CellError(f"the cell {name!r} does not use its gate {gate!r}")
    for parameter in parameters:
        if f"own.{parameter}" not in leaves:
            raise CellError(f"the cell {name!r} does not use its parameter {parameter!r}")
    slots, split = _slots(traced, name, gates, used)
    reads_h = "prev.h" in leaves
    names = tuple(traced.states)
    seeds: dict[int, Expression] = {}
    for state, node in traced.states.items():
        own, others = graph.leaf(f"d.{state}"), seeds.get(node.index)
        seeds[node.index] = own if others is None else others + own
    own_leaves = [graph.leaf(f"own.{parameter}") for parameter in parameters]
    adjoints = _adjoints(new, seeds, stop=slots)

    def adjoint(leaf: Expression) -> Expression:
        found = adjoints.get(leaf.index)
        return graph.constant(0.0) if found is None else found

    gradients = tuple(adjoint(leaf) for leaf in (*slots, *own_leaves))
    before = tuple(
        adjoint(graph.leaf(f"prev.{state}")) if state != names[0] or reads_h else None
        for state in names
    )
    wanted = [*gradients, *(z for z in before if z is not None)]
    given = [*slots, *own_leaves]
    given += [graph.leaf(f"prev.{state}") for state in names if state != names[0] or reads_h]
    saved = _choose_saved(wanted, new, slots, len(slots) + len(parameters), change_of(given))
    recurrent = any(leaf.startswith("h.") for leaf in leaves)
    return Derived(slots, split, names, new, saved, gradients, before, reads_h, recurrent)


def _slots(
    traced: Traced, name: str, gates: Sequence[str], used: Sequence[Expression]
) -> tuple[tuple[Expression, ...], int]:
    """The slots in the order of `csrc/cells/cell.h`, and the first gate that has two."""
    graph = traced.graph
    if not any(node.op == "leaf" and node.value.startswith("h.") for node in used):
        return tuple(graph.leaf(f"x.{gate}") for gate in gates), len(gates)
    apart: set[str] = set()  # leaves that are used outside of the sum of their gate
    for node in used:
        if not is_sum_of_gate(node):
            apart |= {arg.value for arg in node.args if arg.op == "leaf"}
    apart |= {node.value for node in traced.states.values() if node.op == "leaf"}
    is_split = [f"x.{gate}" in apart or f"h.{gate}" in apart for gate in gates]
    split = is_split.index(True) if True in is_split else len(gates)
    count = 2 * len(gates) - split
    if count > MAX_SLOTS:
        raise CellError(
            f"the cell {name!r} needs {count} numbers for each unit, and at most {MAX_SLOTS} fit: "
            f"from the first gate on whose x and h are used apart ({gates[split]!r}), each gate "
            "counts twice. Put such gates last"
        )
    recurrent = [graph.leaf(f"h.{gate}") for gate in gates[split:]]
    sums = [graph.make("add", graph.leaf(f"x.{g}"), graph.leaf(f"h.{g}")) for g in gates[:split]]
    inputs = [graph.leaf(f"x.{gate}") for gate in gates[split:]]
    return (*recurrent, *sums, *inputs), split


def reachable(outputs: Iterable[Expression], stop: Iterable[Expression] = ()) -> list[Expression]:
    """What the outputs are computed from, each after its arguments; not what ``stop`` is."""
    stops = {node.index for node in stop}
    found: dict[int, Expression] = {}
    todo = list(outputs)
    while todo:
        node = todo.pop()
        if node.index in found:
            continue
        found[node.index] = node
        if node.index not in stops:
            todo += node.args
    return [found[index] for index in sorted(found)]


def _adjoints(
    outputs: Sequence[Expression], seeds: Mapping[int, Expression], stop: Sequence[Expression]
) -> dict[int, Expression]:
    """The gradients of all nodes, if those of some are given."""
    found = dict(seeds)
    stops = {node.index for node in stop}
    for node in reversed(reachable(outputs, stop)):
        gradient = found.get(node.index)
        if gradient is None or node.index in stops:
            continue
        for arg, factor in _pulled(node, gradient):
            if arg.op == "constant":
                continue
            before = found.get(arg.index)
            found[arg.index] = factor if before is None else before + factor
    return found


_Numbers = Callable[[Expression, Expression, Expression], Any]


def _where(condition: Expression, a: Expression | float, b: Expression | float) -> Expression:
    return condition.graph.make("where", condition, a, b)  # type: ignore[no-any-return]


def _of_softplus(g: Expression, x: Expression, y: Expression) -> Any:
    return g * x.graph.make("sigmoid", x)


_OF_ONE: dict[str, _Numbers] = {
    "neg": lambda g, x, y: -g,
    "abs": lambda g, x, y: _where(x < 0.0, -g, _where(x > 0.0, g, 0.0)),
    "exp": lambda g, x, y: g * y,
    "log": lambda g, x, y: g / x,
    "rsqrt": lambda g, x, y: g * -0.5 * (y * y * y),
    "sigmoid": lambda g, x, y: g * y * (1.0 - y),
    "tanh": lambda g, x, y: g * (1.0 - y * y),
    "relu": lambda g, x, y: _where(y <= 0.0, 0.0, g),
    "hard_sigmoid": lambda g, x, y: _where((x <= -3.0) | (x >= 3.0), 0.0, g * (1 / 6)),
    "softplus": _of_softplus,
}
"""What the gradient g of y = f(x) adds to that of x, as torch has it."""

_OF_TWO: dict[str, Callable[..., tuple[Any, Any]]] = {
    "add": lambda g, a, b, y: (g, g),
    "sub": lambda g, a, b, y: (g, -g),
    "mul": lambda g, a, b, y: (g * b, g * a),
    "div": lambda g, a, b, y: (g / b, -(g * y) / b),
    "max": lambda g, a, b, y: _shared(g, a == b, a < b, a > b),
    "min": lambda g, a, b, y: _shared(g, a == b, a > b, a < b),
}
"""The same of y = f(a, b)."""


def _shared(g: Any, equal: Any, not_a: Any, not_b: Any) -> tuple[Expression, Expression]:
    """The gradients of the larger or smaller one. Equal ones share it, and NaN passes."""
    own = _where(equal, g * 0.5, g)
    return _where(not_a, 0.0, own), _where(not_b, 0.0, own)


def _pulled(y: Expression, g: Expression) -> list[tuple[Expression, Expression]]:
    """The arguments of y, and what the gradient g of y adds to theirs."""
    if y.op in _OF_ONE:
        return [(y.args[0], _OF_ONE[y.op](g, y.args[0], y))]
    if y.op in _OF_TWO:
        return list(zip(y.args, _OF_TWO[y.op](g, *y.args, y), strict=True))
    if y.op == "where":
        condition, a, b = y.args
        return [(a, _where(condition, g, 0.0)), (b, _where(condition, 0.0, g))]
    return []


def change_of(nodes: Iterable[Expression]) -> dict[int, Expression]:
    """A leaf for the change of each node."""
    return {node.index: node.graph.leaf(f"tangent.{node.index}") for node in nodes}


def tangents(
    outputs: Sequence[Expression], of: Mapping[int, Expression]
) -> list[Expression | None]:
    """The changes of the outputs, given those of some nodes; None for an output without change."""
    found: dict[int, Expression | None] = dict(of)
    for node in reachable(outputs, [node for node in reachable(outputs) if node.index in of]):
        if node.index not in found:
            found[node.index] = _pushed(node, [found[arg.index] for arg in node.args])
    return [found[output.index] for output in outputs]


def _pushed(y: Expression, changes: Sequence[Expression | None]) -> Expression | None:
    """The change of y, given those of its arguments."""
    if y.is_condition or all(change is None for change in changes):
        return None
    if y.op == "where":
        return _where(y.args[0], *(0.0 if change is None else change for change in changes[1:]))
    # A pulled gradient is a factor times g. So the change of y is that factor times the change of
    # the argument.
    parts = [_pulled(y, change)[i][1] for i, change in enumerate(changes) if change is not None]
    return functools.reduce(lambda a, b: a + b, parts)


def cost(
    outputs: Iterable[Expression], available: Sequence[Expression], missing: Sequence[Expression]
) -> float:
    """The operations that compute the outputs from what is available.

    They are infinite if something that is missing is needed.
    """
    stops = {node.index for node in available}
    absent = {node.index for node in missing} - stops
    needed = [node for node in reachable(outputs, available) if node.index not in stops]
    if any(node.index in absent for node in needed):
        return float("inf")
    return sum(_COSTS.get(node.op, 1) for node in needed if node.op not in ("leaf", "constant"))


def _choose_saved(
    wanted: Sequence[Expression],
    new: Sequence[Expression],
    slots: Sequence[Expression],
    room: int,
    change: Mapping[int, Expression],
) -> tuple[Expression, ...]:
    """The numbers to save, at most ``room``, from which backward takes the fewest operations.

    Backward has the states before the step and c in any case. If it needs nothing else but h,
    nothing is saved. The search begins with the sums that the cell was given, from which everything
    can be recomputed, and replaces or adds one number at a time, as long as the cost falls.

    The tangents of the new states and of these numbers must follow from them too, because second
    derivatives need those. ``change`` is the tangent of what forward is given.
    """
    leaves = [leaf for slot in slots for leaf in (slot.args or (slot,))]
    states = [*new[1:]]

    def suffices(saved: Sequence[Expression], known: Sequence[Expression]) -> bool:
        changes = [z for z in tangents([*new, *saved], change) if z is not None]
        return cost(changes, known, leaves) < float("inf")

    alone = [*states, new[0]]
    if cost(wanted, alone, leaves) < float("inf") and suffices((), alone):
        return ()
    depends = {leaf.index for leaf in leaves}
    for node in reachable(new):
        if any(arg.index in depends for arg in node.args):
            depends.add(node.index)
    primal = {node.index for node in reachable(new)}
    inside = [
        node
        for node in reachable(wanted)
        if node.index in depends and node.index in primal and not node.is_condition
        and node.op != "leaf"
    ]  # fmt: skip
    candidates = list({node.index: node for node in (*slots, *inside)}.values())
    saved = list(slots)
    best = cost(wanted, [*states, *saved], leaves)
    improved = True
    while improved:
        improved = False
        kept = {node.index for node in saved}
        others = [node for node in candidates if node.index not in kept]
        tries = [[*saved[:i], node, *saved[i + 1 :]] for node in others for i in range(len(saved))]
        tries += [[*saved, node] for node in others if len(saved) < room]
        for attempt in tries:
            found = cost(wanted, [*states, *attempt], leaves)
            if found < best and suffices(attempt, [*states, *attempt]):
                best, saved, improved = found, attempt, True
                break
    return tuple(saved)
