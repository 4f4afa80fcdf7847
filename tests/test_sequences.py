"""Sequences of different lengths: PackedSequence, `lengths`, and episodes by `reset`."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from support import (
    DTYPES,
    FORMS,
    LAYERS,
    Call,
    Leaves,
    build,
    build_form,
    check,
    evaluate,
    flatten,
    initial_states,
    leaves_for,
    on_threads,
    pack_rows,
    pair,
    plain,
    states_of,
    weighted_sum,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "bidirectional": {"bidirectional": True},
    "stacked": {"bidirectional": True, "num_layers": 2},
    "batch-first": {"batch_first": True, "bidirectional": True},
}

T, N, I, H = 6, 5, 4, 7

LENGTHS: dict[str, list[int]] = {
    "descending": [6, 4, 3, 3, 1],
    "mixed": [2, 6, 1, 5, 3],
    "one-long": [1, 1, 6, 1, 1],
    "all-equal": [6, 6, 6, 6, 6],
    "all-short": [4, 2, 4, 1, 3],
    "all-one": [1, 1, 1, 1, 1],
}
WITH_EMPTY = LENGTHS | {
    "some-empty": [0, 6, 3, 0, 2],
    "last-empty": [6, 5, 4, 3, 0],
    "one-row-left": [0, 0, 0, 0, 5],
    "all-empty": [0, 0, 0, 0, 0],
}


def packing(lengths: list[int], *, enforce_sorted: bool, hx: bool = True) -> Call:
    def call(module: nn.Module, leaves: Leaves) -> Any:
        packed = pack_padded_sequence(
            leaves["x"],
            lengths,
            batch_first=module.batch_first,
            enforce_sorted=enforce_sorted,
        )
        return module(packed, states_of(leaves) if hx else None)

    return call


@pytest.mark.kernel
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_lengths(form: str, lengths: str, dtype: torch.dtype, hx: bool) -> None:
    module = build_form(form, I, H, dtype=dtype, bidirectional=True)
    rows = LENGTHS[lengths]
    for enforce_sorted in {False, rows == sorted(rows, reverse=True)}:
        call = packing(rows, enforce_sorted=enforce_sorted, hx=hx)
        check(module, leaves_for(module, T, N, hx=hx), call)


@pytest.mark.kernel
@pytest.mark.parametrize("lengths", ["descending", "mixed"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_packed_settings(form: str, settings: str, lengths: str) -> None:
    module = build_form(form, I, H, **SETTINGS[settings])
    call = packing(LENGTHS[lengths], enforce_sorted=lengths == "descending")
    check(module, leaves_for(module, T, N), call)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_packed_against_rows_alone(form: str) -> None:
    """The packed result is what each row alone gives: torch.nn's own packed path is not the judge
    here.
    """
    module = build_form(form, I, H, bidirectional=True, num_layers=2)
    lengths = LENGTHS["mixed"]

    def ours(m: nn.Module, leaves: Leaves) -> Any:
        y, states = packing(lengths, enforce_sorted=False)(m, leaves)
        return pad_packed_sequence(y)[0], states

    def alone(m: nn.Module, leaves: Leaves) -> Any:
        return oracle.run(m, leaves["x"], states_of(leaves), torch.tensor(lengths))

    check(module, leaves_for(module, T, N), ours, oracle_call=alone)


@pytest.mark.parametrize("sorted_rows", [True, False], ids=["sorted", "unsorted"])
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_output_is_torchs(kind: str, sorted_rows: bool) -> None:
    """A PackedSequence comes back, with the batch sizes and the indices of the one that went in."""
    module = build(kind, I, H)
    rows = [torch.randn(length, I) for length in sorted(LENGTHS["mixed"], reverse=sorted_rows)]
    packed = pack_rows(rows, enforce_sorted=sorted_rows)
    output, _ = module(packed)
    assert type(output) is PackedSequence
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    for name in ("sorted_indices", "unsorted_indices"):
        given, returned = getattr(packed, name), getattr(output, name)
        assert returned is given or torch.equal(returned, given)


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_without_indices_of_the_order(kind: str) -> None:
    """A PackedSequence made by hand from data and batch sizes."""
    module = build(kind, I, H)
    leaves = {"x": torch.randn(6, I)} | initial_states(module, 3)
    sizes = torch.tensor([3, 2, 1], device="cpu")
    check(module, leaves, lambda m, own: m(PackedSequence(own["x"], sizes), states_of(own)))


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_packed_data_that_is_a_view(form: str) -> None:
    module = build_form(form, I, H)
    leaves = {"x": torch.randn(2 * I, 12)} | initial_states(module, 3)
    sizes = torch.tensor([3, 2, 1], device="cpu")
    check(
        module,
        leaves,
        lambda m, own: m(PackedSequence(own["x"].t()[::2, ::2], sizes), states_of(own)),
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_packed_dropout(kind: str) -> None:
    module = build(kind, I, H, num_layers=2, dropout=1.0).train()
    check(module, leaves_for(module, T, N), packing(LENGTHS["mixed"], enforce_sorted=False))


def with_lengths(rows: list[int]) -> tuple[Call, Call]:
    """The call with `lengths` for ours, and for the oracle."""
    lengths = torch.tensor(rows, dtype=torch.int64)
    return (
        lambda m, own: m(own["x"], states_of(own), lengths=lengths),
        lambda m, own: oracle.run(m, own["x"], states_of(own), lengths),
    )


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", WITH_EMPTY)
@pytest.mark.parametrize("form", FORMS)
def test_lengths(form: str, lengths: str, dtype: torch.dtype) -> None:
    module = build_form(form, I, H, dtype=dtype, bidirectional=True)
    ours, theirs = with_lengths(WITH_EMPTY[lengths])
    check(module, leaves_for(module, T, N), ours, oracle_call=theirs)


@pytest.mark.kernel
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("lengths", ["mixed", "some-empty"])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_lengths_settings(form: str, settings: str, lengths: str, hx: bool) -> None:
    module = build_form(form, I, H, **SETTINGS[settings])
    ours, theirs = with_lengths(WITH_EMPTY[lengths])
    check(module, leaves_for(module, T, N, hx=hx), ours, oracle_call=theirs)


@pytest.mark.kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_lengths_of_many_rows(form: str, threads: int) -> None:
    module = build_form(form, I, 33, bidirectional=True)
    ours, theirs = with_lengths(torch.randint(0, 10, (37,)).tolist())
    check(
        module,
        leaves_for(module, 9, 37),
        on_threads(ours, threads),
        oracle_call=on_threads(theirs, 1),
    )


@pytest.mark.kernel
@pytest.mark.parametrize("length", [0, 1, 4, 6])
@pytest.mark.parametrize("dims", [0, 1])
@pytest.mark.parametrize("form", FORMS)
def test_lengths_unbatched(form: str, dims: int, length: int) -> None:
    module = build_form(form, I, H, bidirectional=True)
    lengths = torch.tensor(length if dims == 0 else [length])
    check(
        module,
        leaves_for(module, T, None),
        lambda m, own: m(own["x"], states_of(own), lengths=lengths),
        oracle_call=lambda m, own: oracle.run(m, own["x"], states_of(own), lengths),
    )


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_past_the_end_is_never_read(form: str, settings: str) -> None:
    """Outputs past the end are zero, and NaN there reaches neither outputs nor gradients."""
    module = build_form(form, I, H, **SETTINGS[settings])
    rows = WITH_EMPTY["some-empty"]
    past = torch.arange(T).unsqueeze(1) >= torch.tensor(rows)
    past = past.t() if module.batch_first else past
    leaves = leaves_for(module, T, N)
    ours, _ = with_lengths(rows)
    clean = evaluate(module, leaves, ours)
    dirty = evaluate(
        module, leaves | {"x": leaves["x"].masked_fill(past.unsqueeze(2), float("nan"))}, ours
    )
    assert clean.keys() == dirty.keys()
    for name in clean:
        assert torch.equal(dirty[name], clean[name])
    assert not clean["out.0"][past].any()
    assert not clean["dx"][past].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_an_empty_row_keeps_its_states(kind: str) -> None:
    module = build(kind, I, H, num_layers=2, bidirectional=True)
    leaves = leaves_for(module, T, N)
    _, states = module(leaves["x"], states_of(leaves), lengths=torch.tensor([3, 0, 6, 0, 1]))
    for given, end in zip(
        [leaves[name] for name in leaves if name != "x"],
        [states] if isinstance(states, Tensor) else states,
        strict=True,
    ):
        assert torch.equal(end[:, [1, 3]], given[:, [1, 3]])
        assert not torch.equal(end[:, 0], given[:, 0])


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_of_everything_change_nothing(kind: str) -> None:
    module = build(kind, I, H, bidirectional=True)
    ours, _ = with_lengths([T] * N)
    check(module, leaves_for(module, T, N), ours, oracle_call=plain)


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_and_packing_agree(kind: str) -> None:
    module = build(kind, I, H, bidirectional=True, num_layers=2)
    rows = LENGTHS["mixed"]
    ours, _ = with_lengths(rows)

    def packed(m: nn.Module, leaves: Leaves) -> Any:
        y, states = packing(rows, enforce_sorted=False)(m, leaves)
        return pad_packed_sequence(y, total_length=T)[0], states

    check(module, leaves_for(module, T, N), ours, oracle_call=packed)


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_that_are_a_view(kind: str) -> None:
    module = build(kind, I, H)
    every_other = torch.tensor([2, -9, 6, -9, 1, -9, 5, -9, 3])[::2]
    same = torch.tensor(3).expand(N)
    for lengths in (every_other, same):
        check(
            module,
            leaves_for(module, T, N),
            lambda m, own, lengths=lengths: m(own["x"], states_of(own), lengths=lengths),
            oracle_call=lambda m, own, lengths=lengths: oracle.run(
                m, own["x"], states_of(own), lengths
            ),
        )


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_without_rows(kind: str) -> None:
    module = build(kind, I, H)
    y, _ = module(torch.randn(T, 0, I), lengths=torch.empty(0, dtype=torch.int64))
    assert y.shape == (T, 0, H)
    y, _ = module(torch.randn(T, 0, I), reset=torch.empty(T, 0, dtype=torch.bool))
    assert y.shape == (T, 0, H)


@pytest.mark.parametrize("kind", LAYERS)
def test_lengths_with_dropout(kind: str) -> None:
    module = build(kind, I, H, num_layers=2, dropout=1.0).train()
    ours, theirs = with_lengths(LENGTHS["mixed"])
    check(module, leaves_for(module, T, N), ours, oracle_call=theirs)


def episodes(name: str) -> Tensor:
    """[T, N] masks: true where an episode begins."""
    reset = torch.zeros(T, N, dtype=torch.bool)
    if name == "everywhere":
        reset[:] = True
    elif name == "first-step":
        reset[0] = True
    elif name == "first-step-of-some":
        reset[0, ::2] = True
    elif name == "last-step":
        reset[-1] = True
    elif name == "one-row":
        reset[2, 3] = True
    elif name == "random":
        reset = torch.rand(T, N, generator=torch.Generator().manual_seed(4)) < 0.4
    else:
        assert name == "none"
    return reset


EPISODES = (
    "none",
    "everywhere",
    "first-step",
    "first-step-of-some",
    "last-step",
    "one-row",
    "random",
)


def with_reset(reset: Tensor, rows: list[int] | None = None) -> tuple[Call, Call]:
    lengths = None if rows is None else torch.tensor(rows)

    def of(module: nn.Module) -> Tensor:
        return reset.t() if module.batch_first and reset.dim() == 2 else reset

    return (
        lambda m, own: m(own["x"], states_of(own), lengths=lengths, reset=of(m)),
        lambda m, own: oracle.run(m, own["x"], states_of(own), lengths, of(m)),
    )


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EPISODES)
@pytest.mark.parametrize("form", FORMS)
def test_reset(form: str, name: str, dtype: torch.dtype) -> None:
    module = build_form(form, I, H, dtype=dtype, bidirectional=True)
    ours, theirs = with_reset(episodes(name))
    check(module, leaves_for(module, T, N), ours, oracle_call=theirs)


@pytest.mark.kernel
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("rows", ["mixed", "some-empty", None])
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_reset_settings(form: str, settings: str, rows: str | None, hx: bool) -> None:
    """Also with `lengths`: episodes of rows that end early."""
    module = build_form(form, I, H, **SETTINGS[settings])
    ours, theirs = with_reset(episodes("random"), None if rows is None else WITH_EMPTY[rows])
    check(module, leaves_for(module, T, N, hx=hx), ours, oracle_call=theirs)


@pytest.mark.kernel
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_reset_unbatched(form: str, settings: str) -> None:
    module = build_form(form, I, H, **SETTINGS[settings])
    ours, theirs = with_reset(torch.tensor([False, False, True, True, False, True]))
    check(module, leaves_for(module, T, None), ours, oracle_call=theirs)


@pytest.mark.kernel
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_reset_of_many_rows(form: str, threads: int) -> None:
    module = build_form(form, I, 33, bidirectional=True)
    ours, theirs = with_reset(torch.rand(9, 37) < 0.2, torch.randint(0, 10, (37,)).tolist())
    check(
        module,
        leaves_for(module, 9, 37),
        on_threads(ours, threads),
        oracle_call=on_threads(theirs, 1),
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_that_is_a_view(kind: str) -> None:
    module = build(kind, I, H, bidirectional=True)
    begins = torch.rand(2 * T, 2 * N) < 0.4
    for reset in (begins[::2, ::2], begins.t()[:T, :N], begins[:T, :1].expand(T, N)):
        ours, theirs = with_reset(reset)
        check(module, leaves_for(module, T, N), ours, oracle_call=theirs)


@pytest.mark.parametrize("kind", LAYERS)
def test_reset_forgets_nan(kind: str) -> None:
    """The state is set to zero, not multiplied by it; in the reverse direction nothing passes back
    over the cut.
    """
    module = build(kind, I, H, num_layers=2, bidirectional=True)
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[2], reset[4] = True, True
    x = torch.randn(T, N, I)
    x[0] = x[5] = float("nan")
    x.requires_grad_()
    y, _ = module(x, reset=reset)
    assert y[2:4].isfinite().all()
    assert y[:2].isnan().any(-1).all()
    assert y[4:].isnan().any(-1).all()
    (gradient,) = torch.autograd.grad(y[2:4].sum(), x)
    assert gradient[2:4].isfinite().all()
    assert gradient[2:4].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_stop_at_a_reset(kind: str) -> None:
    module = build(kind, I, H, bidirectional=True)
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[3] = True
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_for(module, T, N).items()}
    y, _ = module(leaves["x"], states_of(leaves), reset=reset)
    dx, dh = torch.autograd.grad(y[3:].sum(), [leaves["x"], leaves["h0"]])
    assert not dx[:3].any()
    assert dx[3:].any(-1).all()
    assert not dh[0].any()  # the forward direction's state entered before the cut
    assert dh[1].any()


@pytest.mark.parametrize("kind", LAYERS)
def test_without_gradients(kind: str) -> None:
    """The path that saves nothing for backward."""
    module = build(kind, I, H, bidirectional=True, num_layers=2)
    leaves = leaves_for(module, T, N)
    rows = LENGTHS["mixed"]
    packed = packing(rows, enforce_sorted=False)
    for ours, theirs in [
        (packed, packed),
        with_lengths(rows),
        with_reset(episodes("random"), rows),
    ]:
        check(module, leaves, ours, oracle_call=theirs, backward=False)


@pytest.mark.parametrize("kind", LAYERS)
def test_arguments_edited_before_backward(kind: str) -> None:
    """Buffers of `lengths` and `reset` that are refilled for the next batch: right gradients, or
    torch's error.
    """
    module = build(kind, I, H, bidirectional=True)
    leaves = leaves_for(module, T, N)
    lengths, reset = torch.tensor(LENGTHS["mixed"]), episodes("random")
    expected = evaluate(module, leaves, with_reset(reset.clone(), lengths.tolist())[0])
    own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    outputs = flatten(module(own["x"], states_of(own), lengths=lengths, reset=reset))
    loss = weighted_sum(outputs)
    lengths.fill_(1)
    reset.fill_(True)
    try:
        gradients = torch.autograd.grad(loss, list(own.values()))
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return
    for name, gradient in zip(own, gradients, strict=True):
        torch.testing.assert_close(gradient, expected[f"d{name}"])


@pytest.mark.parametrize("kind", LAYERS)
def test_the_default_device_does_not_matter(kind: str) -> None:
    """Tensors that rnnkern makes for itself are where they must be, whatever the default device
    is.
    """
    module = build(kind, I, H, bidirectional=True)
    leaves = leaves_for(module, T, N)
    lengths, reset = torch.tensor(LENGTHS["mixed"]), episodes("random")
    packed = pack_padded_sequence(leaves["x"], lengths.tolist(), enforce_sorted=False)
    calls: list[Call] = [
        plain,
        lambda m, own: m(packed, states_of(own)),
        lambda m, own: m(own["x"], states_of(own), lengths=lengths, reset=reset),
    ]
    for call in calls:
        expected = evaluate(module, leaves, call, backward=False)
        with torch.device("meta"):
            actual = flatten(call(module, leaves))
        for name in expected:
            assert torch.equal(actual[name], expected[name])


def test_packed_sizes_edited_before_backward() -> None:
    gradients = []
    for module in pair("LSTM", 3, 4):
        torch.manual_seed(0)
        packed = pack_rows([torch.randn(n, 3) for n in (4, 3, 1)])
        y, _ = module(packed)
        packed.batch_sizes.copy_(torch.tensor([2, 2, 2, 2]))
        y.data.square().sum().backward()
        gradients.append(module.weight_hh_l0.grad)
    torch.testing.assert_close(*gradients)
