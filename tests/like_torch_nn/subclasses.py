"""Subclasses, and weights that are not among the parameters."""

from __future__ import annotations

from typing import Any

import torch
from support import CELLS, LAYERS, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    pack_sequence,
)

from like_torch_nn import (
    ROWS,
    I,
    N,
    Row,
    Side,
    T,
    attempt,
    each_state,
)


@ROWS.row()
def a_subclass_with_its_own_forward(side: Side) -> Any:
    class Mine(side.type):
        def __init__(self, *sizes: int, scale: float = 1.0) -> None:
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, input: Tensor, hx: Any = None, extra: float = 1.0) -> Any:
            return super().forward(input * self.scale * extra, hx)

    module = side.make(of=Mine, scale=2.0)
    return repr(module), side.outcome(module), module(side.x(), extra=3.0)


@ROWS.row()
def a_subclass_that_wraps_its_call(side: Side) -> Any:
    class Mine(side.type):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(args[0] * 2, *args[1:], **kwargs)

    return side.outcome(side.make(of=Mine))


@ROWS.row()
def several_bases(side: Side) -> Any:
    class Mixin:
        def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.note = note

        def forward(self, input: Tensor, *rest: Any) -> Any:
            return super().forward(input * 2, *rest)  # type: ignore[misc]

    class Mine(Mixin, side.type):
        pass

    module = side.make(of=Mine, note="kept")
    return module.note, side.outcome(module)


@ROWS.row()
def attributes_that_are_properties(side: Side) -> Any:
    class Mine(side.type):
        @property
        def hidden_size(self) -> int:
            return self._size

        @hidden_size.setter
        def hidden_size(self, size: int) -> None:
            self._size = size

    return side.outcome(side.make(of=Mine))


@ROWS.row()
def weights_that_are_properties(side: Side) -> Any:
    def doubled(self: Any) -> Tensor:
        return self._parameters[side.weight] * 2

    made = type("Mine", (side.type,), {})
    module = side.make(of=made)
    setattr(made, side.weight, property(doubled))
    return type(attempt(lambda: side.outcome(module))), getattr(module, side.weight)


@ROWS.row()
def attributes_looked_up_in_its_own_way(side: Side) -> Any:
    class Mine(side.type):
        def __getattr__(self, name: str) -> Any:
            if name == "answer":
                return 42
            return super().__getattr__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)

    module = side.make(of=Mine)
    return module.answer, attempt(lambda: module.question), side.outcome(module)


@ROWS.row()
def weights_looked_up_in_its_own_way(side: Side) -> Any:
    class Halved(side.type):
        def __getattr__(self, name: str) -> Any:
            value = super().__getattr__(name)
            return value / 2 if name.startswith("weight") else value

    return side.outcome(side.make(of=Halved), side.x(), side.hx())


@ROWS.row()
def every_attribute_looked_up_in_its_own_way(side: Side) -> Any:
    class Mine(side.type):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return 2 * value if name == "weights" else value

    return side.outcome(side.make(of=Mine))


