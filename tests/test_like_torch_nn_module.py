"""Like torch.nn: what a module is, keeps and becomes. Everything but its call."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
import typing
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from like_torch_nn import Difference, H, I, Row, Side, Table, attempt, drawn, warned
from support import CELLS, LAYERS
from torch import Tensor, nn

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning"),
]

ROWS = Table()

_MODE = "a cell has an attribute `mode` of its own"

# By row: the reason, and the kinds of module.
DIFFERENCES: dict[str, Difference] = {
    "public_names_of_the_class": (_MODE, CELLS),
    "names_of_an_instance": (_MODE, CELLS),
    "attributes_of_ones_own": (_MODE, CELLS),
    "sizes_changed_afterwards": ("the plain call does not look at input_size", LAYERS),
}

FULL: dict[str, Any] = {"num_layers": 2, "bidirectional": True, "batch_first": True, "dropout": 0.5}


def names(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def same_objects(side: Side, module: Any) -> list[bool]:
    """Which of `_flat_weights` are what the attributes say."""
    return [
        a is getattr(module, b, None)
        for a, b in zip(module._flat_weights, module._flat_weights_names, strict=True)
    ]


# The class.


@ROWS.row()
def public_names_of_the_class(side: Side) -> Any:
    return [name for name in dir(side.type) if name != "_torch_forward"]


@ROWS.row()
def names_of_an_instance(side: Side) -> Any:
    module = side.make()
    return [n for n in dir(module) if n != "_torch_forward"], list(vars(module))


@ROWS.row()
def constants(side: Side) -> Any:
    kind = side.type
    return kind.__constants__, getattr(kind, "__jit_unused_properties__", None)


@ROWS.row()
def type_hints(side: Side) -> Any:
    return {name: str(hint) for name, hint in typing.get_type_hints(side.type).items()}


@ROWS.row()
def signature_of_the_constructor(side: Side) -> Any:
    return str(inspect.signature(side.type)), str(inspect.signature(side.type.__init__))


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


# Parameters, buffers and children.


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
    return module.flatten_parameters(), same_objects(side, module), side.outcome(module)


@ROWS.row()
def a_parameter_replaced(side: Side) -> Any:
    module = side.make()
    setattr(module, side.weight, nn.Parameter(torch.ones(getattr(module, side.weight).shape)))
    return names(module), side.outcome(module), side.is_layer and same_objects(side, module)


@ROWS.row()
def a_parameter_registered_again(side: Side) -> Any:
    module = side.make()
    shape = getattr(module, side.weight).shape
    module.register_parameter(side.weight, nn.Parameter(torch.ones(shape)))
    return names(module), getattr(module, side.weight), side.is_layer and same_objects(side, module)


@ROWS.row()
def a_parameter_deleted(side: Side) -> Any:
    module = side.make()
    delattr(module, side.weight)
    return names(module), attempt(lambda: getattr(module, side.weight)), hasattr(module, "child")


@ROWS.row("RNNCell", "LSTMCell", "GRUCell")
def a_deleted_parameter_is_missed(side: Side) -> Any:
    module = side.make()
    delattr(module, side.weight)
    return attempt(lambda: module(side.x()))


@ROWS.row()
def a_parameter_of_none(side: Side) -> Any:
    module = side.make()
    setattr(module, side.weight, None)
    return names(module), list(module.state_dict()), type(attempt(lambda: module(side.x())))


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
    return names(module), side.outcome(module)


@ROWS.row()
def a_buffer_for_a_deleted_parameter(side: Side) -> Any:
    module = side.make()
    weight = getattr(module, side.weight)
    delattr(module, side.weight)
    module.register_buffer(side.weight, weight.detach() * 2)
    return names(module), list(module.state_dict()), attempt(lambda: side.outcome(module))


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


# Copies.


@ROWS.row()
def copies(side: Side) -> Any:
    module = side.make()
    deep, shallow, pickled = copy.deepcopy(module), copy.copy(module), pickle.dumps(module)
    seen = []
    for other in (deep, shallow, pickle.loads(pickled)):
        seen.append(list(vars(other)))
        seen.append([a is b for a, b in zip(other.parameters(), module.parameters(), strict=True)])
        seen.append(side.outcome(other))
    return seen


@ROWS.row()
def a_shallow_copy_shares_its_dictionaries(side: Side) -> Any:
    module = side.make()
    other = copy.copy(module)
    setattr(other, side.weight, nn.Parameter(torch.ones(getattr(module, side.weight).shape)))
    return getattr(module, side.weight), side.outcome(other), module(side.x())


@ROWS.row()
def saved_and_loaded(side: Side) -> Any:
    buffer = io.BytesIO()
    torch.save(side.make(), buffer)
    buffer.seek(0)
    refused = attempt(lambda: torch.load(buffer, weights_only=True))
    buffer.seek(0)
    module = torch.load(buffer, weights_only=False)
    return type(refused).__name__, list(vars(module)), side.outcome(module)


@ROWS.row()
def bound_methods(side: Side) -> Any:
    module = side.make()
    forward = pickle.loads(pickle.dumps(module.forward))
    same = copy.deepcopy(module.forward)
    return (
        inspect.ismethod(module.forward),
        module.forward.__name__,
        forward(side.x()),
        same(side.x()),
    )


@ROWS.row()
def saved_and_loaded_as_a_safe_global(side: Side) -> Any:
    buffer = io.BytesIO()
    torch.save(side.make(), buffer)
    buffer.seek(0)
    safe = [side.type, set, OrderedDict]
    if hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        unsafe = len(torch.serialization.get_unsafe_globals_in_checkpoint(buffer))
        buffer.seek(0)
    with torch.serialization.safe_globals(safe):
        return unsafe, side.outcome(torch.load(buffer, weights_only=True))


@ROWS.row()
def state_for_pickle(side: Side) -> Any:
    state = side.make().__getstate__()
    return {key: value for key, value in state.items() if not key.startswith("_forward")}


def old_pickle(*missing: str) -> Row:
    """`__setstate__` of what an older torch has saved."""

    def row(side: Side) -> Any:
        module = side.make(num_layers=2)
        state = module.__getstate__()
        for name in missing:
            state.pop(name, None)
        other = side.type.__new__(side.type)
        other.__setstate__(state)
        return list(vars(other)), side.outcome(other)

    return row


ROWS.add(
    {
        "old-pickle": old_pickle(),
        "old-pickle-without-proj": old_pickle("proj_size"),
        "old-pickle-without-hooks": old_pickle("_forward_pre_hooks", "_state_dict_hooks"),
    },
    *LAYERS,
)


@ROWS.row(*LAYERS)
def pickle_from_before_names(side: Side) -> Any:
    """`all_weights` held the parameters themselves."""
    module = side.make(num_layers=2)
    state = module.__getstate__()
    state["all_weights"] = module.all_weights
    for name in ("_all_weights", "_flat_weights", "_flat_weights_names", "proj_size"):
        del state[name]
    other = side.type.__new__(side.type)
    other.__setstate__(state)
    return other._all_weights, other._flat_weights_names, side.outcome(other)


@ROWS.row("RNNCell", "LSTMCell", "GRUCell")
def old_pickle_of_a_cell(side: Side) -> Any:
    state = side.make().__getstate__()
    other = side.type.__new__(side.type)
    other.__setstate__(state)
    return list(vars(other)), side.outcome(other)


@ROWS.row()
def replicas(side: Side) -> Any:
    """What nn.DataParallel makes for each GPU: parameters become plain tensors."""
    module = side.make()
    replica = module._replicate_for_data_parallel()
    replica._former_parameters = OrderedDict()
    for name, parameter in module.named_parameters():
        setattr(replica, name, parameter * 2)
        replica._former_parameters[name] = parameter
    return names(replica), list(replica.state_dict()), side.outcome(replica), side.outcome(module)


@ROWS.row()
def data_parallel_without_a_gpu(side: Side) -> Any:
    module = nn.DataParallel(side.make())
    return list(module.state_dict()), side.outcome(module)


# Conversions.

CONVERSIONS: dict[str, Row] = {
    "half": lambda s: s.make().half(),
    "bfloat16": lambda s: s.make().bfloat16(),
    "double": lambda s: s.make().double(),
    "float": lambda s: s.make().double().float(),
    "type": lambda s: s.make().type(torch.float64),
    "type-by-name": lambda s: s.make().type("torch.DoubleTensor"),
    "to-dtype": lambda s: s.make().to(torch.float64),
    "to-device-and-dtype": lambda s: s.make().to("cpu", torch.float64, non_blocking=True),
    "to-tensor": lambda s: s.make().to(torch.ones(1, dtype=torch.float64)),
    "to-memory-format": lambda s: s.make().to(memory_format=torch.channels_last),
    "to-complex": lambda s: s.make().to(torch.complex64),
    "to-integers": lambda s: s.make().to(torch.int64),
    "to-empty": lambda s: s.make().to_empty(device="meta"),
    "to-meta": lambda s: s.make().to("meta"),
    "cpu": lambda s: s.make().cpu(),
    "cuda-there-is-none": lambda s: s.make().to("hpu"),
    "share-memory": lambda s: s.make().share_memory(),
    "requires-grad": lambda s: s.make().requires_grad_(False),
    "eval": lambda s: s.make().eval(),
    "train": lambda s: s.make().train(False).train(),
    "train-of-a-number": lambda s: s.make().train(1),
    "apply-private": lambda s: s.make()._apply(lambda w: w * 2),
    "apply-private-not-deep": lambda s: s.make()._apply(lambda w: w * 2, recurse=False),
}


def converted(row: Row) -> Row:
    def run(side: Side) -> Any:
        module = row(side)
        dtype = next(module.parameters()).dtype
        device = next(module.parameters()).device
        call = warned(lambda: side.outcome(module, side.x(dtype=dtype, device=device)))
        kept = [
            (p.is_shared() if p.device.type == "cpu" else None, p.requires_grad, type(p).__name__)
            for p in module.parameters()
        ]
        return kept, module.training, side.is_layer and same_objects(side, module), call

    return lambda side: warned(lambda: run(side))


ROWS.add({f"convert-{name}": converted(row) for name, row in CONVERSIONS.items()})


@ROWS.row()
def apply(side: Side) -> Any:
    seen: list[str] = []
    module = nn.Sequential(side.make())
    result = module.apply(lambda m: seen.append(type(m).__name__))
    return seen, result is module


@ROWS.row()
def zero_grad(side: Side) -> Any:
    module = side.make()
    side.outcome(module)
    module.zero_grad(set_to_none=False)
    zeros = [p.grad for p in module.parameters()]
    module.zero_grad()
    return zeros, [p.grad for p in module.parameters()]


@ROWS.row()
def conversion_keeps_the_parameters(side: Side) -> Any:
    """Optimizers hold on to them, unless torch is told to make new ones."""
    module = side.make()
    before = list(module.parameters())
    side.outcome(module)
    seen = []
    for overwrite in (False, True):
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        try:
            module.double().float()
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(False)
        seen.append([a is b for a, b in zip(module.parameters(), before, strict=True)])
        seen.append([p.grad is not None for p in module.parameters()])
        seen.append(side.outcome(module))
    return seen


@ROWS.row()
def conversion_by_swapping(side: Side) -> Any:
    """torch refuses to swap what a weak reference points at, and layers have such."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module = side.make()
        before = list(module.parameters())
        told = attempt(lambda: repr(module.double()))
        loaded = attempt(lambda: str(module.load_state_dict(side.make().state_dict())))
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    kept = [a is b for a, b in zip(module.parameters(), before, strict=True)]
    return told, loaded, kept, [p.dtype for p in module.parameters()]


