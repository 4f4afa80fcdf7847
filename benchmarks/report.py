"""Measures rnnkern beside everything else on this CPU, and writes docs/benchmarks.md.

    python -m benchmarks.report [--section layers,models] [--threads 1,2] [--quick] [--page]

Each section is one of the benchmarks of this folder. What it finds is kept in
benchmarks/results/report-CPU.json, a file for each kind of CPU, as soon as the section has ended.
``--section`` measures some again and keeps the others. The page has all kinds of CPU side by side;
``--page`` writes it from the files and measures nothing.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

import rnnkern
from benchmarks import peers, report_page, rows
from benchmarks.busy import busy
from benchmarks.compiled import compiled
from benchmarks.decoder import decoders
from benchmarks.drawn import drawn
from benchmarks.entry_points import entry_points
from benchmarks.everyday import everyday
from benchmarks.frozen import stream_row
from benchmarks.gpu.page import HEADING as GPU_HEADING
from benchmarks.layers import cells, layers, sweeps
from benchmarks.models import models
from benchmarks.options import options
from benchmarks.own_cells import own_cells
from benchmarks.precision import precisions
from benchmarks.report_page import Measure, Section, Threads
from benchmarks.rows import QUICK, Effort, Row
from rnnkern.bench import timing
from rnnkern.bench.workloads import CELLS

ROOT = Path(__file__).resolve().parent.parent
RESULTS, DOCS = ROOT / "benchmarks/results", ROOT / "docs"


def on_each(measure: Callable[[Effort], Iterator[Row]]) -> Measure:
    """For a benchmark of as many threads as torch has: with each number of threads."""

    def measured(effort: Effort, threads: Threads) -> Iterator[Row]:
        for count in threads:
            with timing.threads_set(count):
                yield from measure(effort)

    return measured


def on_most(measure: Callable[[Effort], Iterator[Row]]) -> Measure:
    """With the largest number of threads alone."""
    return lambda effort, threads: on_each(measure)(effort, (max(threads),))


def layers_and_streams(effort: Effort, threads: Threads) -> Iterator[Row]:
    yield from layers(effort, threads)
    yield from on_each(lambda effort: (stream_row(cell, effort) for cell in CELLS))(effort, threads)


SECTIONS = (
    Section(
        "layers",
        "Layers",
        "Inference in float32 is compared with ONNX Runtime and OpenVINO; forward and backward, and"
        " bfloat16, with torch.nn. The limit of a row is the larger of its products at the speed of"
        " torch.mm in the same rounds, and its tensors moved once at the speed of a copy."
        " Frozen layers are measured in the same rounds as inference in float32; numbers are of"
        " weights in float32 unless a head has another dtype. The step of a stream is"
        " `FrozenLayer.step` ([frozen modules](frozen.md)).",
        layers_and_streams,
        0.5,
    ),
    Section(
        "cells",
        "Cells",
        "One step by `RNNCell`, `LSTMCell` or `GRUCell`, from a given state that asks for a"
        " gradient too.",
        on_each(cells),
        0.3,
    ),
    Section(
        "decoder",
        "Cells in a loop",
        "A decoder: 100 steps of a cell with attention between them, and one backward pass"
        " (`python -m benchmarks.decoder`).",
        on_each(decoders),
        0.7,
    ),
    Section(
        "entry_points",
        "Ways to call",
        "A small layer (T=12, N=4, I=24, H=48) or a cell of the same sizes, called in other ways"
        " than plainly. Where there is no speed-up, torch.nn cannot be called like that"
        " (`python -m benchmarks.entry_points`).",
        on_each(entry_points),
        0.2,
    ),
    Section(
        "compiled",
        "Compiled calls",
        'Layers under torch.compile. The speed-ups are those of the compiled call. "More than'
        ' eager" is the median of the differences between both calls within a round. A layer of'
        " the same operands and outputs that computes nothing shows what torch's part of that is"
        " (`python -m benchmarks.compiled`).",
        on_each(compiled),
        1.0,
    ),
    Section(
        "precision",
        "Precision of products",
        'float32 under `torch.set_float32_matmul_precision`. A CPU without AMX computes "high" as'
        ' "highest" (`python -m benchmarks.precision`).',
        precisions,
        0.4,
    ),
    Section(
        "models",
        "Models",
        "The recurrent parts of public models, with sizes that their papers or code name."
        " Lengths and batches are ours. `python -m benchmarks.models` says where the sizes come"
        " from, and which models are only in the manner of their namesakes.",
        on_most(models),
        0.7,
    ),
    Section(
        "everyday",
        "Cases that people meet",
        "Packed and padded is the case of pytorch issue 149194: an LSTM is trained on 32 sequences"
        " of lengths from 1 to L. `lengths=` takes the padded batch and needs no packing. A cell is"
        " empty if torch.nn would take more than a minute (`python -m benchmarks.everyday`).",
        on_most(everyday),
        0.7,
    ),
    Section(
        "busy",
        "Beside a busy process",
        "Another process computes all the time (`python -m benchmarks.busy`).",
        on_most(busy),
        0.7,
    ),
    Section(
        "drawn",
        "Sizes drawn at random",
        "The first draws of `python -m benchmarks.drawn`.",
        on_most(drawn),
        0.3,
    ),
    Section(
        "options",
        "Options of a call",
        "Forward and backward. The cost is the time of the call over that of a module without the"
        " option. The loop is in plain PyTorch (`python -m benchmarks.options`).",
        on_most(options),
        0.5,
    ),
    Section(
        "own_cells",
        "Cells written in Python",
        "A cell beside the hand-written one, and beside its loop, eager and compiled"
        " (`python -m benchmarks.own_cells`).",
        on_most(own_cells),
        0.5,
    ),
    Section(
        "sweeps",
        "Over T, N and H",
        "float32 on one thread.",
        lambda effort, _: sweeps(effort),
        0.1,
    ),
)


def label(cpu: str) -> str:
    """The name of a CPU without what says nothing: ``Intel Xeon``."""
    return " ".join(re.sub(r"\((R|TM)\)|@.*|\b(CPU|Processor)\b", " ", cpu).split())


def name_of(cpu: str, isa: str) -> str:
    """What files of a kind of CPU are called: ``intel-xeon-v4-amx``."""
    text = f"{label(cpu)} {isa.removeprefix('x86-64-')}"
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def header() -> dict[str, Any]:
    """With what a section was measured."""
    return {
        "torch": torch.__version__,
        "peers": {name: _version(name) for name in peers.installed()},
        "commit": timing.commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _version(peer: str) -> str:
    return importlib.metadata.version(peer.lower().replace(" ", ""))


def measure(
    sections: Iterable[Section], threads: Threads, quick: bool, folder: Path = RESULTS
) -> Path:
    """Measures sections one after the other into the file of this CPU, and returns its path."""
    cpu, isa = timing.cpu_name(), str(rnnkern.build_info()["isa"])
    path = folder / f"report-{name_of(cpu, isa)}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"sections": {}}
    report = {"cpu": label(cpu), "cores": os.cpu_count(), "isa": isa}
    report["sections"] = before["sections"]
    for section in sections:
        start, found = perf_counter(), []
        effort = QUICK if quick else Effort(section.seconds)
        own = header()
        for row in section.measure(effort, threads):
            print(rows.line(row), flush=True)
            found.append(row)
        report["sections"][section.name] = {"header": own, "rows": found}
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"==== {section.name}: {perf_counter() - start:.0f} s", flush=True)
    return path


def write_page(results: Path = RESULTS, docs: Path = DOCS) -> Path:
    """Writes the page and its pictures from all files."""
    reports, pictures = [], []
    for path in sorted(results.glob("report-*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        reports.append(report)
        swept = report["sections"].get("sweeps", {"rows": []})["rows"]
        if swept:
            prefix = path.stem.removeprefix("report-")
            drawn_ = report_page.draw(swept, report["cpu"], docs / "benchmarks", prefix)
            pictures += [f"benchmarks/{picture.name}" for picture in drawn_]
    text = report_page.markdown(reports, SECTIONS, pictures)
    page = docs / "benchmarks.md"
    if page.exists():  # what has been measured on a GPU stays
        _, heading, rest = page.read_text(encoding="utf-8").partition(GPU_HEADING)
        text += "\n" * bool(heading) + heading + rest
    page.write_text(text, encoding="utf-8")
    return page


def main() -> None:
    """Runs the command line."""
    names = [section.name for section in SECTIONS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--section", default=",".join(names), help=f"some of {','.join(names)}")
    parser.add_argument("--threads", default="1,2", help="counts, by commas (default: 1,2)")
    parser.add_argument(
        "--quick", action="store_true", help="small cases, to try the code; into build/report"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder of the page")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the files")
    arguments = parser.parse_args()
    chosen = arguments.section.split(",")
    if arguments.quick and (arguments.docs, arguments.results) == (DOCS, RESULTS):
        arguments.docs = arguments.results = ROOT / "build" / "report"
        arguments.results.mkdir(parents=True, exist_ok=True)
    if not set(chosen) <= set(names):
        parser.error(f"--section: some of {','.join(names)}, got {arguments.section}")
    if not arguments.page:
        threads = tuple(int(count) for count in arguments.threads.split(","))
        sections = [section for section in SECTIONS if section.name in chosen]
        path = measure(sections, threads, arguments.quick, arguments.results)
        print(f"written: {path}")
    print(f"written: {write_page(arguments.results, arguments.docs)}")


if __name__ == "__main__":
    main()
