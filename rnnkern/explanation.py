"""Which kernel a call would run, and why: `explain`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import autocast, kernels
from rnnkern.call import Call, read, read_cell, refusal_of
from rnnkern.kernels import Refusal, Why
from rnnkern.run import have_operators


class Explanation(str):
    """Text that shows itself as it is at a prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(module: Any, input: Any, hx: Any = None) -> Explanation:
    """Which kernel ``module(input, hx)`` would run, and why.

    Args:
        module: `rnnkern.RNN`, `rnnkern.LSTM`, `rnnkern.GRU` or a cell.
        input: as for the call; nothing is computed.

    Raises:
        TypeError: ``module`` is none of these.
    """
    if not hasattr(module, "_torch_forward"):
        kind = type(module)
        name = f"torch.nn.{kind.__name__}" if hasattr(nn, kind.__name__) else kind.__qualname__
        raise TypeError(
            f"explain wants a layer or cell of rnnkern (rnnkern.convert makes them), got {name}"
        )
    is_cell = isinstance(module, nn.RNNCellBase)
    packed = isinstance(input, PackedSequence)
    x: Tensor = input.data if packed else input
    axes = (1, 2) if is_cell else (2,) if packed else (2, 3)
    if x.dim() not in axes or not x.numel():
        return Explanation(f"torch.nn refuses or skips an input of shape {tuple(x.shape)}")
    if x.size(-1) != module.input_size:
        return Explanation(
            f"torch.nn refuses this: input_size is {module.input_size}, the input has {x.size(-1)}"
        )
    call: Call | Refusal | None = None if is_cell else refusal_of(module)
    if call is None:
        call = read_cell(module, input, hx) if is_cell else read(module, input, hx)
    if isinstance(call, Refusal):
        refuses = call.why is Why.INVALID
        return Explanation(f"torch.nn {'refuses' if refuses else 'runs'} this: {call.text}")
    operands = autocast.computed(call)
    refusal = kernels.mode_refusal() or kernels.refusal(operands)
    if refusal is not None and refusal.why is not Why.GAPS:
        if have_operators(operands):
            text = f"the operators of torch.ops.rnnkern, around the kernels: {refusal.text}"
            return Explanation(text)
        return Explanation(f"torch.nn runs this: {refusal.text}")
    return Explanation("\n".join(_lines(call, operands.x, has_gaps=refusal is not None)))


def _lines(call: Call, x: Tensor, has_gaps: bool) -> list[str]:
    module, layer, T, N = call.module, call.layer, call.T, call.N
    kernel = kernels.kernel_of(layer, module.hidden_size, getattr(module, "proj_size", 0))
    D, layers = layer.directions, getattr(module, "num_layers", 1)
    multiplied = " multiplied as bfloat16" if kernels.multiplied_as_bfloat16(kernel, x) else ""
    dtype = str(x.dtype).removeprefix("torch.")
    place = "GPU" if x.device.type == "cuda" else "CPU"
    lines = [
        f"{layer.mode} on the {place}, {dtype}{multiplied}: "
        f"T={T} N={N} I={module.input_size} H={module.hidden_size} layers={layers} directions={D}"
    ]
    if has_gaps:
        lines.append("a tensor has gaps along its last axis: copied first")
    for i in range(layers):
        features = module.input_size if i == 0 else D * kernel.out
        for name, back in (("forward", False), ("backward", True)):
            plan = kernels.describe(kernel, x, T, N, features, back)
            lines.append(f"layer {i} {name}: {plan}")
    return lines
