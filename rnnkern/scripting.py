"""``torch.jit.script`` of models with rnnkern's modules.

TorchScript compiles the source of ``forward``, and rnnkern's is not Python that it knows. So a
module that is about to be compiled shows torch.nn's ``forward``, and with its next call it is
rnnkern's again. The compiled model runs torch.nn's operators, so it needs no rnnkern.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_shown: WeakKeyDictionary[type[nn.Module], type[nn.Module]] = WeakKeyDictionary()


def prepare(self: Any) -> Any:
    """``__prepare_scriptable__`` of rnnkern's modules: TorchScript asks for it first.

    A class with a ``forward`` of its own is left to TorchScript as it is.
    """
    kind = type(self)
    theirs = torch_class(kind)
    if kind.forward is ours(kind).forward:
        if kind not in _shown:
            _shown[kind] = _showing_torchs(kind, theirs)
        self.__class__ = _shown[kind]
    return self


def torch_class(kind: type) -> type[nn.Module]:
    """The class of ``torch.nn`` that a recurrent module's class comes from."""
    return next(base for base in kind.__mro__ if base.__module__ == nn.RNNBase.__module__)


def ours(kind: type) -> Any:
    """The class of ``rnnkern`` that a recurrent module's class comes from."""
    return next(base for base in kind.__mro__ if base.__module__ == "rnnkern.modules")


def _showing_torchs(kind: type[nn.Module], theirs: type[nn.Module]) -> type[nn.Module]:
    def back(module: Any) -> Any:
        module.__class__ = kind
        return module

    # TorchScript finds the overloads of forward by the name and the source of the class.
    names: dict[str, Any] = {
        "__module__": theirs.__module__,
        "__qualname__": theirs.__qualname__,
        "__call__": lambda self, *args, **kwargs: back(self)(*args, **kwargs),
        "__reduce_ex__": lambda self, protocol: back(self).__reduce_ex__(protocol),
        "__prepare_scriptable__": lambda self: self,
        "forward": theirs.forward,
    }
    return type(theirs.__name__, (kind,), names)
