"""pytest plugin: which kernels the tests have run, and the table at the end.

Where all tests are chosen, a kernel that none of them has run is an error.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from kernels import read_built

# Properties that tests record: whose case it was, whose mutation it caught; and kernels that ran.
CASE, MUTATION, RAN = "ptx-case", "ptx-mutation", "ptx-ran"

_started = time.monotonic()


@pytest.fixture(autouse=True)
def _record_kernels(record_property: Any) -> Iterator[None]:
    yield
    for built in read_built():
        for kernel, launches in built.launches().items():
            if launches:
                record_property(RAN, kernel)


def _values(reporter: Any, wanted: str) -> Iterator[str]:
    reports = (report for reports in reporter.stats.values() for report in reports)
    for report in reports:
        if getattr(report, "when", None) == "teardown":  # it has all of the test's properties
            yield from (value for name, value in report.user_properties if name == wanted)


def _never_ran(ran: set[str]) -> list[str]:
    """Kernels that something could have run, as C++ names them; only LSTM has projections."""
    names = [
        kernel
        for built in read_built()
        for kernel in built.kernels
        if kernel not in ran and (built.cell == "Lstm" or "Projected" not in kernel)
    ]
    text = "\n".join(names)
    shown = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True)
    return re.findall(r"run_kernel<(.*)>\(", shown.stdout.replace("rnnkern::", ""))


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    yield
    reporter = session.config.pluginmanager.getplugin("terminalreporter")
    option = session.config.option
    is_whole = not (option.keyword or option.collectonly) and len(session.config.args) > 1
    if reporter and is_whole and not hasattr(session.config, "workerinput"):
        missed = _never_ran(set(_values(reporter, RAN)))
        for name in missed:
            reporter.write_line(f"no test has run {name}", red=True)
        if missed and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    ran = set(_values(terminalreporter, RAN))
    cases = Counter(_values(terminalreporter, CASE))
    mutations = Counter(_values(terminalreporter, MUTATION))
    write = terminalreporter.write_line
    write(f"{'PTX of':22}{'kernels':>8}{'run':>5}{'instructions':>14}{'cases':>7}{'mutations':>11}")

    def row(name: str, kernels: set[str], instructions: int, cases: int, mutations: int) -> None:
        run = len(kernels & ran)
        write(f"{name:22}{len(kernels):8}{run:5}{instructions:14,}{cases:7}{mutations:11}")

    everything = read_built()
    for built in everything:
        name = built.name
        row(name, set(built.kernels), built.instructions, cases[name], mutations[name])
    row(
        "all",
        {kernel for built in everything for kernel in built.kernels},
        sum(built.instructions for built in everything),
        cases.total(),
        mutations.total(),
    )
    forms = {form for built in everything for form in built.forms}
    others = sorted({name for built in everything for name in built.other_libraries})
    write(
        f"{len(forms)} forms of instructions. Other architectures with kernels of their own: "
        f"{', '.join(others) or 'none'}. {time.monotonic() - _started:.0f} s."
    )
