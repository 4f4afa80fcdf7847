"""What the right answer is with options: a loop over rows and steps with the published formulas.

Nothing here knows rnnkern. Random numbers are those of Philox 4x32-10, in Python's integers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear

States = tuple[Tensor, ...]
WORD = 0xFFFFFFFF


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> tuple[int, ...]:
    c, (k0, k1) = list(counter), key
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k0, b & WORD, (a >> 32) ^ c[3] ^ k1, a & WORD]
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return tuple(c)


class Noise(NamedTuple):
    """``draws``: zoneout draws; else states are expectations."""

    seed: int = 0
    dropout: float = 0.0
    zoneout: float = 0.0
    draws: bool = True

    def happens(
        self, p: float, purpose: int, place: tuple[int, int], t: int, n: int, units: int
    ) -> Tensor:
        """Which units it happens to, for a row of the batch in a (layer, direction)."""
        layer, direction = place
        key = self.seed & WORD, self.seed >> 32
        last = purpose | direction << 2 | layer << 3
        # Word k of counter b is the number of unit 16 k + b, of 64.
        places = [(u // 64 * 16 + u % 16, u % 64 // 16) for u in range(units)]
        words = [philox((place, n, t, last), key)[k] for place, k in places]
        return torch.tensor([word < int(p * 2**32) for word in words])


NO_NOISE = Noise()


def run(
    module: Any,
    x: Tensor,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to: Any = None,
    return_cells: bool = False,
    noise: Noise = NO_NOISE,
) -> Any:
    """``module(x, hx, ...)`` of a batch."""
    if module.batch_first:
        x, reset = x.transpose(0, 1), None if reset is None else reset.t()
    T, N, _ = x.shape
    D, P = 1 + module.bidirectional, module.proj_size or module.hidden_size
    shapes = [(D * module.num_layers, N, P), (D * module.num_layers, N, module.hidden_size)]
    shapes = shapes[: 2 if isinstance(module, nn.LSTM) else 1]
    starts, fresh = (
        [x.new_zeros(shape) for shape in shapes]
        if given is None
        else [given]
        if isinstance(given, Tensor)
        else list(given)
        for given in (hx, reset_to)
    )
    finals, cells = [], []
    for layer in range(module.num_layers):
        made = []
        for d in range(D):
            i = layer * D + d
            rows = [
                _row(
                    module,
                    x[:, n],
                    [z[i, n] for z in starts],
                    [z[i, n] for z in fresh],
                    (layer, d),
                    n,
                    T if lengths is None else int(lengths[n]),
                    [False] * T if reset is None else reset[:, n].tolist(),
                    noise,
                )
                for n in range(N)
            ]
            made.append([torch.stack(parts, 1) for parts in list(zip(*rows, strict=True))[:2]])
            finals.append([torch.stack([row[2][k] for row in rows]) for k in range(len(shapes))])
        x, cells = (torch.cat(parts, -1) for parts in zip(*made, strict=True))
    state = tuple(torch.stack(parts) for parts in zip(*finals, strict=True))
    if module.batch_first:
        x, cells = x.transpose(0, 1), cells.transpose(0, 1)
    results = x, state if len(state) == 2 else state[0]
    return (*results, cells) if return_cells else results


def _row(
    module: Any,
    x: Tensor,
    state: list[Tensor],
    fresh: list[Tensor],
    place: tuple[int, int],
    n: int,
    length: int,
    begins: list[bool],
    noise: Noise,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Outputs ``[T, P]``, last states of each step ``[T, H]``, and the state after the end."""
    layer, d = place
    normalises = bool(getattr(module, "_gain_names", False))
    suffix = f"_l{layer}" + ("_reverse" if d else "")
    w_ih, w_hh, b_ih, b_hh, w_hr = (
        getattr(module, name + suffix, None)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    )
    gain_ih, gain_hh, gain_c, bias_c = (
        getattr(module, name + suffix, None) for name in ("gain_ih", "gain_hh", "gain_c", "bias_c")
    )
    mask = torch.ones_like(state[0])
    if noise.dropout:
        hidden = noise.happens(noise.dropout, 0, place, 0, n, mask.numel())
        mask = (~hidden).to(mask.dtype) / (1 - noise.dropout)
    T = x.shape[0]
    outputs = [x.new_zeros(state[0].shape)] * T
    lasts = [x.new_zeros(state[-1].shape)] * T
    for t in reversed(range(length)) if d else range(length):
        first = t + 1 if d else t
        if first < length and begins[first]:
            state = fresh
        h = state[0] * mask
        if normalises:
            a = layer_norm(linear(x[t], w_ih), gain_ih.shape, gain_ih, b_ih)
            b = layer_norm(linear(h, w_hh), gain_hh.shape, gain_hh, b_hh)
        else:
            a, b = linear(x[t], w_ih, b_ih), linear(h, w_hh, b_hh)
        made = _cell(module.mode, a, b, state, gain_c, bias_c)
        if w_hr is not None:
            made[0] = linear(made[0], w_hr)
        for k, old in enumerate(state if noise.zoneout else []):
            kept = torch.full_like(old, noise.zoneout)
            if noise.draws:
                kept = noise.happens(noise.zoneout, 1 + k, place, t, n, old.numel()).to(old.dtype)
            made[k] = kept * old + (1 - kept) * made[k]
        state = made
        outputs[t], lasts[t] = state[0], state[-1]
    return torch.stack(outputs), torch.stack(lasts), state


def _cell(
    mode: str, a: Tensor, b: Tensor, state: list[Tensor], gain_c: Any, bias_c: Any
) -> list[Tensor]:
    if mode == "LSTM":
        i, f, g, o = (a + b).chunk(4)
        c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
        read = c if gain_c is None else layer_norm(c, gain_c.shape, gain_c, bias_c)
        return [torch.sigmoid(o) * torch.tanh(read), c]
    if mode == "GRU":
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3), b.chunk(3)
        r, z = torch.sigmoid(a_r + b_r), torch.sigmoid(a_z + b_z)
        n = torch.tanh(a_n + r * b_n)
        return [(1 - z) * n + z * state[0]]
    return [torch.tanh(a + b) if mode == "RNN_TANH" else torch.relu(a + b)]
