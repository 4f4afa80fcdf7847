"""What only a GPU has: streams, graphs, TF32, several devices, other memory.

Everything else is tested by the other files, whose tests run on the GPU too. There torch.nn
computes by torch's own operators; here by cuDNN, as its users have it.
"""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import oracle
import pytest
import subprocesses
import torch
from support import (
    CELLS,
    DTYPES,
    FORMS,
    LAYERS,
    WIDE_DTYPES,
    Leaves,
    assert_agree,
    assert_bitwise,
    autocast,
    build,
    build_form,
    check,
    check_as_tf32,
    cudnn,
    evaluate,
    flatten,
    in_a_process,
    initial_states,
    leaves_for,
    of_integers,
    plain,
    states_of,
    with_integer_gradients,
)
from test_cuda_cells import has_nvcc
from test_own_cells import check_against_reference
from torch import Tensor, nn

import rnnkern
from rnnkern.bench import cli, compare
from rnnkern.bench.workloads import PASSES, default_precisions, tf32_allowed

pytestmark = pytest.mark.cuda

T, N, I, H = 7, 5, 9, 33
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def with_cudnn(device: torch.device) -> Iterator[None]:
    """After conftest.py has turned it off."""
    with cudnn():
        yield


# Sizes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("H", [1, 3, 31, 33, 63, 65, 127, 129, 255, 257, 512, 1024, 1100])
@pytest.mark.parametrize("N", [1, 7, 8, 9, 17, 33])
@pytest.mark.parametrize("kind", LAYERS)
def test_around_the_edges_of_tiles(kind: str, N: int, H: int, dtype: torch.dtype) -> None:
    module = build(kind, H, H, dtype=dtype)
    check(module, leaves_for(module, 3, N))


