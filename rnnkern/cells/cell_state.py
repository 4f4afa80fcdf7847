"""Cells with a cell state c beside h."""

from __future__ import annotations

from typing import Any

from rnnkern.own_cells.cell import cell
from rnnkern.own_cells.expression import exp, maximum, sigmoid, tanh


@cell(gates=("i", "f", "g", "o"), states=("h", "c"))
def lstm(x: Any, h: Any, prev: Any) -> Any:
    """`torch.nn.LSTM`: c(t) = f c(t-1) + i g, h(t) = o tanh(c(t))."""
    i, f = sigmoid(x.i + h.i), sigmoid(x.f + h.f)
    g, o = tanh(x.g + h.g), sigmoid(x.o + h.o)
    c = f * prev.c + i * g
    return o * tanh(c), c


@cell(gates=("i", "f", "g", "o"), states=("h", "c"), parameters=("p_i", "p_f", "p_o"))
def peephole_lstm(x: Any, h: Any, prev: Any, own: Any) -> Any:
    """An LSTM whose gates see the cell state of their unit: Gers and Schmidhuber, 2000.

    The input and forget gates see c(t-1), the output gate sees c(t).
    """
    i = sigmoid(x.i + h.i + own.p_i * prev.c)
    f = sigmoid(x.f + h.f + own.p_f * prev.c)
    c = f * prev.c + i * tanh(x.g + h.g)
    o = sigmoid(x.o + h.o + own.p_o * c)
    return o * tanh(c), c


@cell(gates=("f", "g", "o"), states=("h", "c"))
def coupled_lstm(x: Any, h: Any, prev: Any) -> Any:
    """An LSTM that writes as much as it forgets, i = 1 - f: Greff et al., 2015."""
    f, g, o = sigmoid(x.f + h.f), tanh(x.g + h.g), sigmoid(x.o + h.o)
    c = f * (prev.c - g) + g
    return o * tanh(c), c


@cell(gates=("i", "f", "z", "o"), states=("h", "c", "n", "m"))
def s_lstm(x: Any, h: Any, prev: Any) -> Any:
    """The sLSTM of Beck et al., 2024: exponential gates i and f, and c divided by a normaliser n.

    m is the logarithm by which c and n are scaled, so that nothing overflows. They take all units
    together as one head.
    """
    i, f = x.i + h.i, x.f + h.f
    m = maximum(f + prev.m, i)
    written, kept = exp(i - m), exp(f + prev.m - m)
    c = kept * prev.c + written * tanh(x.z + h.z)
    n = kept * prev.n + written
    return sigmoid(x.o + h.o) * c / n, c, n, m
