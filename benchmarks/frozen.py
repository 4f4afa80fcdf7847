"""What `rnnkern.freeze` gives: frozen layers beside everything else that runs inference.

    python -m benchmarks.frozen [--threads 1,2] [--workloads stream_step,...] [--seconds S]

Timed in turn in one process, in inference mode: frozen layers in float32, bfloat16 and int8, the
layer that is not frozen (rnnkern), torch.nn, and, if they are installed (dependency group
``peers``), ONNX Runtime, OpenVINO, and ONNX Runtime's DynamicQuantizeLSTM. Each number is how many
times as fast a frozen layer is: of float32 unless its name says otherwise; the median of pairwise
ratios. Results in float32 are checked first. The step of a stream is `FrozenLayer.step`, beside
calls with a state in torch.nn and in the layer not frozen.
"""

from __future__ import annotations

import argparse
import functools
import statistics

import torch
from torch import nn

import rnnkern
from benchmarks import peers, rows
from benchmarks.rows import OURS, PEERS, Call, Effort, Row, Samples
from benchmarks.streaming import frame
from rnnkern import tolerance
from rnnkern.bench import timing
from rnnkern.bench.timing import threads_set
from rnnkern.bench.workloads import CELLS, Case, draw_case, load_workloads

FLOAT32, BFLOAT16, INT8 = FROZEN = ("frozen float32", "frozen bfloat16", "frozen int8")
WEIGHTS = dict(zip(FROZEN, (None, torch.bfloat16, torch.int8), strict=True))
PEER_IN_INT8 = PEERS[-1]
NOT_FLOAT32 = (*FROZEN, PEER_IN_INT8)
"""Calls that do not compute what the layer in float32 does, or not from the same operands."""


def calls_of(case: Case, threads: int) -> dict[str, Call]:
    """The forward pass in every form and library, by name."""
    x = case.x
    calls = peers.calls(case, threads)
    for name, weights in WEIGHTS.items():
        frozen = rnnkern.freeze(case.side(rnnkern, torch.float32).module, weights)
        calls[name] = lambda module=frozen: module(x)
    if case.cell == "LSTM" and "ONNX Runtime" in calls:
        calls[PEER_IN_INT8] = peers.onnxruntime_int8_call(case, threads)
    return calls


def check(case: Case, calls: dict[str, Call]) -> None:
    """Ends the program if a result in float32 of ours is wrong."""
    reference = case.side(nn, torch.float64).module(case.x.double())[0].detach()
    theirs = torch.as_tensor(peers.output(calls["torch.nn"]()))
    for name in (OURS, FLOAT32):
        verdict = tolerance.check(torch.as_tensor(peers.output(calls[name]())), theirs, reference)
        if not verdict:
            raise SystemExit(f"{case.cell} {case.workload.name}: {name} is wrong: {verdict}")


def row_of(table: str, case: str, samples: Samples) -> Row:
    """How the frozen forms compare: the first one with all others, and with the layer itself."""
    others = [name for name in samples if name not in (OURS, *NOT_FLOAT32)]
    beside = rows.over(samples, FLOAT32, others)
    speedup = {f"over {OURS}": rows.ratio(samples, FLOAT32, OURS)} | beside
    speedup |= {f"{name[7:]} over {OURS}": rows.ratio(samples, name, OURS) for name in FROZEN[1:]}
    if PEER_IN_INT8 in samples:
        speedup[f"int8 over {PEER_IN_INT8}"] = rows.ratio(samples, INT8, PEER_IN_INT8)
    return rows.row(
        f"frozen, {table}, threads: {torch.get_num_threads()}",
        case,
        samples,
        FLOAT32,
        speedup=speedup,
    )


def stream_calls(cell: str) -> dict[str, Call]:
    case = draw_case(cell, load_workloads()["stream_step"])
    calls: dict[str, Call] = {
        OURS: frame(case.side(rnnkern, torch.float32)),
        "torch.nn": frame(case.side(nn, torch.float32)),
    }
    for name, weights in WEIGHTS.items():
        frozen = rnnkern.freeze(case.side(rnnkern, torch.float32).module, weights)
        _, state = frozen(case.x)
        calls[name] = functools.partial(frozen.step, case.x[0], state)
    return calls


def stream_row(cell: str, effort: Effort) -> Row:
    """One step of a stream: `FrozenLayer.step` beside calls with a state."""
    with torch.inference_mode():
        samples = rows.in_turn(stream_calls(cell), effort)
    return row_of("one step of a stream", f"{cell} I64 H256", samples)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", default="1,2", help="of torch and of each peer")
    parser.add_argument("--workloads", default=",".join(load_workloads()), help="some of them")
    parser.add_argument("--cells", default=",".join(CELLS), help="some of them")
    parser.add_argument("--seconds", type=float, default=1.0, help="for a row")
    options = parser.parse_args(arguments)
    unknown = set(options.workloads.split(",")) - set(load_workloads())
    if unknown or set(options.cells.split(",")) - set(CELLS):
        parser.error(f"no such workload or cell: {options.workloads} {options.cells}")
    print(
        f"{timing.cpu_name()}, torch {torch.__version__}, us a call and speed-ups of frozen layers"
    )
    for threads in map(int, options.threads.split(",")):
        _table(threads, options.workloads.split(","), options.cells.split(","), options.seconds)


def _table(threads: int, workloads: list[str], cells: list[str], seconds: float) -> None:
    found: dict[str, list[float]] = {}
    with threads_set(threads), torch.inference_mode():
        for workload in workloads:
            for cell in cells:
                case = draw_case(cell, load_workloads()[workload])
                calls = calls_of(case, threads)
                check(case, calls)
                samples = rows.in_turn(calls, Effort(seconds, 5))
                made = row_of("inference", f"{workload} {cell}", samples)
                print(rows.line(made), flush=True)
                for head, value in made["speedup"].items():
                    found.setdefault(head, []).append(value)
        for cell in cells:
            print(rows.line(stream_row(cell, Effort(seconds, 5))), flush=True)
    for head, ratios in found.items():
        mean = statistics.geometric_mean(ratios)
        print(f"{head}: geometric mean {mean:.2f}, least {min(ratios):.2f}")


if __name__ == "__main__":
    main()
