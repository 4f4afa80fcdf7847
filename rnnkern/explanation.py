"""Which kernel a call would run, and why: `explain`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import autocast, kernels
from rnnkern.call import Call, read, read_cell, refusal_of
from rnnkern.forward import without_kernels
from rnnkern.kernels import Refusal, Why
from rnnkern.known_cells import name_of
from rnnkern.options import Options, asked_of, asked_of_cell, computed
from rnnkern.run import have_operators, refusal_of_options


class Explanation(str):
    """Text that shows itself as it is at a prompt."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def explain(module: Any, input: Any, hx: Any = None) -> Explanation:
    """Which kernel ``module(input, hx)`` would run, and why.

    Args:
        module: `rnnkern.RNN`, `rnnkern.LSTM`, `rnnkern.GRU` or a cell.
        input, hx: as for the call. Nothing is computed. A kernel takes the same call with
            ``lengths`` and ``reset``, too. On the CPU it also takes ``reset_to`` and
            ``return_cells``.

    Raises:
        TypeError: ``module`` is none of these.
    """
    if not hasattr(module, "_torch_forward"):
        kind = type(module)
        name = f"torch.nn.{kind.__name__}" if hasattr(nn, kind.__name__) else kind.__qualname__
        raise TypeError(
            f"explain wants a layer or cell of rnnkern (rnnkern.convert makes them), got {name}"
        )
    is_cell, instead = isinstance(module, nn.RNNCellBase), without_kernels(module)
    packed = isinstance(input, PackedSequence)
    x: Tensor = input.data if packed else input
    axes = (1, 2) if is_cell else (2,) if packed else (2, 3)
    if x.dim() not in axes or not x.numel():
        return Explanation(f"{instead} refuses or skips an input of shape {tuple(x.shape)}")
    if x.size(-1) != module.input_size:
        return Explanation(
            f"{instead} refuses this: input_size is {module.input_size}, the input has {x.size(-1)}"
        )
    call: Call | Refusal | None = None if is_cell else refusal_of(module)
    if call is None:
        call = read_cell(module, input, hx) if is_cell else read(module, input, hx)
    if isinstance(call, Refusal):
        refuses = call.why is Why.INVALID
        if call.why is Why.MODULE and asked_of(module, None, None, False) is not None:
            instead, refuses = "rnnkern", True
        return Explanation(f"{instead} {'refuses' if refuses else 'runs'} this: {call.text}")
    operands = autocast.computed(call)
    if is_cell:
        options = asked_of_cell(module) if module._gain_names else None
    else:
        options = asked_of(module, None, None, False)
    if options is not None:
        refused = refusal_of_options(operands, computed(options, call, operands.x))
        if refused is not None:
            return Explanation(f"plain PyTorch runs this: {refused.text}")
    refusal = kernels.refusal_of_cell(call.layer, operands.x) or kernels.mode_refusal()
    refusal = refusal or kernels.refusal(operands)
    if refusal is not None and refusal.why is not Why.GAPS:
        if refusal.why is not Why.CELL and have_operators(operands):
            text = f"the operators of torch.ops.rnnkern, around the kernels: {refusal.text}"
            return Explanation(text)
        return Explanation(f"{instead} runs this: {refusal.text}")
    lines = _lines(call, operands.x, has_gaps=refusal is not None)
    if options is not None:
        lines.insert(1, _of_options(options))
    return Explanation("\n".join(lines))


def _of_options(options: Options) -> str:
    own = []
    if options.gains:
        own.append("layer_norm=True: the sums are normalised between the products and the cell")
    if options.recurrent_dropout:
        own.append(f"recurrent_dropout={options.recurrent_dropout}: one mask of h for all steps")
    if options.zoneout:
        how = "drawn in each step" if options.draws else "its expectation"
        own.append(f"zoneout={options.zoneout}: {how}")
    return "; ".join(own)


def _lines(call: Call, x: Tensor, has_gaps: bool) -> list[str]:
    module, layer, T, N = call.module, call.layer, call.T, call.N
    kernel = kernels.kernel_of(layer, module.hidden_size, getattr(module, "proj_size", 0))
    D, layers = layer.directions, getattr(module, "num_layers", 1)
    multiplied = kernels.multiplied_as(kernel, x)
    dtype = str(x.dtype).removeprefix("torch.")
    device = "GPU" if x.device.type == "cuda" else "CPU"
    cell, how = name_of(layer.mode), multiplied and f" multiplied as {multiplied}"
    lines = [
        f"{cell} on the {device}, {dtype}{how}: "
        f"T={T} N={N} I={module.input_size} H={module.hidden_size} layers={layers} directions={D}"
    ]
    if has_gaps:
        lines.append("a tensor has gaps along its last axis or a lazy sign: copied first")
    for i in range(layers):
        features = module.input_size if i == 0 else D * kernel.out
        describe = partial(
            kernels.describe, kernel, x, T=T, N=N, features=features,
            from_zeros=T == 1 and call.given.h0 is None,
        )  # fmt: skip
        lines.append(f"layer {i} forward: {describe(backward=False)}")
        lines.append(f"layer {i} backward: {describe(backward=True)}")
    return lines
