"""The shared workloads (sizes, numbers, count of FLOPs) and the rule for what is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import rnnkern
from rnnkern import tolerance
from rnnkern.bench import workloads
from rnnkern.bench.workloads import FORWARD, FORWARD_BACKWARD, FORWARD_GRAD, Workload

pytestmark = pytest.mark.cpu_only

EPS = torch.finfo(torch.float32).eps


def test_the_notebook_comes_first_on_every_device() -> None:
    for device_type in ("cpu", "cuda"):
        first = next(iter(workloads.load_workloads(device_type).values()))
        sizes = (first.steps, first.batch, first.input_size, first.hidden_size)
        assert (first.name, sizes) == ("notebook", (10, 1, 3, 3))


def test_names_sizes_and_the_nonlinearity_their_origin_tells() -> None:
    known = workloads.load_workloads()
    assert len(known) == 14
    for name, w in known.items():
        assert w.name == name
        assert min(w.steps, w.batch, w.input_size, w.hidden_size) >= 1
        assert w.origin
        assert w.nonlinearity == ("relu" if "relu" in w.origin else "tanh")
    assert known["xlarge"].hidden_size == 1024
    assert {"h128", "h129", "long"} <= workloads.load_workloads("cuda").keys()


@pytest.mark.parametrize(
    ("cell", "pass_name", "expected"),
    [
        # T=5 N=2 I=3 H=7: 2 * 5 * 2 * (7 * 3 + 7 * 7) = 1400 for one gate
        ("RNN", FORWARD, 1400),
        ("RNN", FORWARD_GRAD, 1400),
        ("RNN", FORWARD_BACKWARD, 4200),
        ("GRU", FORWARD, 4200),
        ("LSTM", FORWARD, 5600),
        ("LSTM", FORWARD_BACKWARD, 16800),
    ],
)
def test_flops(cell: str, pass_name: str, expected: int) -> None:
    assert workloads.flops(cell, Workload("x", 5, 2, 3, 7), pass_name) == expected


def test_a_case_is_the_same_every_time_and_leaves_the_random_state_alone() -> None:
    workload = Workload("x", 4, 2, 3, 5)
    before = torch.get_rng_state()
    a, b = (workloads.draw_case("GRU", workload) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(a.x, b.x)
    assert torch.equal(a.dy, b.dy)
    assert all(torch.equal(a.state[name], b.state[name]) for name in a.state)


def test_a_case_is_drawn_on_the_cpu_whatever_the_default_device_is() -> None:
    workload = Workload("x", 4, 2, 3, 5)
    wanted = workloads.draw_case("RNN", workload)
    with torch.device("meta"):
        case = workloads.draw_case("RNN", workload)
    assert torch.equal(case.x, wanted.x)
    assert torch.equal(case.dy, wanted.dy)
    assert all(torch.equal(case.state[name], wanted.state[name]) for name in wanted.state)


def test_dtypes_of_each_device() -> None:
    names = {
        device_type: [p.name for p in workloads.default_precisions(device_type)]
        for device_type in ("cpu", "cuda")
    }
    assert names == {"cpu": ["float32"], "cuda": ["float32", "tf32", "bfloat16", "float16"]}
    assert [p.name for p in workloads.PRECISIONS.values() if p.tf32] == ["tf32"]
    for name, precision in workloads.PRECISIONS.items():
        assert precision.name == name
        assert str(precision.dtype) == f"torch.{'float32' if precision.tf32 else name}"


@pytest.fixture
def set_tf32() -> Iterator[Callable[[tuple[bool, bool]], None]]:
    """Sets TF32 in cuDNN and in products, for the time of the test."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    at_first = cudnn.allow_tf32, matmul.allow_tf32

    def set_both(flags: tuple[bool, bool]) -> None:
        cudnn.allow_tf32, matmul.allow_tf32 = flags

    yield set_both
    set_both(at_first)


