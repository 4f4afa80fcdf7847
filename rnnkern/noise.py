"""Random numbers of ``recurrent_dropout`` and ``zoneout``, from a counter: Philox 4x32-10.

``csrc/noise.h`` draws the same numbers, and says what a counter consists of. The generator is that
of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from rnnkern.layer import unflatten

_WORD = 0xFFFFFFFF


class Purpose(enum.IntEnum):
    """What a number is drawn for."""

    DROPOUT = 0
    HIDDEN = 1
    CELL = 2


def draw_seed() -> Tensor:
    """The seed of one call, from torch's default generator of the CPU: an int64 scalar."""
    return torch.randint(0, (1 << 63) - 1, (), dtype=torch.int64, device="cpu")


def philox(counter: Any, key: Any) -> tuple[Any, Any, Any, Any]:
    """Four random numbers of 32 bits for each counter.

    Args:
        counter: four words, int64 tensors that can be broadcast or numbers.
        key: two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        a0, a1 = _product(0xD2511F53, c0)
        b0, b1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = b1 ^ c1 ^ k0, b0, a1 ^ c3 ^ k1, a0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def _product(factor: int, word: Any) -> tuple[Any, Any]:
    """The lower and the upper word of a product; in 64 bits it may wrap around."""
    product = factor * word
    return product & _WORD, (product >> 32) & _WORD


def happens(
    probability: float,
    seed: Tensor,
    purpose: Purpose,
    *,
    layer: int,
    direction: int,
    t: int,
    rows: Tensor,
    units: int,
) -> Tensor:
    """Bool ``[rows, units]``: what happens with that probability, for rows of the batch."""
    groups = (units + 63) // 64
    places = torch.arange(16 * groups, device=rows.device)
    last = purpose | direction << 2 | layer << 3
    seed = seed.to(rows.device)
    drawn = philox((places, rows[:, None], t, last), (seed & _WORD, (seed >> 32) & _WORD))
    words = torch.stack([unflatten(word, -1, (groups, 16)) for word in drawn], -2)
    words = words.flatten(-3)[..., :units]
    return words < int(probability * 2**32)
