"""What a class is, and how modules are made and print themselves."""

from __future__ import annotations

import inspect
import typing
import weakref
from collections import OrderedDict
from typing import Any

import torch
from support import LAYERS
from torch import Tensor, nn

from like_torch_nn import (
    FULL,
    ROWS,
    H,
    I,
    Row,
    Side,
    attempt,
    warned,
)

# What rnnkern's classes have besides: private, and what TorchScript asks for.
OWN_NAMES = ("_torch_forward", "__prepare_scriptable__", "_gain_names")


@ROWS.row()
def public_names_of_the_class(side: Side) -> Any:
    return [name for name in dir(side.type) if name not in OWN_NAMES]


@ROWS.row()
def names_of_an_instance(side: Side) -> Any:
    module = side.make()
    return [n for n in dir(module) if n not in OWN_NAMES], list(vars(module))


@ROWS.row()
def constants(side: Side) -> Any:
    kind = side.type
    return kind.__constants__, getattr(kind, "__jit_unused_properties__", None)


@ROWS.row()
def type_hints(side: Side) -> Any:
    return {name: str(hint) for name, hint in typing.get_type_hints(side.type).items()}


@ROWS.row()
def signature_of_the_constructor(side: Side) -> Any:
    """Without the options that rnnkern adds, which are by keyword alone."""
    return [
        [
            (p.name, p.kind)
            for p in inspect.signature(made).parameters.values()
            if p.kind is not p.KEYWORD_ONLY
        ]
        for made in (side.type, side.type.__init__)
    ]


@ROWS.row()
def signature_of_forward(side: Side) -> Any:
    """Positional parameters; those that rnnkern adds are by keyword alone."""
    parameters = inspect.signature(side.type.forward).parameters.values()
    return [(p.name, p.default is None) for p in parameters if p.kind is not p.KEYWORD_ONLY]


@ROWS.row()
def is_an_instance(side: Side) -> Any:
    module, base = side.make(), getattr(nn, side.kind)
    family = nn.RNNBase if side.is_layer else nn.RNNCellBase
    return isinstance(module, (base, family)), issubclass(side.type, base), side.type.__name__


@ROWS.row()
def class_changed_to_a_subclass(side: Side) -> Any:
    class Mine(side.type):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            return super().forward(input * 2, hx)

    module = side.make()
    module.__class__ = Mine
    return side.outcome(module)


@ROWS.row()
def class_with_slots(side: Side) -> Any:
    class Mine(side.type):
        __slots__ = ("note",)

    module = side.make(of=Mine)
    module.note = "kept"
    return module.note, side.outcome(module)


@ROWS.row()
def hash_equality_and_weak_references(side: Side) -> Any:
    one, other = side.make(), side.make()
    reference = weakref.ref(one)
    seen = [one == one, one == other, len({one, other, one}), reference() is one]
    del one
    return seen, reference() is None


# Construction.

CONSTRUCTED: dict[str, Row] = {
    "no-arguments": lambda s: s.type(),
    "one-argument": lambda s: s.type(3),
    "no-input": lambda s: s.type(0, 4),
    "no-hidden": lambda s: s.type(3, 0),
    "negative": lambda s: s.type(3, -4),
    "float-sizes": lambda s: s.type(3.0, 4),
    "float-hidden": lambda s: s.type(3, 4.0),
    "strings": lambda s: s.type("3", "4"),
    "unknown-argument": lambda s: s.type(3, 4, foo=1),
    "bias-is-a-number": lambda s: s.type(3, 4, bias=1),
    "unknown-device": lambda s: s.type(3, 4, device="nowhere"),
    "integers": lambda s: s.type(3, 4, dtype=torch.int64),
}
CONSTRUCTED_LAYERS: dict[str, Row] = {
    "no-layers": lambda s: s.type(3, 4, 0),
    "negative-layers": lambda s: s.type(3, 4, num_layers=-1),
    "dropout-2": lambda s: s.type(3, 4, 2, dropout=2),
    "dropout-negative": lambda s: s.type(3, 4, 2, dropout=-0.5),
    "dropout-true": lambda s: s.type(3, 4, 2, dropout=True),
    "dropout-of-one-layer": lambda s: s.type(3, 4, dropout=0.5),
    "batch-first-is-a-number": lambda s: s.type(3, 4, batch_first=1),
    "proj-negative": lambda s: s.type(3, 4, proj_size=-1),
    "proj-too-large": lambda s: s.type(3, 4, proj_size=4),
    "proj": lambda s: s.type(3, 4, proj_size=2),
    "nonlinearity": lambda s: s.type(3, 4, nonlinearity="sigmoid"),
    "mode": lambda s: s.type("LSTM", 3, 4),
}


