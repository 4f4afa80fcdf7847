"""Modules with options, and calls with wrong ones: copies, functions of the package, errors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import options_oracle
import pytest
import torch
from options_cases import ON_A_GPU, RESET, Case, H, I, N, T, change_gains
from options_oracle import Noise
from support import Leaves, PassingMode, build, evaluate, leaves_for, states_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern

pytestmark = pytest.mark.filterwarnings(ON_A_GPU)


def test_a_probability_may_be_changed_later() -> None:
    """If the constructor was given one, 0 as well."""
    module = build("LSTM", I, H, recurrent_dropout=0.0, zoneout=0.0)
    x = torch.randn(T, N, I)
    plain = module(x)[0]
    module.recurrent_dropout = 0.5
    assert not torch.equal(module(x)[0], plain)
    module.recurrent_dropout = 0.0
    assert torch.equal(module(x)[0], plain)
    module.zoneout = 1.5
    with pytest.raises(ValueError, match=r"zoneout must be a probability in \[0, 1\), got 1.5"):
        module(x)


def test_an_option_of_a_class() -> None:
    class Zoned(rnnkern.GRU):
        def __init__(self, *sizes: int) -> None:
            super().__init__(*sizes, zoneout=0.5)

    x = torch.randn(T, N, I)
    module = Zoned(I, H).eval()
    torch.testing.assert_close(
        module(x)[0], options_oracle.run(module, x, noise=Noise(zoneout=0.5, draws=False))[0]
    )


def with_own_noise(base: type) -> Any:
    """A layer as users write it, whose ``zoneout`` and the like are numbers of its own."""

    class WithOwnNoise(base):
        recurrent_dropout = 0.5

        def __init__(self, *sizes: int, zoneout: float) -> None:
            super().__init__(*sizes)
            self.zoneout = zoneout
            self.orthogonal = True
            self.forget_bias = 3.0

    return WithOwnNoise


@pytest.mark.parametrize("is_converted", [False, True])
def test_an_attribute_with_the_name_of_an_option_is_the_users(is_converted: bool) -> None:
    theirs, x = with_own_noise(nn.LSTM)(I, H, zoneout=1.5), torch.randn(T, N, I)
    if is_converted:
        ours = rnnkern.convert(copy.deepcopy(theirs))
        assert isinstance(ours, rnnkern.LSTM)
    else:
        ours = with_own_noise(rnnkern.LSTM)(I, H, zoneout=1.5)
    torch.manual_seed(3)
    theirs.reset_parameters()
    torch.manual_seed(3)
    ours.reset_parameters()
    assert str(ours).split("(", 1)[1] == str(theirs).split("(", 1)[1]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one, other)
    torch._dynamo.reset()
    compiled = torch.compile(ours, backend="eager")
    theirs.requires_grad_(False)
    ours.requires_grad_(False)
    for call in (ours, compiled, rnnkern.freeze(ours)):
        torch.testing.assert_close(call(x)[0], theirs(x)[0])
    assert type(rnnkern.revert(ours)) is (type(theirs) if is_converted else type(ours))


def test_one_option_does_not_open_another() -> None:
    module, x = build("LSTM", I, H, orthogonal=True), torch.randn(T, N, I)
    wanted = module(x)[0]
    module.zoneout = 0.5
    assert torch.equal(module(x)[0], wanted)
    assert str(module) == "LSTM(2, 7, orthogonal=True)"


def test_revert_leaves_no_option_behind() -> None:
    module, x = build("GRU", I, H, zoneout=0.0, orthogonal=True), torch.randn(T, N, I)
    module.zoneout = None
    assert str(module) == "GRU(2, 7, orthogonal=True)"
    rnnkern.revert(module)
    assert vars(module).keys() == vars(nn.GRU(I, H)).keys()
    module.zoneout = 0.5
    wanted = module(x)[0]
    torch.testing.assert_close(rnnkern.convert(module)(x)[0], wanted)


def test_copies_and_pickles_have_the_options() -> None:
    module = build("LSTM", I, H, recurrent_dropout=0.25, zoneout=0.5)
    assert str(module) == "LSTM(2, 7, recurrent_dropout=0.25, zoneout=0.5)"
    assert module.state_dict().keys() == nn.LSTM(I, H).state_dict().keys()
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(again) == str(module)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_checkpointed_resets_to_states(bidirectional: bool) -> None:
    case = Case("LSTM", "plain", "reset_to-lengths")
    case.module = build(
        "LSTM", I, H, dtype=torch.float64, num_layers=2, bidirectional=bidirectional
    )
    case.leaves = leaves_for(case.module, T, N)
    for name, z in list(case.leaves.items())[1:]:
        case.leaves[f"reset_{name}"] = torch.randn_like(z)

    def in_segments(module: Any, own: Leaves) -> Any:
        arguments = case.arguments(own)
        return rnnkern.checkpointed(
            module, own["x"], states_of(own), checkpoint_every=2, **arguments
        )

    whole = evaluate(case.module, case.leaves, case.call)
    for name, made in evaluate(case.module, case.leaves, in_segments).items():
        torch.testing.assert_close(made, whole[name])


@pytest.mark.parametrize("option", [{"zoneout": 0.5}, {"layer_norm": True}], ids=str)
def test_generate_keeps_options(option: dict[str, Any]) -> None:
    module = build("GRU", H, H, **option).eval()
    change_gains(module)
    readout = nn.Linear(H, H)
    made, _ = rnnkern.generate(module, readout, torch.ones(N, H), 3)
    x, state = torch.ones(1, N, H), None
    for step in made:
        y, state = module(x, state)
        x = readout(y)
        torch.testing.assert_close(x[0], step)


def test_explain_names_the_options() -> None:
    x = torch.randn(T, N, I)
    module = build("LSTM", I, H, recurrent_dropout=0.25, zoneout=0.5)
    text = rnnkern.explain(module, x)
    if rnnkern.kernels.IS_STAND_IN or x.is_cuda:
        assert "plain PyTorch runs this" in text
        return
    assert "recurrent_dropout=0.25: one mask of h for all steps" in text
    assert "zoneout=0.5: drawn in each step" in text
    assert "zoneout=0.5: its expectation" in rnnkern.explain(module.eval(), x)


def test_convert_and_revert_lose_no_option() -> None:
    model = nn.Sequential(rnnkern.GRU(I, H), rnnkern.GRU(H, H, zoneout=0.5))
    with pytest.raises(ValueError, match=r"torch\.nn has no zoneout, got zoneout=0\.5 of 1"):
        rnnkern.revert(model)
    assert type(model[0]) is rnnkern.GRU


@pytest.mark.parametrize("option", ["recurrent_dropout", "zoneout"])
@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: rnnkern.checkpointed(m, x, checkpoint_every=2),
        lambda m, x: rnnkern.inspect.trace(m, x),
        lambda m, x: rnnkern.inspect.gradient_flow(m, x),
        lambda m, x: torch.jit.script(m),
        lambda m, x: torch.ao.quantization.quantize_dynamic(m, {rnnkern.LSTM}),
    ],
    ids=["checkpointed", "trace", "gradient_flow", "script", "quantize"],
)
def test_what_does_not_know_an_option_says_so(option: str, use: Callable[..., Any]) -> None:
    import torch.ao.quantization

    module = build("LSTM", I, H, **{option: 0.5})
    with pytest.raises(ValueError, match=f"{option}=0.5"):
        use(module, torch.randn(T, N, I))


def test_generate_refuses_a_mask_for_each_step() -> None:
    module = build("LSTM", H, H, recurrent_dropout=0.5)
    with pytest.raises(ValueError, match=r"recurrent_dropout=0\.5; call module\.eval\(\)"):
        rnnkern.generate(module, nn.Linear(H, H), torch.ones(N, H), 3)


# Wrong calls


@pytest.mark.parametrize("name", ["recurrent_dropout", "zoneout"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (1.0, ValueError, r"must be a probability in \[0, 1\), got 1.0"),
        (-0.1, ValueError, r"must be a probability in \[0, 1\), got -0.1"),
        (float("nan"), ValueError, r"must be a probability in \[0, 1\), got nan"),
        ("0.5", TypeError, "must be a number, got str"),
        (True, TypeError, "must be a number, got bool"),
    ],
)
def test_wrong_probabilities(name: str, value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"{name} {message}"):
        rnnkern.GRU(I, H, **{name: value})


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), Fraction(1, 4)], ids=repr)
def test_any_real_number_is_a_probability(number: Any) -> None:
    """As torch.nn takes it for ``dropout``."""
    layer = rnnkern.LSTM(3, 4, zoneout=number, forget_bias=number)
    assert layer.zoneout == 0.25
    assert type(layer.zoneout) is float
    assert type(layer.forget_bias) is float


def _states(*shape: int, **options: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape, **options), torch.zeros(shape, **options)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reset_to": _states(1, N, H)}, ValueError, "it needs reset, got reset=None"),
        ({"reset": RESET, "reset_to": torch.zeros(1, N, H)}, TypeError, "must be .h, c."),
        (
            {"reset": RESET, "reset_to": (1, 2)},
            TypeError,
            "h of reset_to must be a tensor, got int",
        ),
        (
            {"reset": RESET, "reset_to": _states(1, N, H + 1)},
            ValueError,
            r"h of reset_to must have shape \(1, 3, 7\), as hx, got \(1, 3, 8\)",
        ),
        (
            {"reset": RESET, "reset_to": _states(1, N, H, dtype=torch.float64)},
            TypeError,
            "h of reset_to must be of dtype torch.float32, as the input, got torch.float64",
        ),
        (
            {"reset": RESET, "reset_to": _states(1, N, H, device="meta")},
            ValueError,
            "h of reset_to must be on .*, as the input, got meta",
        ),
    ],
)
def test_wrong_calls(arguments: Any, error: Any, message: str) -> None:
    module = build("LSTM", I, H, dtype=torch.float32, recurrent_dropout=0.5)
    before = torch.get_rng_state()
    with pytest.raises(error, match=message):
        module(torch.zeros(T, N, I), **arguments)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("kind", [rnnkern.GRU, rnnkern.RNN])
def test_only_an_lstm_has_cells(kind: Any) -> None:
    with pytest.raises(
        ValueError, match=r"return_cells needs a cell state, which .* does not have"
    ):
        kind(I, H)(torch.zeros(T, N, I), return_cells=True)


def test_a_packed_sequence_takes_no_reset() -> None:
    packed = pack_padded_sequence(torch.zeros(T, N, I), torch.tensor([5, 4, 1]))
    with pytest.raises(ValueError, match="a PackedSequence brings its own lengths"):
        rnnkern.LSTM(I, H)(packed, reset=RESET, reset_to=_states(1, N, H))


@pytest.mark.filterwarnings("ignore:no rnnkern kernel")
def test_a_dtype_without_kernels_runs_the_reference() -> None:
    module = build("GRU", I, H)
    wide = copy.deepcopy(module).to(torch.complex64)
    x, fresh = torch.randn(T, N, I), torch.randn(1, N, H)
    with torch.no_grad():
        y, h = wide(x.to(torch.complex64), reset=RESET, reset_to=fresh.to(torch.complex64))
        wanted, last = module(x, reset=RESET, reset_to=fresh)
    torch.testing.assert_close(y.real, wanted)
    torch.testing.assert_close(h.real, last)


def test_an_option_that_is_set_after_compilation() -> None:
    module = rnnkern.LSTM(3, 4, zoneout=0.0).eval()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager")
    x = torch.randn(4, 2, 3)
    compiled(x)
    for zoneout in (0.5, 0.25, 0.0):
        module.zoneout = zoneout
        assert torch.equal(compiled(x)[0], module(x)[0])
    del module.zoneout
    assert torch.equal(compiled(x)[0], module(x)[0])


def test_a_compiled_packed_sequence_with_options() -> None:
    module = rnnkern.GRU(3, 4, zoneout=0.2).eval()
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(4, 2, 3), torch.tensor([4, 2]))
    torch._dynamo.reset()
    made = torch.compile(module, backend="eager")(packed)[0]
    assert torch.equal(made.data, module(packed)[0].data)


@pytest.mark.cpu_only
@pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")
def test_cells_have_no_such_options() -> None:
    """A number of such a name is the user's."""
    cell, x = rnnkern.LSTMCell(I, H), torch.randn(N, I)
    wanted = cell(x)[0]
    cell.zoneout = 2
    with PassingMode():
        assert torch.equal(cell(x)[0], nn.LSTMCell.forward(cell, x)[0])
    assert torch.equal(rnnkern.freeze(cell)(x)[0], wanted)
    assert type(rnnkern.revert(copy.deepcopy(cell))) is nn.LSTMCell


def test_a_flag_of_such_a_name_is_the_users() -> None:
    module, x = build("GRU", I, H), torch.randn(T, N, I)
    wanted = module(x)[0]
    module.zoneout = True
    assert torch.equal(module(x)[0], wanted)
