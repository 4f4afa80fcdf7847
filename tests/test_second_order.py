"""The kernel of second derivatives, against the oracle and against torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from settings import SETTINGS
from support import (
    FORMS,
    WIDE_DTYPES,
    Call,
    Leaves,
    build,
    check,
    evaluate,
    leaves_for,
    on_threads,
    penalized,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnkern import derivatives, kernels

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.kernel,
    pytest.mark.skipif(not kernels.HAS_SECOND_ORDER, reason="the stand-in for GPUs has none"),
]
COVERED = [form for form in FORMS if form != "LSTM-proj"]
# T, N, I, H: less than a vector, whole vectors and a bit, several panels with few rows (units are
# split), with many (rows are split).
SIZES = {
    "tiny": (3, 2, 2, 3),
    "odd": (5, 7, 3, 65),
    "units": (3, 1, 40, 300),
    "rows": (4, 61, 7, 130),
    "one-step": (1, 9, 5, 16),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells for which the kernel runs."""
    made: list[str] = []
    run = kernels.second_order

    def counted(mode: str, *rest: Any, **named: Any) -> Any:
        made.append(mode)
        return run(mode, *rest, **named)

    monkeypatch.setattr(kernels, "second_order", counted)
    return made


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", COVERED)
def test_gradient_penalty_at_sizes(
    form: str, sizes: str, dtype: torch.dtype, calls: list[str]
) -> None:
    kind, own = FORMS[form]
    T, N, inputs, H = SIZES[sizes]
    module = build(kind, inputs, H, dtype=dtype, **own)
    check(module, leaves_for(module, T, N, hx=True), penalized(plain))
    assert calls == [module.mode]


def with_lengths(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves), lengths=LENGTHS)


def with_all(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves), lengths=LENGTHS, reset=RESET)


def packed(module: nn.Module, leaves: Leaves) -> Any:
    return module(pack_padded_sequence(leaves["x"], LENGTHS.clamp(min=1), enforce_sorted=False))


