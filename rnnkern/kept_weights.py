"""What is made of weights under ``torch.autocast``, kept until its region ends.

torch casts a weight once for a region. A layer that cast its weights in each call, or a cell that
packed them at each step, would fall behind where they are large. So casts are kept. Packed weights
are kept from the second call in a region on, because the first may be the only one, and has packed
them into its scratch memory.

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

_WORTH = 1 << 17
"""So many numbers in the weights make it worth while."""

_FEW_ROWS = 256
"""With more rows in a call, packing is a small part of it."""


class _Kept(NamedTuple):
    weights: list[ref[Tensor]]
    states: list[tuple[Any, ...]]
    mode: Any
    """In which this was made."""
    made: Any
    """Casts; or packed weights, None after the first call."""


_casts: dict[int, _Kept] = {}
_packed: dict[int, _Kept] = {}
"""By the id of the first weight."""

_token: ref[Tensor] | None = None
"""torch's cast of our tensor, as long as this region lasts."""

_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def packed_in_region(kernel: kernels.Kernel, operands: Operands) -> kernels.Frozen | None:
    """The packed weights of a layer or cell that has been called in this region before; or None."""
    x, _, _, weights, _ = operands
    found = _found(_packed, weights, None)
    if (
        (found is None and not _may_keep(weights))
        or not torch.is_autocast_cache_enabled()
        or x.numel() > _FEW_ROWS * x.shape[-1]
        or not kernels.multiplies_as_bfloat16(kernel, x)
    ):
        return None
    if found is None:
        _keep(_packed, weights, None, None)
        return None
    if found.made is None:
        packed = kernels.Frozen(kernel, x.shape[-1], 1, "bfloat16", weights, ())
        found = _keep(_packed, weights, None, packed)
    return found.made  # type: ignore[no-any-return]


def cast_in_region(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in that dtype, kept for the region if they are large enough."""
    if not torch.is_autocast_cache_enabled() or kernels.mode_refusal() is not None:
        return [w.to(dtype) for w in weights]
    # A cast belongs to the mode in which it was made: with a graph or without.
    mode = dtype, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    found = _found(_casts, weights, mode)
    if found is not None:
        return found.made  # type: ignore[no-any-return]
    casts = [w.to(dtype) for w in weights]
    if _may_keep(weights):
        _keep(_casts, weights, mode, casts)
    return casts


def _may_keep(weights: Sequence[Tensor]) -> bool:
    return (
        sum(w.numel() for w in weights) >= _WORTH
        and not kernels.IS_STAND_IN
        and _saved_tensor_hooks(True) is None  # it would be given a tensor of ours
        and all(
            type(w) in (Tensor, nn.Parameter)
            and w.is_cpu
            and w.is_leaf
            and not w.is_inference()  # nothing tells that such a tensor has changed
            for w in weights
        )
    )


def _states(weights: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """They are not the same if a weight has changed."""
    return [(w._version, w.data_ptr(), w.requires_grad) for w in weights]


def _found(where: dict[int, _Kept], weights: Sequence[Tensor], mode: Any) -> _Kept | None:
    found = where.get(id(weights[0]))
    if found is None or not _goes_on() or found.mode != mode or len(found.weights) != len(weights):
        return None
    for each, weight in zip(found.weights, weights, strict=True):
        if each() is not weight:
            return None
    return found if found.states == _states(weights) else None


def _keep(where: dict[int, _Kept], weights: Sequence[Tensor], mode: Any, made: Any) -> _Kept:
    if not _goes_on():
        _begin()
    key = id(weights[0])
    refs = [ref(weights[0], lambda _: where.pop(key, None)), *map(ref, weights[1:])]
    kept = where[key] = _Kept(refs, _states(weights), mode, made)
    if not _goes_on():  # another thread has ended its region
        _forget()
    return kept


def _goes_on() -> bool:
    return _token is not None and _token() is not None


def _begin() -> None:
    global _token
    _forget()
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", torch.bfloat16):
        ours = torch.zeros(1, 1, dtype=torch.float32, device="cpu", requires_grad=True)
        product = torch.mm(ours, ours)  # autocast casts its operand, and keeps the cast
        _token = ref(product.grad_fn._saved_self, _forget)  # type: ignore[union-attr]


def _forget(_: Any = None) -> None:
    """Called when torch frees its casts."""
    _casts.clear()
    _packed.clear()
