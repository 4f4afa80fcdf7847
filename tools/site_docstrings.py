"""A griffe extension of `make docs`: docstrings as Python makes them, from the source alone.

The API pages are made without importing rnnkern, so they need neither torch nor a built extension.
The classes of `rnnkern.modules` share a part of their docstrings by an f-string, which is put
together here.
"""

from __future__ import annotations

import ast
import inspect
from typing import Any

import griffe


class Docstrings(griffe.Extension):
    """Shared docstrings, and examples that are sections."""

    def on_class_members(self, *, node: Any, cls: Any, **kwargs: Any) -> None:
        """Evaluates a ``__doc__`` that is an f-string of the module's constants."""
        for statement in node.body if isinstance(node, ast.ClassDef) else ():
            if not (isinstance(statement, ast.Assign) and isinstance(statement.value, ast.JoinedStr)):
                continue
            if [ast.unparse(target) for target in statement.targets] == ["__doc__"]:
                module = ast.parse(cls.module.filepath.read_text(encoding="utf-8"))
                text = "".join(_text(part, module) for part in statement.value.values)
                cls.docstring = griffe.Docstring(inspect.cleandoc(text), parent=cls)
                cls.members.pop("__doc__", None)

    def on_instance(self, *, obj: Any, **kwargs: Any) -> None:
        """Makes ``Example::``, as torch writes it, a section."""
        if obj.docstring is not None:
            obj.docstring.value = obj.docstring.value.replace("Example::", "Examples:")


def _text(part: ast.expr, module: ast.Module) -> str:
    """A constant, or the module's constant of that name."""
    if isinstance(part, ast.Constant):
        return str(part.value)
    if isinstance(part, ast.FormattedValue):
        name = ast.unparse(part.value)
        for statement in module.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == name:
                return str(ast.literal_eval(statement.value))
    raise ValueError(f"no constant: {ast.unparse(part)}")
