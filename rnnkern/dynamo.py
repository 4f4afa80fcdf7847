"""Lets ``torch.compile`` into rnnkern's modules.

Dynamo breaks the graph at every module that is a ``torch.nn.RNN``, ``LSTM`` or ``GRU``, as
rnnkern's are, unless ``torch._dynamo.config.allow_rnn`` is true. Here that flag becomes one that is
true for rnnkern's modules alone: those of ``torch.nn`` stay what they were, and whoever sets the
flag has the last word. Dynamo takes a second to import, so this waits until something else does.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from rnnkern.modules import GRU, LSTM, RNN

_CONFIG = "torch._dynamo.config"


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


class _OnImport(importlib.abc.MetaPathFinder):
    """Calls `_allow` once Dynamo's configuration is imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _CONFIG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _allow(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def open_to_rnnkern() -> None:
    """Now, where Dynamo is imported already, or as soon as it is."""
    config = sys.modules.get(_CONFIG)
    if config is None:
        sys.meta_path.insert(0, _OnImport())
    else:
        _allow(config)
