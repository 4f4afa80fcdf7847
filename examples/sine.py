"""Sine-wave prediction: the next value of a wave, then the wave itself from the model's own values.

    python examples/sine.py [--fast] [--torch] [--cell RNN|LSTM|GRU] [--own-samples]
    torchrun --nproc-per-node 2 examples/sine.py

A recurrent layer and a linear readout are trained to give the next value of a sine wave: with
teacher forcing, where every input is the true value, or with ``--own-samples``, where after a few
true values every input is the model's own prediction. Then `rnnkern.generate` runs the model in a
closed loop, and the picture shows how far that wave stays with the true one.
"""

# %%
from __future__ import annotations

import argparse
import math
import statistics
from functools import partial
from types import ModuleType
from typing import Any, NamedTuple

import torch
from common import (
    Run,
    Trainer,
    Workers,
    above_zero,
    arguments,
    expect,
    expect_files,
    fail,
    run_in_turn,
    training_parser,
    workers,
)
from torch import Tensor, nn

import rnnkern
from rnnkern.bench.timing import clock_of
from rnnkern.bench.workloads import CELLS
from rnnkern.plot import CYCLE

STEP_S = 0.2  # seconds between two values of the wave, whose period is 2 pi seconds
EPOCH = 100  # training steps between two validations
REPEATS, FAST_REPEATS = 25, 3  # of what is timed
FAST = {"epochs": 3}
BLUE, ORANGE = CYCLE[:2]
# Mean squared errors; that of a model that always gives 0 is 0.5.
LARGEST_ONE_STEP, LARGEST_GENERATED = 0.005, 0.1
JUDGED = 300  # values generated, for LARGEST_GENERATED: every model is out of phase at last


# %%
class Predictor(nn.Module):
    """A recurrent layer and a linear readout: reads ``[T, N, 1]``, gives each next value."""

    def __init__(self, library: ModuleType, cell: str, hidden: int) -> None:
        super().__init__()
        self.rnn = getattr(library, cell)(1, hidden)
        self.readout = nn.Linear(hidden, 1)

    def forward(self, x: Tensor, true_steps: int | None = None) -> Tensor:
        """The first ``true_steps`` inputs are those of ``x``, the others own predictions."""
        output, state = self.rnn(x[:true_steps])
        made = [self.readout(output)]
        for _ in range(len(x) - len(output)):
            output, state = self.rnn(made[-1][-1:], state)
            made.append(self.readout(output))
        return torch.cat(made)


def wave(phases: Tensor, steps: int) -> Tensor:
    """Sine waves ``[steps, N, 1]`` that begin at ``phases``, in radians."""
    return torch.sin(phases + STEP_S * torch.arange(steps)[:, None]).unsqueeze(-1)


class Result(NamedTuple):
    """What a trained model makes of one wave: all curves ``[T]`` on the CPU."""

    model: Predictor
    losses: list[tuple[int, float]]
    truth: Tensor
    one_step: Tensor  # entry t is predicted from the true values before t + 1
    generated: Tensor  # begins after the warm-up
    one_step_mse: float
    generated_mse: float


# %%
def experiment(library: ModuleType, options: argparse.Namespace, crew: Workers) -> Result:
    model = Predictor(library, options.cell, options.hidden)
    generator = torch.Generator().manual_seed(options.seed)
    warm, unroll, horizon = options.warm, options.unroll, options.horizon

    def batches(epoch: int) -> list[Tensor]:
        phases = 2 * math.pi * torch.rand(EPOCH, options.rows, generator=generator)
        return [wave(crew.own(row), unroll + 1).to(crew.device) for row in phases]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        made = model(batch[:-1], warm if options.own_samples else None)
        # The first values are few to tell the phase by: no model can be right there.
        return nn.functional.mse_loss(made[warm - 1 :], batch[warm:])

    def generate(model: Any, truth: Tensor) -> Tensor:
        output, state = model.rnn(truth[:unroll])
        first = model.readout(output[-1])
        made, _ = rnnkern.generate(model.rnn, model.readout, first, horizon - 1, state)
        return torch.cat((first.unsqueeze(0), made))

    def score(model: nn.Module) -> tuple[float, str]:
        truth = wave(torch.linspace(0, 2 * math.pi, 9)[:-1], unroll + horizon).to(crew.device)
        error = nn.functional.mse_loss(generate(model, truth), truth[unroll:]).item()
        return -error, f"mean squared error of generated waves {error:.4g}"

    optimizer = torch.optim.Adam(model.parameters(), lr=options.rate)
    with crew.best_file(library, options) as best:
        trainer = Trainer(crew, model, optimizer, loss, score, best, clip=1.0, log_every=EPOCH)
        history = trainer.fit(options.epochs, batches)

    with torch.no_grad():
        truth = wave(torch.zeros(1), unroll + horizon).to(crew.device)
        one_step = model(truth[:-1])
        generated = generate(model, truth)
    return Result(
        model,
        history.losses,
        truth.flatten().cpu(),
        one_step.flatten().cpu(),
        generated.flatten().cpu(),
        nn.functional.mse_loss(one_step[warm - 1 :], truth[warm:]).item(),
        nn.functional.mse_loss(generated, truth[unroll:]).item(),
    )


