"""Times rnnkern on a GPU: torch.nn, each tier of ours, and peers, all in turn in one process.

    python benchmarks/gpu/speed.py speed.jsonl [--seconds 300] [--sweeps]
    python benchmarks/gpu/speed.py peers.jsonl --peers --workload flash768 --dtype bfloat16

All workloads, dtypes and cells for GPUs of rnnkern/bench/workloads.json, in that order or as they
are named, forward without grad and with backward; with ``--sweeps`` then one cell after the other
while H or T grows. Each result is one line of JSON, written as it comes, after one line about the
machine. ``--peers`` times FlashRNN (its CUDA and its Triton kernels), haste, and TorchRL's Triton
kernels as well, if they are installed. They compile for each shape at its first call, which takes
minutes, so use that option for few rows.

A row may hang, or leave an error after which no call to CUDA succeeds. Then the process ends, and
``--from-row`` is for the next one.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

import rnnkern
from rnnkern.bench import timing
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    GATES,
    PRECISIONS,
    Case,
    Side,
    Workload,
    default_precisions,
    draw_case,
    grad_mode,
    load_workloads,
    tf32_allowed,
)

OURS, THEIRS = "rnnkern", "torch.nn"
TIERS = ("resident", "stepwise")
PASSES = (FORWARD, FORWARD_BACKWARD)

#: The sizes that a sweep keeps, and the sizes over which it goes.
BASE = {"steps": 256, "batch": 16, "input_size": 256, "hidden_size": 256}
SWEEPS: dict[str, tuple[int, ...]] = {
    "hidden_size": (
        *(100, 112, 120, 127, 128, 129, 136, 144, 160, 176, 191, 192, 193),
        *(208, 224, 240, 255, 256, 257, 272, 288, 300),
    ),
    "steps": (1, 4, 16, 64, 256, 1024, 4096),
}
SWEPT_DTYPES = ("tf32", "bfloat16")
FEWEST_ROUNDS = 3

#: The exit status after an error that no later call survives.
STICKY = 70

PERSISTENT, SMALL_H, STEP_BY_STEP = "persistent", "small H", "step by step"
#: The largest H for which cuDNN keeps the weights of a small layer, forward and backward.
SMALL_SIZES = {"RNN": (384, 256), "LSTM": (192, 128), "GRU": (192, 128)}


@dataclass(frozen=True)
class Row:
    """One measurement to make. ``swept`` names the size that grows, if it is part of a sweep."""

    workload: Workload
    cell: str
    dtype: str
    pass_name: str
    swept: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The fields that say what is measured, to which the result is added."""
        w = self.workload
        return {
            "workload": w.name,
            "T": w.steps,
            "N": w.batch,
            "I": w.input_size,
            "H": w.hidden_size,
            "dtype": self.dtype,
            "cell": self.cell,
            "pass": self.pass_name,
        } | ({"sweep": self.swept} if self.swept else {})


def rows(names: list[str], dtypes: list[str], cells: list[str]) -> list[Row]:
    """The rows of all dtypes, cells and workloads, or of the named ones, in that order."""
    chosen = [w for w in load_workloads("cuda").values() if not names or w.name in names]
    wanted = dtypes or [precision.name for precision in default_precisions("cuda")]
    return [
        Row(workload, cell, dtype, pass_name)
        for dtype in wanted
        for cell in cells or CELLS
        for workload in chosen
        for pass_name in PASSES
    ]


def swept_rows() -> Iterator[Row]:
    """The rows of a sweep in which one size grows. I grows with H."""
    for swept, values in SWEEPS.items():
        for value in values:
            sizes = BASE | {swept: value}
            if swept == "hidden_size":
                sizes["input_size"] = value
            for cell in CELLS:
                for dtype in SWEPT_DTYPES:
                    for pass_name in PASSES:
                        workload = Workload(f"{swept}={value}", **sizes)
                        yield Row(workload, cell, dtype, pass_name, swept)


