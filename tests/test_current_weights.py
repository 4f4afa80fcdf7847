"""Which weights count when a module's attributes or lists have been changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, LAYERS, build, reverted
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import rnnkern
from rnnkern import forward

Module = Callable[..., Any]


def without_recurrence(module: nn.Module) -> nn.Module:
    other = reverted(module)
    for name, parameter in other.named_parameters():
        if "hh" in name:
            nn.init.zeros_(parameter)
    return other


def swap_list(module: Any, x: Tensor) -> Any:
    kept, names = module._flat_weights, module._flat_weights_names
    module._flat_weights = [w * 0 if "hh" in n else w for w, n in zip(kept, names, strict=True)]
    try:
        return module(x)
    finally:
        module._flat_weights = kept


def change_list(module: Any, x: Tensor) -> Any:
    kept = list(module._flat_weights)
    for i, name in enumerate(module._flat_weights_names):
        if "hh" in name:
            module._flat_weights[i] = torch.zeros_like(kept[i])
    try:
        return module(x)
    finally:
        module._flat_weights[:] = kept


def shadow(module: Any, x: Tensor) -> Any:
    names = [name for name in module._flat_weights_names if "hh" in name]
    for name in names:
        module.__dict__[name] = torch.zeros_like(getattr(module, name))
    try:
        return module(x)
    finally:
        for name in names:
            del module.__dict__[name]


def replace(module: Any, x: Tensor) -> Any:
    """As torch.nn.utils.weight_norm did it: the parameter is gone, a tensor has its name."""
    for name in module._flat_weights_names:
        if "hh" in name:
            weight = getattr(module, name)
            del module._parameters[name]
            setattr(module, name, torch.zeros_like(weight))
    return module(x)


@pytest.mark.parametrize("put", [swap_list, change_list, shadow, replace])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_weights_that_count(kind: str, options: dict[str, Any], put: Module) -> None:
    module, x = build(kind, 4, 6, **options), torch.randn(5, 3, 4)
    before, plain = without_recurrence(module)(x)[0], module(x)[0]
    torch.testing.assert_close(put(module, x)[0], before)
    if put is not replace:
        assert torch.equal(module(x)[0], plain)


class DroppedRecurrence(rnnkern.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        kept, names = self._flat_weights, self._flat_weights_names
        self._flat_weights = [w * 0 if "hh" in n else w for w, n in zip(kept, names, strict=True)]
        try:
            return super().forward(input, hx)
        finally:
            self._flat_weights = kept


@pytest.mark.cpu_only
def test_the_weights_that_count_in_a_compiled_call() -> None:
    module, x = DroppedRecurrence(4, 6), torch.randn(5, 3, 4)
    plain = rnnkern.LSTM(4, 6)
    plain.load_state_dict(module.state_dict())
    wanted = without_recurrence(plain)(x)[0]
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(module, backend="eager")(x)[0], wanted)
    kept = list(plain._flat_weights)
    plain._flat_weights = [
        w * 0 if "hh" in n else w for w, n in zip(kept, plain._flat_weights_names, strict=True)
    ]
    torch.testing.assert_close(torch.compile(plain, backend="eager")(x)[0], wanted)


def test_dropped_weights_have_gradients() -> None:
    class DropConnect(rnnkern.GRU):
        def forward(self, input: Tensor, hx: Tensor | None = None) -> Any:
            kept = self._flat_weights
            self._flat_weights = [w * 0.5 for w in kept]
            try:
                return super().forward(input, hx)
            finally:
                self._flat_weights = kept

    ours = DropConnect(4, 6)
    theirs = nn.GRU(4, 6)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(0.5)
    x = torch.randn(5, 3, 4)
    ours(x)[0].sum().backward()
    theirs(x)[0].sum().backward()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad * 0.5)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_a_parametrized_cell_is_a_plain_call_that_computes_its_weights_once(
    kind: str, grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(nn.Module):
        calls = 0

        def forward(self, weight: Tensor) -> Tensor:
            self.calls += 1
            return weight * 0.5

    cell, x = build(kind, 3, 4), torch.randn(2, 3)
    theirs = reverted(cell)
    counted = Counted()
    register_parametrization(cell, "weight_hh", counted)
    register_parametrization(theirs, "weight_hh", Counted())
    monkeypatch.setattr(forward, "_checked_cell", None)
    counted.calls = 0
    seen: list[list[Any]] = []
    with torch.set_grad_enabled(grad):
        for module in (cell, theirs):
            state = module(x)
            state = module(x, state)
            h = state if isinstance(state, Tensor) else state[0]
            if grad:
                h.sum().backward()
            seen.append([h.detach(), *(p.grad for p in module.parameters())])
    assert counted.calls == 2
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b)
    register_parametrization(cell, "bias_ih", Counted())
    cell(x)
