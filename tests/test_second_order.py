"""The kernel of second derivatives, against the oracle and against torch's operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_options import SETTINGS
from support import (
    FORMS,
    WIDE_DTYPES,
    Call,
    Leaves,
    build,
    build_form,
    check,
    evaluate,
    flatten,
    leaves_for,
    on_threads,
    penalized,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from rnnkern import derivatives, kernels
from rnnkern.layer import Gradients, Layer, Operands, Recorded
from rnnkern.ops import second_order

pytestmark = pytest.mark.kernel
# T, N, I, H: less than a vector, whole vectors and a bit, several panels with few rows (units are
# split), with many (rows are split).
SIZES = {
    "tiny": (3, 2, 2, 3),
    "odd": (5, 7, 3, 65),
    "units": (30, 1, 40, 300),
    "rows": (4, 61, 7, 130),
    "one-step": (1, 9, 5, 16),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The cells for which the kernel runs."""
    made: list[str] = []
    run = second_order.by_kernel

    def counted(recorded: Recorded, *rest: Any) -> Any:
        made.append(recorded.layer.mode)
        return run(recorded, *rest)

    monkeypatch.setattr(second_order, "by_kernel", counted)
    return made


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_penalty_at_sizes(
    form: str, sizes: str, dtype: torch.dtype, calls: list[str]
) -> None:
    T, N, inputs, H = SIZES[sizes]
    module = build_form(form, inputs, H, dtype=dtype, proj_size=2 * H // 3)
    check(module, leaves_for(module, T, N, hx=True), on_threads(penalized(plain), 3))
    assert calls == [module.mode]


def with_lengths(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves), lengths=LENGTHS)


def with_all(module: nn.Module, leaves: Leaves) -> Any:
    reset = RESET.to(leaves["x"].device)
    return module(leaves["x"], states_of(leaves), lengths=LENGTHS, reset=reset)


def with_reset(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves), reset=RESET.to(leaves["x"].device))


def packed(module: nn.Module, leaves: Leaves) -> Any:
    return module(pack_padded_sequence(leaves["x"], LENGTHS.clamp(min=1), enforce_sorted=False))


