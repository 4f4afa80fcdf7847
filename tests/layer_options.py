"""The options of a layer as one table, each with a call that uses it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import torch
from support import Call, Leaves, build_form, flatten, leaves_for, plain, states_of
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence

T, N, I, H = 3, 2, 2, 2
LENGTHS = torch.tensor([2, 3])
RESET = torch.tensor([[False, True], [True, False], [False, True]])


def packed(module: nn.Module, leaves: Leaves) -> Any:
    sequence = pack_padded_sequence(
        leaves["x"], LENGTHS, batch_first=module.batch_first, enforce_sorted=False
    )
    return module(sequence, states_of(leaves))


def with_lengths(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves), lengths=LENGTHS)


def with_reset(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves), reset=RESET)


def oracle_with(**arguments: Tensor) -> Call:
    return lambda module, own: oracle.run(module, own["x"], states_of(own), **arguments)


class Setting:
    """One option: how the module is built and called, and how the oracle is called where that
    differs.
    """

    def __init__(
        self,
        call: Call = plain,
        *,
        oracle_call: Call | None = None,
        hx: bool = False,
        **options: Any,
    ) -> None:
        self.call, self.oracle_call, self.hx, self.options = call, oracle_call or call, hx, options

    def make(self, form: str) -> tuple[nn.Module, Leaves]:
        module = build_form(form, I, H, dtype=torch.float64, proj_size=1, **self.options)
        return module, leaves_for(module, T, N, hx=self.hx)


SETTINGS = {
    "plain": Setting(),
    "hx": Setting(hx=True),
    "bidirectional": Setting(bidirectional=True, hx=True),
    "no-bias": Setting(bias=False),
    "batch-first": Setting(batch_first=True),
    "layers2": Setting(num_layers=2, hx=True),
    "packed": Setting(packed, hx=True, bidirectional=True),
    "lengths": Setting(
        with_lengths, oracle_call=oracle_with(lengths=LENGTHS), hx=True, bidirectional=True
    ),
    "lengths-reset": Setting(
        lambda m, own: m(own["x"], states_of(own), lengths=LENGTHS, reset=RESET),
        oracle_call=oracle_with(lengths=LENGTHS, reset=RESET),
        hx=True,
        bidirectional=True,
    ),
    "reset": Setting(with_reset, oracle_call=oracle_with(reset=RESET), hx=True, bidirectional=True),
}


class Caller(nn.Module):
    """`call(module, leaves)` as a module, so that its parameters can be passed in."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, leaves: Leaves) -> Any:
        return self.call(self.module, leaves)


def as_function(
    module: nn.Module, call: Call, leaves: Leaves
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The call as a function of all leaves and parameters, and those as float64 tensors that
    require grad.
    """
    caller = Caller(module, call)
    weights = dict(caller.named_parameters())
    tensors = [*leaves.values(), *weights.values()]
    inputs = [tensor.detach().double().requires_grad_() for tensor in tensors]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(leaves, given, strict=False))
        parameters = dict(zip(weights, given[len(own) :], strict=True))
        return tuple(flatten(functional_call(caller, parameters, (own,))).values())

    return function, inputs
