"""A cell of one's own on the digits: the minimal gated unit beside the GRU and the LSTM.

    python examples/own_cell.py [--hidden 64] [--epochs 20] [--fast] [--torch]

The cell is the function ``mgu`` below. rnnkern compiles it once. It reads the 8 x 8 digits of
scikit-learn row by row, as in digits_rows.py. With ``--torch`` the same function runs as a loop in
Python, beside torch.nn's GRU and LSTM. At last a training step of the layer is timed: on rnnkern,
as that loop, and as that loop under torch.compile (not with ``--fast``, because torch takes a while
to compile it).
"""

# %%
from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from common import (
    Workers,
    above_zero,
    arguments,
    expect,
    expect_files,
    parser,
    run_in_turn,
    workers,
)
from digits_rows import Classifier, Images, accuracy, bundled_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear

import rnnkern
from rnnkern.bench.timing import PairTiming, time_in_turn
from rnnkern.plot import CYCLE, LINE_STYLES

BATCH, RATE = 32, 0.005
CELLS = ("MGU", "GRU", "LSTM")


# %%
@rnnkern.cell(gates=("f", "g"), states=("h",))
def mgu(x: Any, h: Any, prev: Any) -> Any:
    """Minimal gated unit: x.f is the gate's sum of W_ih x + b_ih, h.f that of W_hh h + b_hh."""
    f = rnnkern.sigmoid(x.f + h.f)
    return (1 - f) * prev.h + f * rnnkern.tanh(x.g + f * h.g)


class Loop(nn.Module):
    """A layer of that cell without rnnkern's kernels: ``[N, T, I]`` to ``[N, T, H]``."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.weights = rnnkern.Recurrent(mgu, input_size, hidden_size, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w = self.weights
        a = linear(x, w.weight_ih_l0, w.bias_ih_l0)
        state = (x.new_zeros(x.shape[0], self.hidden_size),)
        outputs = []
        for t in range(x.shape[1]):
            b = linear(state[0], w.weight_hh_l0, w.bias_hh_l0)
            state = mgu.step(a[:, t], b, state)  # the function, on tensors
            outputs.append(state[0])
        return torch.stack(outputs, 1), state[0]


def layer(name: str, library: ModuleType, size: int, hidden: int) -> Any:
    if name != "MGU":
        return getattr(library, name)(size, hidden, batch_first=True)
    if library is rnnkern:
        return rnnkern.Recurrent(mgu, size, hidden, batch_first=True)
    return Loop(size, hidden)


# %%
@dataclass(frozen=True)
class Parts:
    train: Images
    test: Images


def load() -> Parts:
    """The same parts whatever the seed."""
    found = bundled_digits()
    found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    return Parts(found[len(found) // 5 :], found[: len(found) // 5])


@dataclass(frozen=True)
class Outcome:
    losses: list[float]  # of each epoch
    accuracy: float  # on the test digits, after the last epoch


def train(name: str, library: ModuleType, options: argparse.Namespace, parts: Parts) -> Outcome:
    torch.manual_seed(options.seed)
    model = Classifier(layer(name, library, parts.train.pixels.shape[2], options.hidden))
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    shuffles = torch.Generator().manual_seed(options.seed)
    losses = []
    for _ in range(options.epochs):
        total = 0.0
        for rows in torch.randperm(len(parts.train), generator=shuffles).split(BATCH):
            batch = parts.train[rows]
            optimizer.zero_grad()
            loss = cross_entropy(model(batch.pixels), batch.digits)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(batch)
        losses.append(total / len(parts.train))
    with torch.no_grad():
        read = model(parts.test.pixels).argmax(1)
    return Outcome(losses, accuracy(read, parts.test.digits))


# %%
def steps_in_turn(options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """Microseconds of forward and backward of a layer of the MGU, and how much faster the kernels
    are than each other way, as the median over neighbours.
    """
    torch.manual_seed(0)
    x = torch.randn(BATCH, 28, 28, requires_grad=True)
    loop = Loop(28, options.hidden)
    ways: dict[str, Any] = {"rnnkern": loop.weights, "loop in Python": loop}
    if not options.fast:
        from torch._inductor import config

        config.compile_threads = 1  # its processes would take time from what is timed
        ways["loop, torch.compile"] = torch.compile(loop)
    leaves = [x, *loop.weights.parameters()]

    def step_of(way: Callable[[Tensor], Any]) -> Callable[[], Any]:
        def step() -> Any:
            y, _ = way(x)
            return torch.autograd.grad(y, leaves, torch.ones_like(y))

        return step

    calls = [step_of(way) for way in ways.values()]
    first, *others = time_in_turn(calls, budget_s=0.2 if options.fast else 4.0, min_rounds=5)
    timings = [PairTiming(first, other) for other in (first, *others)]
    return {
        name: (found.their_us, found.speedup) for name, found in zip(ways, timings, strict=True)
    }


def draw(outcomes: dict[str, Outcome], steps: dict[str, tuple[float, float]], path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for i, (name, found) in enumerate(outcomes.items()):
        label = f"{name}: {found.accuracy:.1%} of the test digits"
        epochs = range(1, len(found.losses) + 1)
        left.semilogy(epochs, found.losses, LINE_STYLES[i], color=CYCLE[i], label=label)
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.set_xlabel("epoch")
    left.set_ylabel("cross-entropy of the training digits")
    left.set_title("A cell of one's own beside two of torch.nn", fontsize=11)
    left.grid(alpha=0.3)
    left.legend(frameon=False)
    bars = right.barh(
        list(steps), [us / 1e3 for us, _ in steps.values()], color=CYCLE[0], height=0.5
    )
    right.bar_label(bars, [f"{ratio:.1f}x" for _, ratio in steps.values()], padding=3)
    right.invert_yaxis()
    right.margins(x=0.2)
    right.set_xlabel("ms, forward and backward of 28 steps, 32 rows")
    right.set_title("A layer of the MGU", fontsize=11)
    figure.savefig(path, dpi=150)


# %%
def main() -> None:
    made = parser(__doc__, "own_cell.png")
    made.add_argument("--hidden", type=int, default=64, help="units of each layer")
    made.add_argument("--epochs", type=int, default=20, help="of 1438 digits")
    options = arguments(made, {"epochs": 3})
    above_zero(options, "hidden", "epochs")
    expect_files(options.out)
    parts = load()
    rnnkern.precompile(mgu)  # so that no time below has the compiler in it

    def experiment(
        library: ModuleType, options: argparse.Namespace, crew: Workers
    ) -> dict[str, Outcome]:
        outcomes = {}
        for name in CELLS:
            found = outcomes[name] = train(name, library, options, parts)
            crew.say(f"{name} of {library.__name__}: {found.accuracy:.2%} of the test digits right")
        return outcomes

    with workers() as crew:
        runs = run_in_turn(experiment, options, crew)
        if not crew.speaks:
            return
        steps = steps_in_turn(options)
        for name, (us, ratio) in steps.items():
            crew.say(f"forward and backward of the MGU, {name}: {us:.0f} us, {ratio:.1f}x")
        draw(runs[0].result, steps, options.out)
        print(f"picture: {options.out}")
    limit = 0.7 if options.fast else 0.95
    for run in runs if options.judged else ():
        for name, found in run.result.items():
            expect(
                found.accuracy >= limit,
                f"{name} of {run.library}: {found.accuracy:.1%} is below {limit:.0%}",
            )


# %%
if __name__ == "__main__":
    main()
