"""What is done once a module has been imported."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rnnkern
from rnnkern.interop.on_import import on_import

pytestmark = pytest.mark.cpu_only
NAME = "a_module_of_this_test"


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    (tmp_path / f"{NAME}.py").write_text("number = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found: list[int] = []
    on_import(NAME, lambda module: found.append(module.number))
    yield found
    sys.modules.pop(NAME, None)


def test_once_and_after_its_code(seen: list[int]) -> None:
    assert seen == []
    importlib.import_module(NAME)
    assert seen == [3]
    importlib.reload(sys.modules[NAME])
    assert seen == [3]


def test_at_once_if_it_is_there(seen: list[int]) -> None:
    importlib.import_module(NAME)
    on_import(NAME, lambda module: seen.append(module.number + 1))
    assert seen == [3, 4]


def test_a_look_is_no_import(seen: list[int]) -> None:
    """As of programs that ask whether a package is there."""
    for _ in range(2):
        assert importlib.util.find_spec(NAME) is not None
    assert seen == []
    importlib.import_module(NAME)
    assert seen == [3]


def test_what_runs_a_layer_is_imported_and_no_more() -> None:
    """What else there is, is imported when it is asked for."""
    program = """
import sys, torch
before = set(sys.modules)
import rnnkern
print(*sorted(set(sys.modules) - before))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100
    )
    kept = "_C autocast autograd call constructor convert forward interop interop.by_type"
    kept += " interop.dynamo interop.exporting interop.on_import interop.scripting kernels"
    kept += " known_cells layer loops modules ops ops.differentiable ops.kernel_ops ops.modes"
    kept += " ops.with_options options run sequence traced"
    assert done.stdout.split() == ["rnnkern", *(f"rnnkern.{name}" for name in kept.split())]


@pytest.mark.parametrize("name", rnnkern.__all__)
def test_public_names(name: str) -> None:
    assert name in dir(rnnkern)
    found = getattr(rnnkern, name)
    assert found is getattr(rnnkern, name)
    assert isinstance(found, str) or found.__name__.removeprefix("rnnkern.") == name


def test_no_other_name() -> None:
    with pytest.raises(AttributeError, match="module 'rnnkern' has no attribute 'compares'"):
        rnnkern.compares  # noqa: B018
