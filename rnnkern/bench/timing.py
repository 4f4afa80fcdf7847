"""Times two calls against each other so that the ratio can be trusted, and describes the machine.

A shared or frequency-scaled machine changes speed from one second to the next, far more than the
differences of interest. So the two calls are timed in turn, a sample of one right after a sample of
the other, and the result is the median of the ratios of neighbours. If something slows the machine
for a while, it slows both.
"""

from __future__ import annotations

import gc
import math
import platform
import statistics
import subprocess
import timeit
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

Call = Callable[[], object]
Clock = Callable[[Call, int], float]
"""``clock(call, count)``: seconds that ``count`` calls take, one right after the other."""

#: Shorter samples are repeated to reach this, in seconds: four orders above the resolution of the
#: clock.
MIN_SAMPLE_S = 1e-3
#: Enough for a median; more would only lengthen the rows of tiny workloads.
MAX_PAIRS = 200


@dataclass(frozen=True)
class PairTiming:
    """Seconds per call of two calls timed in turn; entry i of each list are neighbours in time."""

    ours_s: list[float]
    theirs_s: list[float]

    @property
    def us(self) -> float:
        """Median time of ours, in microseconds per call."""
        return statistics.median(self.ours_s) * 1e6

    @property
    def their_us(self) -> float:
        """Median time of theirs, in microseconds per call."""
        return statistics.median(self.theirs_s) * 1e6

    @property
    def speedup(self) -> float:
        """Median of the pairwise ratios theirs / ours: above 1 if ours is faster."""
        ratios = (t / o for o, t in zip(self.ours_s, self.theirs_s, strict=True))
        return statistics.median(ratios)


@contextmanager
def gc_paused() -> Iterator[None]:
    """Keeps the garbage collector out of the samples, as ``timeit`` does."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def threads_set(count: int | None) -> Iterator[None]:
    """Sets the number of threads of torch's pool for a while; None leaves it as it is."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def host_clock(call: Call, count: int) -> float:
    """The clock of calls that have finished when they return."""
    start = perf_counter()
    for _ in range(count):
        call()
    return perf_counter() - start


def cuda_clock(device: torch.device) -> Clock:
    """The clock of calls that start work on a GPU: the time there between two events.

    The events are recorded in the current stream before the first call and after the last. So time
    in which the GPU waits for the next launch counts, too.
    """

    def seconds(call: Call, count: int) -> float:
        with torch.cuda.device(device):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3

    return seconds


def clock_of(device: torch.device) -> Clock:
    """The clock for calls whose tensors are on a device."""
    return cuda_clock(device) if device.type == "cuda" else host_clock


def calls_per_sample(call: Call, clock: Clock = host_clock) -> int:
    """How many calls make a sample of at least ``MIN_SAMPLE_S``; warms the call up on the way."""
    call()  # the first one loads what it needs and may take a thousand times as long
    count = 1
    while (elapsed := clock(call, count)) < MIN_SAMPLE_S:
        # The first calls are slow and would stop this too early, so it at least doubles and is
        # measured again.
        count = max(2 * count, math.ceil(count * MIN_SAMPLE_S / max(elapsed, 1e-7)))
    return count


def time_in_turn(
    calls: Sequence[Call],
    *,
    budget_s: float,
    min_rounds: int,
    clock: Clock = host_clock,
    warm_s: float = 0.0,
) -> list[list[float]]:
    """Times calls in turn: the first, the second, ..., the first, the second, ...

    Args:
        calls: what to time.
        budget_s: seconds after which no further round is begun.
        min_rounds: rounds made even if that takes longer than the budget.
        clock: measures the time on the device of the calls.
        warm_s: seconds of untimed calls before each sample, because the threads of another library
            spin for a while and those of this one have to wake up.

    Returns:
        Seconds per call for each of the calls, entry i of all lists from one round; between
        ``min_rounds`` and ``MAX_PAIRS`` entries.
    """
    start = perf_counter()
    seconds: list[list[float]] = [[] for _ in calls]
    with gc_paused():
        counts = [calls_per_sample(call, clock) for call in calls]
        while len(seconds[-1]) < MAX_PAIRS:
            for call, count, samples in zip(calls, counts, seconds, strict=True):
                warm_until = perf_counter() + warm_s
                while perf_counter() < warm_until:
                    call()
                samples.append(clock(call, count) / count)
            if perf_counter() - start > budget_s and len(seconds[-1]) >= min_rounds:
                break
    return seconds


def time_pair(
    ours: Call,
    theirs: Call,
    *,
    budget_s: float,
    min_pairs: int,
    clock: Clock = host_clock,
) -> PairTiming:
    """Times two calls against each other by `time_in_turn`: ours, and the one to compare with."""
    return PairTiming(
        *time_in_turn([ours, theirs], budget_s=budget_s, min_rounds=min_pairs, clock=clock)
    )


def notebook_seconds(call: Call, runs: int, device: torch.device) -> float:
    """Seconds that ``runs`` calls take, measured with ``timeit`` as the notebook does it.

    On a GPU the time ends when the GPU has finished.
    """
    seconds = timeit.timeit(call, number=runs)
    if device.type == "cuda":
        seconds += timeit.timeit(lambda: torch.cuda.synchronize(device), number=1)
    return seconds


def gpu_driver() -> str | None:
    """The version of the NVIDIA driver, or None if ``nvidia-smi`` does not tell it."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None


def cpu_name() -> str:
    """The processor's name for itself, or its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that has this package, ``-dirty`` if changed; None elsewhere."""
    package = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(package), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
        return done.stdout.strip()

    try:
        # An installed copy may be in a virtual environment inside another project's checkout.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != package.parent:
            return None
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None
