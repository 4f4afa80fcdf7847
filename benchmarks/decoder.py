"""A decoder: 100 steps of a cell with attention between them, and one backward pass.

    python -m benchmarks.decoder [--threads N] [--autocast] [--seconds S]

What a step costs in a loop, where autograd sums the gradients that every step has for the same
weights, and under ``--autocast``, where all steps of a pass are in one region. Both libraries are
timed in turn.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterable, Iterator
from itertools import product
from types import ModuleType

import torch
from torch import Tensor, nn

import rnnkern
from benchmarks import rows
from benchmarks.rows import OURS, Effort, Row
from rnnkern import tolerance
from rnnkern.bench import timing
from rnnkern.bench.workloads import STEP_CELLS

STEPS, SOURCE, EMBEDDING = 100, 50, 128
SIZES = ((1, 128), (16, 256), (64, 512), (16, 1024))
"""Rows of the batch, and hidden units. The last are those of Tacotron 2."""


class Decoder(nn.Module):
    """Each step attends to the source, and reads the result together with the next embedding."""

    def __init__(self, library: ModuleType, kind: str, hidden: int) -> None:
        super().__init__()
        self.cell = getattr(library, kind)(EMBEDDING + hidden, hidden)
        self.is_lstm = kind == "LSTMCell"

    def forward(self, embedded: Tensor, source: Tensor) -> Tensor:
        """``[T, N, EMBEDDING]`` and ``[N, S, H]`` to ``[T, N, H]``."""
        h = source.new_zeros(source.shape[0], source.shape[2])
        state = (h, h) if self.is_lstm else h
        made = []
        for step in embedded:
            scores = (source @ h.unsqueeze(2)).squeeze(2) / h.shape[1] ** 0.5
            weights = torch.softmax(scores, 1)
            seen = (weights.unsqueeze(1) @ source).squeeze(1)
            state = self.cell(torch.cat((step, seen), 1), state)
            h = state[0] if self.is_lstm else state
            made.append(h)
        return torch.stack(made)


def calls(
    model: Decoder, embedded: Tensor, source: Tensor, autocast: bool
) -> tuple[Callable[[], object], ...]:
    """The calls for inference and for forward+backward."""

    def run() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(embedded, source).float()

    def inference() -> None:
        with torch.no_grad():
            run()

    def training() -> None:
        model.zero_grad()
        run().square().mean().backward()

    return inference, training


def check(ours: Decoder, theirs: Decoder, embedded: Tensor, source: Tensor) -> None:
    """Checks outputs and gradients by the rule for layers, against torch.nn in float64."""

    def results(model: Decoder, *operands: Tensor) -> list[Tensor]:
        made = model(*operands)
        gradients = torch.autograd.grad(made.square().mean(), list(model.parameters()))
        return [made.detach(), *gradients]

    exact = results(copy.deepcopy(theirs).double(), embedded.double(), source.double())
    pairs = zip(
        results(ours, embedded, source), results(theirs, embedded, source), exact, strict=True
    )
    for found in pairs:
        verdict = tolerance.check(*found)
        if not verdict:
            raise SystemExit(f"wrong results: {verdict}")


def measure(kind: str, batch: int, hidden: int, autocast: bool, effort: Effort) -> Iterator[Row]:
    """A row of each pass of a decoder, after a check of its results."""
    torch.manual_seed(0)
    theirs, ours = (Decoder(library, kind, hidden) for library in (nn, rnnkern))
    ours.load_state_dict(theirs.state_dict())
    embedded = torch.randn(STEPS, batch, EMBEDDING)
    source = torch.randn(batch, SOURCE, hidden)
    check(ours, theirs, embedded, source)
    pairs = zip(
        ("inference", "forward and backward"),
        calls(ours, embedded, source, autocast),
        calls(theirs, embedded, source, autocast),
        strict=True,
    )
    of = "autocast to bfloat16" if autocast else "float32"
    for title, own, other in pairs:
        samples = rows.in_turn({OURS: own, "torch.nn": other}, effort)
        table = f"decoder of {STEPS} steps, {title}, {of}, threads: {torch.get_num_threads()}"
        yield rows.row(table, f"{kind} N{batch} H{hidden}", samples, group=kind)


def decoders(effort: Effort, autocasts: Iterable[bool] = (False, True)) -> Iterator[Row]:
    """Each cell in each size."""
    sizes = SIZES[: 1 if effort.quick else None]
    for autocast, kind, (batch, hidden) in product(autocasts, STEP_CELLS, sizes):
        yield from measure(kind, batch, hidden, autocast, effort)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--seconds", type=float, default=2.0, help="for a row")
    options = parser.parse_args()
    print(f"{timing.cpu_name()}, torch {torch.__version__}")
    with timing.threads_set(options.threads):
        for made in decoders(Effort(options.seconds), [options.autocast]):
            print(rows.line(made), flush=True)


if __name__ == "__main__":
    main()
