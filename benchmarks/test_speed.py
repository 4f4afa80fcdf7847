"""rnnkern and torch.nn side by side: a group for each cell, workload and pass, a row for each.

The modules, inputs, calls and checks are those of ``rnnkern compare`` (rnnkern/workloads.py). Here
one library is timed after the other, so that the ratio depends on a quiet machine; ``rnnkern
compare`` times them in turn.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import rnnkern
from rnnkern import tolerance
from rnnkern.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    FORWARD_GRAD,
    PASSES,
    Case,
    check_case,
    draw_case,
    flops,
    grad_mode,
    load_workloads,
    notebook_case,
)

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

LIBRARIES = {"torch.nn": nn, "rnnkern": rnnkern}
DTYPE = torch.float32
SHORT = {FORWARD: "forward", FORWARD_GRAD: "forward-grad", FORWARD_BACKWARD: "forward-backward"}

per_library = pytest.mark.parametrize("library", LIBRARIES.values(), ids=LIBRARIES)


def run(
    benchmark: BenchmarkFixture, group: str, library: ModuleType, case: Case, pass_name: str
) -> None:
    call = case.side(library, DTYPE).call(pass_name)
    benchmark.group = group
    # The name of the row in the table, which would else repeat the whole test id.
    benchmark.name = "rnnkern" if library is rnnkern else "torch.nn"
    benchmark.extra_info["flops"] = flops(case.cell, case.workload, pass_name)
    benchmark.extra_info["threads"] = torch.get_num_threads()
    with grad_mode(pass_name):
        benchmark(call)


# Module scope makes pytest run all tests of a case one after another: it is checked once, and only
# one is in memory.
@pytest.fixture(scope="module", params=CELLS)
def checked_notebook(request: pytest.FixtureRequest) -> Case:
    """The notebook's comparison, after its own check: sums of squared differences below 1e-10."""
    case = notebook_case(request.param)
    ours = case.side(rnnkern, DTYPE).results(FORWARD_BACKWARD)
    for name, theirs in case.side(nn, DTYPE).results(FORWARD_BACKWARD).items():
        assert tolerance.squared_difference(ours[name], theirs) < tolerance.NOTEBOOK_LIMIT, name
    return case


@pytest.fixture(
    scope="module",
    params=[(cell, name) for name in load_workloads() for cell in CELLS],
    ids=lambda param: f"{param[1]}-{param[0]}",
)
def checked_case(request: pytest.FixtureRequest) -> Case:
    """A case that has passed the check of ``rnnkern compare``."""
    cell, name = request.param
    case = draw_case(cell, load_workloads()[name])
    wrong = {what: str(verdict) for what, verdict in check_case(case, DTYPE).items() if not verdict}
    assert not wrong
    return case


@per_library
def test_notebook_comparison(
    benchmark: BenchmarkFixture, checked_notebook: Case, library: ModuleType
) -> None:
    group = f"{checked_notebook.cell} the notebook's comparison: module(X)"
    run(benchmark, group, library, checked_notebook, FORWARD_GRAD)


@pytest.mark.parametrize("pass_name", PASSES, ids=SHORT.get)
@per_library
def test_workload(
    benchmark: BenchmarkFixture, checked_case: Case, library: ModuleType, pass_name: str
) -> None:
    group = f"{checked_case.cell} {checked_case.workload.name} {pass_name}"
    run(benchmark, group, library, checked_case, pass_name)
