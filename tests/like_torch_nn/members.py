"""Parameters, buffers and children, and the dictionaries of state they are saved in."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from support import CELLS, LAYERS, flatten
from torch import Tensor, nn

from like_torch_nn import (
    FULL,
    ROWS,
    H,
    I,
    Row,
    Side,
    attempt,
    loss_of,
    names_of,
    same_objects,
    warned,
)
from rnnkern import constructor


@ROWS.row()
def members(side: Side) -> Any:
    module = side.make(**(FULL if side.is_layer else {}))
    module.register_buffer("count", torch.zeros(1))
    module.register_buffer("hidden", torch.zeros(2), persistent=False)
    module.child = nn.Linear(2, 2)
    model = nn.ModuleDict({"a": module, "b": nn.ModuleList([module])})
    return (
        [name for name, _ in model.named_parameters(prefix="p")],
        [name for name, _ in module.named_parameters(recurse=False)],
        [name for name, _ in model.named_parameters(remove_duplicate=False)],
        [name for name, _ in model.named_buffers()],
        [name for name, _ in module.named_children()],
        [(name, type(m).__name__) for name, m in model.named_modules()],
        list(model.state_dict()),
        len(list(module.parameters())),
        [type(m).__name__ for m in module.modules()],
    )


@ROWS.row()
def get_by_name(side: Side) -> Any:
    module = side.make()
    model = nn.Module()
    model.rnn = module
    return (
        model.get_parameter(f"rnn.{side.weight}"),
        model.get_submodule("rnn") is module,
        attempt(lambda: module.get_parameter("weight_zz")),
        attempt(lambda: module.get_buffer("count")),
        attempt(lambda: module.get_submodule("child")),
        attempt(lambda: module.weight_zz),
        attempt(module.get_extra_state),
        attempt(lambda: module.set_extra_state(1)),
    )


@ROWS.row()
def set_submodule(side: Side) -> Any:
    model = nn.Sequential(nn.Linear(3, 3))
    model.set_submodule("0", side.make())
    return side.outcome(model)


@ROWS.row(*LAYERS)
def all_weights(side: Side) -> Any:
    module = side.make(**FULL)
    return module.all_weights, module._all_weights, module._flat_weights_names


@ROWS.row(*LAYERS)
def all_weights_cannot_be_set(side: Side) -> Any:
    return attempt(lambda: setattr(side.make(), "all_weights", []))


@ROWS.row(*LAYERS)
def flatten_parameters(side: Side) -> Any:
    module = side.make()
    return module.flatten_parameters(), same_objects(module), side.outcome(module)


@ROWS.row()
def a_parameter_replaced(side: Side) -> Any:
    module = side.make()
    setattr(module, side.weight, nn.Parameter(torch.ones(getattr(module, side.weight).shape)))
    return names_of(module), side.outcome(module), side.is_layer and same_objects(module)


@ROWS.row()
def a_parameter_registered_again(side: Side) -> Any:
    module = side.make()
    shape = getattr(module, side.weight).shape
    module.register_parameter(side.weight, nn.Parameter(torch.ones(shape)))
    return names_of(module), getattr(module, side.weight), side.is_layer and same_objects(module)


@ROWS.row()
def a_parameter_deleted(side: Side) -> Any:
    module = side.make()
    delattr(module, side.weight)
    return names_of(module), attempt(lambda: getattr(module, side.weight)), hasattr(module, "child")


@ROWS.row("RNNCell", "LSTMCell", "GRUCell")
def a_deleted_parameter_is_missed(side: Side) -> Any:
    module = side.make()
    delattr(module, side.weight)
    return attempt(lambda: module(side.x()))


@ROWS.row()
def a_parameter_of_none(side: Side) -> Any:
    module = side.make()
    setattr(module, side.weight, None)
    return names_of(module), list(module.state_dict()), type(attempt(lambda: module(side.x())))


@ROWS.row(*CELLS)
def one_bias_of_none(side: Side) -> Any:
    module = side.make()
    module.bias_hh = None
    return attempt(lambda: side.outcome(module))


@ROWS.row()
def a_parameter_from_a_plain_tensor(side: Side) -> Any:
    module = side.make()
    shape = getattr(module, side.weight).shape
    return attempt(lambda: setattr(module, side.weight, torch.ones(shape)))


@ROWS.row()
def a_plain_tensor_for_a_deleted_parameter(side: Side) -> Any:
    module = side.make()
    weight = getattr(module, side.weight)
    delattr(module, side.weight)
    setattr(module, side.weight, weight.detach() * 2)
    return names_of(module), side.outcome(module)


@ROWS.row()
def a_buffer_for_a_deleted_parameter(side: Side) -> Any:
    module = side.make()
    weight = getattr(module, side.weight)
    delattr(module, side.weight)
    module.register_buffer(side.weight, weight.detach() * 2)
    return names_of(module), list(module.state_dict()), attempt(lambda: side.outcome(module))


@ROWS.row()
def odd_registrations(side: Side) -> Any:
    module = side.make()
    calls = [
        lambda: module.register_parameter("a.b", None),
        lambda: module.register_parameter("", None),
        lambda: module.register_parameter("forward", None),
        lambda: module.register_buffer(side.weight, torch.ones(1)),
        lambda: module.add_module(side.weight, nn.Linear(1, 1)),
        lambda: module.register_buffer("b", 3),
        lambda: module.register_module("m", nn.Linear(1, 1)),
        lambda: setattr(module, side.weight, 3),
        lambda: delattr(module, "nothing"),
    ]
    return [attempt(call) for call in calls], list(module.state_dict())


@ROWS.row()
def attributes_of_ones_own(side: Side) -> Any:
    """Names that a decoder or an agent may give: they are the user's."""
    module = side.make()
    own = ["cell", "step", "steps", "kernel", "layer", "spec", "states", "reset", "lengths", "plan"]
    own += [] if side.is_layer else ["mode", "num_layers", "dropout", "batch_first", "proj_size"]
    for name in own:
        setattr(module, name, name)
    return side.outcome(module), {name: vars(module)[name] for name in own}


