"""Layers under torch.compile, beside their eager calls and those of torch.nn.

    python -m benchmarks.compiled [--threads N] [--seconds S]

A compiled program adds wrappers of torch's own around a layer. What these cost is shown by a layer
of the same operands and outputs that computes nothing.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import rnnkern
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="for a row")
    options = parser.parse_args()
    print(f"{timing.cpu_name()}, torch {torch.__version__}, threads: {options.threads}")
    print("us a call; 'more': median of the pairwise differences of compiled and eager calls\n")
    print(f"{'':43}{'torch.nn':^20}{'rnnkern':^28}{'nothing':^28}")
    print(f"{'':43}{'eager':>10}{'compiled':>10}" + f"{'eager':>10}{'compiled':>10}{'more':>8}" * 2)
    with timing.threads_set(options.threads):
        for kind, T, N, I, H in SHAPES:
            torch._dynamo.reset()
            x, dy = torch.randn(T, N, I), torch.randn(T, N, H)
            theirs, ours = getattr(nn, kind)(I, H), getattr(rnnkern, kind)(I, H)
            modules = [theirs, ours, Nothing(ours, kind)]
            each = [m for module in modules for m in (module, torch.compile(module))]
            for name, call in (("inference", inference), ("forward+backward", training)):
                seconds = timing.time_in_turn(
                    [call(m, x, dy) for m in each], budget_s=options.seconds, min_rounds=3
                )
                us = [statistics.median(samples) * 1e6 for samples in seconds]
                row = f"{us[0]:10.1f}{us[1]:10.1f}"
                for i in (2, 4):
                    more = [b - a for a, b in zip(seconds[i], seconds[i + 1], strict=True)]
                    row += f"{us[i]:10.1f}{us[i + 1]:10.1f}{statistics.median(more) * 1e6:+8.1f}"
                shape = f"{kind} T{T} N{N} I{I} H{H}"
                print(f"{shape:26}{name:17}{row}", flush=True)


if __name__ == "__main__":
    main()
