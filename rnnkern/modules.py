"""Drop-in modules: subclasses of torch.nn's with the same constructor, parameters, state_dict."""

from __future__ import annotations

from typing import Any

from torch import nn

from rnnkern import constructor
from rnnkern.forward import cell, forward, method, without_torch
from rnnkern.interop import scripting
from rnnkern.known_cells import CELLS, name_of

INITIALISED = """
    The constructor has these arguments besides torch.nn's, by keyword.

    Args:
        layer_norm: the sums of ``weight_ih`` x and of ``weight_hh`` h are normalised before biases
            are added, each over all its rows, with the gains ``gain_ih`` and ``gain_hh`` of the
            shape of a bias; in an LSTM also c before the output's tanh, with ``gain_c`` and
            ``bias_c`` of shape ``(hidden_size,)`` (Ba et al., 2016, equations 20 to 22). Gains are
            initialised to 1, ``bias_c`` to 0. ``eps`` is 1e-5. Default: False.
        orthogonal: the block of rows of each gate in ``weight_hh`` is initialised to an orthogonal
            matrix. Default: False, torch.nn's uniform numbers.
"""
_FORGET_BIAS = """\
        forget_bias: the initial bias of the forget gate. ``bias_ih`` of the gate is set to it and
            ``bias_hh`` to 0, so that it is their sum. Default: None, torch.nn's uniform numbers.
"""
NOISE = """\
        recurrent_dropout: probability of a unit of h(t-1) to be hidden from the recurrent product
            while the module trains. One mask for all steps of a row, the same for all gates, scaled
            by ``1 / (1 - recurrent_dropout)`` (Gal and Ghahramani, 2016). What reaches h(t) without
            that product, as in a GRU, is not masked. Default: None, no such dropout.
        zoneout: probability of a unit to keep its state, h and c apart, in a step (Krueger et al.,
            2017). In eval mode each state is the expectation of that. Default: None, no zoneout.
            A layer that was given one of the two has it as an attribute, which may be changed. Of
            another layer, an attribute of such a name has no effect.

    Random numbers are those of a counter and a seed, which each call draws from torch's default
    generator of the CPU. They are the same for any number of threads.
"""
EXTRA = """
    ``forward(input, hx=None, *, lengths=None, reset=None, reset_to=None, return_cells=False)`` has
    four arguments more than torch.nn's.

    Args:
        lengths: int64 ``(N,)``, or ``()`` for an input without a batch; any order, any device,
            ``0 <= lengths[n] <= T``. Row n ends after that many steps, and the reverse direction
            begins there. What ``input`` holds past the end does not matter, and its gradient there
            is zero. Outputs past the end are zero. Final states are those after the last step that
            a direction takes, or the initial ones if the length is 0. The data is neither packed
            nor sorted. If input and lengths are on a GPU, a length out of range is an assertion of
            the device, as an index out of range is for torch. Default: None, T steps in every row.
        reset: bool ``(T, N)``, ``(N, T)`` with ``batch_first``, ``(T,)`` for an input without a
            batch; any device. An episode begins at that step, and the state is zeroed before it. At
            step 0 it takes the place of ``hx``. In the reverse direction nothing passes from the
            episode's first step to the step before it, and ``hx`` enters at the row's last step.
            Final states are those of the last episode, in the reverse direction those of the
            first. A flag past the end of a row has no effect. Default: None, no episode begins.
        reset_to: the state with which an episode begins instead of zeros, of the shape, dtype and
            device that ``hx`` must have. It may require a gradient. In the reverse direction it
            enters an episode at its last step. Default: None, zeros.
        return_cells: an LSTM returns ``(output, state, cells)``: ``cells`` are the cell states of
            all steps of the last layer, ``(T, N, D * H)``, laid out as the output is.

    Raises:
        TypeError, ValueError: an option of the constructor has the wrong type, or is out of range.
        TypeError, ValueError: ``lengths``, ``reset`` or ``reset_to`` has the wrong type, dtype,
            shape or range, ``reset_to`` is on another device than the input, or one of them is
            given with a `PackedSequence`; ``reset_to`` without ``reset``; ``return_cells`` of a
            layer without cell states. For everything else, what ``torch.nn`` raises.

    float32, float64, bfloat16 and float16 on the CPU and on GPUs run on rnnkern's kernels, under
    ``torch.autocast`` too. ``torch.nn`` runs anything else, with one `FallbackWarning` that says
    why. 16-bit types are computed in float32, and rounded when they are stored.
"""

_RAISES_OF_CELL = """
    Raises:
        TypeError: ``layer_norm`` or ``orthogonal`` is not a bool, or ``forget_bias`` not a number.
        ValueError: ``forget_bias`` is not finite, or does not go with ``bias=False``; or
            ``layer_norm`` does not go with an unknown ``nonlinearity``.
        TypeError, ValueError, RuntimeError, AttributeError: a call does not fit. The error is that
            of ``torch.nn``.
"""


# Three classes without a common base class: `convert` changes the class of a module in
# place, which Python allows only between classes of the same layout.
class RNN(nn.RNN):
    __doc__ = f"""Elman RNN (tanh or relu): `torch.nn.RNN` on rnnkern's kernels.
{INITIALISED}{NOISE}{EXTRA}
    Example::

        >>> rnn = rnnkern.RNN(3, 5, nonlinearity="relu")
        >>> output, h_n = rnn(torch.randn(10, 1, 3))
    """

    _gain_names = constructor.NOT_NORMALISED

    __init__ = constructor.layer
    _torch_forward = nn.RNN.forward
    __prepare_scriptable__ = scripting.prepare
    reset_parameters = constructor.reset_parameters
    extra_repr = constructor.extra_repr
    forward = forward


