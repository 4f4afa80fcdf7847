"""What this build has, and what it would do: `build_info` and `explain`."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import functional, kernels


def _version() -> str:
    try:
        return metadata.version("rnnkern")
    except metadata.PackageNotFoundError:  # run from the sources without installation
        return "unknown"


__version__ = _version()


def build_info() -> dict[str, Any]:
    """Version, compiler, CUDA, and the instruction sets compiled and in use.

    Returns:
        A dict with the keys ``version``, ``compiler``, ``cuda`` (the toolkit's version; None: built
        without), ``cuda_architectures`` (list: ``sm_90a`` is machine code, ``compute_80`` PTX),
        ``cuda_driver`` (the latest CUDA that this machine's driver knows; None: no driver),
        ``isa_compiled`` (list, best first), ``isa`` (in use; the environment variable
        ``RNNKERN_ISA`` forces a lower one), ``openmp``, ``torch``, ``threads``.
    """
    return {
        "version": __version__,
        "compiler": kernels.compiler,
        "cuda": kernels.cuda_version(),
        "cuda_architectures": (kernels.cuda_architectures() or "").split(),
        "cuda_driver": kernels.cuda_driver(),
        "isa_compiled": kernels.compiled_sets(),
        "isa": kernels.instruction_set(),
        "openmp": True,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


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
    h0, c0 = hx if isinstance(hx, (tuple, list)) and len(hx) == 2 else (hx, None)
    reason = None if is_cell else functional.refusal_of(module)
    if reason is not None:
        return Explanation(f"torch.nn carries this out: {reason}")
    asked = functional.autocast_dtype(x)
    x, h0, c0, *weights = functional.operands(module, asked, x, h0, c0, packed)
    reason = kernels.mode_refusal() or kernels.refusal(x, h0, c0, weights)
    if reason is not None and reason != kernels.GAPS:
        if functional.has_operators(x, h0, c0, *weights):
            return Explanation(f"the operators of torch.ops.rnnkern, around the kernels: {reason}")
        return Explanation(f"torch.nn carries this out: {reason}")
    if is_cell:
        sizes = 1, x.size(0) if x.dim() == 2 else 1
        layer = functional.layer_of_cell(module, asked, x)
    else:
        layer = functional.layer_of(module, asked)
        if packed:
            sizes = len(input.batch_sizes), int(input.batch_sizes[0])
        elif x.dim() == 2:
            sizes = x.size(0), 1
        else:
            sizes = (x.size(1), x.size(0)) if module.batch_first else (x.size(0), x.size(1))
    return Explanation("\n".join(_lines(layer, module, x, *sizes, reason)))


def _lines(
    layer: kernels.Layer, module: Any, x: Tensor, T: int, N: int, reason: str | None
) -> list[str]:
    D = layer.directions
    layers = getattr(module, "num_layers", 1)
    multiplied = " multiplied as bfloat16" if kernels.multiplied_as_bfloat16(layer, x) else ""
    dtype = str(x.dtype).removeprefix("torch.")
    place = "GPU" if x.device.type == "cuda" else "CPU"
    lines = [
        f"{layer.mode} on the {place}, {dtype}{multiplied}: "
        f"T={T} N={N} I={module.input_size} H={module.hidden_size} layers={layers} directions={D}"
    ]
    if reason == kernels.GAPS:
        lines.append("a tensor has gaps along its last axis: copied first")
    for i in range(layers):
        features = module.input_size if i == 0 else D * layer.out
        for name, back in (("forward", False), ("backward", True)):
            plan = kernels.describe(layer, x, T, N, features, back)
            lines.append(f"layer {i} {name}: {plan}")
    return lines
