"""Cells for `rnnkern.Recurrent`, each a Python function that says its equations.

    layer = rnnkern.Recurrent(rnnkern.cells.peephole_lstm, input_size=80, hidden_size=256)

They are compiled when they are first called. Copy one to make a cell of your own.
"""

from rnnkern.cells.cell_state import coupled_lstm, lstm, peephole_lstm, s_lstm
from rnnkern.cells.gated import gru, li_gru, mgu
from rnnkern.cells.simple import ind_rnn, rnn_relu, rnn_tanh

__all__ = [
    "coupled_lstm",
    "gru",
    "ind_rnn",
    "li_gru",
    "lstm",
    "mgu",
    "peephole_lstm",
    "rnn_relu",
    "rnn_tanh",
    "s_lstm",
]
