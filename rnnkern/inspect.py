"""What goes on inside a layer: its gates and states at every step, and how far gradients reach.

All of it is what the kernels keep for backward anyway. Nothing is recomputed step by step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import autocast, derivatives, kernels, ops
from rnnkern.call import expect_layer, read
from rnnkern.kernels import Refusal
from rnnkern.known_cells import CELLS, is_own
from rnnkern.layer import Gradients, Recorded, pieces, unflatten
from rnnkern.options import expect_none
from rnnkern.run import dropout
from rnnkern.sequence import is_packed


class DirectionTrace(NamedTuple):
    """One layer in one direction. Every tensor is ``[T, N, H]``, laid out as the layer's output is
    (batch first, packed); past the end of a sequence it is 0.

    Attributes:
        gates: by name, after their activation: ``i, f, g, o`` of an LSTM, ``r, z, n`` of a GRU;
            none of an RNN, whose one gate is ``h``, and none of a cell of your own.
        h: hidden states, ``[T, N, P]`` if they are projected.
        c: cell states of an LSTM, else None. Those of a cell of your own pass no gradients.
    """

    gates: dict[str, Tensor]
    h: Tensor
    c: Tensor | None


class Trace(NamedTuple):
    """What `trace` finds.

    Attributes:
        output, state: what the module itself returns.
        layers: ``layers[layer][direction]``.
    """

    output: Any
    state: Any
    layers: list[list[DirectionTrace]]


class Flow(NamedTuple):
    """What `gradient_flow` finds: norms over the units, ``[layers * directions, T, N]`` for every
    layout of the input.

    Attributes:
        h: of the gradients of hidden states.
        c: of those of cell states, of an LSTM; else None.
    """

    h: Tensor
    c: Tensor | None


def trace(
    module: nn.RNNBase,
    input: Any,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Trace:
    """Every gate, cell state and hidden state of one call, differentiable if something requires it.

    Args:
        module: an RNN, LSTM or GRU of rnnkern or of ``torch.nn``.
        input, hx, lengths, reset: as the module takes them; ``input`` ``[T, N, I]`` (``[N, T, I]``
            batch first) or a `PackedSequence`.

    Raises:
        TypeError, ValueError: not such a module, or operands that it does not take.

    Example::

        >>> seen = rnnkern.inspect.trace(lstm, x)
        >>> seen.layers[0][0].gates["f"].mean()
    """
    run = _Run(module, input, hx, lengths, reset)
    directions = range(run.layer.directions)
    layers = [[_of_direction(run, recorded, d) for d in directions] for recorded, _ in run]
    return Trace(*run.results(), layers)


def gradient_flow(
    module: nn.RNNBase,
    input: Any,
    hx: Any = None,
    *,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Flow:
    """How strongly the last state of each layer and direction depends on each earlier one.

    The norms of the gradients of ``h_n.sum()`` with respect to the layer's own states at every
    step, from one backward pass a layer. For a direction that runs backwards the last state is that
    at the first step.

    Args, Raises: those of `trace`.
    """
    run = _Run(module, input, hx, lengths, reset)
    of_h: list[Tensor] = []
    of_c: list[Tensor] = []
    for recorded, hn in run:
        incoming = Gradients(None, torch.ones_like(hn), None)
        at = recorded.operands
        wanted = [False] * (1 + len(at.weights) + sum(s is not None for s in (at.h0, at.c0)))
        slots = ops.scan_backward(recorded, incoming, wanted)[-1]
        h, c = derivatives.state_gradients(*recorded[:3], incoming._replace(slots=slots))
        of_h += [run.padded(z) for z in h]
        of_c += [run.padded(z) for z in c]
    return Flow(_norms(of_h), _norms(of_c) if of_c else None)


def _norms(gradients: list[Tensor]) -> Tensor:
    """In float64: a vanishing gradient's square is below the smallest float32."""
    norms = [torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64) for z in gradients]
    return torch.stack(norms).to(gradients[0].dtype)


