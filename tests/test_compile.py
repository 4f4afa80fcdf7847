"""Layers and cells under `torch.compile`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import subprocesses
import torch
from functorch.compile import make_boxed_func
from layer_options import SETTINGS
from support import (
    CELLS,
    FORMS,
    LAYERS,
    assert_bitwise,
    build,
    compiled,
    evaluate,
    flatten,
    in_a_process,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.func import grad, vmap

import rnnkern

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_equals_eager(form: str, setting: str) -> None:
    """Without a break in the graph, forward and backward, bit for bit."""
    option = SETTINGS[setting]
    module, leaves = option.make(form)
    call = compiled(option.call)
    assert_bitwise(
        evaluate(module, leaves, lambda m, own: call(m, own)), evaluate(module, leaves, option.call)
    )


@pytest.mark.parametrize("kind", CELLS)
def test_compiled_cells(kind: str) -> None:
    module = build(kind, 4, 6)
    call = compiled(module)
    x, hx = torch.randn(3, 4), torch.randn(3, 6)
    state = (hx, hx) if kind == "LSTMCell" else hx
    assert_bitwise(flatten(call(x, state)), flatten(module(x, state)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_recompilation_for_other_lengths_and_batches(kind: str, training: bool) -> None:
    module = build(kind, 4, 6, num_layers=2, bidirectional=True)
    call = compiled(module, dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.set_grad_enabled(training):
        for T, N in ((7, 3), (5, 3), (20, 3), (9, 2), (11, 8)):
            x = torch.randn(T, N, 4, requires_grad=training)
            y, _ = call(x)
            torch.testing.assert_close(y, module(x)[0], rtol=0, atol=0)
            if training:
                y.sum().backward()
                assert x.grad is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_inductor_with_dropout_in_a_model(kind: str) -> None:
    """The default compiler, around a model with more in it; dropout draws in training only."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build(kind, 4, 6, num_layers=2, dropout=0.5)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.rnn(2 * x)[0]))

    torch._dynamo.reset()
    model = Model()
    call = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 3, 4)
    first, second = call(x), call(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    torch.testing.assert_close(call(x), model(x))


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_few_operators_to_a_compiler(kind: str) -> None:
    """Forward and backward, however many steps: so it compiles in tenths of a second."""
    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        sizes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    for T in (2, 200):
        torch._dynamo.reset()
        call = torch.compile(
            build(kind, 6, 8), fullgraph=True, backend=aot_autograd(fw_compiler=count)
        )
        call(torch.randn(T, 4, 6))[0].sum().backward()
    assert len(sizes) == 4
    assert sizes[:2] == sizes[2:]
    assert max(sizes) <= 10


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_many_sizes_recompile_as_those_of_linear(kind: str) -> None:
    """One graph a size; and a model of many layers is one graph."""

    def graphs(make: Callable[[int], nn.Module], *shape: int) -> int:
        torch._dynamo.reset()
        seen = CompileCounter()
        for size in range(2, 8):
            torch.compile(make(size), backend=seen)(torch.randn(*shape, size))
        return seen.frame_count

    shape = (3,) if kind in CELLS else (5, 3)
    ours = graphs(lambda size: build(kind, size, size + 1), *shape)
    assert ours <= graphs(lambda size: nn.Linear(size, size + 1), *shape)

    torch._dynamo.reset()
    layers = nn.ModuleList(build(kind, size, size + 1) for size in range(2, 14))

    def model(x: Tensor) -> Tensor:
        for layer in layers:
            made = layer(x)
            x = made[0] if isinstance(made, tuple) else made
        return x

    seen = CompileCounter()
    torch.compile(model, backend=seen, fullgraph=True)(torch.randn(*shape, 2))
    assert seen.frame_count == 1


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_a_compiled_call_checks_little(kind: str) -> None:
    """At most three times what it checks for `nn.Linear`, which has half as many parameters."""

    def checked(module: nn.Module, x: Tensor) -> int:
        counts: list[int] = []

        def count(guards: Any) -> list[bool]:
            counts.append(len(guards))
            return [True] * len(guards)

        torch._dynamo.reset()
        torch.compile(module, backend="eager", options={"guard_filter_fn": count})(x)
        return counts[0]

    x = torch.randn(*((3,) if kind in CELLS else (5, 3)), 4)
    assert checked(build(kind, 4, 6), x) <= 3 * checked(nn.Linear(4, 6), x)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["RNN", "RNNCell"])
