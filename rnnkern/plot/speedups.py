"""The picture of ``rnnkern compare``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rnnkern.bench.workloads import CELLS, PASSES
from rnnkern.plot.style import COLOURS

if TYPE_CHECKING:
    from rnnkern.bench.report import Row


def speedup(rows: Sequence[Row], path: Path) -> None:
    """Draws the speed-up over torch.nn per workload, a panel for each dtype and pass and a bar for
    each cell.

    Args:
        rows: timings, at least one.
        path: the file to write; its ending says the format.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    # Figure and not pyplot: no display, and no state left behind in the caller's process.
    from matplotlib.figure import Figure

    dtypes = list(dict.fromkeys(r.dtype for r in rows))
    shown = [
        (dtype, pass_name)
        for dtype in dtypes
        for pass_name in PASSES
        if any((r.dtype, r.pass_name) == (dtype, pass_name) for r in rows)
    ]
    cells = [c for c in CELLS if any(r.cell in (c, c + "Cell") for r in rows)]
    workloads = list(dict.fromkeys(r.workload for r in rows))
    size = (max(5.0, 1.5 + 0.85 * len(workloads)), 0.9 + 2.4 * len(shown))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.8 / len(cells)
    for panel, (dtype, pass_name) in zip(panels, shown, strict=True):
        for i, cell in enumerate(cells):
            wanted = (dtype, pass_name, cell)
            found = [
                r for r in rows if (r.dtype, r.pass_name, r.cell.removesuffix("Cell")) == wanted
            ]
            places = [
                workloads.index(r.workload) + (i - (len(cells) - 1) / 2) * width for r in found
            ]
            # Bars grow from 1 and not from 0: a slow-down points downwards.
            heights = [r.speedup - 1 for r in found]
            panel.bar(places, heights, width, bottom=1, color=COLOURS[cell], label=cell)
        panel.axhline(1, color="black", linewidth=1)
        panel.set_yscale("log", base=2)
        panel.yaxis.set_major_formatter("{x:g}x")
        title = pass_name if len(dtypes) == 1 else f"{dtype}, {pass_name}"
        panel.set_title(title, loc="left", fontsize=10)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    panels[-1].set_xticks(range(len(workloads)), workloads, rotation=30, ha="right")
    first = rows[0]
    figure.suptitle(
        f"Speed-up over torch.nn: {', '.join(dtypes)} on {first.device}, threads: {first.threads}",
        fontsize=11,
    )
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(cells), frameon=False)
    figure.savefig(path, dpi=150)
