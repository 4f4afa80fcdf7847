"""Layers at the named workloads, beside torch.nn, the peers and the limits of the machine.

Inference in float32 is compared with every peer and with frozen layers (`benchmarks.frozen`), all
in the same rounds. Forward+backward, and both passes in bfloat16, are compared with torch.nn. So
are the modules of a single step in every type, and both passes while one of T, N and H grows.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import torch

from benchmarks import frozen, peers, rows
from benchmarks.rows import OURS, Effort, Row, Samples
from rnnkern.bench import compare, timing
from rnnkern.bench.workloads import (
    CELLS,
    FORWARD,
    FORWARD_BACKWARD,
    GATES,
    STEP_CELLS,
    STEP_PRECISIONS,
    Workload,
    check_case,
    draw_case,
    flops,
    grad_mode,
    load_step_workloads,
    load_workloads,
)

TITLES = {FORWARD: "inference", FORWARD_BACKWARD: "forward and backward"}

# One of T, N and H grows, the others stay the same.
SWEEP_BASE = {"steps": 64, "batch": 16, "input_size": 128, "hidden_size": 128}
SWEEPS = {
    "steps": (1, 2, 4, 16, 64, 256, 1024),
    "batch": (1, 2, 4, 8, 16, 24, 32, 64, 128, 300),
    "hidden_size": (8, 16, 24, 32, 64, 65, 128, 129, 200, 256, 512, 650, 1024),
}

PRODUCT = "matrix product"
# The limits are measured with matrix products of these m, k, n, and a copy of this many floats.
PRODUCTS = ((512, 512, 512), (1024, 1024, 1024), (64, 1024, 4096), (256, 1024, 1024))
COPIED = 2**26


@dataclass(frozen=True)
class Limits:
    """The limits of the machine: its best matrix product in a dtype, and the GB/s of a copy."""

    sizes: tuple[int, int, int]
    dtype: torch.dtype
    gflops: float
    gbytes: float

    def product(self) -> timing.Call:
        """The matrix product as a call."""
        m, k, n = self.sizes
        a, b = (torch.randn(*shape).to(self.dtype) for shape in ((m, k), (k, n)))
        out = torch.empty(m, n, dtype=self.dtype)
        return lambda: torch.mm(a, b, out=out)

    def seconds(self, cell: str, w: Workload, pass_name: str, product_s: float) -> float:
        """The longer of its products at full speed, and its tensors moved once from memory.

        Full speed is that of the matrix product, which takes ``product_s`` seconds. Small tensors
        stay in the caches and may be faster than memory.

        Backward reads what forward read and wrote, and writes as many gradients.
        """
        weights = GATES[cell] * w.hidden_size * (w.input_size + w.hidden_size)
        moved = self.dtype.itemsize * (weights + w.steps * w.batch * (w.input_size + w.hidden_size))
        times = 3 if pass_name == FORWARD_BACKWARD else 1
        products = flops(cell, w, pass_name) / _flops_of(self.sizes) * product_s
        return max(products, times * moved / (self.gbytes * 1e9))


def _flops_of(sizes: tuple[int, int, int]) -> float:
    return 2.0 * math.prod(sizes)


def measure_limits(dtype: torch.dtype, quick: bool) -> Limits:
    """The best of several shapes and runs, because a limit is not an average."""
    budget_s = 0.1 if quick else 1.0
    found = []
    for sizes in PRODUCTS:
        call = Limits(sizes, dtype, 0.0, 0.0).product()
        seconds = min(timing.time_in_turn([call], budget_s=budget_s, min_rounds=3)[0])
        found.append((1e-9 * _flops_of(sizes) / seconds, sizes))
    source, target = torch.randn(COPIED), torch.empty(COPIED)
    copies = timing.time_in_turn([lambda: target.copy_(source)], budget_s=budget_s, min_rounds=3)
    gflops, sizes = max(found)
    return Limits(sizes, dtype, gflops, 2e-9 * source.nbytes / min(copies[0]))


def measure(
    pass_name: str, cell: str, workload: Workload, limits: Limits, effort: Effort
) -> Iterator[Row]:
    """The row of a layer; of inference in float32 also that of its frozen forms."""
    case, threads = draw_case(cell, workload), torch.get_num_threads()
    is_float32 = limits.dtype == torch.float32
    if pass_name == FORWARD and is_float32:
        with torch.no_grad():
            calls = frozen.calls_of(case, threads)
            frozen.check(case, calls)
    else:
        calls = peers.module_calls(case, pass_name, limits.dtype)
    with grad_mode(pass_name):
        samples = rows.in_turn(calls | {PRODUCT: limits.product()}, effort)
    products = samples.pop(PRODUCT)
    dtype = str(limits.dtype).removeprefix("torch.")
    yield rows.row(
        f"{dtype}, {TITLES[pass_name]}, threads: {threads}",
        case_of(cell, workload),
        {name: own for name, own in samples.items() if name not in frozen.NOT_FLOAT32},
        group=cell,
        of_limit=of_limit(limits, cell, workload, pass_name, products, samples),
    )
    if frozen.FLOAT32 in samples:
        yield frozen.row_of("inference", case_of(cell, workload), samples) | {"group": cell}


def of_limit(
    limits: Limits,
    cell: str,
    workload: Workload,
    pass_name: str,
    products: list[float],
    samples: Samples,
) -> float:
    """The time of the limits over ours, products at their speed in the same round."""
    return statistics.median(
        limits.seconds(cell, workload, pass_name, full_speed) / own
        for full_speed, own in zip(products, samples[OURS], strict=True)
    )


def case_of(cell: str, w: Workload) -> str:
    steps = "" if w.is_step else f"T{w.steps} "
    return f"{cell} {w.name}, {steps}N{w.batch} I{w.input_size} H{w.hidden_size}"


def checked(
    title: str,
    cell: str,
    workload: Workload,
    effort: Effort,
    dtype: torch.dtype = torch.float32,
    case_name: str = "",
) -> Iterator[Row]:
    """A row of each pass, after a check of all that it computes.

    Inference of a layer in float32 is compared with the peers too. A case that fails its check is
    not timed. Its row says so, and has no numbers.
    """
    case, threads = draw_case(cell, workload), torch.get_num_threads()
    case_name = case_name or case_of(cell, workload)
    wrong = [f"{k}: {v}" for k, v in check_case(case, dtype).items() if not v]
    for pass_name, pass_title in TITLES.items():
        table = f"{title}, {pass_title}, threads: {threads}"
        if wrong:
            failed = f"{case_name}: not timed, because of {wrong[0]}"
            yield {"table": table, "case": failed, "us": {}, "speedup": {}, "group": cell}
            continue
        with_peers = pass_name == FORWARD and cell in CELLS and dtype == torch.float32
        calls = (
            peers.calls(case, threads) if with_peers else peers.module_calls(case, pass_name, dtype)
        )
        with grad_mode(pass_name):
            samples = rows.in_turn(calls, effort)
        yield rows.row(table, case_name, samples, group=cell)


def cells(effort: Effort) -> Iterator[Row]:
    """Every module of a single step at each of its workloads, in every type of the CPU."""
    workloads = list(load_step_workloads().values())[: 1 if effort.quick else None]
    for own in STEP_PRECISIONS[: 2 if effort.quick else None]:
        for cell, workload in product(STEP_CELLS, workloads):
            yield from checked(f"cells, {own.name}", cell, workload, effort, own.dtype)


def layers(effort: Effort, threads: Iterable[int]) -> Iterator[Row]:
    """Every cell at every workload, both passes, in float32 and in bfloat16."""
    workloads = tuple(load_workloads().values())
    if effort.quick:
        workloads = compare.quick_workloads(workloads, "cpu")[:2]
    for count, dtype in product(threads, (torch.float32, torch.bfloat16)):
        with timing.threads_set(count):
            limits = measure_limits(dtype, effort.quick)
            yield {
                "table": f"the machine, threads: {count}",
                "case": f"torch.mm in {str(dtype).removeprefix('torch.')}, and a copy",
                "us": {},
                "speedup": {"GFLOP/s": limits.gflops, "GB/s": limits.gbytes},
            }
            for pass_name, cell, workload in product(TITLES, CELLS, workloads):
                yield from measure(pass_name, cell, workload, limits, effort)


def sweeps(effort: Effort) -> Iterator[Row]:
    """Both passes of each cell while one size grows, on one thread: sizes are the question here."""
    with timing.threads_set(1):
        for (name, values), cell, pass_name in product(SWEEPS.items(), CELLS, TITLES):
            for value in values[:2] if effort.quick else values:
                sizes = SWEEP_BASE | {name: value}
                if name == "hidden_size":
                    sizes["input_size"] = value
                case = draw_case(cell, Workload(f"{name}={value}", **sizes))
                calls = (
                    peers.calls(case, 1)
                    if pass_name == FORWARD
                    else peers.module_calls(case, pass_name)
                )
                with grad_mode(pass_name):
                    samples = rows.in_turn(calls, effort)
                yield rows.row(f"{cell}, {pass_name}", f"{name}={value}", samples) | {
                    "sweep": name,
                    "value": value,
                    "pass": pass_name,
                    "cell": cell,
                }
