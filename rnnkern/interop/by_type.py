"""Tools that look a module up by its exact type find rnnkern's modules as they find torch.nn's.

A look-up by exact type misses rnnkern's types, which are subclasses. So torch's quantization sees
modules of ``torch.nn`` while it works, and the tables of programs that count operations get entries
for rnnkern's classes.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections import OrderedDict
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from torch import fx, nn

from rnnkern.convert import COUNTERPARTS, give_again, revert, take_back
from rnnkern.interop.on_import import on_import

_TABLES = {
    "thop.profile": "register_hooks",
    "ptflops.pytorch_ops": "MODULES_MAPPING",
    "calflops.pytorch_ops": "MODULE_HOOK_MAPPING",
    "deepspeed.profiling.flops_profiler.profiler": "MODULE_HOOK_MAPPING",
}
"""Packages that count operations, and the names of their tables of types."""


def be_found_by_type() -> None:
    """Makes these tools find rnnkern's modules, as soon as they are imported."""
    _be_leaves_of_graphs()
    for name, table in _TABLES.items():
        on_import(name, functools.partial(_add_entries, table=table))
    on_import("torch.ao.quantization.quantize", _quantize_by_type)
    on_import("torch.ao.quantization.quantize_fx", _quantize_graphs_by_type)
    on_import("torch.ao.nn.quantized.dynamic.modules.rnn", _make_quantized_by_type)


def _add_entries(module: ModuleType, table: str) -> None:
    entries = getattr(module, table, None)
    if not isinstance(entries, dict):
        return
    for ours, theirs in COUNTERPARTS.items():
        if theirs in entries:
            entries.setdefault(ours, entries[theirs])


def _be_leaves_of_graphs() -> None:
    """`torch.fx` makes one node of a module of the package ``torch.nn``, and of rnnkern's.

    A tracer of the user's may decide by the package, and know torch's alone. Then the node is made
    in place of a call of ``forward``. Tracers of `make_fx` are left alone, because they record what
    runs inside.
    """
    is_leaf, call = fx.Tracer.is_leaf_module, fx.Tracer.call_module

    @functools.wraps(is_leaf)
    def is_leaf_module(self: fx.Tracer, m: nn.Module, module_qualified_name: str) -> bool:
        return _runs_rnnkerns_forward(m) or is_leaf(self, m, module_qualified_name)

    @functools.wraps(call)
    def call_module(self: fx.Tracer, m: nn.Module, forward: Any, *rest: Any, **kw: Any) -> Any:
        def node(*args: Any, **kwargs: Any) -> Any:
            return self.create_proxy("call_module", self.path_of_module(m), args, kwargs)

        is_node = _runs_rnnkerns_forward(m) and not _records_operators(self)
        return call(self, m, node if is_node else forward, *rest, **kw)

    fx.Tracer.is_leaf_module = is_leaf_module  # type: ignore[method-assign]
    fx.Tracer.call_module = call_module  # type: ignore[method-assign]


def _records_operators(tracer: fx.Tracer) -> bool:
    module = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return module is not None and isinstance(tracer, module.PythonKeyTracer)


def _runs_rnnkerns_forward(module: nn.Module) -> bool:
    """Whether a call of the module is a call of rnnkern's forward, not of a subclass's.

    Layers of cells of one's own and frozen modules have one, too.
    """
    forward = getattr(type(module), "forward", None)
    return (getattr(forward, "__module__", None) or "").startswith("rnnkern.")


