"""Every workload beside a process that computes all the time, as data loaders and browsers do.

    python -m benchmarks.busy [--cell LSTM] [--workload notebook,stream_step] [--threads 2]
        [--rounds 7]

Inference is compared with torch.nn and the peers that are installed (`benchmarks.peers`), and
forward+backward with torch.nn. A sample is at least 60 ms long, because the neighbour takes a CPU
for milliseconds at a time. All libraries are timed in turn. A speed-up is the median over rounds of
the time of another library over ours; the least one is over the best of them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from time import sleep

import torch

from benchmarks import peers, rows
from benchmarks.rows import BEST, OURS, Effort, Row
from rnnkern.bench import timing
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    draw_case,
    grad_mode,
    load_workloads,
)

SAMPLE_S = 0.06
WORKLOADS = ("notebook", "stream_step", "mnist_one", "mnist_lstm", "sentiment", "char_lm")
PASSES = {FORWARD: "inference", FORWARD_BACKWARD: "training"}


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def samples(calls: dict[str, timing.Call], rounds: int) -> dict[str, list[float]]:
    """Seconds a call of each, entry i of all lists from one round."""
    counts = {}
    for name, each in calls.items():
        each()  # loads what it needs
        counts[name] = max(1, math.ceil(SAMPLE_S / timing.host_clock(each, 3) * 3))
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with timing.gc_paused():
        for _ in range(rounds):
            for name, each in calls.items():
                seconds[name].append(timing.host_clock(each, counts[name]) / counts[name])
    return seconds


def measure(pass_name: str, cell: str, workload: str, rounds: int) -> Row:
    """A row, to be called beside a `busy_neighbour`."""
    case, threads = draw_case(cell, load_workloads()[workload]), torch.get_num_threads()
    calls = (
        peers.calls(case, threads) if pass_name == FORWARD else peers.module_calls(case, pass_name)
    )
    with grad_mode(pass_name):
        table = f"beside a busy process, {PASSES[pass_name]}, threads: {threads}"
        return rows.row(table, f"{cell} {workload}", samples(calls, rounds), group=cell)


def busy(effort: Effort) -> Iterator[Row]:
    """The workloads in which a call ends before the neighbour's share of the time does."""
    workloads = WORKLOADS[: 1 if effort.quick else None]
    with busy_neighbour():
        for pass_name, cell, workload in product(PASSES, CELLS, workloads):
            yield measure(pass_name, cell, workload, effort.rounds)


def main(arguments: list[str] | None = None) -> None:
    names = tuple(load_workloads())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", default=",".join(CELLS), help=f"some of {','.join(CELLS)}")
    parser.add_argument("--workload", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    cells, workloads = options.cell.split(","), options.workload.split(",")
    for name, given, known in (("cell", cells, CELLS), ("workload", workloads, names)):
        if not set(given) <= set(known):
            parser.error(f"--{name}: some of {','.join(known)}, got {','.join(given)}")
    print(
        f"{timing.cpu_name()}, torch {torch.__version__}, threads: {options.threads}, "
        "one busy process beside\n"
    )
    print(f"{'':31}{'ours, us':>12}{'best, us':>12}{'speed-up':>10}  best", flush=True)
    speedups = []
    with timing.threads_set(options.threads), busy_neighbour():
        for pass_name, cell, name in product(PASSES, cells, workloads):
            made = measure(pass_name, cell, name, options.rounds)
            best = rows.fastest_other(made)
            speedups.append(made["speedup"][BEST])
            print(
                f"{cell:5}{name:14}{PASSES[pass_name]:12}{made['us'][OURS]:12.1f}"
                f"{made['us'][best]:12.1f}{speedups[-1]:10.2f}  {best}",
                flush=True,
            )
    print(f"\ngeometric mean {statistics.geometric_mean(speedups):.2f}, least {min(speedups):.2f}")


if __name__ == "__main__":
    main()