class LSTM(nn.LSTM):
    __doc__ = f"""Long short-term memory, with projections: `torch.nn.LSTM` on rnnkern's kernels.
{INITIALISED}{_FORGET_BIAS}{NOISE}{EXTRA}
    Example::

        >>> rnn = rnnkern.LSTM(3, 5)
        >>> output, (h_n, c_n) = rnn(torch.randn(10, 4, 3), lengths=torch.tensor([3, 10, 1, 7]))
    """

    _gain_names = constructor.NOT_NORMALISED

    def __init__(
        self,
        *args: Any,
        layer_norm: bool = False,
        recurrent_dropout: float | None = None,
        zoneout: float | None = None,
        orthogonal: bool = False,
        forget_bias: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        constructor.settle(
            self,
            layer_norm=layer_norm,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            orthogonal=orthogonal,
            forget_bias=forget_bias,
        )

    _torch_forward = nn.LSTM.forward
    __prepare_scriptable__ = scripting.prepare
    reset_parameters = constructor.reset_parameters
    extra_repr = constructor.extra_repr
    forward = forward


class GRU(nn.GRU):
    __doc__ = f"""Gated recurrent unit: `torch.nn.GRU` on rnnkern's kernels.
{INITIALISED}{NOISE}{EXTRA}
    Example::

        >>> rnn = rnnkern.GRU(3, 5, bidirectional=True)
        >>> output, h_n = rnn(torch.randn(10, 4, 3))
    """

    _gain_names = constructor.NOT_NORMALISED

    __init__ = constructor.layer
    _torch_forward = nn.GRU.forward
    __prepare_scriptable__ = scripting.prepare
    reset_parameters = constructor.reset_parameters
    extra_repr = constructor.extra_repr
    forward = forward


class OwnRNN(nn.RNNBase):
    """A layer of a cell that ``torch.nn`` does not have, with the options and parameters of torch.

    A subclass is one such cell: ``super().__init__(mode, *sizes, **options)``.

    Raises:
        ValueError: ``proj_size`` is given, and the cell cannot have a projection, because it saves
            no slots or reads h.
    """

    _gain_names = constructor.NOT_NORMALISED

    _torch_forward = without_torch
    forward = forward
    __prepare_scriptable__ = scripting.refuse
    _instead_of_script = (
        "torch.compile runs its kernels, and torch.export.export takes it inside "
        "rnnkern.exporting_kernels()"
    )

    def __init__(self, mode: str, *sizes: Any, **options: Any) -> None:
        super().__init__("RNN_TANH", *sizes, **options)  # a mode that torch knows, of one gate
        self.mode = mode
        if self.proj_size and not CELLS[mode].may_be_projected:
            raise ValueError(
                f"proj_size needs a cell that saves its slots and does not read h, got "
                f"{name_of(mode)} and proj_size={self.proj_size}"
            )
        for name, weight in self.named_parameters():
            if not name.startswith("weight_hr"):
                rows, *columns = weight.shape
                weight.data = weight.new_empty(CELLS[mode].gates * rows, *columns)
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        """Nothing, because cuDNN has no such cell."""


class RNNCell(nn.RNNCell):
    __doc__ = f"""One step of an Elman RNN: `torch.nn.RNNCell` on rnnkern's kernels.

    Shapes are torch's.
{INITIALISED}{_RAISES_OF_CELL}    """

    _gain_names = constructor.NOT_NORMALISED

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        orthogonal: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, nonlinearity, device, dtype)
        constructor.settle(self, layer_norm=layer_norm, orthogonal=orthogonal)

    _torch_forward = nn.RNNCell.forward
    __prepare_scriptable__ = scripting.prepare
    reset_parameters = constructor.reset_parameters
    extra_repr = constructor.extra_repr

    forward = method(cell, "RNNCell")


class LSTMCell(nn.LSTMCell):
    __doc__ = f"""One step of an LSTM: `torch.nn.LSTMCell` on rnnkern's kernels.

    Shapes are torch's.
{INITIALISED}{_FORGET_BIAS}{_RAISES_OF_CELL}    """

    _gain_names = constructor.NOT_NORMALISED

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        orthogonal: bool = False,
        forget_bias: float | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        constructor.settle(
            self, layer_norm=layer_norm, orthogonal=orthogonal, forget_bias=forget_bias
        )

    _torch_forward = nn.LSTMCell.forward
    __prepare_scriptable__ = scripting.prepare
    reset_parameters = constructor.reset_parameters
    extra_repr = constructor.extra_repr

    forward = method(cell, "LSTMCell")


class GRUCell(nn.GRUCell):
    __doc__ = f"""One step of a GRU: `torch.nn.GRUCell` on rnnkern's kernels.

    Shapes are torch's.
{INITIALISED}{_RAISES_OF_CELL}    """

    _gain_names = constructor.NOT_NORMALISED

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        orthogonal: bool = False,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        constructor.settle(self, layer_norm=layer_norm, orthogonal=orthogonal)

    _torch_forward = nn.GRUCell.forward
    __prepare_scriptable__ = scripting.prepare
    reset_parameters = constructor.reset_parameters
    extra_repr = constructor.extra_repr

    forward = method(cell, "GRUCell")
