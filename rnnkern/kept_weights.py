"""What is made of weights under ``torch.autocast``, kept until its region ends.

torch casts a weight once for a region. A layer that cast its weights in each call, or a cell that
packed them at each step, would fall behind where they are large. So casts are kept. Packed weights
are kept from the second call in a region on, because the first may be the only one, and has packed
them into its scratch memory. Weights of which torch keeps no casts are not kept here either: those
without gradients, and all of them in inference mode. So a change of a weight that torch sees is
seen here, too.

torch does not say when a region ends. But then it frees the casts that it has kept, and one of them
is the cast of a tensor of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from rnnkern import kernels
from rnnkern.layer import Operands

_WORTH = 1 << 18
"""So many numbers in the weights make it worth while."""

_FEW_ROWS = 256
"""With more rows in a call, packing is a small part of it."""


class _Kept(NamedTuple):
    weights: list[ref[Tensor]]
    states: list[tuple[int, int]]
    made: Any
    """Casts; or packed weights, None after the first call."""


_kept: dict[tuple[int, Any], _Kept] = {}
"""By the id of the first weight, and by what else this is good for."""

_ours: Tensor | None = None

_token: ref[Tensor] | None = None
"""torch's cast of our tensor, as long as this region lasts."""

_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def packed_in_region(kernel: kernels.Kernel, operands: Operands) -> kernels.Frozen | None:
    """The packed weights of a layer or cell that has been called in this region before; or None."""
    x, _, _, weights, _ = operands
    if not _may_keep(weights) or x.numel() > _FEW_ROWS * x.shape[-1]:
        return None
    if not kernels.multiplies_as_bfloat16(kernel, x):
        return None
    found = _found(weights, kernel)
    if found is None:
        _keep(weights, kernel, None)
        return None
    if found.made is not None:
        return found.made  # type: ignore[no-any-return]
    packed = kernels.Frozen(kernel, x.shape[-1], 1, "bfloat16", weights, ())
    _keep(weights, kernel, packed)
    return packed


def cast_in_region(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in that dtype, kept for the region if they are large enough."""
    if not _may_keep(weights) or kernels.mode_refusal() is not None:
        return [w.to(dtype) for w in weights]
    mode = dtype, torch.is_grad_enabled()  # a cast has a graph or not
    found = _found(weights, mode)
    if found is not None:
        return found.made  # type: ignore[no-any-return]
    casts = [w.to(dtype) for w in weights]
    _keep(weights, mode, casts)
    return casts


def _may_keep(weights: Sequence[Tensor]) -> bool:
    """Whether they are large, and torch would keep a cast of each."""
    if kernels.IS_STAND_IN or sum([w.numel() for w in weights]) < _WORTH:
        return False
    if not torch.is_autocast_cache_enabled() or torch.is_inference_mode_enabled():
        return False
    for w in weights:
        if not (type(w) in (nn.Parameter, Tensor) and w.requires_grad and w.is_leaf and w.is_cpu):
            return False
    return _saved_tensor_hooks(True) is None  # a hook would be given our tensor


def _states(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """They are not the same if a weight has changed, as far as torch tells."""
    return [(w._version, w.data_ptr()) for w in weights]


def _found(weights: Sequence[Tensor], mode: Any) -> _Kept | None:
    found = _kept.get((id(weights[0]), mode))
    if found is None or not _goes_on() or len(found.weights) != len(weights):
        return None
    for each, weight in zip(found.weights, weights, strict=True):
        if each() is not weight:
            return None
    return found if found.states == _states(weights) else None


def _keep(weights: Sequence[Tensor], mode: Any, made: Any) -> None:
    if not _goes_on():
        _begin()
    key = id(weights[0]), mode
    refs = [ref(weights[0], lambda _: _kept.pop(key, None)), *map(ref, weights[1:])]
    _kept[key] = _Kept(refs, _states(weights), made)
    if not _goes_on():  # another thread has ended its region
        _forget()


def _goes_on() -> bool:
    return _token is not None and _token() is not None


def _begin() -> None:
    global _ours, _token
    _forget()
    if _ours is None:
        _ours = torch.zeros(1, 1, dtype=torch.float32, device="cpu", requires_grad=True)
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    # Not by torch.autocast, which would end a region of its own, and with it all casts.
    torch.set_autocast_enabled("cpu", True)
    torch.set_autocast_dtype("cpu", torch.bfloat16)
    try:
        with torch.enable_grad():
            product = torch.mm(_ours, _ours)  # autocast casts its operand, and keeps the cast
            _token = ref(product.grad_fn._saved_self, _forget)  # type: ignore[union-attr]
    finally:
        torch.set_autocast_enabled("cpu", enabled)
        torch.set_autocast_dtype("cpu", dtype)


def _forget(_: Any = None) -> None:
    """Called when torch frees its casts, under the lock of its cache: nothing else may run here."""
    _kept.clear()
