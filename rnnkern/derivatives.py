"""Derivatives of a layer and of its backward pass, in plain PyTorch.

From what the kernels have found, operands and outputs, all gates of all steps follow at once; what
is left to do step by step is linear. Every function is made of differentiable operators of torch:
they can be differentiated, vmapped and traced again, to any order.

With ``a`` the sums of the slots (`csrc/scan.h`: the gates, and for GRU the recurrent part of its
last one), ' for the derivative in a direction, ``da`` and ``dh`` for gradients of a scalar:

    a'(t) = W_ih x'(t) + W_hh h'(t-1) + W_ih' x(t) + W_hh' h(t-1) + b'
    h'(t) = gain(t) a'(t) + ...
    da'(t) = gain(t) dh'(t) + gain'(t) dh(t)
    dh'(t-1) = W_hh^T da'(t) + W_hh'^T da(t) + ...

The gradients of <v, gradients> are the derivative of the gradients in the direction v, for second
derivatives commute: one function serves double backward and forward over reverse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from rnnkern.cells import CELLS
from rnnkern.layer import Gradients, Layer, Maybe, Operands
from rnnkern.sequence import Steps, active_rows

_F = TypeVar("_F", bound=Callable[..., Any])


def _without_autocast(function: _F) -> _F:
    """Derivatives may be asked for under autocast; what they differentiate was not made there."""

    @functools.wraps(function)
    def wrapped(layer: Layer, steps: Steps | None, at: Operands, *rest: Any) -> Any:
        assert at.x is not None
        device = at.x.device.type
        if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
            return function(layer, steps, at, *rest)
        with torch.autocast(device, enabled=False):
            return function(layer, steps, at, *rest)

    return wrapped  # type: ignore[return-value]


@_without_autocast
def tangent(
    layer: Layer, steps: Steps | None, at: Operands, change: Operands
) -> tuple[Tensor, Tensor, Maybe]:
    """The derivatives of ``y, h_n, c_n`` in a direction."""
    frames = _Frames(layer, steps, at)
    found = []
    for d in range(layer.directions):
        scan = _Direction(layer, frames, d, at)
        v_w, v = scan.weights_of(change), scan.change_of(change)
        found.append(scan.tangent(v_w, v, scan.fixed_sums(v_w, v, None)))
    return frames.outputs(found)


@_without_autocast
def of_backward(
    layer: Layer,
    steps: Steps | None,
    at: Operands,
    gradients: Gradients,
    change: Operands,
    changes: Gradients,
) -> tuple[tuple[Tensor, Tensor, Maybe], tuple[Tensor, Maybe, Maybe, list[Maybe], Tensor]]:
    """The derivative of forward and backward pass in a direction.

    Args:
        gradients: incoming, and of the slots as backward has found them.
        change: the direction, in operands.
        changes: in incoming gradients; ``slots``: in the sums of the slots themselves.

    Returns:
        The derivatives of ``y, h_n, c_n``; and those of the gradients of ``x, h_0, c_0, weights``
        and slots.
    """
    frames = _Frames(layer, steps, at)
    changed, adjoints = [], []
    x: Tensor | None = None
    weights: list[Maybe] = []
    for d in range(layer.directions):
        scan = _Direction(layer, frames, d, at)
        v_w, v = scan.weights_of(change), scan.change_of(change)
        slots: Any = frames.saved(gradients.slots, d)
        moved = scan.tangent(v_w, v, scan.fixed_sums(v_w, v, frames.saved(changes.slots, d)))
        incoming, v_incoming = frames.incoming(gradients, d), frames.incoming(changes, d)
        found = scan.adjoint(v_w, moved, slots, incoming, v_incoming)
        of_input, of_weights = scan.products(v_w, v, moved, slots, found)
        own = frames.from_rows(of_input, d)
        x = own if x is None else x + own
        weights += of_weights
        changed.append(moved)
        adjoints.append(found)
    assert x is not None
    return frames.outputs(changed), (
        x,
        None if at.h0 is None else frames.from_states([found.h0 for found in adjoints]),
        None if at.c0 is None else frames.from_states([found.c0 for found in adjoints]),
        weights,
        _stacked([frames.to_saved(found.slots, d) for d, found in enumerate(adjoints)]),
    )


@_without_autocast
def state_gradients(
    layer: Layer, steps: Steps | None, at: Operands, gradients: Gradients
) -> tuple[list[Tensor], list[Tensor]]:
    """Of each step's h and, for LSTM, c, all that uses them counted: rows as the layer has them,
    one tensor a direction.
    """
    frames = _Frames(layer, steps, at)
    of_h, of_c = [], []
    for d in range(layer.directions):
        scan = _Direction(layer, frames, d, at)
        incoming = frames.incoming(gradients, d)
        d_h, d_c = scan.of_states(frames.saved(gradients.slots, d), incoming)
        of_h.append(frames.from_rows(scan.taken(d_h), d))
        if d_c is not None:
            of_c.append(frames.from_rows(scan.taken(d_c), d))
    return of_h, of_c


def direction(layer: Layer, steps: Steps | None, at: Operands, d: int) -> _Direction:
    """One direction at a point, for what `_Direction.gates` gives."""
    return _Direction(layer, _Frames(layer, steps, at), d, at, linearized=False)


@_without_autocast
def weight_gradients(
    layer: Layer, steps: Steps | None, at: Operands, slots: Tensor, groups: int
) -> list[Tensor]:
    """Of each of ``groups`` groups of batch rows, from the gradients of the slots.

    A group is every ``groups``-th row. Not for projections.

    Returns:
        ``[groups, *weight.shape]`` for each weight.
    """
    frames = _Frames(layer, steps, at)
    made: list[Tensor] = []
    for d in range(layer.directions):
        scan = _Direction(layer, frames, d, at, linearized=False)
        made += scan.weight_gradients(frames.saved(slots, d), groups)
    return made


class _Frames:
    """Operands as ``[T, N, ...]`` in the order in which a direction takes its steps, and back."""

    def __init__(self, layer: Layer, steps: Steps | None, at: Operands) -> None:
        x = at.x
        assert x is not None
        self.layer, self.steps = layer, steps
        self.dtype = x.dtype
        self.computed = torch.promote_types(x.dtype, torch.float32)
        self.packed = steps is not None and steps.packed
        if self.packed:
            active = steps.active.to(x.device)  # type: ignore[union-attr]
            self.T, self.N = active.shape[0], int(active[0])
            start = active.cumsum(0) - active
            places = torch.arange(self.N, device=x.device)
            self.rows = (start[:, None] + places).clamp(max=x.shape[0] - 1)
            step = torch.repeat_interleave(
                torch.arange(self.T, device=x.device), active, output_size=x.shape[0]
            )
            self.row_of = step, torch.arange(x.shape[0], device=x.device) - start[step]
            self.mask: Maybe = places < active[:, None]
        else:
            self.T, self.N = (x.shape[1], x.shape[0]) if layer.batch_first else x.shape[:2]
            self.mask = None
            if steps is not None and steps.active is not None:
                self.mask = active_rows(steps).to(x.device)
        self.reset: Maybe = None
        if steps is not None and steps.reset is not None:
            reset = steps.reset.to(x.device)
            self.reset = reset.t() if layer.batch_first else reset

    def directed(self, z: Tensor, d: int) -> Tensor:
        return z.flip(0) if d else z

    def of(self, z: Any, d: int) -> Any:
        """Frames of rows as the layer has them; of None none."""
        if z is None:
            return None
        z = _as(self.computed, z)
        if self.packed:
            z = z[self.rows]
        elif self.layer.batch_first:
            z = z.transpose(0, 1)
        return self.directed(self._masked(z), d)

    def from_rows(self, z: Tensor, d: int) -> Tensor:
        z = self.directed(z, d)
        if self.packed:
            z = z[self.row_of]
        elif self.layer.batch_first:
            z = z.transpose(0, 1)
        return _as(self.dtype, z)

    def saved(self, z: Any, d: int) -> Any:
        """Frames of a saved buffer ``[D, rows, ...]``; of None none."""
        if z is None:
            return None
        z = _as(self.computed, z[d])
        z = z[self.rows] if self.packed else z.reshape(self.T, self.N, z.shape[-1])
        return self.directed(self._masked(z), d)

    def to_saved(self, z: Tensor, d: int) -> Tensor:
        z = self.directed(z, d)
        return _as(self.dtype, z[self.row_of] if self.packed else z.flatten(0, 1))

    def _masked(self, z: Tensor) -> Tensor:
        """Zero in rows that are not there, and past a sequence's end: it may be NaN."""
        return z if self.mask is None else torch.where(self._of_mask(), z, 0)

    def _of_mask(self) -> Tensor:
        assert self.mask is not None
        return self.mask[..., None]

    def active(self, d: int) -> Maybe:
        """``[T, N, 1]``, where a row takes part."""
        return None if self.mask is None else self.directed(self._of_mask(), d)

    def kept(self, d: int) -> Maybe:
        """``[T, N, 1]``, where the state enters the step as the step before has left it."""
        if self.reset is None:
            return None
        reset = self.reset
        if d:  # nothing passes from an episode's first step to the step before it
            if self.mask is not None:
                reset = reset & self.mask
            reset = torch.cat((reset[1:], torch.zeros_like(reset[:1])))
        return self.directed(~reset[..., None], d)

    def state(self, z: Maybe, d: int, like: Tensor, width: int) -> Tensor:
        if z is None:
            return like.new_zeros(self.N, width, dtype=self.computed)
        own = _as(self.computed, z[d])
        if self.packed and self.steps is not None and self.steps.order is not None:
            own = own.index_select(0, self.steps.order.to(z.device))
        return own

    def from_states(self, parts: Sequence[Tensor]) -> Tensor:
        z = _as(self.dtype, _stacked(parts))
        if self.packed and self.steps is not None and self.steps.order is not None:
            z = z.index_select(1, torch.argsort(self.steps.order).to(z.device))
        return z

    def incoming(self, gradients: Gradients, d: int) -> tuple[Maybe, Maybe, Maybe]:
        """Gradients of a direction's outputs and final states."""
        y = gradients.y
        if y is not None:
            width = y.shape[-1] // self.layer.directions
            y = y[..., d * width : (d + 1) * width]
        hn, cn = (
            None if z is None else self.state(z, d, z, z.shape[-1])
            for z in (gradients.hn, gradients.cn)
        )
        return self.of(y, d), hn, cn

    def outputs(self, found: Sequence[_Moved]) -> tuple[Tensor, Tensor, Maybe]:
        """Changes of ``y, h_n, c_n``."""
        y = []
        for d, moved in enumerate(found):
            active = self.active(d)
            own = moved.h if active is None else torch.where(active, moved.h, 0)
            y.append(self.from_rows(own, d))
        return (
            y[0] if len(y) == 1 else torch.cat(y, -1),
            self.from_states([moved.hn for moved in found]),
            self.from_states([moved.cn for moved in found]) if self.layer.has_cell_state else None,
        )


