"""Shapes and options drawn at random, compared with torch.nn and the oracle; and wrong shapes drawn
at random.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import oracle
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support import (
    CELLS,
    LAYERS,
    Call,
    Leaves,
    build,
    check,
    flatten,
    has_smooth_gradient,
    initial_states,
    leaves_for,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])
SEEDS = st.integers(0, 2**32 - 1)


@st.composite
def layers(draw: st.DrawFn) -> nn.RNNBase:
    """A layer of any kind, with any options."""
    kind = draw(st.sampled_from(LAYERS))
    hidden = draw(st.integers(1, 40))
    options: dict[str, Any] = {
        "num_layers": draw(st.integers(1, 3)),
        "bias": draw(st.booleans()),
        "batch_first": draw(st.booleans()),
        "bidirectional": draw(st.booleans()),
    }
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind == "LSTM" and hidden > 1 and draw(st.booleans()):
        options["proj_size"] = draw(st.integers(1, hidden - 1))
    torch.manual_seed(draw(SEEDS))
    torch.set_num_threads(draw(st.sampled_from([1, 1, 1, 2])))
    return build(kind, draw(st.integers(1, 20)), hidden, dtype=draw(DTYPES), **options)


@st.composite
def layouts(draw: st.DrawFn, sizes: tuple[int, ...]) -> tuple[tuple[int, ...], Any]:
    """A shape to own the memory, and a view of it that has `sizes`."""
    order = draw(st.permutations(range(len(sizes))))
    steps = [draw(st.sampled_from([1, 1, 2, 3])) for _ in sizes]
    skips = [draw(st.integers(0, 2)) for _ in sizes]
    expanded = [draw(st.sampled_from([False, False, False, True])) for _ in sizes]
    owned = [
        1 if is_expanded else skip + step * size
        for size, step, skip, is_expanded in zip(sizes, steps, skips, expanded, strict=True)
    ]

    def view(base: Tensor) -> Tensor:
        base = base.permute([order.index(axis) for axis in range(len(sizes))])
        for axis, is_expanded in enumerate(expanded):
            if not is_expanded:
                base = base[(slice(None),) * axis + (slice(skips[axis], None, steps[axis]),)]
        return base.expand(sizes)

    return tuple(owned[axis] for axis in order), view


@pytest.mark.kernel
@given(layers(), st.data())
def test_any_layer(module: nn.RNNBase, data: st.DataObject) -> None:
    T = data.draw(st.integers(1, 6))
    N = data.draw(st.one_of(st.none(), st.integers(1, 9)))
    leaves = leaves_for(module, T, N, hx=data.draw(st.booleans()))
    shape, view = data.draw(layouts(tuple(leaves["x"].shape)))
    # Of an element that the view repeats, the gradient is the mean over its repetitions: their sum
    # may be small though hundreds of terms are not, and then no order of summation is near.
    repeats = max(1.0, leaves["x"].numel() / math.prod(shape))
    leaves["x"] = torch.randn(shape) * repeats
    check(module, leaves, lambda m, own: m(view(own["x"] / repeats), states_of(own)))


@pytest.mark.kernel
@given(layers(), st.data())
def test_any_lengths_and_episodes(module: nn.RNNBase, data: st.DataObject) -> None:
    T, N = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    rows = st.lists(st.integers(0, T), min_size=N, max_size=N)
    drawn = data.draw(st.one_of(st.none(), rows))
    lengths = None if drawn is None else torch.tensor(drawn)
    reset = torch.rand(T, N) < data.draw(st.sampled_from([0.0, 0.2, 0.5, 1.0]))
    mask = None if lengths is not None and data.draw(st.booleans()) else reset
    if mask is not None and module.batch_first:
        mask = mask.t()
    leaves = leaves_for(module, T, N, hx=data.draw(st.booleans()))
    check(
        module,
        leaves,
        lambda m, own: m(own["x"], states_of(own), lengths=lengths, reset=mask),
        oracle_call=lambda m, own: oracle.run(m, own["x"], states_of(own), lengths, mask),
    )


@pytest.mark.kernel
@given(layers(), st.data())
def test_any_packed_sequence(module: nn.RNNBase, data: st.DataObject) -> None:
    T, N = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 7))
    rows = data.draw(st.lists(st.integers(1, T), min_size=N, max_size=N))
    ordered = data.draw(st.booleans())
    rows = sorted(rows, reverse=True) if ordered else rows

    def call(m: nn.Module, own: Leaves) -> Any:
        packed = pack_padded_sequence(
            own["x"], rows, batch_first=m.batch_first, enforce_sorted=ordered
        )
        return m(packed, states_of(own))

    check(module, leaves_for(module, T, N, hx=data.draw(st.booleans())), call)


@pytest.mark.kernel
@given(st.sampled_from(CELLS), st.data())
def test_any_cell(kind: str, data: st.DataObject) -> None:
    torch.manual_seed(data.draw(SEEDS))
    options = {"bias": data.draw(st.booleans())}
    if kind == "RNNCell":
        options["nonlinearity"] = data.draw(st.sampled_from(["tanh", "relu"]))
    sizes = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 40))
    cell = build(kind, *sizes, dtype=data.draw(DTYPES), **options)
    rows = data.draw(st.one_of(st.none(), st.integers(1, 20)))
    leaves = initial_states(cell, rows) if data.draw(st.booleans()) else {}
    leaves["x"] = torch.randn(() if rows is None else (rows,)).unsqueeze(-1) + torch.randn(sizes[0])
    check(cell, leaves)


@given(layers(), st.data())
def test_second_derivatives(module: nn.RNNBase, data: st.DataObject) -> None:
    assume(module.hidden_size < 12)
    assume(has_smooth_gradient(module))
    leaves = leaves_for(module, data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3)))

    def call(m: nn.Module, own: Leaves) -> Any:
        outputs = list(flatten(plain(m, own)).values())
        loss = torch.stack([output.square().sum() for output in outputs]).sum()
        tensors = [*own.values(), *m.parameters()]
        gradients = torch.autograd.grad(loss, tensors, create_graph=True)
        return [*outputs, *gradients]

    check(module, leaves, call)


def outcome(call: Call, module: nn.Module, leaves: Leaves) -> type[Exception] | list[torch.Size]:
    try:
        return [output.shape for output in flatten(call(module, leaves)).values()]
    except Exception as error:
        return type(error)


def alike(actual: type[Exception] | list[torch.Size], expected: Any) -> bool:
    if isinstance(expected, type) and isinstance(actual, type):
        return issubclass(actual, expected)
    return bool(actual == expected)


SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4]), max_size=4).map(tuple)


@given(st.sampled_from([*LAYERS, *CELLS]), SHAPES, SHAPES, SHAPES, st.booleans(), SEEDS)
def test_any_shapes_of_inputs_and_states(
    kind: str,
    x: tuple[int, ...],
    h0: tuple[int, ...],
    c0: tuple[int, ...],
    with_states: bool,
    seed: int,
) -> None:
    """Right or wrong, what comes is what comes from torch.nn: outputs of the same shapes, or the
    same exception. On a GPU, what comes from it there or on the CPU, where it takes some more.
    """
    torch.manual_seed(seed)
    module = build(kind, 3, 4)
    leaves = {"x": torch.randn(x)}
    if with_states:
        leaves["h0"] = torch.randn(h0)
        if "LSTM" in kind:
            leaves["c0"] = torch.randn(c0)
    theirs = oracle.twin(module)
    on_cpu = {name: leaf.cpu() for name, leaf in leaves.items()}
    actual = outcome(plain, module, leaves)
    expected = outcome(plain, copy.deepcopy(theirs).cpu(), on_cpu)
    if leaves["x"].device.type != "cpu" and not alike(actual, expected):
        expected = outcome(plain, theirs, leaves)
    assert alike(actual, expected), (actual, expected)


NUMBERS = st.one_of(st.integers(-3, 8), st.sampled_from([2**31, 2**40, 2**62, -(2**62)]))


@pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")
@given(st.sampled_from(LAYERS), st.lists(NUMBERS, max_size=5), st.integers(0, 8), st.booleans())
def test_any_batch_sizes(kind: str, sizes: list[int], rows: int, states: bool) -> None:
    """A PackedSequence put together at random works if it makes sense. Otherwise it is refused, and
    nothing crashes.
    """
    module = build(kind, 3, 4)
    batch_sizes = torch.tensor(sizes, dtype=torch.int64, device="cpu")
    sequence = PackedSequence(torch.randn(rows, 3), batch_sizes)
    sensible = (
        sum(sizes) == rows
        and sizes == sorted(sizes, reverse=True)
        and all(size > 0 for size in sizes)
        and bool(sizes)
    )
    leaves = initial_states(module, sizes[0]) if states and sensible else {}
    if sensible:
        check(module, leaves, lambda m, own: m(packed_as(m, sequence), states_of(own)))
        return
    try:
        module(sequence)
    except (RuntimeError, ValueError, IndexError):
        return
    # torch.nn takes a few more: empty steps at the end, rows left over, no rows at the start.
    assert sizes == sorted(sizes, reverse=True) or sizes[0] == 0
    assert min(sizes) >= 0
    assert sum(sizes) <= rows


def packed_as(module: nn.Module, sequence: PackedSequence) -> PackedSequence:
    return sequence.to(next(module.parameters()).dtype)


@given(
    st.sampled_from(LAYERS),
    st.lists(st.integers(-2, 7), max_size=4),
    st.lists(st.integers(0, 6), max_size=3),
)
def test_any_lengths_and_reset_arguments(kind: str, rows: list[int], mask_shape: list[int]) -> None:
    """Accepted exactly where the rules of the arguments are kept."""
    T, N = 5, 2
    module = build(kind, 3, 4)
    x = torch.randn(T, N, 3)
    # Values on a GPU are not looked at.
    lengths = torch.tensor(rows, dtype=torch.int64, device="cpu")
    if len(rows) == N and all(0 <= length <= T for length in rows):
        assert module(x, lengths=lengths)[0].shape == (T, N, 4)
    else:
        with pytest.raises((ValueError, TypeError), match="lengths"):
            module(x, lengths=lengths)
    reset = torch.zeros(mask_shape, dtype=torch.bool)
    if tuple(mask_shape) == (T, N):
        assert module(x, reset=reset)[0].shape == (T, N, 4)
    else:
        with pytest.raises((ValueError, TypeError), match="reset"):
            module(x, reset=reset)
