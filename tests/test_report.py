"""benchmarks/report.py and its peers: what is measured and the page that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import peers, report, second_order, streaming
from rnnkern.bench import timing
from rnnkern.bench.workloads import CELLS, FORWARD, FORWARD_BACKWARD, draw_case, load_workloads

pytestmark = pytest.mark.cpu_only


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", ["notebook", "mnist_rnn"])
def test_peers_compute_the_same(cell: str, name: str) -> None:
    case = draw_case(cell, load_workloads()[name])
    with torch.no_grad():
        outputs = {n: peers.output(call()) for n, call in peers.calls(case, 1).items()}
    for output in outputs.values():
        np.testing.assert_allclose(output, outputs["torch.nn"], atol=2e-6)


def limits_of(gflops: float, dtype: torch.dtype = torch.float32) -> report.Limits:
    return report.Limits((10, 10, 10), dtype, gflops, gbytes=10.0)


def test_limits_are_the_larger_of_products_and_copies() -> None:
    large, step = (load_workloads()[name] for name in ("xlarge", "stream_step"))
    limits, product_s = limits_of(100.0), 2000 / 100e9
    products = 2 * 25 * 128 * 4 * 1024 * 2048 / 100e9
    assert limits.seconds("LSTM", large, FORWARD, product_s) == pytest.approx(products)
    both = limits.seconds("LSTM", large, FORWARD_BACKWARD, product_s)
    assert both == pytest.approx(3 * products)
    moved = 4 * (4 * 256 * 320 + 320) / 10e9
    assert limits.seconds("LSTM", step, FORWARD, product_s) == pytest.approx(moved)
    halves = limits_of(100.0, torch.bfloat16)
    assert halves.seconds("LSTM", step, FORWARD, product_s) == pytest.approx(moved / 2)


def test_sweeps_are_measured_by_the_limits_of_their_one_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        report, "measure_limits", lambda *_: limits_of(float(torch.get_num_threads()))
    )
    monkeypatch.setattr(report, "load_workloads", dict)
    monkeypatch.setattr(report, "SWEEPS", {"steps": (1,)})
    monkeypatch.setattr(
        report, "measure", lambda name, cell, workload, limits, quick: seen.append(limits) or {}
    )
    report.run([2], quick=True)
    assert {limits.gflops for limits in seen} == {1.0}


def test_the_product_is_the_one_it_says() -> None:
    call = report.Limits((3, 4, 5), torch.bfloat16, 0.0, 0.0).product()
    assert call().shape == (3, 5)
    assert call().dtype == torch.bfloat16


def test_time_in_turn_takes_turns() -> None:
    made: list[int] = []
    seconds = timing.time_in_turn(
        [lambda i=i: made.append(i) for i in range(3)],  # type: ignore[misc]
        budget_s=0.0,
        min_rounds=2,
        warm_s=1e-4,
    )
    assert [len(s) for s in seconds] == [2, 2, 2]
    changes = [i for i, before in zip(made[1:], made, strict=False) if i != before]
    assert changes == [1, 2, 0, 1, 2, 0, 1, 2]  # sample sizes first, then two rounds


@pytest.mark.usefixtures("no_clock")
def test_the_page_has_every_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="pip install 'rnnkern[plot]'")
    monkeypatch.setattr(report, "PRODUCTS", ((64, 64, 64), (16, 128, 64)))
    monkeypatch.setattr(report, "COPIED", 2**20)
    notebook = {"notebook": load_workloads()["notebook"]}
    monkeypatch.setattr(report, "load_workloads", lambda: notebook)
    monkeypatch.setattr(report, "SWEEPS", {"steps": (1, 2), "batch": (1, 2), "hidden_size": (4, 8)})
    found = report.run([1], quick=True)
    json.dumps(found, allow_nan=False)
    assert len(found["rows"]) == 4 * len(CELLS)
    for row in found["rows"]:
        assert row["us"]["rnnkern"] == pytest.approx(1000)
        assert row["speedup"]["torch.nn"] == pytest.approx(2)
        assert 0 < row["of_limit"] < 1.5
    pictures = report.draw(found, tmp_path)
    assert [path.stat().st_size > 10_000 for path in pictures] == [True] * 3
    page = report.markdown(found, pictures)
    tables = [line for line in page.splitlines() if line.startswith("|")]
    each = 2 + len(CELLS) + len(CELLS) + 1
    assert len(tables) == 4 * each
    for first in range(0, len(tables), each):
        assert len({line.count("|") for line in tables[first : first + each]}) == 1
    for title in ("## float32, threads: 1", "## bfloat16, threads: 1"):
        assert title in page


@pytest.mark.parametrize("script", [second_order, streaming], ids=lambda s: s.__name__)
def test_tables_of_costs(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workloads = {name: load_workloads()[name] for name in ("notebook", "stream_step")}
    monkeypatch.setattr(script, "load_workloads", lambda: workloads)
    monkeypatch.setattr("sys.argv", ["script", "--threads", "1", "--seconds", "0"])
    script.main()
    _, header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[-2:] == ["torch.nn", "speedup"]
    assert {cell for row in rows for cell in CELLS if cell in row.split()} == set(CELLS)
