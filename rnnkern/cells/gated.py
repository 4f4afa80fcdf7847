"""Gated cells whose only state is h."""

from __future__ import annotations

from typing import Any

from rnnkern.own_cells.cell import cell
from rnnkern.own_cells.expression import relu, sigmoid, tanh


@cell(gates=("r", "z", "n"))
def gru(x: Any, h: Any, prev: Any) -> Any:
    """`torch.nn.GRU`: the reset gate r scales W_hn h + b_hn, after the product."""
    r, z = sigmoid(x.r + h.r), sigmoid(x.z + h.z)
    n = tanh(x.n + r * h.n)
    return z * (prev.h - n) + n


@cell(gates=("f", "g"))
def mgu(x: Any, h: Any, prev: Any) -> Any:
    """The minimal gated unit of Zhou et al., 2016, with the gate f after the product.

    They scale h before the product with W_hg, as the first GRU does. That is another cell.
    """
    f = sigmoid(x.f + h.f)
    return (1 - f) * prev.h + f * tanh(x.g + f * h.g)


@cell(gates=("z", "n"))
def li_gru(x: Any, h: Any, prev: Any) -> Any:
    """The light GRU of Ravanelli et al., 2018: no reset gate, and relu in place of tanh.

    They normalise W_ih x over the batch. `torch.nn.BatchNorm1d` does so before the layer.
    """
    z, n = sigmoid(x.z + h.z), relu(x.n + h.n)
    return z * prev.h + (1 - z) * n
