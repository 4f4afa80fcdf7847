"""Prints the results of ``rnnkern compare``: plain ASCII, no colour, at most 100 columns."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from rnnkern import tolerance
from rnnkern.bench import compare
from rnnkern.bench.compare import Options
from rnnkern.bench.report import Failure, NotebookResult, Report, Row
from rnnkern.bench.workloads import CELLS, STEP_CELLS, Workload

NOTEBOOK_TEXT = (
    "The notebook's comparison: X = randn(10, 1, 3), hidden 3, every parameter 0.3; "
    "total time of timeit"
)
NOTEBOOK_HEADING = (
    f"cell  squared difference of outputs   of gradients  below {tolerance.NOTEBOOK_LIMIT:g}"
    "      torch.nn     rnnkern  speed-up"
)
ROWS_HEADING = f"""\
Timed in turn, speed-up = median of torch.nn / rnnkern over neighbouring samples. GFLOP/s of
rnnkern, from 2 T N G H (I + H) a forward pass (G: RNN 1, GRU 3, LSTM 4), three times that with
backward. Checked first against float64: errors at most {tolerance.FACTOR:g} x those of torch.nn + \
{tolerance.FLOOR_EPS[torch.float32]:g} eps,
of 16-bit types + {tolerance.FLOOR_EPS[torch.bfloat16]:g} eps.

{"cell":5} {"workload":13}{"T":>5}{"N":>5}{"I":>5}{"H":>5} {"dtype":8} {"pass":16}{"torch.nn":>8}\
{"rnnkern":>10}{"speed-up":>9}{"GFLOP/s":>8}"""
STEPS_HEADING = f"""\
One step of a cell, from a given state.

{"cell":9}{"workload":13}{"N":>5}{"I":>5}{"H":>5}  {"dtype":8} {"pass":16}{"torch.nn":>8}\
{"rnnkern":>10}{"speed-up":>9}{"GFLOP/s":>8}"""


def write_json(report: Report, path: Path) -> None:
    """Writes the report in one step, so that the file is complete at every moment."""
    text = json.dumps(report.as_json(), indent=1, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _figures(value: float) -> str:
    """Three significant figures, at most three decimals, never an exponent."""
    for bound, decimals in ((0.0995, 3), (9.995, 2), (99.95, 1)):
        if value < bound:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"


def duration(us: float) -> str:
    """Microseconds in the unit that reads best, units below each other."""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us / scale < 999.5:
            return f"{_figures(us / scale)} {unit}"
    return f"{_figures(us / 1e6)} s "


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{_figures(value)}x"


def _progress_bar(total: int) -> Any:
    """A bar on stderr, or None if that is not a terminal or tqdm is not installed."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ModuleNotFoundError:  # a run without a bar is better than none
        return None
    shown = "{percentage:3.0f}% |{bar:30}| {elapsed} {desc}"
    return tqdm(total=total, file=sys.stderr, leave=False, bar_format=shown)


def _sizes(cell: str, w: Workload) -> str:
    """The columns of a row that name its case."""
    sizes = f"{w.batch:5}{w.input_size:5}{w.hidden_size:5}"
    return f"{cell:9}{w.name:13}{sizes}" if w.is_step else f"{cell:5} {w.name:13}{w.steps:5}{sizes}"


