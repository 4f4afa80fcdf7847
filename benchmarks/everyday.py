"""Cases that people meet: packed batches, a very long sequence, a server, a busy machine.

    python -m benchmarks.everyday [--case packed,long,serving,busy] [--repeat 3]

``packed`` is the case of pytorch issue 149194: training an LSTM on a batch of sequences of very
different lengths. Both libraries run in turn, and their results are compared before.
"""

from __future__ import annotations

import argparse
import statistics
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
from rnnkern.bench import timing

Call = Callable[[], object]
SERVING_S = 1.0
SERVERS = 4
PACKED_STEPS, LONG_STEPS = 1000, 100_000


def pair(kind: str, *sizes: int) -> tuple[nn.Module, nn.Module]:
    """torch.nn's module and ours, with the same parameters."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*sizes)
    ours = getattr(rnnkern, kind)(*sizes)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def expect_agreement(ours: Tensor, theirs: Tensor, what: str) -> None:
    """Raises if two results differ by more than rounding explains."""
    distance = (ours - theirs).abs().max().item()
    scale = max(theirs.abs().max().item(), 1e-30)
    if not distance <= 1e-4 * scale:
        raise ArithmeticError(f"{what}: the results differ by {distance:.3g}, of {scale:.3g}")


def seconds(call: Call) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start


def in_turn(theirs: Call, ours: Call, repeat: int) -> tuple[float, float]:
    """Median seconds of both, one after the other."""
    ours()  # loads what it needs
    samples = [(seconds(theirs), seconds(ours)) for _ in range(repeat)]
    first, second = zip(*samples, strict=True)
    return statistics.median(first), statistics.median(second)


def packed(repeat: int) -> Iterator[tuple[str, float, float]]:
    """N=32, I=H=128, lengths from 1 to L=PACKED_STEPS; forward and backward of the sum."""
    theirs, ours = pair("LSTM", 128, 128)
    x = torch.randn(PACKED_STEPS, 32, 128)
    lengths = torch.linspace(1, PACKED_STEPS, 32).long().flip(0)

    def train(module: nn.Module, run: Callable[[], Tensor]) -> Tensor:
        module.zero_grad()
        run().sum().backward()
        gradient = next(module.parameters()).grad
        assert gradient is not None
        return gradient

    def by_packing(module: nn.Module) -> Tensor:
        return train(module, lambda: module(pack_padded_sequence(x, lengths))[0].data)

    def by_lengths() -> Tensor:
        return train(ours, lambda: ours(x, lengths=lengths)[0])

    wanted = by_packing(theirs)
    expect_agreement(by_packing(ours), wanted, "packed")
    expect_agreement(by_lengths(), wanted, "lengths=")
    yield (
        f"training on a PackedSequence, LSTM N=32 H=128 L={PACKED_STEPS}",
        *in_turn(lambda: by_packing(theirs), lambda: by_packing(ours), repeat),
    )
    yield (
        "the same, torch.nn packed, ours with lengths=",
        *in_turn(lambda: by_packing(theirs), by_lengths, repeat),
    )


def long(repeat: int) -> Iterator[tuple[str, float, float]]:
    """T=LONG_STEPS, N=1, I=H=16, inference."""
    theirs, ours = pair("GRU", 16, 16)
    x = torch.randn(LONG_STEPS, 1, 16)
    with torch.no_grad():
        expect_agreement(ours(x)[0], theirs(x)[0], "long")
        yield (
            f"GRU of {LONG_STEPS} steps, N=1 H=16",
            *in_turn(lambda: theirs(x), lambda: ours(x), repeat),
        )


def serving(repeat: int) -> Iterator[tuple[str, float, float]]:
    """Four Python threads, each with calls of its own, torch on one thread; seconds a call."""
    theirs, ours = pair("LSTM", 100, 256)
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
            return SERVING_S / sum(
                job.result() for job in [pool.submit(calls) for _ in range(SERVERS)]
            )

    with timing.threads_set(1):
        samples = [(serve(theirs), serve(ours)) for _ in range(repeat)]
    first, second = zip(*samples, strict=True)
    yield (
        "four Python threads serve an LSTM, T=30 N=1 H=256",
        statistics.median(first),
        statistics.median(second),
    )


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


def busy(repeat: int) -> Iterator[tuple[str, float, float]]:
    """One step of a stream and one training step, beside a busy process."""
    theirs, ours = pair("LSTM", 64, 256)
    step = torch.randn(1, 1, 64)
    batch = torch.randn(28, 64, 64)

    def infer(module: nn.Module) -> Call:
        def run() -> None:
            with torch.no_grad():
                for _ in range(200):
                    module(step)

        return run

    def train(module: nn.Module) -> Call:
        def run() -> None:
            for _ in range(10):
                module.zero_grad()
                module(batch)[0].sum().backward()

        return run

    with busy_neighbour():
        for name, calls, count in (
            ("one step of an LSTM, H=256, beside a busy process", infer, 200),
            ("training step of an LSTM, T=28 N=64 H=256, beside a busy process", train, 10),
        ):
            first, second = in_turn(calls(theirs), calls(ours), repeat)
            yield name, first / count, second / count


CASES = {"packed": packed, "long": long, "serving": serving, "busy": busy}


def human(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.2f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.1f} µs"


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
        for case, theirs, ours in CASES[name](args.repeat):
            print(
                f"| {case} | {human(theirs)} | {human(ours)} | {theirs / ours:.1f}x |", flush=True
            )


if __name__ == "__main__":
    main()
