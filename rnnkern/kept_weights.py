"""The packed weights of cells, kept for a region of ``torch.autocast``.

torch casts a weight once for a region. A cell that packed its weights again at each step would fall
behind where they are large. So the first call in a region packs for itself alone, because it may be
the only one, and the second one packs for all calls that follow.

torch does not say when a region ends. But then it frees the casts that it has kept, and one of them
is the cast of a tensor of ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import ref

import torch
from torch import Tensor

from rnnkern import kernels
from rnnkern.layer import Operands

_saved_tensor_hooks = torch._C._autograd._top_saved_tensors_default_hooks

_WORTH = 1 << 17
"""So many numbers in the weights make it worth while."""


class _Kept(NamedTuple):
    """A cell that was called in this region. Its weights are packed if ``frozen`` is not None."""

    weights: list[ref[Tensor]]
    states: list[tuple[int, int]]
    frozen: kernels.Frozen | None


_kept: dict[int, _Kept] = {}
"""By the id of ``weight_ih``."""

_cast: ref[Tensor] | None = None
"""torch's cast of our tensor, as long as this region lasts."""


def packed_in_region(kernel: kernels.Kernel, operands: Operands) -> kernels.Frozen | None:
    """The packed weights of a cell that has been called in this region before; or None."""
    x, _, _, weights, _ = operands
    if (
        sum(w.numel() for w in weights) < _WORTH
        or kernels.IS_STAND_IN
        or not torch.is_autocast_cache_enabled()
        or _saved_tensor_hooks(True) is not None  # it would be given a tensor of ours
        or any(w.is_inference() for w in weights)  # nothing tells that such a tensor has changed
        or not kernels.multiplies_as_bfloat16(kernel, x)
    ):
        return None
    states = [(w._version, w.data_ptr()) for w in weights]
    if not _goes_on():
        _begin()
    found = _kept.get(id(weights[0]))
    if found is None or found.states != states or not _are(found.weights, weights):
        _remember(weights, states, None)
        return None
    if found.frozen is not None:
        return found.frozen
    frozen = kernels.Frozen(kernel, x.shape[-1], 1, "bfloat16", weights, ())
    _remember(weights, states, frozen)
    return frozen


def _are(refs: list[ref[Tensor]], weights: Sequence[Tensor]) -> bool:
    return len(refs) == len(weights) and all(
        each() is weight for each, weight in zip(refs, weights, strict=True)
    )


def _remember(
    weights: Sequence[Tensor], states: list[tuple[int, int]], frozen: kernels.Frozen | None
) -> None:
    key = id(weights[0])
    refs = [ref(weights[0], lambda _: _kept.pop(key, None)), *map(ref, weights[1:])]
    _kept[key] = _Kept(refs, states, frozen)
    if not _goes_on():  # another thread has ended its region
        _kept.clear()


def _goes_on() -> bool:
    return _cast is not None and _cast() is not None


def _begin() -> None:
    global _cast
    with torch.inference_mode(False), torch.enable_grad():
        ours = torch.zeros(1, 1, dtype=torch.float32, device="cpu", requires_grad=True)
        product = torch.mm(ours, ours)  # autocast casts its operand, and keeps the cast
    _cast = ref(product.grad_fn._saved_self, _forget)  # type: ignore[union-attr]


def _forget(_: ref[Tensor]) -> None:
    """Called when torch frees the cast."""
    _kept.clear()
