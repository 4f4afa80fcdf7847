"""Vanishing gradients: how strongly the last state depends on each earlier one, by network.

    python examples/gradient_flow.py [--fast] [--torch] [--steps 15 100]

Untrained RNN, GRU and LSTM read one random sequence, the LSTM with several biases of its forget
gate, and `rnnkern.inspect.gradient_flow` gives the gradients of the last hidden state with respect
to all earlier ones in one call. On torch.nn, with ``--torch``, that takes a loop over the steps
that keeps every state. Then the derivatives of a small RNN are compared with the formulas.
"""

# %%
from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from common import (
    Run,
    Workers,
    arguments,
    expect,
    expect_files,
    fail,
    named,
    parser,
    run_in_turn,
    workers,
)
from torch import Tensor, nn

import rnnkern
from rnnkern import plot
from rnnkern.bench.timing import clock_of

INPUTS, HIDDEN = 1, 20
FORGET_BIASES = (-2, 0, 1, 2, 10)
FAST = {"steps": [8, 40]}
REPEATS = 5  # of what is timed
# In this many steps the networks are far apart: by more than the factor.
LONG, FACTOR = 15, 10
SAME = 1e-6  # largest relative difference of the libraries
LAST, LARGEST_ERROR = 3, 1e-10  # of the formulas: the step, and what is allowed


# %%
def lstm(bias: float) -> str:
    return f"LSTM, forget bias {bias:+d}" if bias else "LSTM, forget bias 0"


def networks(library: ModuleType, seed: int) -> dict[str, nn.RNNBase]:
    """By name, each from the same seed.

    In float64: over 100 steps a gradient may fall below the smallest number of float32.
    """
    makers = {
        "RNN tanh": lambda: library.RNN(INPUTS, HIDDEN),
        "RNN relu": lambda: library.RNN(INPUTS, HIDDEN, nonlinearity="relu"),
        "GRU": lambda: library.GRU(INPUTS, HIDDEN),
    }
    makers |= {lstm(bias): lambda: library.LSTM(INPUTS, HIDDEN) for bias in FORGET_BIASES}
    made: dict[str, nn.RNNBase] = {}
    for name, make in makers.items():
        torch.manual_seed(seed)
        made[name] = make().double()
    for bias in FORGET_BIASES:
        network = made[lstm(bias)]
        forget = slice(HIDDEN, 2 * HIDDEN)  # rows of the gates i, f, g, o
        with torch.no_grad():
            network.bias_ih_l0[forget] = bias
            network.bias_hh_l0[forget] = 0
    return made


# %%
class Flow(NamedTuple):
    """Norms ``[T]`` of the gradients of the last hidden state: with respect to every hidden state
    and, of an LSTM on rnnkern, every cell state.
    """

    h: Tensor
    c: Tensor | None


@torch.no_grad()
def at_once(network: nn.RNNBase, x: Tensor) -> Flow:
    """By rnnkern, from one call."""
    flow = rnnkern.inspect.gradient_flow(network, x)
    return Flow(flow.h[0, :, 0], None if flow.c is None else flow.c[0, :, 0])


def step_by_step(network: nn.RNNBase, x: Tensor) -> Flow:
    """By torch.nn: a call for each step, and the gradient of each hidden state.

    Not of the cell states: the one that a call returns is a copy, and the hidden state does not
    depend on it.
    """
    kept: list[Tensor] = []
    state = None
    for frame in x:
        _, state = network(frame.unsqueeze(0), state)
        kept.append(state[0] if isinstance(state, tuple) else state)
        kept[-1].retain_grad()
    kept[-1].sum().backward()
    return Flow(torch.stack([torch.linalg.vector_norm(h.grad) for h in kept]), None)


