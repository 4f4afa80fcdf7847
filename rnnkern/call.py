"""A call of a module, read and checked once.

What `rnnkern.modules`, `explain`, `inspect`, `checkpointed` and `generate` do with a call starts
from the `Call` that `read` or `read_cell` makes of it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import autocast, kernels
from rnnkern.kernels import Refusal, Why
from rnnkern.known_cells import CELLS
from rnnkern.layer import Layer, Maybe, Operands
from rnnkern.sequence import Steps, device_of, is_packed, packed_steps, padded_steps

is_compiling = torch.compiler.is_compiling


class Call(NamedTuple):
    """What a module has to compute.

    It has no properties, because Dynamo of torch 2.10 cannot read one of a tuple that has
    tensors.

    Attributes:
        module: an RNN, LSTM, GRU or cell, of rnnkern or of torch.nn.
        input: as the caller gave it.
        layer: what each layer of the module is.
        given: the operands before any cast. An input without a batch has one of size 1 here,
            unless the module is a cell.
        steps: which rows are active at which step; None: all at every step.
        T, N: number of steps and of rows.
        asked: the dtype that autocast asks for, or None.
    """

    module: Any
    input: Any
    layer: Layer
    given: Operands
    steps: Steps | None
    T: int
    N: int
    asked: torch.dtype | None

    def results(self, y: Tensor, hn: Tensor, cn: Maybe, cells: Maybe = None) -> tuple[Any, ...]:
        """Output, state and, if there are any, cell states of all steps in the form in which the
        module returns them.
        """
        if cells is not None:
            return (*self.results(y, hn, cn), self.results(cells, hn, cn)[0])
        if is_packed(self.steps):
            _, batch_sizes, order, inverse = self.input
            state = state_of(self.layer.mode, hn, cn)
            return PackedSequence(y, batch_sizes, order, inverse), state
        if self.input.dim() == 2:
            y, hn = y.squeeze(0 if self.layer.batch_first else 1), hn.squeeze(1)
            cn = None if cn is None else cn.squeeze(1)
        return y, state_of(self.layer.mode, hn, cn)


def state_of(mode: str, hn: Tensor, cn: Maybe) -> Any:
    """The state in the form in which a module of that cell returns it."""
    if cn is None:
        return hn
    return (hn, cn) if CELLS[mode].more_states == 0 else CELLS[mode].apart(hn, cn)


def read(
    module: Any, input: Any, hx: Any = None, lengths: Any = None, reset: Any = None
) -> Call | Refusal:
    """The call ``module(input, hx, lengths=lengths, reset=reset)`` of a layer.

    Returns:
        The call; or a refusal, `Why.INVALID`, if torch.nn has to raise its own error.

    Raises:
        TypeError, ValueError: ``lengths`` or ``reset`` does not fit (`padded_steps`), or one is
            given with a `PackedSequence`.
    """
    if isinstance(input, PackedSequence):
        if lengths is not None or reset is not None:
            raise ValueError(
                "lengths and reset describe a padded batch; a PackedSequence brings its own lengths"
            )
        return _read_packed(module, input, hx)
    batch_first, x = module.batch_first, input
    if x.dim() == 2:
        batch = 0 if batch_first else 1
        x = x.unsqueeze(batch)
        if hx is not None:
            has_c = has_cell_state(module)
            if not _are_2d(hx if has_c else (hx,)):
                return _invalid("hx does not fit an input without a batch")
            hx = tuple(h.unsqueeze(1) for h in hx) if has_c else hx.unsqueeze(1)
        if isinstance(lengths, Tensor) and lengths.dim() == 0:
            lengths = lengths.unsqueeze(0)
        if isinstance(reset, Tensor) and reset.dim() == 1:
            reset = reset.unsqueeze(batch)
    if x.dim() != 3:
        return _invalid("input has {} axes", x.dim())
    first, second, features = x.shape
    T, N = (second, first) if batch_first else (first, second)
    states = initial_states(module, hx, N)
    if T == 0:
        if is_compiling():
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # torch.nn's
        return _invalid("the sequence has no steps")
    if features != module.input_size:
        return _invalid("input must have {} features, got {}", module.input_size, features)
    if states is None:
        return _misfit(module, N)
    steps = None
    if lengths is not None or reset is not None:
        steps = padded_steps(lengths, reset, T, N, batch_first, device_of(x))
    asked = autocast.asked(x)
    given = Operands(x, *states, current_weights(module))
    return Call(module, input, layer_of(module, asked), given, steps, T, N, asked)


def _read_packed(module: Any, input: PackedSequence, hx: Any) -> Call | Refusal:
    x, batch_sizes, sorted_indices, _ = input
    N = int(batch_sizes[0]) if batch_sizes.numel() else 0
    states = initial_states(module, hx, N)
    if states is None:
        return _misfit(module, N)
    if N == 0 or x.dim() != 2 or x.size(-1) != module.input_size:
        shape = tuple(x.shape)
        return _invalid("a packed input must be [rows, {}], got {}", module.input_size, shape)
    steps = packed_steps(batch_sizes, sorted_indices, device_of(x))
    if is_compiling() and steps.order is None and hx is None:
        steps = steps._replace(order=torch.arange(N))  # tells operators the number of rows
    asked = autocast.asked(x)
    given, T = Operands(x, *states, current_weights(module)), len(batch_sizes)
    return Call(module, input, layer_of(module, asked), given, steps, T, N, asked)


def read_cell(module: Any, input: Any, hx: Any = None) -> Call | Refusal:
    """The call ``module(input, hx)`` of a cell: as `read`, for a layer of one step."""
    if isinstance(module, nn.RNNCell) and module.nonlinearity not in ("tanh", "relu"):
        return _invalid("the nonlinearity is neither tanh nor relu")
    if module.hidden_size == 0:
        return _invalid("a cell without units")
    if input.dim() not in (1, 2) or input.size(-1) != module.input_size:
        return _invalid("input of shape {}", tuple(input.shape))
    mode = mode_of(module)
    states: tuple[Any, ...] = (None, None)
    if hx is not None:
        has_c = CELLS[mode].has_cell_state
        if has_c != isinstance(hx, (tuple, list)) or (has_c and len(hx) != 2):
            return _invalid("hx of type {}", type(hx).__name__)
        wanted = (*input.shape[:-1], module.hidden_size)
        states = tuple(hx) if has_c else (hx, None)
        for state in states[: 1 + has_c]:
            if not isinstance(state, Tensor) or state.shape != wanted:
                return _invalid("hx does not fit an input of shape {}", tuple(input.shape))
    asked, biases = autocast.asked(input), _cell_biases(module)
    layer = Layer(
        mode,
        directions=1,
        bias=len(biases) > 0,
        batch_first=False,
        proj=False,
        by_bfloat16=asked is torch.bfloat16 or (asked is not None and input.device.type == "cuda"),
        is_cell=True,
    )
    h0, c0 = states
    given = Operands(input, h0, c0, [module.weight_ih, module.weight_hh, *biases])
    N = input.size(0) if input.dim() == 2 else 1
    return Call(module, input, layer, given, None, 1, N, asked)


def _invalid(pattern: str, *values: Any) -> Refusal:
    return Refusal(Why.INVALID, pattern, values)


def _misfit(module: Any, N: Any) -> Refusal:
    wanted, c_shape = state_shapes(module, N)
    if not has_cell_state(module):
        return _invalid("h_0 must be a tensor of shape {}", wanted)
    if CELLS[mode_of(module)].more_states:
        text = "hx must be a tuple of {} states, of the shape {}"
        return _invalid(text, 1 + CELLS[mode_of(module)].planes, wanted)
    return _invalid("hx must be (h_0, c_0), of shapes {} and {}", wanted, c_shape)


def state_shapes(module: Any, N: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The shapes of h_0 and c_0 of a layer, for a batch of N rows."""
    rows = module.num_layers * (2 if module.bidirectional else 1)
    out, H = module.proj_size or module.hidden_size, module.hidden_size
    return (rows, N, out), (rows, N, H)


