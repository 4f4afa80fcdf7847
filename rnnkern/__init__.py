"""RNN, LSTM and GRU for PyTorch on hand-written kernels: a drop-in for ``torch.nn``.

>>> import torch, rnnkern
>>> lstm = rnnkern.LSTM(input_size=3, hidden_size=3)
>>> output, (h_n, c_n) = lstm(torch.randn(10, 1, 3))
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch  # noqa: F401  first: its OpenMP runtime is the one that the kernels share

from rnnkern.convert import convert, revert
from rnnkern.forward import FallbackWarning
from rnnkern.interop.by_type import be_found_by_type
from rnnkern.interop.dynamo import open_to_rnnkern
from rnnkern.interop.exporting import exporting_kernels
from rnnkern.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

if TYPE_CHECKING:
    from rnnkern import cells, inspect, onnx, plot
    from rnnkern.build import __version__, build_info
    from rnnkern.checkpoint import checkpointed
    from rnnkern.closed_loop import generate
    from rnnkern.explanation import explain
    from rnnkern.frozen import freeze, thaw
    from rnnkern.interop.aten import decompositions
    from rnnkern.own_cells.cell import cell, precompile
    from rnnkern.own_cells.expression import CellError
    from rnnkern.own_cells.recurrent import Recurrent

open_to_rnnkern()
be_found_by_type()

_OF_CELLS = (
    *("exp", "hard_sigmoid", "log", "maximum", "minimum", "relu"),
    *("rsqrt", "sigmoid", "softplus", "tanh", "where"),
)
"""What a cell of one's own may call (`rnnkern.cell`)."""

_MADE_IN = {
    "CellError": "own_cells.expression",
    "Recurrent": "own_cells.recurrent",
    "__version__": "build",
    "build_info": "build",
    "cell": "own_cells.cell",
    "checkpointed": "checkpoint",
    "decompositions": "interop.aten",
    "explain": "explanation",
    "freeze": "frozen",
    "generate": "closed_loop",
    "thaw": "frozen",
    "precompile": "own_cells.cell",
    **dict.fromkeys(_OF_CELLS, "own_cells.expression"),
}
"""The modules of the other public names. A program that only runs layers needs none of them."""
_MODULES = ("cells", "inspect", "onnx", "plot")


def __getattr__(name: str) -> Any:
    """Imports a public name when it is asked for."""
    if name in _MODULES:
        return import_module(f"rnnkern.{name}")
    if name not in _MADE_IN:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f"rnnkern.{_MADE_IN[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CellError",
    "FallbackWarning",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrent",
    "__version__",
    "build_info",
    "cell",
    "cells",
    "checkpointed",
    "convert",
    "decompositions",
    "explain",
    "exporting_kernels",
    "freeze",
    "generate",
    "inspect",
    "onnx",
    "plot",
    "precompile",
    "revert",
    "thaw",
    *_OF_CELLS,
]
