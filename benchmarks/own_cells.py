"""What a cell that is written in Python costs: beside the hand-written one, its loop in Python, and
torch.compile of that loop.

    python -m benchmarks.own_cells [--threads N] [--seconds S] [--workload notebook,char_lm]

The LSTM of `rnnkern.cells` beside `rnnkern.LSTM`, on all workloads; then the MGU beside a loop over
its function, eager and compiled. Calls are timed in turn; a ratio is the median over neighbours of
the other time divided by that of `rnnkern.Recurrent`. At last the seconds of the first call with a
new cell, and the milliseconds of loading it from the cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor
from torch.nn.functional import linear

import rnnkern
from benchmarks import rows
from benchmarks.rows import OURS, Call, Effort, Row
from rnnkern.bench.timing import threads_set
from rnnkern.bench.workloads import Workload, load_workloads

WORKLOADS = ("notebook", "mnist_lstm", "sentiment", "char_lm", "large")
Sizes = tuple[int, int, int, int]
LOOPS: tuple[Sizes, ...] = ((16, 8, 40, 64), (28, 32, 28, 128))
PASSES = ("forward", "forward and backward")


def calls_of(module: Callable[..., Any], leaves: list[Tensor], x: Tensor) -> list[Call]:
    """Forward, and forward and backward."""

    def forward() -> Any:
        with torch.no_grad():
            return module(x)

    def both() -> Any:
        y, _ = module(x)
        return torch.autograd.grad(y, leaves, torch.ones_like(y))

    return [forward, both]


def in_turn(table: str, case: str, sides: dict[str, list[Call]], effort: Effort) -> Iterator[Row]:
    """A row of each pass, the first side beside the others."""
    for pass_name, *calls in zip(PASSES, *sides.values(), strict=True):
        samples = rows.in_turn(dict(zip(sides, calls, strict=True)), effort)
        yield rows.row(f"{table}, {pass_name}", case, samples)


def beside_the_hand_written(workload: Workload, effort: Effort) -> Iterator[Row]:
    I, H = workload.input_size, workload.hidden_size
    ours, theirs = rnnkern.Recurrent(rnnkern.cells.lstm, I, H), rnnkern.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(workload.steps, workload.batch, I, requires_grad=True)
    torch.testing.assert_close(ours(x)[0], theirs(x)[0])
    modules = {OURS: ours, "rnnkern.LSTM": theirs}
    sides = {name: calls_of(m, [x, *m.parameters()], x) for name, m in modules.items()}
    yield from in_turn("an LSTM in Python", workload.name, sides, effort)


class Loop(nn.Module):
    """A layer of the MGU as a loop over its function."""

    def __init__(self, like: rnnkern.Recurrent) -> None:
        super().__init__()
        self.like = like

    def forward(self, x: Tensor) -> Any:
        like = self.like
        a = linear(x, like.weight_ih_l0, like.bias_ih_l0)
        h = x.new_zeros(x.shape[1], like.hidden_size)
        outputs = []
        for step in a.unbind(0):
            a_f, a_g = step.chunk(2, -1)
            b_f, b_g = linear(h, like.weight_hh_l0, like.bias_hh_l0).chunk(2, -1)
            f = torch.sigmoid(a_f + b_f)
            h = (1 - f) * h + f * torch.tanh(a_g + f * b_g)
            outputs.append(h)
        return torch.stack(outputs), h


def beside_loops(T: int, N: int, I: int, H: int, effort: Effort) -> Iterator[Row]:
    ours = rnnkern.Recurrent(rnnkern.cells.mgu, I, H)
    loop = Loop(ours)
    torch._dynamo.reset()
    inductor.compile_threads = 1  # its processes would take time from what is timed
    compiled = torch.compile(loop)
    x = torch.randn(T, N, I, requires_grad=True)
    torch.testing.assert_close(ours(x)[0], compiled(x)[0])
    modules = {OURS: ours, "its loop": loop, "its loop compiled": compiled}
    sides = {name: calls_of(m, [x, *ours.parameters()], x) for name, m in modules.items()}
    yield from in_turn("an MGU in Python", f"T={T} N={N} I={I} H={H}", sides, effort)


FIRST = """
import time, torch, rnnkern
layer = rnnkern.Recurrent(rnnkern.cells.mgu, 8, 8)
x = torch.randn(2, 2, 8)
torch.randn(2, 2).sum()
start = time.perf_counter()
layer(x)
first = time.perf_counter() - start
start = time.perf_counter()
layer(x)
print(first, time.perf_counter() - start)
"""


def first_calls() -> tuple[float, float]:
    """Seconds of the first call with an empty cache, and with the compiled cell in it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"RNNKERN_CACHE": folder}
        found = []
        for _ in range(2):
            run = subprocess.run(
                [sys.executable, "-c", FIRST], env=environment, capture_output=True, check=True
            )
            first, second = map(float, run.stdout.split())
            found.append(first - second)
    return found[0], found[1]


def own_cells(
    effort: Effort, names: Iterable[str] = WORKLOADS, loops: Iterable[Sizes] = LOOPS[:1]
) -> Iterator[Row]:
    """An LSTM beside `rnnkern.LSTM`, an MGU beside loops, and the first call with a new cell.

    torch.compile takes up to a minute for each of the loops.
    """
    for name in list(names)[: 1 if effort.quick else None]:
        yield from beside_the_hand_written(load_workloads()[name], effort)
    if effort.quick:
        return
    for sizes in loops:
        yield from beside_loops(*sizes, effort)
    for case, seconds in zip(("compiled", "from the cache"), first_calls(), strict=True):
        yield rows.row("first call with a new cell", case, {OURS: [seconds]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="of torch; as it is set unless given")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a row")
    parser.add_argument("--workload", help="names, separated by commas")
    options = parser.parse_args()
    names = options.workload.split(",") if options.workload else load_workloads()
    torch.manual_seed(0)
    with threads_set(options.threads):
        print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}")
        for made in own_cells(Effort(options.seconds, 7), names, LOOPS):
            print(rows.line(made), flush=True)


if __name__ == "__main__":
    main()
