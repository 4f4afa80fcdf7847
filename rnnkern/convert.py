"""Swap the recurrent modules of a model in place, between torch.nn and rnnkern."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from rnnkern import modules

_M = TypeVar("_M", bound=nn.Module)

_PAIRS: tuple[tuple[type[nn.Module], type[nn.Module]], ...] = (
    (nn.RNN, modules.RNN),
    (nn.LSTM, modules.LSTM),
    (nn.GRU, modules.GRU),
    (nn.RNNCell, modules.RNNCell),
    (nn.LSTMCell, modules.LSTMCell),
    (nn.GRUCell, modules.GRUCell),
)


def convert(model: _M) -> _M:
    """Turns every ``torch.nn`` recurrent module and cell in ``model`` into rnnkern's, in place.

    The modules stay the very same objects, so parameters, optimizers, hooks, the training flag, and
    references held elsewhere stay valid. Subclasses of the torch.nn classes are left alone: what
    they override is unknown.

    Args:
        model: any module, also a recurrent one itself.

    Returns:
        ``model``.

    Example::

        >>> model = rnnkern.convert(model)
    """
    return _swap(model, dict(_PAIRS))


def revert(model: _M) -> _M:
    """Undoes `convert`, in place.

    Every rnnkern module in ``model`` becomes its ``torch.nn`` class again.
    """
    return _swap(model, {ours: theirs for theirs, ours in _PAIRS})


def _swap(model: _M, classes: dict[type[nn.Module], type[nn.Module]]) -> _M:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        _swap_one(module, classes)
    return model


def _swap_one(module: nn.Module, classes: dict[type[nn.Module], type[nn.Module]]) -> None:
    kind = type(module)
    if kind in classes:
        module.__class__ = classes[kind]
        return
    base = kind.__bases__[0]  # torch parametrizes a module by giving it a class of its own
    if nn.utils.parametrize.is_parametrized(module) and base in classes:
        # A new one, for copies of the module share the old one.
        own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
        module.__class__ = type(kind.__name__, (classes[base],), own)
