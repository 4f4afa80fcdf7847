"""Runs a call: on the kernels, or on the operators around them in modes that see operators only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from rnnkern import autocast, kernels, ops
from rnnkern import options as own_options
from rnnkern.autograd import record, record_cell, record_cell_in_loop
from rnnkern.call import Call, is_compiling
from rnnkern.interop.exporting import to_torch
from rnnkern.kernels import Kernel, Refusal, Why
from rnnkern.known_cells import CELLS
from rnnkern.layer import Layer, Maybe, Operands, dense, one_step
from rnnkern.options import Options
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


OutputsWithCells = tuple[Tensor, Tensor, Maybe, Maybe]
"""``y, h_n, c_n`` and the cell states of all steps."""


def layers_with_options(call: Call, options: Options) -> OutputsWithCells | Refusal:
    """As `layers`, for a call that asks for more than ``torch.nn`` can do."""
    with autocast.switched_off(call.given.x.device.type):
        operands = autocast.computed(call)
        options = own_options.computed(options, call, operands.x)
        if ops.transformed():
            return _results(call, by_reference(call, operands, options))
        refusal = kernels.refusal_of_cell(call.layer, operands.x)
        refusal = refusal or refusal_of_options(operands, options)
        if refusal is not None:
            return refusal
        made = _unless_refused(call, operands, lambda: _on_kernels(call, operands, options))
        return made if isinstance(made, Refusal) else _results(call, made)


def computed_by_reference(call: Call, options: Options) -> OutputsWithCells:
    """All layers in plain PyTorch, in the dtypes in which the kernels would compute them."""
    with autocast.switched_off(call.given.x.device.type):
        operands = autocast.computed(call)
        options = own_options.computed(options, call, operands.x)
        return _results(call, by_reference(call, operands, options))


def _results(call: Call, made: OutputsWithCells) -> OutputsWithCells:
    """Outputs in the dtypes of the results."""
    y, hn, cn, cells = made
    y, hn, cn = autocast.results(call, y, hn, cn)
    return y, hn, cn, cells if cells is None or cn is None else cells.to(cn.dtype)


def _unless_refused(
    call: Call, operands: Operands, run: Callable[[], _Results]
) -> _Results | Refusal:
    """What it returns; or why not, if the first call finds that nothing compiles the cell."""
    try:
        return run()
    except kernels.RefusedError:
        refusal = kernels.refusal_of_cell(call.layer, operands.x)
        if refusal is None:
            raise
        return refusal


def refusal_of_options(operands: Operands, options: Options) -> Refusal | None:
    """Why neither kernels nor operators cover a call with options, or None."""
    x, h0, c0, weights, _ = operands
    if x.device.type not in ("cpu", "meta") or kernels.IS_STAND_IN:
        options_of_calls = "reset_to, return_cells, layer_norm, recurrent_dropout or zoneout"
        return Refusal(Why.OPERAND, f"{options_of_calls} on a GPU")
    gains = options.all_gains()
    states = [z for z in (options.reset_h, options.reset_c) if z is not None]
    if have_operators(Operands(x, h0, c0, (*weights, *states, *gains))):
        return None
    refusal = kernels.refusal(Operands(x, h0, c0, [*weights, *states, *gains]))
    return refusal or Refusal(Why.OPERAND, "an operand")


def _on_kernels(call: Call, operands: Operands, options: Options) -> OutputsWithCells:
    def one_layer(i: int, own: Operands) -> OutputsWithCells:
        its = _options_of(call, options, i)
        states = (own.h0, own.c0, its.reset_h, its.reset_c)
        tensors = (own.x, *states, *own.weights, *its.all_gains())
        training = torch.is_grad_enabled() and any(
            z is not None and z.requires_grad for z in tensors
        )
        return ops.with_options.scan(call.layer, call.steps, own, its, training)

    return _through_layers(call, operands, one_layer)  # type: ignore[no-any-return]


def by_reference(call: Call, operands: Operands, options: Options) -> OutputsWithCells:
    """All layers in plain PyTorch."""
    from rnnkern import reference

    def one_layer(i: int, own: Operands) -> OutputsWithCells:
        its = _options_of(call, options, i)
        y, hn, *rest = reference.layer(call.layer, own, call.steps, its)
        cn = rest.pop(0) if CELLS[call.layer.mode].has_cell_state else None
        return y, hn, cn, rest[0] if rest else None

    return _through_layers(call, operands, one_layer)  # type: ignore[no-any-return]


def _options_of(call: Call, options: Options, i: int) -> Options:
    """The options of layer i. The cell states of all steps are those of the last layer."""
    its = options.of_layer(i, call.layer.directions)
    return its._replace(cells=options.cells and i + 1 == call.module.num_layers)


def _through_layers(
    call: Call, operands: Operands, one_layer: Callable[[int, Operands], Any]
) -> Any:
    """All layers, one after the other, each on the output of the one before.

    ``one_layer(i, its operands)`` returns ``y, h_n, c_n`` and maybe more. So does this: the output
    and what there is more are those of the last layer.
    """
    module, layer = call.module, call.layer
    if layer.is_cell or module.num_layers == 1:
        return one_layer(0, operands)
    x = operands.x
    rest: list[Any] = []
    finals: list[tuple[Tensor, Maybe]] = []
    for i in range(module.num_layers):
        if i:
            x = dropout(module, x)
        x, hn, cn, *rest = one_layer(i, layer.of_stack(i, operands, x))
        finals.append((hn, cn))
    hn = torch.cat([h for h, _ in finals])
    cns = [c for _, c in finals if c is not None]
    return (x, hn, torch.cat(cns) if cns else None, *rest)


def one_cell(call: Call) -> tuple[Tensor, ...] | Refusal:
    """``h`` or ``h, c`` of a cell; or why neither kernels nor operators cover the call."""
    operands = autocast.computed(call)
    outputs = _run(_cell, call, operands)
    dtype = autocast.dtype_of_results(call)
    if isinstance(outputs, Refusal) or dtype is None or operands.x.dtype == torch.float64:
        return outputs
    return tuple(z.to(dtype) for z in outputs)


def cell_with_options(
    call: Call, options: Options, by_kernels: bool = True
) -> tuple[Tensor, ...] | Refusal:
    """As `one_cell`, for a cell with options; without kernels in plain PyTorch."""
    x, h0, c0, weights, _ = call.given
    wide = call._replace(given=Operands(one_step(x), one_step(h0), one_step(c0), weights))
    run = layers_with_options if by_kernels else computed_by_reference
    made = run(wide, options)
    if isinstance(made, Refusal):
        return made
    dtype = autocast.dtype_of_results(call)
    if dtype is None or made[0].dtype == torch.float64:
        dtype = made[0].dtype
    _, hn, cn, _ = made
    states = (z.to(dtype) for z in (hn, cn) if z is not None)
    return tuple(_without_time(z, (*x.shape[:-1], call.module.hidden_size)) for z in states)


def _without_time(state: Tensor, shape: tuple[Any, ...]) -> Tensor:
    """The state of a cell that was run as a layer of one step.

    The result is no view, because `detach_` refuses views, and torch.nn's states are none. Nothing
    else holds its memory.
    """
    return torch.ops.aten._unsafe_view.default(state, shape)  # type: ignore[no-any-return]


def _run(
    part: Callable[[Call, Operands, Kernel | None], _Results], call: Call, operands: Operands
) -> _Results | Refusal:
    """Runs `_stack` or `_cell` on the kernel, or on operators.

    If operands have gaps, the kernel gets dense copies.
    """
    refusal = kernels.refusal_of_cell(call.layer, operands.x)
    if refusal is not None:
        return refusal
    if not is_compiling():
        refusal = kernels.mode_refusal()
        if refusal is None:
            module, proj = call.module, 0 if call.layer.is_cell else call.module.proj_size
            kernel = kernels.kernel_of(call.layer, module.hidden_size, proj)
            try:
                return part(call, operands, kernel)
            except kernels.RefusedError:
                refusal = kernels.refusal(operands) or kernels.refusal_of_cell(
                    call.layer, operands.x
                )
                if refusal is None:
                    raise
            if refusal.why is Why.GAPS:
                return part(call, _dense(operands), kernel)
            if refusal.why is Why.CELL:
                return refusal
    if not have_operators(operands):
        return refusal or Refusal(Why.OPERAND, "an operand")
    if is_compiling():
        return part(call, operands, None)
    return _unless_refused(call, operands, lambda: part(call, operands, None))


def _stack(call: Call, operands: Operands, kernel: Kernel | None) -> Outputs:
    """All layers, one after the other: on the kernel, or without one on operators."""
    module, layer, steps = call.module, call.layer, call.steps
    if module.num_layers > 1 and module.dropout and module.training and kernel is not None:
        # No random number may be drawn for a call that torch.nn runs in the end.
        refusal = kernels.refusal(operands)
        if refusal is not None:
            raise kernels.RefusedError(refusal.text)

    def one_layer(i: int, own: Operands) -> Outputs:
        return _one_layer(layer, steps, own, kernel, i + 1 == module.num_layers)

    return _through_layers(call, operands, one_layer)  # type: ignore[no-any-return]


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
    packed = _packed_weights(layer, kernel, operands)
    run = kernels.profiled(kernel.forward, layer.mode)
    outputs, training, kept_y, saved = run(
        x, h0, c0, weights, steps, keeps_y=is_last, packed_weights=packed
    )
    if training:
        states = [s for s in (h0, c0) if s is not None]
        scanned = kernel, steps, len(states)
        outputs = record(scanned, outputs, kept_y, saved, x, *weights, *states)
    y, hn, *cn = outputs
    return y, hn, cn[0] if cn else None


def _packed_weights(layer: Layer, kernel: Kernel, operands: Operands) -> kernels.Frozen | None:
    """The weights, if they have been packed in this region of autocast."""
    if not layer.by_bfloat16 or operands.x.dtype != torch.float32:
        return None
    from rnnkern.kept_weights import packed_in_region  # most programs do not need it

    return packed_in_region(kernel, operands)


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
        shape = (*x.shape[:-1], call.module.hidden_size)
        return tuple(_without_time(z, shape) for z in (hn, cn) if z is not None)
    packed = _packed_weights(call.layer, kernel, operands)
    run = kernels.profiled(kernel.forward, kernel.mode)
    outputs, training, kept_h, saved = run(
        x, h0, c0, weights, None, keeps_y=True, packed_weights=packed
    )
    if not training:
        return outputs
    states = [s for s in (h0, c0) if s is not None]
    recorded = record_cell_in_loop if kernels.are_worth_sums(kernel, x) else record_cell
    return recorded((kernel, None, len(states)), outputs, kept_h, saved, x, *weights, *states)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TENSORS = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)


def have_operators(operands: Operands) -> bool:
    """Whether the operators of `rnnkern.ops` take these operands."""
    x, h0, c0, weights, _ = operands
    given = [t for t in (x, h0, c0, *weights) if t is not None]
    # Some subclasses refuse to be asked anything. Dynamo would check the types once more.
    if not is_compiling() and not all(type(t) in TENSORS for t in given):
        return False
    return all(is_covered(type(t), t.dtype, t.device, t.layout, x.dtype, x.device) for t in given)


def is_covered(
    kind: type,
    dtype: torch.dtype,
    device: torch.device,
    layout: torch.layout,
    wanted_dtype: torch.dtype,
    wanted_device: torch.device,
) -> bool:
    """Whether the operators take a tensor like this beside an input of that dtype on that device.

    Dynamo takes the answer for constant (`rnnkern.traced`).
    """
    kinds = ("cpu", "meta") if kernels.cuda is None else ("cpu", "meta", "cuda")
    if is_compiling() and to_torch():  # a program of torch's operators needs no kernel of rnnkern
        kinds = (*kinds, wanted_device.type)
    return (
        kind in TENSORS
        and dtype in DTYPES
        and dtype == wanted_dtype
        and device == wanted_device
        and device.type in kinds
        and layout == torch.strided
    )


def _dense(operands: Operands) -> Operands:
    tensors = (operands.x, operands.h0, operands.c0, *operands.weights)
    x, h0, c0, *weights = map(dense, tensors)
    return Operands(x, h0, c0, weights)
