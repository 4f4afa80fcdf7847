"""A decoder: 100 steps of a cell with attention between them, and one backward pass.

What a step costs in a loop, where autograd sums the gradients that every step has for the same
weights, and under ``--autocast``, where all steps of a pass are in one region.
``python -m benchmarks.decoder`` prints both libraries, timed in turn.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

import rnnkern
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--budget", type=float, default=2.0, help="seconds a row")
    arguments = parser.parse_args()
    print(f"{timing.cpu_name()}, torch {torch.__version__}, threads: {arguments.threads}")
    kind_of_call = "autocast to bfloat16" if arguments.autocast else "float32"
    print(f"{STEPS} steps, source of {SOURCE}, {kind_of_call}\n")
    print(
        f"{'cell':10}{'N':>4}{'H':>5}  {'pass':17}{'torch.nn':>10}{'rnnkern':>10}{'speed-up':>10}"
    )
    with timing.threads_set(arguments.threads):
        for kind in STEP_CELLS:
            for rows, hidden in SIZES:
                torch.manual_seed(0)
                theirs, ours = (Decoder(library, kind, hidden) for library in (nn, rnnkern))
                ours.load_state_dict(theirs.state_dict())
                embedded = torch.randn(STEPS, rows, EMBEDDING)
                source = torch.randn(rows, SOURCE, hidden)
                check(ours, theirs, embedded, source)
                pairs = zip(
                    ("inference", "forward+backward"),
                    calls(ours, embedded, source, arguments.autocast),
                    calls(theirs, embedded, source, arguments.autocast),
                    strict=True,
                )
                for name, own, other in pairs:
                    pair = timing.time_pair(own, other, budget_s=arguments.budget, min_pairs=3)
                    print(
                        f"{kind:10}{rows:4}{hidden:5}  {name:17}{pair.their_us / 1e3:7.2f} ms"
                        f"{pair.us / 1e3:7.2f} ms{pair.speedup:9.2f}x",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