@ROWS.row()
def swap_tensors(side: Side) -> Any:
    module = side.make()
    other = nn.Parameter(torch.ones(getattr(module, side.weight).shape))
    told = attempt(lambda: torch.utils.swap_tensors(getattr(module, side.weight), other))
    return told, getattr(module, side.weight), side.outcome(module)


@ROWS.row()
def swap_data(side: Side) -> Any:
    module = side.make()
    getattr(module, side.weight).data = torch.ones(getattr(module, side.weight).shape)
    return side.outcome(module)


@ROWS.row()
def sizes_changed_afterwards(side: Side) -> Any:
    module = side.make()
    module.input_size = 7
    return repr(module), attempt(lambda: module(side.x()))


@ROWS.row(*LAYERS)
def options_changed_afterwards(side: Side) -> Any:
    """The attributes count, not what the constructor was given."""
    module = side.make(3, 3, 2)
    module.batch_first, module.dropout = True, 1.0
    return repr(module), side.outcome(module, side.x(3, 3, 3))


@ROWS.row(*LAYERS)
def the_mode_changed_afterwards(side: Side) -> Any:
    """Only RNN reads it."""
    module, seen = side.make(), []
    for mode in ("RNN_RELU", "RNN_TANH", "greedy", "LSTM"):
        module.mode = mode
        seen.append(attempt(lambda: side.outcome(module)))
    return seen


@ROWS.row()
def threads(side: Side) -> Any:
    module, x = side.make(), side.x()
    results: dict[int, Any] = {}

    def work(i: int) -> None:
        results[i] = module(x * i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [results[i] for i in range(4)]


@ROWS.row()
def one_parameter_in_two_modules(side: Side) -> Any:
    one, other = side.make(), side.make()
    setattr(other, side.weight, getattr(one, side.weight))
    pair = nn.ModuleList([one, other])
    torch.manual_seed(1)
    loss = sum(drawn(4, *y.shape).mul(y).sum() for m in pair for y in [_first(m(side.x()))])
    loss.backward()
    return names(pair), [p.grad for p in pair.parameters()]


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else _first(outputs[0])


@pytest.mark.parametrize("row", ROWS)
def test_as_torch_nn(row: str) -> None:
    ROWS.check(row, DIFFERENCES)
