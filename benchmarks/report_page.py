"""docs/benchmarks.md from what `benchmarks.report` has kept of every kind of CPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.gpu.page import cells_of_table
from benchmarks.rows import BEST, OURS, Effort, Row
from rnnkern.bench.workloads import CELLS

INTRO = """\
Written by `python -m benchmarks.report`, which keeps what it measures in
`benchmarks/results/report-*.json`, a file for each kind of CPU. This page has all of them. All
calls of a row are timed in turn in one process. A time is a median, in µs, and a speed-up the
median of the ratios within a round. "Over the best" is the least speed-up over the others of the
row. A number below 1 says that another one is faster.
"""
SWEPT = {
    "steps": ("time steps T", "N=16, I=H=128"),
    "batch": ("batch N", "T=64, I=H=128"),
    "hidden_size": ("hidden size H", "T=64, N=16, I=H"),
}
OF_LIMIT = "of the limit"
Report = dict[str, Any]
Threads = tuple[int, ...]
Measure = Callable[[Effort, Threads], Iterator[Row]]


class Section(NamedTuple):
    """A part of the page and of the files.

    Attributes:
        name: in the files and on the command line.
        title, about: the heading and the text under it.
        measure: makes its rows, for numbers of threads.
        seconds: for a row.
    """

    name: str
    title: str
    about: str
    measure: Measure
    seconds: float


def markdown(
    reports: Sequence[Report], sections: Sequence[Section], pictures: Sequence[str]
) -> str:
    """The page. The CPUs, A, B and so on, are side by side in each table."""
    lines = ["# Benchmarks", "", INTRO, *_machines(reports), "", "## At a glance", ""]
    lines += ["Geometric means of the speed-ups, and the least one over the best, by table."]
    lines += ["", *_glance(reports, sections)]
    for section in sections:
        found = {
            letter: own["sections"][section.name]
            for letter, own in _lettered(reports)
            if section.name in own["sections"]
        }
        if found:
            lines += ["", f"## {section.title}", "", section.about, "", _measured(found)]
            lines += _tables({letter: own["rows"] for letter, own in found.items()})
            if any("sweep" in row for own in found.values() for row in own["rows"]):
                lines += [
                    text for path in pictures for text in ("", f"![{Path(path).stem}]({path})")
                ]
    return "\n".join(lines).rstrip() + "\n"


def _lettered(reports: Sequence[Report]) -> list[tuple[str, Report]]:
    return [(chr(ord("A") + i), report) for i, report in enumerate(reports)]


def _machines(reports: Sequence[Report]) -> Iterator[str]:
    yield cells_of_table(["", "CPU", "cores", "instruction set"])
    yield cells_of_table(["---"] * 4)
    for letter, report in _lettered(reports):
        yield cells_of_table([letter, report["cpu"], str(report["cores"]), report["isa"]])


def _measured(found: dict[str, Any]) -> str:
    """When each CPU was measured, and with what."""
    texts = []
    for letter, own in found.items():
        h = own["header"]
        peers = "".join(f", {name} {version}" for name, version in h["peers"].items())
        commit = (h["commit"] or "unknown")[:12]
        texts.append(f"{letter}: torch {h['torch']}{peers}, commit {commit}, {h['date'][:10]}.")
    return " ".join(texts)


def _by_table(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["table"], []).append(row)
    return found


def _ordered(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """All entries, each once, in the order of the lists."""
    return list(dict.fromkeys(entry for entries in lists for entry in entries))


def _tables(of_cpu: dict[str, list[Row]]) -> Iterator[str]:
    """The tables of a section. Rows of a sweep are in the pictures."""
    shown = {k: _by_table(r for r in rows if "sweep" not in r) for k, rows in of_cpu.items()}
    for table in _ordered(shown.values()):
        yield from ("", f"### {table}", "")
        yield from _table({k: tables[table] for k, tables in shown.items() if table in tables})


def _table(of_cpu: dict[str, list[Row]]) -> Iterator[str]:
    columns = {letter: _columns(rows) for letter, rows in of_cpu.items()}
    several = len(of_cpu) > 1
    heads = ["case"]
    for letter, own in columns.items():
        heads += [f"{letter}: {name}" if several else name for _, name in own]
    yield cells_of_table(heads)
    yield cells_of_table(["---", *["---:"] * (len(heads) - 1)])
    by_case = {k: {row["case"]: row for row in rows} for k, rows in of_cpu.items()}
    for case in _ordered(by_case.values()):
        cells = [case]
        for letter, own in columns.items():
            row = by_case[letter].get(case)
            cells += [_cell(row, column) if row else "" for column in own]
        yield cells_of_table(cells)
    groups = _ordered([row["group"] for row in rows if "group" in row] for rows in of_cpu.values())
    for group in (*groups, None) if len(next(iter(of_cpu.values()))) > 1 else ():
        cells = [f"geometric mean{'' if group is None else f', {group}'}"]
        for letter, own in columns.items():
            rows = [r for r in of_cpu[letter] if group in (None, r.get("group"))]
            cells += [_mean(rows, column) for column in own]
        if any(cells[1:]):
            yield cells_of_table(cells)


Column = tuple[str, str]
"""The key of a row, and the head of the column or the key within."""


def _columns(rows: list[Row]) -> list[Column]:
    """Our times, the speed-ups, and the share of the limit."""
    times = _ordered(row.get("shown", [*row["us"]][:1]) for row in rows)
    heads = _ordered(row["speedup"] for row in rows)
    if len([head for head in heads if head.startswith("over ")]) == 2:  # one other, the best
        heads = [head for head in heads if head != BEST]
    made = [("us", f"{name}, µs") for name in times] + [("speedup", head) for head in heads]
    return [*made, ("of_limit", OF_LIMIT)] if any("of_limit" in row for row in rows) else made


def _cell(row: Row, column: Column) -> str:
    key, head = column
    if key == "of_limit":
        return f"{100 * row['of_limit']:.0f} %"
    value = row[key].get(head.removesuffix(", µs") if key == "us" else head)
    if value is None:
        return ""
    if key == "us":
        return f"{value:.3g}" if value < 1000 else f"{value:.0f}"
    return f"{value:.2f}"


def _mean(rows: list[Row], column: Column) -> str:
    key, head = column
    values = [row[key][head] for row in rows if key == "speedup" and head in row[key]]
    is_ratio = "over " in head
    return f"{statistics.geometric_mean(values):.2f}" if values and is_ratio else ""


def _glance(reports: Sequence[Report], sections: Iterable[Section]) -> Iterator[str]:
    heads = ["table"]
    for letter, _ in _lettered(reports):
        heads += [f"{letter}: over torch.nn", f"{letter}: {BEST}", f"{letter}: least {BEST}"]
    yield cells_of_table(heads)
    yield cells_of_table(["---", *["---:"] * (len(heads) - 1)])
    names = [section.name for section in sections]
    found = [
        _by_table(
            row
            for name in names
            for row in report["sections"].get(name, {"rows": []})["rows"]
            if "sweep" not in row and BEST in row["speedup"]
        )
        for report in reports
    ]
    for table in _ordered(found):
        cells = [table]
        for tables in found:
            rows = tables.get(table, [])
            cells += [_mean(rows, ("speedup", head)) for head in ("over torch.nn", BEST)]
            least = min((row["speedup"][BEST] for row in rows), default=None)
            cells.append("" if least is None else f"{least:.2f}")
        yield cells_of_table(cells)


def draw(rows: list[Row], cpu: str, folder: Path, prefix: str) -> list[Path]:
    """A picture of each sweep: time a call over the size, ours and the others'."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    passes = _ordered([row["pass"]] for row in rows)
    for name, (label, fixed) in SWEPT.items():
        figure = Figure(figsize=(9, 5.5), layout="constrained")
        panels = figure.subplots(len(passes), len(CELLS), sharex=True, sharey=True)
        for panel_row, pass_name in zip(panels, passes, strict=True):
            panel_row[0].set_ylabel("µs a call")
            for panel, cell in zip(panel_row, CELLS, strict=True):
                own = [
                    row
                    for row in rows
                    if (row["sweep"], row["cell"], row["pass"]) == (name, cell, pass_name)
                ]
                for library in _ordered(row["us"] for row in own):
                    panel.plot(
                        [row["value"] for row in own],
                        [row["us"][library] for row in own],
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
        title = f"{cpu}: time over {label}; {fixed}, float32, 1 thread"
        figure.suptitle(title, fontsize=11)
        handles, labels = panels[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
        paths.append(folder / f"{prefix}-{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths
