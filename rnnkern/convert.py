"""Swap the recurrent modules of a model in place, between torch.nn and rnnkern."""

from __future__ import annotations

import copyreg
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from rnnkern import modules
from rnnkern.constructor import forget_options, options_besides_torchs
from rnnkern.forward import level_of_the_caller
from rnnkern.interop.scripting import own_class, torch_class
from rnnkern.kernels import CALLED_BY_FORWARD
from rnnkern.known_cells import is_own

_M = TypeVar("_M", bound=nn.Module)
_Class = type[nn.Module]

COUNTERPARTS: dict[_Class, _Class] = {
    modules.RNN: nn.RNN,
    modules.LSTM: nn.LSTM,
    modules.GRU: nn.GRU,
    modules.RNNCell: nn.RNNCell,
    modules.LSTMCell: nn.LSTMCell,
    modules.GRUCell: nn.GRUCell,
}
"""rnnkern's classes, and the class of torch.nn that each one replaces."""

_OURS = {theirs: ours for ours, theirs in COUNTERPARTS.items()}

_subclasses: WeakKeyDictionary[_Class, _Class] = WeakKeyDictionary()
"""Subclasses of torch.nn's classes, and what `convert` makes of each."""

_PART_OF_FORWARD = ("forward", "__call__", "_call_impl", *CALLED_BY_FORWARD)
"""If a class overrides one of these, rnnkern's forward would not do what its own does."""

_named: set[str] = set()


def convert(model: _M) -> _M:
    """Turns every ``torch.nn`` recurrent module and cell in ``model`` into rnnkern's, in place.

    The modules stay the very same objects, so parameters, optimizers, hooks, the training flag, and
    references held elsewhere stay valid. A module of a subclass that inherits ``forward`` unchanged
    is converted too, and stays an instance of its class. If a class overrides ``forward``, or a
    method that ``forward`` calls, its modules are left alone, because what they do is unknown. One
    warning names the class. Derive that class from rnnkern's instead.

    Args:
        model: any module. It may be a recurrent module itself.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.

    Example::

        >>> model = rnnkern.convert(model)
    """
    expect_module(model)
    converted: list[tuple[nn.Module, _Class]] = []
    for name, module in model.named_modules():
        kind = _own_class(module)
        if issubclass(kind, tuple(_OURS)) and not issubclass(kind, tuple(COUNTERPARTS)):
            overridden = _overridden(kind)
            if overridden is not None:
                _tell("rnnkern.convert", name, kind, f"its class overrides {overridden}")
                continue
            try:
                converted.append((module, _converted(kind)))
            except Exception as error:  # the class's own, from __init_subclass__ for example
                why = f"no class can be derived from it ({error!r})"
                _tell("rnnkern.convert", name, kind, why)
    for module, kind in converted:
        _change_class(module, kind)
    return model


def revert(model: _M) -> _M:
    """Undoes `convert`, in place.

    Every rnnkern module in ``model`` becomes its ``torch.nn`` class again, or the subclass of it
    that it was.

    Args:
        model: any module.

    Returns:
        ``model``.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: a module has ``layer_norm``, ``recurrent_dropout`` or ``zoneout``, which
            torch.nn does not have.
    """
    for module in take_back(model):
        forget_options(module)
    return model


def take_back(model: nn.Module) -> dict[nn.Module, _Class]:
    """Reverts ``model``, and returns the classes that its modules of rnnkern had.

    The modules keep their options, for `give_again`.
    """
    expect_module(model)
    for name, module in model.named_modules():
        if _reverted(_own_class(module)) is None:
            continue
        for option, value in options_besides_torchs(module):
            where = f" of {name}" if name else ""
            hint = "" if option == "layer_norm" else ": set it to 0 first"
            raise ValueError(f"torch.nn has no {option}, got {option}={value}{where}{hint}")
    classes: dict[nn.Module, _Class] = {}
    for module in model.modules():
        kind = _own_class(module)
        theirs = _reverted(kind)
        if theirs is not None:
            classes[module] = kind
            _change_class(module, theirs)
    return classes


