"""What the options of a call cost: reset_to, return_cells, dropout, zoneout, layer normalisation.

    python -m benchmarks.options [--cell LSTM] [--threads N] [--seconds S]

Forward and backward in float32. Timed in turn: the same module without the option, with it on the
kernels, and with it in plain PyTorch (`rnnkern.reference`), step by step. `cost` is
the option's time over that of the module without it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import rnnkern
from benchmarks import rows
from benchmarks.rows import OURS, Call, Effort, Row
from rnnkern import run
from rnnkern.bench.timing import threads_set
from rnnkern.bench.workloads import load_workloads

WORKLOADS = ("notebook", "mnist_lstm", "sentiment", "char_lm")
OPTIONS: dict[str, dict[str, Any]] = {
    "reset": {},
    "reset_to": {},
    "return_cells": {},
    "recurrent_dropout": {"recurrent_dropout": 0.25},
    "zoneout": {"zoneout": 0.1},
    "layer_norm": {"layer_norm": True},
}


def both(module: Any, x: Tensor, arguments: dict[str, Any]) -> Call:
    leaves = [x, *module.parameters()]

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        y, _, *cells = module(x, **arguments)
        torch.autograd.backward([y, *cells], [torch.ones_like(z) for z in (y, *cells)])

    return call


def in_a_loop(call: Call) -> Call:
    """The call with the reference in place of the kernels."""
    kernels = run._on_kernels

    def looped() -> None:
        run._on_kernels = run.by_reference
        try:
            call()
        finally:
            run._on_kernels = kernels

    return looped


def measure(cell: str, option: str, workload: str, effort: Effort) -> Row:
    """A row: the option beside its loop, and what it costs beside the call without it."""
    w = load_workloads()[workload]
    T, N, I, H = w.steps, w.batch, w.input_size, w.hidden_size
    kind, constructor = getattr(rnnkern, cell), OPTIONS[option]
    torch.manual_seed(0)
    module, plain = kind(I, H, **constructor), kind(I, H)
    x = torch.randn(T, N, I, requires_grad=True)
    arguments: dict[str, Any] = {}
    if option.startswith("reset"):
        arguments["reset"] = torch.rand(T, N) < 0.1
    if option == "reset_to":
        states = torch.randn(2, 1, N, H)
        arguments[option] = tuple(states) if cell == "LSTM" else states[0]
    if option == "return_cells":
        arguments[option] = True
    own = both(module, x, arguments)
    calls = {OURS: own, "the call without it": both(plain, x, {})}
    if option != "reset":
        calls["a loop"] = in_a_loop(own)
    samples = rows.in_turn(calls, effort)
    speedup = {"cost": 1 / rows.ratio(samples, OURS, "the call without it")}
    if "a loop" in samples:
        speedup["over a loop"] = rows.ratio(samples, OURS, "a loop")
    table = f"options of {cell}, threads: {torch.get_num_threads()}"
    return rows.row(table, f"{option}, {workload}", samples, speedup=speedup)


def options(effort: Effort, cell: str = "LSTM") -> Iterator[Row]:
    """Every option that the cell has."""
    for workload in WORKLOADS[: 1 if effort.quick else None]:
        for option in OPTIONS:
            if option != "return_cells" or cell == "LSTM":
                yield measure(cell, option, workload, effort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", default="LSTM", choices=["LSTM", "GRU", "RNN"])
    parser.add_argument("--threads", type=int, help="of torch; as it is set unless given")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a row")
    given = parser.parse_args()
    with threads_set(given.threads):
        for made in options(Effort(given.seconds, 5), given.cell):
            print(rows.line(made), flush=True)


if __name__ == "__main__":
    main()
