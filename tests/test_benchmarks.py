"""The benchmarks that print tables: that they run, and what they refuse."""

from __future__ import annotations

import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks import (
    busy,
    compiled,
    decoder,
    drawn,
    entry_points,
    everyday,
    frozen,
    models,
    options,
    precision,
    versions,
)
from benchmarks.rows import without_refused

pytestmark = pytest.mark.cpu_only


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):  # type: ignore[no-untyped-def]
    def table(program: ModuleType, *arguments: str) -> list[str]:
        monkeypatch.setattr(sys, "argv", [program.__name__, *arguments])
        program.main()
        return capsys.readouterr().out.splitlines()

    return table


def test_the_benchmark_of_drawn_sizes_runs(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(drawn, "MOST_FLOPS", 1e6)
    cells = "LSTM,GRUCell"
    lines = run(drawn, "--cell", cells, "--draws", "2", "--seconds", "0", "--threads", "1")
    rows = [line for line in lines if re.match(r" +[\d.]+x ", line)]
    assert len(rows) == 2 * 2 * 2
    assert rows == sorted(rows, key=lambda row: float(row.split("x")[0]))


def test_a_draw_has_the_sizes_asked_for() -> None:
    generator = random.Random(0)
    drawings = [drawn.draw(generator, "LSTM") for _ in range(200)]
    assert all(1 <= w.steps <= 500 and 1 <= w.batch <= 300 for w in drawings)
    assert all(1 <= w.input_size <= 1200 and 1 <= w.hidden_size <= 1600 for w in drawings)
    assert max(w.hidden_size for w in drawings) > 1200
    assert drawn.draw(generator, "GRUCell").steps == 1


def test_the_benchmark_of_a_busy_machine_runs(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(busy, "SAMPLE_S", 0.001)
    chosen = ("--cell", "GRU", "--workload", "notebook,sine", "--rounds", "1", "--threads", "1")
    lines = run(busy, *chosen)
    rows = [line.split()[:3] for line in lines if line.startswith("GRU")]
    assert rows == [
        ["GRU", "notebook", "inference"],
        ["GRU", "sine", "inference"],
        ["GRU", "notebook", "training"],
        ["GRU", "sine", "training"],
    ]


def test_the_benchmark_of_entry_points_runs(
    run,  # type: ignore[no-untyped-def]
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = "packed,vmapped,functional_cell"
    lines = run(entry_points, "--seconds", "0", "--threads", "1", "--entry", names)
    assert [line.split(": ")[2] for line in lines[1:]] == names.split(",")
    assert [line.count("over torch.nn") for line in lines[1:]] == [3, 0, 3]
    with pytest.raises(SystemExit):
        run(entry_points, "--entry", "packed,unpacked")
    assert "got unpacked" in capsys.readouterr().err


def test_the_benchmark_of_compiled_calls_runs(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(compiled, "SHAPES", (("GRU", 3, 2, 2, 4),))
    lines = run(compiled, "--seconds", "0", "--threads", "1")
    assert [line.split(", ")[1] for line in lines[1:]] == ["inference", "forward and backward"]
    for line in lines[1:]:
        assert "GRU T3 N2 I2 H4" in line
        assert f"{compiled.MORE} " in line
        assert "over torch.nn compiled" in line


def test_the_benchmark_of_a_decoder_runs(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(decoder, "SIZES", ((2, 70),))
    monkeypatch.setattr(decoder, "STEPS", 5)
    lines = run(decoder, "--seconds", "0", "--threads", "1")
    cells = ["RNNCell", "LSTMCell", "GRUCell"]
    assert [line.split(": ")[2].split()[0] for line in lines[1:]] == [
        c for c in cells for _ in "ab"
    ]


def test_the_everyday_cases_run(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(everyday, "PACKED_STEPS", (20, 40))
    monkeypatch.setattr(everyday, "LONG_STEPS", 50)
    monkeypatch.setattr(everyday, "SERVING_S", 0.01)
    lines = run(everyday, "--repeat", "1")
    rows = [line for line in lines if re.search(r"[\d.]+x$", line)]
    assert len(rows) == 6
    assert "L=40: packed" in rows[1]
    assert all(f"{own} over torch.nn packed" in rows[1] for own in ("packed", "lengths="))


def test_packing_that_takes_torch_nn_too_long_is_left_out(
    run,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(everyday, "PACKED_STEPS", (2, 4))
    monkeypatch.setattr(everyday, "TOO_LONG_S", 0.0)
    first, second = run(everyday, "--repeat", "1", "--case", "packed")[-2:]
    assert "torch.nn packed" in first
    assert "torch.nn packed" not in second
    assert "lengths= over torch.nn padded" in second


def test_everyday_cases_that_do_not_exist(run, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SystemExit):
        run(everyday, "--case", "packed,sleeping")
    assert "some of packed,long,serving,busy, got packed,sleeping" in capsys.readouterr().err


def test_the_benchmark_of_models_runs(run) -> None:  # type: ignore[no-untyped-def]
    lines = run(models, "--model", "Silero VAD", "--seconds", "0", "--threads", "1")
    assert "Silero VAD: in the manner of" in lines[1]
    assert [line.split(", ")[2] for line in lines[2:]] == ["float32", "autocast to bfloat16"]


def test_torch_nn_is_left_out_where_it_raises(capsys: pytest.CaptureFixture[str]) -> None:
    def refuse() -> None:
        raise NotImplementedError

    def own() -> None:
        pass

    assert without_refused({"rnnkern": own, "torch.nn": own}).keys() == {"rnnkern", "torch.nn"}
    assert without_refused({"rnnkern": own, "torch.nn": refuse}) == {"rnnkern": own}
    assert "because it raises NotImplementedError()" in capsys.readouterr().err


def test_the_benchmark_of_frozen_layers_runs(run) -> None:  # type: ignore[no-untyped-def]
    chosen = ("--workloads", "notebook", "--cells", "GRU", "--threads", "1", "--seconds", "0")
    lines = run(frozen, *chosen)
    assert [line.split(": ")[2] for line in lines if line.startswith("frozen")] == [
        "notebook GRU",
        "GRU I64 H256",
    ]
    assert any(line.startswith("int8 over rnnkern: geometric mean") for line in lines)


def test_the_benchmark_of_precision_runs(run) -> None:  # type: ignore[no-untyped-def]
    lines = run(precision, "--workloads", "notebook", "--threads", "1", "--seconds", "0")
    assert len([line for line in lines if "over highest" in line]) == 2 * 3


def test_the_benchmark_of_options_runs(run, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(options, "WORKLOADS", ("notebook",))
    lines = run(options, "--cell", "GRU", "--threads", "1", "--seconds", "0")
    assert [line.split(": ")[2].split(",")[0] for line in lines] == [
        "reset",
        "reset_to",
        "recurrent_dropout",
        "zoneout",
        "layer_norm",
    ]
    assert ["over a loop" in line for line in lines] == [False, True, True, True, True]


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
