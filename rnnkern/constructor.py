"""What rnnkern's constructors take besides torch.nn's arguments."""

from __future__ import annotations

import math
from collections.abc import Iterator
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern.call import mode_of
from rnnkern.known_cells import CELLS, is_own, name_of

DEFAULTS = {
    "recurrent_dropout": 0.0,
    "zoneout": 0.0,
    "orthogonal": False,
    "forget_bias": None,
}
"""What such an option is of a module whose constructor was not given it.

Only what it was given is an attribute. Users have attributes of such names, too: numbers,
submodules, parameters. So the attribute ``_rnnkern_options`` has the names that were given.
"""

OF_LAYERS = ("recurrent_dropout", "zoneout")
"""The options that cells do not have, and that may be changed after construction."""

NOT_NORMALISED: list[list[str]] = []
"""The attribute ``_gain_names`` of a module without layer normalisation. With it, it has the names
of the parameters of each direction of each layer. There is no public attribute, because models call
submodules ``layer_norm``.
"""


def layer(
    self: Any,
    *args: Any,
    layer_norm: bool = False,
    recurrent_dropout: float | None = None,
    zoneout: float | None = None,
    orthogonal: bool = False,
    **kwargs: Any,
) -> None:
    """``__init__`` of `rnnkern.RNN` and `rnnkern.GRU`."""
    super(ours(type(self)), self).__init__(*args, **kwargs)
    settle(
        self,
        layer_norm=layer_norm,
        recurrent_dropout=recurrent_dropout,
        zoneout=zoneout,
        orthogonal=orthogonal,
    )


def ours(kind: type) -> Any:
    """The class of ``rnnkern`` that a recurrent module's class comes from."""
    return next(base for base in kind.__mro__ if base.__module__ == "rnnkern.modules")


def settle(module: Any, **given: Any) -> None:
    """Checks the options of a module that torch.nn has made, and carries them out.

    What was not given is not stored. So a module without options is as torch.nn makes it.

    Raises:
        TypeError: a value is not a number, or ``orthogonal`` or ``layer_norm`` not a bool.
        ValueError: a probability is outside ``[0, 1)``, or ``forget_bias`` is not finite, or is
            given without ``bias``, or for a cell without a gate f.
    """
    for name in OF_LAYERS:
        if given.get(name) is not None:
            given[name] = probability(name, given[name])
    for name in ("orthogonal", "layer_norm"):
        if not isinstance(given[name], bool):
            raise TypeError(f"{name} must be a bool, got {type(given[name]).__name__}")
    forget_bias = given.get("forget_bias")
    if forget_bias is not None:
        given["forget_bias"] = _number("forget_bias", forget_bias)
        if not math.isfinite(forget_bias):
            raise ValueError(f"forget_bias must be finite, got {forget_bias}")
        if not module.bias:
            raise ValueError(f"forget_bias={forget_bias} needs bias=True, got bias=False")
        if "f" not in _gates(module):
            known = ", ".join(_gates(module))
            raise ValueError(
                f"forget_bias needs a gate named f, the gates of the cell are: {known}"
            )
    is_normalised = given.pop("layer_norm")
    stored = {n: v for n, v in given.items() if v is not None and v is not False}
    for name, value in stored.items():
        setattr(module, name, value)
    if stored:
        module._rnnkern_options = tuple(stored)
    if is_normalised:
        _add_gains(module)
    _initialise(module)


def _add_gains(module: Any) -> None:
    """Registers the parameters of layer normalisation, behind torch.nn's and not among its flat
    weights.
    """
    if getattr(module, "nonlinearity", "tanh") not in ("tanh", "relu"):
        raise ValueError(f"Unknown nonlinearity: {module.nonlinearity}")
    cell, H, like = CELLS[mode_of(module)], module.hidden_size, next(module.parameters())
    sizes = {"gain_ih": cell.gates * H}
    if cell.recurrent:
        sizes["gain_hh"] = cell.gates * H
    if cell.normalises_c:
        sizes |= {"gain_c": H, "bias_c": H} if module.bias else {"gain_c": H}
    suffixes = _suffixes(module)
    for suffix in suffixes:
        for kind, size in sizes.items():
            if hasattr(module, kind + suffix):
                raise ValueError(
                    f"layer_norm adds a parameter {kind + suffix}, which the cell "
                    f"{name_of(module.mode)} has already"
                )
            setattr(module, kind + suffix, nn.Parameter(like.new_empty(size)))
    module._gain_names = [[kind + suffix for kind in sizes] for suffix in suffixes]


