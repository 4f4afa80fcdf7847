"""``forward`` of rnnkern's modules: where a call runs.

Every call ends in one of four places: the kernels; the operators around them (`rnnkern.ops`), in
modes of torch that see operators only; ``torch.nn``'s own path, if no kernel covers the call (it
also raises torch's own errors for wrong input); or the reference in plain PyTorch, for what neither
kernels nor torch.nn can run (`rnnkern.reference` lists it).
"""

from __future__ import annotations

import inspect
import os
import warnings
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import kernels, ops, run, traced
from rnnkern import options as own_options
from rnnkern.autograd import record, record_cell, record_cell_in_loop
from rnnkern.call import (
    Call,
    has_cell_state,
    is_compiling,
    own_method,
    read,
    read_cell,
    refusal_of,
)
from rnnkern.interop.exporting import to_torch
from rnnkern.kernels import Refusal, Why
from rnnkern.known_cells import is_own
from rnnkern.options import Options
from rnnkern.sequence import is_packed


class FallbackWarning(UserWarning):
    """``torch.nn`` runs a call because no kernel covers it.

    Given once for each reason.
    """


# Plain calls ask this one first, because `is_compiling` takes three times as long.
is_dynamo_compiling = torch.compiler.is_dynamo_compiling
_tracing_state = torch._C._get_tracing_state
_function_modes = torch._C._len_torch_function_stack

_warned: set[str] = set()


def forward(
    self: Any,
    input: Any,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to: Any = None,
    return_cells: bool = False,
) -> Any:
    """``forward`` of `rnnkern.RNN`, `rnnkern.LSTM`, `rnnkern.GRU` and `rnnkern.Recurrent`, whose
    classes document the arguments.
    """
    if lengths is None and reset is None and reset_to is None and not return_cells:
        # The plain call is tried without inspecting the call: the kernel refuses what it does not
        # cover before it computes anything. Only then is the call read.
        if is_dynamo_compiling():
            result = traced.layer(self, input, hx)
        elif _function_modes() and not is_compiling() and (refusal := _refusal_of_mode(self)):
            return _by_torch(self, input, hx, refusal)
        else:
            try:
                result = kernels.plain_call(self, input, hx, record)
            except kernels.RefusedError:
                result = None
            if result is None and is_compiling():  # torch.export without Dynamo
                result = traced.layer(self, input, hx)
        if result is not None:
            return result
    return _checked(self, _Given(input, hx, lengths, reset, reset_to, return_cells))


class _Given(NamedTuple):
    """What a layer is called with, as the caller has given it."""

    input: Any
    hx: Any
    lengths: Any
    reset: Any
    reset_to: Any
    return_cells: Any


def _refusal_of_mode(module: Any) -> Refusal | None:
    """Why torch.nn must run a plain call, because a mode has to see its functions; or None."""
    mode = ops.function_mode()
    if mode is None or without_kernels(module) != "torch.nn":
        return None
    if own_options.asked_of(module, None, None, False) is not None:
        return None
    return Refusal(Why.MODE, "the mode {}", (mode,))


def _checked(module: Any, given: _Given) -> Any:
    input, hx, lengths, reset, reset_to, return_cells = given
    compiling = is_compiling()
    options = own_options.asked_of(module, reset, reset_to, return_cells)
    is_plain = lengths is None and reset is None and options is None
    # torch.jit.trace records operators, and knows those of torch alone.
    jit = not compiling and _tracing_state() is not None
    if is_plain and (jit or (compiling and isinstance(input, PackedSequence))):
        return module._torch_forward(input, hx)
    refusal = refusal_of(module)
    if refusal is not None:
        if is_plain or refusal.why is Why.INVALID:
            return _by_torch(module, input, hx, refusal)
        expect_no_own_method(module)
    call = read(module, input, hx, lengths, reset)
    if isinstance(call, Refusal):
        if isinstance(input, PackedSequence):
            _refuse_states(module, hx, input)
        if not is_plain:
            module._torch_forward(input, hx)  # torch.nn raises its own error, if it has one
            raise ValueError(f"lengths, reset and options do not apply: {call.text}")
        return _by_torch(module, input, hx, call)
    exports = compiling and to_torch()
    if options is not None:
        if exports and lengths is not None:
            raise NotImplementedError("lengths and other options together cannot be exported")
        options = own_options.options_of(call, options, reset_to)
    if jit or (exports and options is not None):
        return _by_reference(call, options)
    outputs: Any = run.layers(call) if options is None else run.layers_with_options(call, options)
    if not isinstance(outputs, Refusal):
        return call.results(*outputs)
    if is_plain:
        return _by_torch(module, input, hx, outputs)
    if exports:
        raise NotImplementedError(f"lengths and reset cannot be exported ({outputs.text})")
    result = _by_reference(call, options)
    _warn(outputs, "plain PyTorch")
    return result


