"""The local derivatives of each cell: of all steps at once, as far as the steps allow it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rnnkern.derivatives.frames import columns
from rnnkern.known_cells import CELLS
from rnnkern.layer import Maybe

if TYPE_CHECKING:
    from rnnkern.derivatives.direction import Direction, Moved

_vjp: Any = torch.func.vjp


def _no_trace(what: str) -> NotImplementedError:
    return NotImplementedError(
        f"a trace of this cell has no gradients, because no class in DERIVATIVES says how {what}: "
        "call inspect.trace under torch.no_grad()"
    )


class Elman:
    """h(t) = phi(a)."""

    unprojected: Tensor

    def __init__(self, scan: Direction, c0: Tensor) -> None:
        h = scan.h
        is_relu = scan.layer.mode == "RNN_RELU"
        self.gain = (h > 0).to(h.dtype) if is_relu else 1 - h * h
        self.bend = torch.zeros_like(h) if is_relu else -2 * h

    @staticmethod
    def activated(*sums: Tensor) -> tuple[Tensor, ...]:
        """The slots as the cell saves them."""
        raise _no_trace("the gates depend on their sums")

    @staticmethod
    def cell_updates(*gates: Tensor) -> tuple[Tensor, Tensor]:
        """``kept, written`` of c(t) = kept(t) c(t-1) + written(t)."""
        raise _no_trace("c depends on the gates")

    def step(
        self, t: int, moved: Tensor, others: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Changes of h before a projection, and of c, from those of the slots times their gain."""
        return moved, c

    def of_states(self, own: Tensor, w_hr: Maybe, d_cn: Maybe) -> tuple[Tensor, Maybe]:
        """Gradients of each step's h and c. ``own`` reaches h by products and from outside."""
        d_h = self.of_h(own)
        return d_h, self.of_c(d_h if w_hr is None else d_h @ w_hr, d_cn)

    def of_h(self, own: Tensor) -> Tensor:
        """Gradients of each step's h, from those that reach it by products and from outside."""
        return own

    def of_c(self, d_h: Tensor, d_cn: Maybe) -> Maybe:
        """Gradients of each step's c."""
        return None

    def of_c_through_h(self, d_h: Tensor) -> Maybe:
        """What `of_c` leaves out: gradients of c that pass through h of the same step, from those
        of h before a projection. None if it leaves out nothing.
        """
        return None

    def curve(self, moved: Moved, d_h: Tensor, d_c: Any) -> tuple[Tensor, Maybe]:
        """Second-order terms: what the changes of the gains add to da(t) and to dh(t-1)."""
        return self.bend * moved.h * d_h, None

    def back(self, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Maybe, Tensor]:
        """From gradients of h and c: the factor of each slot's gain, the gradient of h(t-1) that
        passes through no product, and the gradient of c(t-1).
        """
        return h, None, c