def _are_2d(states: Any) -> bool:
    return isinstance(states, (tuple, list)) and all(
        isinstance(s, Tensor) and s.dim() == 2 for s in states
    )


_METHODS = {
    base: {name: getattr(base, name) for name in kernels.CALLED_BY_FORWARD if hasattr(base, name)}
    for base in (nn.LSTM, nn.GRU, nn.RNN, nn.RNNBase)
}


def refusal_of(module: Any) -> Refusal | None:
    """Why torch.nn must run every call of this layer, or None.

    ``torch.nn``'s forward calls methods that a subclass may override. The kernels call none.
    """
    own = own_method(type(module))
    if own is None:
        space = vars(module)
        for name in kernels.CALLED_BY_FORWARD:
            if name in space:
                own = name
    if own is not None:
        return Refusal(Why.MODULE, "a method {} of the module's own", (own,))
    if isinstance(module, nn.RNN) and module.mode not in ("RNN_TANH", "RNN_RELU"):
        return Refusal(Why.INVALID, "the mode is neither RNN_TANH nor RNN_RELU")
    return None


def own_method(kind: type) -> str | None:
    """The method of a class in place of one that torch.nn's forward calls, or None.

    Dynamo asks once for each class and keeps no guards for it (`rnnkern.interop.dynamo`), because
    these would take longer at each call than all others.
    """
    base = next(base for base in _METHODS if issubclass(kind, base))
    for name, method in _METHODS[base].items():
        if getattr(kind, name) is not method:
            return name
    return None


