"""rnnkern and torch.nn side by side: a group for each cell, workload and pass, a row for each.

Layers run on the CPU in float32, and the modules of a single step in every type. If there is a GPU,
all of them run there in every dtype that it has. The modules, inputs, calls and checks are those of
``rnnkern compare`` (rnnkern/bench/workloads.py). Here one library is timed after the other, so the
ratio depends on a quiet machine. ``rnnkern compare`` times them in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import rnnkern
from rnnkern import tolerance
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    FORWARD_GRAD,
    PASSES,
    PRECISIONS,
    STEP_PRECISIONS,
    Case,
    Precision,
    check_case,
    default_precisions,
    draw_case,
    flops,
    grad_mode,
    load_step_workloads,
    load_workloads,
    notebook_case,
    tf32_allowed,
)

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

LIBRARIES = {"torch.nn": nn, "rnnkern": rnnkern}
DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
SHORT = {FORWARD: "forward", FORWARD_GRAD: "forward-grad", FORWARD_BACKWARD: "forward-backward"}

per_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


@dataclass(frozen=True)
class Checked:
    """A case that has passed its check, with its device and precision."""

    case: Case
    device: str
    precision: Precision

    @property
    def where(self) -> str:
        """The part of a group's name for what is not float32 on the CPU."""
        return "".join(f" {part}" for part in suffixes(self.device, self.precision))

    def call(self, library: ModuleType, pass_name: str) -> Callable[[], object]:
        """The timed call, which on a GPU waits for the GPU."""
        call = self.case.side(library, self.precision.dtype, self.device).call(pass_name)
        if self.device == "cpu":
            return call

        def synchronized() -> None:
            call()
            torch.cuda.synchronize()

        return synchronized


def run(
    benchmark: BenchmarkFixture, group: str, library: ModuleType, checked: Checked, pass_name: str
) -> None:
    case = checked.case
    benchmark.group = group + checked.where
    # The name of the row in the table. Without it the row would repeat the whole test id.
    benchmark.name = "rnnkern" if library is rnnkern else "torch.nn"
    benchmark.extra_info["flops"] = flops(case.cell, case.workload, pass_name)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    with tf32_allowed(checked.precision.tf32), grad_mode(pass_name):
        benchmark(checked.call(library, pass_name))


# Module scope makes pytest run all tests of a case one after another. So the case is checked once,
# and only one case is in memory.
@pytest.fixture(
    scope="module",
    params=[(cell, device) for device in DEVICES for cell in CELLS],
    ids=lambda param: param[0] if param[1] == "cpu" else "-".join(param),
)
def checked_notebook(request: pytest.FixtureRequest) -> Checked:
    """The notebook's comparison, after its own check: sums of squared differences below 1e-10."""
    cell, device = request.param
    case, precision = notebook_case(cell), PRECISIONS["float32"]
    with tf32_allowed(False):
        ours, all_theirs = (
            case.side(library, precision.dtype, device).results(FORWARD_BACKWARD)
            for library in (rnnkern, nn)
        )
    for name, theirs in all_theirs.items():
        assert tolerance.squared_difference(ours[name], theirs) < tolerance.NOTEBOOK_LIMIT, name
    return Checked(case, device, precision)


def suffixes(device: str, precision: Precision) -> tuple[str, ...]:
    """Parts of a name: device and precision, as far as they are not the CPU and float32."""
    if device == "cpu":
        return () if precision.name == "float32" else (precision.name,)
    return device, precision.name


def cases() -> Iterator[tuple[str, str, str, Precision]]:
    """Cell, name of the workload, device and dtype of every case."""
    for device in DEVICES:
        for name, workload in (load_workloads(device) | load_step_workloads()).items():
            in_every_type = device == "cpu" and workload.is_step
            for cell in workload.cells:
                for precision in STEP_PRECISIONS if in_every_type else default_precisions(device):
                    yield cell, name, device, precision


def name_of(param: tuple[str, str, str, Precision]) -> str:
    """The part of a test id that names a case."""
    cell, name, device, precision = param
    return "-".join((name, cell, *suffixes(device, precision)))


@pytest.fixture(scope="module", params=cases(), ids=name_of)
def checked_case(request: pytest.FixtureRequest) -> Checked:
    """A case that has passed the check of ``rnnkern compare``."""
    cell, name, device, precision = request.param
    case = draw_case(cell, (load_workloads(device) | load_step_workloads())[name])
    with tf32_allowed(precision.tf32):
        verdicts = check_case(case, precision.dtype, device)
    assert not {what: str(verdict) for what, verdict in verdicts.items() if not verdict}
    return Checked(case, device, precision)


@per_library
def test_notebook_comparison(
    benchmark: BenchmarkFixture, checked_notebook: Checked, library: ModuleType
) -> None:
    group = f"{checked_notebook.case.cell} the notebook's comparison: module(X)"
    run(benchmark, group, library, checked_notebook, FORWARD_GRAD)


@pytest.mark.parametrize("pass_name", PASSES, ids=SHORT.get)
@per_library
def test_workload(
    benchmark: BenchmarkFixture, checked_case: Checked, library: ModuleType, pass_name: str
) -> None:
    group = f"{checked_case.case.cell} {checked_case.case.workload.name} {pass_name}"
    run(benchmark, group, library, checked_case, pass_name)
