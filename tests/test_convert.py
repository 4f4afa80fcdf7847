"""convert and revert."""

from __future__ import annotations

import copy
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import CELLS, LAYERS
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import weight_norm

import rnnkern

RECURRENT = (nn.RNNBase, nn.RNNCellBase)


class Model(nn.Module):
    """Recurrent modules and cells at every depth, one of them in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.first = nn.LSTM(4, 6, num_layers=2, bidirectional=True, dropout=0.5)
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(12, 5), nn.Tanh()), nn.GRU(5, 5, batch_first=True)]
        )
        self.cells = nn.ModuleDict({"a": nn.LSTMCell(5, 5), "b": nn.RNNCell(5, 5, False, "relu")})
        self.gru_cell = nn.GRUCell(5, 5)
        self.shared = self.blocks[1]
        self.elman = nn.RNN(5, 5, nonlinearity="relu", bias=False)
        self.register_module("nothing", None)
        self.first.note = "kept"
        self.first.register_buffer("buffer", torch.ones(2))

    def forward(self, tokens: Tensor) -> Tensor:
        y, _ = self.first(self.embed(tokens))
        y = self.blocks[0](y)
        y = self.shared(self.blocks[1](y.transpose(0, 1))[0])[0].transpose(0, 1)
        h, c = self.cells["a"](y[0])
        h = self.gru_cell(self.cells["b"](h), c)
        return self.elman(y + h)[0]


def recurrent(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, RECURRENT))


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(11, (7, 3))


def test_every_recurrent_module_is_swapped_and_back(model: nn.Module) -> None:
    kinds = {name: type(module).__name__ for name, module in recurrent(model)}
    others = {name: module for name, module in model.named_modules() if name not in kinds}
    assert rnnkern.convert(model) is model
    assert {name: type(m) for name, m in recurrent(model)} == {
        name: getattr(rnnkern, kind) for name, kind in kinds.items()
    }
    assert rnnkern.revert(model) is model
    assert {name: type(m) for name, m in recurrent(model)} == {
        name: getattr(nn, kind) for name, kind in kinds.items()
    }
    assert {n: m for n, m in model.named_modules() if n not in kinds} == others


def test_parameters_are_the_same_objects(model: nn.Module) -> None:
    before = dict(model.named_parameters())
    keys = list(model.state_dict())
    for swap in (rnnkern.convert, rnnkern.revert):
        swap(model)
        after = dict(model.named_parameters())
        assert list(after) == list(before)
        assert all(after[name] is before[name] for name in before)
        assert list(model.state_dict()) == keys


def test_outputs_and_gradients_stay(model: nn.Module, tokens: Tensor) -> None:
    expected = model(tokens)
    gradients = torch.autograd.grad(expected.sum(), list(model.parameters()))
    for swap in (rnnkern.convert, rnnkern.revert):
        swap(model)
        output = model(tokens)
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(
            torch.autograd.grad(output.sum(), list(model.parameters())), gradients
        )


def test_twice_is_once(model: nn.Module) -> None:
    rnnkern.convert(rnnkern.convert(model))
    assert all(type(m).__module__.startswith("rnnkern") for _, m in recurrent(model))
    rnnkern.revert(rnnkern.revert(model))
    assert all(type(m).__module__.startswith("torch") for _, m in recurrent(model))


def test_a_shared_module_stays_shared(model: nn.Module) -> None:
    rnnkern.convert(model)
    assert model.shared is model.blocks[1]
    assert rnnkern.revert(model).shared is model.blocks[1]


def test_flags_and_attributes_are_kept(model: nn.Module) -> None:
    model.train()
    model.blocks[1].eval()
    model.cells["a"].eval()
    model.elman.weight_hh_l0.requires_grad_(False)
    before = {name: module.training for name, module in model.named_modules()}
    for swap in (rnnkern.convert, rnnkern.revert):
        swap(model)
        assert {name: module.training for name, module in model.named_modules()} == before
        assert model.first.note == "kept"
        assert model.first.buffer.tolist() == [1, 1]
        assert model.first.dropout == 0.5
        assert not model.elman.weight_hh_l0.requires_grad
        assert repr(model.first) == "LSTM(4, 6, num_layers=2, dropout=0.5, bidirectional=True)"


def test_hooks_are_kept(model: nn.Module, tokens: Tensor) -> None:
    calls: list[str] = []
    model.first.register_forward_pre_hook(lambda m, args: calls.append("pre"))
    handle = model.first.register_forward_hook(lambda m, args, out: calls.append("forward"))
    model.gru_cell.register_forward_hook(lambda m, args, out: calls.append("cell"))
    model.elman.register_full_backward_hook(lambda m, gin, gout: calls.append("backward"))
    model.first.register_state_dict_post_hook(lambda *args: calls.append("state"))
    for swap in (rnnkern.convert, rnnkern.revert):
        calls.clear()
        swap(model)
        model(tokens).sum().backward()
        model.state_dict()
        assert calls == ["pre", "forward", "cell", "backward", "state"]
    handle.remove()
    calls.clear()
    model(tokens)
    assert calls == ["pre", "cell"]


def test_an_optimizer_made_before_goes_on(model: nn.Module, tokens: Tensor) -> None:
    other = copy.deepcopy(model)
    for each in (model, other):
        optimizer = torch.optim.Adam(each.parameters(), 0.01)
        for step in range(6):
            if step == 3 and each is model:
                rnnkern.convert(each)
            optimizer.zero_grad()
            each(tokens).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(model(tokens), other(tokens), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_the_model_itself_is_recurrent(kind: str) -> None:
    module = getattr(nn, kind)(4, 6)
    parameters = list(module.parameters())
    x = torch.randn(5, 4)
    expected = module(x)
    converted = rnnkern.convert(module)
    assert type(converted) is getattr(rnnkern, kind)
    assert all(a is b for a, b in zip(converted.parameters(), parameters, strict=True))
    torch.testing.assert_close(converted(x), expected)
    reverted = rnnkern.revert(converted)
    assert type(reverted) is getattr(nn, kind)
    torch.testing.assert_close(reverted(x), expected)


def test_models_without_recurrence_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    layer = model[0]
    assert rnnkern.convert(model) is model
    assert model[0] is layer
    assert type(layer) is nn.Linear


class Doubled(nn.LSTM):
    """A user's own class, whose forward must go on being called."""

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None):
        y, state = super().forward(input, hx)
        return y * 2, state


