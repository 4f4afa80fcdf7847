"""bfloat16 and float16: stored in 16 bits, computed in float32.

Most tests run over these types too; here is what only they have.
"""

from __future__ import annotations

import math
from typing import Any

import oracle
import pytest
import support
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
    build_form,
    check,
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
    """Ties to even, and to infinity if the sum is too large."""
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
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
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


@pytest.mark.cpu_only
@pytest.mark.parametrize("N", [1, 6, 70])
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_threads_do_not_show(dtype: torch.dtype, kind: str, N: int) -> None:
    module = build(kind, 61, 150, dtype=dtype, bidirectional=True)
    leaves = {"x": torch.randn(5, N, 61).to(dtype)}
    with torch.no_grad():
        one, two = (on_threads(plain, count)(module, leaves)[0] for count in (1, 2))
    assert torch.equal(one, two)
    module = build(kind, 61, 150, bidirectional=True)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        one, two = (on_threads(plain, count)(module, leaves)[0] for count in (1, 2))
    assert torch.equal(one, two)


def autocast(module: nn.Module, leaves: Leaves, dtype: torch.dtype = torch.bfloat16) -> Any:
    with support.autocast(dtype):
        return module(leaves["x"], states_of(leaves))


def assert_as_torch(
    module: nn.Module,
    leaves: Leaves,
    call: Call = autocast,
    exact_call: Call = plain,
    *,
    packed: bool = False,
) -> None:
    """Dtypes as torch.nn has them, errors within the tolerance of bfloat16, gradients too."""
    ours = evaluate(module, leaves, call)
    by_onednn = isinstance(module, nn.LSTM) and not module.proj_size and not packed
    on_cpu = leaves["x"].device.type == "cpu"
    refused = on_cpu and by_onednn and not support.torch_nn_autocasts_lstm()
    with support.without_onednn(refused):
        theirs = evaluate(oracle.twin(module), leaves, call)
    exact = evaluate(oracle.twin(module, torch.float64), leaves, exact_call)
    if refused:  # without oneDNN outputs are float32
        theirs = {k: v.bfloat16() if k.startswith("out") else v for k, v in theirs.items()}
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    narrow = [{k: v.bfloat16() for k, v in values.items()} for values in (ours, theirs)]
    assert_agree(*narrow, exact)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("N", [7, 17])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_autocast(kind: str, N: int, hx: bool, given: torch.dtype) -> None:
    """Weights are float32 and so are their gradients. Cells multiply 7 rows as float32."""
    module = build(kind, 24, 40)
    leaves = {"x": torch.randn((N, 24) if kind in CELLS else (5, N, 24))}
    if hx:
        leaves |= initial_states(module, N)

    def call(m: nn.Module, own: Leaves) -> Any:
        return autocast(m, own | {"x": own["x"].to(given)})

    assert_as_torch(module, leaves, call)


@pytest.mark.parametrize("form", FORMS)
def test_autocast_of_stacks(form: str) -> None:
    module = build_form(form, 24, 40, num_layers=2, bidirectional=True)
    leaves = leaves_for(module, 5, 7)
    if form == "RNN-relu":  # its gradient jumps: see `check`
        with torch.no_grad():
            autocast(module, leaves)
    else:
        assert_as_torch(module, leaves)


BY_BFLOAT16 = "bf16" in rnnkern.build_info()["isa"] or "amx" in rnnkern.build_info()["isa"]
"""The CPU multiplies bfloat16: float32 may be multiplied as such."""


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    "sizes",
    [(5, 7, 33, 37), (4, 4, 1, 1), (18, 1, 70, 130), (3, 40, 64, 65), (43, 9, 5, 20)],
    ids=str,
)
def test_products_of_float32_as_bfloat16(sizes: tuple[int, int, int, int]) -> None:
    """Input, state and weights are rounded for a product and nowhere else: the state is carried in
    float32. Gradients within the tolerance of bfloat16, of both directions.
    """
    T, N, I, H = sizes
    module = build("GRU", I, H)
    x = torch.randn(T, N, I)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, _ = module(x)

    def rounded(t: Tensor) -> Tensor:
        return (t.bfloat16() if BY_BFLOAT16 else t).double()

    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in module.parameters())
    h = torch.zeros(N, H)
    for t in range(T):
        given = rounded(x[t]) @ rounded(w_ih).T + b_ih
        own = rounded(h) @ rounded(w_hh).T + b_hh
        (ir, iz, i_n), (hr, hz, hn) = given.chunk(3, 1), own.chunk(3, 1)
        n, z = torch.tanh(i_n + torch.sigmoid(ir + hr) * hn), torch.sigmoid(iz + hz)
        assert (y[t] - (n + z * (h - n))).abs().max() < 1e-6
        h = y[t]
    assert y.dtype == torch.float32
    both = build("GRU", I, H, bidirectional=True)
    assert_as_torch(both, leaves_for(both, T, N))


