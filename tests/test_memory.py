"""Peak memory of a long sequence, T=2000 N=16 I=128 H=256, and of a loop of 100 steps of a cell.

Each is measured in a process of its own.
"""

from __future__ import annotations

import pytest
import subprocesses
from support import CELLS, LAYERS, in_a_process

pytestmark = pytest.mark.cpu_only

OUTPUT_MIB = 2000 * 16 * 256 * 4 / 2**20


def test_training_takes_less_than_half_of_torch() -> None:
    ours = in_a_process(subprocesses.peak_memory, "rnnkern", "LSTM", "training")
    theirs = in_a_process(subprocesses.peak_memory, "torch", "LSTM", "training")
    assert ours <= 0.45 * theirs


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_takes_its_output_and_little_more(kind: str) -> None:
    assert in_a_process(subprocesses.peak_memory, "rnnkern", kind, "inference") <= OUTPUT_MIB + 20


def least_of_a_loop(library: str, kind: str) -> float:
    """Of three processes, because the system sometimes gives one of them some megabytes more."""
    return min(in_a_process(subprocesses.peak_memory_of_a_loop, library, kind) for _ in range(3))


@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_of_a_cell_takes_no_more_than_torch(kind: str) -> None:
    assert least_of_a_loop("rnnkern", kind) <= least_of_a_loop("torch", kind)