# %%
def by_autograd(rnn: nn.RNNBase, x: Tensor) -> dict[str, Tensor]:
    """The derivatives of the last state of ``[T, I]``, a row for each unit of it."""
    x = x.detach().requires_grad_()
    _, h = rnn(x.unsqueeze(1))
    sources = {"V": rnn.weight_hh_l0, "W": rnn.weight_ih_l0, "X_0": x}
    rows = [torch.autograd.grad(unit, [*sources.values()], retain_graph=True) for unit in h[0, 0]]
    found = dict(zip(sources, map(torch.stack, zip(*rows, strict=True)), strict=True))
    return found | {"X_0": found["X_0"][:, 0]}


def by_formula(v: Tensor, w: Tensor, x: Tensor) -> dict[str, Tensor]:
    """The same, written out for ``h_t = tanh(V h_{t-1} + W x_t)``.

    With ``D_t = diag(1 - h_t**2)``, ``dh_t = D_t (dV h_{t-1} + dW x_t + W dx_t + V dh_{t-1})``:
    each derivative is its own term and what it was a step before, carried on by V.
    """
    one = torch.eye(len(v), dtype=v.dtype, device=v.device)
    h = v.new_zeros(len(v))
    of_v, of_w = v.new_zeros(*one.shape, len(v)), v.new_zeros(*one.shape, w.shape[1])
    of_x0 = torch.zeros_like(w)
    for t, frame in enumerate(x):
        before, h = h, torch.tanh(v @ h + w @ frame)
        slope = 1 - h**2
        of_v = slope[:, None, None] * (one[:, :, None] * before + torch.tensordot(v, of_v, 1))
        of_w = slope[:, None, None] * (one[:, :, None] * frame + torch.tensordot(v, of_w, 1))
        of_x0 = slope[:, None] * (w if t == 0 else v @ of_x0)
    return {"V": of_v, "W": of_w, "X_0": of_x0}


# %%
Case = tuple[nn.RNNBase, Tensor]  # a network, and what it reads


class Result(NamedTuple):
    """What one library gives: by number of steps and network, cases and their flows; and the
    largest errors of derivatives.
    """

    flow_of: Callable[[nn.RNNBase, Tensor], Flow]
    cases: dict[int, dict[str, Case]]
    flows: dict[int, dict[str, Flow]]
    errors: dict[str, float]


def experiment(library: ModuleType, options: argparse.Namespace, crew: Workers) -> Result:
    flow_of = at_once if library is rnnkern else step_by_step
    cases: dict[int, dict[str, Case]] = {}
    flows: dict[int, dict[str, Flow]] = {}
    for steps in options.steps:
        generator = torch.Generator().manual_seed(options.seed)
        x = torch.randn(steps, 1, INPUTS, generator=generator, dtype=torch.float64)
        x = x.to(crew.device)
        cases[steps], flows[steps] = {}, {}
        for name, network in networks(library, options.seed).items():
            cases[steps][name] = (network.to(crew.device), x)
            h, c = flow_of(network, x)
            flows[steps][name] = Flow(h.cpu(), None if c is None else c.cpu())

    torch.manual_seed(options.seed)
    rnn = library.RNN(2, HIDDEN, bias=False).double().to(crew.device)
    x = torch.randn(LAST + 1, 2, dtype=torch.float64).to(crew.device)
    found = by_autograd(rnn, x)
    with torch.no_grad():
        wanted = by_formula(rnn.weight_hh_l0, rnn.weight_ih_l0, x)
    errors = {name: float((found[name] - wanted[name]).abs().max()) for name in wanted}
    return Result(flow_of, cases, flows, errors)


def milliseconds(result: Result) -> dict[int, dict[str, float]]:
    """Of finding each flow once more."""

    def median(network: nn.RNNBase, x: Tensor) -> float:
        clock = clock_of(x.device)
        seconds = [clock(lambda: result.flow_of(network, x), 1) for _ in range(REPEATS)]
        return statistics.median(seconds) * 1e3

    return {
        steps: {name: median(*case) for name, case in cases.items()}
        for steps, cases in result.cases.items()
    }