def test_subclasses_keep_their_behaviour() -> None:
    model = nn.Sequential(Doubled(4, 6))
    x = torch.randn(5, 3, 4)
    expected = model(x)[0]
    torch.testing.assert_close(rnnkern.convert(model)(x)[0], expected)
    torch.testing.assert_close(rnnkern.revert(model)(x)[0], expected)
    assert isinstance(model[0], Doubled)


@pytest.mark.parametrize("kind", LAYERS)
def test_parametrized_modules(kind: str) -> None:
    model = nn.Sequential(parametrizations.weight_norm(getattr(nn, kind)(4, 6), "weight_hh_l0"))
    bystander = parametrizations.weight_norm(getattr(nn, kind)(4, 6), "weight_ih_l0")
    before = type(bystander).__mro__
    keys = list(model.state_dict())
    x = torch.randn(5, 3, 4)
    expected = model(x)[0]
    for swap in (rnnkern.convert, rnnkern.revert):
        swap(model)
        assert isinstance(model[0], getattr(rnnkern, kind)) == (swap is rnnkern.convert)
        assert list(model.state_dict()) == keys
        output = model(x)[0]
        torch.testing.assert_close(output, expected)
        output.sum().backward()
        assert model[0].parametrizations.weight_hh_l0.original0.grad is not None
        assert type(bystander).__mro__ == before


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_converted_model(model: nn.Module, tokens: Tensor, way) -> None:
    other = way(rnnkern.convert(model))
    assert torch.equal(other(tokens), model(tokens))
    rnnkern.revert(other)
    assert all(type(m).__module__.startswith("rnnkern") for _, m in recurrent(model))


@pytest.mark.parametrize("wrong", [None, "model", nn.LSTM, torch.zeros(2)], ids=str)
def test_only_modules_can_be_converted(wrong: object) -> None:
    for swap in (rnnkern.convert, rnnkern.revert):
        with pytest.raises(TypeError, match="Module"):
            swap(wrong)


