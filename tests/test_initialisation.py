"""The constructor's options that change the first parameters and nothing else."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rnnkern

I, H = 3, 4
LAYERS = (rnnkern.RNN, rnnkern.LSTM, rnnkern.GRU)
CELLS = (rnnkern.RNNCell, rnnkern.LSTMCell, rnnkern.GRUCell)
WITH_FORGET_GATE = (rnnkern.LSTM, rnnkern.LSTMCell)


def gates(module: nn.Module, prefix: str) -> list[Tensor]:
    """The rows of each gate of all parameters of that name."""
    found = [p.detach() for name, p in module.named_parameters() if name.startswith(prefix)]
    return [gate for p in found for gate in p.split(H)]


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_a_default_changes_nothing(kind: Any) -> None:
    torch.manual_seed(0)
    ours = kind(I, H)
    torch.manual_seed(0)
    theirs = getattr(nn, kind.__name__)(I, H)
    assert vars(ours).keys() == vars(theirs).keys()
    assert str(ours) == str(theirs)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], weight)


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_recurrent_blocks_are_orthogonal(kind: Any, dtype: torch.dtype) -> None:
    module = kind(I, H, orthogonal=True, dtype=dtype)
    blocks = gates(module, "weight_hh")
    assert len({tuple(block.flatten().tolist()) for block in blocks}) == len(blocks)
    for block in blocks:
        unit = block.double() @ block.double().T
        error = (unit - torch.eye(H, dtype=torch.float64)).abs().max()
        assert error < 16 * torch.finfo(dtype).eps


def test_all_layers_and_directions_are_orthogonal() -> None:
    module = rnnkern.LSTM(I, H, num_layers=2, bidirectional=True, proj_size=2, orthogonal=True)
    blocks = gates(module, "weight_hh")
    assert len(blocks) == 2 * 2 * 4
    for block in blocks:  # [H, P]: its columns are orthogonal
        assert torch.allclose(block.T @ block, torch.eye(2), atol=1e-5)


@pytest.mark.parametrize("kind", WITH_FORGET_GATE)
def test_forget_bias_is_the_sum_of_both_biases(kind: Any) -> None:
    torch.manual_seed(0)
    module = kind(I, H, forget_bias=1)
    torch.manual_seed(0)
    plain = kind(I, H)
    for prefix, wanted in (("bias_ih", 1.0), ("bias_hh", 0.0)):
        for gate, (own, default) in enumerate(
            zip(gates(module, prefix), gates(plain, prefix), strict=True)
        ):
            assert torch.equal(own, torch.full((H,), wanted) if gate == 1 else default)


@pytest.mark.parametrize("kind", WITH_FORGET_GATE)
def test_reset_parameters_keeps_the_options(kind: Any) -> None:
    module = kind(I, H, forget_bias=2.0, orthogonal=True)
    before = {name: p.clone() for name, p in module.state_dict().items()}
    module.reset_parameters()
    assert not torch.equal(module.state_dict()[next(iter(before))], next(iter(before.values())))
    assert torch.equal(gates(module, "bias_ih")[1], torch.full((H,), 2.0))
    for block in gates(module, "weight_hh"):
        assert torch.allclose(block @ block.T, torch.eye(H), atol=1e-5)


def test_a_meta_module_is_initialised_later() -> None:
    module = rnnkern.LSTM(I, H, forget_bias=1.0, orthogonal=True, device="meta")
    module.to_empty(device=torch.get_default_device()).reset_parameters()
    assert torch.equal(gates(module, "bias_ih")[1], torch.ones(H))


def test_copies_pickles_and_prints_have_the_options() -> None:
    module = rnnkern.LSTM(I, H, forget_bias=1.0, orthogonal=True)
    assert str(module) == "LSTM(3, 4, orthogonal=True, forget_bias=1.0)"
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(again) == str(module)
        assert again.state_dict().keys() == nn.LSTM(I, H).state_dict().keys()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forget_bias": "1"}, TypeError, "forget_bias must be a number, got str"),
        ({"forget_bias": True}, TypeError, "forget_bias must be a number, got bool"),
        ({"forget_bias": float("nan")}, ValueError, "forget_bias must be finite, got nan"),
        ({"forget_bias": 1.0, "bias": False}, ValueError, "needs bias=True, got bias=False"),
        ({"orthogonal": 1}, TypeError, "orthogonal must be a bool, got int"),
    ],
)
@pytest.mark.parametrize("kind", WITH_FORGET_GATE)
def test_wrong_values(kind: Any, options: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kind(I, H, **options)


@pytest.mark.parametrize("kind", [rnnkern.GRU, rnnkern.RNN, rnnkern.GRUCell])
def test_only_an_lstm_has_a_forget_gate(kind: Any) -> None:
    with pytest.raises(TypeError, match="forget_bias"):
        kind(I, H, forget_bias=1.0)


def test_forget_bias_of_an_own_cell_is_that_of_its_gate_f() -> None:
    options = {"num_layers": 2, "bidirectional": True, "forget_bias": 3}
    layer = rnnkern.Recurrent(rnnkern.cells.mgu, I, H, **options)
    assert rnnkern.cells.mgu.gates == ("f", "g")
    for module in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        module.reset_parameters()
        for end in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"):
            bias = getattr(module, f"bias_ih{end}") + getattr(module, f"bias_hh{end}")
            assert torch.equal(bias[:H], torch.full((H,), 3.0))
            assert not (bias[H:] == 3).any()
        assert str(module).endswith("forget_bias=3.0)")
    with pytest.raises(ValueError, match="named f, the gates of the cell are: r, z, n"):
        rnnkern.Recurrent(rnnkern.cells.gru, I, H, forget_bias=3)
    with pytest.raises(ValueError, match="the gates of the cell are: a"):
        rnnkern.Recurrent(rnnkern.cells.ind_rnn, I, H, forget_bias=3)


def _with_a_parameter(name: str) -> Any:
    def cell(x: Any, h: Any, prev: Any, own: Any) -> Any:
        return rnnkern.tanh(x.a + h.a) + getattr(own, name) * prev.h

    return rnnkern.cell(gates=("a",), parameters=(name,))(cell)


@pytest.mark.parametrize("name", ["gain_u", "bias_c", "bias_cell", "weight_hh2"])
def test_a_parameter_of_a_cell_may_be_named_like_an_option(name: str) -> None:
    """It has torch.nn's uniform numbers, as each parameter of a cell, whatever the options are."""
    cell = _with_a_parameter(name)
    for options in ({}, {"orthogonal": True}, {"layer_norm": True}):
        torch.manual_seed(0)
        module = rnnkern.Recurrent(cell, I, H, num_layers=2, **options)
        for own in (getattr(module, f"{name}_l0"), getattr(module, f"{name}_l1")):
            assert 0 < own.abs().min() <= own.abs().max() <= H**-0.5


def test_other_parameters_of_a_subclass_are_left_alone() -> None:
    class Own(rnnkern.LSTM):
        def __init__(self) -> None:
            super().__init__(I, H, orthogonal=True, forget_bias=1.0)
            self.weight_hh_scale = nn.Parameter(torch.ones(4 * H))
            self.bias_all = nn.Parameter(torch.ones(4 * H))
            self.gain_x = nn.Parameter(torch.ones(2))
            self.bias_head = nn.Linear(2, 2)

    module = Own()
    module.reset_parameters()
    others = [p for name, p in module.named_parameters() if not name.endswith("_l0")]
    assert len(others) == 5
    assert all(0 < p.abs().min() <= p.abs().max() <= H**-0.5 for p in others)
