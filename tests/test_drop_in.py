"""What public code does with torch.nn's recurrent modules, beyond calling them: it works here too.

Each test names a kind of surprise; the cases are of different places and tools.
"""

from __future__ import annotations

import copy
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import processes
import pytest
import torch
from support import CELLS, LAYERS, build, in_a_process, pack_rows
from torch import Tensor, fx, nn
from torch.nn.utils.rnn import PackedSequence

import rnnkern
from rnnkern.interop import by_type

Module = Callable[..., Any]


def twin(module: nn.Module) -> nn.Module:
    """torch.nn's module with the same weights."""
    return rnnkern.revert(copy.deepcopy(module))


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module, features: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y)


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


# An output that its caller changes in place.

EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda y: y.add_(1.5),
    "relu": lambda y: y.relu_(),
    "scale": lambda y: y.mul_(2).sub_(0.5),
    "zero": lambda y: y.zero_(),
    "one step": lambda y: y.index_fill_(0, torch.tensor([0]), 0.25),
    "a view": lambda y: y[1:].mul_(3)._base,  # type: ignore[return-value]
    "two edits": lambda y: y.add_(y.detach()).tanh_(),
    "module": lambda y: nn.ReLU(inplace=True)(y),
    "threshold": lambda y: nn.functional.threshold_(y, 0.1, 0.0),
}
SIZES = {"small": (5, 3, 4, 6), "large": (40, 16, 4, 33)}  # in memory of its own, and of torch


def edited(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor], *, copies: bool) -> Any:
    y, state = module(x)
    y = edit(y.clone() if copies else y)
    loss = y.square().sum() + sum(
        s.sum() for s in (state if isinstance(state, tuple) else (state,))
    )
    return [y.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_changed_in_place(kind: str, size: str, edit: str) -> None:
    """The gradients are those of the same edits of a copy."""
    T, N, inputs, H = SIZES[size]
    module = build(kind, inputs, H)
    x = torch.randn(T, N, inputs)
    got = edited(module, x, EDITS[edit], copies=False)
    wanted = edited(module, x, EDITS[edit], copies=True)
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bidirectional": True},
        {"num_layers": 2},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_of_other_layers_changed_in_place(
    kind: str, size: str, options: dict[str, Any]
) -> None:
    T, N, inputs, H = SIZES[size]
    module = build(kind, inputs, H, **options)
    x = torch.randn(T, N, inputs)
    for edit in ("scale", "relu"):
        got = edited(module, x, EDITS[edit], copies=False)
        wanted = edited(module, x, EDITS[edit], copies=True)
        for mine, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, other)


