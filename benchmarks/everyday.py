"""Cases that people meet: packed batches, a very long sequence, a server, a busy machine.

    python -m benchmarks.everyday [--case packed,long,serving,busy] [--repeat 3]

``packed`` is the case of pytorch issue 149194: training an LSTM on a batch of sequences of very
different lengths, packed and padded. Its results, and those of ``long``, are checked before they
are timed.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from benchmarks import rows
from benchmarks.busy import busy_neighbour
from benchmarks.rows import OURS, Call, Effort, Row
from rnnkern import tolerance
from rnnkern.bench import timing
from rnnkern.bench.printer import duration

SERVING_S = 1.0
SERVERS = 4
PACKED_STEPS = (10, 30, 100, 300, 1000, 4000)
LONG_STEPS = 100_000
#: Calls that take longer than this many seconds have three samples, or one.
LONG_S, VERY_LONG_S = 1.0, 10.0
#: torch.nn is not timed on a packed batch if that would take longer: its time grows with L squared.
TOO_LONG_S = 60.0


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


def in_turn(calls: dict[str, Call], effort: Effort) -> dict[str, list[float]]:
    """As `rows.in_turn`, but with few samples of calls that take seconds."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            samples[name].append(timing.host_clock(call, 1))
        slowest = max(own[0] for own in samples.values())
        if slowest < LONG_S:
            return rows.in_turn(calls, effort)
        if slowest > VERY_LONG_S:
            break
    return samples


def packed(effort: Effort) -> Iterator[Row]:
    """N=32, I=H=128, lengths from 1 to L; forward and backward of the sum."""
    ours, theirs = pair("LSTM", 128, 128)
    exact = copy.deepcopy(theirs).double()

    def gradient(module: nn.Module, output: Tensor) -> Tensor:
        module.zero_grad()
        output.sum().backward()
        found = next(module.parameters()).grad
        assert found is not None
        return found

    before_L, before_s = 1, 0.0
    for L in PACKED_STEPS[: 2 if effort.quick else None]:
        x = torch.randn(L, 32, 128)
        lengths = torch.linspace(1, L, 32).long().flip(0)

        def by_packing(module: nn.Module, x: Tensor = x, lengths: Tensor = lengths) -> Tensor:
            return gradient(module, module(pack_padded_sequence(x, lengths))[0].data)

        def by_padding(module: nn.Module, x: Tensor = x) -> Tensor:
            return gradient(module, module(x)[0])

        def by_lengths(x: Tensor = x, lengths: Tensor = lengths) -> Tensor:
            return gradient(ours, ours(x, lengths=lengths)[0])

        # Packing takes torch.nn a minute at the largest L. No output within a row depends on what
        # follows its end, so the sum over a padded batch without its padding is the same.
        in_row = (torch.arange(L)[:, None] < lengths)[..., None]

        def by_mask(module: nn.Module, x: Tensor, in_row: Tensor = in_row) -> Tensor:
            return gradient(module, module(x)[0] * in_row)

        wanted = by_mask(theirs, x), by_mask(exact, x.double())
        check(by_packing(ours), *wanted)
        check(by_lengths(), *wanted)
        calls: dict[str, Call] = {
            "packed": functools.partial(by_packing, ours),
            "lengths=": by_lengths,
            "padded": functools.partial(by_padding, ours),
            "torch.nn packed": functools.partial(by_packing, theirs),
            "torch.nn padded": functools.partial(by_padding, theirs),
        }
        if before_s * (L / before_L) ** 2 > TOO_LONG_S:
            del calls["torch.nn packed"]
        samples = in_turn(calls, effort)
        if "torch.nn packed" in samples:
            before_L, before_s = L, min(samples["torch.nn packed"])
        speedup = {
            f"{own} over {other}": rows.ratio(samples, own, other)
            for own, other in (
                ("packed", "torch.nn packed"),
                ("lengths=", "torch.nn packed"),
                ("lengths=", "torch.nn padded"),
                ("padded", "torch.nn padded"),
            )
            if other in samples
        }
        yield rows.row(
            "packed and padded",
            f"training an LSTM, N=32 H=128 L={L}",
            samples,
            "packed",
            speedup=speedup,
            shown=list(samples),
        )


def beside(case: str, ours: list[float], theirs: list[float]) -> Row:
    return rows.row("more cases", case, {OURS: ours, "torch.nn": theirs})


def long(effort: Effort) -> Iterator[Row]:
    """T=LONG_STEPS, N=1, I=H=16, inference."""
    ours, theirs = pair("GRU", 16, 16)
    x = torch.randn(LONG_STEPS, 1, 16)
    with torch.no_grad():
        check(ours(x)[0], theirs(x)[0], copy.deepcopy(theirs).double()(x.double())[0])
        samples = in_turn({OURS: lambda: ours(x), "torch.nn": lambda: theirs(x)}, effort)
        yield beside(f"GRU of {LONG_STEPS} steps, N=1 H=16", *samples.values())


def serving(effort: Effort) -> Iterator[Row]:
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
        samples = [[serve(module) for module in modules] for _ in range(effort.rounds)]
    ours_s, theirs_s = map(list, zip(*samples, strict=True))
    yield beside("four Python threads serve an LSTM, T=30 N=1 H=256", ours_s, theirs_s)


def busy(effort: Effort) -> Iterator[Row]:
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
                [timing.host_clock(c, count) / count for c in own] for _ in range(effort.rounds + 1)
            ]
            ours_s, theirs_s = map(list, zip(*samples[1:], strict=True))  # the first one warms up
            yield beside(name, ours_s, theirs_s)


CASES: dict[str, Callable[[Effort], Iterator[Row]]] = {
    "packed": packed,
    "long": long,
    "serving": serving,
    "busy": busy,
}


def everyday(effort: Effort) -> Iterator[Row]:
    """All cases."""
    for rows_of_case in CASES.values():
        yield from rows_of_case(effort)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--case", default=",".join(CASES), help=f"some of {','.join(CASES)}")
    parser.add_argument("--repeat", type=int, default=3, help="samples of each, in turn")
    args = parser.parse_args(arguments)
    unknown = [name for name in args.case.split(",") if name not in CASES]
    if unknown or args.repeat < 1:
        parser.error(f"--case: some of {','.join(CASES)}, got {args.case}; --repeat: 1 or more")
    print(f"{timing.cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}\n")
    for name in args.case.split(","):
        for made in CASES[name](Effort(0, args.repeat)):
            times = "  ".join(f"{k} {duration(us).strip()}" for k, us in made["us"].items())
            ratios = "  ".join(f"{k} {value:.1f}x" for k, value in made["speedup"].items())
            print(f"{made['case']}: {times}; {ratios}", flush=True)


if __name__ == "__main__":
    main()
