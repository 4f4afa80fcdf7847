"""Calls with options, the same for rnnkern's modules and for `options_oracle`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import options_oracle
import oracle
import torch
from options_oracle import Noise
from support import Leaves, assert_agree, build, evaluate, leaves_for, states_of
from torch import Tensor, nn

from rnnkern import noise
from rnnkern.tolerance import yardstick_dtype

T, N, I, H = 5, 3, 2, 7
ON_A_GPU = "ignore:no rnnkern kernel covers this call .reset_to.*on a GPU"
"""There, plain PyTorch runs calls with options, and a warning says so."""
LENGTHS = torch.tensor([3, 5, 0])
RESET = torch.tensor(
    [
        [True, False, False],
        [False, True, True],
        [True, False, False],
        [False, False, True],
        [False, True, False],
    ]
)
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
    "RNN": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
}
SHAPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional-stack": {"bidirectional": True, "num_layers": 2, "batch_first": True},
    "reverse-no-bias": {"bidirectional": True, "bias": False},
}
CALLS: dict[str, dict[str, Any]] = {
    "reset_to": {"reset": RESET, "reset_to": True},
    "reset_to-lengths": {"reset": RESET, "reset_to": True, "lengths": LENGTHS},
    "cells": {"return_cells": True},
    "cells-lengths": {"return_cells": True, "lengths": LENGTHS},
    "dropout": {"dropout": 0.4},
    "zoneout": {"zoneout": 0.3},
    "zoneout-eval": {"zoneout": 0.3, "draws": False},
    "norm": {"layer_norm": True},
    "norm-lengths": {"layer_norm": True, "lengths": LENGTHS, "reset": RESET, "reset_to": True},
    # With more dropout a row may keep one unit, and a product with it has no gradient but for eps.
    "norm-all": {
        "layer_norm": True,
        "reset": RESET,
        "reset_to": True,
        "lengths": LENGTHS,
        "return_cells": True,
        "dropout": 0.25,
        "zoneout": 0.3,
    },
    "all": {
        "reset": RESET,
        "reset_to": True,
        "lengths": LENGTHS,
        "return_cells": True,
        "dropout": 0.4,
        "zoneout": 0.3,
    },
}
SEED = 11


def drawn_seed() -> int:
    torch.manual_seed(SEED)
    return int(noise.draw_seed())


class Case:
    """A module, its operands, and the same call for rnnkern's modules and for the oracle."""

    def __init__(
        self, form: str, shape: str, call: str, dtype: torch.dtype = torch.float64
    ) -> None:
        kind, options = FORMS[form]
        torch.manual_seed(0)
        self.given = dict(CALLS[call])
        self.noise = Noise(
            drawn_seed(),
            self.given.pop("dropout", 0.0),
            self.given.pop("zoneout", 0.0),
            self.given.pop("draws", True),
        )
        if kind != "LSTM":
            self.given.pop("return_cells", None)
        own = {"recurrent_dropout": self.noise.dropout, "zoneout": self.noise.zoneout}
        own["layer_norm"] = self.given.pop("layer_norm", False)
        self.module = build(kind, I, H, dtype=dtype, **options, **SHAPES[shape], **own)
        change_gains(self.module)
        self.module.train(self.noise.draws)
        self.leaves = leaves_for(self.module, T, N)
        if "reset_to" in self.given:
            del self.given["reset_to"]
            for name, z in list(self.leaves.items())[1:]:
                self.leaves[f"reset_{name}"] = torch.randn_like(z)
        self.leaves = {name: z.to(dtype) for name, z in self.leaves.items()}
        if self.module.batch_first and "reset" in self.given:
            self.given["reset"] = self.given["reset"].t()

    def arguments(self, own: Leaves) -> dict[str, Any]:
        named = {n.removeprefix("reset_"): z for n, z in own.items() if n.startswith("reset_")}
        to = {"reset_to": states_of(named)} if named else {}
        return self.given | to

    def call(self, module: nn.Module, own: Leaves) -> Any:
        torch.manual_seed(SEED)
        return module(own["x"], states_of(own), **self.arguments(own))

    def oracle(self, module: nn.Module, own: Leaves) -> Any:
        arguments = self.arguments(own)
        return options_oracle.run(module, own["x"], states_of(own), noise=self.noise, **arguments)

    def check(self, call: Callable[..., Any] | None = None) -> None:
        dtype = next(self.module.parameters()).dtype
        ours = evaluate(self.module, self.leaves, call or self.call)
        theirs = evaluate(twin(self.module, yardstick_dtype(dtype)), self.leaves, self.oracle)
        reference = evaluate(twin(self.module, torch.float64), self.leaves, self.oracle)
        assert ours["out.0"].dtype == dtype
        assert_agree(ours, theirs, reference)


@torch.no_grad()
def change_gains(module: nn.Module) -> None:
    """Of layer normalisation: to smaller ones than those of the initialisation, with which layers
    so small are chaotic, so that rounding errors of all kinds grow from step to step.
    """
    for name, parameter in module.named_parameters():
        if name.startswith(("gain", "bias_c")):
            drawn = torch.randn(parameter.shape, dtype=torch.float32)
            parameter.copy_(0.2 * name.startswith("gain") + 0.1 * drawn)


def twin(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """As `oracle.twin`, with the parameters of layer normalisation, which only the loop reads."""
    made = oracle.twin(module, dtype)
    made._gain_names = module._gain_names
    for name, parameter in module.named_parameters():
        if name not in made._parameters:
            made.register_parameter(name, nn.Parameter(parameter.detach().to(dtype)))
    return made


def tensors(results: Any) -> list[Tensor]:
    if isinstance(results, Tensor):
        return [results]
    return [z for part in results for z in tensors(part)]
