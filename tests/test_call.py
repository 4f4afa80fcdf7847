"""A call, read once: `rnnkern.call`."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from support import build, pack_rows
from torch import nn

import rnnkern
from rnnkern import _C, call, kernels
from rnnkern.call import Call
from rnnkern.kernels import Refusal, Why
from rnnkern.known_cells import CELLS, MODES
from rnnkern.layer import PACKED, Layer, Operands
from rnnkern.options import Options
from rnnkern.sequence import Steps, is_packed

pytestmark = pytest.mark.cpu_only

LAYER = Layer("GRU", 2, True, False, False, False, False)


@pytest.mark.parametrize(
    ("given", "sizes"),
    [
        (torch.zeros(5, 3, 4), (5, 3)),
        (torch.zeros(5, 4), (5, 1)),
        (pack_rows([torch.zeros(5, 4), torch.zeros(2, 4)]), (5, 2)),
    ],
    ids=["padded", "unbatched", "packed"],
)
def test_what_is_read(given: Any, sizes: tuple[int, int]) -> None:
    module = build("GRU", 4, 6, bidirectional=True)
    found = call.read(module, given)
    assert isinstance(found, Call)
    T, N = sizes
    assert found.T == T
    assert found.N == N
    assert found.layer == LAYER == Layer.of_code(LAYER.code)
    assert is_packed(found.steps) == isinstance(given, nn.utils.rnn.PackedSequence)
    assert len(found.given.weights) == 2 * found.layer.tensors
    kernel = kernels.kernel_of(found.layer, module.hidden_size, module.proj_size)
    assert Layer.of(kernel) == found.layer


@pytest.mark.parametrize(
    ("operands", "text"),
    [
        ((torch.zeros(4),), "axes"),
        ((torch.zeros(0, 3, 4),), "no steps"),
        ((torch.zeros(5, 3, 7),), "4 features, got 7"),
        ((torch.zeros(5, 3, 4), torch.zeros(1, 3, 6)), "h_0 must be a tensor of shape (2, 3, 6)"),
        ((torch.zeros(5, 4), torch.zeros(2, 1, 6)), "hx does not fit an input without a batch"),
        ((pack_rows([torch.zeros(5, 7)]),), "a packed input must be [rows, 4], got (5, 7)"),
    ],
    ids=["axes", "steps", "features", "states", "unbatched", "packed"],
)
def test_what_torch_nn_refuses(operands: tuple[Any, ...], text: str) -> None:
    module = build("GRU", 4, 6, bidirectional=True)
    refusal = call.read(module, *operands)
    assert isinstance(refusal, Refusal)
    assert refusal.why is Why.INVALID
    assert text in refusal.text
    if len(operands) > 1 and operands[0].dim() == 3:
        assert "torch.nn refuses this: h_0" in rnnkern.explain(module, *operands)


def test_why_no_kernel_covers_operands() -> None:
    x, weights = torch.zeros(5, 3, 4), [torch.zeros(6, 4), torch.zeros(6, 6)]
    assert kernels.refusal(Operands(x, None, None, weights)) is None
    for other, why in ((x.mT.contiguous().mT, Why.GAPS), (x.to(torch.int32), Why.OPERAND)):
        refusal = kernels.refusal(Operands(other, None, None, weights))
        assert refusal is not None
        assert refusal.why is why
        assert refusal.text


def test_a_module_with_a_method_of_its_own() -> None:
    module = build("LSTM", 4, 6)
    assert call.refusal_of(module) is None
    module.check_forward_args = lambda *_: None
    refusal = call.refusal_of(module)
    assert refusal is not None
    assert refusal.why is Why.MODULE
    assert "check_forward_args" in refusal.text


OWN_METHOD_CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lengths": ({}, {"lengths": torch.tensor([5, 2, 1])}),
    "reset": ({}, {"reset": torch.zeros(5, 3, dtype=torch.bool)}),
    "reset_to": ({}, {"reset_to": (torch.ones(1, 3, 6), torch.ones(1, 3, 6))}),
    "return_cells": ({}, {"return_cells": True}),
    "layer_norm": ({"layer_norm": True}, {}),
    "zoneout": ({"zoneout": 0.5}, {}),
}


class _Checked(rnnkern.LSTM):
    def check_input(self, *args: Any) -> None:
        raise AssertionError("called")


@pytest.mark.parametrize("given", OWN_METHOD_CALLS)
def test_a_method_of_the_class_is_not_passed_over(given: str) -> None:
    """Only torch.nn's forward calls it, and that takes none of these."""
    options, arguments = OWN_METHOD_CALLS[given]
    module, x = _Checked(4, 6, **options), torch.randn(5, 3, 4)
    if given == "reset_to":
        arguments = {**arguments, "reset": torch.zeros(5, 3, dtype=torch.bool)}
    with pytest.raises(ValueError, match="_Checked has a method check_input of its own"):
        module(x, **arguments)
    if options:
        assert "rnnkern refuses this" in str(rnnkern.explain(module, x))


class _CheckedByTorch(nn.LSTM):
    def check_input(self, *args: Any) -> None:
        raise AssertionError("called")


@pytest.mark.parametrize("kind", [_Checked, _CheckedByTorch])
def test_checkpointed_does_not_pass_over_a_method_of_the_class(kind: type[nn.LSTM]) -> None:
    """It takes layers of torch.nn, too."""
    with pytest.raises(ValueError, match=f"{kind.__name__} has a method check_input of its own"):
        rnnkern.checkpointed(kind(4, 6), torch.randn(5, 3, 4), checkpoint_every=2)


def test_an_own_cell_with_a_method_of_its_own_takes_lengths() -> None:
    class Checked(rnnkern.Recurrent):
        def check_input(self, input: Any, batch_sizes: Any) -> None:
            super().check_input(input, batch_sizes)

    module = Checked(rnnkern.cells.mgu, 4, 6)
    assert module(torch.randn(5, 3, 4), lengths=torch.tensor([5, 2, 1]))[0].shape == (5, 3, 6)


def test_a_cell_that_is_added_changes_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch keeps compiled programs with these numbers on disk."""
    layers = [
        Layer(mode, directions, *flags)
        for mode in CELLS
        for directions in (1, 2)
        for flags in itertools.product((False, True), repeat=5)
    ]
    codes = [each.code for each in layers]
    assert Layer("RNN_TANH", 1, False, False, False, False, False).code == 0
    assert Layer("GRU", 2, True, False, True, False, True).code == 490
    for i in range(9):
        mode, number = f"LATER_{i}", len(_C.CELLS) + i
        monkeypatch.setitem(CELLS, mode, replace(CELLS["GRU"], number=number))
        monkeypatch.setitem(MODES, number, mode)
    assert [each.code for each in layers] == codes
    assert [Layer.of_code(code | PACKED) for code in codes] == layers
    later = [each._replace(mode=f"LATER_{i}") for i in range(9) for each in layers]
    assert [Layer.of_code(each.code) for each in later] == later
    assert not {each.code for each in later} & set(codes)


@pytest.mark.parametrize("kind", [Call, Options, Operands, Steps], ids=lambda kind: kind.__name__)
def test_tuples_have_no_properties(kind: type) -> None:
    """Dynamo of torch 2.10 cannot read one of a tuple that has tensors."""
    assert issubclass(kind, tuple)
    assert not [name for name, value in vars(kind).items() if isinstance(value, property)]
