"""Layers under torch.compile, beside their eager calls and those of torch.nn.

    python -m benchmarks.compiled [--threads N] [--seconds S]

A compiled program adds wrappers of torch's own around a layer. What these cost is shown by a layer
of the same operands and outputs that computes nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import rnnkern
from benchmarks import rows
from benchmarks.rows import Effort, Row
from rnnkern.bench import timing

SHAPES = (
    ("LSTM", 10, 1, 3, 3),
    ("RNN", 1, 1, 64, 256),
    ("LSTM", 28, 64, 28, 64),
    ("LSTM", 30, 4, 100, 256),
    ("GRU", 64, 32, 128, 256),
)
"""Layer, T, N, I, H."""

SAVED = {"RNN": 0, "LSTM": 5, "GRU": 4}
"""Numbers that a layer saves for each unit at each step."""

_LIBRARY: Any = torch.library.Library("rnnkern_benchmarks", "DEF")  # type: ignore[no-untyped-call]


def _forward(x: Tensor, weights: list[Tensor], states: int, saved: int) -> list[Tensor]:
    T, N, _ = x.shape
    H = weights[1].shape[1]
    made = [x.new_empty(T, N, H), *(x.new_empty(1, N, H) for _ in range(states))]
    return [*made, x.new_empty(T * N * H * saved)]


def _backward(
    x: Tensor, weights: list[Tensor], y: Tensor, saved: Tensor, gradients: list[Tensor]
) -> list[Tensor]:
    return [x.new_empty(w.shape) for w in weights]


for _schema, _run in (
    ("forward(Tensor x, Tensor[] weights, int states, int saved) -> Tensor[]", _forward),
    (
        "backward(Tensor x, Tensor[] weights, Tensor y, Tensor saved, Tensor[] gradients) "
        "-> Tensor[]",
        _backward,
    ),
):
    _LIBRARY.define(_schema, tags=(torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout))
    for _key in ("CPU", "Meta"):
        _LIBRARY.impl(_schema.partition("(")[0], _run, _key)


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states: int, saved: int, x: Tensor, *weights: Tensor) -> Any:
        *outputs, kept = torch.ops.rnnkern_benchmarks.forward(x, weights, states, saved)
        ctx.save_for_backward(x, outputs[0], kept, *weights)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, y, saved, *weights = ctx.saved_tensors
        made = torch.ops.rnnkern_benchmarks.backward(x, weights, y, saved, gradients)
        return (None, None, None, *made)


class Nothing(nn.Module):
    """A layer with the weights of another one, which computes nothing."""

    def __init__(self, layer: nn.Module, kind: str) -> None:
        super().__init__()
        self.layer, self.states, self.saved = layer, 2 if kind == "LSTM" else 1, SAVED[kind]

    def forward(self, x: Tensor) -> Any:
        weights = list(self.layer.parameters())
        return _Nothing.apply(self.states, self.saved, x, *weights)  # type: ignore[no-untyped-call]


def inference(module: Callable[..., Any], x: Tensor, dy: Tensor) -> timing.Call:
    return torch.no_grad()(lambda: module(x))  # type: ignore[no-any-return]


def training(module: Any, x: Tensor, dy: Tensor) -> timing.Call:
    parameters = list(module.parameters())

    def both() -> None:
        for parameter in parameters:
            parameter.grad = None
        module(x)[0].backward(dy)

    return both


COMPILED = "compiled"
MORE = "more than eager"
MORE_OF_NOTHING = "more of a layer that computes nothing"


def measure(kind: str, T: int, N: int, I: int, H: int, effort: Effort) -> Iterator[Row]:
    """A row of each pass. Its speed-ups are those of our compiled call."""
    torch._dynamo.reset()
    x, dy = torch.randn(T, N, I), torch.randn(T, N, H)
    theirs, ours = getattr(nn, kind)(I, H), getattr(rnnkern, kind)(I, H)
    nothing = Nothing(ours, kind)
    modules = {
        "eager": ours,
        COMPILED: torch.compile(ours),
        "torch.nn": theirs,
        "torch.nn compiled": torch.compile(theirs),
        "nothing": nothing,
        "nothing compiled": torch.compile(nothing),
    }
    for title, call in (("inference", inference), ("forward and backward", training)):
        samples = rows.in_turn({name: call(m, x, dy) for name, m in modules.items()}, effort)
        us = {name: statistics.median(own) * 1e6 for name, own in samples.items()}
        us[MORE] = _more(samples[COMPILED], samples["eager"])
        us[MORE_OF_NOTHING] = _more(samples["nothing compiled"], samples["nothing"])
        yield rows.row(
            f"compiled, {title}, threads: {torch.get_num_threads()}",
            f"{kind} T{T} N{N} I{I} H{H}",
            samples,
            COMPILED,
            us=us,
            shown=["eager", COMPILED, MORE, MORE_OF_NOTHING],
            speedup=rows.over(samples, COMPILED, ("torch.nn", "torch.nn compiled")),
        )


def _more(compiled: list[float], eager: list[float]) -> float:
    """The median of the differences within a round, in microseconds."""
    return statistics.median(a - b for a, b in zip(compiled, eager, strict=True)) * 1e6


def compiled(effort: Effort) -> Iterator[Row]:
    """Each shape."""
    for kind, *sizes in SHAPES[: 1 if effort.quick else None]:
        yield from measure(kind, *sizes, effort)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for a row")
    options = parser.parse_args()
    print(f"{timing.cpu_name()}, torch {torch.__version__}")
    with timing.threads_set(options.threads):
        for made in compiled(Effort(options.seconds)):
            print(rows.line(made), flush=True)


if __name__ == "__main__":
    main()
