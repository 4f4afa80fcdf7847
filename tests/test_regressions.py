"""Mistakes that a review found, each with the call that showed it."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from support import build, pack_rows
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.parametrizations import weight_norm

import rnnkern


def pair(kind: str, *sizes: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same parameters."""
    ours = build(kind, *sizes, **options)
    theirs = getattr(nn, kind)(*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.bfloat16(),
        lambda t: t.double(),
        lambda t: torch.stack((t, t), 1)[:, 0],
        lambda t: t.new_zeros(()).expand(t.shape),
    ],
    ids=["bfloat16", "float64", "strided", "expanded"],
)
def test_hooks_that_hand_back_another_saved_buffer(change: Callable[[Tensor], Tensor]) -> None:
    """Whatever comes back is checked before it is read; what was given in float32 is recomputed."""
    module = build("LSTM", 8, 16)
    x = torch.randn(20, 4, 8)

    def pack(t: Tensor) -> Tensor:
        return change(t) if t.dim() == 1 and t.numel() > 1000 else t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = module(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


def test_hooks_that_hand_back_transposed_tensors() -> None:
    ours, theirs = pair("GRU", 5, 7)
    x = torch.randn(6, 3, 5)
    for module in (ours, theirs):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.t().contiguous() if t.dim() == 2 else t,
            lambda t: t.t() if t.dim() == 2 else t,
        ):
            y, _ = module(x)
        y.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


def test_converting_a_copy_leaves_the_original_alone() -> None:
    original = weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    converted = rnnkern.convert(copy.deepcopy(original))
    assert isinstance(converted, rnnkern.LSTM)
    assert not isinstance(original, rnnkern.LSTM)
    reverted = rnnkern.revert(copy.deepcopy(converted))
    assert not isinstance(reverted, rnnkern.LSTM)
    assert isinstance(converted, rnnkern.LSTM)


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_forward_mode_over_a_backward(kind: str) -> None:
    """The forward pass outside of the dual level, the backward pass inside: tangents are kept."""
    tangents = []
    x = torch.randn(4, 2, 3, requires_grad=True)
    v, w = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    for module in pair(kind, 3, 5):
        y, _ = module(x)
        with forward_ad.dual_level():
            (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(v, w))
            tangents.append(forward_ad.unpack_dual(dx).tangent)
    torch.testing.assert_close(*tangents)


def test_dropout_draws_once_when_a_later_layer_has_gaps() -> None:
    ours, theirs = pair("GRU", 3, 4, num_layers=2, dropout=0.5)
    for module in (ours, theirs):
        weight = module.weight_hh_l1.detach()
        module.weight_hh_l1 = nn.Parameter(weight.t().contiguous().t())
    x = torch.randn(5, 2, 3)
    results = []
    for module in (ours, theirs):
        torch.manual_seed(3)
        results.append(module(x)[0])
    torch.testing.assert_close(*results)


def test_packed_sizes_edited_before_backward() -> None:
    gradients = []
    for module in pair("LSTM", 3, 4):
        torch.manual_seed(0)
        packed = pack_rows([torch.randn(n, 3) for n in (4, 3, 1)])
        y, _ = module(packed)
        packed.batch_sizes.copy_(torch.tensor([2, 2, 2, 2]))
        y.data.square().sum().backward()
        gradients.append(module.weight_hh_l0.grad)
    torch.testing.assert_close(*gradients)


def test_relu_passes_the_gradient_of_nan() -> None:
    gradients = []
    x = torch.randn(3, 2, 4)
    x[1, 0] = float("nan")
    for module in pair("RNN", 4, 4, nonlinearity="relu"):
        module(x)[0].sum().backward()
        gradients.append(module.bias_ih_l0.grad)
    torch.testing.assert_close(*gradients, equal_nan=True)


