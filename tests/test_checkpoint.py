"""Gates recomputed in backward: `rnnkern.checkpointed`, and `torch.utils.checkpoint`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_options import SETTINGS
from support import (
    FORMS,
    LAYERS,
    build,
    build_form,
    evaluate,
    flatten,
    leaves_for,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

import rnnkern
from rnnkern import modules


class Segmented(nn.Module):
    """A module that is called through `checkpointed`."""

    def __init__(self, module: nn.Module, every: int) -> None:
        super().__init__()
        self.module, self.every, self.batch_first = module, every, module.batch_first

    def forward(self, x: Any, hx: Any = None, **options: Tensor) -> Any:
        return rnnkern.checkpointed(self.module, x, hx, checkpoint_every=self.every, **options)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    ours = {name.replace("dmodule.", "d"): value for name, value in ours.items()}
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("every", [1, 2, 3, 10])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_the_same_gradients(form: str, setting: str, every: int) -> None:
    option = SETTINGS[setting]
    module, leaves = option.make(form)
    expected = evaluate(module, leaves, option.call)
    same(evaluate(Segmented(module, every), leaves, option.call), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_long_rows_that_end_and_begin(kind: str) -> None:
    module = build(kind, 4, 6, num_layers=2, bidirectional=True, dtype=torch.float64)
    leaves = leaves_for(module, 23, 5)
    lengths, reset = torch.tensor([23, 0, 7, 15, 8]), torch.rand(23, 5) < 0.2

    def call(m: nn.Module, own: Any) -> Any:
        return m(own["x"], states_of(own), lengths=lengths, reset=reset)

    same(evaluate(Segmented(module, 4), leaves, call), evaluate(module, leaves, call))


def kept_for_backward(call: Callable[[], Any]) -> int:
    """Bytes of all storages that a call's graph holds on to."""
    storages: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = call()
    del result
    return sum(t.untyped_storage().nbytes() for t in storages.values())


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_memory_grows_as_segments_and_their_number(kind: str) -> None:
    """Kept beside input, output and weights: a state for each segment, not gates for each step."""
    T, N, H, every = 400, 4, 32, 20
    module, x = build(kind, 8, H), torch.randn(400, 4, 8)
    fixed = x.nbytes + sum(p.nbytes for p in module.parameters())
    states = 2 if kind == "LSTM" else 1
    output = T * N * H * 4
    plainly = kept_for_backward(lambda: module(x))
    segmented = kept_for_backward(lambda: rnnkern.checkpointed(module, x, checkpoint_every=every))
    assert plainly >= fixed + 5 * output
    assert segmented <= fixed + 1.1 * (T // every) * states * N * H * 4


@pytest.mark.parametrize("kind", LAYERS)
def test_a_packed_sequence_under_autocast(kind: str) -> None:
    module, x = build(kind, 3, 6), torch.randn(5, 2, 3)
    packed = pack_padded_sequence(x, torch.tensor([5, 3]))
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        theirs = flatten(module(packed))
        ours = flatten(rnnkern.checkpointed(module, packed, checkpoint_every=2))
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(ours[name], value, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives(kind: str) -> None:
    module = build(kind, 3, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    found = []
    for call in (module, Segmented(module, 2)):
        (gradient,) = torch.autograd.grad(call(x)[0].pow(3).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(gradient.square().sum(), list(module.parameters())))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("mode", ["RNN_TANH", "RNN_RELU", "LSTM", "GRU"])
def test_the_base_class_by_its_mode(mode: str) -> None:
    module, x = nn.RNNBase(mode, 3, 4), torch.randn(5, 2, 3)
    named = {"nonlinearity": mode[4:].lower()} if mode.startswith("RNN") else {}
    theirs = getattr(nn, mode[:3] if named else mode)(3, 4, **named)
    theirs.load_state_dict(module.state_dict())
    ours = flatten(rnnkern.checkpointed(module, x, checkpoint_every=2))
    torch.testing.assert_close(ours, flatten(theirs(x)))


def test_a_cell_of_the_package_that_torch_nn_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mode may begin with the name of a built-in module, which does not run it."""

    class OwnGRU(modules.OwnRNN):
        def __init__(self, *sizes: int, **options: Any) -> None:
            super().__init__("GRU", *sizes, **options)

    layer, x = OwnGRU(3, 5), torch.randn(7, 2, 3)
    monkeypatch.delattr(modules, "GRU")
    y, h_n = rnnkern.checkpointed(layer, x, checkpoint_every=3)
    expected, expected_h_n = layer(x)
    assert torch.equal(y, expected)
    assert torch.equal(h_n, expected_h_n)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_torch_utils_checkpoint(form: str, reentrant: bool) -> None:
    module = build_form(form, 4, 6)
    leaves = leaves_for(module, 5, 3)

    def recomputed(m: nn.Module, own: Any) -> Any:
        def run(*leaves: Tensor) -> tuple[Tensor, ...]:
            named = dict(zip(own, leaves, strict=True))
            return tuple(flatten(plain(m, named)).values())

        return checkpoint(run, *own.values(), use_reentrant=reentrant)

    ours = evaluate(module, leaves, recomputed)
    torch.testing.assert_close(list(ours.values()), list(evaluate(module, leaves).values()))


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("every", "error", "message"),
    [
        (0, ValueError, "at least 1, got 0"),
        (-3, ValueError, "at least 1, got -3"),
        (2.0, TypeError, "must be an int, got float"),
        (True, TypeError, "must be an int, got bool"),
    ],
)
def test_wrong_steps_of_a_segment(every: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rnnkern.checkpointed(nn.GRU(2, 3), torch.zeros(4, 1, 2), checkpoint_every=every)


@pytest.mark.cpu_only
def test_wrong_operands_raise_errors() -> None:
    with pytest.raises(TypeError, match="module must be an RNN, LSTM or GRU"):
        rnnkern.checkpointed(nn.Linear(2, 3), torch.zeros(4, 1, 2), checkpoint_every=2)
    module = rnnkern.GRU(2, 3)
    for x, hx in (
        (torch.zeros(0, 1, 2), None),
        (torch.zeros(4, 1, 2), torch.zeros(1, 2, 3)),
    ):
        with pytest.raises(ValueError, match="states for it"):
            rnnkern.checkpointed(module, x, hx, checkpoint_every=2)
    for x, message in ((torch.zeros(4, 1, 5), "Expected 2, got 5"), (torch.zeros(4, 2), "3 dim")):
        with pytest.raises((RuntimeError, ValueError), match=message):
            rnnkern.checkpointed(module, x, checkpoint_every=2)
    with pytest.raises(ValueError, match="between 0 and the number of steps 4"):
        rnnkern.checkpointed(
            module, torch.zeros(4, 1, 2), checkpoint_every=2, lengths=torch.tensor([9])
        )
