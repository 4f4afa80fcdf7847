"""`rnnkern.bench.timing`."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext

import pytest
import torch

from rnnkern.bench import timing

pytestmark = pytest.mark.cpu_only


def test_pairs_are_timed_in_turn_with_samples_long_enough() -> None:
    order: list[str] = []
    takes = {"ours": 1e-6, "theirs": 2e-3}

    def clock(call: timing.Call, count: int) -> float:
        for _ in range(count):
            call()
        return count * takes[order[-1]]

    result = timing.time_pair(
        lambda: order.append("ours"),
        lambda: order.append("theirs"),
        budget_s=0.0,
        min_pairs=3,
        clock=clock,
    )
    assert len(result.ours_s) == len(result.theirs_s) == 3
    turns = [name for i, name in enumerate(order) if i == 0 or order[i - 1] != name]
    assert turns == ["ours", "theirs"] * (len(turns) // 2)
    assert order.count("ours") > 3000  # repeated to fill a millisecond
    assert result.speedup == pytest.approx(2000)
    assert result.us == pytest.approx(1)
    assert result.their_us == pytest.approx(2000)


def test_the_clock_of_the_host() -> None:
    assert timing.host_clock(lambda: time.sleep(1e-3), 5) >= 5e-3


def test_the_first_call_is_not_measured() -> None:
    made = []

    def clock(call: timing.Call, count: int) -> float:
        before = len(made)
        for _ in range(count):
            call()
        return sum(1e-6 if i else 5e-3 for i in range(before, len(made)))

    assert timing.calls_per_sample(lambda: made.append(1), clock) >= 1000


def test_the_clock_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """From an event before the first call to one after the last, which has been reached."""
    seen: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            seen.append("record")

        def synchronize(self) -> None:
            seen.append("wait")

        def elapsed_time(self, end: Event) -> float:
            assert end is not self
            return 6.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    clock = timing.clock_of(torch.device("cuda"))
    assert clock(lambda: seen.append("call"), 3) == pytest.approx(6e-3)
    assert seen == ["record", "call", "call", "call", "record", "wait"]
    assert timing.clock_of(torch.device("cpu")) is timing.host_clock


def test_the_least_number_of_pairs_is_taken_whatever_the_budget() -> None:
    result = timing.time_pair(
        lambda: time.sleep(2e-3), lambda: time.sleep(2e-3), budget_s=0.0, min_pairs=3
    )
    assert len(result.ours_s) == 3


def test_the_speedup_is_the_median_of_the_ratios_and_not_the_ratio_of_medians() -> None:
    result = timing.PairTiming(ours_s=[1.0, 10.0, 2.0], theirs_s=[2.0, 20.0, 40.0])
    assert result.speedup == 2.0
    assert (result.us, result.their_us) == (2e6, 20e6)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_in_the_samples_and_then_as_before(enabled: bool) -> None:
    (gc.enable if enabled else gc.disable)()
    try:
        with timing.gc_paused():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()
