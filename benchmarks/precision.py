"""What ``torch.set_float32_matmul_precision`` gives, on a CPU that multiplies bfloat16.

    python -m benchmarks.precision [--threads 1,2] [--workloads char_lm,...] [--seconds S]

"highest", "high" and "medium" are timed in turn. Each number is how many times as fast one is as
"highest": the median of pairwise ratios. The error of the output is the largest one, against
float64. A CPU without AMX computes "high" as "highest".
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import product

import torch
from torch import nn

import rnnkern
from benchmarks import rows
from benchmarks.rows import Call, Effort, Row
from rnnkern.bench import timing
from rnnkern.bench.timing import threads_set
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    draw_case,
    grad_mode,
    load_workloads,
)

LOWER = ("medium", "high")
WORKLOADS = ("mnist_lstm", "sentiment", "char_lm", "large", "xlarge")


@contextmanager
def precision(name: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def measure(cell: str, workload: str, effort: Effort) -> Iterator[Row]:
    """A row of each pass: the lower precisions beside "highest"."""
    case = draw_case(cell, load_workloads()[workload])
    side = case.side(rnnkern, torch.float32)
    errors = {}
    with torch.no_grad():
        exact = case.side(nn, torch.float64).module(case.x.double())[0]
        for name in LOWER:
            with precision(name):
                errors[name] = (side.module(case.x)[0] - exact).abs().max().item()
    for pass_name in (FORWARD, FORWARD_BACKWARD):
        call = side.call(pass_name)

        def at(name: str, call: Call = call) -> Call:
            def run() -> None:
                torch.set_float32_matmul_precision(name)
                call()

            return run

        with precision("highest"), grad_mode(pass_name):
            samples = rows.in_turn({name: at(name) for name in (*LOWER, "highest")}, effort)
        speedup = {f"{name} over highest": rows.ratio(samples, name, "highest") for name in LOWER}
        speedup |= {f"largest error of {name}, 1e-6": errors[name] * 1e6 for name in LOWER}
        yield rows.row(
            f"precision, {pass_name}, threads: {torch.get_num_threads()}",
            f"{cell} {workload}",
            samples,
            "highest",
            speedup=speedup,
        )


def precisions(effort: Effort, threads: Iterable[int]) -> Iterator[Row]:
    """The workloads with enough work for it."""
    for count in threads:
        with threads_set(count):
            for workload, cell in product(WORKLOADS[: 1 if effort.quick else None], CELLS):
                yield from measure(cell, workload, effort)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2", help="of torch")
    parser.add_argument("--workloads", default=",".join(load_workloads()), help="some of them")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a row")
    options = parser.parse_args(arguments)
    print(f"{timing.cpu_name()}, torch {torch.__version__}")
    for threads in map(int, options.threads.split(",")):
        with threads_set(threads):
            for workload, cell in product(options.workloads.split(","), CELLS):
                for made in measure(cell, workload, Effort(options.seconds, 5)):
                    print(rows.line(made), flush=True)


if __name__ == "__main__":
    main()
