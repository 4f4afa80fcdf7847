"""Times torch.nn's layers, cuDNN's on a GPU, at the workloads for GPUs: what there is to beat.

    python benchmarks/gpu/peers.py peers.jsonl [--budget 90]

All cells, workloads and dtypes of rnnkern/workloads.json, forward without grad and with backward.
One line of JSON a result, written as it comes, after one line on the machine. That file is read
here and rnnkern not imported, so that a failed build costs no measurement.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

WORKLOADS = Path(__file__).resolve().parents[2] / "rnnkern" / "workloads.json"
FORWARD, FORWARD_BACKWARD = "forward", "forward+backward"
#: The dtype, and whether products of float32 may be rounded to tf32, by the name in workloads.json.
DTYPES = {
    "float32": (torch.float32, False),
    "tf32": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
    "float16": (torch.float16, False),
}
WARM_UPS = 3
FEWEST, MOST = 7, 50
#: Where one call takes longer than this, three samples have to do.
LONG_CALL_S = 0.1


@dataclass(frozen=True)
class Row:
    """One measurement to make."""

    workload: dict[str, Any]
    dtype: str
    cell: str
    pass_name: str

    def as_json(self) -> dict[str, Any]:
        """What is measured, ready to be joined by the result."""
        sizes = {name: self.workload[name] for name in "TNIH"}
        return {
            "workload": self.workload["name"],
            **sizes,
            "dtype": self.dtype,
            "cell": self.cell,
            "pass": self.pass_name,
        }


def rows(names: list[str]) -> list[Row]:
    """All rows, or those of the workloads named; the longest workload comes last in the file."""
    data = json.loads(WORKLOADS.read_text(encoding="utf-8"))
    chosen = [w for w in data["gpu_workloads"] if not names or w["name"] in names]
    passes = (FORWARD, FORWARD_BACKWARD)
    return [Row(*row) for row in product(chosen, data["gpu_dtypes"], data["cells"], passes)]


def make_call(row: Row, device: torch.device) -> Callable[[], object]:
    """The call to time, on random numbers."""
    w, dtype = row.workload, DTYPES[row.dtype][0]
    build: Callable[..., nn.RNNBase] = getattr(nn, row.cell)
    module = build(w["I"], w["H"], device=device, dtype=dtype)
    backward = row.pass_name == FORWARD_BACKWARD
    x = torch.randn(w["T"], w["N"], w["I"], device=device, dtype=dtype, requires_grad=backward)
    if not backward:

        def forward() -> None:
            with torch.no_grad():
                module(x)

        return forward
    dy = torch.randn(w["T"], w["N"], w["H"], device=device, dtype=dtype)
    leaves = [x, *module.parameters()]

    def forward_backward() -> None:
        for leaf in leaves:
            leaf.grad = None
        module(x)[0].backward(dy)

    return forward_backward


def sample(call: Callable[[], object], count: int, device: torch.device) -> list[float]:
    """Seconds of each call, by CUDA events; on the CPU, where one can try this, by its clock."""
    if device.type != "cuda":
        seconds = []
        for _ in range(count):
            start = perf_counter()
            call()
            seconds.append(perf_counter() - start)
        return seconds
    new_event: Any = torch.cuda.Event  # torch has no types for it
    events = [new_event(enable_timing=True) for _ in range(2 * count)]
    for before, after in zip(events[::2], events[1::2], strict=True):
        before.record()
        call()
        after.record()
    torch.cuda.synchronize(device)
    pairs = zip(events[::2], events[1::2], strict=True)
    return [before.elapsed_time(after) / 1e3 for before, after in pairs]


def measure(row: Row, device: torch.device, share_s: float) -> dict[str, Any]:
    """Median and least time of a call in microseconds, from some ``share_s`` seconds of calls."""
    tf32 = DTYPES[row.dtype][1]
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cuda.matmul.allow_tf32 = tf32
    call = make_call(row, device)
    sample(call, 1, device)  # makes handles and plans: no measure of what follows
    estimate = sample(call, 1, device)[0]
    long = estimate > LONG_CALL_S
    if not long:
        sample(call, WARM_UPS - 2, device)
    count = 3 if long else min(MOST, max(FEWEST, int(share_s / max(estimate, 1e-6))))
    seconds = sample(call, count, device)
    return {
        "us": round(statistics.median(seconds) * 1e6, 3),
        "least_us": round(min(seconds) * 1e6, 3),
        "samples": count,
    }


def header(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    on_gpu = device.type == "cuda"
    cudnn: Any = torch.backends.cudnn
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else str(device),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if on_gpu else None,
    }


def run(chosen: list[Row], device: torch.device, budget_s: float) -> Iterator[dict[str, Any]]:
    """All results as they come; what is left when twice the budget is spent is counted only."""
    start = perf_counter()
    yield header(device)
    share_s = budget_s / max(1, len(chosen)) / 2  # the other half goes into warming up
    for done, row in enumerate(chosen):
        if perf_counter() - start > 2 * budget_s:
            yield {"not_measured": len(chosen) - done}
            return
        try:
            result = measure(row, device, share_s)
        except RuntimeError as error:  # out of memory, or a case that cuDNN refuses
            result = {"failed": str(error).splitlines()[0]}
        yield row.as_json() | result


def main() -> None:
    """Reads the command line and writes the file."""
    parser = argparse.ArgumentParser(description="Times torch.nn's recurrent layers on a GPU.")
    parser.add_argument("file", type=Path, help="JSON lines are written there")
    parser.add_argument("--budget", type=float, default=90.0, metavar="SECONDS")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--workload", action="append", default=[], help="only this one; repeatable")
    arguments = parser.parse_args()
    with arguments.file.open("w", encoding="utf-8") as file:
        for result in run(rows(arguments.workload), arguments.device, arguments.budget):
            line = json.dumps(result)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


if __name__ == "__main__":
    main()
