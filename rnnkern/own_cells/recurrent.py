"""The module that runs a cell that a user has written."""

from __future__ import annotations

from typing import Any

from torch import nn

from rnnkern import constructor
from rnnkern.known_cells import CELLS
from rnnkern.modules import EXTRA, INITIALISED, NOISE, OwnRNN
from rnnkern.own_cells import build
from rnnkern.own_cells.cell import OwnCell


class Recurrent(OwnRNN):
    __doc__ = f"""A recurrent layer, or a stack of them, of a cell of your own (`rnnkern.cell`).

    Arguments after the cell, parameters and their names, initialisation, inputs and outputs are
    those of ``torch.nn.RNN``, and of ``torch.nn.LSTM`` if the cell has two states. Weights have the
    rows of the gates in the order of ``gates=``. So a module of an LSTM with the gates i, f, g, o
    loads the ``state_dict`` of a ``torch.nn.LSTM``. A parameter p of the cell is ``p_l0``,
    ``p_l0_reverse`` and so on, of shape ``(hidden_size,)``.
{INITIALISED}{NOISE}{EXTRA}
    The first call with a new cell and dtype compiles it, which takes some seconds. Later calls,
    also in other processes, load it from the cache. Without a C++ compiler the cell itself runs,
    in plain PyTorch, and a `FallbackWarning` says so.

    Args:
        cell: what `rnnkern.cell` has made of a function.
        proj_size: only for a cell that does not read ``prev.h``.
        forget_bias: the initial bias of the gate that is named f, as of `rnnkern.LSTM`. What the
            gate does is the cell's matter: if it is large in an MGU, the state is replaced.

    Raises:
        TypeError: ``cell`` is no such cell.
        ValueError: ``forget_bias`` is given and the cell has no gate f.

    Example::

        >>> layer = rnnkern.Recurrent(rnnkern.cells.mgu, 3, 5, bidirectional=True)
        >>> output, h_n = layer(torch.randn(10, 4, 3), lengths=torch.tensor([3, 10, 1, 7]))
    """

    orthogonal = False

    def __init__(
        self,
        cell: OwnCell,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: Any = None,
        *,
        layer_norm: bool = False,
        recurrent_dropout: float | None = None,
        zoneout: float | None = None,
        orthogonal: bool = False,
        forget_bias: float | None = None,
    ) -> None:
        if not isinstance(cell, OwnCell):
            raise TypeError(
                "cell must be a function with the decorator rnnkern.cell, "
                f"got {type(cell).__name__}"
            )
        super().__init__(
            cell.mode,
            input_size,
            hidden_size,
            num_layers=num_layers,
            bias=bias,
            batch_first=batch_first,
            dropout=dropout,
            bidirectional=bidirectional,
            proj_size=proj_size,
            device=device,
            dtype=dtype,
        )
        build.look_ahead(cell.mode)
        self.cell = cell
        if cell.parameters or not CELLS[cell.mode].recurrent:
            self._change_weights()
        constructor.settle(
            self,
            layer_norm=layer_norm,
            recurrent_dropout=recurrent_dropout,
            zoneout=zoneout,
            orthogonal=orthogonal,
            forget_bias=forget_bias,
        )

    reset_parameters = constructor.reset_parameters
    _instead_of_script = (
        "torch.export.export writes its steps in torch's operators, and torch.compile runs its "
        "kernels"
    )

    def _change_weights(self) -> None:
        """Adds the cell's own parameters behind the weights of each direction, and takes those away
        that it does not use.
        """
        names: list[str] = []
        for own in self._all_weights:
            suffix = own[0].removeprefix("weight_ih")
            if not CELLS[self.mode].recurrent:
                for name in [name for name in own if "_hh_l" in name]:
                    delattr(self, name)
                    own.remove(name)
            for parameter in self.cell.parameters:
                name = parameter + suffix
                like = getattr(self, own[0])
                setattr(self, name, nn.Parameter(like.new_empty(self.hidden_size)))
                own.append(name)
            names += own
        self._flat_weights_names = names
        self._init_flat_weights()
        self.reset_parameters()

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.mode = self.cell.mode  # in this process the cell is known from now on
        build.look_ahead(self.mode)

    def extra_repr(self) -> str:
        return f"{self.cell.name}, {constructor.extra_repr(self)}"