def test_an_empty_batch_with_a_transposed_gradient() -> None:
    module = build("RNN", 3, 4)
    y, _ = module(torch.randn(5, 0, 3))
    (y.transpose(0, 2).contiguous() * 2).sum().backward()
    assert module.weight_hh_l0.grad.abs().sum() == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_calls_with_lengths_check_the_state() -> None:
    module = build("LSTM", 3, 4)
    lengths = torch.tensor([2, 1])
    x, h = torch.randn(3, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises((RuntimeError, IndexError)):
        torch.jit.trace(lambda x: module(x, h, lengths=lengths)[0], (x,))
    packed = pack_rows([torch.randn(2, 3)])
    with pytest.raises(ValueError, match="PackedSequence"):
        torch.jit.trace(lambda x: module(packed, lengths=lengths)[0].data, (x,))


def test_explain_of_what_will_not_run() -> None:
    module = build("GRU", 3, 4)
    assert "shape (3,)" in str(rnnkern.explain(module, torch.randn(3)))
    assert "input_size is 3" in str(rnnkern.explain(module, torch.randn(5, 2, 7)))


@pytest.mark.cpu_only
def test_explain_counts_the_steps_that_are_taken() -> None:
    module = build("GRU", 3, 4)
    packed = pack_rows([torch.randn(4, 3), torch.randn(1, 3)])
    mflop = 2 * 3 * 4 * (3 + 4) * 5e-6
    assert f"{mflop:.3g} MFLOP" in str(rnnkern.explain(module, packed))


@pytest.mark.cpu_only
def test_explain_names_the_instruction_set_that_runs() -> None:
    isa = rnnkern.build_info()["isa"]
    for H in (3, 64):
        text = str(rnnkern.explain(build("LSTM", 3, H), torch.randn(4, 1, 3)))
        assert f"forward: {isa}," in text


@pytest.mark.parametrize(
    ("name", "value"),
    [("mode", None), ("mode", "\ud800"), ("mode", "RNN_X"), ("hidden_size", 2**70)],
    ids=ascii,  # a name that cannot be encoded ends a test run in several processes
)
def test_attributes_that_make_no_sense(name: str, value: object) -> None:
    module = build("RNN", 3, 4)
    setattr(module, name, value)
    # AssertionError: torch.nn's own, for a mode that it does not know.
    with pytest.raises((TypeError, ValueError, OverflowError, RuntimeError, AssertionError)):
        module(torch.randn(5, 2, 3))
    assert build("RNN", 3, 4)(torch.randn(5, 2, 3))[0].shape == (5, 2, 4)  # nothing is left behind


class Gathered(dict):  # type: ignore[type-arg]
    """Parameters that are made when they are looked up."""

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros_like(super().__getitem__(name))


def test_parameters_that_are_looked_up_in_another_way() -> None:
    module, x = build("RNN", 3, 4), torch.randn(5, 2, 3)
    module._parameters = Gathered(module._parameters)
    assert not module(x)[0].any()
    assert not module(x, torch.zeros(1, 2, 4))[0].any()


class BatchFirst(rnnkern.RNN):
    """Says of itself what does not stand in its namespace."""

    batch_first = property(lambda self: True, lambda self, value: None)


class Overridden(rnnkern.RNN):
    """Answers for an attribute in its own way."""

    def __getattribute__(self, name: str) -> object:
        return True if name == "batch_first" else super().__getattribute__(name)


@pytest.mark.parametrize("kind", [BatchFirst, Overridden])
def test_attributes_that_the_class_answers_for(kind: type[rnnkern.RNN]) -> None:
    assert kind(3, 4)(torch.randn(5, 2, 3))[1].shape == (1, 5, 4)


def test_a_class_that_changes_after_the_first_call() -> None:
    class Changing(rnnkern.RNN):
        pass

    module, x = Changing(3, 4), torch.randn(5, 2, 3)
    assert module(x)[1].shape == (1, 2, 4)
    Changing.batch_first = property(lambda self: True, lambda self, value: None)
    assert module(x)[1].shape == (1, 5, 4)
    del Changing.batch_first
    assert module(x)[1].shape == (1, 2, 4)


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


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_the_warning_names_the_line_of_the_call(kind: str) -> None:
    from rnnkern import forward

    forward._warned.clear()
    module = getattr(rnnkern, kind)(3, 4).to(torch.complex64)
    with pytest.warns(rnnkern.FallbackWarning) as caught:
        module(torch.randn(2, 3, dtype=torch.complex64))
    assert [warning.filename for warning in caught] == [__file__]


@pytest.mark.cpu_only
def test_small_results_cannot_be_resized() -> None:
    """docs/differences.md says so; it is no crash, and large ones can."""
    module = build("LSTM", 4, 6)
    small, large = module(torch.randn(3, 2, 4))[0], module(torch.randn(400, 2, 4))[0]
    small.sum().backward()
    for result in (small.detach(), module.weight_ih_l0.grad):
        assert result is not None
        with pytest.raises(RuntimeError, match="not resizable"):
            result.resize_(100, 100)
    assert large.detach().resize_(1000, 2, 6).shape == (1000, 2, 6)