def test_modes_that_torch_nn_refuses_compiled(kind: str) -> None:
    """With torch.nn's own error. Some versions of Dynamo drop its words."""
    x = torch.randn(*((3,) if kind in CELLS else (5, 3)), 4)
    refusals = []
    for library in (nn, rnnkern):
        module = getattr(library, kind)(4, 6)
        setattr(module, "mode" if kind == "RNN" else "nonlinearity", "GRU")
        torch._dynamo.reset()
        with pytest.raises((AssertionError, RuntimeError)) as raised:
            torch.compile(module, backend="eager")(x)
        refusals.append((type(raised.value), str(raised.value).partition("\n")[0]))
    assert refusals[0] == refusals[1]
    assert not refusals[0][1] or re.search("mode must be|Unknown nonlinearity", refusals[0][1])


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_a_compiled_layer_with_a_method_of_its_own(kind: str) -> None:
    """torch.nn's forward calls it, so ours does not run the layer."""
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)
    want = module(x)[0]
    module.check_forward_args = lambda *args: seen.append(1)  # type: ignore[method-assign]
    seen: list[int] = []
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager")(x)[0], want)
    assert seen


@pytest.mark.cpu_only
def test_dropout_draws_the_same_numbers_compiled() -> None:
    module = build("GRU", 4, 6, num_layers=3, dropout=0.5)
    call, x = compiled(module), torch.randn(5, 3, 4)
    torch.manual_seed(1)
    expected = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(call(x)[0], expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_torch_nn_is_left_as_it_is(kind: str) -> None:
    """What torch.nn cannot do, and rnnkern does: importing rnnkern changes nothing for its
    modules.
    """
    call = compiled(getattr(nn, kind)(4, 6))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        call(torch.randn(5, 3, 4))


@pytest.mark.cpu_only
@pytest.mark.parametrize("order", ["rnnkern-first", "dynamo-first", "own-setting"])
def test_the_flag_of_dynamo(order: str) -> None:
    found = in_a_process(subprocesses.allow_rnn, order)
    own = order == "own-setting"
    assert found == {"rnnkern": True, "torch.nn": own, "bool": own}


@pytest.mark.cpu_only
def test_lengths_out_of_range_are_refused_compiled() -> None:
    module = build("GRU", 4, 6)
    call = compiled(lambda x, lengths: module(x, lengths=lengths)[0])
    x = torch.randn(5, 2, 4)
    call(x, torch.tensor([5, 0]))
    with pytest.raises(
        ValueError, match="between 0 and the number of steps 5, got values from 2 to 6"
    ):
        call(x, torch.tensor([2, 6]))


def test_changes_in_place_around_a_compiled_layer() -> None:
    """Operators neither change nor return their operands."""
    module = build("LSTM", 4, 6)

    def call(x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        x.mul_(2)
        y, (h, c_n) = module(x, (c, c))
        seen = y[0]
        y.add_(1)
        c.copy_(c_n)
        x.zero_()
        return y, h, seen

    x, c = torch.randn(5, 3, 4), torch.randn(1, 3, 6)
    with torch.no_grad():
        ours, theirs = (x.clone(), c.clone()), (x.clone(), c.clone())
        assert_bitwise(flatten(compiled(call)(*ours)), flatten(call(*theirs)))
    assert_bitwise(flatten(ours), flatten(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_compiled_under_autocast(kind: str, dtype: torch.dtype) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(3, 4) if kind in CELLS else torch.randn(5, 3, 4)

    device = x.device.type

    def call(x: Tensor) -> Any:
        with torch.autocast(device, dtype=dtype):
            return module(x)

    assert_bitwise(flatten(compiled(call)(x)), flatten(call(x)))


def test_empty_batches_and_sequences() -> None:
    module = build("LSTM", 4, 6)
    call = compiled(module)
    assert call(torch.randn(5, 0, 4))[0].shape == (5, 0, 6)
    assert vmap(lambda a: module(a)[0])(torch.randn(3, 5, 0, 4)).shape == (3, 5, 0, 6)
    x = torch.randn(5, 0, 4, requires_grad=True)
    for run in (module, call):
        run(x)[0].sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert not module.weight_hh_l0.grad.any()
    assert grad(lambda a: module(a)[0].sum())(x.detach()).shape == x.shape
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match="larger than 0"):
        call(torch.randn(0, 2, 4))
