"""Gradients: gradcheck and gradgradcheck of every option, and all that autograd allows around a
call.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import oracle
import pytest
import torch
from layer_options import SETTINGS, as_function
from support import (
    CELLS,
    DTYPES,
    FORMS,
    LAYERS,
    WIDE_DTYPES,
    Leaves,
    assert_agree,
    assert_bitwise,
    build,
    build_form,
    check,
    evaluate,
    flatten,
    initial_states,
    leaves_for,
    pair,
    penalized,
    plain,
    states_of,
    weighted_sum,
)
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from rnnkern import autograd, inspect, tolerance


@pytest.mark.kernel
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_gradcheck(form: str, setting: str) -> None:
    option = SETTINGS[setting]
    module, leaves = option.make(form)
    function, inputs = as_function(module, option.call, leaves)
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_gradgradcheck(form: str, setting: str) -> None:
    option = SETTINGS[setting]
    module, leaves = option.make(form)
    function, inputs = as_function(module, option.call, leaves)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_penalty(form: str, setting: str) -> None:
    option = SETTINGS[setting]
    module, leaves = option.make(form)
    check(module, leaves, penalized(option.call), oracle_call=penalized(option.oracle_call))


@pytest.mark.parametrize(
    ("form", "dtype"),
    [(f, d) for f in FORMS for d in DTYPES if d in WIDE_DTYPES or f != "RNN-relu"],
    ids=str,
)
def test_gradient_penalty_on_the_weights(form: str, dtype: torch.dtype) -> None:
    """Second derivatives by the weights, at a size that fills vectors."""
    module = build_form(form, 5, 17, dtype=dtype)

    def call(m: nn.Module, leaves: Leaves) -> Any:
        y, _ = plain(m, leaves)
        gradients = torch.autograd.grad(y.square().sum(), list(m.parameters()), create_graph=True)
        return y, torch.stack([gradient.square().sum() for gradient in gradients]).sum()

    check(module, leaves_for(module, 4, 3), call)


@pytest.mark.parametrize("only", ["x", "weight_hh_l0"])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_penalty_with_most_of_it_frozen(form: str, only: str) -> None:
    module = build_form(form, 4, 6, dtype=torch.float64)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == only)

    def call(m: nn.Module, leaves: Leaves) -> Any:
        own = {name: leaf if name == only else leaf.detach() for name, leaf in leaves.items()}
        outputs = flatten(plain(m, own))
        wanted = leaves["x"] if only == "x" else m.weight_hh_l0
        (gradient,) = torch.autograd.grad(weighted_sum(outputs).square(), wanted, create_graph=True)
        return [*outputs.values(), gradient]

    check(module, leaves_for(module, 5, 3), call)


@pytest.mark.parametrize("kind", LAYERS)
def test_arguments_that_depend_on_each_other(kind: str) -> None:
    """The start is made from the input, both weights and both biases are one tensor: nothing
    counts twice, in first and second derivatives.
    """
    module = build(kind, 6, 6, dtype=torch.float64)
    theirs, wide = oracle.twin(module, torch.float32), oracle.twin(module)
    for each in (module, theirs, wide):
        each.weight_hh_l0 = each.weight_ih_l0
        each.bias_hh_l0 = each.bias_ih_l0

    def call(m: nn.Module, leaves: Leaves) -> Any:
        start = leaves["x"][:1]
        y, _ = m(leaves["x"], (start, start) if kind == "LSTM" else start)
        (gradient,) = torch.autograd.grad(y.square().sum(), leaves["x"], create_graph=True)
        return [y, gradient]

    leaves = {"x": torch.randn(5, 3, 6)}
    assert_agree(*(evaluate(each, leaves, call) for each in (module, theirs, wide)))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_penalty_after_the_loss(kind: str) -> None:
    """What forward has saved serves both, though the first backward pass is the last of its graph
    that torch knows of.
    """
    module = build(kind, 4, 6, dtype=torch.float64)
    shape = (3, 4) if kind in CELLS else (5, 3, 4)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def parts() -> tuple[Tensor, Tensor]:
        y = next(iter(flatten(module(x)).values()))
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        return (y * torch.arange(y.numel()).view_as(y)).mean(), gradient.square().sum()

    found = []
    for together in (True, False):
        module.zero_grad()
        loss, penalty = parts()
        if together:
            (loss + penalty).backward()
        else:
            loss.backward()
            penalty.backward()
        found.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("form", FORMS)
def test_what_stands_past_the_end_has_no_derivative(form: str) -> None:
    """NaN there is no part of second derivatives, of per-sample gradients, nor of what inspect
    finds.
    """
    module = build_form(form, 3, 4, bidirectional=True, dtype=torch.float64)
    lengths = torch.tensor([6, 3])
    clean = torch.randn(6, 2, 3, dtype=torch.float64)
    clean[3:, 1] = 0
    spoilt = clean.clone()
    spoilt[3:, 1] = torch.nan
    results = []
    for x in (clean, spoilt):
        x.requires_grad_()
        y, _ = module(x, lengths=lengths)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        second = torch.autograd.grad(gradient.square().sum(), [x, *module.parameters()])
        weights = {name: p.detach() for name, p in module.named_parameters()}

        def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(module, weights, (x,), {"lengths": lengths})[0].pow(3).sum()

        samples = vmap(grad(loss), (None, 0))(weights, torch.stack((x.detach(),) * 2))
        flow = inspect.gradient_flow(module, x, lengths=lengths)
        seen = inspect.trace(module, x, lengths=lengths).layers[0][1]
        traced = torch.autograd.grad(
            sum(gate.sum() for gate in [*seen.gates.values(), seen.h]),
            list(module.parameters())[:2],
            allow_unused=True,
        )
        results.append([*second, *samples.values(), flow.h, *(t for t in traced if t is not None)])
    for ours, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_in_several_threads(kind: str) -> None:
    module = build(kind, 4, 40)
    xs = [torch.randn(5, 3, 4, requires_grad=True) for _ in range(4)]

    def second(x: Tensor) -> Tensor:
        y, _ = module(x)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), x)[0]

    expected = [second(x) for x in xs]
    with ThreadPoolExecutor(4) as pool:
        for found in zip(*[pool.map(second, xs) for _ in range(5)], strict=True):
            assert len(found) == 5
        for x, one in zip(xs, expected, strict=True):
            assert torch.equal(pool.submit(second, x).result(), one)


@pytest.mark.parametrize("kind", LAYERS)
def test_third_derivatives(kind: str) -> None:
    module = build(kind, 2, 3, dtype=torch.float64)

    def call(m: nn.Module, leaves: Leaves) -> Any:
        y, _ = plain(m, leaves)
        (first,) = torch.autograd.grad(y.pow(3).sum(), leaves["x"], create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), m.weight_hh_l0, create_graph=True)
        return [y, first, second]

    check(module, leaves_for(module, 3, 2), call)


# What a program may do with the output before the loss: the gradient arrives expanded, strided,
# sparse in places.
CONSUMERS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda y: y.sum(),
    "sum-over-time": lambda y: y.sum(0),
    "mean-over-rows": lambda y: y.mean(1),
    "last-step": lambda y: y[-1],
    "first-step": lambda y: y[0],
    "one-row": lambda y: y[:, 1],
    "one-unit": lambda y: y[..., 2],
    "every-other-step": lambda y: y[::2],
    "every-other-unit": lambda y: y[..., ::2],
    "transposed": lambda y: y.transpose(0, 1).contiguous(),
    "units-first": lambda y: y.permute(2, 0, 1).square(),
    "expanded": lambda y: y.unsqueeze(0).expand(3, *y.shape),
    "flattened": lambda y: y.flatten(1),
    "viewed": lambda y: y.view(-1, y.shape[-1]),
    "halves": lambda y: torch.stack(y.chunk(2, -1)).prod(0),
    "picked": lambda y: y.gather(0, torch.tensor([3, 0, 4]).view(1, 3, 1).expand(1, 3, 6)),
    "largest": lambda y: y.amax(0),
}


@pytest.mark.kernel
@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_through_views(kind: str, options: dict[str, Any], consumer: str) -> None:
    module = build(kind, 4, 6, **options)
    use = CONSUMERS[consumer]

    def call(m: nn.Module, leaves: Leaves) -> Any:
        y, _ = plain(m, leaves)
        return [use(y.transpose(0, 1) if m.batch_first else y)]

    check(module, leaves_for(module, 5, 3), call)


def states(out: Any) -> tuple[Tensor, ...]:
    """h_n, and c_n for LSTM."""
    return out[1] if isinstance(out[1], tuple) else (out[1],)


USED: dict[str, Callable[[Any], list[Tensor]]] = {
    "only-y": lambda out: [out[0]],
    "only-h": lambda out: [states(out)[0]],
    "only-c": lambda out: [states(out)[-1]],
    "h-of-the-last-layer": lambda out: [states(out)[0][-1]],
    "h-of-the-first-layer": lambda out: [states(out)[0][0]],
    "h-twice": lambda out: [out[0], *states(out), states(out)[0].square()],
}


@pytest.mark.kernel
@pytest.mark.parametrize("used", USED)
@pytest.mark.parametrize("form", FORMS)
def test_only_some_outputs_used(form: str, used: str) -> None:
    module = build_form(form, 4, 6, num_layers=2, bidirectional=True)
    check(module, leaves_for(module, 5, 3), lambda m, leaves: USED[used](plain(m, leaves)))


def wanted_tensors(form: str) -> list[str]:
    module = build_form(form, 4, 6, num_layers=2)
    return [*leaves_for(module, 5, 3), *(name for name, _ in module.named_parameters())]


@pytest.mark.parametrize(
    ("form", "wanted"), [(form, name) for form in FORMS for name in wanted_tensors(form)]
)
def test_only_one_tensor_requires_grad(form: str, wanted: str) -> None:
    module = build_form(form, 4, 6, num_layers=2)
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == wanted)

    def call(m: nn.Module, leaves: Leaves) -> Any:
        for name, leaf in leaves.items():
            leaf.requires_grad_(name == wanted)
        return plain(m, leaves)

    values = check(module, leaves_for(module, 5, 3), call)
    assert {name for name in values if name.startswith("d")} == {f"d{wanted}"}


@pytest.mark.parametrize("form", FORMS)
def test_nothing_requires_grad(form: str) -> None:
    module = build_form(form, 4, 6).requires_grad_(False)
    for output in flatten(plain(module, leaves_for(module, 5, 3))).values():
        assert not output.requires_grad
        assert output.grad_fn is None


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("form", FORMS)
def test_grad_modes(form: str, mode: Callable[[], Any]) -> None:
    module = build_form(form, 4, 6, num_layers=2)
    leaves = leaves_for(module, 5, 3)
    leaves["x"].requires_grad_()
    with mode():
        outputs = flatten(plain(module, leaves))
        for output in outputs.values():
            assert not output.requires_grad
            assert output.is_inference() == (mode is torch.inference_mode)
            output.mul_(2)
    check(module, {name: leaf.detach() for name, leaf in leaves.items()}, backward=False)


@pytest.mark.kernel
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_an_empty_batch(form: str, dtype: torch.dtype) -> None:
    """Zero; new memory is NaN under deterministic algorithms."""
    module = build_form(form, 3, 6, dtype=dtype, num_layers=2, bidirectional=True)
    x = torch.zeros(5, 0, 3, dtype=dtype, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad is not None
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in module.parameters())


@pytest.mark.parametrize("form", FORMS)
def test_backward_twice(form: str) -> None:
    """With retain_graph the second backward gives the bits of the first; without it torch's usual
    error.
    """
    module = build_form(form, 4, 6, num_layers=2, bidirectional=True)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_for(module, 5, 3).items()}
    wanted = leaves | dict(module.named_parameters())
    loss = weighted_sum(flatten(plain(module, leaves)))

    def gradients(retain: bool) -> dict[str, Tensor]:
        of = torch.autograd.grad(loss, list(wanted.values()), retain_graph=retain)
        return dict(zip(wanted, of, strict=True))

    first = gradients(retain=True)
    assert_bitwise(gradients(retain=True), first)
    assert_bitwise(gradients(retain=False), first)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(retain=False)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_each_output_add_up(form: str) -> None:
    """One backward per output over a kept graph, then all at once."""
    module = build_form(form, 4, 6, dtype=torch.float64)
    leaves = leaves_for(module, 5, 3)

    def one_by_one(m: nn.Module, own: Leaves) -> Any:
        outputs = list(flatten(plain(m, own)).values())
        parts = [
            torch.autograd.grad(output.sum(), own["x"], retain_graph=True)[0] for output in outputs
        ]
        return [*outputs, torch.stack(parts).sum(0)]

    def at_once(m: nn.Module, own: Leaves) -> Any:
        outputs = list(flatten(plain(m, own)).values())
        loss = torch.stack([output.sum() for output in outputs]).sum()
        return [*outputs, torch.autograd.grad(loss, own["x"], retain_graph=True)[0]]

    check(module, leaves, one_by_one, oracle_call=at_once)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_gradient_of_a_subclass(kind: str, create_graph: bool) -> None:
    """A function after the layer may give back an instance of a subclass of Tensor."""

    class Marked(Tensor):
        pass

    module = build(kind, 3, 4)
    y = next(iter(flatten(module(torch.randn(*((2,) if kind in CELLS else (5, 2)), 3))).values()))
    parameters, dy = list(module.parameters()), torch.randn_like(y)
    want = torch.autograd.grad(y, parameters, dy, retain_graph=True)
    made = torch.autograd.grad(y, parameters, dy.as_subclass(Marked), create_graph=create_graph)
    for got, expected in zip(made, want, strict=True):
        torch.testing.assert_close(got.detach().as_subclass(Tensor), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_accumulate(kind: str) -> None:
    module = build(kind, 4, 6)
    leaves = leaves_for(module, 5, 3)
    once = evaluate(module, leaves)
    weighted_sum(flatten(plain(module, leaves))).backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, 2 * once[f"d{name}"])


@pytest.mark.parametrize("kind", LAYERS)
def test_states_that_require_grad_through_time(kind: str) -> None:
    """Backpropagation through blocks, the state of one being the start of the next."""
    module = build(kind, 4, 6, num_layers=2)

    def call(m: nn.Module, leaves: Leaves) -> Any:
        state = states_of(leaves)
        for block in leaves["x"].split(2):
            _, state = m(block, state)
        return [state] if isinstance(state, Tensor) else state

    check(module, leaves_for(module, 6, 3), call)


@pytest.mark.parametrize("kind", LAYERS)
def test_one_initial_state_for_all_rows(kind: str) -> None:
    """A learned start, expanded over the batch, gets the sum of all rows' gradients."""
    module = build(kind, 4, 6, num_layers=2)
    leaves = {"x": torch.randn(5, 3, 4)} | initial_states(module, 1)

    def call(m: nn.Module, own: Leaves) -> Any:
        starts = {name: own[name].expand(-1, 3, -1) for name in own if name != "x"}
        return m(own["x"], states_of(starts))

    check(module, leaves, call)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_plain_backward_pass_is_one_crossing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python has a part in it only where something of torch's is to see it."""
    by_python: list[Any] = []
    run = autograd._backward

    def noted(*operands: Any) -> Any:
        by_python.append(operands)
        return run(*operands)

    monkeypatch.setattr(autograd, "_backward", noted)
    module = build(kind, 3, 4)
    leaves = {"x": torch.randn(2, 3) if kind in CELLS else torch.randn(5, 2, 3)}

    def loss() -> Tensor:
        return weighted_sum(flatten(plain(module, leaves)))

    loss().backward()
    first = [p.grad.clone() for p in module.parameters() if p.grad is not None]
    assert not by_python
    module.zero_grad()
    value = loss()
    value.backward(retain_graph=True)
    module.zero_grad()
    value.backward()
    assert not by_python
    for parameter, grad_of_first in zip(module.parameters(), first, strict=True):
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, grad_of_first)

    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        loss().backward()
    assert len(by_python) == 1
    value = loss()
    with torch.profiler.profile():
        value.backward()
    assert len(by_python) == 2
    torch.autograd.grad(loss(), list(module.parameters()), create_graph=True)
    assert len(by_python) == 3


