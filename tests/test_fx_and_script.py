"""Layers and cells in models that `torch.fx` traces or TorchScript compiles."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from support import CELLS, LAYERS, Tagger, build, reverted
from torch import Tensor, fx, nn

import rnnkern


class Stepper(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.cell(x, h)


class LstmStepper(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        return self.cell(x, (h, c))[0]


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_one_node_of_fx(kind: str) -> None:
    x = torch.randn(5, 3, 4)
    model = Tagger(build(kind, 4, 6), 6)
    traced = fx.symbolic_trace(model)
    of_torch = fx.symbolic_trace(reverted(model))
    assert [(n.op, str(n.target)) for n in traced.graph.nodes] == [
        (n.op, str(n.target)) for n in of_torch.graph.nodes
    ]
    assert str(traced.graph) == str(of_torch.graph)
    assert torch.equal(traced(x), model(x))


def test_a_tracer_that_knows_torchs_package_alone() -> None:
    """As many users write it."""

    class OfTorch(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return m.__module__.startswith("torch.nn") and not isinstance(m, nn.Sequential)

    model, x = Tagger(build("LSTM", 4, 6), 6), torch.randn(5, 3, 4)
    graph = OfTorch().trace(model)
    assert str(graph) == str(OfTorch().trace(reverted(model)))
    assert torch.equal(fx.GraphModule(model, graph)(x), model(x))

    class OfConstants(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build("LSTM", 4, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.rnn(torch.ones(1, 3, 4))[0]

    nodes = OfTorch().trace(OfConstants()).nodes
    assert [n.target for n in nodes if n.op == "call_module"] == ["rnn"]


def test_a_call_with_states_and_lengths_is_one_node_of_fx() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build("LSTM", 4, 6)

        def forward(self, x: Tensor, h: Tensor, c: Tensor, lengths: Tensor) -> Tensor:
            y, (h, c) = self.rnn(x, (h, c), lengths=lengths)
            return y + c.sum() + self.rnn(x, hx=(h, c))[0]

    model = Model()
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "rnn"]
    given = torch.randn(5, 3, 4), *torch.randn(2, 1, 3, 6), torch.tensor([5, 2, 3])
    assert torch.equal(traced(*given), model(*given))


def test_hooks_of_a_traced_layer_run_once() -> None:
    model, x = Tagger(build("GRU", 4, 6), 6), torch.randn(5, 3, 4)
    model.rnn.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.rnn.register_forward_hook(lambda module, args, result: (result[0] * 2, result[1]))
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "head"]
    assert torch.equal(traced(x), model(x))


def test_a_subclass_with_a_forward_of_its_own_is_traced_as_torch_nns() -> None:
    def doubled(lib: ModuleType) -> nn.Module:
        class Doubled(lib.GRU):  # type: ignore[misc, name-defined]
            def forward(self, x: Tensor) -> Any:
                y, h = super().forward(x)
                return y * 2, h

        return Tagger(Doubled(4, 6), 6)

    for lib in (nn, rnnkern):
        with pytest.raises(fx.proxy.TraceError):
            fx.symbolic_trace(doubled(lib))


@pytest.mark.parametrize("lib", [nn, rnnkern])
def test_a_bare_layer_is_not_traced(lib: ModuleType) -> None:
    with pytest.raises(fx.proxy.TraceError):
        fx.symbolic_trace(lib.LSTM(3, 4))


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_one_node_of_fx(kind: str) -> None:
    cell = build(kind, 4, 6)
    model = LstmStepper(cell) if kind == "LSTMCell" else Stepper(cell)
    traced = fx.symbolic_trace(model)
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["cell"]
    given = torch.randn(3, 4), *torch.randn(2 if kind == "LSTMCell" else 1, 3, 6)
    assert torch.equal(traced(*given), model(*given))


@pytest.mark.cpu_only
def test_layers_that_torch_nn_does_not_have_are_nodes_of_fx() -> None:
    x = torch.randn(5, 3, 4)
    models = [Tagger(rnnkern.Recurrent(rnnkern.cells.mgu, 4, 6), 6)]
    if not rnnkern.kernels.IS_STAND_IN:
        models.append(rnnkern.freeze(Tagger(build("GRU", 4, 6), 6)))
    for model in models:
        traced = fx.symbolic_trace(model)
        assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["rnn", "head"]
        assert torch.equal(traced(x), model(x))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_scripted(kind: str) -> None:
    x = torch.randn(5, 3, 4)
    model = Tagger(build(kind, 4, 6, num_layers=2, bidirectional=True), 12).eval()
    scripted = torch.jit.script(model)
    torch.testing.assert_close(scripted(x), model(x))
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x[:2]), model(x[:2]))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_is_scripted(kind: str) -> None:
    cell = build(kind, 4, 6)
    model = LstmStepper(cell) if kind == "LSTMCell" else Stepper(cell)
    given = torch.randn(3, 4), *torch.randn(2 if kind == "LSTMCell" else 1, 3, 6)
    torch.testing.assert_close(torch.jit.script(model)(*given), model(*given))


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("first", ["call", "copy", "pickle"])
def test_a_scripted_model_keeps_its_modules(first: str) -> None:
    """torch.jit.script puts what it compiles in place of a module; the next use is rnnkern's."""
    model = Tagger(build("LSTM", 4, 6), 6)
    layer, weight = model.rnn, model.rnn.weight_hh_l0
    torch.jit.script(model)
    if first == "call":
        model(torch.randn(5, 3, 4))
    elif first == "copy":
        model = copy.deepcopy(model)
    else:
        model = pickle.loads(pickle.dumps(model))
    assert type(model.rnn) is rnnkern.LSTM
    if first == "call":
        assert model.rnn is layer
        assert model.rnn.weight_hh_l0 is weight


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_what_is_done_to_a_scripted_layer_before_it_is_called() -> None:
    x = torch.randn(5, 3, 4)
    model = Tagger(build("LSTM", 4, 6), 6)
    torch.jit.script(model)
    wanted = reverted(model)(x)
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    torch.testing.assert_close(model(x), wanted)
    model = Tagger(build("LSTM", 4, 6), 6)
    torch.jit.script(model)
    assert type(rnnkern.revert(model).rnn) is nn.LSTM  # type: ignore[attr-defined]


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("lib", [nn, rnnkern])
def test_a_parametrized_layer_is_not_scripted(lib: ModuleType) -> None:
    """Its weights would be constants."""
    model = Tagger(lib.LSTM(4, 6), 6)
    nn.utils.parametrizations.weight_norm(model.rnn, "weight_hh_l0")
    with pytest.raises(Exception):  # noqa: B017, PT011  TorchScript has several
        torch.jit.script(model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
def test_lengths_are_not_scripted() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build("GRU", 4, 6)

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.rnn(x, lengths=lengths)[0]

    with pytest.raises(RuntimeError, match="Keyword argument lengths unknown"):
        torch.jit.script(Model())


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("kind", ["Recurrent", "FrozenLayer", "FrozenCell"])
def test_modules_that_torch_nn_does_not_have_are_not_scripted(kind: str, inside: bool) -> None:
    """The error says what to do instead."""
    make: dict[str, Callable[[], nn.Module]] = {
        "Recurrent": lambda: rnnkern.Recurrent(rnnkern.cells.mgu, 4, 6),
        "FrozenLayer": lambda: rnnkern.freeze(build("GRU", 4, 6)),
        "FrozenCell": lambda: rnnkern.freeze(build("GRUCell", 4, 6)),
    }
    model = nn.Sequential(make[kind]()) if inside else make[kind]()
    instead = "torch.export" if kind == "Recurrent" else "before it is frozen"
    with pytest.raises(NotImplementedError, match=f"cannot compile {kind}.*{instead}"):
        torch.jit.script(model)