THE_USERS: dict[str, Any] = {
    "submodule": lambda: nn.Dropout(0.5),
    "parameter": lambda: nn.Parameter(torch.ones(H)),
    "buffer": lambda: nn.Buffer(torch.ones(H)),
    "function": lambda: len,
    "tensor": lambda: torch.ones(H),
    "string": lambda: "variational",
    "none": lambda: None,
    "dictionary": lambda: {"p": 0.5},
}


def named_like_options(make: Any) -> Row:
    """rnnkern's constructors have options of such names: numbers."""

    def row(side: Side) -> Any:
        module = side.make()
        own = {name: make() for name in constructor.DEFAULTS}
        for name, value in own.items():
            setattr(module, name, value)
        found = [getattr(module, name) is value for name, value in own.items()]
        module.reset_parameters()
        text = repr(module)
        outputs = flatten(module(side.x(), side.hx()))
        loss_of(list(outputs.values())).backward()
        return (
            found,
            text,
            outputs,
            [p.grad for p in module.parameters()],
            list(module.state_dict()),
        )

    return row


ROWS.add(
    {f"own-{name}-named-like-an-option": named_like_options(m) for name, m in THE_USERS.items()}
)


@ROWS.row()
def methods_named_like_options(side: Side) -> Any:
    class Mine(side.type):
        def zoneout(self, h: Tensor) -> Tensor:
            return h

        @property
        def recurrent_dropout(self) -> str:
            return "none"

    module = side.make(of=Mine)
    return module.zoneout(side.x()), module.recurrent_dropout, side.outcome(module)


@ROWS.row()
def a_subclass_without_init(side: Side) -> Any:
    class Mine(side.type):
        def __init__(self) -> None:
            self.weight = nn.Parameter(torch.ones(1))

    return attempt(Mine)


# State dicts.


