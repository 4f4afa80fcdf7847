"""Cells without gates."""

from __future__ import annotations

from typing import Any

from rnnkern.own_cells.cell import cell
from rnnkern.own_cells.expression import relu, tanh


@cell(gates=("a",))
def rnn_tanh(x: Any, h: Any, prev: Any) -> Any:
    """`torch.nn.RNN`: h(t) = tanh(W_ih x + b_ih + W_hh h + b_hh)."""
    return tanh(x.a + h.a)


@cell(gates=("a",))
def rnn_relu(x: Any, h: Any, prev: Any) -> Any:
    """`torch.nn.RNN` with ``nonlinearity="relu"``."""
    return relu(x.a + h.a)


@cell(gates=("a",), parameters=("u",))
def ind_rnn(x: Any, h: Any, prev: Any, own: Any) -> Any:
    """The independently recurrent network of Li et al., 2018: each unit sees its own h alone.

    There is no product with h, and so no ``weight_hh``.
    """
    return relu(x.a + own.u * prev.h)
