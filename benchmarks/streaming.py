"""What a frame of a stream costs: one step, from the state that the step before has left.

    python -m benchmarks.streaming [--threads N] [--seconds S]

In inference mode, of the workload ``stream_step``. Timed in turn: a step with no state given (what
the workload itself is), a frame with its state, the same frame in torch.nn. Medians of pairwise
ratios.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from torch import nn

import rnnkern
from rnnkern.bench.timing import PairTiming, threads_set, time_in_turn
from rnnkern.bench.workloads import CELLS, Side, draw_case, load_workloads


def frame(side: Side) -> Callable[[], object]:
    module, x = side.module, side.x
    _, state = module(x)

    def step() -> object:
        nonlocal state
        y, state = module(x, state)
        return y

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, help="of torch; as it is set unless given")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a row")
    options = parser.parse_args()
    with threads_set(options.threads), torch.inference_mode():
        print(f"float32, {torch.get_num_threads()} threads, torch {torch.__version__}; us a call")
        print(f"{'':6}{'step':>8}{'frame':>8}{'ratio':>7}{'torch.nn':>10}{'speedup':>9}")
        for cell in CELLS:
            case = draw_case(cell, load_workloads()["stream_step"])
            ours, theirs = (case.side(library, torch.float32) for library in (rnnkern, nn))
            calls = [lambda side=ours: side.module(side.x), frame(ours), frame(theirs)]
            rounds = time_in_turn(calls, budget_s=options.seconds, min_rounds=5)
            state, peer = PairTiming(*rounds[:2]), PairTiming(*rounds[1:])
            row = f"{cell:6}{state.us:8.1f}{peer.us:8.1f}{state.speedup:7.2f}"
            print(f"{row}{peer.their_us:10.1f}{peer.speedup:9.1f}", flush=True)


if __name__ == "__main__":
    main()