def printed(row: Row) -> Row:
    """The module's text and attributes, or the exception; and warnings."""

    def call(side: Side) -> Any:
        module = row(side)
        own = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str))}
        return repr(module), own, list(module.parameters())

    return lambda side: warned(lambda: call(side))


ROWS.add({f"construct-{name}": printed(row) for name, row in CONSTRUCTED.items()})
ROWS.add({f"construct-{name}": printed(row) for name, row in CONSTRUCTED_LAYERS.items()}, *LAYERS)


@ROWS.row("RNNCell")
def unknown_nonlinearity_of_a_cell(side: Side) -> Any:
    module = side.make(nonlinearity="sigmoid")
    return repr(module), attempt(lambda: module(side.x()))


@ROWS.row()
def construction_uses_the_same_random_numbers(side: Side) -> Any:
    options = FULL if side.is_layer else {"bias": False}
    return side.make(**options).state_dict(), torch.rand(2)


@ROWS.row()
def default_dtype_and_device(side: Side) -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        module = side.make()
        seen = [side.outcome(module, side.x(dtype=torch.float64))]
    finally:
        torch.set_default_dtype(before)
    with torch.device("meta"):
        seen.append([p.device.type for p in side.make().parameters()])
    torch.set_default_device("meta")
    try:
        seen.append([p.device.type for p in side.make().parameters()])
    finally:
        torch.set_default_device(None)
    return seen


@ROWS.row()
def skip_init(side: Side) -> Any:
    """Not for layers, which do not name `device` in their constructor."""
    module = attempt(lambda: nn.utils.skip_init(side.type, I, H))
    if isinstance(module, nn.Module):
        module.load_state_dict(side.make().state_dict())
        return repr(module), side.outcome(module)
    return module


@ROWS.row()
def reset_parameters(side: Side) -> Any:
    module = side.make()
    torch.manual_seed(7)
    return module.reset_parameters(), module.state_dict()


@ROWS.row()
def a_subclass_has_its_own_reset_parameters(side: Side) -> Any:
    class Mine(side.type):
        def reset_parameters(self) -> None:
            for parameter in self.parameters():
                nn.init.constant_(parameter, 0.25)

    return side.outcome(side.make(of=Mine))


@ROWS.row()
def initialisers(side: Side) -> Any:
    module = side.make()
    for name, parameter in module.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif "hh" in name:
            nn.init.orthogonal_(parameter)
        else:
            nn.init.xavier_uniform_(parameter, nn.init.calculate_gain("tanh"))
    return side.outcome(module)


# Text.


@ROWS.row()
def text(side: Side) -> Any:
    all_options: list[dict[str, Any]] = [{}, {"bias": False}]
    if side.is_layer:
        all_options += [FULL, {"num_layers": 3}]
    if side.kind.startswith("RNN"):
        all_options.append({"nonlinearity": "relu"})
    if side.kind == "LSTM":
        all_options.append({"proj_size": 2})
    modules = [side.make(**options) for options in all_options]
    model = nn.Sequential(OrderedDict(rnn=modules[0], head=nn.Linear(4, 2)))
    return [(str(m), m.extra_repr(), m._get_name()) for m in modules], repr(model)


@ROWS.row()
def text_with_children(side: Side) -> Any:
    module = side.make()
    module.add_module("norm", nn.LayerNorm(4))
    return repr(module)
