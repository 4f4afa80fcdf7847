"""The dtypes of a call under ``torch.autocast``: those of torch.nn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from rnnkern.layer import Maybe, Operands
from rnnkern.sequence import is_packed

if TYPE_CHECKING:
    from rnnkern.call import Call


def knows(device: str) -> bool:
    """Whether there is autocast for a type of devices. Dynamo takes the answer for constant."""
    return torch.amp.is_autocast_available(device)


def asked(x: Tensor) -> torch.dtype | None:
    """The dtype that autocast asks for on x's device, or None if it is off."""
    device = x.device.type
    if device not in ("cpu", "cuda") or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def switched_off(device: str) -> AbstractContextManager[Any]:
    """Autocast of a type of devices switched off, if it is on."""
    if not knows(device) or not torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def cast(dtype: torch.dtype, *tensors: Maybe) -> Iterator[Any]:
    """The tensors cast as autocast would cast them: float64 stays float64."""
    eligible = (torch.float32, torch.bfloat16, torch.float16)
    return (
        t if t is None or t.dtype == dtype or t.dtype not in eligible else t.to(dtype)
        for t in tensors
    )


def dtype_of_results(call: Call) -> torch.dtype | None:
    """The dtype of a call's results, and of the computation of a layer; None without autocast.

    On the CPU torch.nn updates some states with pointwise operators, which promote, mostly to
    float32. Such a layer computes in that dtype altogether, because rounding the state to 16 bits
    at every step would change it.
    """
    (x, h0, c0, *_), mode, dtype = call.given, call.layer.mode, call.asked
    packed = is_packed(call.steps)
    if dtype is None or x.device.type != "cpu":  # on a GPU one operator computes the whole layer
        return dtype
    if call.layer.is_cell:
        promotes = mode in ("LSTM", "GRU")
        return _promoted(dtype, x, h0 if c0 is None else c0) if promotes else dtype
    promotes = mode == "GRU" or (mode == "LSTM" and (packed or not x.numel()))
    return _promoted(dtype, x, h0) if promotes else dtype


def _promoted(dtype: torch.dtype, x: Tensor, state: Maybe) -> torch.dtype:
    return torch.promote_types(dtype, (x if state is None else state).dtype)


def computed(call: Call) -> Operands:
    """The operands of a call in the dtype in which they are computed."""
    if call.asked is None:
        return call.given
    x, h0, c0, weights, _ = call.given
    # A cell computes in the dtype of its weights, because each step would otherwise keep copies of
    # them for backward.
    is_wide = call.layer.is_cell and weights[0].dtype == torch.float32
    dtype = torch.float32 if is_wide else dtype_of_results(call)
    assert dtype is not None
    x, h0, c0 = cast(dtype, x, h0, c0)
    if is_compiling() or dtype == torch.float32 or any(w.dtype != torch.float32 for w in weights):
        return Operands(x, h0, c0, list(cast(dtype, *weights)))
    from rnnkern.kept_weights import cast_in_region  # most programs do not need it

    return Operands(x, h0, c0, cast_in_region(weights, dtype))


def results(call: Call, y: Tensor, hn: Tensor, cn: Maybe) -> tuple[Tensor, Tensor, Maybe]:
    """The results of a layer in the dtypes of torch.nn.

    With a projection on the CPU, the outputs are results of a product and the cell state is not.
    """
    x, _, c0, *_ = call.given
    if call.asked is not None and cn is not None and call.layer.proj and x.device.type == "cpu":
        y, hn = cast(call.asked, y, hn)
        cn = cn.to(_promoted(cn.dtype, x, c0))
    return y, hn, cn