LENGTHS = torch.tensor([5, 2, 0, 4, 5, 1, 3])
RESET = torch.arange(35).view(5, 7) % 4 == 1
CALLS: dict[str, Call] = {
    "plain": plain,
    "lengths": with_lengths,
    "reset": with_reset,
    "lengths-reset": with_all,
    "packed": packed,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_as_the_operators_of_torch(
    form: str, call: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float64, for every way to call it, on one thread and on more than there are cores."""
    module = build_form(form, 3, 65, dtype=torch.float64, bidirectional=True)
    leaves = leaves_for(module, 5, 7, hx=call != "packed")
    results = [
        evaluate(module, leaves, on_threads(penalized(CALLS[call]), threads)) for threads in (1, 3)
    ]
    assert calls == 2 * [module.mode]
    monkeypatch.setattr(second_order, "has_kernel", lambda _: False)
    expected = evaluate(module, leaves, penalized(CALLS[call]))
    assert len(calls) == 2
    for found in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_the_incoming_gradients(
    form: str, call: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Zero past the end of a row, whatever the gradients of the gradients are there."""
    module = build_form(form, 3, 20, dtype=torch.float64)
    leaves = leaves_for(module, 5, 7, hx=call != "packed")
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}

    def product() -> tuple[Tensor, ...]:
        outputs = list(flatten(CALLS[call](module, leaves)).values())
        wanted = [*leaves.values(), *module.parameters()]
        incoming = [seeded(i, z) for i, z in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, wanted, incoming, create_graph=True)
        vectors = [seeded(i, z).detach() for i, z in enumerate(gradients)]
        return torch.autograd.grad(gradients, incoming, vectors)

    found = product()
    assert calls == [module.mode]
    monkeypatch.setattr(second_order, "has_kernel", lambda _: False)
    for ours, expected in zip(found, product(), strict=True):
        torch.testing.assert_close(ours, expected)
    assert len(calls) == 1


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_of_each_operand_alone(
    form: str, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its derivatives: the direction moves that operand of one direction, and no other."""
    module = build_form(form, 3, 20, dtype=torch.float64, bidirectional=True)
    leaves = leaves_for(module, 4, 5, hx=True)
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    tensors = [*leaves.values(), *module.parameters()]

    def derivatives_of(k: int) -> tuple[Tensor, ...]:
        outputs = list(flatten(plain(module, leaves)).values())
        incoming = [seeded(i, z).detach() for i, z in enumerate(outputs)]
        gradients = torch.autograd.grad(outputs, tensors, incoming, create_graph=True)
        vector = seeded(k, gradients[k]).detach()
        return torch.autograd.grad(gradients[k], tensors, vector, materialize_grads=True)

    found = [derivatives_of(k) for k in range(len(tensors))]
    assert calls == len(tensors) * [module.mode]
    monkeypatch.setattr(second_order, "has_kernel", lambda _: False)
    for k, ours in enumerate(found):
        for own_part, expected in zip(ours, derivatives_of(k), strict=True):
            torch.testing.assert_close(own_part, expected)


@pytest.mark.parametrize("wanted", ["x", "h0", "weight_hh_l0", "bias_ih_l0"])
@pytest.mark.parametrize("form", FORMS)
def test_only_some_gradients_of_the_gradients(form: str, wanted: str, calls: list[str]) -> None:
    """Unwanted ones are not computed, and the others are the same."""
    module = build_form(form, 3, 40, dtype=torch.float64, bidirectional=True)
    leaves = leaves_for(module, 4, 5, hx=True)
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    tensors = leaves | dict(module.named_parameters())
    outputs = list(flatten(plain(module, leaves)).values())
    incoming = [seeded(i, z).detach() for i, z in enumerate(outputs)]

    def product(by: list[Tensor]) -> list[Tensor]:
        for z in tensors.values():
            z.requires_grad_(any(z is own for own in by))
        y = list(flatten(plain(module, leaves)).values())
        first = torch.autograd.grad(y, by, incoming, create_graph=True)
        loss = sum((g * seeded(7, g).detach()).sum() + g.square().sum() for g in first[:1])
        return list(torch.autograd.grad(loss, by))

    (found,) = product([tensors[wanted]])
    every = product([tensors[wanted], *(z for name, z in tensors.items() if name != wanted)])
    torch.testing.assert_close(found, every[0])
    assert calls == 2 * [module.mode]


def seeded(seed: int, like: Tensor) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn_like(like, requires_grad=True)


@pytest.mark.parametrize("setting", SETTINGS)
def test_what_the_kernel_covers(setting: str, calls: list[str]) -> None:
    """One call for each layer."""
    option = SETTINGS[setting]
    for form in FORMS:
        module, leaves = option.make(form)
        calls.clear()
        evaluate(module, leaves, penalized(option.call))
        assert calls == module.num_layers * [module.mode]


def hessian_product(module: nn.Module, x: Tensor, times: int = 1) -> list[list[Tensor]]:
    wanted = [x, *module.parameters()]
    y, _ = module(x)
    first = torch.autograd.grad(y.square().sum(), wanted, create_graph=True)
    loss = sum(g.square().sum() for g in first)
    return [
        list(torch.autograd.grad(loss, wanted, retain_graph=i + 1 < times)) for i in range(times)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_kept_gives_the_same_again(form: str) -> None:
    """The kernel overwrites what it is given, and that alone."""
    module = build_form(form, 4, 20)
    first, again = hessian_product(module, torch.randn(6, 3, 4, requires_grad=True), times=2)
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a, b)


def at_a_point() -> tuple[Recorded, Gradients]:
    """A forward pass, and the gradients there."""
    module = build("LSTM", 3, 5, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    weights = [w.detach() for w in module.parameters()]
    layer = Layer("LSTM", 1, True, False, False, False, False)
    nothing = (*[None] * 4, False, *layer)
    y, _, _, saved = torch.ops.rnnkern.scan(x, None, None, weights, *nothing, True)
    dy = torch.ones_like(y)
    *_, slots = torch.ops.rnnkern.scan_backward(
        dy, None, None, x, None, None, weights, y, saved, *nothing, [True] * 5
    )
    at = Operands(x, None, None, weights, y)
    return Recorded(layer, None, at, saved), Gradients(dy, None, None, slots)


def test_gradients_of_the_gradients_of_the_slots() -> None:
    """Only those move: the sums are the incoming tangents themselves, and are left as they are."""
    recorded, gradients = at_a_point()
    moved = torch.randn_like(gradients.slots)
    before = moved.clone()
    nothing = Operands(None, None, None, [None] * 4)
    changes = Gradients(None, None, None, moved)
    found = second_order.by_kernel(recorded, gradients, nothing, changes)
    assert torch.equal(moved, before)
    expected = derivatives.of_backward(*recorded[:3], gradients, nothing, changes)
    for ours, theirs in zip(flat(found), flat(expected), strict=True):
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


class Narrow(Tensor):
    pass


def narrower(z: Tensor) -> Tensor:
    return z[..., 1:]


POINT = ("x", "h0", "c0", "weights", "steps", "y", "saved", "slots", "incoming")
DIRECTION = ("tangent_x", "tangent_h0", "tangent_c0", "tangent_weights", "tangent_slots")
OPERANDS = (*POINT, *DIRECTION, "tangent_incoming")
WRONG: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "shape": ("y", narrower, r"output has shape \[4, 2, 4\]"),
    "dtype": ("y", Tensor.float, "output has another dtype"),
    "dtype of all": ("x", Tensor.half, "input is not covered: its dtype"),
    "device": ("x", lambda z: z.to("meta"), "input has no plain memory"),
    "rows": ("slots", lambda z: z[:, 1:], r"gradients of the slots has shape \[1, 7, 20\]"),
    "gaps": ("slots", lambda z: z.mT.contiguous().mT, "gradients of the slots is not"),
    "rows apart": ("slots", lambda z: torch.cat((z, z), -1)[..., :20], "slots is not dense"),
    "missing": ("slots", lambda _: None, "the output or the gradients of the slots are None"),
    "saved": ("saved", lambda z: z[1:], r"what forward saved has shape \[199\]"),
    "weights": ("weights", lambda z: z[1:], "expected 4 weights, got 3"),
    "tangents": ("tangent_weights", lambda z: z[1:], "expected 4 weights, got 3"),
    "tangent": ("tangent_x", narrower, r"tangent of the input has shape \[4, 2, 2\]"),
    "incoming": ("incoming", lambda z: z[1:], "one of y, h_n, c_n each"),
    "subclass": ("y", lambda z: z.as_subclass(Narrow), "output is not covered: tensor subclass"),
}


def run_second_order(given: dict[str, Any], count: int = len(POINT), flags: int = 5) -> Any:
    kernel = kernels.kernel("LSTM", directions=1, hidden=5, proj=0, bias=True, batch_first=False)
    values = tuple(given.values())
    return kernel.second_order(values[:count], values[count:], [True] * flags)


@pytest.mark.parametrize("fault", WRONG)
def test_wrong_operands(fault: str) -> None:
    given = operands()
    run_second_order(given)
    name, change, message = WRONG[fault]
    given[name] = change(given[name])
    with pytest.raises(kernels.RefusedError, match=message):
        run_second_order(given)


def test_wrong_numbers_of_operands() -> None:
    given = operands()
    with pytest.raises(kernels.RefusedError, match="a point has 9 operands, got 8"):
        run_second_order(given, len(POINT) - 1)
    with pytest.raises(kernels.RefusedError, match="a direction has 6 operands, got 7"):
        run_second_order(given | {"more": None})
    with pytest.raises(kernels.RefusedError, match="one flag per input, weight and initial state"):
        run_second_order(given, flags=6)


def test_a_cell_state_of_a_cell_without_one() -> None:
    module, x = build("GRU", 3, 5), torch.randn(4, 2, 3)
    kernel = kernels.kernel("GRU", directions=1, hidden=5, proj=0, bias=True, batch_first=False)
    weights = list(module.parameters())
    with pytest.raises(kernels.RefusedError, match="c_0 is of LSTMs alone"):
        kernel.forward(x, None, torch.zeros(1, 2, 5), weights, None, False)


def operands() -> dict[str, Any]:
    (_, steps, at, saved), gradients = at_a_point()
    values = (*at[:3], at.weights, steps, at.y, saved, gradients.slots, gradients[:3])
    values += (at.x, None, None, [None, at.weights[1], None, None], None, [None] * 3)
    return dict(zip(OPERANDS, values, strict=True))