class Lstm(Elman):
    """c(t) = f c(t-1) + i g, h(t) = o tanh(c(t))."""

    def __init__(self, scan: Direction, c0: Tensor) -> None:
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

    @staticmethod
    def activated(*sums: Tensor) -> tuple[Tensor, ...]:
        i, f, g, o = sums
        return torch.sigmoid(i), torch.sigmoid(f), torch.tanh(g), torch.sigmoid(o)

    @staticmethod
    def cell_updates(*gates: Tensor) -> tuple[Tensor, Tensor]:
        i, f, g, _ = gates
        return f, i * g

    def step(
        self, t: int, moved: Tensor, others: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_i, by_f, by_g, by_o = moved.chunk(4, -1)
        new = torch.addcmul(by_i + by_f + by_g, self.keeps[t], c)
        return torch.addcmul(by_o, self.to_hs[t], new), new

    def of_c(self, d_h: Tensor, d_cn: Maybe) -> Maybe:
        end = self.scan.after(torch.zeros_like(self.f), d_cn)
        return self.scan.summed(torch.addcmul(end, self.to_h, d_h), self.f)

    def curve(self, moved: Moved, d_h: Tensor, d_c: Any) -> tuple[Tensor, Maybe]:
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


class Gru(Elman):
    """h(t) = (1 - z) n + z h(t-1), n = tanh(a_n + r m); slots m, r, z, n."""

    def __init__(self, scan: Direction, c0: Tensor) -> None:
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

    @staticmethod
    def activated(*sums: Tensor) -> tuple[Tensor, ...]:
        m, r, z, n = sums
        r = torch.sigmoid(r)
        return m, r, torch.sigmoid(z), torch.tanh(n + r * m)

    def step(
        self, t: int, moved: Tensor, others: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        by_m, by_r, by_z = moved.chunk(3, -1)
        return torch.addcmul(by_m + by_r + by_z + others, self.keeps[t], h), c

    def of_h(self, own: Tensor) -> Tensor:
        return self.scan.summed(own, self.z)

    def curve(self, moved: Moved, d_h: Tensor, d_c: Any) -> tuple[Tensor, Maybe]:
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


class OfStep(Elman):
    """Any cell, from its step in plain PyTorch: torch derives what the other classes say by hand.

    A step works on each unit separately. So the gradients of a sum over the units are the local
    derivatives, of each new state by each slot and by each state before. Further states are more
    features of c.
    """

    def __init__(self, scan: Direction, c0: Tensor) -> None:
        self.scan, self.shape = scan, CELLS[scan.layer.mode]
        self.has_c, self.reads_h = self.shape.has_cell_state, self.shape.reads_h
        sums = scan.sums([(scan.x, scan.w.ih)], scan.w)
        c, before = c0, []
        for t, active in enumerate(scan.actives):
            before.append(scan.entering(t, c))
            if self.has_c:
                new = torch.cat(self.made(sums[t], scan.h_before[t], before[t])[1:], -1)
                c = new if active is None else torch.where(active, new, c)
        self.at = sums, scan.h_before, torch.stack(before)
        made, pull = _vjp(self.made, *self.at)
        self.unprojected = made[0]
        ones, zeros = torch.ones_like(made[0]), torch.zeros_like(made[0])
        self.of_new: list[Any] = [
            pull(tuple(ones if k == j else zeros for k in range(len(made))))
            for j in range(len(made))
        ]
        self.gain = torch.ones_like(sums)  # the slots' own is in `step` and `back`

    def made(self, sums: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        """The states that a step makes. A sum that both products enter counts as the input's."""
        free, end = self.scan.free, self.scan.end
        b = pad(columns(sums, 0, free), (self.scan.recurrent - free, 0))
        own = torch.split(sums[..., end:], self.scan.H, -1) if self.shape.parameters else ()
        return self.shape.step(columns(sums, free, end), b, self.shape.apart(h, c), *own)

    def _summed_parts(self, z: Tensor) -> Tensor:
        """``[..., parts * H]``, added over the parts."""
        H = self.scan.H
        return z.reshape(*z.shape[:-1], z.shape[-1] // H, H).sum(-2)

    def step(
        self, t: int, moved: Tensor, others: Tensor, h: Tensor, c: Tensor
    ) -> tuple[Tensor, Tensor]:
        slots, changes = torch.cat((moved, others), -1), []
        for of_slots, of_h, of_c in self.of_new:
            made = self._summed_parts(of_slots[t] * slots)
            made = made + of_h[t] * h if self.reads_h else made
            changes.append(made + self._summed_parts(of_c[t] * c) if self.has_c else made)
        return changes[0], torch.cat(changes[1:], -1) if self.has_c else c

    def _before(self, k: int, t: int, *states: Tensor) -> Tensor:
        """From gradients of all new states: that of the slots (0), of h (1) or of c (2) before."""
        parts: list[Tensor] = []
        for of_new, state in zip(self.of_new, states, strict=True):
            local = of_new[k][t]
            parts.append(local * state.repeat(1, local.shape[-1] // self.scan.H))
        return torch.stack(parts).sum(0)

    def _apart(self, h: Tensor, c: Any) -> tuple[Tensor, ...]:
        return self.shape.apart(h, c)

    def of_states(self, own: Tensor, w_hr: Maybe, d_cn: Maybe) -> tuple[Tensor, Maybe]:
        if not self.has_c:
            return (self.scan.summed(own, self.of_new[0][1]) if self.reads_h else own), None
        scan, c0 = self.scan, self.at[2][0]
        end = torch.zeros_like(c0) if d_cn is None else d_cn
        h, c, of_h, of_c = torch.zeros_like(own[0]), end, [], []
        for t in reversed(range(own.shape[0])):
            active = scan.actives[t]
            d_h = own[t] + h if self.reads_h else own[t]
            of_h.append(d_h)
            of_c.append(c)  # as c leaves a step; `of_c_through_h` has the rest
            states = self._apart(d_h if w_hr is None else d_h @ w_hr, c)
            c = scan.entering(t, self._before(2, t, *states))
            if self.reads_h:
                h = scan.entering(t, self._before(1, t, *states))
            if active is not None:  # rows that are not active yet, against the order of the steps
                h, c = torch.where(active, h, 0), torch.where(active, c, end)
        return torch.stack(of_h[::-1]), torch.stack(of_c[::-1])

    def of_c_through_h(self, d_h: Tensor) -> Maybe:
        """Of a function that makes h from its new c, as ``o * tanh(c)``; of cells with h and c."""
        if not self.has_c:
            return None
        is_recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            h, c = self.made(
                *(z if z.requires_grad else z.detach().requires_grad_() for z in self.at)
            )
            if not (h.requires_grad and c.requires_grad):  # one is a number
                return None
            options = {"create_graph": is_recorded, "materialize_grads": True}
            (found,) = torch.autograd.grad(h, c, d_h, **options)
        return found

    def curve(self, moved: Moved, d_h: Tensor, d_c: Any) -> tuple[Tensor, Maybe]:
        def gradients(*at: Tensor) -> Any:
            return _vjp(self.made, *at)[1](self._apart(d_h, d_c))

        # A matrix of second derivatives is its own transpose.
        _, pull = _vjp(gradients, *self.at)
        slots, h, c = pull((moved.slots, moved.h_before, moved.c_before))
        self.handed_c = c
        return slots, h if self.reads_h else None

    def back(self, t: int, h: Tensor, c: Tensor) -> tuple[Tensor, Maybe, Tensor]:
        states = self._apart(h, c)
        before = self._before(2, t, *states) + self.handed_c[t] if self.has_c else c
        direct = self._before(1, t, *states) if self.reads_h else None
        return self._before(0, t, *states), direct, before


DERIVATIVES: dict[str, type[Elman]] = {
    "RNN_TANH": Elman,
    "RNN_RELU": Elman,
    "LSTM": Lstm,
    "GRU": Gru,
}
