"""What goes on inside a layer: its gates and states at every step, and how far gradients reach.

All of it is what the kernels keep for backward anyway; nothing is computed a second time step by
step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from rnnkern import derivatives, functional, kernels, ops
from rnnkern.cells import CELLS
from rnnkern.sequence import Steps, packed_steps, padded_steps, place_of
from rnnkern.spec import Gradients, Point, pieces


class DirectionTrace(NamedTuple):
    """One layer in one direction. Every tensor is ``[T, N, H]``, laid out as the layer's output is
    (batch first, packed); past the end of a sequence it is 0.

    Attributes:
        gates: by name, after their activation: ``i, f, g, o`` of an LSTM, ``r, z, n`` of a GRU;
            none of an RNN, whose one gate is ``h``.
        h: hidden states, ``[T, N, P]`` where they are projected.
        c: cell states of an LSTM, else None.
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
    """What `gradient_flow` finds: norms over the units, ``[layers * directions, T, N]``, whatever
    axis of the input comes first.

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
    """Every gate, cell state and hidden state of one call, differentiable.

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
    layers = [[_of_direction(run, layer, d) for d in range(run.spec.directions)] for layer in run]
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
    for layer in run:
        ones = torch.ones_like(layer.hn)
        at = layer.at
        wanted = [False] * (1 + len(at.weights) + sum(s is not None for s in (at.h0, at.c0)))
        slots = ops.scan_backward(
            run.spec,
            run.steps,
            (None, ones, None),
            layer.x,
            at.h0,
            at.c0,
            layer.weights,
            layer.y,
            layer.saved,
            wanted,
        )[-1]
        h, c = derivatives.state_gradients(
            run.spec, run.steps, at, Gradients(None, ones, None, slots)
        )
        of_h += [run.padded(z) for z in h]
        of_c += [run.padded(z) for z in c]
    return Flow(_norms(of_h), _norms(of_c) if of_c else None)


def _norms(gradients: list[Tensor]) -> Tensor:
    """In float64: a vanishing gradient's square is below the smallest float32."""
    norms = [torch.linalg.vector_norm(z, dim=-1, dtype=torch.float64) for z in gradients]
    return torch.stack(norms).to(gradients[0].dtype)


class _Layer(NamedTuple):
    """One layer of a run: operands and results of its scan."""

    x: Tensor
    weights: list[Tensor]
    at: Point
    y: Tensor
    hn: Tensor
    cn: Tensor
    saved: Tensor


