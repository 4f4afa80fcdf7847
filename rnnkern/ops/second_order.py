"""The derivative of both passes by one kernel call, if the kernels have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import kernels
from rnnkern.layer import Gradients, Maybe, Operands, Recorded, dense
from rnnkern.ops.kernel_ops import ended_rows, kernel_for, runs_on_kernels
from rnnkern.ops.modes import has_modes, transformed


def has_kernel(x: Tensor) -> bool:
    """Whether the kernel runs: on the CPU and on CUDA, if no mode or transform has to see the
    operators and the result need not be differentiable.
    """
    is_covered = x.device.type in ("cpu", "cuda") and x.numel() > 0
    is_seen = torch.is_grad_enabled() or transformed() or has_modes()
    return is_covered and not is_seen and runs_on_kernels(x)


def by_kernel(
    recorded: Recorded,
    gradients: Gradients,
    change: Operands,
    changes: Gradients,
    wanted: Sequence[bool] | None = None,
) -> tuple[Any, Any]:
    """As `derivatives.of_backward`, by a kernel, from what forward has saved.

    ``wanted``: whether to compute the derivatives of the gradients of ``x, h_0, c_0, *weights``,
    which are otherwise None; all by default.
    """
    layer, steps, at, saved = recorded
    dtype, computed = at.x.dtype, torch.promote_types(at.x.dtype, torch.float32)

    def own(z: Maybe) -> Maybe:
        return None if z is None else dense(z.to(computed))

    def operands(given: Operands) -> tuple[Any, ...]:
        return own(given.x), own(given.h0), own(given.c0), [own(w) for w in given.weights]

    def result(z: Any) -> Any:
        return None if z is None else z.to(dtype)

    point = (*operands(at), steps, own(at.y), own(saved))
    point += (own(gradients.slots), [own(z) for z in gradients[:3]])
    tangent = (*operands(change), own(changes.slots), [own(z) for z in changes[:3]])
    of_x, of_h0, of_c0, *of_weights = wanted or [True] * (3 + len(at.weights))
    flags = [of_x, *of_weights]
    flags += [flag for s, flag in ((at.h0, of_h0), (at.c0, of_c0)) if s is not None]
    kernel = kernel_for(layer.code, at.weights)
    run = kernels.profiled(kernel.second_order, layer.mode, " second order")
    outputs, made, slots = run(point, tangent, flags)
    ended = ended_rows(steps)
    if ended is not None:
        slots.masked_fill_(ended, 0)
    made = [result(z) for z in made]
    count = 1 + len(at.weights)
    states = iter(made[count:])
    h0, c0 = (None if s is None else next(states) for s in (at.h0, at.c0))
    y, hn, cn = map(result, outputs)
    return (y, hn, cn), (made[0], h0, c0, made[1:count], result(slots))
