"""Writes what benchmarks/gpu/speed.py has measured into docs/benchmarks.md: tables and pictures.

    python -m benchmarks.gpu.page benchmarks/results/gpu-h200-speed.jsonl [peers.jsonl]

The section "On a GPU" of the page is replaced, the rest of it stays.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    default_precisions,
    load_workloads,
)

ROOT = Path(__file__).resolve().parents[2]
HEADING = "## On a GPU"
PASSES = (FORWARD, FORWARD_BACKWARD)
AXES = {
    "hidden_size": ("H", "hidden size H (I=H, T=256, N=16)"),
    "steps": ("T", "time steps T (I=H=256, N=16)"),
}
Results = list[dict[str, Any]]


def read(path: Path) -> tuple[dict[str, Any], Results]:
    """The line about the machine and the measured rows, without those that failed."""
    header, *lines = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
    return header, [line for line in lines if "us" in line]


def cells_of_table(texts: Iterable[str]) -> str:
    """A line of a table."""
    return "| " + " | ".join(texts) + " |"


def table(results: Results, dtype: str, pass_name: str) -> Iterator[str]:
    """Workloads by cells: our time, and torch.nn's time divided by ours."""
    found = {
        (r["workload"], r["cell"]): r
        for r in results
        if (r["dtype"], r["pass"]) == (dtype, pass_name) and "sweep" not in r
    }
    heads = ["workload", "T", "N", "I", "H"]
    for cell in CELLS:
        heads += [f"{cell}, µs", "µs a step", "of expected", "over torch.nn"]
    yield cells_of_table(heads)
    yield cells_of_table(["---", *["---:"] * (len(heads) - 1)])
    for name, w in load_workloads("cuda").items():
        sizes = map(str, (w.steps, w.batch, w.input_size, w.hidden_size))
        texts = [name, *sizes]
        for cell in CELLS:
            r = found.get((name, cell))
            expected = f"{100 * r['of_expected']:.0f} %" if r and "of_expected" in r else ""
            texts += (
                [f"{r['us']:.4g}", f"{r['us_per_step']:.3g}", expected, f"{r['speedup']:.2f}"]
                if r
                else [""] * 4
            )
        yield cells_of_table(texts)
    means = []
    for cell in CELLS:
        speedups = [r["speedup"] for r in found.values() if r["cell"] == cell]
        means += ["", "", "", f"{statistics.geometric_mean(speedups):.2f}" if speedups else ""]
    yield cells_of_table(["geometric mean", "", "", "", "", *means])


def peers_table(results: Results) -> Iterator[str]:
    """One line for each row: the times of all libraries that were measured."""
    names = list(dict.fromkeys(name for r in results for name in r["others"]))
    yield cells_of_table(["row", "rnnkern, µs", "torch.nn, µs", *(f"{n}, µs" for n in names)])
    yield cells_of_table(["---", *["---:"] * (2 + len(names))])
    for r in results:
        others = (f"{r['others'][n]['us']:.4g}" if n in r["others"] else "" for n in names)
        row = f"{r['cell']} {r['workload']} {r['dtype']} {r['pass']}"
        yield cells_of_table([row, f"{r['us']:.4g}", f"{r['torch_us']:.4g}", *others])


def draw(results: Results, swept: str, path: Path) -> None:
    """Time per step over a size that grows: ours and torch.nn's, one panel a cell and pass."""
    from matplotlib.figure import Figure

    key, label = AXES[swept]
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panels = figure.subplots(len(PASSES), len(CELLS), sharex=True, sharey="row")
    of_sweep = [r for r in results if r.get("sweep") == swept]
    dtypes = list(dict.fromkeys(r["dtype"] for r in of_sweep))
    for (i, pass_name), (j, cell) in product(enumerate(PASSES), enumerate(CELLS)):
        panel = panels[i][j]
        for color, dtype in enumerate(dtypes):
            rows = [
                r
                for r in of_sweep
                if (r["cell"], r["pass"], r["dtype"]) == (cell, pass_name, dtype)
            ]
            for name, style, time in (("rnnkern", "-", "us"), ("torch.nn", ":", "torch_us")):
                panel.plot(
                    [r[key] for r in rows],
                    [r[time] / r["T"] for r in rows],
                    style,
                    marker=".",
                    color=f"C{color}",
                    label=f"{name}, {dtype}",
                )
        panel.set_xscale("log" if swept == "steps" else "linear")
        panel.set_yscale("log")
        panel.set_title(f"{cell}, {pass_name}", fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[-1]:
        panel.set_xlabel(label, fontsize=8)
    for panel_row in panels:
        panel_row[0].set_ylabel("µs a step")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def section(
    header: dict[str, Any], results: Results, peers: Results, pictures: list[Path]
) -> list[str]:
    """The lines of the section."""
    lines = [
        HEADING,
        "",
        f"{header['device']}, driver {header['driver']}; torch {header['torch']}, CUDA "
        f"{header['cuda']}, cuDNN {header['cudnn']}; commit {header['commit']}.",
        "",
        "Measured by `benchmarks/gpu/speed.py`: CUDA events, in turn in one process, medians; a"
        " speed-up is the median of the ratios within a round. Expected is what the plan says of a"
        " step (`rnnkern.explain`).",
    ]
    measured = {r["dtype"] for r in results}
    for precision, pass_name in product(default_precisions("cuda"), PASSES):
        if precision.name in measured:
            lines += ["", f"### {precision.name}, {pass_name}", ""]
            lines += table(results, precision.name, pass_name)
    if peers:
        lines += ["", "### Peers", "", *peers_table(peers)]
    lines += [text for path in pictures for text in ("", f"![{path.stem}](benchmarks/{path.name})")]
    return lines


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("speed", type=Path, help="what speed.py has written")
    parser.add_argument("peers", type=Path, nargs="?", help="and with --peers")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the page")
    arguments = parser.parse_args()
    header, results = read(arguments.speed)
    peers = read(arguments.peers)[1] if arguments.peers else []
    pictures = []
    for swept in AXES:
        if any(r.get("sweep") == swept for r in results):
            pictures.append(arguments.docs / "benchmarks" / f"gpu-{swept}.png")
            draw(results, swept, pictures[-1])
    page = arguments.docs / "benchmarks.md"
    old = page.read_text(encoding="utf-8") if page.exists() else "# Benchmarks\n"
    before = old.partition(HEADING)[0].rstrip()
    text = "\n".join(section(header, results, peers, pictures))
    page.write_text(f"{before}\n\n{text}\n", encoding="utf-8")
    print(f"written: {page}")


if __name__ == "__main__":
    main()
