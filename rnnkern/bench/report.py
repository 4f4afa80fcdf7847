"""The results of ``rnnkern compare``, and the interface of a listener to them."""

from __future__ import annotations

import math
import statistics
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from rnnkern.bench.workloads import CELLS, PASSES, STEP_CELLS


@dataclass(frozen=True)
class BesideLinear:
    """The times of a call of a layer and of a call of ``nn.Linear`` of the same sizes on the same
    input, and the median of their ratios.
    """

    us: float
    linear_us: float
    ratio: float


@dataclass(frozen=True)
class NotebookResult:
    """The notebook's comparison for one cell: sums of squared differences, seconds for all runs.

    And one call beside ``nn.Linear``, without and with grad.
    """

    cell: str
    output_difference: float
    gradient_difference: float
    ok: bool
    runs: int
    seconds: float
    torch_seconds: float
    speedup: float
    without_grad: BesideLinear
    with_grad: BesideLinear


@dataclass(frozen=True)
class Row:
    """One timing: microseconds per call, median of the pairwise ratios, GFLOP/s of ours."""

    device: str
    cell: str
    workload: str
    dtype: str
    pass_name: str
    threads: int
    us: float
    torch_us: float
    speedup: float
    gflops: float
    pairs: int

    def as_json(self) -> dict[str, Any]:
        """The row with ``pass`` for the name that Python does not allow."""
        values = asdict(self)
        return {("pass" if key == "pass_name" else key): value for key, value in values.items()}


@dataclass(frozen=True)
class Failure:
    """A check that did not pass: the name of the result, and what is wrong with it."""

    cell: str
    workload: str
    dtype: str
    what: str
    problem: str


class Listener(Protocol):
    """Is told when work begins and ends, and of every result in between."""

    def start(self, report: Report) -> None:
        """Work is about to begin. ``report`` has its header, and gets the results as they come."""

    def begin(self, label: str) -> None:
        """A piece of work begins."""

    def end(self, pieces: int = 1) -> None:
        """Pieces of work are done, or left out."""

    def notebook(self, result: NotebookResult) -> None:
        """The notebook's comparison has a result."""

    def row(self, row: Row) -> None:
        """A row has been timed."""

    def failures(self, failures: list[Failure]) -> None:
        """A case has failed its check."""


@dataclass
class Report:
    """All results of one run. ``not_timed`` rows are missing because the time was up. More results
    come until the report is ``finished``.
    """

    header: dict[str, Any]
    notebook: list[NotebookResult] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    not_timed: int = 0
    finished: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check passed."""
        return not self.failures and all(result.ok for result in self.notebook)

    @property
    def dtypes(self) -> list[str]:
        """Those that have rows, in their order."""
        return list(dict.fromkeys(row.dtype for row in self.rows))

    def mean(
        self,
        pass_name: str,
        dtype: str | None = None,
        cells: tuple[str, ...] = CELLS,
    ) -> float | None:
        """Geometric mean of the speed-ups of a pass, of some cells, of all dtypes or one; None
        without rows.
        """
        rows = self._rows(pass_name, cells, dtype)
        return statistics.geometric_mean(r.speedup for r in rows) if rows else None

    def slowest(
        self, pass_name: str, dtype: str | None = None, cells: tuple[str, ...] = CELLS
    ) -> Row | None:
        """The row of a pass with the least speed-up, of all dtypes or one."""
        rows = self._rows(pass_name, cells, dtype)
        return min(rows, key=lambda r: r.speedup, default=None)

    def _rows(self, pass_name: str, cells: tuple[str, ...], dtype: str | None) -> list[Row]:
        return [
            r
            for r in self.rows
            if r.pass_name == pass_name and r.cell in cells and dtype in (None, r.dtype)
        ]

    def as_json(self) -> dict[str, Any]:
        """The report as JSON-ready values; a difference that is not finite becomes None."""
        notebook = [
            {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in r.items()}
            for r in map(asdict, self.notebook)
        ]
        return {
            "header": self.header,
            "finished": self.finished,
            "ok": self.ok,
            "notebook": notebook,
            "rows": [row.as_json() for row in self.rows],
            "geometric_mean": {name: self.mean(name) for name in PASSES},
            "geometric_mean_of_steps": {name: self.mean(name, cells=STEP_CELLS) for name in PASSES},
            "geometric_mean_by_dtype": {
                dtype: {name: self.mean(name, dtype=dtype) for name in PASSES}
                for dtype in self.dtypes
            },
            "not_timed": self.not_timed,
            "failures": [asdict(failure) for failure in self.failures],
        }