def _quantize_by_type(module: Any) -> None:
    """Lets eager quantization find rnnkern's modules.

    It has two steps, in `quantize_dynamic` or in the user's calls: it marks modules, and then
    replaces them. Between the two, rnnkern's modules are torch.nn's. Those that have not been
    replaced then become rnnkern's again.

    The functions are changed where `quantize_dynamic` looks them up, because programs that have
    imported it before rnnkern use it, too.
    """
    if not (hasattr(module, "propagate_qconfig_") and hasattr(module, "convert")):
        return
    propagate, convert_model = module.propagate_qconfig_, module.convert
    observe = getattr(module, "_add_observer_", None)
    waiting: WeakKeyDictionary[nn.Module, type[nn.Module]] = WeakKeyDictionary()

    @functools.wraps(propagate)
    def propagate_qconfig(model: nn.Module, qconfig_dict: Any = None, *args: Any, **kw: Any) -> Any:
        taken = take_back(model)
        waiting.update(taken)
        try:
            return propagate(model, _of_torch(qconfig_dict), *args, **kw)
        except BaseException:
            give_again(model, {name: taken[m] for name, m in model.named_modules() if m in taken})
            raise

    @functools.wraps(convert_model)
    def convert_rest(model: nn.Module, mapping: Any = None, *args: Any, **kw: Any) -> Any:
        result = convert_model(model, _of_torch(mapping), *args, **kw)
        names = {name: waiting[m] for name, m in model.named_modules() if m in waiting}
        give_again(result, names)
        return result

    module.propagate_qconfig_, module.convert = propagate_qconfig, convert_rest
    if observe is None:
        return

    @functools.wraps(observe)
    def add_observer(model: nn.Module, *args: Any, **kw: Any) -> Any:
        named = {name: _of_torch(value) for name, value in kw.items()}
        return observe(model, *map(_of_torch, args), **named)

    module._add_observer_ = add_observer


def _quantize_graphs_by_type(module: Any) -> None:
    """The graph of a model is made of torch.nn's modules, which have the same parameters."""
    prepare = getattr(module, "_prepare_fx", None)
    if prepare is None:
        return
    signature = inspect.signature(prepare)

    @functools.wraps(prepare)
    def prepare_fx(model: nn.Module, *args: Any, **kw: Any) -> Any:
        if any(isinstance(each, tuple(COUNTERPARTS)) for each in model.modules()):
            tensors = (*model.parameters(), *model.buffers())
            model = revert(copy.deepcopy(model, {id(each): each for each in tensors}))
        given = signature.bind(model, *args, **kw)
        for name, value in given.arguments.items():
            if name not in ("model", "example_inputs"):
                given.arguments[name] = _types_of_torch(value)
        return prepare(*given.args, **given.kwargs)

    module._prepare_fx = prepare_fx


def _make_quantized_by_type(module: Any) -> None:
    """``from_float`` of the quantized classes asks for torch.nn's exact types."""
    for name in ("RNNBase", "RNNCellBase"):
        made = getattr(module, name, None)
        if made is not None and "from_float" in vars(made):
            made.from_float = classmethod(_taking_rnnkerns(made.from_float.__func__))


def _taking_rnnkerns(from_float: Any) -> Any:
    @functools.wraps(from_float)
    def run(kind: Any, mod: nn.Module, *args: Any, **kw: Any) -> Any:
        mod = revert(copy.copy(mod)) if type(mod) in COUNTERPARTS else mod
        return from_float(kind, mod, *args, **kw)

    return run


def _types_of_torch(given: Any) -> Any:
    """A configuration with torch.nn's types in place of rnnkern's.

    It is a ``QConfigMapping``, a ``PrepareCustomConfig``, or one of the dictionaries that torch
    still takes for them: types are keys, and parts of keys and of lists.
    """
    if isinstance(given, type):
        return COUNTERPARTS.get(given, given)
    if type(given) in (dict, OrderedDict):
        pairs = ((_types_of_torch(key), _types_of_torch(value)) for key, value in given.items())
        return type(given)(pairs)
    if type(given) in (list, tuple, set):
        return type(given)(map(_types_of_torch, given))
    if type(given).__name__ in ("QConfigMapping", "PrepareCustomConfig"):
        made = copy.copy(given)
        vars(made).update(_types_of_torch(vars(given)))
        return made
    return given


def _of_torch(given: Any) -> Any:
    """A dictionary or set of types, with torch.nn's types besides rnnkern's."""
    if type(given) is set:
        return given | {COUNTERPARTS[kind] for kind in given if kind in COUNTERPARTS}
    if type(given) is not dict:
        return given
    return given | {COUNTERPARTS[key]: value for key, value in given.items() if key in COUNTERPARTS}
