"""benchmarks/gpu: what would be measured on a GPU, tried on the CPU, and the page made of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkern
from benchmarks import report, report_page
from benchmarks.gpu import kinds, page, speed
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    default_precisions,
    load_workloads,
)

pytestmark = [pytest.mark.cpu_only, pytest.mark.usefixtures("no_clock")]

CPU = torch.device("cpu")


def test_rows_are_all_workloads_dtypes_cells_and_passes() -> None:
    rows = speed.rows([], [], [])
    count = len(load_workloads("cuda")) * len(default_precisions("cuda")) * len(CELLS) * 2
    assert len(rows) == len(set(rows)) == count
    chosen = speed.rows(["h512"], ["bfloat16"], ["GRU"])
    assert [row.pass_name for row in chosen] == [FORWARD, FORWARD_BACKWARD]


def test_sweeps_change_one_size() -> None:
    rows = list(speed.swept_rows())
    for row in rows:
        w = row.workload
        if row.swept == "hidden_size":
            assert w.input_size == w.hidden_size
            assert 100 <= w.hidden_size <= 300
            assert w.steps == speed.BASE["steps"]
        else:
            assert w.hidden_size == speed.BASE["hidden_size"]
    assert {row.workload.steps for row in rows} >= {1, 4096}


def measured(folder: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> list[dict[str, Any]]:
    file = folder / "speed.jsonl"
    command = ["speed.py", str(file), "--device", "cpu", "--workload", "notebook", *options]
    monkeypatch.setattr(sys, "argv", command)
    speed.main()
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_the_page_has_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": (3, 4), "steps": (1, 2)}
    monkeypatch.setattr(speed, "SWEEPS", small)
    monkeypatch.setattr(speed, "BASE", dict.fromkeys(speed.BASE, 2))
    options = ("--dtype", "float32", "--sweeps")
    header, *rows = measured(tmp_path, monkeypatch, *options)
    assert header["torch"] == torch.__version__
    assert sum("sweep" in row for row in rows) == 4 * len(CELLS) * 2 * 2
    for row in rows:
        assert row["us"] == pytest.approx(1000)
        assert row["us_per_step"] == row["us"] / row["T"]
        assert row["torch_us"] == pytest.approx(2000)
        assert row["speedup"] == pytest.approx(2)
    (tmp_path / "benchmarks.md").write_text("# Benchmarks\n\n## Here\n\n## On a GPU\n\nold\n")
    command = ["page.py", str(tmp_path / "speed.jsonl"), "--docs", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    page.main()
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks\n\n## Here\n\n## On a GPU\n")
    assert "old" not in text
    line = next(line for line in text.splitlines() if line.startswith("| notebook |"))
    assert len(line.split("|")) == 2 + 5 + 4 * len(CELLS)
    for swept in small:
        assert (tmp_path / "benchmarks" / f"gpu-{swept}.png").stat().st_size > 10_000
        assert f"benchmarks/gpu-{swept}.png" in text


def test_a_page_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that measures, which does not have the rest of the page."""
    measured(tmp_path, monkeypatch, "--dtype", "float32")
    file = str(tmp_path / "speed.jsonl")
    monkeypatch.setattr(sys, "argv", ["page.py", file, file, "--docs", str(tmp_path)])
    page.main()
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text.startswith("# Benchmarks\n\n## On a GPU\n")
    assert "### Peers" in text
    assert "### float32, forward\n" in text
    assert "bfloat16" not in text
    assert "| LSTM notebook float32 forward |" in text