@pytest.mark.parametrize("before", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_set_and_restored(
    set_tf32: Callable[[tuple[bool, bool]], None], allowed: bool, before: tuple[bool, bool]
) -> None:
    def flags() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    set_tf32(before)
    with workloads.tf32_allowed(allowed):
        assert flags() == (allowed, allowed)
    assert flags() == before
    with pytest.raises(KeyError), workloads.tf32_allowed(allowed):
        raise KeyError
    assert flags() == before


def test_both_sides_have_the_same_numbers_and_nothing_in_common() -> None:
    case = workloads.draw_case("LSTM", Workload("x", 4, 2, 3, 5))
    ours, theirs = (case.side(library, torch.float64) for library in (rnnkern, nn))
    assert type(ours.module) is rnnkern.LSTM
    assert type(theirs.module) is nn.LSTM
    for a, b in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert torch.equal(ours.x, theirs.x)
    assert ours.x.data_ptr() != theirs.x.data_ptr()


def test_the_notebooks_parameters_are_all_constant() -> None:
    state = workloads.notebook_case("GRU").state
    assert all(bool((parameter == 0.3).all()) for parameter in state.values())


def test_no_relu_of_mnist_rnn_is_at_its_kink() -> None:
    # Else the gradient could be wrong by any amount in float32 and the check of it mean nothing.
    case = workloads.draw_case("RNN", workloads.load_workloads()["mnist_rnn"])
    side = case.side(nn, torch.float64)
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in side.module.parameters())
    h = side.results(FORWARD)["output"]
    previous = torch.cat([torch.zeros_like(h[:1]), h[:-1]])
    before_relu = side.x.detach() @ w_ih.T + b_ih + previous @ w_hh.T + b_hh
    assert torch.equal(before_relu > 0, h > 0)
    assert before_relu.abs().min() > 5e-6


@pytest.mark.parametrize("pass_name", workloads.PASSES)
def test_results_and_calls_of_each_pass(pass_name: str) -> None:
    side = workloads.draw_case("LSTM", Workload("x", 4, 2, 3, 5)).side(nn, torch.float32)
    found = side.results(pass_name)
    gradients = {name for name in found if name.startswith("grad of")}
    assert set(found) - gradients == {"output", "h_n", "c_n"}
    assert len(gradients) == (5 if pass_name == FORWARD_BACKWARD else 0)
    with workloads.grad_mode(pass_name):
        result = side.call(pass_name)()
    if pass_name == FORWARD_BACKWARD:  # the second call's gradients are not added to the first's
        side.call(pass_name)()
        assert side.x.grad is not None
        assert torch.equal(side.x.grad, found["grad of input"])
    else:
        assert isinstance(result, tuple)
        assert result[0].requires_grad == (pass_name == FORWARD_GRAD)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cell", workloads.CELLS)
def test_our_modules_pass_the_check(cell: str, dtype: torch.dtype) -> None:
    verdicts = workloads.check_case(workloads.draw_case(cell, Workload("x", 6, 3, 5, 9)), dtype)
    assert {name: str(verdict) for name, verdict in verdicts.items() if not verdict} == {}
    assert {"output", "output without grad", "h_n", "grad of input"} <= verdicts.keys()


def test_one_reference_serves_several_checks() -> None:
    case = workloads.draw_case("GRU", Workload("x", 6, 3, 5, 9))
    reference = workloads.reference_results(case)
    for dtype in (torch.float32, torch.bfloat16):
        verdicts = workloads.check_case(case, dtype, reference=reference)
        assert verdicts == workloads.check_case(case, dtype)
        assert all(verdicts.values())
    wrong = reference | {"h_n": reference["h_n"] + 0.1}
    assert workloads.check_case(case, torch.float32, reference=wrong)["h_n"].error > 1e5


@pytest.mark.parametrize(
    ("passes", "present", "absent"),
    [
        ([FORWARD], {"output without grad"}, {"output", "grad of input"}),
        ([FORWARD_GRAD], {"output"}, {"output without grad", "grad of input"}),
        ([FORWARD_BACKWARD], {"output", "grad of input"}, {"output without grad"}),
    ],
)
def test_only_what_the_passes_compute_is_checked(
    passes: list[str], present: set[str], absent: set[str]
) -> None:
    case = workloads.draw_case("RNN", Workload("x", 3, 1, 2, 2))
    names = workloads.check_case(case, torch.float32, passes=passes).keys()
    assert present <= names
    assert not absent & names