class _Run:
    """A call of a module, layer by layer, each with what it keeps for backward."""

    def __init__(self, module: Any, input: Any, hx: Any, lengths: Any, reset: Any) -> None:
        expect_layer(module)
        expect_none(module, "inspect")
        x = input.data if isinstance(input, PackedSequence) else input
        if not isinstance(x, Tensor) or (x is input and x.dim() != 3):
            raise ValueError(
                f"input must have three axes, or be a PackedSequence, got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        if ops.transformed():
            raise NotImplementedError("inspect knows no transform of torch.func, nor forward mode")
        call = read(module, input, hx, lengths, reset)
        if isinstance(call, Refusal):
            raise ValueError(call.text)
        self.call, self.layer, self.steps = call, call.layer, call.steps
        self.operands = autocast.computed(call)
        self.x = self.operands.x
        self.finals: list[tuple[Tensor, Tensor]] = []

    def __iter__(self) -> Iterator[tuple[Recorded, Tensor]]:
        """Runs the layers. Each comes with its last hidden states."""
        with torch.autocast(self.x.device.type, enabled=False):
            for i in range(self.call.module.num_layers):
                if i:
                    self.x = dropout(self.call.module, self.x)
                own = self.layer.of_stack(i, self.operands, self.x)
                try:
                    y, hn, cn, saved = torch.ops.rnnkern.scan(
                        *own[:4], *ops.arguments(self.steps), *self.layer, True
                    )
                except kernels.RefusedError as refused:
                    raise ValueError(str(refused)) from None
                yield Recorded(self.layer, self.steps, own._replace(y=y), saved), hn
                self.x = y
                self.finals.append((hn, cn))

    def results(self) -> tuple[Any, Any]:
        """Output and state, as the module itself returns them."""
        hn, cn = (torch.cat(parts) for parts in zip(*self.finals, strict=True))
        own = cn if self.layer.has_cell_state else None
        return self.call.results(*autocast.results(self.call, self.x, hn, own))

    def as_rows(self, z: Tensor) -> Tensor:
        """A saved ``[rows, ...]`` laid out as the output is."""
        if is_packed(self.call.steps):
            return z
        if self.layer.batch_first:
            return unflatten(z, 0, (self.call.T, self.call.N)).transpose(0, 1)
        return unflatten(z, 0, (self.call.T, self.call.N))

    def padded(self, z: Tensor) -> Tensor:
        """Rows as ``[T, N, ...]``."""
        if is_packed(self.call.steps):
            return nn.utils.rnn.pad_packed_sequence(self.call.input._replace(data=z))[0]
        return z.transpose(0, 1) if self.layer.batch_first else z


def _of_direction(run: _Run, recorded: Recorded, d: int) -> DirectionTrace:
    layer, steps, at, saved = recorded
    H = run.call.module.hidden_size
    width = at.y.shape[-1] // layer.directions
    h = at.y[..., d * width : (d + 1) * width]
    parts = [run.as_rows(piece[d]) for piece in pieces(saved, layer, H)]
    if is_own(layer.mode):  # what it saves are no gates
        return DirectionTrace(
            {}, h, parts[layer.saves_slots].detach() if layer.has_cell_state else None
        )
    if not layer.saves_slots:
        return DirectionTrace({}, h, None)
    names = CELLS[layer.mode].names
    gates = list(torch.split(parts[0], H, -1))[layer.slots - len(names) :]
    c = parts[1] if layer.has_cell_state else None
    if torch.is_grad_enabled() and at.y.requires_grad:
        scan = derivatives.direction(layer, steps, at, d)
        formulas = scan.gates()[-len(gates) :]
        rows = [scan.frames.from_rows(scan.taken(z), d) for z in formulas]
        gates = [_Saved.apply(z, row) for z, row in zip(gates, rows, strict=True)]  # type: ignore[no-untyped-call]
        if c is not None:
            c0 = scan.frames.state(at.c0, d, scan.x, H)
            kept, written = scan.cell_updates(formulas)
            cells = _Cells.apply(scan, scan.frames.of(c, d), kept, written, c0)  # type: ignore[no-untyped-call]
            c = scan.frames.from_rows(cells, d)
    return DirectionTrace(dict(zip(names, gates, strict=True)), h, c)


class _Saved(torch.autograd.Function):
    """What the kernel has saved, with the gradient of the formula that gives it."""

    @staticmethod
    def forward(ctx: Any, saved: Tensor, formula: Tensor) -> Tensor:
        return saved.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Cells(torch.autograd.Function):
    """Cell states as the kernel has saved them: c(t) = kept(t) c(t-1) + written(t)."""

    @staticmethod
    def forward(
        ctx: Any, scan: Any, saved: Tensor, kept: Tensor, written: Tensor, c0: Tensor
    ) -> Tensor:
        cells = saved.clone()
        ctx.scan = scan
        ctx.save_for_backward(cells, kept, c0)
        return cells

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        cells, kept, c0 = ctx.saved_tensors
        scan = ctx.scan
        own = scan.taken(scan.summed(scan.taken(gradient), kept))
        return None, None, own * scan.before(cells, c0), own, scan.handed_to_start(own * kept)