def overriding(name: str, method: Any) -> Row:
    """A subclass that overrides one of the methods which torch.nn's forward calls."""

    def row(side: Side) -> Any:
        seen: list[Any] = []
        made = type("Mine", (side.type,), {})

        def own(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return method(super(made, self), *args, **kwargs)

        setattr(made, name, own)
        module = side.make(of=made)
        packed = pack_sequence([side.x(5, I), side.x(2, I)])
        calls = [
            attempt(lambda: module(side.x())),
            attempt(lambda: module(side.x(), side.hx())),
            attempt(lambda: flatten(module(packed, side.hx()))),
            attempt(lambda: module(side.x(T, I))),
            attempt(lambda: module(side.x(T, N, 7))),
        ]
        return calls, len(seen)

    return row


def _refusing(base: Any, *args: Any) -> Any:
    raise ValueError("not today")


ROWS.add(
    {
        "override-check-forward-args": overriding(
            "check_forward_args", lambda base, *args: base.check_forward_args(*args)
        ),
        "override-check-forward-args-to-refuse": overriding("check_forward_args", _refusing),
        "override-check-input": overriding(
            "check_input", lambda base, *args: base.check_input(*args)
        ),
        "override-check-input-to-refuse": overriding("check_input", _refusing),
        "override-check-hidden-size-to-refuse": overriding("check_hidden_size", _refusing),
        "override-permute-hidden": overriding(
            "permute_hidden", lambda base, hx, order: each_state(hx, lambda h: h * 2)
        ),
        "override-expected-hidden-size": overriding(
            "get_expected_hidden_size", lambda base, *args: base.get_expected_hidden_size(*args)
        ),
        "override-update-flat-weights": overriding("_update_flat_weights", _refusing),
    },
    *LAYERS,
)
ROWS.add({"override-expected-cell-size": overriding("get_expected_cell_size", _refusing)}, "LSTM")


@ROWS.row(*LAYERS)
def checks_of_the_instance(side: Side) -> Any:
    module, seen = side.make(), []
    old = module.check_forward_args
    module.check_forward_args = lambda *args: (seen.append(1), old(*args))
    return module(side.x()), seen


@ROWS.row(*LAYERS)
def methods_of_the_checks(side: Side) -> Any:
    """Called by themselves."""
    module, x, hx = side.make(), side.x(), side.hx()
    return (
        module.check_forward_args(x, hx, None),
        module.check_input(x, None),
        module.get_expected_hidden_size(x, None),
        module.get_expected_hidden_size(x, torch.tensor([2, 1])),
        module.permute_hidden(hx, None) is hx,
        module.permute_hidden(hx, torch.tensor([1, 0])),
        attempt(lambda: module.check_input(side.x(3), None)),
        module._weights_have_changed(),
        module._update_flat_weights(),
    )


# Weights put elsewhere.


@ROWS.row(*LAYERS)
def flat_weights_swapped(side: Side) -> Any:
    class Mine(side.type):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            kept = self._flat_weights
            self._flat_weights = [w * 0.5 for w in kept]
            try:
                return super().forward(input, hx)
            finally:
                self._flat_weights = kept

    return side.outcome(side.make(of=Mine))


@ROWS.row(*LAYERS)
def flat_weights_changed_in_place(side: Side) -> Any:
    module = side.make()
    module._flat_weights[1] = module._flat_weights[1].detach() * 0.5
    return side.outcome(module)


@ROWS.row()
def weights_that_shadow_parameters(side: Side) -> Any:
    module = side.make()
    vars(module)[side.weight] = torch.zeros_like(getattr(module, side.weight))
    return side.outcome(module)


@ROWS.row()
def weights_lazily_negated(side: Side) -> Any:
    module = side.make()
    weight = getattr(module, side.weight).detach()
    delattr(module, side.weight)
    setattr(module, side.weight, torch._neg_view(weight))
    return side.outcome(module)


@ROWS.row()
def weights_of_another_dtype(side: Side) -> Any:
    module, other = side.make(), side.make()
    setattr(module, side.weight, nn.Parameter(getattr(module, side.weight).detach().double()))
    for parameter in other.parameters():
        parameter.data = parameter.data.double()
    told = attempt(lambda: module(side.x()))
    return type(told).__name__, side.outcome(other, side.x(dtype=torch.float64))


@ROWS.row("RNN", "GRU", *CELLS)
def weights_that_do_not_fit(side: Side) -> Any:
    """An error; torch.nn's LSTM reads what it finds."""
    module = side.make()
    setattr(module, side.weight, nn.Parameter(torch.ones(2, 2)))
    return isinstance(attempt(lambda: module(side.x())), RuntimeError)


@ROWS.row()
def weights_without_a_shape_yet(side: Side) -> Any:
    module = side.make()
    delattr(module, side.weight)
    setattr(module, side.weight, nn.UninitializedParameter())
    return type(attempt(lambda: module(side.x()))).__name__


@ROWS.row(*LAYERS)
def weights_made_in_inference_mode(side: Side) -> Any:
    with torch.inference_mode():
        module = side.make()
    told = attempt(lambda: module(side.x()))
    with torch.no_grad():
        return type(told).__name__, module(side.x())
