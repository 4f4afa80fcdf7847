"""Small programs after public reports about recurrent layers, of torch.nn and of packages that
took its place: each is what a user would run, and shows the right behaviour beside torch.nn with
the same weights. The docstring of a test names the reports.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import oracle
import pytest
import torch
from support import (
    CELLS,
    LAYERS,
    Leaves,
    Tagger,
    assert_agree,
    build,
    check,
    evaluate,
    in_a_process,
    leaves_for,
    pair,
    plain,
    reverted,
)
from torch import Tensor, fx, nn

import rnnkern

# Outputs that are changed in place


def residual_in_place(module: nn.Module, leaves: Leaves) -> Any:
    y, state = plain(module, leaves)
    y += leaves["x"]
    return nn.ReLU(inplace=True)(y), state


def residual(module: nn.Module, leaves: Leaves) -> Any:
    y, state = plain(module, leaves)
    return (y + leaves["x"]).relu(), state


@pytest.mark.parametrize("kind", LAYERS)
def test_a_residual_connection_in_place_has_the_gradients_of_a_copy(kind: str) -> None:
    """lucidrains/x-transformers pull request 55, pytorch/rl issue 1742.

    torch.nn's LSTM refuses this, so torch.nn does it out of place here.
    """
    module = build(kind, 4, 4)
    check(module, leaves_for(module, 5, 3), residual_in_place, oracle_call=residual)


# Tools that read a model


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_fx_traces_a_model_and_makes_one_node_of_the_module(kind: str) -> None:
    """pytorch issue 44802, pytorch pull request 55494."""
    module = build(kind, 4, 6)
    model = nn.Sequential(module) if kind in CELLS else Tagger(module, 6)
    x = torch.randn(3, 4) if kind in CELLS else torch.randn(5, 3, 4)
    traced = fx.symbolic_trace(model)
    called = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    assert called == (["0"] if kind in CELLS else ["rnn", "head"])
    assert str(traced.graph) == str(fx.symbolic_trace(reverted(model)).graph)
    torch.testing.assert_close(traced(x), reverted(model)(x))


class Decoder(nn.Module):
    """A loop over steps, of which a trace would fix the number."""

    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        h = self.cell(x[0])
        for step in x[1:]:
            h = self.cell(step, h)
        return h


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated")
@pytest.mark.parametrize("kind", [*LAYERS, "GRUCell"])
def test_a_scripted_model_runs_for_any_number_of_steps(kind: str) -> None:
    """pytorch issues 32976 and 56183."""
    module, x = build(kind, 4, 6), torch.randn(5, 3, 4)
    model = Decoder(module) if kind in CELLS else Tagger(module, 6)
    of_torch, scripted = reverted(model), torch.jit.script(model)
    assert scripted.code
    for steps in (5, 2):
        torch.testing.assert_close(scripted(x[:steps]), of_torch(x[:steps]))


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_dynamic_quantization_does_not_pass_over_a_layer(kind: str) -> None:
    """pytorch pull request 25954, pytorch issue 32676, Lyken17/pytorch-OpCounter issue 67."""
    from torch.ao.quantization import quantize_dynamic

    model, x = Tagger(build(kind, 4, 6), 6).eval(), torch.randn(5, 3, 4)
    small = quantize_dynamic(model, {getattr(rnnkern, kind), nn.Linear}, dtype=torch.qint8)
    wanted = quantize_dynamic(reverted(model), {getattr(nn, kind), nn.Linear}, dtype=torch.qint8)
    assert "quantized" in type(small.rnn).__module__
    assert type(small.rnn) is type(wanted.rnn)
    torch.testing.assert_close(small(x), wanted(x))


ELSEWHERE = """
import sys
assert "rnnkern" not in sys.modules
sys.modules["rnnkern"] = None  # it cannot be imported
import torch
x, wanted = torch.load(data)
torch.testing.assert_close(torch.export.load(program).module()(x), wanted)
"""


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_exported_model_runs_where_only_torch_is_installed(tmp_path: Path) -> None:
    """pytorch issue 143786, Xilinx/brevitas issue 1544, pytorch/executorch issue 7454."""
    model, x = Tagger(build("LSTM", 4, 6), 6).eval(), torch.randn(5, 3, 4)
    exported = torch.export.export(model, (x,))
    called = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert "aten.lstm.input" in called
    assert not [name for name in called if not name.startswith(("aten.", "<built-in function"))]
    program, data = str(tmp_path / "model.pt2"), str(tmp_path / "data.pt")
    torch.export.save(exported, program)
    torch.save((x, reverted(model)(x).detach()), data)
    in_a_process(exec, ELSEWHERE, {"program": program, "data": data})


# Weights and attributes that a user puts into a module


def drop_connect(lib: ModuleType, kind: str) -> nn.Module:
    """As public code does it: other weights are in the list of weights during a call.

    Every other column of the recurrent weights is dropped, and no random ones, so that two
    libraries drop the same.
    """

    class DropConnect(getattr(lib, kind)):  # type: ignore[misc]
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            kept, names = self._flat_weights, self._flat_weights_names
            self._flat_weights = [
                w * (torch.arange(w.shape[1]) % 2) if name.startswith("weight_hh") else w
                for name, w in zip(names, kept, strict=True)
            ]
            try:
                return super().forward(input, hx)
            finally:
                self._flat_weights = kept

    return DropConnect(4, 6)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_that_drop_connect_puts_into_the_list_are_used(kind: str) -> None:
    """allenai/allennlp pull request 3357, pytorch issue 65311."""
    ours, theirs = drop_connect(rnnkern, kind), drop_connect(nn, kind)
    theirs.load_state_dict(ours.state_dict())
    leaves = leaves_for(ours, 5, 3)
    got = evaluate(ours, leaves)
    assert_agree(got, evaluate(theirs, leaves), evaluate(copy.deepcopy(theirs).double(), leaves))
    assert not torch.allclose(got["out.0"], evaluate(oracle.twin(ours), leaves)["out.0"])
    assert not got["dweight_hh_l0"][:, ::2].any()  # nothing comes through a dropped weight


def shadow(module: nn.Module) -> None:
    module.__dict__["weight_hh_l0"] = torch.zeros_like(module.weight_hh_l0)


def replace(module: nn.Module) -> None:
    weight = module._parameters.pop("weight_hh_l0")
    module.weight_hh_l0 = torch.zeros_like(weight)


@pytest.mark.parametrize("put", [shadow, replace])
@pytest.mark.parametrize("kind", LAYERS)
def test_a_tensor_in_place_of_a_parameter_is_used(kind: str, put: Callable[..., None]) -> None:
    """pytorch issue 32346."""
    ours, theirs = pair(kind, 4, 6)
    put(ours)
    nn.init.zeros_(theirs.weight_hh_l0)
    x = torch.randn(5, 3, 4)
    torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("kind", CELLS)
def test_a_cell_may_have_an_attribute_called_mode(kind: str) -> None:
    """sjoerdvansteenkiste/Neural-EM issue 4, torchmd/torchmd-net issue 10."""

    class Sampler(getattr(rnnkern, kind)):  # type: ignore[misc]
        mode = "sample"

    ours, theirs = pair(kind, 4, 5)
    ours.mode = theirs.mode = "sample"
    derived = Sampler(4, 5)
    derived.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4)
    for cell in (ours, derived, rnnkern.convert(copy.deepcopy(theirs))):
        assert isinstance(cell, getattr(rnnkern, kind))
        torch.testing.assert_close(cell(x), theirs(x))
        assert cell.mode == "sample"


# States that do not fit

MALFORMED: dict[str, tuple[Tensor, Any, str]] = {
    "states of three rows for one": (torch.zeros(5), (torch.zeros(3, 3),) * 2, "(3, 3)"),
    "one tensor of three rows": (torch.zeros(5), torch.zeros(3, 3), "tuple of two tensors"),
    "one tensor for the pair": (torch.zeros(3, 5), torch.zeros(2, 3, 3), "tuple of two tensors"),
}


def refusal_of(case: str) -> str:
    """What the exception says; a signal would end the process."""
    with pytest.raises((RuntimeError, TypeError)) as caught:
        rnnkern.LSTMCell(5, 3)(*MALFORMED[case][:2])
    return str(caught.value)


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_states_of_a_cell_are_an_exception(case: str) -> None:
    """pytorch issues 193823 and 175978: torch.nn's cell may kill the process."""
    assert MALFORMED[case][2] in in_a_process(refusal_of, case)


# Hooks on what is saved for backward


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_hook_has_logged_is_the_same_after_backward(kind: str) -> None:
    """pytorch pull requests 62362 and 198016."""
    logged: list[tuple[Tensor, Tensor]] = []

    def log(t: Tensor) -> Tensor:
        logged.append((t, t.detach().clone()))
        return t

    def with_log(module: nn.Module, leaves: Leaves) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(log, lambda t: t):
            return plain(module, leaves)

    module = build(kind, 8, 16)
    check(module, leaves_for(module, 20, 4, hx=False), with_log, oracle_call=plain)
    assert len(logged) > 3
    assert all(torch.equal(t.detach(), before) for t, before in logged)
