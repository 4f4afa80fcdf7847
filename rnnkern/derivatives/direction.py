"""One direction of a layer: what small changes of its operands do, step by step."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear, pad

from rnnkern.derivatives.cells import DERIVATIVES, OfStep
from rnnkern.derivatives.frames import Frames, as_dtype, columns, rows_of
from rnnkern.known_cells import CELLS
from rnnkern.layer import Layer, Maybe, Operands


class Weights(NamedTuple):
    """The weights of one direction, those of ``rec`` in the order of the slots.

    ``own`` are the parameters of the cell. They count as slots behind the others, which no product
    enters.
    """

    ih: Maybe
    rec: Maybe = None
    b_ih: Maybe = None
    b_rec: Maybe = None
    hr: Maybe = None
    own: tuple[Maybe, ...] = ()


class Change(NamedTuple):
    """Changes of one direction's input, in frames, and of its initial states."""

    x: Maybe
    h0: Tensor
    c0: Tensor


class Moved(NamedTuple):
    """Changes, by step: of the sums of the slots, and of the states after and before each step."""

    slots: Tensor
    h: Tensor
    h_before: Tensor
    c: Any
    c_before: Any
    unprojected: Tensor
    hn: Tensor
    cn: Tensor


class Adjoint(NamedTuple):
    """Changes of the gradients of slots, of initial states, and of projected states."""

    slots: Tensor
    h0: Tensor
    c0: Tensor
    projected: Maybe
    v_projected: Maybe


