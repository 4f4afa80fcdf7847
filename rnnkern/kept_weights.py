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


_Region = dict[tuple[int, Any], _Kept]
"""What is kept in a region, by the id of the first weight, and by what else it is good for."""

_regions: dict[ref[Tensor], _Region] = {}
"""By a weak reference to torch's cast of our tensor, with which the region ends."""

_now: ref[Tensor] | None = None
_ours: Tensor | None = None

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
    if not all(map(_is_cast_once, weights)):
        return False
    return _saved_tensor_hooks(True) is None  # a hook would be given our tensor


def _is_cast_once(w: Tensor) -> bool:
    if type(w) not in (nn.Parameter, Tensor) or not w.is_cpu or w.is_inference():
        return False
    return w.requires_grad and w.is_leaf and not w._is_view()


def _states(weights: Sequence[Tensor]) -> list[tuple[int, int]]:
    """They are not the same if a weight has changed, as far as torch tells."""
    return [(w._version, w.data_ptr()) for w in weights]


def _found(weights: Sequence[Tensor], mode: Any) -> _Kept | None:
    region = _region()
    found = None if region is None else region.get((id(weights[0]), mode))
    if found is None or len(found.weights) != len(weights):
        return None
    for each, weight in zip(found.weights, weights, strict=True):
        if each() is not weight:
            return None
    return found if found.states == _states(weights) else None


def _keep(weights: Sequence[Tensor], mode: Any, made: Any) -> None:
    region = _region()
    if region is None:
        region = _begin()
    key = id(weights[0]), mode

    def forget(_: ref[Tensor]) -> None:
        region = _region()
        if region is not None:
            region.pop(key, None)

    region[key] = _Kept([ref(weights[0], forget), *map(ref, weights[1:])], _states(weights), made)


def _region() -> _Region | None:
    return None if _now is None else _regions.get(_now)


def _begin() -> _Region:
    global _now, _ours
    if _ours is None:
        _ours = torch.zeros(1, 1, dtype=torch.float32, device="cpu", requires_grad=True)
    region: _Region = {}
    enabled, dtype = torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")
    # Not by torch.autocast, which would end a region of its own, and with it all casts.
    try:
        torch.set_autocast_enabled("cpu", True)
        torch.set_autocast_dtype("cpu", torch.bfloat16)
        with torch.enable_grad():
            product = torch.mm(_ours, _ours)  # autocast casts its operand, and keeps the cast
            # No Python runs when torch frees the cast, because it holds the lock of its cache.
            _now = ref(product.grad_fn._saved_self, _regions.pop)  # type: ignore[union-attr]
        _regions[_now] = region
    finally:
        torch.set_autocast_enabled("cpu", enabled)
        torch.set_autocast_dtype("cpu", dtype)
    return region
