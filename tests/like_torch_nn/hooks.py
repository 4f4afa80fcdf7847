"""Hooks on modules, parameters and outputs."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import torch
from support import flatten
from torch import nn

from like_torch_nn import (
    ROWS,
    Side,
    attempt,
    first,
    gradients,
    loss_of,
    warned,
)


@ROWS.row()
def forward_hooks(side: Side) -> Any:
    module, seen = side.make(), []
    handles = [
        module.register_forward_pre_hook(lambda m, args: (args[0] * 2,)),
        module.register_forward_pre_hook(lambda m, args: seen.append(("pre", args))),
        module.register_forward_hook(lambda m, args, out: seen.append(("hook", args, out))),
        module.register_forward_hook(lambda m, args, out: first(out) * 3),
        module.register_forward_hook(lambda m, args, out: seen.append(("first", 1)), prepend=True),
    ]
    outputs = module(side.x())
    for handle in handles:
        handle.remove()
    return seen, outputs, module(side.x())


@ROWS.row()
def forward_hooks_with_keywords(side: Side) -> Any:
    module, seen = side.make(), []

    def before(m: Any, args: Any, kwargs: Any) -> Any:
        seen.append((args, list(kwargs)))
        return (), {"input": args[0] * 2, "hx": kwargs["hx"]}

    def after(m: Any, args: Any, kwargs: Any, outputs: Any) -> Any:
        seen.append((len(args), list(kwargs), outputs))

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after, with_kwargs=True)
    return module(side.x(), hx=side.hx()), seen


@ROWS.row()
def forward_hooks_called_in_any_case(side: Side) -> Any:
    module, seen = side.make(), []
    module.register_forward_hook(lambda m, a, out: seen.append(("always", out)), always_call=True)
    module.register_forward_hook(lambda m, a, out: seen.append(("not", out)))
    told = attempt(lambda: module(torch.tensor(1.0)))
    return told, seen


@ROWS.row()
def a_hook_that_returns_nonsense(side: Side) -> Any:
    module = side.make()
    module.register_forward_pre_hook(lambda m, args, kwargs: 3, with_kwargs=True)
    return attempt(lambda: module(side.x()))


@ROWS.row()
def backward_hooks(side: Side) -> Any:
    module, seen = side.make(), []
    module.register_full_backward_pre_hook(lambda m, out: seen.append(("pre", out)))
    module.register_full_backward_hook(lambda m, into, out: seen.append(("hook", into, out)))
    module.register_full_backward_hook(
        lambda m, into, out: tuple(None if g is None else g * 2 for g in into)
    )
    x = side.x().requires_grad_()
    outputs = module(x)
    name = first(outputs).grad_fn.name()
    told = warned(lambda: first(outputs).square().sum().backward())[1]
    return seen, told, x.grad, name, {n: p.grad for n, p in module.named_parameters()}


@ROWS.row()
def backward_hooks_without_a_gradient_of_the_input(side: Side) -> Any:
    module, seen = side.make(), []
    module.register_full_backward_hook(lambda m, into, out: seen.append((into, out)))
    told = warned(lambda: loss_of(module(side.x())).backward())[1]
    return seen, told


@ROWS.row()
def backward_hooks_that_change_what_comes_in(side: Side) -> Any:
    module = side.make()
    module.register_full_backward_pre_hook(
        lambda m, out: tuple(None if g is None else g * 2 for g in out)
    )
    return side.outcome(module)


@ROWS.row()
def the_old_backward_hook(side: Side) -> Any:
    module, seen = side.make(), []
    module.register_backward_hook(lambda m, into, out: seen.append("called"))
    warned(lambda: loss_of(module(side.x())).backward())
    return seen, attempt(lambda: module.register_full_backward_hook(lambda *a: None))


@ROWS.row()
def hooks_of_all_modules(side: Side) -> Any:
    hooks = torch.nn.modules.module
    seen: list[Any] = []

    def note(what: str) -> Any:
        return lambda m, *rest: seen.append((what, type(m).__name__, len(rest)))

    module = nn.Sequential(side.make())
    handles = [
        hooks.register_module_forward_pre_hook(note("pre")),
        hooks.register_module_forward_hook(note("hook")),
        hooks.register_module_full_backward_hook(note("backward")),
        hooks.register_module_full_backward_pre_hook(note("backward pre")),
        hooks.register_module_parameter_registration_hook(note("parameter")),
        hooks.register_module_buffer_registration_hook(note("buffer")),
        hooks.register_module_module_registration_hook(note("module")),
    ]
    try:
        result = side.outcome(module)
        other = side.make()
        other.register_buffer("b", torch.ones(1))
        other.child = nn.Identity()
    finally:
        for handle in handles:
            handle.remove()
    return seen, result


@ROWS.row()
def hooks_of_parameters(side: Side) -> Any:
    module, seen = side.make(), []
    weight = getattr(module, side.weight)
    weight.register_hook(lambda grad: grad * 2)
    weight.register_hook(lambda grad: seen.append(grad))
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(("after", p.grad)))
    return side.outcome(module), seen


@ROWS.row()
def hooks_of_outputs(side: Side) -> Any:
    module, seen = side.make(), []
    outputs = flatten(module(side.x()))
    for name, y in outputs.items():
        y.retain_grad()
        y.register_hook(lambda grad, name=name: seen.append((name, grad)))
    result = gradients(module, outputs)
    seen.sort(key=lambda each: each[0])
    return result, seen, [y.grad for y in outputs.values()]


@ROWS.row()
def hooks_of_an_output_without_gradient(side: Side) -> Any:
    module, seen = side.make(), []
    *_, used = outputs = list(flatten(module(side.x())).values())
    for i, y in enumerate(outputs):
        y.register_hook(lambda grad, i=i: seen.append((i, grad)))
    used.sum().backward()
    return sorted(seen, key=lambda each: each[0])


@ROWS.row()
def multi_grad_hooks(side: Side) -> Any:
    module, seen = side.make(), []
    torch.autograd.graph.register_multi_grad_hook(
        list(module.parameters()), lambda grads: seen.append([g.shape for g in grads])
    )
    return side.outcome(module), seen


@ROWS.row()
def a_forward_of_the_instance(side: Side) -> Any:
    """Put there by tracers and quantizers."""
    module = side.make()
    old = module.forward
    module.forward = lambda *args, **kwargs: old(args[0] * 2, *args[1:], **kwargs)
    return side.outcome(module), "forward" in vars(module)


def _doubled(module: nn.Module, args: Any) -> Any:
    return args[0] * 2


@ROWS.row()
def copies_with_hooks(side: Side) -> Any:
    module = side.make()
    handle = module.register_forward_pre_hook(_doubled)
    copied, pickled = copy.deepcopy(module), pickle.loads(pickle.dumps(module))
    handle.remove()
    return [m(side.x()) for m in (module, copied, pickled)]


@ROWS.row()
def a_step_of_the_optimizer_in_backward(side: Side) -> Any:
    module = side.make()
    optimizers = {p: torch.optim.SGD([p], 0.1) for p in module.parameters()}

    def step(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in module.parameters():
        parameter.register_post_accumulate_grad_hook(step)
    loss_of(module(side.x())).backward()
    return module.state_dict(), [p.grad for p in module.parameters()]
