"""Layers and cells at sizes drawn at random, to find sizes at which another library is faster.

    python -m benchmarks.drawn [--cell LSTM,GRUCell] [--draws 60] [--seed 0] [--threads N]
        [--seconds S]

Sizes are even on a logarithmic scale: up to 500 steps, 300 rows, 1200 features and 1600 hidden
units. Inference is compared with torch.nn and the peers that are installed (`benchmarks.peers`),
and forward+backward with torch.nn. Everything is checked first and timed in turn. A speed-up is the
median over rounds of the time of another library over ours; the least one is over the best of them.
Prints geometric means and the ten rows with the least speed-up.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
from collections.abc import Iterator

import torch

from benchmarks import layers, rows
from benchmarks.rows import BEST, OURS, Effort, Row
from rnnkern.bench import timing
from rnnkern.bench.workloads import CELLS, STEP_CELLS, Workload, flops

MOST_STEPS, MOST_ROWS, MOST_FEATURES, MOST_UNITS = 500, 300, 1200, 1600
#: A larger draw would take seconds a call, and is drawn again.
MOST_FLOPS = 3e10
#: Draws of each layer and each cell in docs/benchmarks.md.
REPORTED = 30


def draw(generator: random.Random, cell: str) -> Workload:
    """A workload of one of `CELLS` or `STEP_CELLS`."""

    def size(most: int) -> int:
        return round(math.exp(generator.uniform(0, math.log(most))))

    while True:
        T = 1 if cell in STEP_CELLS else size(MOST_STEPS)
        N, I, H = size(MOST_ROWS), size(MOST_FEATURES), size(MOST_UNITS)
        name = f"N{N} I{I} H{H}" if cell in STEP_CELLS else f"T{T} N{N} I{I} H{H}"
        drawn = Workload(name, T, N, I, H, is_step=cell in STEP_CELLS)
        if flops(cell, drawn) <= MOST_FLOPS:
            return drawn


def measure(cell: str, workload: Workload, effort: Effort) -> Iterator[Row]:
    """A row of each pass."""
    title = "drawn sizes of cells" if cell in STEP_CELLS else "drawn sizes"
    case_name = f"{cell} {workload.name}"
    yield from layers.checked(title, cell, workload, effort, case_name=case_name)


def drawn(effort: Effort) -> Iterator[Row]:
    """The first draws of each layer and each cell."""
    for cell in (*CELLS, *STEP_CELLS):
        generator = random.Random(0)
        for _ in range(1 if effort.quick else REPORTED):
            yield from measure(cell, draw(generator, cell), effort)


def main(arguments: list[str] | None = None) -> None:
    kinds = (*CELLS, *STEP_CELLS)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", default=",".join(kinds), help=f"some of {','.join(kinds)}")
    parser.add_argument("--draws", type=int, default=60, help="of each cell")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=0.2, help="for a row")
    options = parser.parse_args(arguments)
    cells = options.cell.split(",")
    if not set(cells) <= set(kinds):
        parser.error(f"--cell: some of {','.join(kinds)}, got {options.cell}")
    print(f"{timing.cpu_name()}, torch {torch.__version__}, threads: {options.threads}")
    found: list[Row] = []
    failed: list[str] = []
    with timing.threads_set(options.threads):
        for cell in cells:
            generator = random.Random(options.seed)  # a cell's draws do not depend on the others
            of_cell = [
                made
                for _ in range(options.draws)
                for made in measure(cell, draw(generator, cell), Effort(options.seconds, 5))
            ]
            failed += [made["case"] for made in of_cell if not made["us"]]
            of_cell = [made for made in of_cell if made["us"]]
            for table in dict.fromkeys(made["table"] for made in of_cell):
                seen = [m["speedup"][BEST] for m in of_cell if m["table"] == table]
                below = sum(speedup < 1 for speedup in seen)
                print(
                    f"{cell:9}{table}: geometric mean {statistics.geometric_mean(seen):.2f}x, "
                    f"{below} of {len(seen)} below 1",
                    flush=True,
                )
            found += of_cell
    print(f"\n{'':74}{'ours, us':>11}{'best, us':>11}")
    for made in sorted(found, key=lambda made: float(made["speedup"][BEST]))[:10]:
        best = rows.fastest_other(made)
        print(
            f"{made['speedup'][BEST]:6.2f}x  {made['case']:33}"
            f"{made['table'].partition(', ')[2]:33}"
            f"{made['us'][OURS]:11.1f}{made['us'][best]:11.1f}  {best}"
        )
    if failed:
        raise SystemExit("\n".join(dict.fromkeys(failed)))


if __name__ == "__main__":
    main()