class _Weights(NamedTuple):
    """Of one direction, gates of the recurrent ones in the order of the slots."""

    ih: Maybe
    rec: Maybe = None
    b_ih: Maybe = None
    b_rec: Maybe = None
    hr: Maybe = None


class _Change(NamedTuple):
    """Of one direction's input, in frames, and initial states."""

    x: Maybe
    h0: Tensor
    c0: Tensor


class _Moved(NamedTuple):
    """Changes, step by step: of the sums of the slots, of states, and of those taken over."""

    slots: Tensor
    h: Tensor
    h_before: Tensor
    c: Any
    c_before: Any
    unprojected: Tensor
    hn: Tensor
    cn: Tensor


class _Adjoint(NamedTuple):
    """Changes of the gradients of slots, of initial states, and of what a projection makes."""

    slots: Tensor
    h0: Tensor
    c0: Tensor
    projected: Maybe
    v_projected: Maybe


class _Direction:
    """One direction at a point: what small changes of its operands do, step by step.

    What depends on the cell is in `_Elman`, `_Lstm` and `_Gru`.
    """

    def __init__(
        self, layer: Layer, frames: _Frames, d: int, at: Operands, linearized: bool = True
    ) -> None:
        self.layer, self.frames, self.d = layer, frames, d
        self.H = layer.hidden([w for w in at.weights if w is not None])
        self.recurrent = CELLS[layer.mode].gates * self.H  # slots of that product: the first ones
        self.free = layer.slots * self.H - self.recurrent  # slots of the input product alone
        self.w = self.weights_of(at)
        self.x: Tensor = frames.of(at.x, d)
        y: Any = at.y
        self.O = y.shape[-1] // layer.directions
        self.h: Tensor = frames.of(y[..., d * self.O : (d + 1) * self.O], d)
        self.active, self.kept = frames.active(d), frames.kept(d)
        self.actives = [None] * frames.T if self.active is None else self.active.unbind(0)
        self.h_before = self.before(self.h, frames.state(at.h0, d, self.x, self.O))
        if linearized:
            c0 = frames.state(at.c0, d, self.x, self.H)
            self.cell: Any = _CELLS[layer.mode](self, c0)
            self.gains = self.cell.gain.unbind(0)

    # Operands

    def weights_of(self, operands: Operands) -> _Weights:
        count = self.layer.tensors
        own = operands.weights[self.d * count : (self.d + 1) * count]
        cast = [None if w is None else _as(self.frames.computed, w) for w in own]
        cast[1] = self._in_slots(cast[1])
        if not self.layer.bias:
            return _Weights(cast[0], cast[1], None, None, *cast[2:])
        cast[3] = self._in_slots(cast[3])
        return _Weights(*cast)

    def _in_slots(self, w: Any, sign: int = 1, axis: int = 0) -> Any:
        """Gates of a recurrent weight in the order of the slots; or back."""
        if w is None or self.layer.mode != "GRU":
            return w
        return torch.roll(w, sign * self.H, axis)

    def change_of(self, change: Operands) -> _Change:
        return _Change(
            self.frames.of(change.x, self.d),
            self.frames.state(change.h0, self.d, self.x, self.O),
            self.frames.state(change.c0, self.d, self.x, self.H),
        )

    def sums(
        self, inputs: Sequence[tuple[Maybe, Maybe]], w: _Weights, more: Maybe = None
    ) -> Tensor:
        """Of the slots, ``[T, N, S * H]``, freshly made.

        Inputs times a weight each, None counting nothing; states as they enter times the recurrent
        weights of w; and its biases.
        """
        given = [(x, weight) for x, weight in inputs if x is not None and weight is not None]
        left = [x for x, _ in given]
        right = [self._padded(_cat([weight for _, weight in given]), 0)] if given else []
        if w.rec is not None:
            left.append(self.h_before)
            right.append(self._padded(w.rec, 1))
        biases = [self._padded(b, i) for i, b in enumerate((w.b_ih, w.b_rec)) if b is not None]
        bias = functools.reduce(torch.add, biases) if biases else None
        shape = self.frames.T, self.frames.N, self.layer.slots * self.H
        if left:
            made = linear(_cat(left), _cat(right), bias)
        else:
            made = self.x.new_zeros(shape) if bias is None else bias.expand(shape).clone()
        return made if more is None else made + more

    def _padded(self, w: Tensor, recurrent: int) -> Tensor:
        """Weights of the input product or of the recurrent one for all slots."""
        if not self.free:
            return w
        zeros = (0, self.free) if recurrent else (self.free, 0)
        return pad(w, zeros if w.dim() == 1 else (0, 0, *zeros))

    def gates(self) -> tuple[Tensor, ...]:
        """Of LSTM i, f, g, o; of GRU the recurrent part of n, then r, z, n: for all steps."""
        sums = self.sums([(self.x, self.w.ih)], self.w).chunk(4, -1)
        if self.layer.mode == "LSTM":
            i, f, o = (torch.sigmoid(sums[k]) for k in (0, 1, 3))
            return i, f, torch.tanh(sums[2]), o
        m, r, z = sums[0], torch.sigmoid(sums[1]), torch.sigmoid(sums[2])
        return m, r, z, torch.tanh(sums[3] + r * m)

    # Episodes and ends

    def entering(self, t: int, state: Tensor) -> Tensor:
        """A state as step t takes it over."""
        return state if self.kept is None else torch.where(self.kept[t], state, 0)

    def before(self, states: Tensor, first: Tensor) -> Tensor:
        """States as each step takes them over."""
        earlier = states[:-1]
        if self.active is not None:
            earlier = torch.where(self.active[:-1], earlier, first)
        before = torch.cat((first[None], earlier))
        return before if self.kept is None else torch.where(self.kept, before, 0)

    def after(self, z: Tensor, end: Maybe) -> Tensor:
        """z of the step after each; 0 after an episode, ``end`` after a row's last step."""
        z = z if self.kept is None else torch.where(self.kept, z, 0)
        last = torch.zeros_like(z[0]) if end is None else end
        rest = z[1:] if self.active is None else torch.where(self.active[1:], z[1:], last)
        return torch.cat((rest, last[None]))

    def handed_to_start(self, z: Tensor) -> Tensor:
        """z of the step that begins with the initial state of each row."""
        if self.kept is not None:
            z = torch.where(self.kept, z, 0)
        if self.active is None:
            return z[0]
        earlier = torch.cat((torch.zeros_like(self.active[:1]), self.active[:-1]))
        return torch.where(self.active & ~earlier, z, 0).sum(0)

    def summed(self, own: Tensor, keeps: Tensor) -> Tensor:
        """s of s(t) = own(t) + keeps(t+1) s(t+1), as far as an episode and a row go."""
        factors = self.after(keeps, None)
        now, found = own[-1], [own[-1]]
        for source, factor in zip(own[:-1].flip(0), factors[:-1].flip(0), strict=True):
            now = torch.addcmul(source, factor, now)
            found.append(now)
        return torch.stack(found[::-1])

    def taken(self, z: Tensor) -> Tensor:
        """z of the steps that rows take."""
        return z if self.active is None else torch.where(self.active, z, 0)

    # Scans

    def fixed_sums(self, v_w: _Weights, v: _Change, v_slots: Maybe) -> Tensor:
        """How the sums of the slots change, but for what the states bring."""
        return self.sums([(v.x, self.w.ih), (self.x, v_w.ih)], v_w, v_slots)

    def tangent(self, v_w: _Weights, v: _Change, fixed: Tensor) -> _Moved:
        """What moves, in the order of the steps."""
        own = fixed[..., : self.recurrent].unbind(0)
        alone = fixed[..., self.recurrent :]
        others = (self.cell.gain[..., self.recurrent :] * alone).unbind(0)
        w_rec, w_hr = self.w.rec.t(), None if self.w.hr is None else self.w.hr.t()  # type: ignore[union-attr]
        crossing = None if v_w.hr is None else (self.cell.unprojected @ v_w.hr.t()).unbind(0)
        h, c = v.h0, v.c0
        steps = []
        for t, active in enumerate(self.actives):
            h_in, c_in = self.entering(t, h), self.entering(t, c)
            total = torch.addmm(own[t], h_in, w_rec)
            moved = total * self.gains[t][:, : self.recurrent]
            unprojected, c_new = self.cell.step(t, moved, others[t], h_in, c_in)
            h_new = unprojected
            if w_hr is not None:
                h_new = unprojected @ w_hr
                h_new = h_new if crossing is None else h_new + crossing[t]
            steps.append((total, h_new, h_in, c_new, c_in, unprojected))
            h = h_new if active is None else torch.where(active, h_new, h)
            c = c_new if active is None else torch.where(active, c_new, c)
        total, *rest = (torch.stack(parts) for parts in zip(*steps, strict=True))
        h_new, h_in, c_new, c_in, unprojected = rest
        sums = torch.cat((total, alone), -1)
        return _Moved(sums, h_new, h_in, c_new, c_in, unprojected, h, c)

    def of_states(
        self, slots: Tensor, incoming: tuple[Maybe, Maybe, Maybe]
    ) -> tuple[Tensor, Maybe]:
        """Gradients of each step's h and c, all that uses them counted."""
        assert self.w.rec is not None
        d_y, d_hn, d_cn = incoming
        own = self.after(slots[..., : self.recurrent] @ self.w.rec, d_hn)
        d_h = self.cell.of_h(own if d_y is None else own + d_y)
        return d_h, self.cell.of_c(d_h if self.w.hr is None else d_h @ self.w.hr, d_cn)

    def adjoint(
        self,
        v_w: _Weights,
        moved: _Moved,
        slots: Tensor,
        incoming: tuple[Maybe, Maybe, Maybe],
        changes: tuple[Maybe, Maybe, Maybe],
    ) -> _Adjoint:
        """Changes of the gradients, in the order of backward."""
        rec, w_rec, w_hr = slots[..., : self.recurrent], self.w.rec, self.w.hr
        assert w_rec is not None
        d_h, d_c = self.of_states(slots, incoming)
        d_projected, crossing = None, None
        if w_hr is not None:
            d_projected, d_h = d_h, d_h @ w_hr
            crossing = None if v_w.hr is None else (d_projected @ v_w.hr).unbind(0)
        curved, handed = self.cell.curve(moved, d_h, d_c)
        if v_w.rec is not None:
            handed = rec @ v_w.rec if handed is None else handed + rec @ v_w.rec
        curves, hands = curved.unbind(0), None if handed is None else handed.unbind(0)
        v_y, h, c = changes
        h = torch.zeros_like(self.h[0]) if h is None else h
        c = self.x.new_zeros(self.frames.N, self.H) if c is None else c
        found, projected = [], []
        for t in reversed(range(self.frames.T)):
            active = self.actives[t]
            now = h if v_y is None else h + v_y[t]
            if w_hr is not None:
                projected.append(now)
                now = now @ w_hr
                now = now if crossing is None else now + crossing[t]
            spread, direct, c_before = self.cell.back(t, now, c)
            d_slots = torch.addcmul(curves[t], self.gains[t], spread)
            found.append(d_slots)
            before = d_slots[:, : self.recurrent] @ w_rec
            for part in (None if hands is None else hands[t], direct):
                before = before if part is None else before + part
            before, c_before = self.entering(t, before), self.entering(t, c_before)
            h = before if active is None else torch.where(active, before, h)
            c = c_before if active is None else torch.where(active, c_before, c)
        return _Adjoint(
            self.taken(torch.stack(found[::-1])),
            h,
            c,
            None if d_projected is None else self.taken(d_projected),
            self.taken(torch.stack(projected[::-1])) if projected else None,
        )

    # Products over all steps

    def products(
        self, v_w: _Weights, v: _Change, moved: _Moved, slots: Tensor, found: _Adjoint
    ) -> tuple[Tensor, list[Tensor]]:
        """Changes of the gradients of the input and of the weights."""
        assert self.w.ih is not None
        inputs, v_inputs = slots[..., self.free :], found.slots[..., self.free :]
        rec, v_rec = slots[..., : self.recurrent], found.slots[..., : self.recurrent]
        x = v_inputs @ self.w.ih
        if v_w.ih is not None:
            x = x + inputs @ v_w.ih
        of_ih = _product(v_inputs, self.x)
        if v.x is not None:
            of_ih = _product(inputs, v.x, of_ih)
        of_rec = _product(rec, moved.h_before, _product(v_rec, self.h_before))
        weights = [of_ih, self._in_slots(of_rec, -1)]
        if self.layer.bias:
            weights += [v_inputs.sum((0, 1)), self._in_slots(v_rec.sum((0, 1)), -1)]
        if found.projected is not None and found.v_projected is not None:
            of_hr = _product(found.v_projected, self.cell.unprojected)
            weights.append(_product(found.projected, moved.unprojected, of_hr))
        return x, [_as(self.frames.dtype, w) for w in weights]

    def weight_gradients(self, slots: Tensor, groups: int) -> list[Tensor]:
        def grouped(z: Tensor) -> Tensor:
            own = z.reshape(z.shape[0], -1, groups, z.shape[-1])
            return own.permute(2, 0, 1, 3).flatten(1, 2)

        inputs, rec = grouped(slots[..., self.free :]), grouped(slots[..., : self.recurrent])
        own = [inputs.mT @ grouped(self.x), self._in_slots(rec.mT @ grouped(self.h_before), -1, 1)]
        if self.layer.bias:
            own += [inputs.sum(1), self._in_slots(rec.sum(1), -1, 1)]
        return [_as(self.frames.dtype, w) for w in own]