def packed_call(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    packed = pack_rows([row[: 2 + i] for i, row in enumerate(x)], enforce_sorted=False)
    y, _ = module(packed)
    return edit(y.data)


def ragged_call(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    lengths = torch.arange(2, 2 + x.shape[1]).clamp(max=x.shape[0])
    return edit(module(x, lengths=lengths)[0])


def unbatched_call(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    return edit(module(x[:, 0])[0])


@pytest.mark.parametrize("call", [packed_call, ragged_call, unbatched_call])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_calls_whose_output_is_changed_in_place(kind: str, call: Module) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)
    results = []
    for copies in (False, True):

        def edit(y: Tensor, copies: bool = copies) -> Tensor:
            return (y.clone() if copies else y).mul_(2).relu_()

        y = call(module, x, edit)
        results.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_changed_in_place_under_other_modes(kind: str) -> None:
    """Second derivatives, deterministic algorithms, and a transform of torch.func."""
    module = build(kind, 4, 6, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(x: Tensor, copies: bool) -> Tensor:
        y = module(x)[0]
        y = (y.clone() if copies else y).mul_(2)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return dx.square().sum()

    def total(x: Tensor, copies: bool) -> Tensor:
        y = module(x)[0]
        return (y.clone() if copies else y).mul_(2).pow(3).sum()

    for function in (
        lambda copies: torch.autograd.grad(penalty(x, copies), x)[0],
        lambda copies: torch.func.grad(total)(x, copies),
    ):
        torch.testing.assert_close(function(False), function(True))
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(
        *(torch.autograd.grad(total(x, copies), x)[0] for copies in (False, True))
    )


def test_an_output_that_nobody_changes_is_not_copied() -> None:
    """torch copies the large one when it is written to, and no sooner."""
    y, _ = build("GRU", 4, 33)(torch.randn(40, 16, 4))
    is_shared = torch._C._is_cow_tensor
    before = y.detach().clone()
    assert is_shared(y)
    y.data.mul_(2)
    assert not is_shared(y)
    assert torch.equal(y, 2 * before)


# Tracers and compilers of modules.


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_one_node_of_fx(kind: str) -> None:
    x = torch.randn(5, 3, 4)
    model = Tagger(build(kind, 4, 6), 6)
    traced = fx.symbolic_trace(model)
    of_torch = fx.symbolic_trace(twin(model))
    assert [(n.op, str(n.target)) for n in traced.graph.nodes] == [
        (n.op, str(n.target)) for n in of_torch.graph.nodes
    ]
    assert str(traced.graph) == str(of_torch.graph)
    assert torch.equal(traced(x), model(x))


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
    wanted = twin(model)(x)
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


# Tools that look for the exact type.


@pytest.fixture
def quantize(monkeypatch: pytest.MonkeyPatch) -> Iterator[Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch.ao.quantization import quantize_dynamic

        yield quantize_dynamic


SPECS: dict[str, Callable[[ModuleType, str], Any]] = {
    "default": lambda lib, kind: None,
    "ours": lambda lib, kind: {getattr(rnnkern, kind), nn.Linear},
    "torch's": lambda lib, kind: {getattr(nn, kind), nn.Linear},
    "by name": lambda lib, kind: {"rnn", "head"},
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_quantization_finds_a_layer(kind: str, spec: str, quantize: Module) -> None:
    model, x = Tagger(build(kind, 4, 6), 6).eval(), torch.randn(5, 3, 4)
    wanted = quantize(twin(model), SPECS[spec](nn, kind), dtype=torch.qint8)
    small = quantize(model, SPECS[spec](rnnkern, kind), dtype=torch.qint8)
    assert type(small.rnn) is type(wanted.rnn)
    assert "quantized" in type(small.rnn).__module__
    torch.testing.assert_close(small(x), wanted(x))
    assert type(model.rnn) is getattr(rnnkern, kind)  # the model itself is not changed


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", CELLS)
def test_quantization_finds_a_cell(kind: str, quantize: Module) -> None:
    model = nn.Sequential(build(kind, 4, 6)).eval()
    small = quantize(model)
    assert "quantized" in type(small[0]).__module__
    assert type(model[0]) is getattr(rnnkern, kind)


@pytest.mark.cpu_only
def test_what_is_not_quantized_stays_as_it_was(quantize: Module) -> None:
    model = nn.Sequential(build("RNN", 4, 6), nn.Linear(6, 2)).eval()
    small = quantize(model)
    assert type(small[0]) is rnnkern.RNN
    assert "quantized" in type(small[1]).__module__
    quantize(model, inplace=True)
    assert type(model[0]) is rnnkern.RNN
    assert "quantized" in type(model[1]).__module__


@pytest.mark.cpu_only
@pytest.mark.parametrize("own_type", [True, False])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_quantization_of_graphs_finds_a_layer(kind: str, own_type: bool, quantize: Module) -> None:
    from torch.ao.quantization import QConfigMapping, default_dynamic_qconfig
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    model, x = Tagger(build(kind, 4, 6), 6).eval(), torch.randn(5, 3, 4)
    config = QConfigMapping().set_object_type(getattr(rnnkern, kind), default_dynamic_qconfig)
    for other in (nn.Linear, getattr(nn, kind)):
        config.set_object_type(other, default_dynamic_qconfig)
    if own_type:
        del config.object_type_qconfigs[getattr(nn, kind)]
    theirs = QConfigMapping().set_global(default_dynamic_qconfig)
    small = convert_fx(prepare_fx(model, config, (x,)))
    wanted = convert_fx(prepare_fx(twin(model), theirs, (x,)))
    assert type(small.rnn) is type(wanted.rnn)
    assert "quantized" in type(small.rnn).__module__
    torch.testing.assert_close(small(x), wanted(x))
    assert type(model.rnn) is getattr(rnnkern, kind)


def test_tables_of_programs_that_count_operations() -> None:
    """They are changed once they are imported: here is what is done to them."""

    class Program(ModuleType):
        table: dict[type, Any]

    program = Program("program")
    program.table = {nn.LSTM: "count_lstm", nn.GRUCell: "count_cell", nn.Linear: "count"}
    by_type._add_entries(program, "table")
    assert program.table[rnnkern.LSTM] == "count_lstm"
    assert program.table[rnnkern.GRUCell] == "count_cell"
    assert rnnkern.GRU not in program.table
    assert len(program.table) == 5
    by_type._add_entries(program, "no such table")


@pytest.mark.ecosystem
@pytest.mark.parametrize("module", by_type._TABLES)
def test_operations_are_counted_where_the_program_is_installed(module: str) -> None:
    program = pytest.importorskip(module)
    entries = getattr(program, by_type._TABLES[module])
    assert entries[rnnkern.LSTM] is entries[nn.LSTM]


# Weights that are put elsewhere.


def without_recurrence(module: nn.Module) -> nn.Module:
    other = twin(module)
    for name, parameter in other.named_parameters():
        if "hh" in name:
            nn.init.zeros_(parameter)
    return other


def swap_list(module: Any, x: Tensor) -> Any:
    kept, names = module._flat_weights, module._flat_weights_names
    module._flat_weights = [w * 0 if "hh" in n else w for w, n in zip(kept, names, strict=True)]
    try:
        return module(x)
    finally:
        module._flat_weights = kept


def change_list(module: Any, x: Tensor) -> Any:
    kept = list(module._flat_weights)
    for i, name in enumerate(module._flat_weights_names):
        if "hh" in name:
            module._flat_weights[i] = torch.zeros_like(kept[i])
    try:
        return module(x)
    finally:
        module._flat_weights[:] = kept


def shadow(module: Any, x: Tensor) -> Any:
    names = [name for name in module._flat_weights_names if "hh" in name]
    for name in names:
        module.__dict__[name] = torch.zeros_like(getattr(module, name))
    try:
        return module(x)
    finally:
        for name in names:
            del module.__dict__[name]


def replace(module: Any, x: Tensor) -> Any:
    """As torch.nn.utils.weight_norm did it: the parameter is gone, a tensor has its name."""
    for name in module._flat_weights_names:
        if "hh" in name:
            weight = getattr(module, name)
            del module._parameters[name]
            setattr(module, name, torch.zeros_like(weight))
    return module(x)


@pytest.mark.parametrize("put", [swap_list, change_list, shadow, replace])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_weights_that_count(kind: str, options: dict[str, Any], put: Module) -> None:
    module, x = build(kind, 4, 6, **options), torch.randn(5, 3, 4)
    before, plain = without_recurrence(module)(x)[0], module(x)[0]
    torch.testing.assert_close(put(module, x)[0], before)
    if put is not replace:
        assert torch.equal(module(x)[0], plain)


class DroppedRecurrence(rnnkern.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        kept, names = self._flat_weights, self._flat_weights_names
        self._flat_weights = [w * 0 if "hh" in n else w for w, n in zip(kept, names, strict=True)]
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = kept


@pytest.mark.cpu_only
def test_the_weights_that_count_in_a_compiled_call() -> None:
    module, x = DroppedRecurrence(4, 6), torch.randn(5, 3, 4)
    plain = rnnkern.LSTM(4, 6)
    plain.load_state_dict(module.state_dict())
    wanted = without_recurrence(plain)(x)[0]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager")(x)[0], wanted)
    kept = list(plain._flat_weights)
    plain._flat_weights = [
        w * 0 if "hh" in n else w for w, n in zip(kept, plain._flat_weights_names, strict=True)
    ]
    torch.testing.assert_close(torch.compile(plain, backend="eager")(x)[0], wanted)


def test_dropped_weights_have_gradients() -> None:
    class DropConnect(rnnkern.GRU):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
            kept = self._flat_weights
            self._flat_weights = [w * 0.5 for w in kept]
            try:
                return super().forward(input, hx)
            finally:
                self._flat_weights = kept

    ours = DropConnect(4, 6)
    theirs = nn.GRU(4, 6)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.5)
    x = torch.randn(5, 3, 4)
    ours(x)[0].sum().backward()
    theirs(x)[0].sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad * 0.5)


# Names.


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_no_public_name_that_torch_nn_lacks(kind: str) -> None:
    ours, theirs = getattr(rnnkern, kind), getattr(nn, kind)

    def public(thing: Any) -> set[str]:
        return {name for name in dir(thing) if not name.startswith("_")}

    assert public(ours) == public(theirs)
    assert public(ours(4, 5)) == public(theirs(4, 5))


@pytest.mark.parametrize("name", ["mode", "cell", "kind", "layer", "steps", "lengths", "kernel"])
@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_may_have_any_attribute(kind: str, name: str) -> None:
    module, x = build(kind, 4, 5), torch.randn(3, 4)
    wanted = module(x)
    setattr(module, name, "greedy")
    assert getattr(module, name) == "greedy"
    torch.testing.assert_close(module(x), wanted)
    theirs = twin(module)
    assert getattr(rnnkern.convert(theirs), name) == "greedy"
    torch.testing.assert_close(theirs(x), wanted)


# Malformed states.


@pytest.mark.cpu_only
def test_no_malformed_state_kills_the_process() -> None:
    """Thousands of calls in one process of its own: each is an exception, or torch.nn's result."""
    killed, calls = in_a_process(processes.malformed_states)
    assert killed == []
    assert calls > 2000


# Hooks of saved tensors.


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_backward_writes_into_nothing_that_a_hook_has_seen(
    kind: str, options: dict[str, Any]
) -> None:
    module, kept = build(kind, 8, 16, **options), []

    def pack(t: Tensor) -> Tensor:
        kept.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = module(torch.randn(20, 4, 8))
    y.sum().backward()
    assert len(kept) > 3
    assert all(torch.equal(t.detach(), before) for t, before in kept)


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_writes_into_nothing_that_a_node_shows(kind: str) -> None:
    y, _ = build(kind, 8, 16)(torch.randn(20, 4, 8))
    shown = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    before = [t.detach().clone() for t in shown]
    y.sum().backward()
    assert all(torch.equal(t.detach(), b) for t, b in zip(shown, before, strict=True))


# Subclasses.


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
def test_a_subclass_that_inherits_forward_is_converted(make: Module) -> None:
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


@pytest.mark.parametrize("kind", CELLS)
def test_explain_takes_cells(kind: str) -> None:
    explanation = str(rnnkern.explain(build(kind, 4, 6), torch.randn(3, 4)))
    assert "T=1 N=3 I=4 H=6" in explanation
    assert "forward" in explanation
    with pytest.raises(TypeError, match=rf"rnnkern.*torch.nn.{kind}"):
        rnnkern.explain(getattr(nn, kind)(4, 6), torch.randn(3, 4))


def test_packed_sequences_are_still_packed() -> None:
    packed = pack_rows([torch.randn(3, 4), torch.randn(2, 4)])
    assert isinstance(build("LSTM", 4, 6)(packed)[0], PackedSequence)
