"""benchmarks/report.py and its sections: what is measured and the page that is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import (
    compiled,
    decoder,
    drawn,
    everyday,
    layers,
    models,
    peers,
    report,
    report_page,
    rows,
    second_order,
    streaming,
)
from benchmarks.report import SECTIONS
from benchmarks.rows import QUICK
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


def limits_of(gflops: float, dtype: torch.dtype = torch.float32) -> layers.Limits:
    return layers.Limits((10, 10, 10), dtype, gflops, gbytes=10.0)


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


def test_the_product_is_the_one_it_says() -> None:
    call = layers.Limits((3, 4, 5), torch.bfloat16, 0.0, 0.0).product()
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


def test_a_row_has_the_least_speed_up_over_the_others() -> None:
    made = rows.row("t", "c", {"rnnkern": [1e-6] * 3, "a": [3e-6] * 3, "b": [2e-6, 1e-6, 4e-6]})
    assert made["us"] == pytest.approx({"rnnkern": 1, "a": 3, "b": 2})
    assert made["speedup"] == pytest.approx({"over a": 3, "over b": 2, rows.BEST: 2})
    assert rows.fastest_other(made) == "b"


def test_there_is_a_rest_after_a_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr(rows, "sleep", lambda _: made.append("rest"))
    calls = {name: lambda name=name: made.append(name) for name in ("rnnkern", "OpenVINO")}  # type: ignore[misc]
    with timing.threads_set(2):
        samples = rows.in_turn(calls, QUICK)
    assert samples.keys() == calls.keys()
    changes = [name for name, before in zip(made[1:], made, strict=False) if name != before]
    assert changes[:3] == ["OpenVINO", "rest", "rnnkern"]
    made.clear()
    with timing.threads_set(1):
        rows.in_turn(calls, QUICK)
    assert "rest" not in made


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """All sections with cases that take milliseconds."""
    monkeypatch.setattr(layers, "PRODUCTS", ((64, 64, 64), (16, 128, 64)))
    monkeypatch.setattr(layers, "COPIED", 2**20)
    notebook = {"notebook": load_workloads()["notebook"]}
    monkeypatch.setattr(layers, "load_workloads", lambda: notebook)
    monkeypatch.setattr(layers, "SWEEPS", {"steps": (1, 2), "batch": (1, 2), "hidden_size": (4, 8)})
    monkeypatch.setattr(everyday, "LONG_STEPS", 50)
    monkeypatch.setattr(everyday, "SERVING_S", 0.01)
    monkeypatch.setattr(drawn, "MOST_FLOPS", 1e6)
    monkeypatch.setattr(compiled, "SHAPES", (("GRU", 3, 2, 2, 4),))
    monkeypatch.setattr(decoder, "STEPS", 3)
    monkeypatch.setattr("benchmarks.busy.SAMPLE_S", 1e-4)


@pytest.mark.usefixtures("no_clock", "small")
@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.name)
def test_a_section_is_measured_and_shown(section: report_page.Section, tmp_path: Path) -> None:
    """Its rows survive JSON, and each table of the page is rectangular and has each of them."""
    threads = torch.get_num_threads()
    path = report.measure([section], (1,), quick=True, folder=tmp_path)
    assert torch.get_num_threads() == threads
    found = json.loads(path.read_text(encoding="utf-8"))
    made = found["sections"][section.name]["rows"]
    for row in made:
        assert all(us > 0 for us in row["us"].values())
        assert all(isinstance(number, float) for number in row["speedup"].values())
    page = report_page.markdown([found], SECTIONS, [])
    assert f"## {section.title}" in page
    shown = [row for row in made if "sweep" not in row]
    for row in shown:
        assert f"| {row['case']} |" in page
        assert f"### {row['table']}" in page
    for _, table in by_heading(page):
        assert len({line.count("|") for line in table}) == 1
    assert len(by_heading(page)) == 2 + len({row["table"] for row in shown})


def by_heading(page: str) -> list[tuple[str, list[str]]]:
    """The tables of a page with the headings that they follow."""
    found = []
    heading, table = "", []
    for line in [*page.splitlines(), ""]:
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if line.startswith("|"):
            table.append(line)
        elif table:
            found.append((heading, table))
            table = []
    return found


@pytest.mark.usefixtures("no_clock", "small")
def test_layers_stand_beside_everything(tmp_path: Path) -> None:
    """What is timed takes a millisecond more than the one before it (`conftest.no_clock`)."""
    (layer,) = [section for section in SECTIONS if section.name == "layers"]
    path = report.measure([layer], (1,), quick=True, folder=tmp_path)
    made = json.loads(path.read_text(encoding="utf-8"))["sections"]["layers"]["rows"]
    tables = {row["table"] for row in made}
    for dtype in ("float32", "bfloat16"):
        for title in layers.TITLES.values():
            assert f"{dtype}, {title}, threads: 1" in tables
    for row in made:
        if "of_limit" in row:
            assert row["us"]["rnnkern"] == pytest.approx(1000)
            assert row["speedup"]["over torch.nn"] == pytest.approx(2)
            assert 0 < row["of_limit"] < 1.5
    frozen = [row for row in made if row["table"].startswith("frozen, inference")]
    assert len(frozen) == len(CELLS)
    others = {"over rnnkern", "over torch.nn", "bfloat16 over rnnkern", "int8 over rnnkern"}
    assert all(others <= row["speedup"].keys() for row in frozen)


def report_of(cpu: str, speedup: float, **more: Any) -> dict[str, Any]:
    samples = {"rnnkern": [1e-6], "torch.nn": [speedup * 1e-6]}
    made = [rows.row("float32", case, samples, **more) for case in ("first", cpu)]
    header = {"torch": "2.0", "peers": {}, "commit": "abc", "date": "2026-01-01T00:00:00"}
    sections = {"models": {"header": header, "rows": made}}
    return {"cpu": cpu, "cores": 2, "isa": "baseline", "sections": sections}


def test_kinds_of_cpu_are_side_by_side() -> None:
    reports = [report_of("one", 2.0), report_of("two", 8.0, of_limit=0.25)]
    page = report_page.markdown(reports, SECTIONS, [])
    for line in (
        "| A | one | 2 | baseline |",
        "| B | two | 2 | baseline |",
        "| float32 | 2.00 | 2.00 | 2.00 | 8.00 | 8.00 | 8.00 |",
        "| case | A: rnnkern, µs | A: over torch.nn | B: rnnkern, µs | B: over torch.nn "
        "| B: of the limit |",
        "| first | 1 | 2.00 | 1 | 8.00 | 25 % |",
        "| one | 1 | 2.00 |  |  |  |",
        "| two |  |  | 1 | 8.00 | 25 % |",
        "| geometric mean |  | 2.00 |  | 8.00 |  |",
    ):
        assert line in page.splitlines()


def test_another_run_keeps_the_other_sections_and_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def section(name: str, case: str) -> report_page.Section:
        made = rows.row("t", case, {"rnnkern": [1e-6]})
        return report_page.Section(name, name, "", lambda *_: iter([made]), 0.0)

    monkeypatch.setattr(timing, "cpu_name", lambda: "Intel(R) Xeon(R) Processor @ 2.1GHz")
    first, again = section("a", "first"), section("a", "again")
    path = report.measure([first, section("b", "kept")], (1,), quick=True, folder=tmp_path)
    assert path.name.startswith("report-intel-xeon-")
    report.measure([again], (1,), quick=True, folder=tmp_path)
    found = json.loads(path.read_text(encoding="utf-8"))["sections"]
    assert [row["case"] for own in found.values() for row in own["rows"]] == ["again", "kept"]
    monkeypatch.setattr(timing, "cpu_name", lambda: "AMD EPYC")
    other = report.measure([first], (1,), quick=True, folder=tmp_path)
    assert sorted(tmp_path.glob("*.json")) == sorted([other, path])


def test_files_are_named_by_kind_of_cpu() -> None:
    assert report.name_of("Intel(R) Xeon(R) Processor", "x86-64-v4-amx") == "intel-xeon-v4-amx"
    assert report.name_of("AMD EPYC", "x86-64-v4-bf16") == "amd-epyc-v4-bf16"
    for path in report.RESULTS.glob("report-*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert path.stem == f"report-{report.name_of(found['cpu'], found['isa'])}"


def test_the_page_is_the_one_of_the_files(tmp_path: Path) -> None:
    """docs/benchmarks.md is what ``--page`` writes of the files in benchmarks/results."""
    pytest.importorskip("matplotlib", reason="pip install 'rnnkern[plot]'")
    text = report.write_page(docs=tmp_path).read_text(encoding="utf-8")
    now = (report.DOCS / "benchmarks.md").read_text(encoding="utf-8")
    assert now.partition(report.GPU_HEADING)[0].rstrip() == text.rstrip()
    drawn = [path.relative_to(tmp_path) for path in tmp_path.glob("benchmarks/*.png")]
    assert len(drawn) % 3 == 0
    for path in drawn:
        assert (tmp_path / path).stat().st_size > 10_000
        assert (report.DOCS / path).exists()


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_models_have_the_form_that_they_name(model: models.Model) -> None:
    """Stacks, directions, projections and packed batches. Small ones are run, too."""
    module, x = model.build(), model.input()
    sizes = [model.sizes[0], *model.options.values()]
    assert all(isinstance(size, int) for size in sizes)
    assert isinstance(x, torch.nn.utils.rnn.PackedSequence) == model.packed
    features = x.data.shape[-1] if model.packed else x.shape[-1]
    assert features == model.sizes[0]
    assert sum(weight.numel() for weight in module.parameters()) > 10_000
    assert model.name in model.case


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