@pytest.mark.cpu_only
def test_few_rows_of_float32_are_not_rounded() -> None:
    """To round the weights would take longer than it saves."""
    module = build("GRU", 24, 40)
    seen = []
    for T in (15, 16):
        x = torch.randn(T, 1, 24)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            seen.append("multiplied as bfloat16" in rnnkern.explain(module, x))
            y, _ = module(x)
        with torch.no_grad():
            assert torch.equal(y, module(x)[0]) == (not seen[-1])
    assert seen == [False, BY_BFLOAT16]


@pytest.mark.parametrize("proj_size", [0, 9])
def test_autocast_of_packed_lstm(proj_size: int) -> None:
    """Computed in float32, multiplied as bfloat16, as torch.nn does; gradients too."""
    module = build("LSTM", 24, 40, proj_size=proj_size, bidirectional=True)
    lengths = [2, 9, 1, 7, 9]

    def call(m: nn.Module, own: Leaves) -> Any:
        with support.autocast():
            return m(pack_padded_sequence(own["x"], lengths, enforce_sorted=False), states_of(own))

    def exact_call(m: nn.Module, own: Leaves) -> Any:
        return m(pack_padded_sequence(own["x"], lengths, enforce_sorted=False), states_of(own))

    assert_as_torch(module, leaves_for(module, 9, 5), call, exact_call, packed=True)


@pytest.mark.parametrize("number", [math.inf, math.nan, 3.4e38])
def test_special_numbers_under_autocast(number: float) -> None:
    """The largest float32 is infinite in bfloat16; each number stays in its row."""
    module = build("GRU", 24, 40)
    x = torch.randn(5, 7, 24)
    x[1, 3, 2] = number
    with torch.no_grad(), support.autocast():
        ours, theirs = module(x)[0], oracle.twin(module)(x)[0]
    other_rows = torch.arange(7) != 3
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert ours[:, other_rows].isfinite().all()


@pytest.mark.cpu_only
def test_second_derivatives_under_autocast() -> None:
    """Backward may run under autocast too: the first derivatives are the kernel's, asked for
    differentiably or not, and what the second ones recompute is float32.
    """
    module = build("GRU", 8, 16)
    x = torch.randn(6, 3, 8, requires_grad=True)
    exact = oracle.twin(module, torch.float64)
    found = []
    for m, own, enabled in (
        (module, x, True),
        (exact, x.detach().double().requires_grad_(), False),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y, _ = m(own)
            (plain,) = torch.autograd.grad(y.sum(), own, retain_graph=True)
            (first,) = torch.autograd.grad(y.sum(), own, create_graph=True)
            (second,) = torch.autograd.grad(first.square().sum(), own)
        assert torch.equal(plain, first)
        found.append((first, second))
    for ours, wanted in zip(*found, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - wanted).abs().max() < 0.03 * wanted.abs().max()


@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
@pytest.mark.parametrize("count", [1, 2])
def test_autocast_under_deterministic_algorithms(count: int, kind: str) -> None:
    """Neither threads nor the batch nor a cut into blocks shows."""
    torch.set_deterministic_debug_mode("error")
    module, x = build(kind, 64, 300), torch.randn(6, 9, 64)

    def run(part: Tensor, state: Any = None, threads: int = count) -> Any:
        with torch.no_grad(), support.autocast():
            return on_threads(lambda m, own: m(own["x"], state), threads)(module, {"x": part})

    whole, state = run(x, threads=1)[0], None
    for t in range(6):
        y, state = run(x[t : t + 1, 3:4], state)
        assert torch.equal(y, whole[t : t + 1, 3:4])


@pytest.mark.parametrize("kind", LAYERS)
def test_autocast_of_sequences(kind: str) -> None:
    """`lengths`, `reset` and packed sequences, the latter with torch.nn's dtypes; and float16, for
    which torch.nn has no LSTM of padded batches on the CPU.
    """
    module = build(kind, 8, 16)
    x, lengths = torch.randn(6, 3, 8), torch.tensor([2, 6, 1])
    reset = torch.rand(6, 3) < 0.3
    packed = pack_padded_sequence(x, lengths.tolist(), enforce_sorted=False)
    promotes = kind == "GRU" and x.device.type == "cpu"
    with torch.no_grad():
        wanted = [flatten(module(x, lengths=lengths, reset=reset)), flatten(module(packed))]
        for dtype, allowed in ((torch.bfloat16, 0.05), (torch.float16, 0.005)):
            with support.autocast(dtype):
                got = [flatten(module(x, lengths=lengths, reset=reset)), flatten(module(packed))]
                theirs = flatten(oracle.twin(module)(packed))
            for ours, exact in zip(got, wanted, strict=True):
                for name, value in ours.items():
                    assert (value.float() - exact[name].float()).abs().max() < allowed
            padded, of_packed = ({name: v.dtype for name, v in values.items()} for values in got)
            assert set(padded.values()) == {torch.float32 if promotes else dtype}
            assert of_packed == {name: v.dtype for name, v in theirs.items()}


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_autocast_leaves_float64_alone(kind: str) -> None:
    module = build(kind, 8, 16, dtype=torch.float64)
    leaves = {"x": torch.randn((3, 8) if kind in CELLS else (5, 3, 8), dtype=torch.float64)}
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
    with support.autocast():
        assert "bfloat16" in rnnkern.explain(module, x)
    assert "float32" in rnnkern.explain(module, x)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["GRU", "GRUCell", "LSTMCell"])