def test_a_peer_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is installed here but ours, with resets."""
    options = ("--dtype", "float32", "--cell", "LSTM", "--peers")
    _, *rows = measured(tmp_path, monkeypatch, *options)
    for row in rows:
        assert set(row["failed_peers"]) == set(speed.PEERS) - {"rnnkern with resets"}
        assert all("ModuleNotFoundError" in reason for reason in row["failed_peers"].values())


def test_a_row_that_fails_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory\nat length")

    monkeypatch.setattr(speed, "measure", fail)
    _, *rows = measured(tmp_path, monkeypatch, "--dtype", "bfloat16")
    assert [row["failed"] for row in rows] == ["out of memory"] * len(CELLS) * 2


def test_what_time_is_left_for_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, *rows = measured(tmp_path, monkeypatch, "--dtype", "float32", "--seconds", "0")
    assert rows == [{"not_measured": 2 * len(CELLS)}]


def test_the_order_of_rows_and_where_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("--dtype", "bfloat16", "--dtype", "float32", "--cell", "GRU", "--cell", "LSTM")
    _, *rows = measured(tmp_path, monkeypatch, *options)
    assert [row["row"] for row in rows] == list(range(8))
    assert [row["dtype"] for row in rows] == ["bfloat16"] * 4 + ["float32"] * 4
    assert [row["cell"] for row in rows[:4]] == ["GRU", "GRU", "LSTM", "LSTM"]
    file = tmp_path / "speed.jsonl"
    whole = file.read_text(encoding="utf-8").splitlines()
    file.write_text("\n".join(whole[:3]) + "\n", encoding="utf-8")
    _, *rows = measured(tmp_path, monkeypatch, *options, "--from-row", "6")
    assert [row["row"] for row in rows] == [0, 1, 6, 7]


def test_a_sticky_error_ends_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(speed, "measure", fail)
    monkeypatch.setattr(speed, "sticky_error", lambda _: True)
    file = tmp_path / "speed.jsonl"
    command = ["speed.py", str(file), "--device", "cpu", "--workload", "notebook"]
    monkeypatch.setattr(sys, "argv", command)
    assert speed.main() == speed.STICKY
    _, *rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    assert [row["sticky"] for row in rows] == [True]


@pytest.mark.parametrize(
    ("dtype", "cell", "workload", "regimes"),
    [
        ("float16", "LSTM", "h128", ["persistent", "persistent"]),
        ("bfloat16", "LSTM", "h128", ["small H", "small H"]),
        ("float16", "LSTM", "h129", ["small H", "step by step"]),
        ("float16", "LSTM", "h1024", ["persistent", "persistent"]),
        ("float16", "LSTM", "h2048", ["step by step", "step by step"]),
        ("float16", "GRU", "h1024", ["step by step", "step by step"]),
        ("float16", "GRU", "h128", ["small H", "small H"]),
        ("float32", "LSTM", "flash768", ["step by step", "step by step"]),
        ("float32", "RNN", "h256", ["small H", "small H"]),
        ("float16", "LSTM", "rl", ["step by step", "step by step"]),
    ],
)
def test_regimes_of_cudnn(dtype: str, cell: str, workload: str, regimes: list[str]) -> None:
    forward, both = speed.rows([workload], [dtype], [cell])
    assert speed.cudnn_regimes(forward) == regimes[:1]
    assert speed.cudnn_regimes(both) == regimes


def test_tiers_and_what_is_expected(monkeypatch: pytest.MonkeyPatch) -> None:
    row = speed.rows(["h512"], ["bfloat16"], ["LSTM"])[1]
    texts = {
        "forward": "resident tier: 128 blocks; 3 KB a step, 2.5 us expected",
        "backward": "stepwise tier: 4 KB a step, 6.0 us expected; because",
    }
    text = "LSTM\n" + "\n".join(f"layer 0 {name}: {t}" for name, t in texts.items())
    monkeypatch.setattr(rnnkern, "explain", lambda *_: text)
    module, x = torch.nn.LSTM(1, 1), torch.zeros(1, 1, 1)
    assert speed.plan_of(row, module, x) == {
        "tiers": ["resident", "stepwise"],
        "expected_us_per_step": 8.5,
    }
    seen = []
    speed.in_tier("stepwise", lambda: seen.append(os.environ["RNNKERN_CUDA_TIER"]))()
    assert seen == ["stepwise"]
    assert "RNNKERN_CUDA_TIER" not in os.environ


def test_the_report_of_the_cpu_keeps_the_section(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "benchmarks.md").write_text("# Old\n\n## On a GPU\n\nfigures\n")
    monkeypatch.setattr(report_page, "markdown", lambda *_: "# New\n")
    folders = ["--docs", str(tmp_path), "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["report", "--page", *folders])
    report.main()
    text = (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert text == "# New\n\n## On a GPU\n\nfigures\n"


MEASURED = {
    "device": {
        "name": "NVIDIA H200",
        "major": 9,
        "minor": 0,
        "multiprocessors": 132,
        "l2_bytes": 62914560,
        "clock_khz": 1980000,
    },
    "constants": [
        {"name": "l2_read_by_all_16_mib", "value": 5432.1},
        {"name": "memory_read", "value": 4321.0},
        {"name": "gather_flags_relaxed_n16_h256_132", "value": 1.32},
        {"name": "gather_words_of_16_n16_h256_132", "value": 0.9},
        {"name": "launch_kernel_132_blocks", "value": 2.125},
    ],
}


def test_measured_constants_take_the_place_of_published_ones() -> None:
    before = kinds.TABLE.read_text(encoding="utf-8")
    after = kinds.replaced(before, MEASURED)
    changed = set(after.splitlines()) - set(before.splitlines())
    row = "    {9, 0, 1.98, 5.43, 62.9, 4.32, 1.26, 0.814, 2.12},  // NVIDIA H200, measured"
    assert changed == {row}
    assert kinds.replaced(after, MEASURED) == after


def test_a_constant_or_a_kind_that_is_missing_is_named() -> None:
    table = kinds.TABLE.read_text(encoding="utf-8")
    some = MEASURED | {"constants": MEASURED["constants"][1:]}
    with pytest.raises(KeyError, match="l2_read_by_all_16_mib"):
        kinds.replaced(table, some)
    unknown = MEASURED | {"device": MEASURED["device"] | {"major": 7}}
    with pytest.raises(ValueError, match=r"0 rows of compute capability 7\.0"):
        kinds.replaced(table, unknown)
