"""Tools that find modules by their exact type: quantization, and programs that count operations."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from support import CELLS, Tagger, build, reverted
from torch import nn

import rnnkern
from rnnkern.interop import by_type

Module = Callable[..., Any]


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
    wanted = quantize(reverted(model), SPECS[spec](nn, kind), dtype=torch.qint8)
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
def test_what_is_not_quantized_keeps_its_options(quantize: Module) -> None:
    model = nn.Sequential(build("GRU", 4, 4, zoneout=0.0, orthogonal=True))
    made = quantize(model, {nn.Linear})
    for each in (model, made):
        assert str(each[0]) == "GRU(4, 4, orthogonal=True)"
        each[0].zoneout = 0.5
        assert "zoneout=0.5" in str(each[0])


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
    wanted = convert_fx(prepare_fx(reverted(model), theirs, (x,)))
    assert type(small.rnn) is type(wanted.rnn)
    assert "quantized" in type(small.rnn).__module__
    torch.testing.assert_close(small(x), wanted(x))
    assert type(model.rnn) is getattr(rnnkern, kind)


@pytest.mark.cpu_only
@pytest.mark.parametrize("key", ["object_type", "module_name_object_type_order", "custom"])
def test_quantization_of_graphs_finds_types_in_other_places(key: str, quantize: Module) -> None:
    from torch.ao import nn as ao
    from torch.ao.quantization import default_dynamic_qconfig as config
    from torch.ao.quantization import default_qconfig
    from torch.ao.quantization.quantize_fx import prepare_fx

    def prepared(model: nn.Module, kind: type[nn.Module]) -> tuple[type[nn.Module], bool]:
        custom: dict[str, Any] = {}
        mapping: dict[str, Any] = {"object_type": [(kind, config)]}
        if key == "module_name_object_type_order":
            mapping = {key: [("", kind, 0, config)]}
        if key == "custom":
            mapping = {"": default_qconfig}
            table = {"static": {kind: ao.quantizable.LSTM}}
            custom = {"float_to_observed_custom_module_class": table}
        made = prepare_fx(model, mapping, (x,), prepare_custom_config=custom)
        return type(made.rnn), getattr(made.rnn, "qconfig", None) is not None

    model, x = Tagger(build("LSTM", 4, 6), 6).eval(), torch.randn(5, 3, 4)
    wanted = prepared(reverted(model), nn.LSTM)
    assert prepared(model, rnnkern.LSTM) == wanted
    assert wanted == (ao.quantizable.LSTM if key == "custom" else nn.LSTM, True)
    assert type(model.rnn) is rnnkern.LSTM


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["LSTM", "GRU", *CELLS])
def test_a_quantized_module_made_of_a_float_one(kind: str, quantize: Module) -> None:
    from torch.ao import nn as ao
    from torch.ao.quantization import default_dynamic_qconfig

    module, x = (
        build(kind, 4, 6).eval(),
        torch.randn(3, 4) if kind in CELLS else torch.randn(5, 3, 4),
    )
    module.qconfig = default_dynamic_qconfig
    of = getattr(ao.quantized.dynamic, kind)
    made, wanted = (of.from_float(each)(x) for each in (module, reverted(module)))
    torch.testing.assert_close(made, wanted)
    assert type(module) is getattr(rnnkern, kind)
    with torch.no_grad():
        module(x)


@pytest.mark.cpu_only
def test_a_layer_that_is_observed_by_a_class_of_its_own(quantize: Module) -> None:
    from torch.ao import nn as ao
    from torch.ao.quantization import get_default_qconfig, prepare

    model = Tagger(build("LSTM", 4, 6), 6).eval()
    model.qconfig = get_default_qconfig("fbgemm")
    table = {"float_to_observed_custom_module_class": {rnnkern.LSTM: ao.quantizable.LSTM}}
    assert type(prepare(model, prepare_custom_config_dict=table).rnn) is ao.quantizable.LSTM
    assert type(model.rnn) is rnnkern.LSTM


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


class _DictOfItsOwn(dict[str, Any]):
    def __init__(self) -> None:
        super().__init__()


def test_example_inputs_stay_as_they_are() -> None:
    """They may be of any class, whose constructor nobody knows."""
    from torch.ao.quantization.qconfig_mapping import QConfigMapping
    from torch.ao.quantization.quantize_fx import prepare_fx

    given = _DictOfItsOwn()
    given["x"] = torch.randn(1, 2)
    model = nn.Sequential(nn.Linear(2, 2)).eval()
    assert isinstance(prepare_fx(model, QConfigMapping(), (given,)), torch.fx.GraphModule)