LENGTHS = torch.tensor([5, 2, 0, 4, 5, 1, 3])
RESET = torch.arange(35).view(5, 7) % 4 == 1
CALLS: dict[str, Call] = {
    "plain": plain,
    "lengths": with_lengths,
    "reset": lambda module, own: module(own["x"], states_of(own), reset=RESET),
    "lengths-reset": with_all,
    "packed": packed,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", COVERED)
def test_as_the_operators_of_torch(
    form: str, call: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, for every way to call it, on one thread and on more than there are cores."""
    kind, own = FORMS[form]
    module = build(kind, 3, 65, dtype=torch.float64, bidirectional=True, **own)
    leaves = leaves_for(module, 5, 7, hx=call != "packed")
    results = [
        evaluate(module, leaves, on_threads(penalized(CALLS[call]), threads)) for threads in (1, 3)
    ]
    assert calls == 4 * [module.mode]
    monkeypatch.setattr(kernels, "HAS_SECOND_ORDER", False)
    expected = evaluate(module, leaves, penalized(CALLS[call]))
    assert len(calls) == 4
    for found in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_kernel_covers(setting: str, calls: list[str]) -> None:
    """One call for each direction of each layer; none with a projection, none for a third
    derivative.
    """
    option = SETTINGS[setting]
    for form in FORMS:
        module, leaves = option.make(form)
        calls.clear()
        evaluate(module, leaves, penalized(option.call))
        directions = module.num_layers * (2 if module.bidirectional else 1)
        assert calls == ([] if module.proj_size else directions * [module.mode])


def hessian_product(module: nn.Module, x: Tensor, times: int = 1) -> list[list[Tensor]]:
    wanted = [x, *module.parameters()]
    y, _ = module(x)
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    loss = sum(g.square().sum() for g in first)
    return [
        list(torch.autograd.grad(loss, wanted, retain_graph=i + 1 < times)) for i in range(times)
    ]


@pytest.mark.parametrize("form", COVERED)
def test_a_graph_kept_gives_the_same_again(form: str) -> None:
    """The kernel overwrites what it is given, and that alone."""
    kind, own = FORMS[form]
    module = build(kind, 4, 20, **own)
    first, again = hessian_product(module, torch.randn(6, 3, 4, requires_grad=True), times=2)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def test_gradients_of_the_gradients_of_the_slots() -> None:
    """Only those move: the sums are the incoming tangents themselves, and are left as they are."""
    module = build("LSTM", 3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    weights = [w.detach() for w in module.parameters()]
    layer = derivatives.Spec("LSTM", 1, True, False, False, False, False)
    y, _, _, saved = torch.ops.rnnkern.scan(
        x, None, None, weights, *[None] * 4, False, *layer, True
    )
    *_, slots = torch.ops.rnnkern.scan_backward(
        torch.ones_like(y),
        None,
        None,
        x,
        None,
        None,
        weights,
        y,
        saved,
        *[None] * 4,
        False,
        *layer,
        [True] * 5,
    )
    moved = torch.randn_like(slots)
    before = moved.clone()
    nothing = derivatives.Point(None, None, None, [None] * 4)
    given = derivatives.Gradients(torch.ones_like(y), None, None, slots)
    results = []
    for kept in (saved, None):
        at = derivatives.Point(x, None, None, weights, y, kept)
        changes = derivatives.Gradients(None, None, None, moved)
        results.append(derivatives.of_backward(layer, None, at, given, nothing, changes))
        assert torch.equal(moved, before)
    for ours, theirs in zip(*(flat(result) for result in results), strict=True):
        torch.testing.assert_close(ours, theirs)


def flat(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [z for part in found if part is not None for z in flat(part)]


def test_a_pass_for_nothing_is_not_made() -> None:
    """Backward uses the output, whose own gradient is none then: no second backward pass."""
    module, x = build("GRU", 4, 6), torch.randn(5, 3, 4, requires_grad=True)
    with torch.profiler.profile() as seen:
        y, _ = module(x)
        (first,) = torch.autograd.grad(y, x, torch.randn_like(y), create_graph=True)
        first.square().sum().backward()
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts["rnnkern::GRU backward"] == 1
    assert counts["rnnkern::GRU second order"] == 1


def operands(mode: str = "LSTM") -> dict[str, Any]:
    T, N, H, S = 3, 2, 4, 4
    names = ("active", "kept", "h0", "c0", "dy", "dhn", "dcn", "crossing", "tangent_h0")
    names += ("tangent_c0", "tangent_dy", "tangent_dhn", "tangent_dcn")
    given: dict[str, Any] = dict.fromkeys(names)
    given |= {name: torch.zeros(T, N, S * H) for name in ("slots", "dslots")}
    given |= {name: torch.zeros(T, N, H) for name in ("h", "c")}
    return given | {"w_hh": torch.zeros(S * H, H)}


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "shape": (lambda o: o.update(h=torch.zeros(3, 2, 5)), r"h has shape \[3, 2, 5\]"),
    "dtype": (lambda o: o.update(dslots=o["dslots"].double()), "dslots has another dtype"),
    "gaps": (lambda o: o.update(c=torch.zeros(3, 2, 8)[..., ::2]), "c is not dense"),
    "flags": (lambda o: o.update(kept=torch.zeros(3, 2)), "kept has another dtype"),
    "missing": (lambda o: o.update(w_hh=None), "an operand that the cell needs is None"),
    "subclass": (lambda o: o.update(h=o["h"].as_subclass(Own)), "h is a tensor subclass"),
    "no tensor": (lambda o: o.update(h=3), "h must be a torch.Tensor"),
}


class Own(Tensor):
    pass


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_operands(fault: str) -> None:
    given = operands()
    sums = torch.ones(3, 2, 16)
    kernels.second_order("LSTM", sums.clone(), **given)
    change, message = WRONG[fault]
    change(given)
    with pytest.raises(kernels.RefusedError, match=message):
        kernels.second_order("LSTM", sums, **given)
    assert torch.equal(sums, torch.ones(3, 2, 16))


def test_wrong_sums() -> None:
    with pytest.raises(ValueError, match="no kernel knows the cell 'ABC'"):
        kernels.second_order("ABC", torch.ones(3, 2, 16), **operands())
    with pytest.raises(kernels.RefusedError, match="must be"):
        kernels.second_order("LSTM", torch.ones(3, 2, 15), **operands())
    with pytest.raises(kernels.RefusedError, match="its dtype"):
        kernels.second_order("LSTM", torch.ones(3, 2, 16).half(), **operands())
    with pytest.raises(KeyError):
        kernels.second_order("LSTM", torch.ones(3, 2, 16))
