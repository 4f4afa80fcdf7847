"""Measures rnnkern, torch.nn and the peers that are installed, and writes docs/benchmarks.md.

    python -m benchmarks.report [--threads 1,2] [--quick]

Inference against every peer, forward+backward against torch.nn, both passes in bfloat16 too, all
beside what the machine could do at all (its best matrix product, measured in the same rounds, and
its memory bandwidth), and time over T, N and H. All calls of a row are timed in turn in one
process. The results go to benchmarks/results as JSON, the pictures
to docs/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.gpu.page import HEADING as GPU_HEADING
from benchmarks.gpu.page import cells_of_table
from rnnkern.bench import compare, timing
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    GATES,
    Workload,
    draw_case,
    flops,
    grad_mode,
    load_workloads,
)

ROOT = Path(__file__).resolve().parent.parent
OURS = "rnnkern"
TIMED = {FORWARD: "Inference", FORWARD_BACKWARD: "Forward+backward"}

# One of T, N and H grows, the others stay the same.
SWEEP_BASE = {"steps": 64, "batch": 16, "input_size": 128, "hidden_size": 128}
SWEEPS = {
    "steps": (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024),
    "batch": (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 300),
    "hidden_size": (
        8,
        16,
        24,
        32,
        48,
        64,
        65,
        96,
        128,
        129,
        192,
        200,
        256,
        384,
        512,
        650,
        768,
        1024,
    ),
}
AXES = {"steps": "time steps T", "batch": "batch N", "hidden_size": "hidden size H"}


PRODUCT = "matrix product"
# The limits are measured with matrix products of these m, k, n, and a copy of this many floats.
PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (64, 1024, 4096), (256, 1024, 1024))
COPIED = 2**26


@dataclass(frozen=True)
class Limits:
    """The limits of the machine: its best matrix product in a dtype, and the GB/s of a copy."""

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    gflops: float
    gbytes: float

    def product(self) -> timing.Call:
        """The matrix product as a call."""
        m, k, n = self.sizes
        a, b = (torch.randn(*shape).to(self.dtype) for shape in ((m, k), (k, n)))
        out = torch.empty(m, n, dtype=self.dtype)
        return lambda: torch.mm(a, b, out=out)

    def seconds(self, cell: str, w: Workload, pass_name: str, product_s: float) -> float:
        """The longer of its products at full speed, and its tensors moved once from memory.

        Full speed is that of the matrix product, which takes ``product_s`` seconds. Small tensors
        stay in the caches and may be faster than memory.

        Backward reads what forward read and wrote, and writes as many gradients.
        """
        weights = GATES[cell] * w.hidden_size * (w.input_size + w.hidden_size)
        moved = self.dtype.itemsize * (weights + w.steps * w.batch * (w.input_size + w.hidden_size))
        times = 3 if pass_name == FORWARD_BACKWARD else 1
        products = flops(cell, w, pass_name) / _flops_of(self.sizes) * product_s
        return max(products, times * moved / (self.gbytes * 1e9))


def _flops_of(sizes: tuple[int, int, int]) -> float:
    return 2.0 * math.prod(sizes)


def measure_limits(dtype: torch.dtype, quick: bool) -> Limits:
    """The best of several shapes and runs, because a limit is not an average."""
    budget_s = 0.2 if quick else 1.0
    found = []
    for sizes in PRODUCTS:
        call = Limits(sizes, dtype, 0.0, 0.0).product()
        seconds = min(timing.time_in_turn([call], budget_s=budget_s, min_rounds=3)[0])
        found.append((1e-9 * _flops_of(sizes) / seconds, sizes))
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    copies = timing.time_in_turn([lambda: target.copy_(source)], budget_s=budget_s, min_rounds=3)
    gflops, sizes = max(found)
    return Limits(sizes, dtype, gflops, 2e-9 * source.nbytes / min(copies[0]))


def measure(
    pass_name: str, cell: str, workload: Workload, limits: Limits, quick: bool
) -> dict[str, Any]:
    """One row of the report: microseconds per call of each library, our speed-up over each, and the
    share of the limit: medians over rounds.
    """
    case, threads = draw_case(cell, workload), torch.get_num_threads()
    with_peers = pass_name == FORWARD and limits.dtype == torch.float32
    calls = (
        peers.calls(case, threads)
        if with_peers
        else peers.module_calls(case, pass_name, limits.dtype)
    )
    calls[PRODUCT] = limits.product()
    with grad_mode(pass_name):
        samples = timing.time_in_turn(
            list(calls.values()),
            budget_s=0.1 if quick else 1.5,
            min_rounds=2 if quick else 5,
            # Each library has a pool of its own, whose threads spin for a while after a call.
            warm_s=0.03 if threads > 1 and with_peers else 0.0,
        )
    by_name = dict(zip(calls, samples, strict=True))
    ours, products = by_name[OURS], by_name.pop(PRODUCT)
    seconds = statistics.median(ours)
    return {
        "pass": pass_name,
        "dtype": str(limits.dtype).removeprefix("torch."),
        "cell": cell,
        "workload": workload.name,
        "threads": threads,
        "sizes": [workload.steps, workload.batch, workload.input_size, workload.hidden_size],
        "us": {name: statistics.median(taken) * 1e6 for name, taken in by_name.items()},
        "speedup": {
            name: statistics.median(t / o for t, o in zip(taken, ours, strict=True))
            for name, taken in by_name.items()
            if name != OURS
        },
        "gflops": flops(cell, workload, pass_name) * 1e-9 / seconds,
        "of_limit": statistics.median(
            limits.seconds(cell, workload, pass_name, full_speed) / own
            for full_speed, own in zip(products, ours, strict=True)
        ),
    }


def sweep(name: str, cell: str, limits: Limits, quick: bool) -> Iterator[dict[str, Any]]:
    """Measures both passes while one size grows."""
    values = SWEEPS[name][:: 4 if quick else 1]
    for value in values:
        sizes = SWEEP_BASE | {name: value}
        if name == "hidden_size":
            sizes["input_size"] = value
        workload = Workload(f"{name}={value}", **sizes)
        for pass_name in TIMED:
            yield measure(pass_name, cell, workload, limits, True) | {"sweep": name, "value": value}


def run(threads: Iterable[int], quick: bool) -> dict[str, Any]:
    """Measures everything, and returns JSON-ready values."""
    header = compare.header(compare.Options(quick=quick))
    header["peers"] = {name: _version(name) for name in peers.installed()}
    report: dict[str, Any] = {"header": header, "limits": [], "rows": [], "sweeps": []}
    workloads = list(load_workloads().values())
    if quick:
        workloads = list(compare.quick_workloads(tuple(workloads), "cpu"))
    for count in threads:
        with timing.threads_set(count):
            for dtype in (torch.float32, torch.bfloat16):
                limits = measure_limits(dtype, quick)
                report["limits"].append(
                    {
                        "threads": count,
                        "dtype": str(dtype).removeprefix("torch."),
                        "gflops": limits.gflops,
                        "gbytes": limits.gbytes,
                    }
                )
                for pass_name, cell, workload in product(TIMED, CELLS, workloads):
                    row = measure(pass_name, cell, workload, limits, quick)
                    print(_line(row), flush=True)
                    report["rows"].append(row)
    with timing.threads_set(1):  # sizes and not threads are the question here
        limits = measure_limits(torch.float32, quick)
        for name in SWEEPS:
            for cell in CELLS:
                print(f"sweep over {name}, {cell}", flush=True)
                report["sweeps"] += sweep(name, cell, limits, quick)
    return report


def _version(peer: str) -> str:
    import importlib.metadata

    return importlib.metadata.version(peer.lower().replace(" ", ""))


def _line(row: dict[str, Any]) -> str:
    others = ", ".join(f"{name} {value:.2f}x" for name, value in row["speedup"].items())
    return (
        f"{row['threads']} {row['dtype']:8} {row['pass']:16} {row['cell']:4} {row['workload']:13} "
        f"{row['us'][OURS]:10.1f} us  {100 * row['of_limit']:3.0f} %  {others}"
    )


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.geometric_mean(values):.2f}"


def _time(us: float) -> str:
    return f"{us:.3g}" if us < 1000 else f"{us:.0f}"


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    names = list(rows[0]["us"])
    others = [name for name in names if name != OURS]
    heads = ["cell", "workload", "T", "N", "I", "H", *(f"{name}, µs" for name in names)]
    heads += [*(f"over {name}" for name in others), "GFLOP/s", "of the limit"]
    yield cells_of_table(heads)
    yield cells_of_table(["---", "---", *["---:"] * (len(heads) - 2)])
    for row in rows:
        cells = [row["cell"], row["workload"], *map(str, row["sizes"])]
        cells += [_time(row["us"][name]) for name in names]
        cells += [f"{row['speedup'][name]:.2f}" for name in others]
        yield cells_of_table([*cells, f"{row['gflops']:.3g}", f"{100 * row['of_limit']:.0f} %"])
    for cell in (*CELLS, None):
        of_cell = [row for row in rows if cell in (None, row["cell"])]
        means = [_mean(row["speedup"][name] for row in of_cell) for name in others]
        yield cells_of_table(
            [cell or "all", "geometric mean", *[""] * (4 + len(names)), *means, "", ""]
        )


def markdown(report: dict[str, Any], pictures: list[Path]) -> str:
    """The page."""
    header = report["header"]
    versions = ", ".join(f"{name} {version}" for name, version in header["peers"].items())
    lines = [
        "# Benchmarks",
        "",
        f"{header['cpu']}, {header['cores']} cores, {header['isa']}; torch {header['torch']}"
        + (f", {versions}" if versions else "")
        + f"; commit {header['commit']}; {header['date']}.",
        "",
        "Written by `python -m benchmarks.report`: all libraries in turn in one process, medians; a"
        " speed-up is the median of the ratios within a round. The limit of a row is the larger of"
        " its products at the speed of torch.mm in the same rounds, and its tensors moved once at"
        " the speed of a copy.",
    ]
    for limits in report["limits"]:
        lines += [
            "",
            f"## {limits['dtype']}, threads: {limits['threads']}",
            "",
            f"Matrix product {limits['gflops']:.0f} GFLOP/s at best, "
            f"copy {limits['gbytes']:.1f} GB/s.",
        ]
        for pass_name, title in TIMED.items():
            rows = [
                row
                for row in report["rows"]
                if (row["threads"], row["dtype"], row["pass"])
                == (limits["threads"], limits["dtype"], pass_name)
            ]
            lines += ["", f"### {title}", "", *_table(rows)]
            slowest = min(rows, key=lambda r: min(r["speedup"].values()))
            over_best = _mean(min(r["speedup"].values()) for r in rows)
            least = min(slowest["speedup"].values())
            lines += [
                "",
                f"Over the best of the others: geometric mean {over_best}, "
                f"least {least:.2f} ({slowest['cell']} {slowest['workload']}).",
            ]
    lines += ["", "## Over T, N and H", ""]
    lines += [f"![{path.stem}](benchmarks/{path.name})\n" for path in pictures]
    return "\n".join(lines).rstrip() + "\n"


def draw(report: dict[str, Any], folder: Path) -> list[Path]:
    """A picture for each sweep: time per call over the size, ours and torch.nn."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, label in AXES.items():
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        panels = figure.subplots(len(TIMED), len(CELLS), sharex=True, sharey=True)
        for panel_row, pass_name in zip(panels, TIMED, strict=True):
            for panel, cell in zip(panel_row, CELLS, strict=True):
                rows = [
                    r
                    for r in report["sweeps"]
                    if (r["sweep"], r["cell"], r["pass"]) == (name, cell, pass_name)
                ]
                for library in rows[0]["us"]:
                    panel.plot(
                        [r["value"] for r in rows],
                        [r["us"][library] for r in rows],
                        marker=".",
                        linewidth=2 if library == OURS else 1,
                        label=library,
                    )
                panel.set_xscale("log", base=2)
                panel.set_yscale("log")
                panel.set_title(f"{cell}, {pass_name}", fontsize=10)
                panel.grid(alpha=0.3)
        for panel in panels[-1]:
            panel.set_xlabel(label)
        for panel_row in panels:
            panel_row[0].set_ylabel("µs per call")
        fixed = {
            "steps": "N=16, I=H=128",
            "batch": "T=64, I=H=128",
            "hidden_size": "T=64, N=16, I=H",
        }
        figure.suptitle(f"Time over {label}: {fixed[name]}, float32, 1 thread", fontsize=11)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=130)
    return paths


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default="1,2", help="counts, by commas (default: 1,2)")
    parser.add_argument("--quick", action="store_true", help="rougher, and no large workloads")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/cpu-report.json")
    arguments = parser.parse_args()
    report = run([int(n) for n in arguments.threads.split(",")], arguments.quick)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    pictures = draw(report, arguments.docs / "benchmarks")
    page = arguments.docs / "benchmarks.md"
    text = markdown(report, pictures)
    if page.exists():  # what has been measured on a GPU stays
        _, heading, rest = page.read_text(encoding="utf-8").partition(GPU_HEADING)
        text += "\n" * bool(heading) + heading + rest
    page.write_text(text, encoding="utf-8")
    print(f"written: {page}")


if __name__ == "__main__":
    main()