def cudnn_regimes(row: Row) -> list[str]:
    """Which kernels torch asks cuDNN for, in each pass, on compute capability 8.0 and later."""
    w = row.workload
    persists = (
        row.dtype == "float16"
        and row.cell != "GRU"
        and w.hidden_size % 128 == w.input_size % 128 == 0
        and w.hidden_size <= 1024
        and w.batch % 8 == 0
        and w.batch <= 128
        and (row.cell == "LSTM" or w.batch < 96 or w.hidden_size < 896)
    )
    passes = SMALL_SIZES[row.cell][: 1 if row.pass_name == FORWARD else 2]
    return [
        PERSISTENT if persists else SMALL_H if w.hidden_size <= largest else STEP_BY_STEP
        for largest in passes
    ]


def in_tier(tier: str, call: timing.Call) -> timing.Call:
    """The call on the tier that the plan has not chosen."""

    def forced() -> None:
        os.environ["RNNKERN_CUDA_TIER"] = tier
        try:
            call()
        finally:
            del os.environ["RNNKERN_CUDA_TIER"]

    return forced


def plan_of(row: Row, module: nn.RNNBase, x: torch.Tensor) -> dict[str, Any]:
    """The tier of the pass and what its plan expects of a step, from `rnnkern.explain`."""
    text = rnnkern.explain(module, x)
    lines = dict(re.findall(r"^layer 0 (forward|backward): (.*)$", text, re.MULTILINE))
    names = ("forward",) if row.pass_name == FORWARD else ("forward", "backward")
    found = [re.match(r"(\w+) tier.* ([\d.]+) us expected", lines.get(name, "")) for name in names]
    if not all(found):
        return {}  # not on a GPU
    return {
        "tiers": [match[1] for match in found if match],
        "expected_us_per_step": sum(float(match[2]) for match in found if match),
    }


def call_of(
    row: Row,
    forward: Callable[[], torch.Tensor],
    dy: torch.Tensor,
    leaves: Sequence[torch.Tensor],
) -> timing.Call:
    """The pass of a row, from a function that returns the output."""

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        y = forward()
        if row.pass_name == FORWARD_BACKWARD:
            y.backward(dy)

    return call


def flashrnn_call(row: Row, case: Case, device: torch.device, backend: str) -> timing.Call:
    """FlashRNN runs the recurrence, and torch the product with the inputs."""
    from flashrnn import flashrnn

    w, dtype = row.workload, PRECISIONS[row.dtype].dtype
    gates = GATES[row.cell]
    shape = (gates, 1, w.hidden_size)
    state = {name: tensor.to(device, dtype) for name, tensor in case.state.items()}
    weight = state["weight_ih_l0"].requires_grad_()
    recurrent = state["weight_hh_l0"].view(*shape, w.hidden_size).requires_grad_()
    bias = (state["bias_ih_l0"] + state["bias_hh_l0"]).view(shape).requires_grad_()
    x = case.x.to(device, dtype).transpose(0, 1).contiguous().requires_grad_()  # [N, T, I]
    dy = case.dy.to(device, dtype).transpose(0, 1).unsqueeze(2)  # [N, T, 1, H]
    function = {"RNN": "elman", "LSTM": "lstm", "GRU": "gru"}[row.cell]

    def forward() -> torch.Tensor:
        inputs = linear(x, weight).view(w.batch, w.steps, *shape)
        states, _ = flashrnn(
            inputs,
            recurrent,
            bias,
            function=function,
            backend=backend,
            dtype=str(dtype).removeprefix("torch."),
        )
        return states[0]

    return call_of(row, forward, dy, (x, weight, recurrent, bias))


def haste_call(row: Row, case: Case, device: torch.device) -> timing.Call:
    """haste has LSTM and GRU in float32."""
    import haste_pytorch

    w = row.workload
    module = getattr(haste_pytorch, row.cell)(w.input_size, w.hidden_size).to(device)
    x = case.x.to(device).requires_grad_()
    return call_of(row, lambda: module(x)[0], case.dy.to(device), [x, *module.parameters()])


def episodes(w: Workload) -> torch.Tensor:
    """Where an episode begins, bool [T, N]: at every 64th step on average."""
    chances = torch.rand(w.steps, w.batch, generator=torch.Generator().manual_seed(0), device="cpu")
    return chances < 1 / 64