def us_per_step(result: Result, repeats: int) -> float:
    """Of a closed loop."""
    model, steps = result.model, len(result.generated)
    first = torch.zeros(1, 1, device=model.readout.weight.device)
    clock = clock_of(first.device)
    seconds = [
        clock(lambda: rnnkern.generate(model.rnn, model.readout, first, steps), 1) / steps
        for _ in range(repeats)
    ]
    return statistics.median(seconds) * 1e6


# %%
def check(options: argparse.Namespace) -> None:
    """Ends the script where an option makes no sense, before any work."""
    above_zero(options, "hidden", "unroll", "warm", "rows", "epochs", "horizon", "rate")
    if options.warm >= options.unroll:
        fail(f"--warm {options.warm} must be less than --unroll {options.unroll}")
    if options.horizon < 2:
        fail(f"--horizon must be at least 2, got {options.horizon}")
    expect_files(options.out, options.model)


def report(run: Run, crew: Workers) -> None:
    result = run.result
    span = len(result.generated) * STEP_S
    crew.say(f"{run.library}: last training loss {result.losses[-1][1]:.2g}")
    crew.say(f"    mean squared error one step ahead {result.one_step_mse:.2g}")
    crew.say(f"    mean squared error of {span:.0f} s generated {result.generated_mse:.2g}")
    crew.say(f"    a generated step takes {run.measured:.1f} us")


def judge(result: Result) -> None:
    warm_up = len(result.truth) - len(result.generated)
    missed = (result.generated - result.truth[warm_up:])[:JUDGED].square().mean()
    expect(result.one_step_mse < LARGEST_ONE_STEP, "one step ahead is not learned")
    expect(missed < LARGEST_GENERATED, "what is generated does not stay with the truth")


def draw(result: Result, options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    seconds = STEP_S * torch.arange(len(result.truth))
    begin = len(result.truth) - len(result.generated)
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    curves, errors = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for panel in (curves, errors):
        panel.axvspan(0, float(seconds[begin - 1]), color="grey", alpha=0.2, label="warm-up")
        panel.grid(alpha=0.3)
    curves.plot(seconds, result.truth, color="black", linewidth=5, alpha=0.3, label="truth")
    curves.plot(seconds[1:], result.one_step, ".", color=BLUE, label="predicted one step ahead")
    curves.plot(seconds[begin:], result.generated, color=ORANGE, label="generated in a closed loop")
    curves.set_ylabel("value (amplitude 1)")
    curves.set_xlim(0, float(seconds[-1]))
    one_step_error = (result.one_step - result.truth[1:]).abs()
    errors.plot(seconds[1:], one_step_error, ".", color=BLUE)
    errors.plot(seconds[begin:], (result.generated - result.truth[begin:]).abs(), color=ORANGE)
    errors.set_yscale("log")
    errors.set_ylim(1e-5, 2)
    errors.set_ylabel("distance from truth")
    errors.set_xlabel("time (s)")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    way = "on its own samples" if options.own_samples else "with teacher forcing"
    span = len(result.generated) * STEP_S
    figure.suptitle(
        f"{options.cell}, {options.hidden} hidden, trained {way}: after a warm-up on true values\n"
        f"it goes on alone for {span:.0f} s, mean squared error {result.generated_mse:.2g}"
    )
    figure.savefig(options.out, dpi=150)


# %%
def main() -> None:
    made = training_parser(__doc__, "sine.png")
    made.add_argument("--cell", choices=CELLS, default="LSTM")
    made.add_argument("--hidden", type=int, default=20)
    made.add_argument("--unroll", type=int, default=30, help="steps in training, and of warm-up")
    made.add_argument("--own-samples", action="store_true", help="train on own predictions")
    made.add_argument("--warm", type=int, default=10, help="true values before those, or the loss")
    made.add_argument("--rows", type=int, default=16, help="of all processes together")
    made.add_argument("--epochs", type=int, default=30, help=f"of {EPOCH} steps")
    made.add_argument("--rate", type=float, default=0.005, help="of Adam")
    made.add_argument("--horizon", type=int, default=300, help="values to generate")
    options = arguments(made, FAST)
    check(options)

    with workers() as crew:
        if options.rows % crew.world:
            fail(f"--rows {options.rows} do not divide among {crew.world} processes")
        measure = partial(us_per_step, repeats=FAST_REPEATS if options.fast else REPEATS)
        runs = run_in_turn(experiment, options, crew, measure)
        for run in runs:
            report(run, crew)
        if crew.speaks:
            draw(runs[0].result, options)
        crew.say(f"picture: {options.out}")
        for run in runs if options.judged else ():
            judge(run.result)


# %%
if __name__ == "__main__":
    main()
