"""Layers, directions, dropout between them, and the decision where a call is carried out.

Every call ends in one of four places: the kernels; operators around them (`rnnkern.ops`), in modes
of torch that see operators only; ``torch.nn``'s own path, for whatever no kernel covers (it also
raises torch's own errors for wrong input); or the pure PyTorch reference, for ``lengths`` and
``reset`` on inputs that no kernel covers.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.nn.utils.rnn import PackedSequence

from rnnkern import kernels, ops
from rnnkern.autograd import record, record_cell, record_cell_in_loop
from rnnkern.cells import CELLS
from rnnkern.exporting import to_torch
from rnnkern.kernels import GAPS, Layer
from rnnkern.sequence import Steps, packed_steps, padded_steps, place_of
from rnnkern.spec import Spec, one_step


class FallbackWarning(UserWarning):
    """A call is carried out by ``torch.nn`` because no kernel covers it.

    Given once for each reason.
    """


is_compiling = torch.compiler.is_compiling
_tracing_state = torch._C._get_tracing_state

_warned: set[str] = set()

WRONG = "input that torch.nn refuses"
"""The reason of a fallback that is expected to end in torch's own error."""


def forward(
    self: Any,
    input: Any,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Any:
    """``forward`` of `rnnkern.RNN`, `rnnkern.LSTM` and `rnnkern.GRU`."""
    if lengths is None and reset is None and not is_compiling():
        # The plain call is tried without looking at it: the kernel refuses what it does not cover
        # before anything is computed, and then the call is looked at.
        try:
            result = kernels.plain_call(self, input, hx, record)
        except kernels.RefusedError:
            result = None
        if result is not None:
            return result
    return _checked(self, input, hx, lengths, reset)


def _checked(module: Any, input: Any, hx: Any, lengths: Any, reset: Any) -> Any:
    compiling = is_compiling()
    # torch.jit.trace records operators, and knows those of torch alone.
    jit = not compiling and _tracing_state() is not None
    if (jit or compiling) and lengths is None and reset is None:  # noqa: SIM102
        if jit or isinstance(input, PackedSequence):
            return module._torch_forward(input, hx)
    reason = refusal_of(module)
    if reason is not None and (reason == WRONG or (lengths is None and reset is None)):
        return _elsewhere(module, input, hx, lengths, reset, reason)
    if isinstance(input, PackedSequence):
        return _packed(module, input, hx, lengths, reset)
    if input.dim() == 2:
        return _unbatched(module, input, hx, lengths, reset)
    if input.dim() != 3:
        return _elsewhere(module, input, hx, lengths, reset, WRONG)
    batch_first = module.batch_first
    first, second, features = input.shape
    T, N = (second, first) if batch_first else (first, second)
    h0, c0, fits = initial_states(module, hx, N)
    if T == 0 and compiling:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")  # torch.nn's
    if not fits or features != module.input_size or T == 0:
        return _elsewhere(module, input, hx, lengths, reset, WRONG)
    if jit:
        return _by_reference(module, input, hx, lengths, reset)
    steps = None
    if lengths is not None or reset is not None:
        steps = padded_steps(lengths, reset, T, N, batch_first, place_of(input))
    result = _on_kernels(module, input, h0, c0, steps, compiling)
    if isinstance(result, str):
        return _elsewhere(module, input, hx, lengths, reset, result)
    y, hn, cn = result
    return y, (hn if cn is None else (hn, cn))


_METHODS = {
    base: {name: getattr(base, name) for name in kernels.CALLED_BY_FORWARD if hasattr(base, name)}
    for base in (nn.LSTM, nn.GRU, nn.RNN, nn.RNNBase)
}


def refusal_of(module: Any) -> str | None:
    """Why torch.nn must carry out the calls of this module, or None.

    ``torch.nn``'s forward calls methods that a subclass may override. The kernels call none.
    """
    own = own_method(type(module))
    if own is None:
        space = vars(module)
        for name in kernels.CALLED_BY_FORWARD:
            if name in space:
                own = name
    if own is not None:
        return f"a method {own} of the module's own"
    if isinstance(module, nn.RNN) and module.mode not in ("RNN_TANH", "RNN_RELU"):
        return WRONG
    return None


def own_method(kind: type) -> str | None:
    """The method of a class in place of one that torch.nn's forward calls, or None.

    Dynamo asks once for each class and keeps no guards for it (`rnnkern.dynamo`): they would take
    longer at each call than all others.
    """
    base = next(base for base in _METHODS if issubclass(kind, base))
    for name, method in _METHODS[base].items():
        if getattr(kind, name) is not method:
            return name
    return None


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that ``torch.autocast`` asks for on x's device, or None where it is off."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def autocast(dtype: torch.dtype, *tensors: Tensor | None) -> Iterator[Any]:
    """The tensors as autocast has them: of another dtype, but for float64."""
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return (t if t is None or t.dtype not in eligible else t.to(dtype) for t in tensors)


def _promoted(dtype: torch.dtype, x: Tensor, state: Tensor | None) -> torch.dtype:
    """The dtype under autocast of a state that torch.nn multiplies with gates by an operator of
    their own: mostly float32.

    Where a layer's state is such a one, it is computed in that dtype altogether: rounded to 16 bits
    in each step it would be another one.
    """
    return torch.promote_types(dtype, (x if state is None else state).dtype)


def dtype_under_autocast(
    module: Any, dtype: torch.dtype, x: Tensor, h0: Tensor | None, packed: bool
) -> torch.dtype:
    """What a layer is computed in, and its results have, where autocast asks for ``dtype``."""
    if x.device.type != "cpu":  # one operator for all of it
        return dtype
    mode = mode_of(module)
    by_operators = mode == "GRU" or (mode == "LSTM" and (packed or not x.numel()))
    return _promoted(dtype, x, h0) if by_operators else dtype


def operands(
    module: Any,
    asked: torch.dtype | None,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    packed: bool = False,
) -> Iterator[Any]:
    """``x, h0, c0, *weights`` of a layer or a cell, as they are computed if autocast asks."""
    if isinstance(module, nn.RNNBase):
        weights = current_weights(module)
        dtype = asked and dtype_under_autocast(module, asked, x, h0, packed)
    else:
        weights = [module.weight_ih, module.weight_hh, *_cell_biases(module)]
        # In the dtype of the weights: else each step would keep copies of them for backward.
        is_wide = module.weight_ih.dtype == torch.float32
        dtype = asked and (torch.float32 if is_wide else _dtype_of_cell(module, asked, x, h0, c0))
    given = (x, h0, c0, *weights)
    return iter(given) if dtype is None else autocast(dtype, *given)


def _dtype_of_cell(
    module: Any, asked: torch.dtype, x: Tensor, h0: Tensor | None, c0: Tensor | None
) -> torch.dtype:
    """What a cell's results have, if autocast asks for ``asked``."""
    by_operators = isinstance(module, (nn.LSTMCell, nn.GRUCell)) and x.device.type == "cpu"
    return _promoted(asked, x, h0 if c0 is None else c0) if by_operators else asked


def _on_kernels(
    module: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    steps: Steps | None,
    compiling: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | str:
    """Runs the layers, under autocast in its dtype; or says why no kernel covers them."""
    asked = autocast_dtype(x)
    if asked is None:
        weights = current_weights(module)
        return _with_weights(None, module, x, h0, c0, weights, steps, compiling)
    packed = steps is not None and steps.packed
    with torch.autocast(x.device.type, enabled=False):
        own_x, own_h0, own_c0, *weights = operands(module, asked, x, h0, c0, packed)
        result = _with_weights(asked, module, own_x, own_h0, own_c0, weights, steps, compiling)
        if isinstance(result, str):
            return result
        return results_under_autocast(module, asked, x, c0, *result)


def results_under_autocast(
    module: Any,
    asked: torch.dtype,
    x: Tensor,
    c0: Tensor | None,
    y: Tensor,
    hn: Tensor,
    cn: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """In the dtypes of torch.nn: with a projection, outputs are results of a product, the cell
    state is not.
    """
    if cn is not None and module.proj_size and x.device.type == "cpu":
        y, hn = autocast(asked, y, hn)
        cn = cn.to(_promoted(cn.dtype, x, c0))
    return y, hn, cn


def layer_of(module: Any, asked: torch.dtype | None = None) -> Layer:
    """What each layer of a module is, where autocast asks for that dtype."""
    return kernels.layer(
        mode_of(module),
        directions=2 if module.bidirectional else 1,
        hidden=module.hidden_size,
        proj=module.proj_size,
        bias=module.bias,
        batch_first=module.batch_first,
        by_bfloat16=asked is torch.bfloat16,
    )


def spec_of(module: Any, asked: torch.dtype | None = None) -> Spec:
    """As `layer_of`, for the traced door: torch cannot trace that one."""
    return Spec(
        mode_of(module),
        directions=2 if module.bidirectional else 1,
        bias=module.bias,
        batch_first=module.batch_first,
        proj=module.proj_size > 0,
        by_bfloat16=asked is torch.bfloat16,
        is_cell=False,
    )


def expect_layer(module: Any) -> None:
    """Raises a TypeError where a module is none that these functions take."""
    if not isinstance(module, nn.RNNBase) or mode_of(module) not in CELLS:
        raise TypeError(
            f"module must be an RNN, LSTM or GRU, of rnnkern or torch.nn, "
            f"got {type(module).__name__}"
        )


def _with_weights(
    asked: torch.dtype | None,
    module: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    steps: Steps | None,
    compiling: bool,
) -> tuple[Tensor, Tensor, Tensor | None] | str:
    """Runs the layers, with dense copies of what has gaps; or says why no kernel covers them.

    ``asked``: what autocast asks for.
    """
    reason: str | None = None
    if not compiling:
        reason = kernels.mode_refusal()
        if reason is None:
            layer = layer_of(module, asked)
            try:
                return _layers(layer, module, x, h0, c0, weights, steps)
            except kernels.RefusedError:
                reason = kernels.refusal(x, h0, c0, weights)
                if reason is None:
                    raise
            if reason == GAPS:
                return _layers(layer, module, *_dense(x, h0, c0, weights), steps)
    if not has_operators(x, h0, c0, *weights):
        return reason or "an operand"
    return _layers(spec_of(module, asked), module, x, h0, c0, weights, steps)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def has_operators(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the traced door is open to these tensors."""
    kinds = ("cpu", "meta") if kernels.cuda is None else ("cpu", "meta", "cuda")
    if is_compiling() and to_torch():  # whose operators need no kernel of rnnkern
        kinds = (*kinds, x.device.type)
    return x.dtype in _DTYPES and all(
        t is None
        or (
            type(t) in _TENSORS
            and t.dtype == x.dtype
            and t.device == x.device
            and t.device.type in kinds
            and t.layout == torch.strided
        )
        for t in (x, *others)
    )


def _dense(
    x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, Tensor | None, Tensor | None, list[Tensor]]:
    x, h0, c0, *weights = (t if t is None else t.contiguous() for t in (x, h0, c0, *weights))  # type: ignore[assignment]
    return x, h0, c0, weights


def mode_of(module: Any) -> str:
    """The name in `CELLS` of what a layer or a cell runs.

    Only the Elman RNN has a choice. torch.nn's cells have no attribute ``mode``, and an LSTM or GRU
    may use it for what it likes.
    """
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        return "LSTM"
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        return "GRU"
    is_cell = isinstance(module, nn.RNNCell)
    return f"RNN_{module.nonlinearity.upper()}" if is_cell else module.mode


def has_cell_state(module: Any) -> bool:
    return CELLS[mode_of(module)].has_cell_state


def layer_of_cell(module: Any, asked: torch.dtype | None, x: Tensor) -> Layer:
    """The layer of one step that a cell is, if autocast asks for that dtype."""
    own = _cell(module, asked, x)
    return kernels.layer(mode_of(module), hidden=module.hidden_size, proj=0, **own)


def _cell(module: Any, asked: torch.dtype | None, x: Tensor) -> dict[str, Any]:
    return {
        "directions": 1,
        "bias": module.bias_ih is not None or module.bias_hh is not None,
        "batch_first": False,
        "by_bfloat16": asked is torch.bfloat16 or (asked is not None and x.device.type == "cuda"),
        "is_cell": True,
    }


def cell(self: Any, input: Any, hx: Any = None) -> Any:
    """``forward`` of `rnnkern.RNNCell`, `rnnkern.LSTMCell` and `rnnkern.GRUCell`."""
    if not is_compiling():  # as in `forward`
        try:
            result = kernels.plain_cell(self, input, hx, record_cell, record_cell_in_loop)
        except kernels.RefusedError:
            result = None
        if result is not None:
            return result
    return _checked_cell(self, input, hx)


def method(function: Any, kind: str) -> Any:
    """A function as the method ``forward`` of that class of `rnnkern.modules`, by name too: errors
    and pickles call it so.
    """
    made = FunctionType(function.__code__, function.__globals__, "forward", function.__defaults__)
    made.__module__, made.__qualname__ = "rnnkern.modules", f"{kind}.forward"
    made.__doc__, made.__annotations__ = function.__doc__, function.__annotations__
    return made


def _checked_cell(module: Any, input: Any, hx: Any) -> Any:
    compiling = is_compiling()
    if to_torch() if compiling else _tracing_state() is not None:
        return module._torch_forward(input, hx)
    is_elman = isinstance(module, nn.RNNCell)
    if is_elman and module.nonlinearity not in ("tanh", "relu"):
        return module._torch_forward(input, hx)  # torch's error
    mode = mode_of(module)
    states = _cell_states(module, mode, input, hx)
    # torch.func takes 2 ms for a gradient of ours, and a fraction for those of torch's operators,
    # which have no rules for its other transforms.
    if states and not compiling and ops.only_differentiated() and input.device.type == "cpu":
        return module._torch_forward(input, hx)
    if states is None:
        _refuse_what_torch_does_not(module, mode, input, hx)
        return _warn(WRONG, module._torch_forward(input, hx))
    x, (h0, c0) = input, states
    asked = autocast_dtype(x)
    dtype = asked and _dtype_of_cell(module, asked, x, h0, c0)
    x, h0, c0, *weights = operands(module, asked, x, h0, c0)
    outputs: tuple[Tensor, ...] | str = "an operand"
    if not compiling:
        layer = layer_of_cell(module, asked, x)
        outputs = kernels.mode_refusal() or _one_cell(layer, x, h0, c0, weights)
    if isinstance(outputs, str):
        if not has_operators(x, h0, c0, *weights):
            return _warn(outputs, module._torch_forward(input, hx))
        spec = Spec(mode, proj=False, **_cell(module, asked, x))
        outputs = _cell_by_operators(spec, module.hidden_size, x, h0, c0, weights)
    if dtype is not None and x.dtype != torch.float64:
        outputs = tuple(z.to(dtype) for z in outputs)
    return outputs if CELLS[mode].has_cell_state else outputs[0]


def _one_cell(
    layer: Layer, x: Tensor, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor, ...] | str:
    """``h``, or ``h, c``, on the kernels; or why none covers the call."""
    run = kernels.profiled(layer.forward, layer.mode)
    try:
        outputs, training, kept_h, saved = run(x, h0, c0, weights, None, keeps_y=True)
    except kernels.RefusedError:
        reason = kernels.refusal(x, h0, c0, weights)
        if reason is None:
            raise
        if reason != GAPS:
            return reason
        x, h0, c0, weights = _dense(x, h0, c0, weights)
        outputs, training, kept_h, saved = run(x, h0, c0, weights, None, keeps_y=True)
    if not training:
        return outputs
    states = [s for s in (h0, c0) if s is not None]
    recorded = record_cell_in_loop if kernels.are_worth_sums(layer, x) else record_cell
    return recorded((layer, None, len(states)), outputs, kept_h, saved, x, *weights, *states)


def _cell_by_operators(
    spec: Spec,
    hidden: int,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
) -> tuple[Tensor, ...]:
    """The same as a layer of one step, in a mode of torch that sees operators only."""
    h0, c0 = one_step(h0), one_step(c0)
    _, hn, cn = _one_layer(spec, one_step(x), h0, c0, weights, None)
    # No views: torch.nn's are none, and `detach_` refuses those. Nothing else holds their memory.
    view = torch.ops.aten._unsafe_view.default
    return tuple(view(z, (*x.shape[:-1], hidden)) for z in (hn, cn) if z is not None)


def _cell_biases(module: Any) -> tuple[Tensor, ...]:
    given = (module.bias_ih, module.bias_hh)
    if given[0] is None and given[1] is None:
        return ()
    other = given[0] if given[1] is None else given[1]
    return tuple(torch.zeros_like(other) if bias is None else bias for bias in given)


def current_weights(module: Any) -> list[Tensor]:
    """The weights that count, in torch's flat order, by torch.nn's own rule.

    These are the ones in ``_flat_weights``, unless the module's attributes have become other
    tensors since the last call, as under `torch.func.functional_call` or a parametrization.
    """
    own, parameters, flat = module.__dict__, module._parameters, module._flat_weights
    for i, name in enumerate(module._flat_weights_names):
        # By `in` and by index, because a dictionary of somebody's own may make what is looked up.
        space = own if name in own else parameters
        found = space[name] if name in space else None  # noqa: SIM401
        if i >= len(flat) or found is not flat[i] or found is None:
            break
    else:
        return flat  # type: ignore[no-any-return]
    if is_compiling():  # the same without a change of the module, which a compiler would record
        names, refs = module._flat_weights_names, module._flat_weight_refs
        weights = [getattr(module, name) for name in names]
        kept = all(r is None or r() is w for r, w in zip(refs, weights, strict=False))
        return list(flat) if kept and len(flat) == len(names) else weights
    module._update_flat_weights()
    return module._flat_weights  # type: ignore[no-any-return]


def initial_states(module: Any, hx: Any, N: int) -> tuple[Tensor | None, Tensor | None, bool]:
    """``h_0, c_0`` and whether they are what a batch of N needs."""
    if hx is None:
        return None, None, True
    count = module.num_layers * (2 if module.bidirectional else 1)
    wanted = (count, N, module.proj_size or module.hidden_size)
    if not has_cell_state(module):
        return hx, None, isinstance(hx, Tensor) and hx.shape == wanted
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        return None, None, False
    h0, c0 = hx
    fits = isinstance(h0, Tensor) and isinstance(c0, Tensor)
    return h0, c0, fits and h0.shape == wanted and c0.shape == (count, N, module.hidden_size)


def _refuse_what_torch_does_not(module: Any, mode: str, input: Any, hx: Any) -> None:
    """Raises where torch.nn's cells would hand states to C++ that reads past their end."""
    if not isinstance(input, Tensor) or input.dim() not in (1, 2) or hx is None:
        return
    if mode == "LSTM" and isinstance(hx, Tensor):
        raise TypeError(
            f"LSTMCell: Expected hx to be a tuple of two tensors (h_0, c_0), "
            f"got {type(hx).__name__}"
        )
    for state in hx if isinstance(hx, (tuple, list)) else (hx,):
        if isinstance(state, Tensor) and state.dim() in (1, 2) and state.dim() != input.dim():
            raise RuntimeError(
                f"{module._get_name()}: Expected states of {input.dim()} dimensions, as the input "
                f"has, got a state of shape {tuple(state.shape)}"
            )


def _cell_states(
    module: Any, mode: str, input: Any, hx: Any
) -> tuple[Tensor | None, Tensor | None] | None:
    """``h_0, c_0`` of a cell as they were given, or None where torch must look at the call."""
    if input.dim() not in (1, 2) or input.size(-1) != module.input_size:
        return None
    if hx is None:
        return None, None
    has_c = CELLS[mode].has_cell_state
    if has_c != isinstance(hx, (tuple, list)) or (has_c and len(hx) != 2):
        return None
    wanted = (*input.shape[:-1], module.hidden_size)
    parts = tuple(hx) if has_c else (hx,)
    if any(not isinstance(part, Tensor) or part.shape != wanted for part in parts):
        return None
    return parts[0], parts[1] if has_c else None


def _layers(
    layer: Layer | Spec,
    module: Any,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    steps: Steps | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    if module.num_layers == 1:
        return _one_layer(layer, x, h0, c0, weights, steps)
    if module.dropout and module.training and not isinstance(layer, Spec):
        # No random number is drawn for a call that ends elsewhere.
        reason = kernels.refusal(x, h0, c0, weights)
        if reason is not None:
            raise kernels.RefusedError(reason)
    D = layer.directions
    count = D * layer.tensors
    finals: list[tuple[Tensor, Tensor | None]] = []
    for i in range(module.num_layers):
        if i:
            x = dropout(module, x)
        own = of_layer(i, D, count, h0, c0, weights)
        x, hn, cn = _one_layer(layer, x, *own, steps, is_last=i + 1 == module.num_layers)
        finals.append((hn, cn))
    hn = torch.cat([h for h, _ in finals])
    return (
        x,
        hn,
        torch.cat([c for _, c in finals if c is not None]) if layer.has_cell_state else None,
    )


def of_layer(
    i: int, D: int, count: int, h0: Tensor | None, c0: Tensor | None, weights: list[Tensor]
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """Initial states and weights of layer i, of D directions and ``count`` weights."""
    return (
        None if h0 is None else h0[i * D : (i + 1) * D],
        None if c0 is None else c0[i * D : (i + 1) * D],
        weights[i * count : (i + 1) * count],
    )


def _one_layer(
    layer: Layer | Spec,
    x: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    weights: list[Tensor],
    steps: Steps | None,
    is_last: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``is_last``: the caller gets y, and may change it in place."""
    if isinstance(layer, Spec):
        operands = (x, h0, c0, *weights)
        training = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in operands
        )
        return ops.scan(layer, steps, x, h0, c0, weights, training)
    run = kernels.profiled(layer.forward, layer.mode)
    outputs, training, kept_y, saved = run(x, h0, c0, weights, steps, keeps_y=is_last)
    if training:
        states = [s for s in (h0, c0) if s is not None]
        scanned = layer, steps, len(states)
        outputs = record(scanned, outputs, kept_y, saved, x, *weights, *states)
    y, hn, *cn = outputs
    return y, hn, cn[0] if cn else None


def dropout(module: Any, x: Tensor) -> Tensor:
    """Between layers.

    With the same random numbers as torch.nn, for outputs lie in memory as torch's do.
    """
    return nn.functional.dropout(x, module.dropout, module.training) if module.dropout else x


def _unbatched(module: Any, input: Tensor, hx: Any, lengths: Any, reset: Any) -> Any:
    batch = 0 if module.batch_first else 1
    if hx is None:
        states = None
    elif has_cell_state(module):
        states = tuple(h.unsqueeze(1) for h in hx) if _are_2d(hx) else None
    else:
        states = hx.unsqueeze(1) if _are_2d((hx,)) else None
    if hx is not None and states is None:
        return _elsewhere(module, input, hx, lengths, reset, WRONG)
    if isinstance(lengths, Tensor) and lengths.dim() == 0:
        lengths = lengths.unsqueeze(0)
    if isinstance(reset, Tensor) and reset.dim() == 1:
        reset = reset.unsqueeze(batch)
    y, final = _checked(module, input.unsqueeze(batch), states, lengths, reset)
    if isinstance(final, tuple):
        return y.squeeze(batch), tuple(f.squeeze(1) for f in final)
    return y.squeeze(batch), final.squeeze(1)


def _are_2d(states: Any) -> bool:
    return isinstance(states, (tuple, list)) and all(
        isinstance(s, Tensor) and s.dim() == 2 for s in states
    )


def _packed(module: Any, input: PackedSequence, hx: Any, lengths: Any, reset: Any) -> Any:
    if lengths is not None or reset is not None:
        raise ValueError(
            "lengths and reset describe a padded batch; a PackedSequence brings its own lengths"
        )
    data, batch_sizes, sorted_indices, unsorted_indices = input
    N = int(batch_sizes[0]) if batch_sizes.numel() else 0
    h0, c0, fits = initial_states(module, hx, N)
    if not fits or N == 0 or data.dim() != 2 or data.size(-1) != module.input_size:
        _refuse_states(module, hx, N)
        return _elsewhere(module, input, hx, None, None, WRONG)
    steps = packed_steps(batch_sizes, sorted_indices, place_of(data))
    result = _on_kernels(module, data, h0, c0, steps, False)
    if isinstance(result, str):
        return _elsewhere(module, input, hx, None, None, result)
    y, hn, cn = result
    output = PackedSequence(y, batch_sizes, sorted_indices, unsorted_indices)
    return output, (hn if cn is None else (hn, cn))


def _refuse_states(module: Any, hx: Any, N: int) -> None:
    """Raises torch.nn's error where torch.nn lets C++ read past the end of a state."""
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    for i, (state, size) in enumerate(zip(states, sizes, strict=False)):
        wanted = (count, N, size)
        if isinstance(state, Tensor) and state.dim() > 2 and state.shape != wanted:
            name = f"hidden[{i}]" if has_cell_state(module) else "hidden"
            raise RuntimeError(f"Expected {name} size {wanted}, got {list(state.shape)}")


def without_torch(self: Any, input: Any, hx: Any = None) -> Any:
    """In place of ``torch.nn``'s forward, for a layer of a cell that it does not have."""
    if isinstance(input, PackedSequence):
        raise NotImplementedError(f"no kernel covers this packed sequence of {self._get_name()}")
    self.check_input(input, None)
    T, N = input.shape[:2][:: -1 if self.batch_first else 1]
    if T == 0:
        raise RuntimeError("Expected sequence length to be larger than 0 in RNN")
    if not initial_states(self, hx, N)[2]:
        _refuse_states(self, hx, N)
        raise TypeError(f"hx must be {'(h_0, c_0)' if has_cell_state(self) else 'h_0'}")
    return _by_reference(self, input, hx, None, None)


def _warn(reason: str, result: Any, by: str = "torch.nn") -> Any:
    if not is_compiling() and reason not in _warned:
        _warned.add(reason)
        warnings.warn(
            f"no rnnkern kernel covers this call ({reason}); {by} carries it out",
            FallbackWarning,
            stacklevel=_level_of_the_caller(),
        )
    return result


def _level_of_the_caller() -> int:
    """The stack level, as seen by the calling function, of the first one outside the modules."""
    inside = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, nn.modules.__file__))
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level - 1


def _elsewhere(module: Any, input: Any, hx: Any, lengths: Any, reset: Any, reason: str) -> Any:
    """Without kernels: by ``torch.nn``, or with ``lengths`` or ``reset`` by the reference."""
    if lengths is None and reset is None:
        result = module._torch_forward(input, hx)
    else:
        if is_compiling() and to_torch() and reason != WRONG:
            raise NotImplementedError(f"lengths and reset cannot be exported ({reason})")
        if reason == WRONG:  # torch.nn raises its error; lengths cannot make the input right
            module._torch_forward(input, hx)
        result = _by_reference(module, input, hx, lengths, reset)
    has_torch = isinstance(module, (nn.RNN, nn.LSTM, nn.GRU))
    return _warn(reason, result, "torch.nn" if has_torch else "plain PyTorch")


def _by_reference(module: Any, x: Tensor, hx: Any, lengths: Any, reset: Any) -> Any:
    from rnnkern import reference

    module.check_input(x, None)
    batch_first = module.batch_first
    T, N = (x.size(1), x.size(0)) if batch_first else (x.size(0), x.size(1))
    h0, c0, _ = initial_states(module, hx, N)
    steps = padded_steps(lengths, reset, T, N, batch_first, place_of(x))
    weights = current_weights(module)
    D = 2 if module.bidirectional else 1
    count = len(weights) // module.num_layers
    finals = []
    for i in range(module.num_layers):
        if i:
            x = dropout(module, x)
        x, *final = reference.layer(
            mode_of(module),
            x,
            *of_layer(i, D, count, h0, c0, weights),
            directions=D,
            bias=module.bias,
            batch_first=batch_first,
            steps=steps,
        )
        finals.append(final)
    states = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
    return x, (states if len(states) == 2 else states[0])
