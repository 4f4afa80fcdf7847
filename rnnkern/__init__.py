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
    from rnnkern import inspect, onnx, plot
    from rnnkern.build import __version__, build_info
    from rnnkern.checkpoint import checkpointed
    from rnnkern.closed_loop import generate
    from rnnkern.explanation import explain
    from rnnkern.interop.aten import decompositions

open_to_rnnkern()
be_found_by_type()

_MADE_IN = {
    "__version__": "build",
    "build_info": "build",
    "checkpointed": "checkpoint",
    "decompositions": "interop.aten",
    "explain": "explanation",
    "generate": "closed_loop",
}
"""The modules of the other public names. A program that only runs layers needs none of them."""
_MODULES = ("inspect", "onnx", "plot")


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
    "FallbackWarning",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "build_info",
    "checkpointed",
    "convert",
    "decompositions",
    "explain",
    "exporting_kernels",
    "generate",
    "inspect",
    "onnx",
    "plot",
    "revert",
]
