"""``torch.jit.script`` of models with rnnkern's modules.

TorchScript compiles the source of ``forward``, and rnnkern's is not Python that it knows. So a
module that is about to be compiled shows torch.nn's ``forward``, and with its next call it is
rnnkern's again. The compiled model runs torch.nn's operators, so it needs no rnnkern.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from rnnkern.constructor import ours
from rnnkern.options import expect_none

_shown: WeakKeyDictionary[type[nn.Module], type[nn.Module]] = WeakKeyDictionary()


def prepare(self: Any) -> Any:
    """``__prepare_scriptable__`` of rnnkern's modules: TorchScript asks for it first.

    A class that overrides ``forward`` is left to TorchScript as it is, and so is a module with
    parametrizations, which TorchScript refuses.

    Raises:
        ValueError: the module has an option that torch.nn's forward does not know.
    """
    expect_none(self, "torch.jit.script")
    kind = type(self)
    theirs = torch_class(kind)
    if kind.forward is ours(kind).forward and not nn.utils.parametrize.is_parametrized(self):
        if kind not in _shown:
            _shown[kind] = _showing_torchs(kind, theirs)
        self.__class__ = _shown[kind]
    return self


def refuse(self: Any) -> Any:
    """``__prepare_scriptable__`` of modules that TorchScript cannot compile.

    Raises:
        NotImplementedError: always.
    """
    raise NotImplementedError(
        f"torch.jit.script cannot compile {type(self).__name__}, because torch.nn has no such "
        f"module: {self._instead_of_script}"
    )


def torch_class(kind: type) -> type[nn.Module]:
    """The class of ``torch.nn`` that a recurrent module's class comes from."""
    return next(base for base in kind.__mro__ if base.__module__ == nn.RNNBase.__module__)


def own_class(kind: type) -> Any:
    """The class that a module had before it was compiled, or ``kind`` itself."""
    return vars(kind).get("_rnnkern_shown_for", kind)


def _showing_torchs(kind: type[nn.Module], theirs: type[nn.Module]) -> type[nn.Module]:
    def back(module: Any) -> Any:
        if type(module) is shown:  # and not a class that has been derived from it since
            module.__class__ = kind
        return module

    # TorchScript finds the overloads of forward by the name and the source of the class.
    names: dict[str, Any] = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__call__": lambda self, *args, **kwargs: kind.__call__(back(self), *args, **kwargs),
        "__reduce_ex__": lambda self, protocol: kind.__reduce_ex__(back(self), protocol),
        "__prepare_scriptable__": lambda self: self,
        "forward": theirs.forward,
        "_rnnkern_shown_for": kind,
    }
    shown = type(theirs.__name__, (kind,), names)
    return shown
