"""Lets ``torch.compile`` into rnnkern's modules.

Dynamo breaks the graph at every module that is a ``torch.nn.RNN``, ``LSTM`` or ``GRU``, as
rnnkern's are, unless ``torch._dynamo.config.allow_rnn`` is true. Here that flag becomes one that is
true for rnnkern's modules alone: those of ``torch.nn`` stay what they were, and whoever sets the
flag has the last word. What writes torch's operators into exported programs is left for the stage
of an export that knows how. Dynamo takes a second to import, so both wait until something else
imports it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from rnnkern import aten
from rnnkern.modules import GRU, LSTM, RNN


class _OfRnnkern(int):
    """True where Dynamo asks about one of rnnkern's modules, which it calls ``value`` there.

    A number, 0, to all that copies or writes down the configuration.
    """

    def __bool__(self) -> bool:
        return isinstance(sys._getframe(1).f_locals.get("value"), (RNN, LSTM, GRU))

    def __repr__(self) -> str:
        return "<true for the modules of rnnkern>"


def _allow(config: Any) -> None:
    if getattr(config, "allow_rnn", None) is False:
        config.allow_rnn = _OfRnnkern()


def _leave_exports(dynamo: Any) -> None:
    dynamo.allow_in_graph(aten.exported)


class _OnImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module once that is imported."""

    def __init__(self, name: str, call: Callable[[Any], None]) -> None:
        self.name, self.call = name, call

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.call(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def open_to_rnnkern() -> None:
    """Now, where Dynamo is imported already, or as soon as it is."""
    for name, call in (("torch._dynamo.config", _allow), ("torch._dynamo", _leave_exports)):
        module = sys.modules.get(name)
        if module is None:
            sys.meta_path.insert(0, _OnImport(name, call))
        else:
            call(module)