def reset_call(row: Row, case: Case, device: torch.device) -> timing.Call:
    """Ours with episodes that begin within the sequence."""
    side = case.side(rnnkern, PRECISIONS[row.dtype].dtype, device)
    reset = episodes(row.workload).to(device)
    leaves = [side.x, *side.module.parameters()]
    return call_of(row, lambda: side.module(side.x, reset=reset)[0], side.dy, leaves)


def torchrl_call(row: Row, case: Case, device: torch.device) -> timing.Call:
    """TorchRL, Triton kernels of LSTMModule and GRUModule: float32, or products of bfloat16."""
    from torchrl.modules.tensordict_module import _rnn_triton

    w, precision = row.workload, PRECISIONS[row.dtype]
    function = getattr(_rnn_triton, f"{row.cell.lower()}_triton")
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    weights = [case.state[name].to(device, copy=True).requires_grad_() for name in names]
    x = case.x.to(device).transpose(0, 1).contiguous().requires_grad_()  # [N, T, I]
    dy = case.dy.to(device).transpose(0, 1).contiguous()
    resets = episodes(w).to(device).transpose(0, 1).contiguous()
    zeros = torch.zeros(w.batch, w.steps, w.hidden_size, device=device)
    states = [zeros] * (2 if row.cell == "LSTM" else 1)
    multiplied = torch.bfloat16 if precision.dtype == torch.bfloat16 else torch.float32
    rounding = "tf32" if precision.tf32 else "ieee"

    def forward() -> torch.Tensor:
        return function(x, *states, *weights, resets, multiplied, input_precision=rounding)[0]

    return call_of(row, forward, dy, (x, *weights))


PEERS: dict[str, Callable[[Row, Case, torch.device], timing.Call]] = {
    "FlashRNN cuda_fused": lambda *a: flashrnn_call(*a, "cuda_fused"),
    "FlashRNN cuda": lambda *a: flashrnn_call(*a, "cuda"),
    "FlashRNN triton_fused": lambda *a: flashrnn_call(*a, "triton_fused"),
    "haste": haste_call,
    "rnnkern with resets": reset_call,
    "TorchRL with resets": torchrl_call,
}


def peer_call(name: str, row: Row, case: Case, device: torch.device) -> timing.Call | str:
    """The peer's call, which has run once, or the reason why there is none."""
    try:
        call = PEERS[name](row, case, device)
        call()
    except Exception as error:  # whatever their compilers and checks may raise
        return f"{type(error).__name__}: {error}".splitlines()[0][:300]
    return call


def calls_for(
    row: Row, case: Case, ours: Side, device: torch.device, tiers: Iterable[str]
) -> dict[str, timing.Call]:
    """Our call, torch.nn's, and our calls on the tiers that the plan has not chosen."""
    calls = {
        OURS: ours.call(row.pass_name),
        THEIRS: case.side(nn, PRECISIONS[row.dtype].dtype, device).call(row.pass_name),
    }
    for tier in TIERS:
        if any(chosen != tier for chosen in tiers):
            calls[f"{OURS} {tier}"] = in_tier(tier, ours.call(row.pass_name))
    return calls


def measure(
    row: Row, case: Case, device: torch.device, share_s: float, peers: Iterable[str] = ()
) -> dict[str, Any]:
    """Median times of a call in microseconds, and of the ratios within a round."""
    with tf32_allowed(PRECISIONS[row.dtype].tf32), grad_mode(row.pass_name):
        ours = case.side(rnnkern, PRECISIONS[row.dtype].dtype, device)
        plan = plan_of(row, ours.module, ours.x)
        calls = calls_for(row, case, ours, device, plan.get("tiers", ()))
        failed = {}
        for name in peers:
            made = peer_call(name, row, case, device)
            if isinstance(made, str):
                failed[name] = made
            else:
                calls[name] = made
        seconds = dict(
            zip(
                calls,
                timing.time_in_turn(
                    list(calls.values()),
                    budget_s=share_s,
                    min_rounds=FEWEST_ROUNDS,
                    clock=timing.clock_of(device),
                ),
                strict=True,
            )
        )
    us = {name: statistics.median(samples) * 1e6 for name, samples in seconds.items()}
    ratios = {
        name: statistics.median(t / o for o, t in zip(seconds[OURS], samples, strict=True))
        for name, samples in seconds.items()
        if name != OURS
    }
    per_step = us[OURS] / row.workload.steps
    result = {
        "cudnn": cudnn_regimes(row),
        "us": us[OURS],
        "torch_us": us[THEIRS],
        "speedup": ratios[THEIRS],
        "us_per_step": per_step,
        "rounds": len(seconds[OURS]),
        "others": {n: {"us": us[n], "speedup": ratios[n]} for n in us if n not in (OURS, THEIRS)},
    }
    if failed:
        result["failed_peers"] = failed
    if plan:
        result |= plan | {"of_expected": plan["expected_us_per_step"] / per_step}
    return result