def option(module: Any, name: str) -> Any:
    """An option of a module, as its constructor was given it or as it was changed later.

    If the constructor was not given it, an attribute of such a name is the user's.
    """
    default, space = DEFAULTS[name], module.__dict__
    if "_rnnkern_options" not in space or name not in space["_rnnkern_options"]:
        return default
    value = getattr(module, name, default)
    return default if value is None else value


def options_besides_torchs(module: Any) -> Iterator[tuple[str, Any]]:
    """The options that change what a module computes, as the constructor calls them."""
    for name in OF_LAYERS:
        value = option(module, name)
        if value:
            yield name, value
    if getattr(module, "_gain_names", NOT_NORMALISED):
        yield "layer_norm", True


def forget_options(module: Any) -> None:
    """Removes the options of a module that are its attributes, for torch.nn has none."""
    space = vars(module)
    for name in space.pop("_rnnkern_options", ()):
        space.pop(name, None)


def gains_of(module: Any) -> tuple[tuple[Tensor, ...], ...]:
    """The parameters of layer normalisation of each direction of each layer, in the order in which
    the kernels take them; none if there is no normalisation.
    """
    names = getattr(module, "_gain_names", NOT_NORMALISED)
    return tuple(tuple(getattr(module, name) for name in own) for own in names)


def probability(name: str, value: Any) -> float:
    """The value as a float; raises an error unless it is a number in ``[0, 1)``."""
    number = _number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be a probability in [0, 1), got {value}")
    return number


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def reset_parameters(self: Any) -> None:
    """Draws the parameters as ``torch.nn`` does, and then as the options ask for."""
    _torch_base(self).reset_parameters(self)
    _initialise(self)


def extra_repr(self: Any) -> str:
    text = str(_torch_base(self).extra_repr(self))
    # No join, which Dynamo of torch 2.10 cannot trace in torch.func.vmap.
    if self._gain_names:
        text += ", layer_norm=True"
    for name, default in DEFAULTS.items():
        value = option(self, name)
        if value != default:
            text += f", {name}={value}"
    return text


def _torch_base(module: Any) -> Any:
    return nn.RNNCellBase if isinstance(module, nn.RNNCellBase) else nn.RNNBase


@torch.no_grad()
def _initialise(module: Any) -> None:
    """Fills what the options are about, by its exact name: the cell, or a subclass, may have
    parameters of its own with names like these.
    """
    H, forget_bias = module.hidden_size, option(module, "forget_bias")
    orthogonal = option(module, "orthogonal")
    parameters = dict(module.named_parameters(recurse=False))
    for suffix in _suffixes(module):
        weight = parameters.get(f"weight_hh{suffix}")
        if orthogonal and weight is not None:
            for gate in weight.split(H):
                _be_orthogonal(gate)
        if forget_bias is not None:
            first = H * _gates(module).index("f")
            for name, value in ((f"bias_ih{suffix}", forget_bias), (f"bias_hh{suffix}", 0)):
                if name in parameters:
                    parameters[name][first : first + H] = value
    for name in (name for own in module._gain_names for name in own):
        if name in parameters:
            parameters[name].fill_(0 if name.startswith("bias") else 1)


def _gates(module: Any) -> tuple[str, ...]:
    """The names of the gates, in the order of their rows in the weights."""
    mode = mode_of(module)
    return module.cell.gates if is_own(mode) else CELLS[mode].names


def _suffixes(module: Any) -> list[str]:
    """What the names of the weights of each direction of each layer end with; of a cell nothing."""
    if isinstance(module, nn.RNNCellBase):
        return [""]
    directions = ("", "_reverse")[: 1 + module.bidirectional]
    return [f"_l{i}{end}" for i in range(module.num_layers) for end in directions]


def _be_orthogonal(weight: Tensor) -> None:
    """``torch.nn.init.orthogonal_`` for every dtype: the decomposition has no 16-bit types."""
    computed = torch.promote_types(weight.dtype, torch.float32)
    drawn = torch.empty_like(weight, dtype=computed)
    weight.copy_(nn.init.orthogonal_(drawn))
