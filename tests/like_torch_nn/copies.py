"""Copies, pickles old and new, replicas, and conversions to other dtypes and devices."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
import threading
from collections import OrderedDict
from typing import Any

import torch
from support import LAYERS
from torch import nn

from like_torch_nn import (
    ROWS,
    Row,
    Side,
    attempt,
    drawn,
    first,
    names_of,
    same_objects,
    warned,
)


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
    return (
        names_of(replica),
        list(replica.state_dict()),
        side.outcome(replica),
        side.outcome(module),
    )


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
    "ipu": lambda s: s.make().ipu(),
    "mtia": lambda s: s.make().mtia(),
    "xpu": lambda s: s.make().xpu(),
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
        return kept, module.training, side.is_layer and same_objects(module), call

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
    loss = sum(drawn(4, *y.shape).mul(y).sum() for m in pair for y in [first(m(side.x()))])
    loss.backward()
    return names_of(pair), [p.grad for p in pair.parameters()]