class _Run:
    """A call of a module, layer by layer, each with what it keeps for backward."""

    def __init__(self, module: Any, input: Any, hx: Any, lengths: Any, reset: Any) -> None:
        functional.expect_layer(module)
        self.module, self.input = module, input
        self.is_packed = isinstance(input, PackedSequence)
        x = input.data if self.is_packed else input
        if not isinstance(x, Tensor) or (not self.is_packed and x.dim() != 3):
            raise ValueError(
                f"input must have three axes, or be a PackedSequence, got "
                f"{tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__}"
            )
        if x.shape[-1] != module.input_size:
            raise ValueError(f"input must have {module.input_size} features, got {x.shape[-1]}")
        if ops.transformed():
            raise NotImplementedError("inspect knows no transform of torch.func, nor forward mode")
        self.steps: Steps | None
        if self.is_packed:
            if lengths is not None or reset is not None:
                raise ValueError("a PackedSequence brings its own lengths; it takes no reset")
            self.steps = packed_steps(input.batch_sizes, input.sorted_indices, place_of(x))
            N = int(input.batch_sizes[0])
        else:
            first, second = x.shape[:2]
            T, N = (second, first) if module.batch_first else (first, second)
            if T == 0:
                raise ValueError("the sequence has no steps")
            self.steps = padded_steps(lengths, reset, T, N, module.batch_first, place_of(x))
        self.h0, self.c0, fits = functional.initial_states(module, hx, N)
        if not fits:
            raise ValueError(f"hx does not fit a batch of {N}: see torch.nn's {module.mode}")
        self.asked = functional.autocast_dtype(x)
        self.spec = functional.spec_of(module, self.asked)
        self.weights = functional.current_weights(module)
        self.x, self.given = x, (x, self.c0)
        if self.asked is not None:
            dtype = functional.dtype_under_autocast(module, self.asked, x, self.h0, self.is_packed)
            own = functional.autocast(dtype, x, self.h0, self.c0, *self.weights)
            self.x, self.h0, self.c0, *self.weights = own
        self.finals: list[tuple[Tensor, Tensor]] = []

    def __iter__(self) -> Iterator[_Layer]:
        D, count = self.spec.directions, self.spec.directions * self.spec.tensors
        with torch.autocast(self.x.device.type, enabled=False):
            for i in range(self.module.num_layers):
                if i:
                    self.x = functional.dropout(self.module, self.x)
                h0, c0, own = functional.of_layer(i, D, count, self.h0, self.c0, self.weights)
                given, steps = self.x, ops.arguments(self.steps)
                try:
                    y, hn, cn, saved = torch.ops.rnnkern.scan(
                        given, h0, c0, own, *steps, *self.spec, True
                    )
                except kernels.RefusedError as refused:
                    raise ValueError(str(refused)) from None
                yield _Layer(given, own, Point(given, h0, c0, own, y), y, hn, cn, saved)
                self.x = y
                self.finals.append((hn, cn))

    def results(self) -> tuple[Any, Any]:
        """Output and state, as the module itself returns them."""
        y = self.x
        hn, cn = (torch.cat(parts) for parts in zip(*self.finals, strict=True))
        own = cn if self.spec.has_cell_state else None
        if self.asked is not None:
            x, c0 = self.given
            y, hn, own = functional.results_under_autocast(
                self.module, self.asked, x, c0, y, hn, own
            )
        output = self.input._replace(data=y) if self.is_packed else y
        return output, hn if own is None else (hn, own)

    def as_rows(self, z: Tensor) -> Tensor:
        """A saved ``[rows, ...]`` laid out as the output is."""
        if self.is_packed:
            return z
        if self.spec.batch_first:
            return z.unflatten(0, (self.x.shape[1], self.x.shape[0])).transpose(0, 1)  # type: ignore[no-any-return, no-untyped-call]
        return z.unflatten(0, (self.x.shape[0], self.x.shape[1]))  # type: ignore[no-any-return, no-untyped-call]

    def padded(self, z: Tensor) -> Tensor:
        """Rows as ``[T, N, ...]``."""
        if self.is_packed:
            return nn.utils.rnn.pad_packed_sequence(self.input._replace(data=z))[0]
        return z.transpose(0, 1) if self.spec.batch_first else z


def _of_direction(run: _Run, layer: _Layer, d: int) -> DirectionTrace:
    spec, H = run.spec, run.module.hidden_size
    width = layer.y.shape[-1] // spec.directions
    h = layer.y[..., d * width : (d + 1) * width]
    parts = [run.as_rows(piece[d]) for piece in pieces(layer.saved, spec, H)]
    if not spec.saves_slots:
        return DirectionTrace({}, h, None)
    gates = list(torch.split(parts[0], H, -1))[spec.slots - len(CELLS[spec.mode].names) :]
    c = parts[1] if spec.has_cell_state else None
    if torch.is_grad_enabled() and layer.y.requires_grad:
        scan = derivatives.direction(spec, run.steps, layer.at, d)
        formulas = scan.gates()[-len(gates) :]
        rows = [scan.frames.from_rows(scan.taken(z), d) for z in formulas]
        gates = [_Recorded.apply(z, row) for z, row in zip(gates, rows, strict=True)]  # type: ignore[no-untyped-call]
        if c is not None:
            i, f, g, _ = formulas
            c0 = scan.frames.state(layer.at.c0, d, scan.x, H)
            cells = _Cells.apply(scan, scan.frames.of(c, d), i, f, g, c0)  # type: ignore[no-untyped-call]
            c = scan.frames.from_rows(cells, d)
    return DirectionTrace(dict(zip(CELLS[spec.mode].names, gates, strict=True)), h, c)


class _Recorded(torch.autograd.Function):
    """What the kernel has kept, with the gradient of the formula that gives it."""

    @staticmethod
    def forward(ctx: Any, kept: Tensor, formula: Tensor) -> Tensor:
        return kept.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, gradient


class _Cells(torch.autograd.Function):
    """Cell states as the kernel has kept them: c(t) = f(t) c(t-1) + i(t) g(t)."""

    @staticmethod
    def forward(
        ctx: Any, scan: Any, kept: Tensor, i: Tensor, f: Tensor, g: Tensor, c0: Tensor
    ) -> Tensor:
        cells = kept.clone()
        ctx.scan = scan
        ctx.save_for_backward(cells, i, f, g, c0)
        return cells

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        cells, i, f, g, c0 = ctx.saved_tensors
        scan = ctx.scan
        own = scan.taken(scan.summed(scan.taken(gradient), f))
        first = scan.handed_to_start(own * f)
        return None, None, own * g, own * scan.before(cells, c0), own * i, first
