"""Settings of the suite: markers, devices, hypothesis, and the state of torch that a test may
change.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

pytest.register_assert_rewrite("support", "wrong_calls", "like_torch_nn")

# For benchmarks and tools, which are not installed. They come last, after the rnnkern to be tested.
ROOT = Path(__file__).parent.parent
sys.path += [str(ROOT), str(ROOT / "tools")]

# "suite" runs the same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("suite", derandomize=True, database=None, deadline=None, max_examples=40)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))

# Every test runs on each of these, but for those marked cpu_only.
DEVICES = os.environ.get(
    "RNNKERN_TEST_DEVICES", "cpu,cuda" if torch.cuda.is_available() else "cpu"
).split(",")
GPUS = [name for name in DEVICES if name.startswith("cuda")]
collect_ignore = [] if GPUS else ["test_cuda.py"]

# Asked of torch's products under deterministic algorithms, and read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# Cells that tests compile are kept from run to run, and not in the user's cache.
os.environ.setdefault("RNNKERN_CACHE", str(ROOT / "build" / "cells"))


def pytest_configure(config: pytest.Config) -> None:
    # A test that falls back to torch.nn without meaning to tests nothing.
    config.addinivalue_line("filterwarnings", "error::rnnkern.FallbackWarning")
    # Nor should users read what is meant for the authors of an extension.
    config.addinivalue_line("filterwarnings", "error:Dynamo does not know how to trace")
    for message in (
        "LSTM with projections is not supported",
        "Complex modules are a new feature",
        ".*quantized tensor creation functions",
        ".*(in beta state|in prototype)",
        "`torch.jit.script` is deprecated",
    ):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.hookimpl(trylast=True)  # the device comes last in the name of a test
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("cpu_only"):
        return
    names = GPUS if metafunc.definition.get_closest_marker("cuda") else DEVICES
    if names != ["cpu"]:
        variants = [
            pytest.param(name, marks=pytest.mark.cuda) if name in GPUS else name for name in names
        ]
        metafunc.parametrize("device", variants, indirect=True)


def drawn_on_the_cpu(draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`draw` of the same numbers whatever the default device is; generators are the CPU's."""

    def drawn(
        *arguments: Any, device: Any = None, requires_grad: bool = False, **options: Any
    ) -> Tensor:
        numbers = draw(*arguments, device="cpu" if device is None else device, **options)
        if device is None:
            numbers = numbers.to(torch.get_default_device())
        return numbers.requires_grad_(requires_grad)

    return drawn


@pytest.fixture(autouse=True)
def device(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[torch.device]:
    """The device on which a test makes its tensors and modules.

    On a GPU float32 is float32 and not TF32, and torch.nn, with which all is compared, computes by
    torch's own operators: cuDNN has no second derivatives, no gradients in eval mode, a dropout of
    its own. test_cuda.py looks at TF32 and cuDNN.
    """
    name = getattr(request, "param", "cpu")
    if name == "cpu":
        yield torch.device(name)
        return
    from support import cudnn

    from rnnkern.bench.workloads import tf32_allowed

    for draw in ("rand", "randn", "randint"):
        monkeypatch.setattr(torch, draw, drawn_on_the_cpu(getattr(torch, draw)))
    here = torch.empty(0, device=name).device  # with its index
    torch.set_default_device(here)
    try:
        with cudnn(enabled=False), tf32_allowed(False):
            yield here
        torch.get_device_module(here).synchronize()  # what a kernel did wrong is its own test's
    finally:
        torch.set_default_device(None)


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    # One, because the sizes here are tiny; tests of threads ask for more.
    torch.set_num_threads(int(os.environ.get("RNNKERN_TEST_THREADS", "1")))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    # As use_deterministic_algorithms, which takes seconds because it loads Inductor.
    torch.set_deterministic_debug_mode("default")


@pytest.fixture
def deterministic() -> None:
    """Deterministic algorithms; torch then also fills new memory with NaN, so what is left
    unwritten shows.
    """
    torch.set_deterministic_debug_mode("error")


@pytest.fixture
def cell_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of compiled cells."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RNNKERN_CACHE", str(folder))
    return folder


@pytest.fixture
def no_refusals() -> Iterator[None]:
    """What this test finds of cells that cannot be compiled is forgotten after it."""
    from rnnkern import kernels

    yield
    kernels.WITHOUT_KERNELS.clear()


@pytest.fixture
def no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call that is timed runs once and takes a millisecond more than the one before, so that
    no result depends on how busy the machine is.
    """
    from rnnkern.bench import timing

    def in_turn(calls: list[Callable[[], object]], **_: object) -> list[list[float]]:
        for call in calls:
            call()
        return [[1e-3 * (i + 1)] * 3 for i in range(len(calls))]

    monkeypatch.setattr(timing, "time_in_turn", in_turn)
