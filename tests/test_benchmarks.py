"""The benchmarks that print tables: that they run, and what they refuse."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import decoder, entry_points, everyday, steps, versions

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def table(program: ModuleType, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
        program.main()
        return capsys.readouterr().out.splitlines()

    return table


def test_the_benchmark_of_steps_runs(run) -> None:  # type: ignore[no-untyped-def]
    lines = run(steps, "--draws", "1", "--seconds", "0", "--threads", "1")
    rows = [line for line in lines if re.match(r" +[\d.]+x ", line)]
    assert len(rows) == 6
    assert rows == sorted(rows, key=lambda row: float(row.split("x")[0]))


def test_the_benchmark_of_entry_points_runs(run) -> None:  # type: ignore[no-untyped-def]
    names = "packed,vmapped,functional_cell"
    lines = run(entry_points, "--seconds", "0", "--threads", "1", "--entry", names)
    assert [line.split()[0] for line in lines[-3:]] == names.split(",")
    assert lines[-2].count("torch.nn cannot") == 3


def test_the_benchmark_of_a_decoder_runs(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(decoder, "SIZES", ((2, 70),))
    monkeypatch.setattr(decoder, "STEPS", 5)
    lines = run(decoder, "--budget", "0", "--threads", "1")
    assert len([line for line in lines if line.endswith("x")]) == 6


def test_the_everyday_cases_run(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(everyday, "PACKED_STEPS", 40)
    monkeypatch.setattr(everyday, "LONG_STEPS", 50)
    monkeypatch.setattr(everyday, "SERVING_S", 0.01)
    lines = run(everyday, "--repeat", "1")
    rows = [line.split("|") for line in lines if re.search(r"[\d.]+x \|$", line)]
    assert len(rows) == 6
    assert "L=40" in rows[0][1]


def test_everyday_cases_that_do_not_exist(run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        run(everyday, "--case", "packed,sleeping")
    assert "some of packed,long,serving,busy, got packed,sleeping" in capsys.readouterr().err


def test_the_benchmark_of_versions_runs(
    run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    """This one beside itself."""
    chosen = ("--cell", "LSTM,GRUCell", "--workload", "notebook,step_h20", "--seconds", "0")
    lines = run(versions, str(versions.HERE), *chosen)
    assert [line.split()[:2] for line in lines if line.startswith(("LSTM", "GRU"))] == [
        *[["LSTM", "notebook"]] * 3,
        *[["GRUCell", "step_h20"]] * 3,
    ]
    for arguments, message in (
        ((str(tmp_path),), "no built checkout"),
        ((str(versions.HERE), "--cell", "LSTN"), "unknown 'LSTN'"),
        ((str(versions.HERE), "--workload", "x"), "unknown 'x'"),
        ((str(versions.HERE), "--pass", "backward"), "unknown 'backward'"),
    ):
        with pytest.raises(SystemExit):
            run(versions, *arguments)
        assert message in capsys.readouterr().err