@ROWS.row()
def state_dict(side: Side) -> Any:
    module = side.make()
    into: dict[str, Any] = OrderedDict(old=1)
    kept = module.state_dict(keep_vars=True)
    return (
        dict(module.state_dict(prefix="rnn.")),
        list(module.state_dict(destination=into)),
        [type(value).__name__ for value in kept.values()],
        module.state_dict()._metadata,
        module._version,
    )


def loading(change: Any, **options: Any) -> Row:
    def row(side: Side) -> Any:
        module, state = side.make(), side.make().state_dict()
        change(state, side)
        seen = warned(lambda: str(module.load_state_dict(state, **options)))
        return seen, side.outcome(module)

    return row


ROWS.add(
    {
        "load": loading(lambda state, s: None),
        "load-assign": loading(lambda state, s: None, assign=True),
        "load-missing": loading(lambda state, s: state.pop(s.weight)),
        "load-missing-not-strict": loading(lambda state, s: state.pop(s.weight), strict=False),
        "load-unexpected": loading(lambda state, s: state.update(foo=torch.ones(1))),
        "load-unexpected-not-strict": loading(
            lambda state, s: state.update(foo=torch.ones(1)), strict=False
        ),
        "load-other-size": loading(lambda state, s: state.update({s.weight: torch.ones(2, 2)})),
        "load-no-tensor": loading(lambda state, s: state.update({s.weight: 3})),
        "load-other-dtype": loading(
            lambda state, s: state.update({s.weight: state[s.weight].double()})
        ),
        "load-not-a-dict": loading(lambda state, s: state.clear()),
    }
)


@ROWS.row()
def load_by_assignment_in_another_dtype(side: Side) -> Any:
    module = side.make()
    told = module.load_state_dict(side.make().double().state_dict(), assign=True)
    return str(told), side.outcome(module, side.x(dtype=torch.float64))


@ROWS.row()
def hooks_of_state_dicts(side: Side) -> Any:
    module, seen = side.make(), []
    model = nn.Sequential(module)
    handles = [
        module.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append(("pre", prefix))),
        module.register_state_dict_post_hook(
            lambda m, state, prefix, local: seen.append(("post", prefix, list(state)))
        ),
        module._register_state_dict_hook(
            lambda m, state, prefix, local: state.update({f"{prefix}more": torch.ones(1)})
        ),
        module.register_load_state_dict_pre_hook(
            lambda m, state, prefix, *rest: state.pop(f"{prefix}more")
        ),
        module.register_load_state_dict_post_hook(
            lambda m, keys: seen.append(("loaded", keys.missing_keys, keys.unexpected_keys))
        ),
    ]
    state = model.state_dict()
    told = str(model.load_state_dict(state))
    for handle in handles:
        handle.remove()
    return list(state), told, seen, list(model.state_dict())


@ROWS.row()
def extra_state(side: Side) -> Any:
    class Mine(side.type):
        def get_extra_state(self) -> Any:
            return {"steps": 3}

        def set_extra_state(self, state: Any) -> None:
            self.loaded = state

    module = side.make(of=Mine)
    state = module.state_dict()
    module.load_state_dict(state)
    return list(state), module.loaded


@ROWS.row()
def a_subclass_saves_and_loads_its_own_way(side: Side) -> Any:
    class Mine(side.type):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}version"] = torch.tensor(2)

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            self.version = state.pop(f"{prefix}version")
            super()._load_from_state_dict(state, prefix, *rest)

    module = side.make(of=Mine)
    return str(module.load_state_dict(module.state_dict())), module.version, module.state_dict()


@ROWS.row()
def meta_then_memory_then_weights(side: Side) -> Any:
    weights, again = side.make().state_dict(), side.make().state_dict()
    emptied = side.type(I, H, device="meta").to_empty(device="cpu")
    emptied.load_state_dict(weights)
    assigned = side.type(I, H, device="meta")
    assigned.load_state_dict(weights, assign=True)
    refused = side.type(I, H, device="meta")
    return (
        side.outcome(emptied),
        side.outcome(assigned),
        warned(lambda: str(refused.load_state_dict(again)))[1],
        attempt(lambda: repr(refused.to("cpu"))),
    )