def header(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    on_gpu = device.type == "cuda"
    cudnn: Any = torch.backends.cudnn
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else timing.cpu_name(),
        "driver": timing.gpu_driver() if on_gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn.version() if on_gpu else None,
        "rnnkern": rnnkern.__version__,
        "built_for_cuda": rnnkern.build_info()["cuda"],
        "commit": os.environ.get("COMMIT") or timing.commit(),
    }


def sticky_error(device: torch.device) -> bool:
    """Whether an error has broken CUDA for the rest of the process."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def run(
    wanted: list[Row],
    device: torch.device,
    seconds: float,
    peers: Iterable[str] = (),
    first: int = 0,
) -> Iterator[dict[str, Any]]:
    """The results from row ``first`` on, as they come. Rows for which no time is left are counted.

    After a sticky error there is no further one.
    """
    start = perf_counter()
    draw = lru_cache(maxsize=None)(draw_case)  # the same numbers for every dtype
    for index in range(first, len(wanted)):
        row = wanted[index]
        left = seconds - (perf_counter() - start)
        if left <= 0:
            yield {"not_measured": len(wanted) - index}
            return
        share_s = left / (len(wanted) - index) / 4  # the rest goes into warming up
        is_broken = False
        try:
            result = measure(row, draw(row.cell, row.workload), device, share_s, peers)
        except RuntimeError as error:  # out of memory, or a case that cuDNN refuses
            is_broken = sticky_error(device)
            result = {"failed": str(error).splitlines()[0], "sticky": is_broken}
        yield {"row": index, "device": device.type} | row.as_json() | result
        if is_broken:
            return


def main() -> int:
    """Reads the command line and writes the file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("file", type=Path, help="lines of JSON are written there")
    parser.add_argument("--seconds", type=float, default=300.0, metavar="S", help="for all rows")
    parser.add_argument("--row-seconds", type=float, metavar="S", help="end if one takes longer")
    parser.add_argument("--from-row", type=int, default=0, metavar="N", help="append to the file")
    parser.add_argument("--sweeps", action="store_true", help="the sweeps behind the workloads")
    parser.add_argument("--peers", action="store_true", help="time the peers too")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    for option in ("workload", "dtype", "cell"):
        parser.add_argument(f"--{option}", action="append", default=[], help="only; repeatable")
    arguments = parser.parse_args()
    device: torch.device = arguments.device
    chosen = rows(arguments.workload, arguments.dtype, arguments.cell)
    if arguments.sweeps:
        chosen += swept_rows()
    peers = PEERS if arguments.peers else ()

    def watch() -> None:
        if arguments.row_seconds:
            faulthandler.dump_traceback_later(arguments.row_seconds, exit=True)

    result: dict[str, Any] = {}
    with arguments.file.open("a" if arguments.from_row else "w", encoding="utf-8") as file:

        def write(result: dict[str, Any]) -> None:
            line = json.dumps(result)
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()

        watch()
        if not arguments.from_row:
            write(header(device))
        for result in run(chosen, device, arguments.seconds, peers, arguments.from_row):
            write(result)
            watch()
    faulthandler.cancel_dump_traceback_later()
    return STICKY if result.get("sticky") else 0


if __name__ == "__main__":
    sys.exit(main())
