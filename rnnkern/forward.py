"""``forward`` of rnnkern's modules: where a call runs.

Every call ends in one of four places: the kernels; the operators around them (`rnnkern.ops`), in
modes of torch that see operators only; ``torch.nn``'s own path, if no kernel covers the call (it
also raises torch's own errors for wrong input); or the reference in plain PyTorch, for ``lengths``
and ``reset`` on inputs that no kernel covers.
"""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import kernels, ops, run
from rnnkern.autograd import record, record_cell, record_cell_in_loop
from rnnkern.call import Call, has_cell_state, is_compiling, read, read_cell, refusal_of
from rnnkern.interop.exporting import to_torch
from rnnkern.kernels import Refusal, Why


class FallbackWarning(UserWarning):
    """``torch.nn`` runs a call because no kernel covers it.

    Given once for each reason.
    """


_tracing_state = torch._C._get_tracing_state

_warned: set[str] = set()


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
        # The plain call is tried without inspecting the call: the kernel refuses what it does not
        # cover before it computes anything. Only then is the call read.
        try:
            result = kernels.plain_call(self, input, hx, record)
        except kernels.RefusedError:
            result = None
        if result is not None:
            return result
    return _checked(self, input, hx, lengths, reset)


def _checked(module: Any, input: Any, hx: Any, lengths: Any, reset: Any) -> Any:
    compiling = is_compiling()
    is_plain = lengths is None and reset is None
    # torch.jit.trace records operators, and knows those of torch alone.
    jit = not compiling and _tracing_state() is not None
    if is_plain and (jit or (compiling and isinstance(input, PackedSequence))):
        return module._torch_forward(input, hx)
    refusal = refusal_of(module)
    if refusal is not None and (is_plain or refusal.why is Why.INVALID):
        return _by_torch(module, input, hx, refusal)
    call = read(module, input, hx, lengths, reset)
    if isinstance(call, Refusal):
        if isinstance(input, PackedSequence):
            _refuse_states(module, hx, input)
        result = _by_torch(module, input, hx, call)
        if not is_plain:
            raise ValueError(f"lengths and reset do not apply: {call.text}")
        return result
    if jit:
        return _by_reference(call)
    outputs = run.layers(call)
    if not isinstance(outputs, Refusal):
        return call.results(*outputs)
    if is_plain:
        return _by_torch(module, input, hx, outputs)
    if compiling and to_torch():
        raise NotImplementedError(f"lengths and reset cannot be exported ({outputs.text})")
    result = _by_reference(call)
    _warn(outputs)
    return result


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


def _checked_cell(module: Any, input: Any, hx: Any) -> Any:
    compiling = is_compiling()
    if to_torch() if compiling else _tracing_state() is not None:
        return module._torch_forward(input, hx)
    call = read_cell(module, input, hx)
    if isinstance(call, Refusal):
        _refuse_what_torch_does_not(module, input, hx)
        return _by_torch(module, input, hx, call)
    # torch.func takes 2 ms for a gradient of ours, and a fraction for those of torch's operators,
    # which have no rules for its other transforms.
    if not compiling and ops.only_differentiated() and input.device.type == "cpu":
        return module._torch_forward(input, hx)
    outputs = run.one_cell(call)
    if isinstance(outputs, Refusal):
        return _by_torch(module, input, hx, outputs)
    return outputs if call.layer.has_cell_state else outputs[0]


def method(function: Any, kind: str) -> Any:
    """A copy of a function that is the method ``forward`` of a class of `rnnkern.modules`.

    It has the method's name, too, which errors and pickles show.
    """
    made = FunctionType(function.__code__, function.__globals__, "forward", function.__defaults__)
    made.__module__, made.__qualname__ = "rnnkern.modules", f"{kind}.forward"
    made.__doc__, made.__annotations__ = function.__doc__, function.__annotations__
    return made


# Without kernels


def _by_torch(module: Any, input: Any, hx: Any, refusal: Refusal) -> Any:
    result = module._torch_forward(input, hx)
    _warn(refusal)
    return result


def without_torch(self: Any, input: Any, hx: Any = None) -> Any:
    """In place of ``torch.nn``'s forward, for a layer of a cell that it does not have."""
    call = read(self, input, hx)
    if isinstance(call, Refusal):
        raise ValueError(f"{self._get_name()}: {call.text}")
    return _by_reference(call)


def _by_reference(call: Call) -> Any:
    from rnnkern import reference

    module, operands = call.module, call.given
    module.check_input(operands.x, call.input.batch_sizes if call.is_packed else None)
    x = operands.x
    finals = []
    for i in range(module.num_layers):
        if i:
            x = run.dropout(module, x)
        x, *final = reference.layer(call.layer, call.layer.of_stack(i, operands, x), call.steps)
        finals.append(final)
    hn, *cn = (torch.cat(parts) for parts in zip(*finals, strict=True))
    return call.results(x, hn, cn[0] if cn else None)


def _warn(refusal: Refusal) -> None:
    if not is_compiling() and refusal.text not in _warned:
        _warned.add(refusal.text)
        warnings.warn(
            f"no rnnkern kernel covers this call ({refusal.text}); torch.nn runs it",
            FallbackWarning,
            stacklevel=_level_of_the_caller(),
        )


def _level_of_the_caller() -> int:
    """The stack level, as seen by the calling function, of the first one outside the modules."""
    inside = tuple(f"{Path(file).parent}{os.sep}" for file in (__file__, nn.modules.__file__))
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(inside):
        level, frame = level + 1, frame.f_back
    return level - 1


# What torch.nn lets C++ read past its end


def _refuse_states(module: Any, hx: Any, input: PackedSequence) -> None:
    """Raises torch.nn's error for states that do not fit a packed batch."""
    N = int(input.batch_sizes[0]) if input.batch_sizes.numel() else 0
    states = hx if isinstance(hx, (tuple, list)) else (hx,)
    count = module.num_layers * (2 if module.bidirectional else 1)
    sizes = (module.proj_size or module.hidden_size, module.hidden_size)
    for i, (state, size) in enumerate(zip(states, sizes, strict=False)):
        wanted = (count, N, size)
        if isinstance(state, Tensor) and state.dim() > 2 and state.shape != wanted:
            name = f"hidden[{i}]" if has_cell_state(module) else "hidden"
            raise RuntimeError(f"Expected {name} size {wanted}, got {list(state.shape)}")


def _refuse_what_torch_does_not(module: Any, input: Any, hx: Any) -> None:
    """Raises an error for states that torch.nn's cells would take although they do not fit."""
    if not isinstance(input, Tensor) or input.dim() not in (1, 2) or hx is None:
        return
    if isinstance(module, nn.LSTMCell) and isinstance(hx, Tensor):
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
