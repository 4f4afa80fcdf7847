"""The derivatives of cells as expressions, without a compiler: evaluated on tensors and compared
with torch's, for cells that hypothesis makes up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import rnnkern
from rnnkern import cells
from rnnkern.own_cells import expression
from rnnkern.own_cells.derive import Derived, reachable, tangents
from rnnkern.own_cells.expression import Expression

pytestmark = pytest.mark.cpu_only

GATES, STATES, PARAMETERS = ("a", "b"), ("h", "c", "n"), ("u",)

OPERATORS: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "eq": lambda a, b: a == b,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "max": rnnkern.maximum,
    "min": rnnkern.minimum,
}

# What a made-up cell does with the values that it has so far; defined everywhere.
ONE: list[Callable[[Any], Any]] = [
    lambda a: -a,
    abs,
    rnnkern.sigmoid,
    rnnkern.tanh,
    rnnkern.relu,
    rnnkern.softplus,
    rnnkern.hard_sigmoid,
    lambda a: rnnkern.exp(-abs(a)),
    lambda a: rnnkern.log(1 + a * a),
    lambda a: rnnkern.rsqrt(1 + a * a),
    lambda a: 1.5 - a,
]
TWO: list[Callable[[Any, Any], Any]] = [
    lambda a, b: a + b,
    lambda a, b: a - b,
    lambda a, b: a * b,
    lambda a, b: a / (1 + b * b),
    rnnkern.maximum,
    rnnkern.minimum,
    lambda a, b: rnnkern.where((a > b) | (a <= -1.0), a, 0.5 * b),
]


def evaluated(outputs: Iterable[Expression], known: Mapping[int, Tensor]) -> list[Tensor]:
    """The values of expressions, if those of some nodes are known."""
    outputs = list(outputs)
    values: dict[int, Any] = dict(known)
    stops = [node for node in reachable(outputs) if node.index in values]
    like = next(iter(known.values()))
    for node in reachable(outputs, stops):
        if node.index in values:
            continue
        assert node.op != "leaf", node.value  # the others are all that there is
        if node.op == "constant":
            values[node.index] = torch.full_like(like, node.value)
        else:
            function = OPERATORS.get(node.op) or getattr(expression, node.op)
            values[node.index] = function(*(values[arg.index] for arg in node.args))
    return [values[node.index] for node in outputs]


def check(derived: Derived, given_values: Mapping[str, Tensor]) -> None:
    """The gradients from what forward saves, and the tangents, are those of torch."""
    graph = derived.new[0].graph
    leaves = {
        node.index: given_values[node.value].clone().requires_grad_()
        for node in graph.nodes
        if node.op == "leaf" and node.value in given_values
    }
    slots = evaluated(derived.slots, leaves)
    slots = [slot.detach().requires_grad_() for slot in slots]
    before = {i: leaf for i, leaf in leaves.items() if graph.nodes[i].value[:2] not in ("x.", "h.")}
    at = before | {node.index: slot for node, slot in zip(derived.slots, slots, strict=True)}
    new = evaluated(derived.new, at)
    incoming = [torch.randn_like(z) for z in new]
    own = [i for i in before if graph.nodes[i].value.startswith("own.")]
    states = [graph.leaf(f"prev.{state}").index for state in derived.states]
    inputs = [*slots, *(before[i] for i in own), *(before[i] for i in states)]
    expected = torch.autograd.grad(
        new, inputs, incoming, allow_unused=True, retain_graph=True, materialize_grads=True
    )

    # Backward knows what is saved, the states before and after, and the parameters.
    known = {i: leaf.detach() for i, leaf in before.items()}
    kept = evaluated(derived.saved, at) if derived.saved else [new[0]]
    nodes = derived.saved or derived.new[:1]
    for node, value in [
        *zip(nodes, kept, strict=True),
        *zip(derived.new[1:], new[1:], strict=True),
    ]:
        known[node.index] = value.detach()
    gradients_of = {
        graph.leaf(f"d.{state}").index: dz
        for state, dz in zip(derived.states, incoming, strict=True)
    }
    wanted = [node for node in (*derived.gradients, *derived.before) if node is not None]
    found = evaluated(wanted, known | gradients_of)
    if derived.before[0] is None:
        of_h = len(expected) - len(states)
        expected = (*expected[:of_h], *expected[of_h + 1 :])
    torch.testing.assert_close(found, list(expected))

    # <incoming, change of new> = <gradients, change of the inputs>
    moves = [torch.randn_like(z) for z in inputs]
    places = [node.index for node in derived.slots] + own + states
    changes = {i: graph.leaf(f"tangent.{i}") for i in places}
    moved = tangents(derived.new, changes)
    values = known | {changes[i].index: move for i, move in zip(places, moves, strict=True)}
    total = sum(
        (evaluated([z], values)[0] * dz).sum()
        for z, dz in zip(moved, incoming, strict=True)
        if z is not None
    )
    own_gradients = torch.autograd.grad(new, inputs, incoming, materialize_grads=True)
    torch.testing.assert_close(
        torch.as_tensor(total, dtype=torch.float64),
        sum(
            ((g * move).sum() for g, move in zip(own_gradients, moves, strict=True)),
            torch.zeros(()),
        ).double(),
    )


def values_for(gates: Any, states: Any, parameters: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    names = [f"{kind}.{gate}" for kind in "xh" for gate in gates]
    names += [f"prev.{state}" for state in states] + [f"own.{name}" for name in parameters]
    return {name: torch.randn(40, dtype=torch.float64, generator=generator) for name in names}


STEPS = st.lists(
    st.tuples(st.integers(0, 99), st.integers(0, 99), st.integers(0, 99)), min_size=3, max_size=14
)


@given(STEPS, st.booleans())
def test_made_up_cells(steps: list[tuple[int, int, int]], split: bool) -> None:
    def made(x: Any, h: Any, prev: Any, own: Any) -> Any:
        values = [x.a + h.a, prev.h, prev.c, own.u, prev.n]
        values += [x.b, h.b] if split else [x.b + h.b]
        for choice, left, right in steps:
            a, b = values[left % len(values)], values[right % len(values)]
            k = choice % (len(ONE) + len(TWO))
            values.append(ONE[k](a) if k < len(ONE) else TWO[k - len(ONE)](a, b))
        h_new = values[-1] + 0.1 * (x.a + h.a) * own.u
        c_new = values[-2] * values[-3] + (x.b - h.b if split else x.b + h.b)
        return h_new, c_new, rnnkern.tanh(values[-1]) - prev.n

    cell = rnnkern.cell(gates=GATES, states=STATES, parameters=PARAMETERS)(made)
    check(cell._derived, values_for(GATES, STATES, PARAMETERS))


@pytest.mark.parametrize("name", cells.__all__)
def test_shipped_cells(name: str) -> None:
    cell = getattr(cells, name)
    given_values = values_for(cell.gates, cell.states, cell.parameters)
    if "prev.n" in given_values:
        given_values["prev.n"] = given_values["prev.n"].abs()
    check(cell._derived, given_values)


def test_what_is_saved() -> None:
    """As the hand-written cells do: the activated gates of an LSTM and a GRU, h of an RNN."""

    def saved(cell: Any) -> list[str]:
        return [node.op for node in cell._derived.saved]

    assert saved(cells.rnn_tanh) == saved(cells.rnn_relu) == []
    assert saved(cells.lstm) == ["sigmoid", "sigmoid", "tanh", "sigmoid"]
    assert saved(cells.gru) == ["leaf", "sigmoid", "sigmoid", "tanh"]
    assert all(len(getattr(cells, n)._derived.saved) <= 8 for n in cells.__all__)
