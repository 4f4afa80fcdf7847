"""What a layer with int8 weights computes, in plain PyTorch: a second opinion on `rnnkern.freeze`.

Each step starts from the state that the layer in question has made, because a number
between two integers would otherwise be rounded to one here and to the other there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rnnkern.call import mode_of
from rnnkern.known_cells import CELLS


def integers_of_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers from -127 to 127 and the scale of each row, both in float64."""
    most = rows.abs().max(-1, keepdim=True).values
    # The kernels multiply by this reciprocal, in float32, and round the product once.
    reciprocal = torch.where(most > 0, 127 / most, 0)
    return (rows.double() * reciprocal.double()).round(), (most / 127).double()


def integers_of_weights(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a matrix of float32, whose quotient is rounded as a quotient."""
    scale = weight.abs().max(-1, keepdim=True).values / 127
    quotient = torch.where(scale > 0, weight / scale, 0)
    return quotient.round().double(), scale.double()


def product(rows: Tensor, weight: Tensor) -> Tensor:
    q, scale = integers_of_rows(rows)
    q_weight, scale_weight = integers_of_weights(weight.detach())
    return (q @ q_weight.T) * scale * scale_weight.T


def step(
    module: nn.Module, suffix: str, x: Tensor, state: tuple[Tensor, ...], dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The state after one step from that input and state, of float32, computed in ``dtype``."""

    def bias(name: str) -> Tensor:
        found = getattr(module, f"{name}{suffix}", None)
        return torch.zeros((), dtype=dtype) if found is None else found.detach().to(dtype)

    a = product(x, getattr(module, f"weight_ih{suffix}")).to(dtype) + bias("bias_ih")
    b = product(state[0], getattr(module, f"weight_hh{suffix}")).to(dtype) + bias("bias_hh")
    h, *c = CELLS[mode_of(module)].step(a, b, tuple(s.to(dtype) for s in state))
    if getattr(module, "proj_size", 0):
        h = product(h.float(), getattr(module, f"weight_hr{suffix}")).to(dtype)
    return h, *c


def worst(module: nn.RNNBase, frozen: nn.Module, T: int, N: int) -> list[tuple[Tensor, ...]]:
    """Of each step of a layer in one direction: ours, this reference in float32 and in float64."""
    x = torch.randn(T, N, module.input_size)
    widths = [module.proj_size or module.hidden_size, module.hidden_size]
    states = 1 + CELLS[mode_of(module)].has_cell_state
    state = tuple(torch.randn(1, N, width) / 2 for width in widths[:states])
    found = []
    with torch.no_grad():
        for t in range(T):
            before = tuple(s[0] for s in state)
            _, after = frozen(x[t : t + 1], state if states > 1 else state[0])
            state = after if states > 1 else (after,)
            wanted = [
                step(module, "_l0", x[t], before, dtype) for dtype in (torch.float32, torch.float64)
            ]
            found += list(zip((s[0] for s in state), *wanted, strict=True))
    return found
