"""The plain call while ``torch.compile`` traces it: one padded batch, and nothing special about it.

At each call, a compiled program checks every name, function and attribute that was looked up while
it was traced. So `layer` and `cell` look up little. They ask the functions in `CONSTANT`, whose
answers Dynamo keeps without a check. That is safe, because these depend on nothing but their
arguments and on modes of torch, which torch checks by itself. `rnnkern.call` reads a call that is
not plain.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rnnkern import kernels, ops
from rnnkern.call import (
    current_weights,
    fitting_states,
    is_pair,
    is_tensor,
    mode_of_class,
    own_method,
)
from rnnkern.constructor import option
from rnnkern.interop.exporting import to_torch
from rnnkern.known_cells import CELLS, is_own
from rnnkern.run import TENSORS, is_covered

_unsafe_view = torch.ops.aten._unsafe_view.default


def layer(module: Any, x: Any, hx: Any) -> Any:
    """``module(x, hx)`` of a layer, or None if the call is not plain."""
    mode = plain_mode(type(module), type(x)) or module.mode
    count = states_of(mode, type(module), x.dtype, x.device)
    if not count or x.dim() != 3 or (module.dropout and module.training):
        return None
    for name in called_by_forward().split():
        if name in module.__dict__:
            return None
    if module._gain_names:
        return None
    # Dynamo guards each question, so most modules are asked one.
    if "_rnnkern_options" in module.__dict__ and (
        option(module, "recurrent_dropout") or option(module, "zoneout")
    ):
        return None
    batch_first, bias, proj = module.batch_first, module.bias, module.proj_size
    directions, layers = 2 if module.bidirectional else 1, module.num_layers
    first, second, features = x.shape
    T, N = (second, first) if batch_first else (first, second)
    rows, H = layers * directions, module.hidden_size
    states = fitting_states(count, hx, (rows, N, proj or H), (rows, N, H))
    weights = current_weights(module)
    if not states or T == 0 or features != module.input_size:
        return None
    if not _are_plain(x, states, weights):
        return None
    spec = (mode, directions, bias, batch_first, proj > 0, False, False)
    own, finals = len(weights) // layers, []
    for i in range(layers):
        begin, end = i * directions, (i + 1) * directions
        h0, c0 = (None if s is None else s if layers == 1 else s[begin:end] for s in states)
        x, *final = _scan(x, h0, c0, weights[i * own : (i + 1) * own], spec)
        finals.append(final)
    made = finals[0]
    if layers > 1:
        made = [torch.cat([final[k] for final in finals]) for k in range(count)]
    return x, made[0] if count == 1 else (made[0], made[1])


def cell(module: Any, x: Any, hx: Any) -> Any:
    """``module(x, hx)`` of a cell, or None if the call is not plain."""
    mode = plain_mode(type(module), type(x)) or mode_of_elman(module.nonlinearity)
    count = states_of(mode, type(module), x.dtype, x.device)
    if not count or x.dim() not in (1, 2) or x.shape[-1] != module.input_size:
        return None
    if module._gain_names:
        return None
    shape = (*x.shape[:-1], module.hidden_size)
    states = fitting_states(count, hx, shape, shape)
    weights = [module.weight_ih, module.weight_hh]
    bias_ih, bias_hh = module.bias_ih, module.bias_hh
    if (bias_ih is None) != (bias_hh is None):
        return None
    if bias_ih is not None:
        weights += [bias_ih, bias_hh]
    if not states or not _are_plain(x, states, weights):
        return None
    x, h0, c0 = (
        None if z is None else z[None, None] if z.dim() == 1 else z[None] for z in (x, *states)
    )
    spec = (mode, 1, len(weights) == 4, False, False, False, True)
    _, hn, cn = _scan(x, h0, c0, weights, spec)
    # No views, as in `run._without_time`.
    if count == 1:
        return _unsafe_view(hn, shape)
    return _unsafe_view(hn, shape), _unsafe_view(cn, shape)


def _are_plain(x: Any, states: Any, weights: Any) -> bool:
    for t in (x, *states, *weights):
        if t is not None and not is_plain(type(t), t.dtype, t.device, t.layout, x.dtype, x.device):
            return False
    return True


def _scan(x: Any, h0: Any, c0: Any, weights: Any, spec: Any) -> Any:
    training = False
    if is_grad_enabled():
        for t in (x, h0, c0, *weights):
            training = training or (t is not None and t.requires_grad)
    steps = (None, None, None, None, False)
    made = torch.ops.rnnkern.scan(x, h0, c0, weights, *steps, *spec, training)
    return made[:3]


# What Dynamo takes for constant


def plain_mode(kind: type, given: type) -> str:
    """`mode_of_class`; or "none", if no call with an input of the class ``given`` is plain."""
    is_cell = issubclass(kind, nn.RNNCellBase)
    if to_torch() or ops.transformed() or given not in TENSORS:
        return "none"
    if not is_cell and own_method(kind) is not None:
        return "none"
    return mode_of_class(kind)


def called_by_forward() -> str:
    """The methods that a module of a plain call does not have of its own."""
    return " ".join(kernels.CALLED_BY_FORWARD)


def mode_of_elman(nonlinearity: str) -> str:
    return {"tanh": "RNN_TANH", "relu": "RNN_RELU"}.get(nonlinearity, "none")


def states_of(mode: str, kind: type, dtype: torch.dtype, device: torch.device) -> int:
    """How many states a cell has; 0 if there is no such cell, or modules of the class cannot run
    it.
    """
    if mode not in CELLS or CELLS[mode].more_states:
        return 0
    if is_own(mode):
        from rnnkern.own_cells import build, targets

        # A program that has been compiled cannot fall back, so the kernels are loaded now.
        element = targets.ELEMENTS.get(dtype)
        if element is None or build.load(mode, element, kernels.gpu_of(device)) is not None:
            return 0
    if issubclass(kind, nn.RNN) and mode not in ("RNN_TANH", "RNN_RELU"):
        return 0
    return 1 + CELLS[mode].has_cell_state


def is_plain(kind: type, *own: Any) -> bool:
    """Whether the operators take such an operand as it is."""
    return is_covered(kind, *own) and not torch.is_autocast_enabled(own[1].type)


def is_transformed() -> bool:
    return ops.transformed()


def is_grad_enabled() -> bool:
    return torch.is_grad_enabled()


CONSTANT = (
    plain_mode,
    called_by_forward,
    mode_of_elman,
    states_of,
    is_tensor,
    is_pair,
    is_plain,
    is_grad_enabled,
    is_transformed,
)
