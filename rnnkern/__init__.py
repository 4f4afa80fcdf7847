"""RNN, LSTM and GRU for PyTorch on hand-written kernels: a drop-in for ``torch.nn``.

>>> import torch, rnnkern
>>> lstm = rnnkern.LSTM(input_size=3, hidden_size=3)
>>> output, (h_n, c_n) = lstm(torch.randn(10, 1, 3))
"""

import torch  # noqa: F401  first: its OpenMP runtime is the one that the kernels share

from rnnkern import inspect, onnx, plot
from rnnkern.aten import decompositions
from rnnkern.build import build_info, explain
from rnnkern.by_type import be_found_by_type
from rnnkern.checkpoint import checkpointed
from rnnkern.closed_loop import generate
from rnnkern.convert import convert, revert
from rnnkern.dynamo import open_to_rnnkern
from rnnkern.exporting import exporting_kernels
from rnnkern.functional import FallbackWarning
from rnnkern.modules import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

open_to_rnnkern()
be_found_by_type()

__version__ = str(build_info()["version"])

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
