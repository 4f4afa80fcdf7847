"""The command ``rnnkern``: ``rnnkern compare`` and ``rnnkern info``.

All printing is here: plain ASCII, no colour, at most 100 columns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import rnnkern
from rnnkern import compare, kernels, plot, tolerance
from rnnkern.compare import Failure, NotebookResult, Options, Report, Row
from rnnkern.workloads import (
    CELLS,
    PASSES,
    PRECISIONS,
    STEP_CELLS,
    Precision,
    Workload,
    default_precisions,
    load_step_workloads,
    load_workloads,
)

OK, FAILED, INTERRUPTED = 0, 1, 130
ALL_CELLS = (*CELLS, *STEP_CELLS)
DTYPES = {"cpu": ("float32", "float64"), "cuda": tuple(PRECISIONS)}

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


def _slug(pass_name: str) -> str:
    """A pass as a word that needs no quotes: forward, forward-grad, forward-backward."""
    return pass_name.replace(" (", "-").replace("+", "-").rstrip(")")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status.

    Returns:
        0, or 1 if a check failed, or 130 if interrupted.

    Raises:
        SystemExit: with 2 for bad usage, as argparse does it, before any work.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.command(arguments))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="rnnkern", description="Hand-written kernels for torch.nn's RNN, LSTM and GRU."
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    info = commands.add_parser("info", help="what this build is and what it uses here")
    info.set_defaults(command=lambda _: _info())
    sub = commands.add_parser(
        "compare",
        help="check rnnkern against torch.nn and time both",
        description="Checks rnnkern against torch.nn and times both, in turn. "
        "Exit status 1 if a check fails.",
    )
    sub.set_defaults(command=_compare, parser=sub)
    several: dict[str, Any] = {"action": "extend", "type": _words, "default": []}
    names, gpu_names = (", ".join(load_workloads(device)) for device in ("cpu", "cuda"))
    step_names = ", ".join(load_step_workloads())
    dtypes = [
        f"on {device}: {', '.join(DTYPES[kind])} (default: "
        f"{', '.join(precision.name for precision in default_precisions(kind))})"
        for device, kind in (("the CPU", "cpu"), ("a GPU", "cuda"))
    ]
    passes = ", ".join(map(_slug, PASSES))
    sub.add_argument("--quick", action="store_true", help="seconds instead of minutes, rougher")
    sub.add_argument("--cell", **several, metavar="C[,C]", help=", ".join(ALL_CELLS))
    sub.add_argument(
        "--workload",
        **several,
        metavar="W[,W]",
        help=f"of layers on the CPU: {names}; on a GPU: {gpu_names}; of cells: {step_names}",
    )
    sub.add_argument("--pass", dest="passes", **several, metavar="P[,P]", help=passes)
    sub.add_argument(
        "--threads", type=_positive, metavar="N", help="threads, of torch and so of us"
    )
    sub.add_argument("--device", type=_device, default="cpu", help="cpu (default), cuda or cuda:N")
    sub.add_argument("--dtype", **several, metavar="D[,D]", help="; ".join(dtypes))
    sub.add_argument(
        "--json", type=Path, metavar="FILE", help="write all results there, as they come"
    )
    sub.add_argument("--plot", type=Path, metavar="FILE", help="draw the speed-ups (extra 'plot')")
    return parser


def _words(text: str) -> list[str]:
    return text.split(",")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"want a number of at least 1, got {text!r}")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"want cpu, cuda or cuda:N, got {text!r}")
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if (device.index or 0) >= count:
        why = "" if torch.version.cuda else " (it is built without CUDA)"
        raise argparse.ArgumentTypeError(
            f"torch sees {count or 'no'} CUDA device(s){why}, so no {text!r}"
        )
    return device


def _choose(
    parser: argparse.ArgumentParser, option: str, given: list[str], known: dict[str, Any]
) -> tuple[Any, ...]:
    """The values of the names given (in any case), in the order of ``known``; all if none is."""
    folded = {name.lower(): name for name in known}
    names = [name.strip().lower() for name in given]
    unknown = [name for name in names if name not in folded]
    if unknown:
        parser.error(f"{option}: unknown {unknown[0]!r}, known are: {', '.join(known)}")
    chosen = {folded[name] for name in names} or set(known)
    return tuple(value for name, value in known.items() if name in chosen)


def _precisions(arguments: argparse.Namespace) -> tuple[Precision, ...]:
    device_type = arguments.device.type
    if not arguments.dtype:
        return default_precisions(device_type)
    known = {name: PRECISIONS[name] for name in DTYPES[device_type]}
    return _choose(arguments.parser, "--dtype", arguments.dtype, known)


def _options(arguments: argparse.Namespace) -> Options:
    parser, device = arguments.parser, arguments.device
    passes = list(map(_slug, arguments.passes))
    known = load_workloads(device.type) | load_step_workloads()
    workloads = _choose(parser, "--workload", arguments.workload, known)
    small = workloads
    if arguments.quick and not arguments.workload:  # who names a large one gets it
        small = compare.quick_workloads(workloads, device.type)
    return Options(
        cells=_choose(parser, "--cell", arguments.cell, {name: name for name in ALL_CELLS}),
        workloads=small,
        passes=_choose(parser, "--pass", passes, {_slug(name): name for name in PASSES}),
        device=device,
        precisions=_precisions(arguments),
        threads=arguments.threads,
        quick=arguments.quick,
        left_out=tuple(w.name for w in workloads if w not in small),
    )


def _compare(arguments: argparse.Namespace) -> int:
    options = _options(arguments)
    # Minutes of work must not end in a file that cannot be written.
    for path in filter(None, (arguments.json, arguments.plot)):
        if not path.absolute().parent.is_dir():
            arguments.parser.error(f"{path}: no such directory")
    try:
        if arguments.plot:
            plot.require_matplotlib(arguments.plot)
    except (ModuleNotFoundError, ValueError) as error:
        arguments.parser.error(str(error))
    with Printer(options, arguments.json) as printer:
        report = compare.run(options, printer)
    printer.summary(report)
    if arguments.json:
        write_json(report, arguments.json)
    if arguments.plot and report.rows:
        plot.speedup(report.rows, arguments.plot)
    return OK if report.ok else FAILED


def write_json(report: Report, path: Path) -> None:
    """Writes the report, so that at every moment a whole one stands there."""
    text = json.dumps(report.as_json(), indent=1, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.part")
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def _info() -> int:
    info = rnnkern.build_info()
    width = max(map(len, info))
    for name, value in info.items():
        print(f"{name:{width}}  {_plain(value)}")
    if refusal := kernels.cuda_driver_refusal():
        text = f"This machine has {refusal}; until then torch.nn carries out what is on a GPU."
        print(f"\n{textwrap.fill(text, 100)}")
    return OK


def _plain(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _figures(value: float) -> str:
    """Three significant figures, at most three decimals, never an exponent."""
    for bound, decimals in ((0.0995, 3), (9.995, 2), (99.95, 1)):
        if value < bound:
            return f"{value:.{decimals}f}"
    return f"{value:.0f}"


def _duration(us: float) -> str:
    """Microseconds in the unit that reads best, units below each other."""
    for unit, scale in (("us", 1.0), ("ms", 1e3)):
        if us / scale < 999.5:
            return f"{_figures(us / scale)} {unit}"
    return f"{_figures(us / 1e6)} s "


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{_figures(value)}x"


def _progress_bar(total: int) -> Any:
    """A bar on stderr, or None if that is no terminal or tqdm is not there."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm  # type: ignore[import-untyped,unused-ignore]
    except ModuleNotFoundError:  # the bar is a comfort and no reason to fail
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
            self._bar.write(text, file=sys.stdout)  # print would leave pieces of the bar behind
        else:
            print(text)
        sys.stdout.flush()  # a row may take seconds: a pipe should not keep it back

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
        """Says what is compared, where."""
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
            f"{_duration(result.torch_seconds * 1e6):>14}{_duration(result.seconds * 1e6):>12}"
            f"{_ratio(result.speedup):>10}",
        )

    def row(self, row: Row) -> None:
        """Prints one timing; sizes and dtype only where they are others than in the row above."""
        name = dtype = ""
        w = next(w for w in self.options.workloads if w.name == row.workload)
        if self._case[:2] != (row.cell, row.workload):
            name = _sizes(row.cell, w)
        if self._case != (row.cell, row.workload, row.dtype):
            dtype = row.dtype
        self._case = (row.cell, row.workload, row.dtype)
        self._print_row(
            STEPS_HEADING if w.is_step else ROWS_HEADING,
            f"{name:39} {dtype:8} {row.pass_name:16}{_duration(row.torch_us):>8}"
            f"{_duration(row.us):>10}{_ratio(row.speedup):>9}{_figures(row.gflops):>8}",
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
                print(f"{label:12} ({_duration(us)}): {parts}")
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
