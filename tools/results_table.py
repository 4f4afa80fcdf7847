"""Print the results of `rnnkern compare --json` as Markdown: one row per cell and workload.

Usage: tools/results_table.py RESULTS.json [MORE.json ...]; one table per file and dtype.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from rnnkern.bench.workloads import load_workloads

PASSES = ("forward", "forward (grad)", "forward+backward")


def tables(found: dict[str, Any]) -> str:
    dtypes = dict.fromkeys(row["dtype"] for row in found["rows"])
    return "\n\n".join(table(found, dtype) for dtype in dtypes)


def table(found: dict[str, Any], dtype: str) -> str:
    head, rows = found["header"], [row for row in found["rows"] if row["dtype"] == dtype]
    on_cpu = f"{head['cpu']}, {head['threads']} thread(s), {head['isa']}"
    machine = f"{head['gpu']}, CUDA {head['cuda']}" if head["gpu"] else on_cpu
    lines = [
        f"{machine}, {dtype}, torch {head['torch']}, commit {str(head['commit'])[:12]}, "
        f"{head['date'][:10]}.",
        "",
        "| cell | workload | T | N | I | H | " + " | ".join(PASSES) + " |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    cases: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        cases.setdefault((row["cell"], row["workload"]), {})[row["pass"]] = row
    workloads = load_workloads(head["device"].partition(":")[0])
    for (cell, workload), passes in cases.items():
        size = workloads[workload]
        sizes = f"{size.steps} | {size.batch} | {size.input_size} | {size.hidden_size}"
        cells = " | ".join(cell_text(passes.get(name)) for name in PASSES)
        lines.append(f"| {cell} | {workload} | {sizes} | {cells} |")
    means = " | ".join(f"**{mean(rows, name):.2f}x**" for name in PASSES)
    lines.append(f"| all | geometric mean | | | | | {means} |")
    return "\n".join(lines)


def cell_text(row: dict[str, Any] | None) -> str:
    if row is None or row.get("speedup") is None:
        return ""
    return f"{row['speedup']:.2f}x ({time_text(row['us'])})"


def time_text(us: float) -> str:
    return f"{us:.3g} µs" if us < 1000 else f"{us / 1000:.3g} ms"


def mean(rows: list[dict[str, Any]], name: str) -> float:
    logs = [math.log(row["speedup"]) for row in rows if row["pass"] == name and row.get("speedup")]
    return math.exp(sum(logs) / len(logs))


if __name__ == "__main__":
    for path in sys.argv[1:]:
        print(tables(json.loads(Path(path).read_text())), end="\n\n")
