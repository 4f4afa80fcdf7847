"""Runs a call: on the kernels, or on the operators around them in modes that see operators only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from rnnkern import autocast, kernels, ops
from rnnkern.autograd import record, record_cell, record_cell_in_loop
from rnnkern.call import Call, is_compiling
from rnnkern.interop.exporting import to_torch
from rnnkern.kernels import Kernel, Refusal, Why
from rnnkern.layer import Layer, Maybe, Operands, one_step
from rnnkern.sequence import Steps

Outputs = tuple[Tensor, Tensor, Maybe]
"""``y, h_n, c_n``"""
_Results = TypeVar("_Results")


def layers(call: Call) -> Outputs | Refusal:
    """The results of all layers; or why neither kernels nor operators cover the call."""
    if call.asked is None:
        return _run(_stack, call, call.given)
    with torch.autocast(call.given.x.device.type, enabled=False):
        found = _run(_stack, call, autocast.computed(call))
        return found if isinstance(found, Refusal) else autocast.results(call, *found)


def one_cell(call: Call) -> tuple[Tensor, ...] | Refusal:
    """``h`` or ``h, c`` of a cell; or why neither kernels nor operators cover the call."""
    operands = autocast.computed(call)
    outputs = _run(_cell, call, operands)
    dtype = autocast.dtype_of_results(call)
    if isinstance(outputs, Refusal) or dtype is None or operands.x.dtype == torch.float64:
        return outputs
    return tuple(z.to(dtype) for z in outputs)


def _run(
    part: Callable[[Call, Operands, Kernel | None], _Results], call: Call, operands: Operands
) -> _Results | Refusal:
    """Runs a part on the kernel, with dense copies if the operands have gaps, or on operators."""
    refusal: Refusal | None = None
    if not is_compiling():
        refusal = kernels.mode_refusal()
        if refusal is None:
            module, proj = call.module, 0 if call.layer.is_cell else call.module.proj_size
            kernel = kernels.kernel_of(call.layer, module.hidden_size, proj)
            try:
                return part(call, operands, kernel)
            except kernels.RefusedError:
                refusal = kernels.refusal(operands)
                if refusal is None:
                    raise
            if refusal.why is Why.GAPS:
                return part(call, _dense(operands), kernel)
    if not have_operators(operands):
        return refusal or Refusal(Why.OPERAND, "an operand")
    return part(call, operands, None)


def _stack(call: Call, operands: Operands, kernel: Kernel | None) -> Outputs:
    """All layers, one after the other: on the kernel, or without one on operators."""
    module, layer, steps = call.module, call.layer, call.steps
    if module.num_layers == 1:
        return _one_layer(layer, steps, operands, kernel)
    if module.dropout and module.training and kernel is not None:
        # No random number may be drawn for a call that torch.nn runs in the end.
        refusal = kernels.refusal(operands)
        if refusal is not None:
            raise kernels.RefusedError(refusal.text)
    x = operands.x
    finals: list[tuple[Tensor, Maybe]] = []
    for i in range(module.num_layers):
        if i:
            x = dropout(module, x)
        own = layer.of_stack(i, operands, x)
        x, hn, cn = _one_layer(layer, steps, own, kernel, i + 1 == module.num_layers)
        finals.append((hn, cn))
    hn = torch.cat([h for h, _ in finals])
    return (
        x,
        hn,
        torch.cat([c for _, c in finals if c is not None]) if layer.has_cell_state else None,
    )


def _one_layer(
    layer: Layer,
    steps: Steps | None,
    operands: Operands,
    kernel: Kernel | None,
    is_last: bool = True,
) -> Outputs:
    """``is_last``: the caller of the module gets y, and may change it in place."""
    x, h0, c0, weights, _ = operands
    if kernel is None:
        training = torch.is_grad_enabled() and any(
            t is not None and t.requires_grad for t in (x, h0, c0, *weights)
        )
        return ops.scan(layer, steps, operands, training)
    run = kernels.profiled(kernel.forward, layer.mode)
    outputs, training, kept_y, saved = run(x, h0, c0, weights, steps, keeps_y=is_last)
    if training:
        states = [s for s in (h0, c0) if s is not None]
        scanned = kernel, steps, len(states)
        outputs = record(scanned, outputs, kept_y, saved, x, *weights, *states)
    y, hn, *cn = outputs
    return y, hn, cn[0] if cn else None


def dropout(module: Any, x: Tensor) -> Tensor:
    """Dropout between layers.

    It draws the same random numbers as torch.nn, because outputs have torch's memory layout.
    """
    return nn.functional.dropout(x, module.dropout, module.training) if module.dropout else x


def _cell(call: Call, operands: Operands, kernel: Kernel | None) -> tuple[Tensor, ...]:
    """A cell on the kernel, or without one on operators, as a layer of one step."""
    x, h0, c0, weights, _ = operands
    if kernel is None:
        own = Operands(one_step(x), one_step(h0), one_step(c0), weights)
        _, hn, cn = _one_layer(call.layer, None, own, None)
        # No views: torch.nn's are none, and `detach_` refuses those. Nothing else holds their
        # memory.
        view = torch.ops.aten._unsafe_view.default
        shape = (*x.shape[:-1], call.module.hidden_size)
        return tuple(view(z, shape) for z in (hn, cn) if z is not None)
    run = kernels.profiled(kernel.forward, kernel.mode)
    outputs, training, kept_h, saved = run(x, h0, c0, weights, None, keeps_y=True)
    if not training:
        return outputs
    states = [s for s in (h0, c0) if s is not None]
    recorded = record_cell_in_loop if kernels.are_worth_sums(kernel, x) else record_cell
    return recorded((kernel, None, len(states)), outputs, kept_h, saved, x, *weights, *states)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def have_operators(operands: Operands) -> bool:
    """Whether the operators of `rnnkern.ops` take these operands."""
    x, h0, c0, weights, _ = operands
    kinds = ("cpu", "meta") if kernels.cuda is None else ("cpu", "meta", "cuda")
    if is_compiling() and to_torch():  # a program of torch's operators needs no kernel of rnnkern
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
        for t in (x, h0, c0, *weights)
    )


def _dense(operands: Operands) -> Operands:
    tensors = (operands.x, operands.h0, operands.c0, *operands.weights)
    x, h0, c0, *weights = (t if t is None else t.contiguous() for t in tensors)
    return Operands(x, h0, c0, weights)
