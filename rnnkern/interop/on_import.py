"""Runs something when a module is imported, or at once if it has been imported already.

rnnkern adds something to parts of torch and to other packages that take long to import, and that
most programs never use.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
from collections.abc import Callable, Sequence
from types import ModuleType

Action = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds a module as the other finders do, and acts after its code has run."""

    def __init__(self) -> None:
        self.waiting: dict[str, Action] = {}
        self._looking = threading.local()  # its `name`: what this thread asks the others for

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in self.waiting or getattr(self._looking, "name", None) == name:
            return None
        self._looking.name = name
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._looking.name = None
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            action = self.waiting.pop(name, None)  # a spec may be found and never run
            if action is not None:
                action(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


_finder = _Finder()
sys.meta_path.insert(0, _finder)


def on_import(name: str, action: Action) -> None:
    """Calls ``action(module)`` when the module of that name is imported; one action a module."""
    if name in sys.modules:
        action(sys.modules[name])
    else:
        _finder.waiting[name] = action
