"""Cells at sizes drawn at random, beside torch.nn, to find sizes at which a step is slower.

    python -m benchmarks.steps [--draws 20] [--seed 0] [--threads N] [--seconds S]

Rows of the batch from 1 to 300, inputs and hidden units from 1 to 1200, evenly on a logarithmic
scale. Inference, and forward+backward; checked first, timed in turn, medians of pairwise ratios.
Prints geometric means and the ten rows with the least speed-up.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics

import torch
from torch import nn

import rnnkern
from rnnkern.bench import timing
from rnnkern.bench.workloads import (
    FORWARD,
    FORWARD_BACKWARD,
    STEP_CELLS,
    Workload,
    check_case,
    draw_case,
    grad_mode,
)


def draw(generator: random.Random) -> Workload:
    def size(most: int) -> int:
        return round(math.exp(generator.uniform(0, math.log(most))))

    N, I, H = size(300), size(1200), size(1200)
    return Workload(f"N{N} I{I} H{H}", 1, N, I, H, is_step=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20, help="of each cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="for a row")
    options = parser.parse_args()
    generator = random.Random(options.seed)
    found: list[tuple[float, str]] = []
    ratios: dict[str, list[float]] = {FORWARD: [], FORWARD_BACKWARD: []}
    with timing.threads_set(options.threads):
        for cell in STEP_CELLS:
            for _ in range(options.draws):
                case = draw_case(cell, draw(generator))
                wrong = {k: str(v) for k, v in check_case(case, torch.float32).items() if not v}
                if wrong:
                    raise SystemExit(f"{cell} {case.workload.name}: {wrong}")
                ours, theirs = (case.side(library, torch.float32) for library in (rnnkern, nn))
                for pass_name, seen in ratios.items():
                    with grad_mode(pass_name):
                        pair = timing.time_pair(
                            ours.call(pass_name),
                            theirs.call(pass_name),
                            budget_s=options.seconds,
                            min_pairs=5,
                        )
                    seen.append(pair.speedup)
                    row = f"{pair.speedup:6.2f}x  {cell:9}{case.workload.name:19}{pass_name:17}"
                    row += f"{pair.their_us:10.1f} us{pair.us:10.1f} us"
                    found.append((pair.speedup, row))
    print(f"{timing.cpu_name()}, torch {torch.__version__}, threads: {options.threads}")
    for pass_name, seen in ratios.items():
        below = sum(ratio < 1 for ratio in seen)
        mean = statistics.geometric_mean(seen)
        print(f"{pass_name:17} geometric mean {mean:.2f}x, {below} of {len(seen)} below 1")
    print(f"\n{'':57}{'torch.nn':>10}{'rnnkern':>13}")
    for _, row in sorted(found)[:10]:
        print(row)


if __name__ == "__main__":
    main()