class Printer:
    """Prints results as they come, with a progress bar on stderr if that is a terminal.

    Writes them to a file too, if there is a path for it.
    """

    def __init__(self, options: Options, json_path: Path | None = None) -> None:
        self.options = options
        self._json_path = json_path
        self._report: Report | None = None
        self._table = ""
        self._case: tuple[str, ...] = ()
        self._bar: Any = None

    def __enter__(self) -> Printer:
        self._bar = _progress_bar(compare.pieces_of_work(self.options))
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)  # print would leave parts of the bar behind
        else:
            print(text)
        sys.stdout.flush()  # a row may take seconds, and a pipe should not delay it

    def _print_row(self, table: str, text: str) -> None:
        """Prints a row, under the table's heading if it is the first."""
        self._print(text if table == self._table else f"\n{table}\n{text}")
        self._table = table
        if self._json_path is not None and self._report is not None:
            write_json(self._report, self._json_path)

    def begin(self, label: str) -> None:
        """A piece of work begins."""
        if self._bar is not None:
            self._bar.set_description_str(label)

    def end(self, pieces: int = 1) -> None:
        """Pieces of work are done, or left out."""
        if self._bar is not None:
            self._bar.update(pieces)

    def start(self, report: Report) -> None:
        """Prints what is compared, and on which machine."""
        self._report = report
        header = report.header
        threads = header["threads"]
        if header["gpu"]:
            self._print(
                f"rnnkern {header['rnnkern']} against torch.nn {header['torch']}, "
                f"{header['dtype']}\n{header['gpu']}, driver {header['driver']}, "
                f"CUDA {header['cuda']}, cuDNN {header['cudnn']}"
            )
        else:
            self._print(
                f"rnnkern {header['rnnkern']} ({header['isa']}) against torch.nn "
                f"{header['torch']}, {header['dtype']}, {threads} thread{'s' * (threads > 1)}\n"
                f"{header['cpu']}, {header['cores']} cores"
            )
        if header["quick"]:
            left_out = f", without {', '.join(header['left_out'])}" if header["left_out"] else ""
            self._print(
                f"Quick run: {header['notebook_runs']} instead of 10000 timeit runs, "
                f"{header['row_budget_s']:g} s a row{left_out}"
            )

    def notebook(self, result: NotebookResult) -> None:
        """Prints one cell of the notebook's comparison."""
        self._print_row(
            f"{NOTEBOOK_TEXT}\n{NOTEBOOK_HEADING}",
            f"{result.cell:4}{result.output_difference:31.3g}{result.gradient_difference:15.3g}"
            f"{'yes' if result.ok else 'NO':>13}"
            f"{duration(result.torch_seconds * 1e6):>14}{duration(result.seconds * 1e6):>12}"
            f"{_ratio(result.speedup):>10}",
        )

    def row(self, row: Row) -> None:
        """Prints one timing. It omits sizes and dtype if they are those of the row above."""
        name = dtype = ""
        w = next(w for w in self.options.workloads if w.name == row.workload)
        if self._case[:2] != (row.cell, row.workload):
            name = _sizes(row.cell, w)
        if self._case != (row.cell, row.workload, row.dtype):
            dtype = row.dtype
        self._case = (row.cell, row.workload, row.dtype)
        self._print_row(
            STEPS_HEADING if w.is_step else ROWS_HEADING,
            f"{name:39} {dtype:8} {row.pass_name:16}{duration(row.torch_us):>8}"
            f"{duration(row.us):>10}{_ratio(row.speedup):>9}{_figures(row.gflops):>8}",
        )

    def failures(self, failures: list[Failure]) -> None:
        """Prints which results of a case are wrong."""
        for f in failures:
            dtype = f"{f.dtype} " if len(self.options.precisions) > 1 else ""
            self._print_row(
                STEPS_HEADING if f.cell in STEP_CELLS else ROWS_HEADING,
                f"{f.cell:5} {f.workload:13} FAILED {dtype}{f.what}: {f.problem}",
            )

    def _means(self, report: Report, cells: tuple[str, ...]) -> None:
        """Prints a row for each dtype and pass, a column for each of the cells."""
        heads = "".join(f"{cell:>9}" for cell in cells)
        heading = f"\n{'geometric mean of the speed-up':30}{heads}{'all':>9}   the least"
        for dtype in report.dtypes:
            for pass_name in self.options.passes:
                slowest = report.slowest(pass_name, dtype, cells)
                if slowest is None:
                    continue
                label = pass_name if len(report.dtypes) == 1 else f"{dtype:9}{pass_name}"
                groups = (*((cell,) for cell in cells), cells)
                speedups = [report.mean(pass_name, dtype, group) for group in groups]
                if heading:
                    print(heading)
                    heading = ""
                print(
                    f"{label:30}{''.join(f'{_ratio(value):>9}' for value in speedups)}   "
                    f"{_ratio(slowest.speedup)} {slowest.cell} {slowest.workload}"
                )

    def summary(self, report: Report) -> None:
        """Prints the means, and the verdict on all checks."""
        if report.notebook:
            print("\nThe notebook's call, in calls of nn.Linear(3, 3) on the same input")
            for label, beside in (
                ("without grad", {r.cell: r.without_grad for r in report.notebook}),
                ("with grad", {r.cell: r.with_grad for r in report.notebook}),
            ):
                us = statistics.median(one.linear_us for one in beside.values())
                parts = ", ".join(f"{cell} {_figures(one.ratio)}" for cell, one in beside.items())
                print(f"{label:12} ({duration(us)}): {parts}")
        for family in (CELLS, STEP_CELLS):
            self._means(report, tuple(cell for cell in self.options.cells if cell in family))
        if report.not_timed:
            print(
                f"\nTime was up: {report.not_timed} rows were checked but not timed. "
                "This machine is slow or busy."
            )
        wrong = sorted({f"{f.cell} {f.workload}" for f in report.failures})
        wrong += [f"{r.cell} notebook's comparison" for r in report.notebook if not r.ok]
        print(f"\nFAILED: {', '.join(wrong)}" if wrong else "\nAll checks passed.")