def cell(self: Any, input: Any, hx: Any = None) -> Any:
    """``forward`` of `rnnkern.RNNCell`, `rnnkern.LSTMCell` and `rnnkern.GRUCell`."""
    if is_dynamo_compiling():  # as in `forward`
        result = traced.cell(self, input, hx)
    elif _function_modes() and not is_compiling() and (refusal := _refusal_of_mode(self)):
        return _by_torch(self, input, hx, refusal)
    else:
        try:
            result = kernels.plain_cell(self, input, hx, record_cell, record_cell_in_loop)
        except kernels.RefusedError:
            result = None
        if result is None and is_compiling():
            result = traced.cell(self, input, hx)
    if result is not None:
        return result
    return _checked_cell(self, input, hx)


def _checked_cell(module: Any, input: Any, hx: Any) -> Any:
    if module._gain_names:
        return _cell_with_options(module, input, hx, own_options.asked_of_cell(module))
    compiling = is_compiling()
    # Dynamo breaks the graph at a Function of autograd inside a transform, and then fails.
    if to_torch() or traced.is_transformed() if compiling else _tracing_state() is not None:
        return module._torch_forward(input, hx)
    # Under torch.func a gradient of our operators takes a millisecond, and one of torch.nn's cell a
    # fraction of it. But torch.nn's cell has no rules for the other transforms.
    if (
        not compiling
        and isinstance(input, Tensor)
        and input.is_cpu
        and ops.only_differentiated(input, module._parameters.get("weight_hh"))
    ):
        _refuse_what_torch_does_not(module, input, hx)
        return module._torch_forward(input, hx)
    call = read_cell(module, input, hx)
    if isinstance(call, Refusal):
        _refuse_what_torch_does_not(module, input, hx)
        return _by_torch(module, input, hx, call)
    outputs = run.one_cell(call)
    if isinstance(outputs, Refusal):
        return _by_torch(module, input, hx, outputs)
    return outputs if len(outputs) > 1 else outputs[0]


def _cell_with_options(module: Any, input: Any, hx: Any, options: Options) -> Any:
    call = read_cell(module, input, hx)
    if isinstance(call, Refusal):
        _refuse_what_torch_does_not(module, input, hx)
        module._torch_forward(input, hx)  # torch.nn raises its own error, if it has one
        raise ValueError(f"layer_norm does not apply: {call.text}")
    without = to_torch() if is_compiling() else _tracing_state() is not None
    outputs = run.cell_with_options(call, options, by_kernels=not without)
    if isinstance(outputs, Refusal):
        _warn(outputs, "plain PyTorch")
        outputs = run.cell_with_options(call, options, by_kernels=False)
    return outputs if len(outputs) > 1 else outputs[0]


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
    _warn(refusal, without_kernels(module))
    return result


def without_torch(self: Any, input: Any, hx: Any = None) -> Any:
    """In place of ``torch.nn``'s forward, for a layer of a cell that it does not have."""
    call = read(self, input, hx)
    if isinstance(call, Refusal):
        raise ValueError(f"{self._get_name()}: {call.text}")
    return _by_reference(call)


def _by_reference(call: Call, options: Options | None = None) -> Any:
    operands, options = call.given, options or Options()
    call.module.check_input(operands.x, call.input.batch_sizes if is_packed(call.steps) else None)
    if not is_own(call.layer.mode):
        return call.results(*run.by_reference(call, operands, options))
    # The results of a cell that cannot be compiled have the dtypes that its kernels give.
    return call.results(*run.computed_by_reference(call, options))


def without_kernels(module: Any) -> str:
    """What runs a call of a module that no kernel covers."""
    own = getattr(type(module), "_torch_forward", None)  # None: a module of torch.nn
    return "plain PyTorch" if own is without_torch else "torch.nn"


def expect_no_own_method(module: Any) -> None:
    """Raises a ValueError if the class overrides what only torch.nn's ``forward`` calls.

    For calls that torch.nn cannot run in place of the kernels.
    """
    own = own_method(type(module))
    if own is not None and without_kernels(module) == "torch.nn":
        raise ValueError(
            f"{type(module).__name__} has a method {own} of its own, which only torch.nn's forward "
            f"calls, and that knows no lengths, reset and options"
        )


def _warn(refusal: Refusal, instead: str) -> None:
    if not is_compiling() and refusal.pattern not in _warned:
        _warned.add(refusal.pattern)
        warnings.warn(
            f"no rnnkern kernel covers this call ({refusal.text}); {instead} runs it",
            FallbackWarning,
            stacklevel=level_of_the_caller(),
        )


def level_of_the_caller() -> int:
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
        if input.dim() == 1 and hx.dim() == 2 and len(hx) == 2:  # h_0 and c_0 of one row
            return
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
