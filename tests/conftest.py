"""Settings of the suite: markers, hypothesis, and the state of torch that a test may change."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("support", "wrong")

# For benchmarks, which is not installed; last, for the rnnkern that is to be tested comes before.
sys.path.append(str(Path(__file__).parent.parent))

# "suite" runs the same examples every time; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("suite", derandomize=True, database=None, deadline=None, max_examples=40)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "suite"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "kernel: numerics of the kernels alone, the part that runs under the sanitizers"
    )
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


@pytest.fixture(autouse=True)
def _restore_torch() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the sizes here are tiny; tests of threads ask for more
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def deterministic() -> None:
    """Deterministic algorithms; torch then also fills new memory with NaN, so what is left
    unwritten shows.
    """
    torch.use_deterministic_algorithms(True)
