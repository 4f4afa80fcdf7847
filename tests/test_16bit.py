"""bfloat16 and float16: stored in 16 bits, computed in float32.

Most tests run over these types too; here is what only they have.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from support import (
    CELLS,
    FORMS,
    LAYERS,
    Call,
    Leaves,
    assert_agree,
    assert_bitwise,
    build,
    evaluate,
    flatten,
    initial_states,
    leaves_for,
    on_threads,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern

pytestmark = pytest.mark.kernel

NARROW = (torch.bfloat16, torch.float16)


def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every number of the dtype that is not negative, infinity and NaN among them."""
    return torch.arange(2**15, dtype=torch.int16).view(dtype)


@pytest.mark.parametrize("H", [1, 16, 19])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_number_passes_unchanged(dtype: torch.dtype, H: int) -> None:
    """Widened, multiplied by one and rounded again; denormal numbers of bfloat16 are zero, as those
    of float32 are.
    """
    module = build("RNN", 1, H, nonlinearity="relu", bias=False, dtype=dtype)
    torch.nn.init.ones_(module.weight_ih_l0)
    x = all_numbers(dtype)
    with torch.no_grad():
        y, _ = module(x.view(1, -1, 1))
    expected = x.clone()
    if dtype == torch.bfloat16:
        expected[x < torch.finfo(dtype).smallest_normal] = 0
    for unit in y[0].unbind(1):
        torch.testing.assert_close(unit, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sums_are_rounded_to_the_nearest(dtype: torch.dtype) -> None:
    """Ties to even, and to infinity where the sum is too large."""
    torch.manual_seed(0)
    module = build("RNN", 2, 1, nonlinearity="relu", bias=False, dtype=dtype)
    torch.nn.init.ones_(module.weight_ih_l0)
    numbers = all_numbers(dtype)
    numbers = numbers[numbers.isfinite() & (numbers >= torch.finfo(dtype).smallest_normal)]
    pairs = numbers[torch.randint(len(numbers), (200_000, 2))]
    near = torch.arange(-12, 0, dtype=torch.float64).exp2()[torch.randint(12, (200_000,))]
    pairs[100_000:, 1] = (pairs[100_000:, 0].double() * near[100_000:]).to(dtype)  # ties
    pairs = pairs[pairs.amin(1) >= torch.finfo(dtype).smallest_normal]
    with torch.no_grad():
        y, _ = module(pairs.unsqueeze(0))
    assert torch.equal(y[0, :, 0], pairs.float().sum(1).to(dtype))


@pytest.mark.parametrize("deterministic", [False, True])
def test_cell_states_are_carried_in_float(deterministic: bool) -> None:
    """A state that grows by less than half a unit in its last place still grows: not where every
    step rounds it, as torch.nn does, and ours under deterministic algorithms.
    """
    module = build("LSTM", 1, 4, bias=True, dtype=torch.bfloat16)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        bias = module.bias_ih_l0.view(4, 4)
        bias[0], bias[1], bias[2] = 20.0, 20.0, 0.001  # i = f = 1, g = 0.001: c grows by 0.001
    torch.use_deterministic_algorithms(deterministic)
    state = (torch.zeros(1, 1, 4, dtype=torch.bfloat16), torch.ones(1, 1, 4, dtype=torch.bfloat16))
    with torch.no_grad():
        _, (_, c) = module(torch.zeros(1000, 1, 1, dtype=torch.bfloat16), state)
    assert (c == 1).all() if deterministic else ((c - 2).abs() < 0.02).all()


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_long_sums_of_gradients(dtype: torch.dtype, kind: str) -> None:
    """Gradients of the weights are summed in float over all rows, and rounded once: a sum of many
    small terms does not stop growing.
    """
    module = build(kind, 1, 3, dtype=dtype)
    x = torch.ones(3000, 4, 1, dtype=dtype)
    module(x)[0].sum().backward()
    wide = build(kind, 1, 3, dtype=torch.float64)
    wide.load_state_dict(module.state_dict())
    wide(x.double())[0].sum().backward()
    for name, parameter in module.named_parameters():
        exact = wide.get_parameter(name).grad
        assert parameter.grad is not None
        assert exact is not None
        scale = exact.abs().max()
        assert ((parameter.grad.double() - exact).abs() < 0.02 * scale).all()


@pytest.mark.parametrize("N", [1, 6, 70])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_threads_do_not_show(dtype: torch.dtype, kind: str, N: int) -> None:
    module = build(kind, 61, 150, dtype=dtype, bidirectional=True)
    leaves = {"x": torch.randn(5, N, 61).to(dtype)}
    with torch.no_grad():
        one, two = (on_threads(plain, count)(module, leaves)[0] for count in (1, 2))
    assert torch.equal(one, two)


def autocast(module: nn.Module, leaves: Leaves, dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.autocast("cpu", dtype=dtype):
        return module(leaves["x"], states_of(leaves))


def assert_as_torch(module: nn.Module, leaves: Leaves, call: Call = autocast) -> None:
    """Dtypes as torch.nn has them, errors within the tolerance of bfloat16, gradients too."""
    ours = evaluate(module, leaves, call)
    theirs = evaluate(oracle.twin(module), leaves, call)
    exact = evaluate(oracle.twin(module, torch.float64), leaves, plain)
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    narrow = [{k: v.bfloat16() for k, v in values.items()} for values in (ours, theirs)]
    assert_agree(*narrow, exact)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_autocast(kind: str, hx: bool, given: torch.dtype) -> None:
    """Weights are float32 and so are their gradients."""
    module = build(kind, 24, 40)
    leaves = {"x": torch.randn((7, 24) if kind in CELLS else (5, 7, 24))}
    if hx:
        leaves |= initial_states(module, 7)

    def call(m: nn.Module, own: Leaves) -> Any:
        return autocast(m, own | {"x": own["x"].to(given)})

    assert_as_torch(module, leaves, call)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_of_stacks(form: str) -> None:
    kind, own = FORMS[form]
    module = build(kind, 24, 40, num_layers=2, bidirectional=True, **own)
    leaves = leaves_for(module, 5, 7)
    if form == "RNN-relu":  # its gradient jumps: see `check`
        with torch.no_grad():
            autocast(module, leaves)
    else:
        assert_as_torch(module, leaves)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_of_sequences(kind: str) -> None:
    """`lengths`, `reset` and packed sequences; to float16 too, where torch.nn has no LSTM."""
    module = build(kind, 8, 16)
    x, lengths = torch.randn(6, 3, 8), torch.tensor([2, 6, 1])
    reset = torch.rand(6, 3) < 0.3
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    with torch.no_grad():
        wanted = [flatten(module(x, lengths=lengths, reset=reset)), flatten(module(packed))]
        for dtype, allowed in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
            with torch.autocast("cpu", dtype=dtype):
                got = [flatten(module(x, lengths=lengths, reset=reset)), flatten(module(packed))]
            for ours, exact in zip(got, wanted, strict=True):
                for name, value in ours.items():
                    assert value.dtype == (torch.float32 if kind == "GRU" else dtype)
                    assert (value.float() - exact[name].float()).abs().max() < allowed


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_leaves_float64_alone(kind: str) -> None:
    module = build(kind, 8, 16, dtype=torch.float64)
    leaves = {"x": torch.randn(5, 3, 8, dtype=torch.float64)}
    outside = flatten(plain(module, leaves))
    assert_bitwise(flatten(autocast(module, leaves)), outside)


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_of_other_devices_does_not_matter(kind: str) -> None:
    module = build(kind, 8, 16)
    x = torch.randn(5, 3, 8)
    wanted = flatten(module(x))
    with torch.autocast("xpu", dtype=torch.bfloat16):
        assert_bitwise(flatten(module(x)), wanted)


def test_explain_knows_autocast() -> None:
    module, x = build("LSTM", 8, 16), torch.randn(5, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "bfloat16" in rnnkern.explain(module, x)
    assert "float32" in rnnkern.explain(module, x)