class Direction:
    """One direction of a layer, and what small changes of its operands do.

    What depends on the cell is in `rnnkern.derivatives.cells`.
    """

    def __init__(
        self, layer: Layer, frames: Frames, d: int, at: Operands, linearized: bool = True
    ) -> None:
        self.layer, self.frames, self.d = layer, frames, d
        self.H = layer.hidden([w for w in at.weights if w is not None])
        self.C = max(1, CELLS[layer.mode].planes) * self.H  # features of c
        self.recurrent = CELLS[layer.mode].gates * self.H  # slots of that product: the first ones
        self.end = layer.slots * self.H  # of the slots that products enter
        self.free = self.end - self.recurrent  # slots of the input product alone
        self.has_rec = CELLS[layer.mode].recurrent
        self.w = self.weights_of(at)
        self.x: Tensor = frames.of(at.x, d)
        y: Any = at.y
        self.O = y.shape[-1] // layer.directions
        if not self.has_rec:
            self.w = self.w._replace(rec=self.x.new_zeros(self.recurrent, self.O))
        self.h: Tensor = frames.of(columns(y, d * self.O, (d + 1) * self.O), d)
        self.active, self.goes_on = frames.active(d), frames.goes_on(d)
        self.actives = [None] * frames.T if self.active is None else self.active.unbind(0)
        self.h_before = self.before(self.h, frames.state(at.h0, d, self.x, self.O))
        if linearized:
            c0 = frames.state(at.c0, d, self.x, self.C)
            self.cell: Any = self._kind(self, c0)
            self.gains = self.cell.gain.unbind(0)

    @property
    def _kind(self) -> Any:
        return DERIVATIVES.get(self.layer.mode, OfStep)

    # Operands

    def weights_of(self, operands: Operands) -> Weights:
        count = self.layer.tensors
        own = operands.weights[self.d * count : (self.d + 1) * count]
        cast = [None if w is None else as_dtype(self.frames.computed, w) for w in own]
        ih, *rest = cast
        rec = self._in_slots(rest.pop(0)) if self.has_rec else None
        b_ih = rest.pop(0) if self.layer.bias else None
        b_rec = self._in_slots(rest.pop(0)) if self.layer.bias and self.has_rec else None
        hr = rest.pop(0) if self.layer.proj else None
        return Weights(ih, rec, b_ih, b_rec, hr, tuple(rest))

    def _in_slots(self, w: Any, sign: int = 1, axis: int = 0) -> Any:
        """The gates of a recurrent weight in the order of the slots; with sign -1 back again."""
        return torch.roll(w, sign * self.free, axis) if self.free and w is not None else w

    def change_of(self, change: Operands) -> Change:
        return Change(
            self.frames.of(change.x, self.d),
            self.frames.state(change.h0, self.d, self.x, self.O),
            self.frames.state(change.c0, self.d, self.x, self.C),
        )

    def sums(self, inputs: Sequence[tuple[Maybe, Maybe]], w: Weights, more: Maybe = None) -> Tensor:
        """The sums of the slots, ``[T, N, S * H]``, in a new tensor, and the parameters behind.

        They are the inputs times a weight each, if neither is None, the states before each step
        times the recurrent weights of w, its biases, and ``more``.
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
        if w.own:
            rows, none = (*made.shape[:2], self.H), made.new_zeros(self.H)
            parts = [(none if part is None else part).expand(rows) for part in w.own]
            made = torch.cat((made, *parts), -1)
        return made if more is None else made + more

    def _padded(self, w: Tensor, recurrent: int) -> Tensor:
        """Weights of the input product or of the recurrent one for all slots."""
        if not self.free:
            return w
        zeros = (0, self.free) if recurrent else (self.free, 0)
        return pad(w, zeros if w.dim() == 1 else (0, 0, *zeros))

    def gates(self) -> tuple[Tensor, ...]:
        """The slots as the cell saves them, for all steps."""
        sums = self.sums([(self.x, self.w.ih)], self.w)
        return self._kind.activated(*sums.chunk(self.layer.slots, -1))  # type: ignore[no-any-return]

    def cell_updates(self, gates: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """``kept, written`` of all steps, with c(t) = kept(t) c(t-1) + written(t)."""
        return self._kind.cell_updates(*gates)  # type: ignore[no-any-return]

    # Episodes and ends

    def entering(self, t: int, state: Tensor) -> Tensor:
        """The state before step t, from the state after the step before."""
        return state if self.goes_on is None else torch.where(self.goes_on[t], state, 0)

    def before(self, states: Tensor, first: Tensor) -> Tensor:
        """The states before each step."""
        earlier = states[:-1]
        if self.active is not None:
            earlier = torch.where(self.active[:-1], earlier, first)
        before = torch.cat((first[None], earlier))
        return before if self.goes_on is None else torch.where(self.goes_on, before, 0)

    def after(self, z: Tensor, end: Maybe) -> Tensor:
        """z of the next step: 0 at the end of an episode, ``end`` at the end of a row."""
        z = z if self.goes_on is None else torch.where(self.goes_on, z, 0)
        last = torch.zeros_like(z[0]) if end is None else end
        rest = z[1:] if self.active is None else torch.where(self.active[1:], z[1:], last)
        return torch.cat((rest, last[None]))

    def handed_to_start(self, z: Tensor) -> Tensor:
        """z of the step that begins with the initial state, for each row."""
        if self.goes_on is not None:
            z = torch.where(self.goes_on, z, 0)
        if self.active is None:
            return z[0]
        earlier = torch.cat((torch.zeros_like(self.active[:1]), self.active[:-1]))
        return torch.where(self.active & ~earlier, z, 0).sum(0)

    def summed(self, own: Tensor, keeps: Tensor) -> Tensor:
        """s of s(t) = own(t) + keeps(t+1) s(t+1), within an episode and a row."""
        factors = self.after(keeps, None)
        now, found = own[-1], [own[-1]]
        for source, factor in zip(own[:-1].flip(0), factors[:-1].flip(0), strict=True):
            now = torch.addcmul(source, factor, now)
            found.append(now)
        return torch.stack(found[::-1])

    def recurrent_of(self, slots: Tensor) -> Tensor:
        """The slots to which h W_hh is added."""
        return columns(slots, 0, self.recurrent)

    def free_of(self, slots: Tensor) -> Tensor:
        """The slots to which x W_ih is added."""
        return columns(slots, self.free, self.end)

    def taken(self, z: Tensor) -> Tensor:
        """z, with zeros at steps at which a row is not active."""
        return z if self.active is None else torch.where(self.active, z, 0)

    # Scans

    def fixed_sums(self, v_w: Weights, v: Change, v_slots: Maybe) -> Tensor:
        """The changes of the sums of the slots, without those that come from the states."""
        return self.sums([(v.x, self.w.ih), (self.x, v_w.ih)], v_w, v_slots)

    def tangent(self, v_w: Weights, v: Change, fixed: Tensor) -> Moved:
        """All changes, in the order of the steps."""
        own = self.recurrent_of(fixed).unbind(0)
        alone = fixed[..., self.recurrent :]
        others = (self.cell.gain[..., self.recurrent :] * alone).unbind(0)
        w_rec, w_hr = self.w.rec.t(), None if self.w.hr is None else self.w.hr.t()  # type: ignore[union-attr]
        crossing = None if v_w.hr is None else (self.cell.unprojected @ v_w.hr.t()).unbind(0)
        h, c = v.h0, v.c0
        steps = []
        for t, active in enumerate(self.actives):
            h_in, c_in = self.entering(t, h), self.entering(t, c)
            total = torch.addmm(own[t], h_in, w_rec)
            moved = total * self.recurrent_of(self.gains[t])
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
        return Moved(sums, h_new, h_in, c_new, c_in, unprojected, h, c)

    def of_states(
        self, slots: Tensor, incoming: tuple[Maybe, Maybe, Maybe]
    ) -> tuple[Tensor, Maybe]:
        """Gradients of each step's h and c, through everything that uses them."""
        assert self.w.rec is not None
        d_y, d_hn, d_cn = incoming
        own = self.after(self.recurrent_of(slots) @ self.w.rec, d_hn)
        own = own if d_y is None else own + d_y
        return self.cell.of_states(own, self.w.hr, d_cn)  # type: ignore[no-any-return]

    def flow(self, slots: Tensor, incoming: tuple[Maybe, Maybe, Maybe]) -> tuple[Tensor, Maybe]:
        """`of_states`, with the gradients of c that pass through h of the same step for every
        cell.
        """
        d_h, d_c = self.of_states(slots, incoming)
        more = self.cell.of_c_through_h(d_h if self.w.hr is None else d_h @ self.w.hr)
        return d_h, d_c if more is None or d_c is None else d_c + more

    def adjoint(
        self,
        v_w: Weights,
        moved: Moved,
        slots: Tensor,
        incoming: tuple[Maybe, Maybe, Maybe],
        changes: tuple[Maybe, Maybe, Maybe],
    ) -> Adjoint:
        """Changes of the gradients, in the order of backward."""
        rec, w_rec, w_hr = self.recurrent_of(slots), self.w.rec, self.w.hr
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
        c = self.x.new_zeros(self.frames.N, self.C) if c is None else c
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
            before = self.recurrent_of(d_slots) @ w_rec
            for part in (None if hands is None else hands[t], direct):
                before = before if part is None else before + part
            before, c_before = self.entering(t, before), self.entering(t, c_before)
            h = before if active is None else torch.where(active, before, h)
            c = c_before if active is None else torch.where(active, c_before, c)
        return Adjoint(
            self.taken(torch.stack(found[::-1])),
            h,
            c,
            None if d_projected is None else self.taken(d_projected),
            self.taken(torch.stack(projected[::-1])) if projected else None,
        )

    # Products over all steps

    def products(
        self, v_w: Weights, v: Change, moved: Moved, slots: Tensor, found: Adjoint
    ) -> tuple[Tensor, list[Tensor]]:
        """Changes of the gradients of the input and of the weights."""
        assert self.w.ih is not None
        inputs, v_inputs = (self.free_of(z) for z in (slots, found.slots))
        rec, v_rec = self.recurrent_of(slots), self.recurrent_of(found.slots)
        x = v_inputs @ self.w.ih
        if v_w.ih is not None:
            x = x + inputs @ v_w.ih
        of_ih = _product(v_inputs, self.x)
        if v.x is not None:
            of_ih = _product(inputs, v.x, of_ih)
        of_rec = _product(rec, moved.h_before, _product(v_rec, self.h_before))
        of_biases = v_inputs.sum((0, 1)), self._in_slots(v_rec.sum((0, 1)), -1)
        weights = self._of_layer(of_ih, self._in_slots(of_rec, -1), *of_biases)
        if found.projected is not None and found.v_projected is not None:
            of_hr = _product(found.v_projected, self.cell.unprojected)
            weights.append(_product(found.projected, moved.unprojected, of_hr))
        weights += self._own_of(found.slots.sum((0, 1)))
        return x, [as_dtype(self.frames.dtype, w) for w in weights]

    def _of_layer(self, ih: Tensor, rec: Tensor, b_ih: Tensor, b_rec: Tensor) -> list[Tensor]:
        """Those that the layer has, in the order of its weights."""
        found = [ih, rec] if self.has_rec else [ih]
        if self.layer.bias:
            found += [b_ih, b_rec] if self.has_rec else [b_ih]
        return found

    def _own_of(self, sums: Tensor) -> list[Tensor]:
        """What belongs to the cell's own parameters, of sums over all rows."""
        own = sums[..., self.end :]
        return list(torch.split(own, self.H, -1)) if own.shape[-1] else []

    def weight_gradients(self, slots: Tensor, groups: int) -> list[Tensor]:
        def grouped(z: Tensor) -> Tensor:
            own = z.reshape(z.shape[0], -1, groups, z.shape[-1])
            return own.permute(2, 0, 1, 3).reshape(groups, -1, z.shape[-1])

        inputs = grouped(self.free_of(slots))
        rec = grouped(self.recurrent_of(slots))
        of_rec = self._in_slots(rec.mT @ grouped(self.h_before), -1, 1)
        of_biases = inputs.sum(1), self._in_slots(rec.sum(1), -1, 1)
        own = self._of_layer(inputs.mT @ grouped(self.x), of_rec, *of_biases)
        own += self._own_of(grouped(slots).sum(1))
        return [as_dtype(self.frames.dtype, w) for w in own]


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts), -1)


def _product(left: Tensor, right: Tensor, more: Maybe = None) -> Tensor:
    left, right = rows_of(left).t(), rows_of(right)
    return left @ right if more is None else torch.addmm(more, left, right)