def recurrent_modules(model: nn.Module, caller: str) -> Iterator[tuple[str, nn.Module]]:
    """The recurrent modules and cells in ``model``, and their names.

    Of rnnkern, or of ``torch.nn`` if `convert` would convert them. A module is left out, with one
    warning for its class, if it overrides ``forward`` or a method that ``forward`` calls.
    """
    for name, module in model.named_modules():
        kind = _own_class(module)
        if not issubclass(kind, (*_OURS, modules.OwnRNN)):
            continue
        overridden = _overridden(kind) or next(
            (n for n in _PART_OF_FORWARD if n in vars(module)), None
        )
        if overridden is not None:
            _tell(caller, name, kind, f"it overrides {overridden}")
        elif isinstance(module, modules.OwnRNN) and is_own(module.mode):
            _warn(
                kind, f"{caller} leaves {_where(name, kind)} as it is: it runs a cell of your own"
            )
        else:
            yield name, module


def give_again(model: nn.Module, classes: Mapping[str, _Class]) -> None:
    """Gives modules by their names the classes that they had, if they are still what they were."""
    for name, module in model.named_modules():
        if name in classes and _own_class(module) is _reverted(classes[name]):
            _change_class(module, classes[name])


def expect_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _own_class(module: nn.Module) -> _Class:
    """The class of a module, without those by which torch parametrizes or compiles modules."""
    kind = type(module)
    own: _Class = own_class(
        kind.__bases__[0] if nn.utils.parametrize.is_parametrized(module) else kind
    )
    return own


def _change_class(module: nn.Module, kind: _Class) -> None:
    before = type(module)
    if nn.utils.parametrize.is_parametrized(module):
        # A new class, because copies of the module share the old one.
        own = {k: v for k, v in vars(before).items() if k not in ("__dict__", "__weakref__")}
        kind = type(before.__name__, (kind,), own)
    module.__class__ = kind


def _overridden(kind: _Class) -> str | None:
    """The part of forward that a subclass of rnnkern's or torch.nn's class overrides, or None."""
    ours = (base for base in kind.__mro__ if base in COUNTERPARTS or base is modules.OwnRNN)
    base = next(ours, torch_class(kind))
    for name in _PART_OF_FORWARD:
        if getattr(kind, name, None) is not getattr(base, name, None):
            return name
    return None


def _converted(kind: _Class) -> _Class:
    if kind in _OURS:
        return _OURS[kind]
    if kind not in _subclasses:
        ours = _OURS[torch_class(kind)]

        def reduce_ex(self: Any, protocol: Any) -> Any:
            """Pickles and copies an object whose class cannot be imported, as one of the class from
            which that class is made.
            """
            make, arguments, *rest = super(made, self).__reduce_ex__(protocol)  # type: ignore[arg-type]
            is_made = type(self) is made and arguments == (made,)
            if not is_made or make is not copyreg.__newobj__:  # type: ignore[attr-defined]
                return make, arguments, *rest
            return _new_converted, (kind,), *rest

        names = {
            "__module__": kind.__module__,
            "__qualname__": kind.__qualname__,
            "__doc__": kind.__doc__,
            "__reduce_ex__": reduce_ex,
            "_rnnkern_made_from": kind,
        }
        made = _subclasses[kind] = type(kind.__name__, (kind, ours), names)
    return _subclasses[kind]


def _reverted(kind: type) -> _Class | None:
    """The class that a converted module had, or None if it is not one of rnnkern's."""
    if kind in COUNTERPARTS:
        return COUNTERPARTS[kind]
    return vars(kind).get("_rnnkern_made_from")


def _new_converted(kind: _Class) -> nn.Module:
    converted = _converted(kind)
    return converted.__new__(converted)


def _tell(caller: str, name: str, kind: _Class, reason: str) -> None:
    """Warns once of a class that is left to torch.nn."""
    _warn(
        kind,
        f"{caller} leaves {_where(name, kind)} to torch.nn, because {reason}; "
        f"derive it from rnnkern.{torch_class(kind).__name__} to run the kernels",
    )


def _where(name: str, kind: _Class) -> str:
    return f"{_full_name(kind)} ({name})" if name else _full_name(kind)


def _full_name(kind: _Class) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _warn(kind: _Class, text: str) -> None:
    """Warns once of a class."""
    if _full_name(kind) not in _named:
        _named.add(_full_name(kind))
        warnings.warn(text, UserWarning, stacklevel=level_of_the_caller())