@pytest.mark.parametrize("I", [1, 2, 7, 8, 17, 64, 131, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_input_sizes_agree_with_torch_nn(kind: str, dtype: torch.dtype, I: int) -> None:
    module = build(kind, I, 40, dtype=dtype)
    check(module, leaves_for(module, 3, 9))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_many_steps_agree_with_torch_nn(kind: str, dtype: torch.dtype) -> None:
    module = build(kind, 8, 65, dtype=dtype)
    check(module, leaves_for(module, 3000, 3))


@pytest.mark.parametrize("kind", LAYERS)
def test_many_rows_agree_with_torch_nn(kind: str) -> None:
    module = build(kind, 12, 65)
    check(module, leaves_for(module, 3, 2000))


@pytest.mark.parametrize("H", [40, 129, 512])
@pytest.mark.parametrize("kind", LAYERS)
def test_tf32(kind: str, H: int) -> None:
    module = build(kind, H, H)
    with tf32_allowed(True):
        check_as_tf32(module, leaves_for(module, 20, 33))


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H"), [(1, 5), (7, 33), (33, 129), (64, 257)])
def test_integers_are_those_of_the_cpu(N: int, H: int, dtype: torch.dtype) -> None:
    module, leaves = of_integers(6, N, 6, H, dtype)
    on_cpu = {name: leaf.cpu() for name, leaf in leaves.items()}
    wanted = with_integer_gradients(copy.deepcopy(module).cpu(), on_cpu)
    got = with_integer_gradients(module, leaves)
    assert max(float(value.abs().max()) for value in wanted.values()) < 2**24
    assert_bitwise({name: value.cpu() for name, value in got.items()}, wanted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_two_runs_are_bitwise_equal(form: str, dtype: torch.dtype) -> None:
    module = build_form(form, 40, 257, dtype=dtype, num_layers=2, bidirectional=True)
    leaves = leaves_for(module, 20, 33)
    first = evaluate(module, leaves)
    for _ in range(3):
        assert_bitwise(evaluate(module, leaves), first)


# Threads


@pytest.mark.parametrize("tier", ["resident", "stepwise"])
def test_several_threads_at_once(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are queued without the interpreter, and cuBLAS is called by one at a time."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    modules = [build(kind, 40, 129) for kind in (*LAYERS, "LSTM")]
    cases = [(module, leaves_for(module, 200, 9)) for module in modules]
    expected = [evaluate(module, leaves) for module, leaves in cases]
    torch.cuda.synchronize()

    def on_a_stream(case: tuple[Any, Leaves]) -> dict[str, Tensor]:
        stream: Any = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            results = evaluate(*case)
        stream.synchronize()
        return results

    with ThreadPoolExecutor(len(cases)) as pool:
        for results, wanted in zip(pool.map(on_a_stream, cases), expected, strict=True):
            assert_bitwise(results, wanted)


# Tensors in other memory


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_there_and_back(kind: str) -> None:
    with torch.device("cpu"):
        module = build(kind, I, H)
        leaves = {"x": torch.randn(N, I)} | (initial_states(module, N) if kind in CELLS else {})
        before = evaluate(module, leaves)
    module.cuda()
    check(module, {name: leaf.cuda() for name, leaf in leaves.items()})
    module.cpu()
    with torch.device("cpu"):
        assert_bitwise(evaluate(module, leaves), before)


SEQUENCES: dict[str, Callable[[], dict[str, Tensor]]] = {
    "lengths": lambda: {"lengths": torch.tensor([3, 7, 0, 5, 1])},
    "reset": lambda: {"reset": torch.rand(T, N) < 0.3},
    "both": lambda: {"lengths": torch.tensor([3, 7, 0, 5, 1]), "reset": torch.rand(T, N) < 0.3},
}


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("form", FORMS)
def test_lengths_and_reset_may_lie_on_the_cpu(form: str, sequence: str) -> None:
    module = build_form(form, I, H, bidirectional=True)
    leaves, options = leaves_for(module, T, N), SEQUENCES[sequence]()
    assert all(value.is_cuda for value in options.values())
    on_cpu = {name: value.cpu() for name, value in options.items()}
    results = [
        evaluate(module, leaves, lambda m, own, given=given: m(own["x"], states_of(own), **given))
        for given in (options, on_cpu)
    ]
    assert_bitwise(*results)


def on_the_cpu(module: nn.Module, name: str) -> nn.Module:
    """The module with one of its weights on the CPU."""
    setattr(module, name, nn.Parameter(getattr(module, name).detach().cpu()))
    return module


MIXED: dict[str, Callable[[nn.Module, Tensor, Any], Any]] = {
    "input-on-the-cpu": lambda m, x, hx: m(x.cpu()),
    "input-on-the-gpu": lambda m, x, hx: m.cpu()(x),
    "state-on-the-cpu": lambda m, x, hx: m(
        x, hx.cpu() if isinstance(hx, Tensor) else (hx[0].cpu(), hx[1])
    ),
    "weight-on-the-cpu": lambda m, x, hx: on_the_cpu(
        m, next(name for name, _ in m.named_parameters() if "weight_hh" in name)
    )(x),
    "bias-on-the-cpu": lambda m, x, hx: on_the_cpu(
        m, next(name for name, _ in m.named_parameters() if "bias_ih" in name)
    )(x),
}


@pytest.mark.parametrize("case", MIXED)
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_tensors_of_several_devices_are_refused(kind: str, case: str) -> None:
    module = build(kind, I, H)
    x = torch.randn(N, I)
    states = states_of(initial_states(module, None if kind in LAYERS else N))
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)device|cuda|cpu"):
        MIXED[case](module, x, states)
    torch.cuda.synchronize()


two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU")


@two_gpus
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_another_gpu_than_the_current_one(kind: str) -> None:
    current = torch.cuda.current_device()
    other = torch.device("cuda", (current + 1) % torch.cuda.device_count())
    module = build(kind, I, H).to(other)
    leaves = {"x": torch.randn(N, I)} | (initial_states(module, N) if kind in CELLS else {})
    values = check(module, {name: leaf.to(other) for name, leaf in leaves.items()})
    assert {value.device for value in values.values()} == {other}
    assert torch.cuda.current_device() == current


# Streams. What a stream has still to do is made sure of by a kernel that only takes time.

LONG = 400_000_000  # cycles, about a fifth of a second


def forward_backward(
    module: nn.Module, leaves: Leaves, gradient: Tensor, **options: Tensor
) -> dict[str, Tensor]:
    """Outputs and gradients, with no copy from the host on the way."""
    outputs = flatten(module(leaves["x"], states_of(leaves), **options))
    tensors = leaves | dict(module.named_parameters())
    found = torch.autograd.grad(outputs["out.0"], list(tensors.values()), gradient)
    gradients = {f"d{name}": value for name, value in zip(tensors, found, strict=True)}
    return {name: value.detach() for name, value in outputs.items()} | gradients


def prepared(form: str, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A module, leaves that require grad, and a gradient of the output."""
    module = build_form(form, I, H, dtype=dtype, **options)
    leaves = {
        name: leaf.to(dtype).requires_grad_() for name, leaf in leaves_for(module, T, N).items()
    }
    with torch.no_grad():
        gradient = torch.randn_like(plain(module, leaves)[0])
    return module, leaves, gradient


@pytest.mark.parametrize("form", FORMS)
def test_a_side_stream(form: str) -> None:
    """The input is there only when the stream gets to it."""
    module, leaves, gradient = prepared(form, num_layers=2, bidirectional=True)
    expected = forward_backward(module, leaves, gradient)
    late = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    late_gradient = torch.zeros_like(gradient)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG // 10)
        for name, leaf in late.items():
            leaf.copy_(leaves[name].detach())
        late_gradient.copy_(gradient)
        own = {name: leaf.requires_grad_() for name, leaf in late.items()}
        got = forward_backward(module, own, late_gradient)
    torch.cuda.synchronize()
    assert_bitwise(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_streams_in_turn(form: str) -> None:
    """Scratch memory of a call is not handed to another stream while it is in use."""
    module, leaves, gradient = prepared(form)
    inputs = [
        {name: torch.randn_like(leaf).requires_grad_() for name, leaf in leaves.items()}
        for _ in range(12)
    ]
    expected = [forward_backward(module, own, gradient) for own in inputs]
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    got = []
    for i, own in enumerate(inputs):
        with torch.cuda.stream(streams[i % 3]):
            torch.cuda._sleep(LONG // 1000 * (i % 5))
            got.append(forward_backward(module, own, gradient))
    torch.cuda.synchronize()
    for mine, wanted in zip(got, expected, strict=True):
        assert_bitwise(mine, wanted)


@contextmanager
def no_waiting() -> Iterator[None]:
    """An error where torch waits for the GPU, and where anything has waited at the end."""
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda._sleep(LONG)
    busy = torch.cuda.Event()
    busy.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
        assert not busy.query()
    finally:
        torch.cuda.set_sync_debug_mode(before)
        torch.cuda.synchronize()


SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no-bias": {"bias": False},
    "batch-first": {"batch_first": True},
    "stacked": {"num_layers": 2, "bidirectional": True},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits(form: str, settings: str, dtype: torch.dtype) -> None:
    module, leaves, gradient = prepared(form, dtype, **SETTINGS[settings])
    expected = forward_backward(module, leaves, gradient)  # memory is asked for once
    with no_waiting():
        got = forward_backward(module, leaves, gradient)
    assert_bitwise(got, expected)


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("form", FORMS)
def test_nothing_waits_for_lengths_and_reset(form: str, sequence: str) -> None:
    module, leaves, gradient = prepared(form, bidirectional=True)
    options = SEQUENCES[sequence]()
    expected = forward_backward(module, leaves, gradient, **options)
    with no_waiting():
        got = forward_backward(module, leaves, gradient, **options)
    assert_bitwise(got, expected)


@pytest.mark.parametrize("kind", CELLS)
def test_nothing_waits_for_a_cell(kind: str) -> None:
    module = build(kind, I, H)
    x, states = torch.randn(N, I), states_of(initial_states(module, N))
    expected = flatten(module(x, states))
    with no_waiting():
        got = flatten(module(x, states))
    assert_bitwise(got, expected)


# Graphs


@pytest.mark.parametrize("dtype", [torch.float32, *NARROW], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("form", FORMS)
def test_a_graph_of_inference(form: str, settings: str, dtype: torch.dtype) -> None:
    """Captured once, replayed with other inputs."""
    module, leaves, _ = prepared(form, dtype, **SETTINGS[settings])
    static = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    with torch.no_grad():
        first_calls_elsewhere(lambda: plain(module, static))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = flatten(plain(module, static))
        for _ in range(3):
            for leaf in static.values():
                leaf.copy_(torch.randn_like(leaf))
            graph.replay()
            assert_bitwise(outputs, flatten(plain(module, static)))


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_with_lengths_and_reset(kind: str, sequence: str) -> None:
    """Their values are read when the graph is replayed."""
    module, leaves, _ = prepared(kind, bidirectional=True)
    x, options = leaves["x"].detach(), SEQUENCES[sequence]()
    with torch.no_grad():
        first_calls_elsewhere(lambda: module(x, **options))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = flatten(module(x, **options))
        for _ in range(3):
            for name, value in options.items():
                other = torch.randint(T + 1, (N,)) if name == "lengths" else torch.rand(T, N) < 0.3
                value.copy_(other)
            graph.replay()
            assert_bitwise(outputs, flatten(module(x, **options)))


def first_calls_elsewhere(call: Callable[[], object]) -> None:
    """As torch wants it before a capture: on a stream at the side."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("kind", LAYERS)
def test_a_graph_of_training(kind: str, settings: str, dtype: torch.dtype) -> None:
    """Forward and backward replayed with other inputs: the bits of ordinary calls."""
    module, leaves, gradient = prepared(kind, dtype, **SETTINGS[settings])
    graphed = copy.deepcopy(module)
    torch.cuda.make_graphed_callables(graphed, (leaves["x"].detach().clone().requires_grad_(),))
    for _ in range(3):
        own = {"x": torch.randn_like(leaves["x"]).requires_grad_()}
        expected = forward_backward(module, own, gradient)
        outputs = flatten(graphed(own["x"]))
        tensors = own | dict(graphed.named_parameters())
        for parameter in graphed.parameters():
            parameter.grad = None
        outputs["out.0"].backward(gradient)
        got = {name: output.detach() for name, output in outputs.items()}
        assert_bitwise(
            got | {f"d{name}": tensor.grad for name, tensor in tensors.items()}, expected
        )


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_memory_does_not_grow(form: str, dtype: torch.dtype) -> None:
    module, leaves, gradient = prepared(form, dtype, num_layers=2)

    def taken() -> tuple[int, int]:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated(), torch.cuda.memory_reserved()

    for _ in range(3):
        forward_backward(module, leaves, gradient)
    before = taken()
    for _ in range(20):
        forward_backward(module, leaves, gradient)
        with torch.no_grad():
            plain(module, leaves)
    assert taken() == before


def test_broken_packed_sequences() -> None:
    """Refused before a kernel reads through them: that would be the end of the process."""
    found = in_a_process(subprocesses.broken, "cuda")
    assert len(found) > 50
    assert not {name for name, raised in found.items() if raised in ("nothing", "AcceleratorError")}


# Autocast


@pytest.mark.parametrize("given", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_autocast_as_cudnn_does_it(kind: str, hx: bool, given: torch.dtype) -> None:
    """Results of torch.nn's dtypes, gradients of the weights' own. Asked for bfloat16, cuDNN
    computes in float16 all the same: bfloat16 is compared with torch's own operators
    (test_16bit.py).
    """
    module = build(kind, 24, 40)
    leaves = {"x": torch.randn((17, 24) if kind in CELLS else (5, 17, 24))}
    if hx:
        leaves |= initial_states(module, 17)

    def call(m: nn.Module, own: Leaves) -> Any:
        with autocast(torch.float16):
            return m(own["x"].to(given), states_of(own))

    ours, theirs = (evaluate(m, leaves, call) for m in (module, oracle.twin(module)))
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    exact = evaluate(oracle.twin(module, torch.float64), leaves)
    narrow = [{k: v.half() for k, v in values.items()} for values in (ours, theirs)]
    assert_agree(*narrow, exact)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_autocast_of_the_cpu_does_not_matter(dtype: torch.dtype, kind: str) -> None:
    module, leaves, _ = prepared(kind)
    expected = flatten(plain(module, leaves))
    with torch.autocast("cpu", dtype=dtype):
        assert_bitwise(flatten(plain(module, leaves)), expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_second_derivatives_where_torch_nn_has_none(kind: str) -> None:
    """For the table of docs/torch.md."""
    x = torch.randn(T, N, I, requires_grad=True)

    def penalty(module: nn.Module) -> Tensor:
        (first,) = torch.autograd.grad(module(x)[0].square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), x)[0]

    assert penalty(build(kind, I, H)).isfinite().all()
    with pytest.raises(RuntimeError, match="not implemented"):
        penalty(getattr(nn, kind)(I, H))


# The command


@pytest.mark.parametrize("tier", ["resident", "stepwise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["lstm", "mgu", "peephole_lstm", "s_lstm", "ind_rnn"])
def test_cells_that_are_written_in_python(
    name: str, dtype: torch.dtype, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nvcc compiles them when they are first called. A fallback would be an error."""
    if not has_nvcc():
        pytest.skip("needs nvcc")
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    check_against_reference(getattr(rnnkern.cells, name), dtype)


def test_compare_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compare.Options, "notebook_runs", 10)
    path = tmp_path / "results.json"
    arguments = ["compare", "--quick", "--device", "cuda", "--workload", "notebook,mnist_lstm"]
    assert cli.main([*arguments, "--json", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["header"]["gpu"] == torch.cuda.get_device_name()
    assert found["header"]["cuda"] == torch.version.cuda
    assert len(found["notebook"]) == len(LAYERS)
    dtypes = [precision.name for precision in default_precisions("cuda")]
    assert [(row["workload"], row["dtype"], row["pass"]) for row in found["rows"]] == [
        (workload, dtype, pass_name)
        for _ in LAYERS
        for workload in ("notebook", "mnist_lstm")
        for dtype in dtypes
        for pass_name in PASSES
    ]
    for row in found["rows"]:
        assert row["device"] == "cuda"
        assert min(row["us"], row["torch_us"], row["speedup"], row["gflops"], row["pairs"]) > 0


def test_build_info_knows_of_cuda() -> None:
    assert rnnkern.build_info()["cuda"]
