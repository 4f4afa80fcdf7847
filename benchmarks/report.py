"""Measures rnnkern, torch.nn and the peers that are installed, and writes docs/benchmarks.md.

    python -m benchmarks.report [--threads 1,2] [--quick]

Inference against every peer, forward+backward against torch.nn, both beside what the machine could
do at all (its measured matrix product and memory bandwidth), and time over T, N and H. All calls of
a row are timed in turn in one process. The results go to benchmarks/results as JSON, the pictures
to docs/benchmarks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from rnnkern import compare, timing
from rnnkern.workloads import (
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

# One of T, N and H grows, the others stay.
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


@dataclass(frozen=True)
class Limits:
    """What the machine can do: GFLOP/s of the best float32 matrix product, GB/s of a copy."""

    gflops: float
    gbytes: float

    def seconds(self, cell: str, w: Workload, pass_name: str) -> float:
        """The longer of its products at full speed, and its tensors moved once from memory.

        Small tensors stay in the caches and may be faster than that.

        Backward reads what forward read and wrote, and writes as many gradients.
        """
        weights = GATES[cell] * w.hidden_size * (w.input_size + w.hidden_size)
        moved = 4 * (weights + w.steps * w.batch * (w.input_size + w.hidden_size))
        times = 3 if pass_name == FORWARD_BACKWARD else 1
        products = flops(cell, w, pass_name) / (self.gflops * 1e9)
        return max(products, times * moved / (self.gbytes * 1e9))


def measure_limits(quick: bool) -> Limits:
    """The best of several shapes and runs: a limit is no average."""
    best = 0.0
    for m, k, n in ((512, 512, 512), (1024, 1024, 1024), (2048, 2048, 2048), (64, 1024, 4096)):
        a, b, out = torch.randn(m, k), torch.randn(k, n), torch.empty(m, n)

        def product(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        seconds = min(timing.time_in_turn([product], budget_s=0.2 if quick else 1, min_rounds=3)[0])
        best = max(best, 2e-9 * m * k * n / seconds)
    source, target = torch.randn(2**26), torch.empty(2**26)
    copies = timing.time_in_turn(
        [lambda: target.copy_(source)], budget_s=0.2 if quick else 1, min_rounds=3
    )
    return Limits(best, 2e-9 * source.nbytes / min(copies[0]))


@dataclass(frozen=True)
class Timing:
    """Microseconds per call of each library, and our speed-up over each: medians over rounds."""

    us: dict[str, float]
    speedup: dict[str, float]


def time_calls(calls: dict[str, timing.Call], quick: bool) -> Timing:
    """Times calls by name in turn."""
    threads = torch.get_num_threads()
    samples = timing.time_in_turn(
        list(calls.values()),
        budget_s=0.1 if quick else 2.0,
        min_rounds=2 if quick else 5,
        # Each library has a pool of its own, whose threads spin for a while after a call.
        warm_s=0.03 if threads > 1 and len(calls) > 2 else 0.0,
    )
    by_name = dict(zip(calls, samples, strict=True))
    ours = by_name[OURS]
    return Timing(
        {name: statistics.median(s) * 1e6 for name, s in by_name.items()},
        {
            name: statistics.median(t / o for t, o in zip(s, ours, strict=True))
            for name, s in by_name.items()
            if name != OURS
        },
    )


def inference(cell: str, workload: Workload, quick: bool) -> Timing:
    """The plain forward pass against torch.nn and every peer."""
    calls = peers.calls(draw_case(cell, workload), torch.get_num_threads())
    with grad_mode(FORWARD):
        return time_calls(calls, quick)


def training(cell: str, workload: Workload, quick: bool) -> Timing:
    """Forward+backward against torch.nn."""
    case = draw_case(cell, workload)
    calls = peers.module_calls(case, FORWARD_BACKWARD)
    with grad_mode(FORWARD_BACKWARD):
        return time_calls(calls, quick)


MEASURES = {FORWARD: inference, FORWARD_BACKWARD: training}


def measure(
    pass_name: str, cell: str, workload: Workload, limits: Limits, quick: bool
) -> dict[str, Any]:
    """One row of the report."""
    measured = MEASURES[pass_name](cell, workload, quick)
    seconds = measured.us[OURS] * 1e-6
    return {
        "pass": pass_name,
        "cell": cell,
        "workload": workload.name,
        "threads": torch.get_num_threads(),
        "sizes": [workload.steps, workload.batch, workload.input_size, workload.hidden_size],
        "us": measured.us,
        "speedup": measured.speedup,
        "gflops": flops(cell, workload, pass_name) * 1e-9 / seconds,
        "of_limit": limits.seconds(cell, workload, pass_name) / seconds,
    }


def sweep(name: str, cell: str, limits: Limits, quick: bool) -> Iterator[dict[str, Any]]:
    """Both passes over one growing size."""
    values = SWEEPS[name][:: 4 if quick else 1]
    for value in values:
        sizes = SWEEP_BASE | {name: value}
        if name == "hidden_size":
            sizes["input_size"] = value
        workload = Workload(f"{name}={value}", **sizes)
        for pass_name in MEASURES:
            yield measure(pass_name, cell, workload, limits, True) | {"sweep": name, "value": value}


def run(threads: Iterable[int], quick: bool) -> dict[str, Any]:
    """Everything, as JSON-ready values."""
    header = compare.header(compare.Options(quick=quick))
    header["peers"] = {name: _version(name) for name in peers.installed()}
    report: dict[str, Any] = {"header": header, "limits": {}, "rows": [], "sweeps": []}
    workloads = list(load_workloads().values())
    if quick:
        workloads = list(compare.quick_workloads(tuple(workloads), "cpu"))
    for count in threads:
        with timing.threads_set(count):
            limits = measure_limits(quick)
            report["limits"][str(count)] = {"gflops": limits.gflops, "gbytes": limits.gbytes}
            for pass_name in MEASURES:
                for cell in CELLS:
                    for workload in workloads:
                        row = measure(pass_name, cell, workload, limits, quick)
                        print(_line(row), flush=True)
                        report["rows"].append(row)
    with timing.threads_set(1):  # sizes and not threads are the question here
        limits = measure_limits(quick)
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
        f"{row['threads']} {row['pass']:16} {row['cell']:4} {row['workload']:13} "
        f"{row['us'][OURS]:10.1f} us  {others}"
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
    yield _cells(heads)
    yield _cells(["---", "---", *["---:"] * (len(heads) - 2)])
    for row in rows:
        cells = [row["cell"], row["workload"], *map(str, row["sizes"])]
        cells += [_time(row["us"][name]) for name in names]
        cells += [f"{row['speedup'][name]:.2f}" for name in others]
        yield _cells([*cells, f"{row['gflops']:.3g}", f"{100 * row['of_limit']:.0f} %"])
    for cell in (*CELLS, None):
        of_cell = [row for row in rows if cell in (None, row["cell"])]
        means = [_mean(row["speedup"][name] for row in of_cell) for name in others]
        yield _cells([cell or "all", "geometric mean", *[""] * (4 + len(names)), *means, "", ""])


def _cells(texts: Iterable[str]) -> str:
    return "| " + " | ".join(texts) + " |"


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
        " speed-up is the median of the ratios within a round. float32. The limit of a row is the"
        " larger of its products at the speed of this machine's best measured matrix product, and"
        " its tensors moved once at the speed of a copy.",
    ]
    for threads, limits in report["limits"].items():
        lines += [
            "",
            f"## Threads: {threads}",
            "",
            f"Matrix product {limits['gflops']:.0f} GFLOP/s, copy {limits['gbytes']:.1f} GB/s.",
        ]
        for pass_name, title in ((FORWARD, "Inference"), (FORWARD_BACKWARD, "Forward+backward")):
            rows = [
                r for r in report["rows"] if r["threads"] == int(threads) and r["pass"] == pass_name
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
        panels = figure.subplots(2, len(CELLS), sharex=True, sharey=True)
        for panel_row, pass_name in zip(panels, MEASURES, strict=True):
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
    """The command."""
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
    page.write_text(markdown(report, pictures), encoding="utf-8")
    print(f"written: {page}")


if __name__ == "__main__":
    main()
