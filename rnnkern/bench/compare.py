"""``rnnkern compare``: checks that results are those of torch.nn, and times both.

First comes the comparison of the teaching notebook, unchanged, then every cell at every workload.
Each case is checked before it is timed, and a case that fails its check is not timed. This file
does the work, and a `Listener` hears of every result as it comes.
"""

from __future__ import annotations

import datetime
import math
import os
import platform
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import rnnkern
from rnnkern import tolerance
from rnnkern.bench import timing
from rnnkern.bench.report import BesideLinear, Failure, Listener, NotebookResult, Report, Row
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD_BACKWARD,
    PASSES,
    STEP_CELLS,
    Case,
    Precision,
    Workload,
    check_case,
    default_precisions,
    draw_case,
    flops,
    grad_mode,
    load_step_workloads,
    load_workloads,
    notebook_case,
    reference_results,
    tf32_allowed,
)

#: Above this many GFLOP (LSTM, forward) a workload is left out of a quick run.
QUICK_GFLOP = {"cpu": 2.0, "cuda": 100.0}
#: Seconds for the samples of one row, and seconds after which no row is timed; of a whole run and
#: of a quick one. A GPU has four times as many rows, and steadier ones.
BUDGET_S = {"cpu": (0.8, 0.04), "cuda": (0.095, 0.02)}
TIME_LIMIT_S = {"cpu": (math.inf, 15.0), "cuda": (200.0, 60.0)}


@dataclass(frozen=True)
class Options:
    """What to compare and how.

    Attributes:
        cells: among ``CELLS`` and ``STEP_CELLS``.
        workloads: in the order to run. The one named notebook brings the notebook's comparison.
        passes: among ``PASSES``.
        device: the device of both libraries.
        precisions: each case in each of these.
        threads: for torch's thread pool, which rnnkern shares; None leaves it as it is.
        quick: take a fraction of the samples and of the notebook's runs.
        left_out: names of the workloads that a quick run is too short for.
    """

    cells: tuple[str, ...] = CELLS + STEP_CELLS
    workloads: tuple[Workload, ...] = (
        *load_workloads().values(),
        *load_step_workloads().values(),
    )
    passes: tuple[str, ...] = PASSES
    device: torch.device = torch.device("cpu")  # noqa: RUF009 - immutable
    precisions: tuple[Precision, ...] = default_precisions()
    threads: int | None = None
    quick: bool = False
    left_out: tuple[str, ...] = ()

    @property
    def cases(self) -> list[tuple[str, Workload]]:
        """Each cell with each of its workloads."""
        return [(cell, w) for cell in self.cells for w in self.workloads if cell in w.cells]

    @property
    def notebook_cells(self) -> tuple[str, ...]:
        """The cells that the notebook compares."""
        return tuple(cell for cell in self.cells if cell in CELLS)

    @property
    def notebook_runs(self) -> int:
        """Calls per module in the notebook's timing: its own 10**4, or a tenth of that."""
        return 10**3 if self.quick else 10**4

    @property
    def row_budget_s(self) -> float:
        """Seconds after which the timing of one row takes no further sample."""
        return BUDGET_S[self.device.type][self.quick]

    @property
    def min_pairs(self) -> int:
        """Pairs of samples that a row has at least, however long they take."""
        return 1 if self.quick else 3

    @property
    def time_limit_s(self) -> float:
        """Seconds after which cases are still checked but no longer timed.

        torch.nn's time grows a hundredfold if its threads share the cores with another program, and
        a quick run has to stay quick. On a GPU a whole run must not take more than minutes.
        """
        return TIME_LIMIT_S[self.device.type][self.quick]

    @property
    def notebook_precision(self) -> Precision | None:
        """The precision of the notebook's comparison; None if the run does not include it.

        Its criterion is meant for float32. TF32 and the 16-bit types cannot meet it.
        """
        if not any(w.name == "notebook" for w in self.workloads):
            return None
        wide = (p for p in self.precisions if p.dtype.itemsize >= 4 and not p.tf32)
        return next(wide, None)


def quick_workloads(workloads: tuple[Workload, ...], device_type: str) -> tuple[Workload, ...]:
    """The workloads that are small enough for a quick run."""
    limit = QUICK_GFLOP[device_type] * 1e9
    return tuple(w for w in workloads if flops("LSTM", w) <= limit)


def pieces_of_work(options: Options) -> int:
    """How many times a listener hears of an end: notebook comparisons, checks and rows."""
    per_case = len(options.precisions) * (1 + len(options.passes))
    notebook = len(options.notebook_cells) * (options.notebook_precision is not None)
    return len(options.cases) * per_case + notebook


def run(options: Options, listener: Listener) -> Report:
    """Runs all comparisons, and restores the number of threads afterwards."""
    deadline = time.perf_counter() + options.time_limit_s
    with timing.threads_set(options.threads):
        report = Report(header(options))
        listener.start(report)
        if options.notebook_precision is not None:
            with tf32_allowed(False):
                for cell in options.notebook_cells:
                    listener.begin(f"{cell} notebook's comparison")
                    dtype = options.notebook_precision.dtype
                    report.notebook.append(compare_notebook(cell, options, dtype))
                    listener.notebook(report.notebook[-1])
                    listener.end()
        for cell, workload in options.cases:
            _one_case(draw_case(cell, workload), options, report, listener, deadline)
        report.finished = True
    return report


