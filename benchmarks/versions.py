"""Compares two versions of rnnkern: this checkout and another one that has been built.

    python -m benchmarks.versions ../other [--cell LSTM,GRUCell] [--workload notebook,step_h20]
        [--pass forward,forward-backward] [--threads 1,2] [--seconds 1]

Each version runs in a process of its own, and they are timed in turn. The threads of the idle
process spin for a while, so with several threads 25 ms of untimed calls come before each sample.
The speed-up is the median of other / this over neighbouring samples, with the quartiles in
brackets. Modules, inputs and passes are those of ``rnnkern compare``.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

HERE = Path(__file__).resolve().parents[1]
# Seconds of untimed calls before a sample, and of a sample.
OF_ONE_THREAD, OF_SEVERAL_THREADS = (0.0, 2e-3), (25e-3, 25e-3)


def serve() -> None:
    """Makes the calls that stdin asks for, one line of JSON each, and answers with seconds."""
    import gc

    import torch

    import rnnkern

    def prepare(kind: str, *, T: int, N: int, I: int, H: int, is_step: bool, backward: bool) -> Any:
        torch.manual_seed(0)
        module = getattr(rnnkern, kind)(I, H)
        shape = (N,) if is_step else (T, N)
        x = torch.randn(*shape, I, requires_grad=True)
        dy = torch.randn(*shape, H)
        count = (2 if kind == "LSTMCell" else 1) if is_step else 0
        states = [torch.randn(N, H, requires_grad=True) for _ in range(count)]
        operands = (x, states[0] if count == 1 else tuple(states)) if count else (x,)
        leaves = [x, *states, *module.parameters()]

        def both() -> None:
            for leaf in leaves:
                leaf.grad = None
            made = module(*operands)
            (made[0] if isinstance(made, tuple) else made).backward(dy)

        return both if backward else lambda: module(*operands)

    print(Path(rnnkern.__file__).parent, flush=True)
    gc.disable()
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    call: Any = None
    count, warm_s = 1, 0.0
    for line in sys.stdin:
        asked = json.loads(line)
        if "kind" in asked:
            threads = asked.pop("threads")
            torch.set_num_threads(threads)
            warm_s, sample_s = OF_SEVERAL_THREADS if threads > 1 else OF_ONE_THREAD
            if hasattr(os, "sched_setaffinity"):  # both on the same CPUs, which differ in speed
                os.sched_setaffinity(0, cpus[:threads])
            torch.set_grad_enabled(asked.pop("grad"))
            call = prepare(**asked)
            call()
            start = perf_counter()
            call()
            count = max(1, round(sample_s / (perf_counter() - start)))
        warm_until = perf_counter() + warm_s
        while perf_counter() < warm_until:
            call()
        start = perf_counter()
        for _ in range(count):
            call()
        print((perf_counter() - start) / count, flush=True)


class Version:
    """A process with the package of a checkout."""

    def __init__(self, checkout: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(checkout)}
        command = [sys.executable, str(Path(__file__).resolve()), "--serve"]
        self.process = subprocess.Popen(
            command,
            env=environment,
            cwd=checkout,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.process.stdout
        loaded = self.process.stdout.readline().strip()
        if Path(loaded) != checkout / "rnnkern":
            raise SystemExit(f"the process has loaded {loaded}, wanted {checkout / 'rnnkern'}")

    def ask(self, **what: Any) -> float:
        assert self.process.stdin
        assert self.process.stdout
        print(json.dumps(what), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"the process ended: {self.process.args}")
        return float(answer)


def main() -> None:
    from rnnkern.bench import timing
    from rnnkern.bench.workloads import (
        FORWARD,
        FORWARD_BACKWARD,
        FORWARD_GRAD,
        load_step_workloads,
        load_workloads,
    )

    passes = {
        "forward": FORWARD,
        "forward-grad": FORWARD_GRAD,
        "forward-backward": FORWARD_BACKWARD,
    }
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of the other version, built")
    known = load_workloads() | load_step_workloads()
    parser.add_argument("--cell", default="RNN,LSTM,GRU,RNNCell,LSTMCell,GRUCell")
    parser.add_argument("--workload", default=",".join(known))
    parser.add_argument("--pass", dest="passes", default=",".join(passes))
    parser.add_argument("--threads", default="1")
    parser.add_argument(
        "--seconds",
        type=float,
        default=1.0,
        help="for a row; a pair of samples takes 4 ms, and 100 ms on several threads",
    )
    options = parser.parse_args()
    if not list((options.checkout / "rnnkern").glob("_C*.so")):
        parser.error(f"{options.checkout}: no built checkout of rnnkern")
    for name, given, wanted in (
        ("--cell", options.cell, {cell for w in known.values() for cell in w.cells}),
        ("--workload", options.workload, known),
        ("--pass", options.passes, passes),
    ):
        if unknown := sorted(set(given.split(",")) - set(wanted)):
            parser.error(f"{name}: unknown {unknown[0]!r}, known are: {', '.join(wanted)}")
    this, other = Version(HERE), Version(options.checkout.resolve())
    print(f"{timing.cpu_name()}; us a call\n")
    print(f"{'':22}{'pass':18}{'threads':>7}{'other':>10}{'this':>10}  speed-up")
    ratios: dict[str, list[float]] = {}
    for cell in options.cell.split(","):
        for name in options.workload.split(","):
            w = known[name]
            if cell not in w.cells:
                continue
            for threads in map(int, options.threads.split(",")):
                for pass_name in options.passes.split(","):
                    what = {
                        "kind": cell,
                        "T": w.steps,
                        "N": w.batch,
                        "I": w.input_size,
                        "H": w.hidden_size,
                        "is_step": w.is_step,
                        "backward": pass_name == "forward-backward",
                        "grad": pass_name != "forward",
                        "threads": threads,
                    }
                    for version in (this, other):
                        version.ask(**what)
                    samples: list[tuple[float, float]] = []
                    end = perf_counter() + options.seconds
                    while len(samples) < 5 or perf_counter() < end:
                        samples.append((other.ask(), this.ask()))
                    low, middle, high = statistics.quantiles(a / b for a, b in samples)
                    ratios.setdefault(pass_name, []).append(middle)
                    theirs, ours = (
                        statistics.median(side) * 1e6 for side in zip(*samples, strict=True)
                    )
                    print(
                        f"{cell:9}{name:13}{passes[pass_name]:18}{threads:7}{theirs:10.1f}{ours:10.1f}"
                        f"{middle:10.3f} ({low:.3f}, {high:.3f})",
                        flush=True,
                    )
    for pass_name, found in ratios.items():
        print(f"geometric mean, {passes[pass_name]}: {statistics.geometric_mean(found):.3f}")


if __name__ == "__main__":
    serve() if "--serve" in sys.argv else main()