def test_autocast_keeps_slow_states(kind: str) -> None:
    """States that torch.nn carries in float32 grow by less than half a unit of bfloat16."""
    module = build(kind, 1, 4)
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    gates = next(p for name, p in module.named_parameters() if "bias_ih" in name).view(-1, 4)
    with torch.no_grad():
        if kind == "LSTMCell":
            gates[0], gates[1], gates[2] = 20.0, 20.0, 0.001  # c grows by 0.001
        else:
            gates[1], gates[2] = 5.5, 20.0  # h approaches 1 by a 250th of what is missing
        x = torch.zeros(1, 1, 1)

        def last(m: nn.Module) -> Tensor:
            if kind == "GRU":
                return m(x.expand(1000, 1, 1))[1]
            state = (torch.zeros(1, 4), torch.ones(1, 4)) if kind == "LSTMCell" else None
            for _ in range(1000):
                state = m(x[0], state)
            return state[1] if kind == "LSTMCell" else state

        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours, theirs = last(module), last(oracle.twin(module))
    exact = 2.0 if kind == "LSTMCell" else 1 - (1 - 1 / (1 + math.exp(5.5))) ** 1000
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-3
    assert (theirs - exact).abs().max() < 1e-1


@pytest.mark.cpu_only
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_autocast_of_cells_copies_no_weights(kind: str, given: torch.dtype) -> None:
    """What a step keeps for backward: nothing of the size of the weights."""
    module, sizes = build(kind, 64, 64), []

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in {p.data_ptr() for p in module.parameters()}:
            sizes.append(t.numel())
        return t

    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
    ):
        module(torch.randn(3, 64).to(given))
    assert sizes
    assert max(sizes) < 64 * 64


@pytest.mark.parametrize("K", [1, 2, 31, 32, 33, 63, 129, 511, 513, 1025])
@pytest.mark.parametrize("N", [1, 5, 15, 16, 17, 31, 33, 48])
def test_products_of_every_shape(N: int, K: int) -> None:
    """Whole tiles of AMX and the rest of them in every direction, odd rows that begin anywhere,
    rows at unequal distances; forward and backward.
    """
    module = build("RNN", K, 37, dtype=torch.bfloat16)
    memory = torch.randn(2 * N * K + 1).bfloat16()
    x = memory[1:].view(2, N, K)  # aligned to an element and no more
    leaves = {"x": x, "h0": torch.randn(1, N, 37).bfloat16()}
    check(module, leaves)
    lengths = torch.randint(0, 3, (N,))
    check(
        module,
        leaves,
        lambda m, own: m(own["x"], own["h0"], lengths=lengths),
        oracle_call=lambda m, own: oracle.run(m, own["x"], own["h0"], lengths),
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_training_and_inference_agree(dtype: torch.dtype, form: str) -> None:
    module = build_form(form, 11, 37, dtype=dtype, bidirectional=True)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves_for(module, 6, 5).items()}
    lengths, reset = torch.tensor([3, 6, 0, 5, 1]), torch.rand(6, 5) < 0.3

    def call() -> dict[str, Tensor]:
        found = module(leaves["x"], states_of(leaves), lengths=lengths, reset=reset)
        return {name: value.detach() for name, value in flatten(found).items()}

    training = call()
    with torch.no_grad():
        assert_bitwise(call(), training)


@pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_autocast_does_not_widen_to_float64(kind: str) -> None:
    """Input of float32 for weights of float64 is the error that it is in torch.nn."""
    module = build(kind, 8, 16, dtype=torch.float64)
    x = torch.randn((3, 8) if kind in CELLS else (5, 3, 8))
    for m in (module, oracle.twin(module)):
        with pytest.raises((RuntimeError, ValueError)):
            autocast(m, {"x": x})


@pytest.mark.parametrize("kind", LAYERS)
def test_a_scaled_step(kind: str) -> None:
    """GradScaler takes the step if all gradients are finite, and skips it if one is not."""
    module, x = build(kind, 4, 6), torch.randn(5, 3, 4)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    scaler = torch.amp.GradScaler(x.device.type, init_scale=2.0**10)
    for factor in (1.0, float("inf")):
        before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
        scale = scaler.get_scale()
        with support.autocast(torch.float16):
            loss = module(x)[0].float().square().mean() * factor
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        after = dict(module.named_parameters())
        stepped = [not torch.equal(after[name], before[name]) for name in before]
        assert stepped == [factor == 1.0] * len(before)
        assert scaler.get_scale() == (scale if factor == 1.0 else scale / 2)
