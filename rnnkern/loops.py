"""The gradients of the weights of a cell that is called many times in one graph.

Every call has gradients of the same weights. With autograd alone, each backward step would write a
new tensor for each weight, and autograd would add it to the sum. For a decoder of 100 steps that
moves more memory than the products do. Here the kernel of a step adds its gradients to the sum.

The sum is the tensor that the first step of a backward pass has returned, while it waits in
autograd's buffer. The later steps return nothing. The sum waits there until the last step is done,
because all steps hand their gradients to views of the weights that only these steps use. A step
adds to the sum only if the buffer alone holds it, because a hook may have kept it or replaced it.
How many references the buffer holds is measured once (`_alone`).
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor

_task: Callable[[], int] = torch._C._current_graph_task_id
_use_count: Callable[[Tensor], int] | None = getattr(Tensor, "_use_count", None)
_memory: Callable[[Tensor], int] | None = getattr(torch._C, "_storage_address", None)
_memory_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class Sums:
    """The sums of the gradients of some weights, in each backward pass that is running."""

    def __init__(self, weights: Sequence[Tensor], views: Sequence[Tensor]) -> None:
        self._weights = [id(weight) for weight in weights]
        # A weight without gradient is its own view, and needs no reference.
        self._views = [ref(view) if view.requires_grad else None for view in views]
        self._sums: dict[int, list[ref[Tensor] | None]] = {}

    def views_of(self, weights: Sequence[Tensor]) -> list[Tensor] | None:
        """The views, if they are views of these weights as they are now; else None."""
        if len(weights) != len(self._weights):
            return None
        pairs = zip(self._views, weights, strict=True)
        views = [weight if each is None else each() for each, weight in pairs]
        for view, own, weight in zip(views, self._weights, weights, strict=True):
            if (
                view is None
                or own != id(weight)
                or view.requires_grad != weight.requires_grad
                or view.data_ptr() != weight.data_ptr()
                or view.shape != weight.shape
                or view.stride() != weight.stride()
            ):
                return None
        return views  # type: ignore[return-value]

    def adding(self, backward: Callable[..., Any], count: int) -> Callable[..., Any]:
        """The backward pass of a step, changed to add the gradients of its ``count`` weights."""

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
        if refs is None or torch.is_anomaly_enabled():  # anomaly mode checks what each step returns
            return None
        alone = _alone()
        for each, flag in zip(refs, wanted, strict=True):
            if flag and (each is None or alone is None or _holders(each) != alone):
                return None
        return [
            each() if each is not None and flag else None
            for each, flag in zip(refs, wanted, strict=True)
        ]

    def _keep(self, gradients: Sequence[Tensor | None]) -> None:
        sums = {
            task: refs
            for task, refs in list(self._sums.items())
            if any(each is not None and each() is not None for each in refs)
        }
        sums[_task()] = [None if each is None else ref(each) for each in gradients]
        self._sums = sums  # at once: backward passes may run in several threads


class Loop:
    """The calls of a cell with one and the same ``weight_ih``, as long as the graph of the last one
    waits for its backward pass.
    """

    def __init__(self) -> None:
        self.last: ref[Tensor] | None = None
        """What the last call has kept for its backward pass, which frees it."""
        self._sums: Sums | None = None

    def sums_of(self, weights: Sequence[Tensor]) -> tuple[Sums, Sequence[Tensor]]:
        """What another call of a loop records, and the views of the weights for it.

        The graph holds the views, and nothing else does.
        """
        views = None if self._sums is None else self._sums.views_of(weights)
        if views is None:
            views = [w.view_as(w) if w.requires_grad else w for w in weights]
            self._sums = Sums(weights, views)
            _alone()
        assert self._sums is not None
        return self._sums, views


_loops: dict[int, Loop] = {}
"""By the id of ``weight_ih``, which the graph of the last call holds, because it is no view.

There are no weak references to weights, because `torch.utils.swap_tensors` refuses tensors that
have some.
"""


def loop_of(weight: Tensor) -> Loop | None:
    """The loop of the cells with this ``weight_ih``, if a graph of it waits."""
    return _loops.get(id(weight))


def go_on(loop: Loop | None, weight: Tensor, kept: Tensor) -> None:
    """Makes the call that has kept this for its backward pass the last one of the loop, or of a new
    one.
    """
    key = id(weight)

    def forget(last: ref[Tensor]) -> None:
        found = _loops.get(key)
        if found is not None and found.last is last:
            del _loops[key]

    loop = loop or Loop()
    loop.last = ref(kept, forget)
    _loops[key] = loop


def _holders(tensor: ref[Tensor]) -> tuple[int, int, int] | None:
    """The numbers of references to a tensor, in Python and in C++, and to its memory."""
    found = tensor()
    if found is None or _use_count is None or _memory is None or _memory_use_count is None:
        return None
    # A storage of Python would be one more holder, for as long as the memory lives.
    return sys.getrefcount(found), _use_count(found), _memory_use_count(_memory(found))


@functools.cache
def _alone() -> tuple[int, int, int] | None:
    """The references to a gradient that only autograd's buffer holds; None if torch cannot tell."""
    first: list[ref[Tensor]] = []
    counted: list[tuple[int, int, int] | None] = []

    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Tensor) -> Tensor:
            return weight.new_zeros(())

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor | None:
            if first:
                counted.append(_holders(first[0]))
                return None
            made = torch.zeros(1, device="cpu")
            first.append(ref(made))
            return made

    with torch.enable_grad():
        weight = torch.zeros(1, device="cpu", requires_grad=True)
        view = weight.view_as(weight)
        loss = Step.apply(view) + Step.apply(view)  # type: ignore[no-untyped-call]
        torch.autograd.grad(loss, weight)
    return counted[0]