class _Elman:
    """h = phi(a)."""

    unprojected: Tensor

    def __init__(self, scan: _Direction, c0: Tensor) -> None:
        h = scan.h
        is_relu = scan.layer.mode == "RNN_RELU"
        self.gain = (h > 0).to(h.dtype) if is_relu else 1 - h * h
        self.bend = torch.zeros_like(h) if is_relu else -2 * h

    def step(
        self, t: int, moved: Tensor, others: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Changes of h, before a projection, and of c; from those of the slots times their gain."""
        return moved, c

    def of_h(self, own: Tensor) -> Tensor:
        """Gradients of each step's h, from what reaches it by products and from outside."""
        return own

    def of_c(self, d_h: Tensor, d_cn: Maybe) -> Maybe:
        """Gradients of each step's c."""
        return None

    def curve(self, moved: _Moved, d_h: Tensor, d_c: Any) -> tuple[Tensor, Maybe]:
        """How the gains change: the part of it in the gradients of slots, and of h before."""
        return self.bend * moved.h * d_h, None

    def back(self, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Maybe, Tensor]:
        """From gradients of h and c: what the gain of each slot is multiplied with; what reaches
        h before by no product; and c before.
        """
        return h, None, c


class _Lstm(_Elman):
    """c = f c' + i g, h = o tanh(c)."""

    def __init__(self, scan: _Direction, c0: Tensor) -> None:
        self.i, self.f, self.g, self.o = scan.gates()
        self.scan = scan
        self.keeps, c = self.f.unbind(0), c0
        cells, before = [], []
        for t, written in enumerate((self.i * self.g).unbind(0)):
            entering, active = scan.entering(t, c), scan.actives[t]
            new = torch.addcmul(written, self.keeps[t], entering)
            before.append(entering)
            cells.append(new)
            c = new if active is None else torch.where(active, new, c)
        self.c_before, self.tanh_c = torch.stack(before), torch.tanh(torch.stack(cells))
        self.slope = 1 - self.tanh_c * self.tanh_c
        self.to_h = self.o * self.slope  # from c
        self.unprojected = self.o * self.tanh_c
        self.slopes = tuple(s * (1 - s) for s in (self.i, self.f, self.o))
        of_i, of_f, of_o = self.slopes
        self.gain = torch.cat(
            (
                self.g * of_i,
                self.c_before * of_f,
                self.i * (1 - self.g * self.g),
                self.tanh_c * of_o,
            ),
            -1,
        )
        self.to_hs = self.to_h.unbind(0)

    def step(
        self, t: int, moved: Tensor, others: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_i, by_f, by_g, by_o = moved.chunk(4, -1)
        new = torch.addcmul(by_i + by_f + by_g, self.keeps[t], c)
        return torch.addcmul(by_o, self.to_hs[t], new), new

    def of_c(self, d_h: Tensor, d_cn: Maybe) -> Maybe:
        end = self.scan.after(torch.zeros_like(self.f), d_cn)
        return self.scan.summed(torch.addcmul(end, self.to_h, d_h), self.f)

    def curve(self, moved: _Moved, d_h: Tensor, d_c: Any) -> tuple[Tensor, Maybe]:
        i, f, g, o, tanh_c = self.i, self.f, self.g, self.o, self.tanh_c
        of_i, of_f, of_o = self.slopes
        a_i, a_f, a_g, a_o = moved.slots.chunk(4, -1)
        v_i, v_f, v_o, v_g = of_i * a_i, of_f * a_f, of_o * a_o, (1 - g * g) * a_g
        v_tanh_c = self.slope * moved.c
        curved = torch.cat(
            (
                (v_g * of_i + g * (1 - 2 * i) * v_i) * d_c,
                (moved.c_before * of_f + self.c_before * (1 - 2 * f) * v_f) * d_c,
                (v_i * (1 - g * g) - 2 * i * g * v_g) * d_c,
                (v_tanh_c * of_o + tanh_c * (1 - 2 * o) * v_o) * d_h,
            ),
            -1,
        )
        self.curved_c = ((v_o * self.slope - 2 * o * tanh_c * v_tanh_c) * d_h).unbind(0)
        self.handed_c = (v_f * d_c).unbind(0)
        return curved, None

    def back(self, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Maybe, Tensor]:
        now = torch.addcmul(c + self.curved_c[t], self.to_hs[t], h)
        before = torch.addcmul(self.handed_c[t], self.keeps[t], now)
        return torch.cat((now, now, now, h), -1), None, before


class _Gru(_Elman):
    """h = (1 - z) n + z h', n = tanh(a_n + r m); slots m, r, z, n."""

    def __init__(self, scan: _Direction, c0: Tensor) -> None:
        self.m, self.r, self.z, self.n = scan.gates()
        self.scan, self.keeps = scan, self.z.unbind(0)
        self.to_h = (1 - self.z) * (1 - self.n * self.n)  # from the argument of tanh
        self.of_r, self.of_z = self.r * (1 - self.r), self.z * (1 - self.z)
        self.gain = torch.cat(
            (
                self.to_h * self.r,
                self.to_h * self.m * self.of_r,
                (scan.h_before - self.n) * self.of_z,
                self.to_h,
            ),
            -1,
        )

    def step(
        self, t: int, moved: Tensor, others: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_m, by_r, by_z = moved.chunk(3, -1)
        return torch.addcmul(by_m + by_r + by_z + others, self.keeps[t], h), c

    def of_h(self, own: Tensor) -> Tensor:
        return self.scan.summed(own, self.z)

    def curve(self, moved: _Moved, d_h: Tensor, d_c: Any) -> tuple[Tensor, Maybe]:
        m, r, z, n, to_h = self.m, self.r, self.z, self.n, self.to_h
        v_m, a_r, a_z, a_n = moved.slots.chunk(4, -1)
        v_r, v_z = self.of_r * a_r, self.of_z * a_z
        v_n = (1 - n * n) * (a_n + v_r * m + r * v_m)
        v_to_h = -v_z * (1 - n * n) - 2 * (1 - z) * n * v_n
        of_gains = (
            v_to_h * r + to_h * v_r,
            (v_to_h * m + to_h * v_m) * self.of_r + to_h * m * (1 - 2 * r) * v_r,
            (moved.h_before - v_n) * self.of_z + (self.scan.h_before - n) * (1 - 2 * z) * v_z,
            v_to_h,
        )
        return torch.cat([part * d_h for part in of_gains], -1), v_z * d_h

    def back(self, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Maybe, Tensor]:
        return torch.cat((h, h, h, h), -1), self.keeps[t] * h, c


_CELLS: dict[str, type[_Elman]] = {
    "RNN_TANH": _Elman,
    "RNN_RELU": _Elman,
    "LSTM": _Lstm,
    "GRU": _Gru,
}


def _as(dtype: torch.dtype, z: Tensor) -> Tensor:
    return z if z.dtype == dtype else z.to(dtype)


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    return parts[0][None] if len(parts) == 1 else torch.stack(tuple(parts))


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -1)


def _product(left: Tensor, right: Tensor, more: Maybe = None) -> Tensor:
    left, right = left.flatten(0, 1).t(), right.flatten(0, 1)
    return left @ right if more is None else torch.addmm(more, left, right)