# %%
def first_over_last(norms: Tensor) -> float:
    """The gradient with respect to the first state over that with respect to the last."""
    return float(norms[0] / norms[-1])


def report(runs: list[Run], options: argparse.Namespace, crew: Workers) -> None:
    crew.say("gradient of the last hidden state: first step / last step, and the time to find it")
    for steps in dict.fromkeys(options.steps):
        libraries = "".join(f"{run.library:>13}" for run in runs)
        crew.say(f"{f'{steps} steps':24}{'hidden state':>14}{'cell state':>12}{libraries}")
        for name, (h, c) in runs[0].result.flows[steps].items():
            cell = "" if c is None else f"{first_over_last(c):.1e}"
            times = "".join(f"{run.measured[steps][name]:10.2f} ms" for run in runs)
            crew.say(f"  {name:22}{first_over_last(h):14.1e}{cell:>12}{times}")
    crew.say(f"h_{LAST} of an RNN, autograd beside the formulas, largest error")
    for run in runs:
        errors = ", ".join(f"d/d{name} {error:.1e}" for name, error in run.result.errors.items())
        crew.say(f"  {run.library}: {errors}")


def judge(runs: list[Run], options: argparse.Namespace) -> None:
    for run in runs:
        expect(max(run.result.errors.values()) < LARGEST_ERROR, "the formulas do not hold")
    for steps, flows in runs[0].result.flows.items():
        for run in runs[1:]:
            for name, flow in run.result.flows[steps].items():
                same = torch.allclose(flow.h, flows[name].h, rtol=SAME, atol=1e-300)
                expect(same, f"{name}, {steps} steps: rnnkern and {run.library} differ")
        if options.judged:
            judge_memory(steps, flows)


def judge_memory(steps: int, flows: dict[str, Flow]) -> None:
    h = {name: first_over_last(flow.h) for name, flow in flows.items()}
    # The cell carries what the forget gate keeps; hidden states reach it by way of all gates.
    cells = [first_over_last(flows[lstm(bias)].c) for bias in FORGET_BIASES]
    expect(cells == sorted(cells), "a larger forget bias must keep more of the gradient")
    if steps >= LONG:
        best = h[lstm(max(FORGET_BIASES))]
        for name in (lstm(min(FORGET_BIASES)), "RNN tanh"):
            expect(best > FACTOR * h[name], f"the LSTM must keep far more than {name}")


def pictures(options: argparse.Namespace) -> dict[int, Path]:
    """By number of steps: the first is ``--out``, further ones have theirs in the name."""
    first, *others = dict.fromkeys(options.steps)
    return {first: options.out} | {steps: named(options.out, steps) for steps in others}


def draw(flows: dict[str, Flow], steps: int, path: Path) -> None:
    plot.gradient_flow(
        {name: flow.h for name, flow in flows.items()},
        path,
        title=f"Gradient of the last hidden state over {steps} steps, untrained:\n"
        "it vanishes unless an LSTM's forget gates are open from the start.\n"
        "All LSTMs begin steeply: hidden states act through the gates alone.",
    )


# %%
def main() -> None:
    made = parser(__doc__, "gradient_flow.png")
    made.add_argument("--steps", type=int, nargs="+", default=[15, 100], help="of the sequences")
    options = arguments(made, FAST)
    if min(options.steps) < 2:
        fail(f"--steps must be at least 2, got {min(options.steps)}")
    paths = pictures(options)
    expect_files(*paths.values())

    with workers() as crew:
        runs = run_in_turn(experiment, options, crew, milliseconds)
        report(runs, options, crew)
        if crew.speaks:
            for steps, path in paths.items():
                draw(runs[0].result.flows[steps], steps, path)
            crew.say("pictures:", *paths.values())
        judge(runs, options)


# %%
if __name__ == "__main__":
    main()