def test_converting_a_copy_leaves_the_original_alone() -> None:
    original = weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    converted = rnnkern.convert(copy.deepcopy(original))
    assert isinstance(converted, rnnkern.LSTM)
    assert not isinstance(original, rnnkern.LSTM)
    reverted = rnnkern.revert(copy.deepcopy(converted))
    assert not isinstance(reverted, rnnkern.LSTM)
    assert isinstance(converted, rnnkern.LSTM)


class PlainSubclass(nn.LSTM):
    def reset_parameters(self) -> None:
        for parameter in self.parameters():
            nn.init.constant_(parameter, 0.25)


class CellSubclass(nn.GRUCell):
    note = "a class attribute"


class OwnForward(nn.GRU):
    def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
        y, h = super().forward(input, hx)
        return y * 2, h


class OwnCheck(nn.RNN):
    def check_forward_args(self, *args: Any) -> None:
        pass


@pytest.mark.parametrize("make", [lambda: PlainSubclass(4, 6), lambda: CellSubclass(4, 6)])
def test_a_subclass_that_inherits_forward_is_converted(make: Callable[..., Any]) -> None:
    module = make()
    kind = type(module)
    x = torch.randn(3, 4) if isinstance(module, nn.GRUCell) else torch.randn(5, 3, 4)
    wanted = module(x)
    model = nn.Sequential(module)
    rnnkern.convert(model)
    assert model[0] is module
    assert isinstance(module, kind)
    assert isinstance(module, (rnnkern.LSTM, rnnkern.GRUCell))
    assert type(module).__name__ == kind.__name__
    torch.testing.assert_close(module(x), wanted)
    assert "Explanation" in type(rnnkern.explain(module, x)).__name__
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module)):
        assert type(other) is type(module)
        torch.testing.assert_close(other(x), wanted)
    assert rnnkern.revert(model)[0] is module
    assert type(module) is kind
    torch.testing.assert_close(module(x), wanted)


def test_a_parametrized_subclass_is_converted() -> None:
    module = PlainSubclass(4, 6)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(5, 3, 4)
    wanted = module(x)
    rnnkern.convert(module)
    assert isinstance(module, (PlainSubclass, rnnkern.LSTM))
    torch.testing.assert_close(module(x), wanted)
    assert not isinstance(rnnkern.revert(module), rnnkern.LSTM)
    torch.testing.assert_close(module(x), wanted)


def test_classes_derived_from_a_converted_one_are_copied_as_they_are() -> None:
    module = rnnkern.convert(PlainSubclass(4, 6))
    module.__class__ = type("Managed", (type(module),), {})  # as FSDP does
    assert type(copy.deepcopy(module)) is type(module)
    module = rnnkern.convert(PlainSubclass(4, 6))
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    with pytest.raises(RuntimeError, match="parametrized"):
        pickle.dumps(module)


class Registered(nn.GRU):
    def __init_subclass__(cls, *, tag: str) -> None:
        super().__init_subclass__()


def test_a_class_that_nothing_derives_from_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["rnnkern.convert"], "_named", set())
    model = nn.Sequential(nn.GRU(4, 4), Registered(4, 6), nn.GRU(6, 3))
    with pytest.warns(UserWarning, match=r"Registered .1. .*no class can be derived.*tag"):
        rnnkern.convert(model)
    assert [type(each) for each in model] == [rnnkern.GRU, Registered, rnnkern.GRU]


@pytest.mark.parametrize(("kind", "named"), [(OwnForward, "forward"), (OwnCheck, "check_forward")])
def test_what_is_left_alone_is_named_once(
    kind: type[nn.Module], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["rnnkern.convert"], "_named", set())
    model = nn.ModuleDict({"decoder": kind(4, 6), "other": kind(4, 6)})
    with pytest.warns(UserWarning, match=f"{kind.__name__} .decoder. .* overrides {named}") as told:
        rnnkern.convert(model)
    assert len(told) == 1
    assert type(model["decoder"]) is kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rnnkern.convert(model)