def expect_layer(module: Any) -> None:
    """Raises a TypeError unless the module is an RNN, LSTM or GRU of rnnkern or torch.nn."""
    if not isinstance(module, nn.RNNBase) or mode_of(module) not in CELLS:
        raise TypeError(
            f"module must be an RNN, LSTM or GRU, of rnnkern or torch.nn, "
            f"got {type(module).__name__}"
        )
    if CELLS[mode_of(module)].more_states:
        raise NotImplementedError("a cell with more states than h and c is not covered here")


def mode_of(module: Any) -> str:
    """The name in `CELLS` of what a layer or a cell runs.

    Only the Elman RNN has a choice. torch.nn's cells have no attribute ``mode``, and an LSTM or GRU
    may use that name for something else.
    """
    mode = mode_of_class(type(module))
    if mode:
        return mode
    is_cell = isinstance(module, nn.RNNCell)
    return f"RNN_{module.nonlinearity.upper()}" if is_cell else module.mode


def mode_of_class(kind: type) -> str:
    """The mode of all modules of a class, or "" if each of them has its own."""
    if issubclass(kind, (nn.LSTM, nn.LSTMCell)):
        return "LSTM"
    return "GRU" if issubclass(kind, (nn.GRU, nn.GRUCell)) else ""


def has_cell_state(module: Any) -> bool:
    return CELLS[mode_of(module)].has_cell_state


def layer_of(module: Any, asked: torch.dtype | None = None) -> Layer:
    """What each layer of a module is, if autocast asks for that dtype."""
    directions, proj = 2 if module.bidirectional else 1, module.proj_size > 0
    by_bfloat16, is_cell = asked is torch.bfloat16, False
    return Layer(
        mode_of(module), directions, module.bias, module.batch_first, proj, by_bfloat16, is_cell
    )


def current_weights(module: Any) -> list[Tensor]:
    """The weights of a layer, in torch's flat order, by torch.nn's own rule.

    These are the ones in ``_flat_weights``, unless the module's attributes have become other
    tensors since the last call, as under `torch.func.functional_call` or a parametrization.
    """
    own, parameters, flat = module.__dict__, module._parameters, module._flat_weights
    names = module._flat_weights_names
    for i in range(len(names)):  # a compiled program would check enumerate at each call
        name = names[i]
        # By `in` and by index, because a subclass of dict may make what is looked up.
        space = own if name in own else parameters
        found = space[name] if name in space else None  # noqa: SIM401
        if i >= len(flat) or found is not flat[i] or found is None:
            break
    else:
        return flat  # type: ignore[no-any-return]
    if is_compiling():  # the same without a change of the module, which a compiler would record
        weights = [getattr(module, name) for name in names]
        refs = module._flat_weight_refs
        kept = all(r is None or r() is w for r, w in zip(refs, weights, strict=False))
        return list(flat) if kept and len(flat) == len(names) else weights
    module._update_flat_weights()
    return module._flat_weights  # type: ignore[no-any-return]


def _cell_biases(module: Any) -> tuple[Tensor, ...]:
    ih, hh = module.bias_ih, module.bias_hh
    if ih is None:
        return () if hh is None else (torch.zeros_like(hh), hh)
    return ih, torch.zeros_like(ih) if hh is None else hh


def initial_states(module: Any, hx: Any, N: int) -> tuple[Maybe, Maybe] | None:
    """``h_0, c_0`` of a layer for a batch of N rows; None if they do not fit."""
    cell, (h_shape, c_shape) = CELLS[mode_of(module)], state_shapes(module, N)
    if not cell.more_states or hx is None:
        return fitting_states(1 + cell.has_cell_state, hx, h_shape, c_shape)
    if not is_pair(type(hx)) or len(hx) != 1 + cell.planes:
        return None
    for state, shape in zip(hx, (h_shape, *[c_shape] * cell.planes), strict=True):
        if not is_tensor(type(state)) or state.shape != shape:
            return None
    return cell.joined(tuple(hx))  # type: ignore[return-value]


def fitting_states(
    count: int, hx: Any, h_shape: tuple[int, ...], c_shape: tuple[int, ...]
) -> tuple[Maybe, Maybe] | None:
    """``h_0, c_0`` of a cell with as many states, None for zeros; None alone if ``hx`` does not
    fit.
    """
    if hx is None:
        return None, None
    if count == 1:
        return (hx, None) if is_tensor(type(hx)) and hx.shape == h_shape else None
    if not is_pair(type(hx)) or len(hx) != 2:
        return None
    h0, c0 = hx
    if not is_tensor(type(h0)) or not is_tensor(type(c0)):
        return None
    return (h0, c0) if h0.shape == h_shape and c0.shape == c_shape else None


def is_tensor(kind: type) -> bool:
    return issubclass(kind, Tensor)


def is_pair(kind: type) -> bool:
    return issubclass(kind, (tuple, list))
