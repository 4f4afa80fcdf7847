"""The rows of which the benchmarks' tables consist, and how the calls of a row are timed.

A row is a dictionary that JSON can hold:

- ``table``, ``case``: the table that it belongs to, and what was measured;
- ``group``: of a table with a mean for each group, that of the row (a cell);
- ``us``: microseconds a call, by name, ours first;
- ``speedup``: numbers by the heads of their columns, medians of the ratios within a round;
- ``of_limit``: what share of the time the machine's limits account for (`benchmarks.layers`).
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from time import sleep
from typing import Any

import torch

from rnnkern.bench import timing
from rnnkern.bench.timing import PairTiming

Call = Callable[[], object]
Row = dict[str, Any]
Samples = Mapping[str, list[float]]
"""Seconds a call, by name; entry i of all lists is from one round."""

OURS = "rnnkern"
BEST = "over the best"
REST_S, WARM_S = 0.02, 2e-3
#: They have pools of threads of their own.
PEERS = ("ONNX Runtime", "OpenVINO", "ONNX Runtime int8")


@dataclass(frozen=True)
class Effort:
    """How long a row is measured. ``quick``: the small cases alone, to try the code."""

    seconds: float
    rounds: int = 3
    quick: bool = False


QUICK = Effort(0.0, 1, quick=True)


def in_turn(calls: Mapping[str, Call], effort: Effort) -> dict[str, list[float]]:
    """Times calls in turn.

    The threads of a peer spin for a while after a call, which whatever runs beside them prolongs.
    So there is a rest after it, and then our own threads are woken before their sample.
    """
    turns: dict[str, Call] = {}
    several = torch.get_num_threads() > 1
    for name, call in calls.items():
        turns[name] = call
        if several and name in PEERS:
            turns[f"rest after {name}"] = lambda: sleep(REST_S)
    samples = timing.time_in_turn(
        list(turns.values()),
        budget_s=effort.seconds,
        min_rounds=effort.rounds,
        warm_s=WARM_S if len(turns) > len(calls) else 0.0,
    )
    return {name: s for name, s in zip(turns, samples, strict=True) if name in calls}


def without_refused(calls: dict[str, Call]) -> dict[str, Call]:
    """Leaves torch.nn out if it raises: it cannot be called like that, or not on this CPU (an LSTM
    under autocast on x86-64 without AVX-512).
    """
    try:
        calls["torch.nn"]()
    except RuntimeError as error:
        print(f"torch.nn is left out, because it raises {error!r:.100}", file=sys.stderr)
        return {name: call for name, call in calls.items() if name != "torch.nn"}
    return calls


def ratio(samples: Samples, own: str, other: str) -> float:
    """How many times as long the other call takes."""
    return PairTiming(samples[own], samples[other]).speedup


def over(samples: Samples, own: str, others: Iterable[str]) -> dict[str, float]:
    """Our speed-up over each of the others that was timed; the least of them is over the best."""
    found = {f"over {name}": ratio(samples, own, name) for name in others if name in samples}
    return found | {BEST: min(found.values())} if found else {}


def row(table: str, case: str, samples: Samples, own: str = OURS, **more: Any) -> Row:
    """A row of our call beside all others. ``more`` takes the place of what follows from them."""
    others = [name for name in samples if name != own]
    us = {name: statistics.median(samples[name]) * 1e6 for name in (own, *others)}
    return {"table": table, "case": case, "us": us, "speedup": over(samples, own, others)} | more


def fastest_other(made: Row) -> str:
    """The name of the fastest call but ours."""
    _, *others = made["us"]
    return min(others, key=lambda name: float(made["us"][name]))


def line(made: Row) -> str:
    """A row as a line of text."""
    times = ", ".join(f"{name} {us:.1f}" for name, us in made["us"].items())
    ratios = ", ".join(f"{value:.2f}x {name}" for name, value in made["speedup"].items())
    return f"{made['table']}: {made['case']}: us {times}; {ratios}"