def test_a_wrong_gradient_would_be_noticed() -> None:
    """The comparison itself: a gradient off by a part in ten thousand fails it."""
    module = build("LSTM", 4, 6)
    leaves = leaves_for(module, 5, 3)
    theirs, exact = (evaluate(oracle.twin(module, dtype), leaves) for dtype in WIDE_DTYPES)
    ours = {name: value * 1.0001 for name, value in theirs.items()}
    assert not all(tolerance.check(ours[k], theirs[k], exact[k]) for k in ours)
    assert_agree(theirs, theirs, exact)


def test_an_empty_batch_with_a_transposed_gradient() -> None:
    module = build("RNN", 3, 4)
    y, _ = module(torch.randn(5, 0, 3))
    (y.transpose(0, 2).contiguous() * 2).sum().backward()
    assert module.weight_hh_l0.grad.abs().sum() == 0


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_asked_for_in_inference_mode(kind: str, layers: int) -> None:
    ours, theirs = pair(kind, 3, 4, num_layers=layers)
    with torch.inference_mode(), torch.enable_grad():
        x = torch.randn(5, 2, 3)
        y, wanted = ours(x)[0], theirs(x)[0]
    assert not y.requires_grad
    assert not wanted.requires_grad
    torch.testing.assert_close(y, wanted)
