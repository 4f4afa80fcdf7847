"""Numbers: sizes that are multiples of nothing, exactness, the ends of the range, NaN, and
independence of rows.
"""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from support import (
    DTYPES,
    FORMS,
    LAYERS,
    WIDE_DTYPES,
    Leaves,
    assert_bitwise,
    build,
    build_form,
    check,
    evaluate,
    flatten,
    initial_states,
    leaves_for,
    of_integers,
    on_threads,
    pair,
    plain,
    states_of,
    with_integer_gradients,
)
from torch import Tensor, nn

import rnnkern
from rnnkern import tolerance

# What rnnkern promises for its sigmoid and tanh, in units of the last place.
MAX_ULP = 2.0

INFINITE = float("inf")
BATCHES = (1, 2, 3, 5, 6, 7, 13, 64)
HIDDEN = (1, 3, 15, 16, 17, 31, 33, 63, 65, 129)

one_thread = on_threads(plain, 1)


@pytest.mark.kernel
@pytest.mark.parametrize(("H", "threads"), [(H, 1) for H in HIDDEN] + [(17, 2), (129, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_hidden_sizes(form: str, H: int, threads: int) -> None:
    # A projection to 0 features, at H = 1, is none.
    module = build_form(form, 5, H, bidirectional=True, proj_size=H // 2)
    check(module, leaves_for(module, 4, 5), on_threads(plain, threads), oracle_call=one_thread)


@pytest.mark.kernel
@pytest.mark.parametrize(("N", "threads"), [(N, 1) for N in BATCHES] + [(2, 2), (13, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_batch_sizes(form: str, N: int, threads: int) -> None:
    for H in (16, 33):
        module = build_form(form, 3, H)
        check(module, leaves_for(module, 4, N), on_threads(plain, threads), oracle_call=one_thread)


@pytest.mark.kernel
@pytest.mark.parametrize("I", [1, 2, 15, 17, 64, 131])
@pytest.mark.parametrize("form", FORMS)
def test_input_sizes_agree_with_torch_nn(form: str, I: int) -> None:
    module = build_form(form, I, 9)
    check(module, leaves_for(module, 3, 3))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 29])
@pytest.mark.parametrize("N", [1, 4])
@pytest.mark.parametrize("form", FORMS)
def test_lengths_of_sequences(form: str, N: int, T: int, dtype: torch.dtype) -> None:
    module = build_form(form, 3, 18, dtype=dtype, num_layers=2, bidirectional=True)
    check(module, leaves_for(module, T, N))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_one_of_everything(kind: str, dtype: torch.dtype) -> None:
    module = build(kind, 1, 1, dtype=dtype)
    check(module, leaves_for(module, 1, 1))


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_a_long_sequence(form: str, dtype: torch.dtype) -> None:
    module = build_form(form, 3, 20, dtype=dtype)
    check(module, leaves_for(module, 300, 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("T", "N", "I", "H"),
    [(3, 70, 40, 200), (3, 1, 300, 260), (2, 4, 520, 30), (10, 64, 28, 64)],
    ids=["batch", "one-row", "wide-input", "mnist"],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_sizes_that_several_threads_share(
    kind: str,
    T: int,
    N: int,
    I: int,
    H: int,
    threads: int,
    dtype: torch.dtype,
) -> None:
    module = build(kind, I, H, dtype=dtype)
    check(module, leaves_for(module, T, N), on_threads(plain, threads), oracle_call=one_thread)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_notebooks_comparison(kind: str) -> None:
    """Input 3, hidden 3, ten steps, every parameter 0.3, and the notebook's own criterion."""
    ours, theirs = build(kind, 3, 3), getattr(nn, kind)(3, 3)
    for module in (ours, theirs):
        for parameter in module.parameters():
            nn.init.constant_(parameter, 0.3)
    leaves = {"x": torch.randn(10, 1, 3)}
    got, wanted = evaluate(ours, leaves), evaluate(theirs, leaves)
    for name in wanted:
        assert tolerance.squared_difference(got[name], wanted[name]) < tolerance.NOTEBOOK_LIMIT


def ulps(values: Tensor, exact: np.ndarray[Any, np.dtype[np.longdouble]]) -> Tensor:
    """The error of each value in units of the last place of the exact result."""
    found = values.cpu().numpy()
    spacing = np.spacing(np.abs(exact).astype(found.dtype)).astype(np.longdouble)
    return torch.from_numpy((np.abs(found - exact) / spacing).astype(np.float64))


def precisely(x: Tensor) -> np.ndarray[Any, np.dtype[np.longdouble]]:
    return x.cpu().numpy().astype(np.longdouble)


def grid(dtype: torch.dtype, count: int) -> Tensor:
    """Arguments of every magnitude at which tanh and sigmoid are neither 0 nor 1, both signs."""
    magnitudes = torch.cat([torch.linspace(0, 20, count), torch.logspace(-30, 0, count // 3)])
    jitter = torch.rand(magnitudes.shape, generator=torch.Generator().manual_seed(2))
    magnitudes = (magnitudes.double() * (1 + 0.01 * jitter.double())).to(dtype)
    return torch.cat([magnitudes, -magnitudes])


# Which axis of the call the vectors run along, and on how many numbers. The axis with many numbers
# shows the largest errors.
ALONG = {"rows": 300_000, "steps": 3000, "units": 600}


@pytest.mark.kernel
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_tanh_to_the_last_places(dtype: torch.dtype, along: str) -> None:
    """An RNN without recurrence and bias is tanh."""
    x = grid(dtype, ALONG[along])
    module = build("RNN", 1, x.numel() if along == "units" else 1, dtype=dtype, bias=False)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        if along == "units":
            module.weight_ih_l0.copy_(x.unsqueeze(1))
            y, _ = module(x.new_ones(1, 1, 1))
        else:
            module.weight_ih_l0.fill_(1.0)
            y, _ = module(x.view((1, -1, 1) if along == "rows" else (-1, 1, 1)))
    assert ulps(y.flatten(), np.tanh(precisely(x))).max() <= MAX_ULP


@pytest.mark.kernel
@pytest.mark.parametrize("along", ALONG)
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_sigmoid_to_the_last_places(dtype: torch.dtype, along: str) -> None:
    """With the input gate shut and c = 1 before the step, LSTM's cell state is the sigmoid of the
    forget gate.
    """
    x = grid(dtype, ALONG[along])
    if along == "steps":  # every step a call, because c is 1 only at the start
        x = x[::5]
    H = x.numel() if along == "units" else 1
    module = build("LSTM", 1, H, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[H : 2 * H] = x.unsqueeze(1) if along == "units" else 1.0
        module.bias_ih_l0[:H] = -INFINITE
        inputs = x.new_ones(1, 1, 1) if along == "units" else x.view(-1, 1, 1)
        if along == "rows":
            inputs = inputs.transpose(0, 1)
        cells = []
        for step in inputs.split(1):
            zeros = x.new_zeros(1, step.shape[1], H)
            cells.append(module(step, (zeros, zeros + 1))[1][1])
    exact = 1 / (1 + np.exp(-precisely(x)))
    assert ulps(torch.cat(cells).flatten(), exact).max() <= MAX_ULP


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_sigmoid_of_very_small_numbers(dtype: torch.dtype) -> None:
    """To the last places as long as it is a normal number, then zero."""
    least = -87.0 if dtype == torch.float32 else -708.0
    x = torch.cat([torch.linspace(least, -20, 1000), torch.tensor([least - 2, 2 * least, -1e30])])
    x = x.to(dtype)
    module = build("LSTM", 1, 1, dtype=dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[1] = 1.0  # c = sigmoid(x) * 1, and the input gate is shut
        module.bias_ih_l0[0] = -INFINITE
        zeros = x.new_zeros(1, len(x), 1)
        _, (_, c) = module(x.view(1, -1, 1), (zeros, zeros + 1))
        module.bias_ih_l0[1] = -INFINITE
        _, (_, shut) = module(x.view(1, -1, 1), (zeros, zeros + 1))
    exact = 1 / (1 + np.exp(-precisely(x[:1000])))
    assert ulps(c.flatten()[:1000], exact).max() <= MAX_ULP
    # A GPU does not flush the denormal numbers of float64.
    flushed = x.device.type == "cpu" or dtype == torch.float32
    limit = 0.0 if flushed else torch.finfo(dtype).smallest_normal
    assert (c.flatten()[1000:].abs() <= limit).all()
    assert (shut == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_rows_do_not_depend_on_their_neighbours(form: str, dtype: torch.dtype) -> None:
    """Alone, one of two and the odd one of three: the same kernel gives the same bits."""
    module = build_form(form, 16, 64, dtype=dtype)
    x = torch.randn(100, 3, 16).to(dtype)
    with torch.no_grad():
        alone = torch.cat([module(x[:, n : n + 1].contiguous())[0] for n in range(3)], 1)
        assert torch.equal(module(x)[0], alone)
        assert torch.equal(module(x[:, :2].contiguous())[0], alone[:, :2])


@pytest.mark.kernel
@pytest.mark.parametrize("number", [INFINITE, -INFINITE, 1e30, -1e30, 200.0, -200.0, 1e-40, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_ends_of_the_range(form: str, dtype: torch.dtype, number: float) -> None:
    """Infinite, huge and denormal inputs (the kernels take these as zero) give what torch.nn gives
    within the tolerance: saturated gates, and NaN only where it has NaN.
    """
    module = build_form(form, 3, 5, dtype=dtype)
    leaves = leaves_for(module, 4, 3)
    given = torch.tensor(number, dtype=dtype)  # 1e30 is infinite in float16
    leaves["x"][1, 0, 1] = given
    leaves["x"][2, 1] = given
    check(module, leaves, backward=False)


@pytest.mark.kernel
@pytest.mark.parametrize("N", [2, 7, 64])
@pytest.mark.parametrize(
    ("form", "where"),
    [
        (form, where)
        for form in FORMS
        for where in ("x", "h0", "c0")
        if "LSTM" in form or where != "c0"
    ],
)
def test_nan_stays_in_its_row(form: str, N: int, where: str) -> None:
    module = build_form(form, 3, 17, bidirectional=True)
    leaves = leaves_for(module, 6, N)
    clean = flatten(plain(module, leaves))
    leaves[where].view(-1, N, leaves[where].shape[-1])[:, N // 2] = float("nan")
    dirty = flatten(plain(module, leaves))
    others = torch.arange(N) != N // 2
    for name in clean:
        assert torch.equal(dirty[name][:, others], clean[name][:, others])
    assert dirty["out.0"][:, N // 2].isnan().all()


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_nan_begins_at_its_step(form: str) -> None:
    module = build_form(form, 3, 17)
    x = torch.randn(6, 3, 3)
    clean, _ = module(x)
    x[4, 1, 2] = float("nan")
    dirty, _ = module(x)
    assert torch.equal(dirty[:4], clean[:4])
    assert dirty[4:, 1].isnan().all()
    assert not dirty[:, [0, 2]].isnan().any()


@pytest.mark.kernel
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_no_state_is_a_state_of_zeros(form: str, T: int, dtype: torch.dtype) -> None:
    """To the bit, although the product with it is left out."""
    module = build_form(form, 16, 40, dtype=dtype, bidirectional=True)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves_for(module, T, 3).items()}
    for name in leaves.keys() - {"x"}:
        leaves[name].zero_()
    with torch.no_grad():
        assert_bitwise(flatten(module(leaves["x"])), flatten(plain(module, leaves)))


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_a_step_from_zeros_does_not_read_w_hh(form: str) -> None:
    module = build_form(form, 16, 40)
    x = torch.randn(1, 3, 16)
    wanted = module(x)[0]
    with torch.no_grad():
        module.weight_hh_l0.fill_(float("nan"))
    assert torch.equal(module(x)[0], wanted)


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_denormals_stay(kind: str, threads: int) -> None:
    """Neither the import nor a call makes torch or numpy flush denormal numbers to zero, in any
    thread of the pool.
    """
    torch.set_num_threads(threads)
    module = build(kind, 3, 64)
    module(torch.randn(20, 64, 3))[0].sum().backward()
    smallest = torch.finfo(torch.float32).smallest_normal
    assert (torch.full((10**6,), smallest) / 4 > 0).all()
    assert np.float32(smallest) / np.float32(4) > 0


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "threads"), [(1, 1), (64, 2)])
def test_denormals_are_flushed_inside(N: int, threads: int, dtype: torch.dtype) -> None:
    """A state that decays passes through denormal numbers, each of which would cost over a hundred
    cycles: they are zero instead, forward and backward.
    """
    torch.set_num_threads(threads)
    module = build("RNN", 64, 64, nonlinearity="relu", bias=False, dtype=dtype)
    small = 2.0 ** (-(-math.frexp(torch.finfo(dtype).smallest_normal)[1] // 2) - 8)
    x = torch.full((20, N, 64), small, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        module.weight_ih_l0.copy_(small * torch.eye(64, dtype=dtype))
        module.weight_hh_l0.copy_(0.5 * torch.eye(64, dtype=dtype))
    y, h = module(x)
    assert (y == 0).all()
    assert (h == 0).all()
    with torch.no_grad():
        x.fill_(1.0)  # lets relu pass, so that gradients flow
    y, _ = module(x)
    assert (y > 0).all()
    y.backward(torch.full_like(y, small))
    assert x.grad is not None
    assert (x.grad == 0).all()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H"), [(1, 5), (3, 16), (7, 33), (64, 65)])
def test_integers_are_exact(N: int, H: int, dtype: torch.dtype) -> None:
    """With relu and integers every product and sum is exact, so that no order of summation may
    show: all bits agree. In 16 bits so are the states of two steps, and a result is rounded once.
    """
    T = 6 if dtype in WIDE_DTYPES else 2
    module, leaves = of_integers(T, N, 6, H, dtype)
    got = with_integer_gradients(module, leaves)
    wanted = with_integer_gradients(oracle.twin(module, torch.float64), leaves)
    assert max(float(value.abs().max()) for value in wanted.values()) < 2**24
    assert_bitwise(got, {name: value.to(dtype) for name, value in wanted.items()})


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("deterministic")
def test_deterministic_rows_are_independent(form: str, dtype: torch.dtype) -> None:
    """Under deterministic algorithms a row has the same bits in whatever batch it is."""
    module = build_form(form, 11, 37, num_layers=2, bidirectional=True, dtype=dtype)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves_for(module, 5, 13).items()}
    whole = flatten(plain(module, leaves))
    for rows in ([4], [12, 0], [1, 2, 3, 5, 8, 9, 11]):
        part = {name: leaf[:, rows] for name, leaf in leaves.items()}
        assert_bitwise(flatten(plain(module, part)), {k: v[:, rows] for k, v in whole.items()})


@pytest.mark.kernel
@pytest.mark.parametrize("N", [1, 6])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("deterministic")
def test_deterministic_blocks(form: str, dtype: torch.dtype, N: int) -> None:
    """Under deterministic algorithms a sequence fed in blocks has the bits of one fed at once."""
    module = build_form(form, 11, 37, num_layers=2, dtype=dtype)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves_for(module, 9, N).items()}
    whole = flatten(plain(module, leaves))
    outputs, state = [], states_of(leaves)
    for block in leaves["x"].split([1, 3, 1, 4]):
        y, state = module(block, state)
        outputs.append(y)
    assert_bitwise(flatten((torch.cat(outputs), state)), whole)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_blocks_carry_the_state(form: str) -> None:
    module = build_form(form, 3, 17, num_layers=2)

    def call(m: nn.Module, own: Leaves) -> Any:
        outputs, state = [], states_of(own)
        for block in own["x"].split([1, 3, 1, 4]):
            y, state = m(block, state)
            outputs.append(y)
        return torch.cat(outputs), state

    check(module, leaves_for(module, 9, 2), call, oracle_call=plain)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.usefixtures("deterministic")
def test_repeated_runs_agree(form: str) -> None:
    """Two runs agree in every bit, gradients too; memory filled with NaN is all written."""
    torch.set_num_threads(2)
    module = build_form(form, 11, 37, num_layers=2, bidirectional=True)
    leaves = leaves_for(module, 5, 13)
    first = evaluate(module, leaves)
    assert not [name for name, value in first.items() if not value.isfinite().all()]
    assert_bitwise(evaluate(module, leaves), first)


@pytest.mark.parametrize("kind", LAYERS)
def test_inputs_are_left_alone(kind: str) -> None:
    module = build(kind, 4, 6, num_layers=2, bidirectional=True)
    leaves = leaves_for(module, 5, 3) | {f"p.{name}": p for name, p in module.named_parameters()}
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    for leaf in leaves.values():
        leaf.requires_grad_()
    y, _ = plain(module, leaves)
    y.square().sum().backward()
    assert_bitwise({name: leaf.detach() for name, leaf in leaves.items()}, before)


@pytest.mark.parametrize("options", [{}, {"lengths": torch.tensor([5, 0, 2])}], ids=["", "lengths"])
@pytest.mark.parametrize("kind", LAYERS)
def test_outputs_do_not_share_memory(kind: str, options: dict[str, Tensor]) -> None:
    """What a user does to one output or to the initial state shows in no other output."""
    module = getattr(rnnkern, kind)(4, 6)
    with torch.no_grad():
        leaves = leaves_for(module, 5, 3)
        outputs = flatten(module(leaves["x"], states_of(leaves), **options))
        copies = {name: output.clone() for name, output in outputs.items()}
        for state in initial_states(module, 3):
            leaves[state].fill_(9.0)
        outputs["out.0"].fill_(9.0)
    for name in set(outputs) - {"out.0"}:
        assert torch.equal(outputs[name], copies[name])


# Below 16 KiB the memory of a result is ours, above it is torch's.
@pytest.mark.parametrize("T", [3, 2000], ids=["small", "large"])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_results_lie_in_memory_as_those_of_torch(kind: str, batch_first: bool, T: int) -> None:
    module = build(kind, 4, 6, bidirectional=True, batch_first=batch_first)
    theirs = getattr(nn, kind)(4, 6, bidirectional=True, batch_first=batch_first)
    x = torch.randn(2, T, 4) if batch_first else torch.randn(T, 2, 4)
    for result, wanted in zip(
        flatten(module(x)).values(), flatten(theirs(x)).values(), strict=True
    ):
        assert (result.shape, result.stride()) == (wanted.shape, wanted.stride())
        assert result.storage_offset() == 0
        assert result.data_ptr() % 64 == 0
        assert not result._is_view()


@pytest.mark.parametrize("kind", LAYERS)
def test_small_results_outlive_everything(kind: str) -> None:
    """Each result, and each gradient, stays when the others and the module are gone, and can be
    copied, pickled and shared between processes.
    """

    def results() -> dict[str, Tensor]:
        torch.manual_seed(0)
        module = build(kind, 4, 6)
        found = flatten(module(torch.randn(3, 2, 4)))
        found["out.0"].sum().backward()
        gradients = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
        return {name: t.detach() for name, t in found.items()} | gradients

    wanted = {name: t.clone() for name, t in results().items()}
    for name, value in wanted.items():
        result = results()[name]
        for _ in range(30):  # reuses what was freed
            results()
        assert torch.equal(result, value)
        assert torch.equal(copy.deepcopy(result), value)
        assert torch.equal(pickle.loads(pickle.dumps(result)), value)
        result.share_memory_()
        assert torch.equal(result, value)


def test_relu_passes_the_gradient_of_nan() -> None:
    gradients = []
    x = torch.randn(3, 2, 4)
    x[1, 0] = float("nan")
    for module in pair("RNN", 4, 4, nonlinearity="relu"):
        module(x)[0].sum().backward()
        gradients.append(module.bias_ih_l0.grad)
    torch.testing.assert_close(*gradients, equal_nan=True)
