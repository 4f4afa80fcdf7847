"""Modes of torch, and tensors that are not plain ones."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from support import PassingMode, flatten
from torch import Tensor, nn

from like_torch_nn import (
    ROWS,
    Row,
    Side,
    attempt,
    first,
    loss_of,
    warned,
)

MODES: dict[str, Any] = {
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "no-inference": lambda: torch.inference_mode(False),
    "grad-off": lambda: torch.set_grad_enabled(False),
    "grad-on-again": lambda: _nested(torch.no_grad(), torch.enable_grad()),
    "forked-random-numbers": torch.random.fork_rng,
    "no-saved-tensors-hooks": lambda: torch.autograd.graph.disable_saved_tensors_hooks("none"),
    "anomaly": torch.autograd.detect_anomaly,
    "multithreading-off": lambda: torch.autograd.set_multithreading_enabled(False),
    "save-on-cpu": torch.autograd.graph.save_on_cpu,
    "saved-tensors-hooks": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(), lambda t: t.clone()
    ),
    "saved-tensors-hooks-numpy": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.detach().numpy().copy(), torch.from_numpy
    ),
    "mutation-allowed": torch.autograd.graph.allow_mutation_on_saved_tensors,
    # Without acc_events torch up to 2.12 warns, once in a process.
    "profiler": lambda: torch.profiler.profile(acc_events=True),
    "record-function": lambda: torch.profiler.record_function("mine"),
    "function-mode": PassingMode,
    "function-mode-that-doubles": lambda: _DoublingMode(),
    "function-mode-and-device": lambda: _nested(_DoublingMode(), torch.device("cpu")),
    "dispatch-mode": lambda: _passing_dispatch(),
    "device-context": lambda: torch.device("cpu"),
    "no-mkldnn": lambda: torch.backends.mkldnn.flags(enabled=False),
    "no-cudnn": lambda: torch.backends.cudnn.flags(enabled=False),
    "flop-counter": lambda: _flop_counter(),
    "autocast-off": lambda: torch.autocast("cpu", enabled=False),
    "autocast": lambda: torch.autocast("cpu"),
    "autocast-without-cache": lambda: torch.autocast("cpu", cache_enabled=False),
}


@contextlib.contextmanager
def _nested(*contexts: Any) -> Any:
    with contextlib.ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        yield


class _DoublingMode(torch.overrides.TorchFunctionMode):
    """Doubles what the functions of recurrent layers return."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if not func.__name__.startswith(("rnn_", "lstm", "gru")):
            return made
        return 2 * made if isinstance(made, Tensor) else tuple(2 * each for each in made)


def _passing_dispatch() -> Any:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Passing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kw: Any = None) -> Any:
            return func(*args, **(kw or {}))

    return Passing()


def _flop_counter() -> Any:
    from torch.utils.flop_counter import FlopCounterMode

    return FlopCounterMode(display=False)


def within(mode: Any, rounded: bool) -> Row:
    def row(side: Side) -> Any:
        module = side.make()

        def call() -> Any:
            with mode():
                outputs = flatten(module(side.x(), side.hx()))
                loss = loss_of(list(outputs.values()))
                if loss.requires_grad:
                    loss.backward()
            seen = [(y.dtype, y.is_inference(), y.requires_grad) for y in outputs.values()]
            values = [*outputs.values(), *(p.grad for p in module.parameters())]
            if rounded:  # autocast rounds to 16 bits on the way
                values = [v.to(torch.bfloat16) for v in values]
            return values, seen

        return warned(call)

    return row


ROWS.add({f"within-{name}": within(mode, "autocast" in name) for name, mode in MODES.items()})


@ROWS.row()
def results_of_inference_used_later(side: Side) -> Any:
    module = side.make()
    with torch.inference_mode():
        outputs = module(side.x())
    later = first(outputs)
    return attempt(lambda: later.mul_(2)), attempt(lambda: later * nn.Parameter(torch.ones(1)))


@ROWS.row()
def no_grad_as_a_decorator(side: Side) -> Any:
    return torch.no_grad()(side.make())(side.x())


@ROWS.row()
def fake_tensors(side: Side) -> Any:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        outputs = side.make()(torch.randn(side.x().shape))
        return [(type(y).__name__, y.shape, y.dtype) for y in flatten(outputs).values()]


@ROWS.row()
def a_module_on_meta(side: Side) -> Any:
    outputs = side.make(device="meta")(side.x(device="meta"))
    return [(y.shape, y.device.type, y.requires_grad) for y in flatten(outputs).values()]


class Tagged(Tensor):
    """A tensor subclass that says which functions saw it."""


@ROWS.row()
def tensor_subclasses(side: Side) -> Any:
    outputs = side.make()(side.x().as_subclass(Tagged))
    return [(type(y).__name__, y.as_subclass(Tensor)) for y in flatten(outputs).values()]


@ROWS.row()
def weights_of_a_tensor_subclass(side: Side) -> Any:
    module = side.make()
    weight = getattr(module, side.weight).detach().as_subclass(Tagged)
    setattr(module, side.weight, nn.Parameter(weight))
    outputs = module(side.x())
    return [(type(y).__name__, y.as_subclass(Tensor)) for y in flatten(outputs).values()]


@ROWS.row()
def inputs_made_in_inference_mode(side: Side) -> Any:
    with torch.inference_mode():
        x, hx = side.x(), side.hx()
    seen = [attempt(lambda g=g: side.outcome(side.make(), *g)) for g in ((x,), (side.x(), hx))]
    return [type(each).__name__ for each in seen], side.make().requires_grad_(False)(x, hx)
