"""The gradients of the weights of a cell that is called many times in one graph.

Every call has gradients of the same weights. Autograd would have each backward step write a new
tensor for each of them, and would add it to the sum of those before: for a decoder of 100 steps
that moves more memory than the products do. Here the kernel of a step adds its own to the sum.

The sum is the tensor that the first step of a backward pass has returned, while it waits in
autograd's buffer; the later steps return nothing. It waits there until the last step is done,
because all of them, and nobody else, hand their gradients to views of the weights that are made for
this purpose; and nobody but the buffer holds it, so when it has gone on, there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

_task: Callable[[], int] = torch._C._current_graph_task_id


class Sums:
    """Of the gradients of some weights, in each backward pass that is under way."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self._views = [ref(view) for view in views]
        self._sums: dict[int, list[ref[Tensor] | None]] = {}

    def views_of(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """The views, if they are those of these weights as they are now; else None."""
        views = [view() for view in self._views]
        for view, weight in zip(views, weights, strict=True):
            if view is None or view.data_ptr() != weight.data_ptr() or view.shape != weight.shape:
                return None
        return views  # type: ignore[return-value]

    def adding(self, backward: Callable[..., Any], count: int) -> Callable[..., Any]:
        """The backward pass of a step, such that it adds the gradients of its ``count`` weights."""

        def run(*operands: Any) -> Any:
            *_, wanted, _ = operands
            found = self._found(wanted[1 : 1 + count])
            if found:
                return backward(*operands, found)
            gradients, slots = backward(*operands)
            self._keep(gradients[1 : 1 + count])
            return gradients, slots

        return run

    def _found(self, wanted: Sequence[bool]) -> list[Tensor | None] | None:
        refs = self._sums.get(_task())
        if refs is None:
            return None
        found = [None if each is None else each() for each in refs]
        is_there = all(z is not None or not flag for z, flag in zip(found, wanted, strict=True))
        return found if is_there else None

    def _keep(self, gradients: Sequence[Tensor | None]) -> None:
        waiting = self._sums.items()
        self._sums = {
            task: refs for task, refs in waiting if any(r and r() is not None for r in refs)
        }
        self._sums[_task()] = [None if each is None else ref(each) for each in gradients]


class Loop:
    """The calls of a cell with one and the same ``weight_ih``."""

    def __init__(self, weight: Tensor) -> None:
        key = id(weight)
        self.weight = ref(weight, lambda _: _loops.pop(key, None))
        self.is_recorded = False
        """There has been a call since the last backward pass."""
        self._sums: Sums | None = None

    def sums_of(self, weights: Sequence[Tensor]) -> tuple[Sums, Sequence[Tensor]]:
        """What another call of a loop records, and the views of the weights for it.

        The views live as long as the graph, which holds them; and no longer.
        """
        views = None if self._sums is None else self._sums.views_of(weights)
        if views is None:
            views = [weight.view_as(weight) for weight in weights]
            self._sums = Sums(views)
        assert self._sums is not None
        return self._sums, views


_loops: dict[int, Loop] = {}


def loop_of(weight: Tensor) -> Loop:
    """That of the cells with this ``weight_ih``."""
    loop = _loops.get(id(weight))
    if loop is None or loop.weight() is not weight:
        loop = _loops[id(weight)] = Loop(weight)
    return loop
