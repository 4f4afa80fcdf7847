"""The layers against torch.nn: every constructor argument, every kind of input, dropout."""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    CELLS,
    DTYPES,
    FORMS,
    LAYERS,
    Call,
    Leaves,
    build,
    build_form,
    check,
    initial_states,
    leaves_for,
    pack_rows,
    pair,
    plain,
    reverted,
    states_of,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence

import rnnkern
from rnnkern import constructor, forward, frozen, modules

OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "layers2": {"num_layers": 2},
    "layers3": {"num_layers": 3},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "bidirectional": {"bidirectional": True},
    "bidirectional-layers2": {"bidirectional": True, "num_layers": 2},
    "all": {"bidirectional": True, "num_layers": 3, "bias": False, "batch_first": True},
    "dropout-in-eval": {"num_layers": 2, "dropout": 0.5},
}


@pytest.mark.kernel
@pytest.mark.parametrize("batch", [3, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_option_agrees_with_torch_nn(
    form: str, options: dict[str, Any], dtype: torch.dtype, hx: bool, batch: int | None
) -> None:
    module = build_form(form, 4, 6, dtype=dtype, **options).eval()
    check(module, leaves_for(module, 5, batch, hx=hx))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_a_state_does_not_leave_the_plain_call(
    form: str, training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame of a stream costs no more than a step without a state."""
    module = build_form(form, 4, 6)
    x = torch.randn(5, 3, 4)
    with torch.set_grad_enabled(training):
        _, state = module(x)
        calls: list[Any] = []
        look = forward._checked
        monkeypatch.setattr(forward, "_checked", lambda *given: calls.append(0) or look(*given))
        module(x, state)
        assert not calls
        other = (
            list(state) if module.mode == "LSTM" else state.double()
        )  # as torch.nn takes it; wrong
        with contextlib.suppress(ValueError, RuntimeError):
            module(x, other)
    assert len(calls) == 1


@pytest.mark.parametrize("form", FORMS)
def test_construction_is_torchs(form: str) -> None:
    """Same seed: same parameters under the same names in the same order, same attributes, repr."""
    kind, own = FORMS[form]
    options = own | {"num_layers": 2, "bidirectional": True, "dropout": 0.25, "batch_first": True}
    torch.manual_seed(3)
    ours = getattr(rnnkern, kind)(4, 6, **options)
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(4, 6, **options)
    assert isinstance(ours, getattr(nn, kind))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)
    for name in [*nn.RNNBase.__constants__, "training"]:
        assert getattr(ours, name) == getattr(theirs, name)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("RNN", (4, 6, 2, "relu", False, True, 0.5, True)),
        ("LSTM", (4, 6, 2, False, True, 0.5, True, 3)),
        ("GRU", (4, 6, 2, False, True, 0.5, True)),
    ],
)
def test_positional_arguments_are_torchs(kind: str, arguments: tuple[Any, ...]) -> None:
    ours, theirs = getattr(rnnkern, kind)(*arguments), getattr(nn, kind)(*arguments)
    assert repr(ours) == repr(theirs)
    check(ours.eval(), leaves_for(ours, 5, 3))


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_signature(kind: str) -> None:
    parameters = inspect.signature(getattr(rnnkern, kind).forward).parameters
    own = {"lengths": None, "reset": None, "reset_to": None, "return_cells": False}
    assert list(parameters) == ["self", "input", "hx", *own]
    assert parameters["hx"].default is None
    for name, default in own.items():
        assert parameters[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert parameters[name].default is default


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_device_and_dtype_arguments(kind: str, dtype: torch.dtype, device: torch.device) -> None:
    module = getattr(rnnkern, kind)(4, 6, device=device, dtype=dtype)
    assert {parameter.dtype for parameter in module.parameters()} == {dtype}
    output, _ = module(torch.randn(5, 3, 4, dtype=dtype))
    assert output.dtype == dtype
    on_meta = getattr(rnnkern, kind)(4, 6, device="meta", dtype=dtype)
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("form", FORMS)
def test_shapes_and_strides_are_torchs(form: str, options: dict[str, Any]) -> None:
    """The shapes and strides of the outputs are torch.nn's, so that a `view` after the call goes on
    working.
    """
    kind, own = FORMS[form]
    for N in (3, None):
        ours = build(kind, 4, 6, bidirectional=True, num_layers=2, **own, **options)
        theirs = getattr(nn, kind)(4, 6, bidirectional=True, num_layers=2, **own, **options)
        leaves = leaves_for(ours, 5, N, hx=False)
        mine, other = ours(leaves["x"]), theirs(leaves["x"])
        assert type(mine) is type(other) is tuple
        assert type(mine[1]) is type(other[1])
        assert (mine[0].shape, mine[0].stride()) == (other[0].shape, other[0].stride())
        for state, wanted in zip(flat(mine[1]), flat(other[1]), strict=True):
            assert state.shape == wanted.shape
            assert state.is_contiguous()


def flat(states: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (states,) if isinstance(states, Tensor) else states


# How a [5, 3, 4] input may be in memory: the shape of what owns the memory, and the view of it.
LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((3, 5, 4), lambda a: a.transpose(0, 1)),
    "features-first": ((4, 5, 3), lambda a: a.permute(1, 2, 0)),
    "every-other-step": ((9, 3, 4), lambda a: a[::2]),
    "every-other-row": ((5, 6, 4), lambda a: a[:, ::2]),
    "every-other-feature": ((5, 3, 8), lambda a: a[..., ::2]),
    "slice-of-features": ((5, 3, 9), lambda a: a[..., 3:7]),
    "slice-of-rows": ((5, 7, 4), lambda a: a[:, 2:5]),
    "later-steps": ((8, 3, 4), lambda a: a[3:]),
    "expanded-steps": ((1, 3, 4), lambda a: a.expand(5, 3, 4)),
    "expanded-rows": ((5, 1, 4), lambda a: a.expand(5, 3, 4)),
    "expanded-features": ((5, 3, 1), lambda a: a.expand(5, 3, 4)),
    "one-number": ((), lambda a: a.expand(5, 3, 4)),
    "overlapping-windows": ((3, 8), lambda a: a.unfold(1, 4, 1).transpose(0, 1)),
    "flipped": ((5, 3, 4), lambda a: a.flip(0)),
    "channels-last": (
        (5, 3, 2, 2),
        lambda a: a.contiguous(memory_format=torch.channels_last).flatten(2),
    ),
}


@pytest.mark.kernel
@pytest.mark.parametrize("options", [{}, {"batch_first": True}], ids=["time-first", "batch-first"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_input_layouts(form: str, layout: str, options: dict[str, Any]) -> None:
    shape, view = LAYOUTS[layout]
    module = build_form(form, 4, 6, bidirectional=True, **options)
    leaves = initial_states(module, 5 if module.batch_first else 3) | {"x": torch.randn(shape)}
    check(module, leaves, lambda m, own: m(view(own["x"]), states_of(own)))


# The same for initial states [2, 3, H], which are [2, 3, H] in memory before the view.
STATE_LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded-rows": lambda h: h[:, :1].expand_as(h),
    "expanded-layers": lambda h: h[:1].expand_as(h),
    "expanded-features": lambda h: h[..., :1].expand_as(h),
    "transposed": lambda h: h.transpose(0, 1).contiguous().transpose(0, 1),
    "features-first": lambda h: h.permute(2, 0, 1).contiguous().permute(1, 2, 0),
    "sliced": lambda h: torch.cat([h, h], -1)[..., : h.shape[-1]],
    "strided": lambda h: h.repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.kernel
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_state_layouts(form: str, layout: str) -> None:
    view = STATE_LAYOUTS[layout]

    def call(module: nn.Module, leaves: Leaves) -> Any:
        views = {name: view(leaf) for name, leaf in leaves.items() if name != "x"}
        return module(leaves["x"], states_of(views))

    module = build_form(form, 4, 6, bidirectional=True)
    check(module, leaves_for(module, 5, 3), call)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_unbatched_layouts(form: str) -> None:
    module = build_form(form, 4, 6)
    leaves = initial_states(module, None) | {"x": torch.randn(4, 10)}
    check(module, leaves, lambda m, own: m(own["x"].t()[::2], states_of(own)))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("form", FORMS)
def test_training_flag_without_dropout(form: str, train: bool) -> None:
    """Without dropout eval mode changes nothing, and gradients flow in it."""
    module = build_form(form, 4, 6, num_layers=2).train(train)
    check(module, leaves_for(module, 5, 3))
    output, _ = module(torch.randn(5, 3, 4))
    assert output.requires_grad


def with_readable_masks(kind: str, p: float, bidirectional: bool = False) -> nn.Module:
    """Two layers, the second without recurrence and bias: it puts out zero exactly where its input
    is dropped.
    """
    H = 4
    module = build(kind, 3, H, num_layers=2, dropout=p, bidirectional=bidirectional)
    candidate = slice(
        0 if kind == "RNN" else 2 * H, None
    )  # of i, f, g, o it is g, of r, z, n it is n
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "_l1" in name:
                parameter.zero_()
            elif "bias_ih" in name:
                parameter.fill_(1.0)  # keeps what the first layer puts out away from zero
            else:
                parameter.mul_(0.3)
        for direction, suffix in enumerate(("", "_reverse")[: 1 + bidirectional]):
            weight = getattr(module, f"weight_ih_l1{suffix}")
            weight[candidate][:H, direction * H : (direction + 1) * H] = torch.eye(H)
            if kind != "RNN":  # the gate that carries the old state on: f, z
                getattr(module, f"bias_ih_l1{suffix}")[H : 2 * H] = -200.0
    return module


def masked_by(mask: Tensor) -> Call:
    """torch.nn, layer by layer, with `mask` between the two layers."""

    def call(module: nn.Module, leaves: Leaves) -> Any:
        y, ends = leaves["x"], []
        for layer in range(2):
            skeleton = type(module)(y.shape[-1], 4, bidirectional=module.bidirectional).to(y.dtype)
            weights = {
                name: getattr(module, name.replace("_l0", f"_l{layer}"))
                for name in skeleton.state_dict()
            }
            y, end = functional_call(skeleton, weights, (y,))
            y = y * mask.to(y.dtype) if layer == 0 else y
            ends.append((end,) if isinstance(end, Tensor) else end)
        states = tuple(torch.cat(of_layers) for of_layers in zip(*ends, strict=True))
        return y, states if len(states) == 2 else states[0]

    return call


def seeded(module: nn.Module, leaves: Leaves) -> Any:
    torch.manual_seed(5)
    return plain(module, leaves)


@pytest.mark.parametrize("bidirectional", [False, True], ids=["one-direction", "bidirectional"])
@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_masks(kind: str, bidirectional: bool) -> None:
    """Between the layers and nowhere else, scaled by 1 / (1 - p), with the same mask in the
    backward pass.
    """
    p = 0.25
    module = with_readable_masks(kind, p, bidirectional)
    leaves = leaves_for(module, 6, 5, hx=False)
    mask = (seeded(module, leaves)[0].detach().abs() > 1e-6) / (1 - p)
    assert 0 < mask.count_nonzero() < mask.numel()
    check(module, leaves, seeded, oracle_call=masked_by(mask))


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_is_random(kind: str) -> None:
    """Independent for every step, row and unit, fresh at every call, repeatable by the seed, none
    in eval mode.
    """
    p = 0.25
    module = with_readable_masks(kind, p)
    leaves = {"x": torch.randn(50, 40, 3)}
    dropped = seeded(module, leaves)[0].abs() <= 1e-6
    assert not torch.equal(dropped, plain(module, leaves)[0].abs() <= 1e-6)
    assert torch.equal(dropped, seeded(module, leaves)[0].abs() <= 1e-6)
    assert not (plain(module.eval(), leaves)[0].abs() <= 1e-6).any()
    five_sigma = 5 * (p * (1 - p) / dropped.numel()) ** 0.5
    assert abs(dropped.double().mean() - p) < five_sigma
    for axis in range(3):
        neighbours = dropped & dropped.roll(1, axis)
        assert abs(neighbours.double().mean() - p**2) < five_sigma


@pytest.mark.parametrize("kind", LAYERS)
def test_dropout_after_a_single_layer_is_nothing(kind: str) -> None:
    with pytest.warns(UserWarning, match="num_layers"):
        module = build(kind, 4, 6, dropout=0.9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check(module.train(), leaves_for(module, 5, 3))


@pytest.mark.parametrize("options", [{}, {"bidirectional": True}, {"num_layers": 3}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_dropout_of_everything_is_exact(form: str, options: dict[str, Any]) -> None:
    """With p = 1 no mask is random, so that training mode can be compared too."""
    module = build_form(form, 4, 6, **({"num_layers": 2} | options), dropout=1.0).train()
    check(module, leaves_for(module, 5, 3))


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
    """Has attributes that are not in its namespace."""

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


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_no_public_name_that_torch_nn_lacks_but_options(kind: str) -> None:
    ours, theirs = getattr(rnnkern, kind), getattr(nn, kind)

    def public(thing: Any) -> set[str]:
        return {
            name for name in dir(thing) if not name.startswith("_")
        } - constructor.DEFAULTS.keys()

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
    theirs = reverted(module)
    assert getattr(rnnkern.convert(theirs), name) == "greedy"
    torch.testing.assert_close(theirs(x), wanted)


@pytest.mark.parametrize("mode", ["RNN_TANH", "GRU"])
def test_a_layer_of_a_cell_without_a_projection(mode: str) -> None:
    """It saves no slots, or it reads h. It is an error before the first call."""
    assert modules.OwnRNN("LSTM", 2, 5, proj_size=3).weight_hr_l0.shape == (3, 5)
    assert modules.OwnRNN(mode, 2, 5).proj_size == 0
    with pytest.raises(ValueError, match=f"got {mode} and proj_size=3"):
        modules.OwnRNN(mode, 2, 5, proj_size=3)


def test_packed_sequences_are_still_packed() -> None:
    packed = pack_rows([torch.randn(3, 4), torch.randn(2, 4)])
    assert isinstance(build("LSTM", 4, 6)(packed)[0], PackedSequence)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS, "Recurrent", "FrozenLayer", "FrozenCell"])
def test_docstrings_name_the_errors(kind: str) -> None:
    text = inspect.getdoc(getattr(frozen if "Frozen" in kind else rnnkern, kind)) or ""
    _, heading, errors = text.partition("\nRaises:\n")
    assert heading, "no section, or one that is indented"
    assert "TypeError" in errors.partition("\n\n")[0]
    assert "RuntimeError" in errors or kind not in CELLS
