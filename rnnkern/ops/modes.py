"""The modes and transforms of torch that decide what runs: dispatch modes, `torch.func`, vmap."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import forward_ad

from rnnkern.layer import Maybe


def transformed() -> bool:
    """Whether a transform of `torch.func` or forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def without_rules() -> bool:
    """Whether a transform is active for which a ``torch.autograd.Function`` has no rule.

    These are `torch.func.functionalize`, and a jvp inside another one, which torch runs with the
    outer levels switched off.
    """
    stack = torch._C._functorch.get_interpreter_stack() or ()
    kinds = [each.key() for each in stack]
    of = torch._C._functorch.TransformType
    return of.Functionalize in kinds or kinds.count(of.Jvp) > 1


_depth = torch._C._functorch.get_dynamic_layer_stack_depth
_is_tracked = torch._C._functorch.is_gradtrackingtensor


def only_differentiated(*operands: Maybe) -> bool:
    """Whether transforms of `torch.func` are active, and all of them are gradients.

    ``operands`` are some of those of the call.
    """
    if not torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        return False
    # One transform that has wrapped an operand for gradients: this costs less than the whole stack.
    if _depth() == 1 and any(z is not None and _is_tracked(z) for z in operands):
        return True
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return all(each.key() == torch._C._functorch.TransformType.Grad for each in stack)


def are_batches(*gradients: Maybe) -> bool:
    """Whether the gradients come from ``torch.autograd.grad(..., is_grads_batched=True)``, which
    has its own vmap.
    """
    return any(g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in gradients)


def in_batches(run: Callable[..., Sequence[Maybe]], *gradients: Maybe) -> Sequence[Maybe]:
    """``run(*gradients)``; under `torch.func.vmap` if the gradients are such batches."""
    if not are_batches(*gradients):
        return run(*gradients)
    level = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    dims = tuple(0 if are_batches(g) else None for g in gradients)
    plain = [
        g if dim is None else torch._remove_batch_dim(g, level, 0, 0)  # type: ignore[arg-type]
        for g, dim in zip(gradients, dims, strict=True)
    ]
    is_made: list[bool] = []

    def made(*given: Maybe) -> tuple[Tensor, ...]:
        parts = run(*given)
        is_made[:] = [part is not None for part in parts]
        return tuple(part for part in parts if part is not None)

    parts = iter(torch.func.vmap(made, dims)(*plain))
    return [torch._add_batch_dim(next(parts), 0, level) if flag else None for flag in is_made]


def has_modes() -> bool:
    """Whether a dispatch mode of torch sees every operator."""
    return torch._C._len_torch_dispatch_stack() > 0


def function_mode() -> str | None:
    """The class of a ``TorchFunctionMode`` that is active, other than torch's own; or None.

    It may replace what a function of torch returns, also ``torch.lstm``. torch's own are those of
    a default device, of tracing and the like, which do not.
    """
    for i in range(torch._C._len_torch_function_stack()):
        kind = type(torch._C._get_function_stack_at(i))
        if not kind.__module__.startswith("torch."):
            return kind.__name__
    return None


def apply(function: type[torch.autograd.Function], *operands: Any) -> Any:
    """``function.apply``, which torch leaves untyped."""
    if torch._C._are_functorch_transforms_active():
        return function.apply(*operands)  # type: ignore[no-untyped-call]
    # What `torch.func.vjp` returns is called after its transform has ended. The saved tensors are
    # then still wrapped, and a wrapper says that it requires a gradient.
    operands = unwrap_dead_wrappers(operands)
    return super(torch.autograd.Function, function).apply(*operands)  # type: ignore[misc]
