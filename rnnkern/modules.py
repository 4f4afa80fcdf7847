"""Drop-in modules: subclasses of torch.nn's, same constructor, parameters and state_dict."""

from __future__ import annotations

from typing import Any

from torch import nn

from rnnkern.cells import CELLS
from rnnkern.forward import cell, forward, method, without_torch
from rnnkern.interop import scripting

_EXTRA = """
    ``forward(input, hx=None, *, lengths=None, reset=None)`` has two arguments more than torch.nn's.

    Args:
        lengths: int64 ``(N,)``, any order, any device, ``0 <= lengths[n] <= T``: row n ends after
            that many steps. Outputs past the end are zero, and final states are those after the
            row's last step. Nothing is packed or sorted. Lengths on a GPU stay there, and a length
            out of range is an assertion of the device, as an index out of range is for torch.
        reset: bool ``(T, N)``, ``(N, T)`` with ``batch_first``: an episode begins at that step, and
            the state is zeroed before it. In the reverse direction nothing passes from the
            episode's first step to the step before it.

    Raises:
        TypeError, ValueError: ``lengths`` or ``reset`` has the wrong type, dtype, shape or range,
            or is given with a `PackedSequence`. For everything else, what ``torch.nn`` raises.

    float32, float64, bfloat16 and float16 on the CPU and on GPUs run on rnnkern's kernels, under
    ``torch.autocast`` too. ``torch.nn`` runs anything else, with one `FallbackWarning` that says
    why. 16-bit types are computed in float32, and rounded when they are stored.
"""


# Three classes without a common base class: `convert` changes the class of a module in
# place, which Python allows only between classes of the same layout.
class RNN(nn.RNN):
    __doc__ = f"""Elman RNN (tanh or relu): `torch.nn.RNN` on rnnkern's kernels.
{_EXTRA}
    Example::

        >>> rnn = rnnkern.RNN(3, 5, nonlinearity="relu")
        >>> output, h_n = rnn(torch.randn(10, 1, 3))
    """

    _torch_forward = nn.RNN.forward
    __prepare_scriptable__ = scripting.prepare
    forward = forward


class LSTM(nn.LSTM):
    __doc__ = f"""Long short-term memory, with projections: `torch.nn.LSTM` on rnnkern's kernels.
{_EXTRA}
    Example::

        >>> rnn = rnnkern.LSTM(3, 5)
        >>> output, (h_n, c_n) = rnn(torch.randn(10, 4, 3), lengths=torch.tensor([3, 10, 1, 7]))
    """

    _torch_forward = nn.LSTM.forward
    __prepare_scriptable__ = scripting.prepare
    forward = forward


class GRU(nn.GRU):
    __doc__ = f"""Gated recurrent unit: `torch.nn.GRU` on rnnkern's kernels.
{_EXTRA}
    Example::

        >>> rnn = rnnkern.GRU(3, 5, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(10, 4, 3))
    """

    _torch_forward = nn.GRU.forward
    __prepare_scriptable__ = scripting.prepare
    forward = forward


class OwnRNN(nn.RNNBase):
    """A layer of a cell that ``torch.nn`` does not have; options and parameters are torch's.

    A subclass is one such cell: ``super().__init__(mode, *sizes, **options)``.
    """

    _torch_forward = without_torch
    forward = forward

    def __init__(self, mode: str, *sizes: Any, **options: Any) -> None:
        super().__init__("RNN_TANH", *sizes, **options)  # a mode that torch knows, of one gate
        self.mode = mode
        for name, weight in self.named_parameters():
            if not name.startswith("weight_hr"):
                rows, *columns = weight.shape
                weight.data = weight.new_empty(CELLS[mode].gates * rows, *columns)
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing, because cuDNN has no such cell."""


class RNNCell(nn.RNNCell):
    """One step of an Elman RNN: `torch.nn.RNNCell` on rnnkern's kernels.

    Arguments, shapes and errors are torch's.
    """

    _torch_forward = nn.RNNCell.forward
    __prepare_scriptable__ = scripting.prepare

    forward = method(cell, "RNNCell")


class LSTMCell(nn.LSTMCell):
    """One step of an LSTM: `torch.nn.LSTMCell` on rnnkern's kernels.

    Arguments, shapes and errors are torch's.
    """

    _torch_forward = nn.LSTMCell.forward
    __prepare_scriptable__ = scripting.prepare

    forward = method(cell, "LSTMCell")


class GRUCell(nn.GRUCell):
    """One step of a GRU: `torch.nn.GRUCell` on rnnkern's kernels.

    Arguments, shapes and errors are torch's.
    """

    _torch_forward = nn.GRUCell.forward
    __prepare_scriptable__ = scripting.prepare

    forward = method(cell, "GRUCell")