def judge(ours: torch.Tensor, off: float = 0.0) -> tolerance.Verdict:
    """The verdict on ``ours`` where ones are right and torch.nn is off by that much."""
    exact = torch.ones(3, dtype=torch.float64)
    return tolerance.check(ours, (exact + off).float(), exact)


@pytest.mark.parametrize(
    ("our_eps", "torch_eps", "ok"),
    [
        (0, 0, True),
        (16, 0, True),  # the floor
        (17, 0, False),
        (216, 100, True),  # twice torch.nn's, and the floor
        (217, 100, False),
        (0, 1000, True),
    ],
)
def test_the_limit_is_twice_the_error_of_torch_and_a_floor(
    our_eps: int, torch_eps: int, ok: bool
) -> None:
    verdict = judge(torch.tensor([1.0, 1.0 + our_eps * EPS, 1.0]), torch_eps * EPS)
    assert bool(verdict) is ok
    assert verdict.error == our_eps
    assert verdict.torch_error == torch_eps


def test_errors_are_relative_to_the_largest_element() -> None:
    exact = torch.tensor([1000.0, 0.0], dtype=torch.float64)
    assert tolerance.error_eps(torch.tensor([1000.0, 1000 * EPS]), exact) == pytest.approx(1)
    assert tolerance.error_eps(torch.empty(0), torch.empty(0, dtype=torch.float64)) == 0


@pytest.mark.parametrize(
    "ours",
    [
        torch.tensor([1.0, math.nan, 1.0]),
        torch.tensor([1.0, math.inf, 1.0]),
        torch.ones(2),
        torch.ones(3, 1),
        torch.ones(3, dtype=torch.bfloat16),
        torch.ones(3, dtype=torch.int64),
    ],
    ids=["nan", "inf", "shape", "dimensions", "dtype", "integer"],
)
def test_what_is_wrong_beyond_rounding(ours: torch.Tensor) -> None:
    verdict = judge(ours)
    assert not verdict
    assert verdict.problem
    assert str(verdict) == verdict.problem
    # Nor does torch.nn going wrong at the same time excuse it.
    assert not judge(ours, off=math.inf)


def test_nan_and_infinity_belong_where_the_reference_has_them() -> None:
    exact = torch.tensor([math.nan, math.inf, -math.inf, 1e300, 1.0], dtype=torch.float64)
    right = exact.float()  # 1e300 is infinite in float32
    assert tolerance.check(right, right, exact)
    swapped = right[[0, 2, 1, 3, 4]]
    assert not tolerance.check(swapped, right, exact)
    assert not tolerance.check(right.nan_to_num(), right, exact)


def test_float64_is_measured_by_float32() -> None:
    eps = torch.finfo(torch.float64).eps
    exact = torch.ones(1, dtype=torch.float64)
    theirs = torch.tensor([1 + 100 * EPS])
    assert tolerance.check(exact + 216 * eps, theirs, exact)
    assert not tolerance.check(exact + 218 * eps, theirs, exact)


def test_the_check_wants_a_reference_that_fits() -> None:
    with pytest.raises(ValueError, match="float64"):
        tolerance.check(torch.ones(1), torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"\(2,\)"):
        tolerance.check(torch.ones(1), torch.ones(2), torch.ones(1, dtype=torch.float64))


def rms(error: torch.Tensor) -> float:
    return float(error.double().square().mean().sqrt())


@pytest.mark.parametrize("name", ["mnist_rnn", "mnist_one", "sentiment", "speech_block"])
@pytest.mark.parametrize("cell", workloads.CELLS)
def test_rounding_is_that_of_torch(cell: str, name: str) -> None:
    """In the mean square at most half more, for the output, the states and every gradient: sums are
    not one long chain.
    """
    case = workloads.draw_case(cell, workloads.load_workloads()[name])
    reference = case.side(nn, torch.float64).results(FORWARD_BACKWARD)
    ours, theirs = (
        case.side(library, torch.float32).results(FORWARD_BACKWARD) for library in (rnnkern, nn)
    )
    for what, exact in reference.items():
        floor = 0.1 * EPS * float(exact.abs().max())
        limit = 1.5 * rms(theirs[what] - exact) + floor
        assert rms(ours[what] - exact) <= limit, what
