"""Cases that people meet: packed batches, a very long sequence, a server, a busy machine.

    python -m benchmarks.everyday [--case packed,long,serving,busy] [--repeat 3]

``packed`` is the case of pytorch issue 149194: training an LSTM on a batch of sequences of very
different lengths. Its results, and those of ``long``, are checked before they are timed.
"""

from __future__ import annotations

import argparse
import copy
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from time import perf_counter, sleep

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import tolerance
from rnnkern.bench import timing
from rnnkern.bench.printer import duration
from rnnkern.bench.timing import PairTiming

Call = Callable[[], object]
SERVING_S = 1.0
SERVERS = 4
PACKED_STEPS, LONG_STEPS = 1000, 100_000


def pair(kind: str, *sizes: int) -> tuple[nn.Module, nn.Module]:
    """Ours and torch.nn's module, with the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*sizes)
    ours = getattr(rnnkern, kind)(*sizes)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def check(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    verdict = tolerance.check(ours, theirs, exact)
    if not verdict:
        raise SystemExit(f"wrong results: {verdict}")


def in_turn(ours: Call, theirs: Call, repeat: int) -> PairTiming:
    return timing.time_pair(ours, theirs, budget_s=0, min_pairs=repeat)


def packed(repeat: int) -> Iterator[tuple[str, PairTiming]]:
    """N=32, I=H=128, lengths from 1 to L=PACKED_STEPS; forward and backward of the sum."""
    ours, theirs = pair("LSTM", 128, 128)
    exact = copy.deepcopy(theirs).double()
    x = torch.randn(PACKED_STEPS, 32, 128)
    lengths = torch.linspace(1, PACKED_STEPS, 32).long().flip(0)

    def gradient(module: nn.Module, output: Tensor) -> Tensor:
        module.zero_grad()
        output.sum().backward()
        found = next(module.parameters()).grad
        assert found is not None
        return found

    def by_packing(module: nn.Module, x: Tensor = x) -> Tensor:
        return gradient(module, module(pack_padded_sequence(x, lengths))[0].data)

    def by_lengths() -> Tensor:
        return gradient(ours, ours(x, lengths=lengths)[0])

    wanted = by_packing(theirs), by_packing(exact, x.double())
    check(by_packing(ours), *wanted)
    check(by_lengths(), *wanted)
    yield (
        f"training on a PackedSequence, LSTM N=32 H=128 L={PACKED_STEPS}",
        in_turn(lambda: by_packing(ours), lambda: by_packing(theirs), repeat),
    )
    yield (
        "the same, torch.nn packed, ours with lengths=",
        in_turn(by_lengths, lambda: by_packing(theirs), repeat),
    )


def long(repeat: int) -> Iterator[tuple[str, PairTiming]]:
    """T=LONG_STEPS, N=1, I=H=16, inference."""
    ours, theirs = pair("GRU", 16, 16)
    x = torch.randn(LONG_STEPS, 1, 16)
    with torch.no_grad():
        check(ours(x)[0], theirs(x)[0], copy.deepcopy(theirs).double()(x.double())[0])
        yield (
            f"GRU of {LONG_STEPS} steps, N=1 H=16",
            in_turn(lambda: ours(x), lambda: theirs(x), repeat),
        )


def serving(repeat: int) -> Iterator[tuple[str, PairTiming]]:
    """Four Python threads, each with calls of its own, torch on one thread; seconds a call."""
    modules = pair("LSTM", 100, 256)
    x = torch.randn(30, 1, 100)

    def serve(module: nn.Module) -> float:
        def calls() -> int:
            count, end = 0, perf_counter() + SERVING_S
            with torch.inference_mode():
                while perf_counter() < end:
                    module(x)
                    count += 1
            return count

        with ThreadPoolExecutor(SERVERS) as pool:
            jobs = [pool.submit(calls) for _ in range(SERVERS)]
            return SERVING_S / sum(job.result() for job in jobs)

    with timing.threads_set(1):
        samples = [[serve(module) for module in modules] for _ in range(repeat)]
    ours_s, theirs_s = map(list, zip(*samples, strict=True))
    yield "four Python threads serve an LSTM, T=30 N=1 H=256", PairTiming(ours_s, theirs_s)


@contextmanager
def busy_neighbour() -> Iterator[None]:
    """Another process computes all the time."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        sleep(0.2)
        yield
    finally:
        process.kill()
        process.wait()


def busy(repeat: int) -> Iterator[tuple[str, PairTiming]]:
    """One step of a stream and one training step, beside a busy process.

    A sample has many of them, because the neighbour takes a CPU for milliseconds at a time.
    """
    modules = pair("LSTM", 64, 256)
    step = torch.randn(1, 1, 64)
    batch = torch.randn(28, 64, 64)

    def infer(module: nn.Module) -> None:
        with torch.no_grad():
            module(step)

    def train(module: nn.Module) -> None:
        module.zero_grad()
        module(batch)[0].sum().backward()

    with busy_neighbour():
        for name, call, count in (
            ("one step of an LSTM, H=256, beside a busy process", infer, 200),
            ("training step of an LSTM, T=28 N=64 H=256, beside a busy process", train, 10),
        ):
            own = [functools.partial(call, module) for module in modules]
            samples = [
                [timing.host_clock(c, count) / count for c in own] for _ in range(repeat + 1)
            ]
            ours_s, theirs_s = map(list, zip(*samples[1:], strict=True))  # the first one warms up
            yield name, PairTiming(ours_s, theirs_s)


CASES = {"packed": packed, "long": long, "serving": serving, "busy": busy}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--repeat", type=int, default=3, help="samples of each, in turn")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.case.split(",") if name not in CASES]
    if unknown or args.repeat < 1:
        parser.error(f"--case: some of {','.join(CASES)}, got {args.case}; --repeat: 1 or more")
    print(f"{timing.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| case | torch.nn | rnnkern | speed-up |\n|---|---|---|---|")
    for name in args.case.split(","):
        for case, found in CASES[name](args.repeat):
            theirs, ours = (duration(us).strip() for us in (found.their_us, found.us))
            print(f"| {case} | {theirs} | {ours} | {found.speedup:.1f}x |", flush=True)


if __name__ == "__main__":
    main()