def _one_case(
    case: Case, options: Options, report: Report, listener: Listener, deadline: float
) -> None:
    """Checks and times one case in every precision, against one reference."""
    reference = reference_results(case, options.device, options.passes)
    for precision in options.precisions:
        with tf32_allowed(precision.tf32):
            if _check(case, precision, reference, options, report, listener):
                _time(case, precision, options, report, listener, deadline)
            else:
                listener.end(len(options.passes))


def compare_notebook(cell: str, options: Options, dtype: torch.dtype) -> NotebookResult:
    """The notebook's comparison for one cell: equal results, then ``timeit``."""
    case = notebook_case(cell)
    ours = case.side(rnnkern, dtype, options.device)
    theirs = case.side(nn, dtype, options.device)
    our_results = ours.results(FORWARD_BACKWARD)
    their_results = theirs.results(FORWARD_BACKWARD)
    differences = {
        name: tolerance.squared_difference(our_results[name], tensor)
        if name in our_results
        else math.inf
        for name, tensor in their_results.items()
    }
    output = differences["output"]
    gradient = sum(value for name, value in differences.items() if name.startswith("grad"))
    # The input requires no gradient here, as in the notebook; the parameters do.
    x = case.x.to(options.device, dtype)
    runs = options.notebook_runs
    our_module, their_module = ours.module, theirs.module
    torch_seconds = timing.notebook_seconds(lambda: their_module(x), runs, options.device)
    seconds = timing.notebook_seconds(lambda: our_module(x), runs, options.device)
    linear = nn.Linear(case.workload.input_size, case.workload.hidden_size).to(x.device, x.dtype)

    def beside_linear() -> BesideLinear:
        pair = timing.time_pair(
            lambda: our_module(x),
            lambda: linear(x),
            budget_s=options.row_budget_s,
            min_pairs=options.min_pairs,
            clock=timing.clock_of(options.device),
        )
        return BesideLinear(pair.us, pair.their_us, 1 / pair.speedup)

    with torch.no_grad():
        without_grad = beside_linear()
    with torch.enable_grad():
        with_grad = beside_linear()
    return NotebookResult(
        cell=cell,
        output_difference=output,
        gradient_difference=gradient,
        ok=output < tolerance.NOTEBOOK_LIMIT and gradient < tolerance.NOTEBOOK_LIMIT,
        runs=runs,
        seconds=seconds,
        torch_seconds=torch_seconds,
        speedup=torch_seconds / seconds,
        without_grad=without_grad,
        with_grad=with_grad,
    )


def _check(
    case: Case,
    precision: Precision,
    reference: dict[str, torch.Tensor],
    options: Options,
    report: Report,
    listener: Listener,
) -> bool:
    listener.begin(f"{case.cell} {case.workload.name} {precision.name} check")
    verdicts = check_case(case, precision.dtype, options.device, options.passes, reference)
    listener.end()
    failures = [
        Failure(case.cell, case.workload.name, precision.name, what, str(verdict))
        for what, verdict in verdicts.items()
        if not verdict
    ]
    if failures:
        report.failures += failures
        listener.failures(failures)
    return not failures


def _time(
    case: Case,
    precision: Precision,
    options: Options,
    report: Report,
    listener: Listener,
    deadline: float,
) -> None:
    for pass_name in options.passes:
        listener.begin(f"{case.cell} {case.workload.name} {precision.name} {pass_name}")
        if time.perf_counter() < deadline:
            report.rows.append(time_row(case, pass_name, precision, options))
            listener.row(report.rows[-1])
        else:
            report.not_timed += 1
        listener.end()


def time_row(case: Case, pass_name: str, precision: Precision, options: Options) -> Row:
    """Times one pass of one case, ours and torch.nn in turn; the caller has set TF32."""
    ours = case.side(rnnkern, precision.dtype, options.device)
    theirs = case.side(nn, precision.dtype, options.device)
    with grad_mode(pass_name):
        measured = timing.time_pair(
            ours.call(pass_name),
            theirs.call(pass_name),
            budget_s=options.row_budget_s,
            min_pairs=options.min_pairs,
            clock=timing.clock_of(options.device),
        )
    return Row(
        device=str(options.device),
        cell=case.cell,
        workload=case.workload.name,
        dtype=precision.name,
        pass_name=pass_name,
        threads=torch.get_num_threads(),
        us=measured.us,
        torch_us=measured.their_us,
        speedup=measured.speedup,
        gflops=gflops(case.cell, case.workload, pass_name, measured.us),
        pairs=len(measured.ours_s),
    )


def gflops(cell: str, workload: Workload, pass_name: str, us: float) -> float:
    """GFLOP/s of a pass that takes ``us`` microseconds (`workloads.flops`)."""
    return flops(cell, workload, pass_name) / us * 1e-3


def header(options: Options) -> dict[str, Any]:
    """What a reader of the figures must know: machine, versions, commit, threads, date, options."""
    build = rnnkern.build_info()
    on_gpu = options.device.type == "cuda"
    return {
        "cpu": timing.cpu_name(),
        "cores": os.cpu_count(),
        # Other programs stall torch.nn's threads more than ours: the speed-ups are too high then.
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name(options.device) if on_gpu else None,
        "driver": timing.gpu_driver() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,  # type: ignore[no-untyped-call]
        "device": str(options.device),
        "dtype": ", ".join(precision.name for precision in options.precisions),
        "threads": torch.get_num_threads(),
        "rnnkern": build["version"],
        "isa": build["isa"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": timing.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "quick": options.quick,
        "notebook_runs": options.notebook_runs,
        "row_budget_s": options.row_budget_s,
        "left_out": list(options.left_out),
    }
