"""A plugin of pytest for run_all.py: a journal of the tests, so that a process may end at any time.

Each test is a line of JSON as it begins and another one as it ends. Tests of this unit that are in
the journal already do not run again. So after a process has died or hung, the next one goes on with
the tests behind the one that was running.

The environment names the file (RNNKERN_JOURNAL), the unit (RNNKERN_JOURNAL_UNIT), the seconds after
which no further test begins (RNNKERN_JOURNAL_SECONDS) and those that one test may take
(RNNKERN_JOURNAL_TEST_SECONDS): a longer one ends the process, with a traceback on standard error.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic
from typing import Any

import pytest

#: The exit statuses of a process after which another one has to go on.
STICKY, MORE_TO_DO = 70, 71

JOURNAL = Path(os.environ["RNNKERN_JOURNAL"])
UNIT = os.environ["RNNKERN_JOURNAL_UNIT"]
END = monotonic() + float(os.environ["RNNKERN_JOURNAL_SECONDS"])
TEST_SECONDS = float(os.environ["RNNKERN_JOURNAL_TEST_SECONDS"])
STANDARD_ERROR = os.dup(2)  # pytest redirects it later

RANKS = ("passed", "skipped", "failed")
outcomes: dict[str, tuple[str, str]] = {}


def write(**fields: Any) -> None:
    """Appends a line in one piece, because other processes write to the same file."""
    with JOURNAL.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"unit": UNIT, **fields}) + "\n")


def sticky_error() -> str | None:
    """The CUDA error after which no call of this process can succeed, if there is one."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lines = JOURNAL.read_text(encoding="utf-8").splitlines() if JOURNAL.exists() else []
    begun = {entry.get("begins") for entry in map(json.loads, lines) if entry["unit"] == UNIT}
    done = [item for item in items if item.nodeid in begun]
    items[:] = [item for item in items if item.nodeid not in begun]
    config.hook.pytest_deselected(items=done)


def pytest_runtest_logstart(nodeid: str) -> None:
    write(begins=nodeid)
    faulthandler.dump_traceback_later(TEST_SECONDS, exit=True, file=STANDARD_ERROR)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    message = ""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash else report.longrepr)[-400:]
    found = (report.outcome, message)
    before = outcomes.setdefault(report.nodeid, found)
    outcomes[report.nodeid] = max(before, found, key=lambda pair: RANKS.index(pair[0]))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Any:
    result = yield
    outcome, message = outcomes.pop(item.nodeid, ("passed", ""))
    sticky = sticky_error() if outcome == "failed" else None
    faulthandler.cancel_dump_traceback_later()
    more = {"message": message, "sticky": sticky}
    write(test=item.nodeid, outcome=outcome, **{key: text for key, text in more.items() if text})
    if sticky:
        end(STICKY)
    if monotonic() > END:
        end(MORE_TO_DO)
    return result


def end(status: int, leave: Callable[[int], None] = os._exit) -> None:
    """Ends the process at once, because an ordinary exit may wait for a broken device."""
    sys.stdout.flush()
    leave(status)
