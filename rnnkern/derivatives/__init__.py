"""Derivatives of a layer and of its backward pass, in plain PyTorch.

Given the operands and the outputs, all gates of all steps are one product. What remains to be done
step by step is linear. Every function consists of differentiable operators of torch, so it can be
differentiated, vmapped and traced again, to any order.

``a`` are the sums of the slots (`csrc/cells/cell.h`), ' is a tangent: the change that a given
change v of the operands makes. ``da`` and ``dh`` are gradients of a scalar:

    a'(t) = W_ih x'(t) + W_hh h'(t-1) + W_ih' x(t) + W_hh' h(t-1) + b'
    h'(t) = gain(t) a'(t) + ...
    da'(t) = gain(t) dh'(t) + gain'(t) dh(t)
    dh'(t-1) = W_hh^T da'(t) + W_hh'^T da(t) + ...

The gradients of <v, gradients> are the tangents of the gradients for that v, because second
derivatives commute. So one function serves double backward and forward over reverse.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from rnnkern import autocast
from rnnkern.derivatives.direction import Direction
from rnnkern.derivatives.frames import Frames, stacked
from rnnkern.layer import Gradients, Layer, Maybe, Operands
from rnnkern.sequence import Steps

_F = TypeVar("_F", bound=Callable[..., Any])


def _without_autocast(function: _F) -> _F:
    """Switches autocast off, which was off in the forward pass and may be on in a derivative."""

    @functools.wraps(function)
    def wrapped(layer: Layer, steps: Steps | None, at: Operands, *rest: Any) -> Any:
        assert at.x is not None
        with autocast.switched_off(at.x.device.type):
            return function(layer, steps, at, *rest)

    return wrapped  # type: ignore[return-value]


@_without_autocast
def tangent(
    layer: Layer, steps: Steps | None, at: Operands, change: Operands
) -> tuple[Tensor, Tensor, Maybe]:
    """The tangents of ``y, h_n, c_n`` for a change of the operands."""
    frames = Frames(layer, steps, at)
    found = []
    for d in range(layer.directions):
        scan = Direction(layer, frames, d, at)
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
    """The tangents of the results of the forward and the backward pass.

    Args:
        gradients: the incoming ones, and those of the slots as backward has found them.
        change: of the operands.
        changes: of the incoming gradients. Its ``slots`` are a further change of the sums of the
            slots.

    Returns:
        The tangents of ``y, h_n, c_n``; and those of the gradients of ``x, h_0, c_0, weights`` and
        slots.
    """
    frames = Frames(layer, steps, at)
    changed, adjoints = [], []
    x: Tensor | None = None
    weights: list[Maybe] = []
    for d in range(layer.directions):
        scan = Direction(layer, frames, d, at)
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
        stacked([frames.to_saved(found.slots, d) for d, found in enumerate(adjoints)]),
    )


@_without_autocast
def state_gradients(
    layer: Layer, steps: Steps | None, at: Operands, gradients: Gradients
) -> tuple[list[Tensor], list[Tensor]]:
    """The gradients of each step's h and, for LSTM, c, through everything that uses them.

    Rows are as the layer has them, one tensor a direction.
    """
    frames = Frames(layer, steps, at)
    of_h, of_c = [], []
    for d in range(layer.directions):
        scan = Direction(layer, frames, d, at)
        incoming = frames.incoming(gradients, d)
        d_h, d_c = scan.flow(frames.saved(gradients.slots, d), incoming)
        of_h.append(frames.from_rows(scan.taken(d_h), d))
        if d_c is not None:
            of_c.append(frames.from_rows(scan.taken(d_c), d))
    return of_h, of_c


def direction(layer: Layer, steps: Steps | None, at: Operands, d: int) -> Direction:
    """One direction of a layer, for its `Direction.gates`."""
    return Direction(layer, Frames(layer, steps, at), d, at, linearized=False)


@_without_autocast
def weight_gradients(
    layer: Layer, steps: Steps | None, at: Operands, slots: Tensor, groups: int
) -> list[Tensor]:
    """The gradients of the weights for each of ``groups`` groups of batch rows.

    They follow from the gradients of the slots. A group is every ``groups``-th row. Not for
    projections.

    Returns:
        ``[groups, *weight.shape]`` for each weight.
    """
    frames = Frames(layer, steps, at)
    made: list[Tensor] = []
    for d in range(layer.directions):
        scan = Direction(layer, frames, d, at, linearized=False)
        made += scan.weight_gradients(frames.saved(slots, d), groups)
    return made
