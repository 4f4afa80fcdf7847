"""Like torch.nn: calls, hooks around them, the modes of torch that they run in, and subclasses."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
from typing import Any

import pytest
import torch
from like_torch_nn import (
    Difference,
    H,
    I,
    N,
    Row,
    Side,
    T,
    Table,
    attempt,
    drawn,
    first,
    gradients,
    loss_of,
    warned,
)
from support import CELLS, LAYERS, flatten
from torch import Tensor, nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
)

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning"),
]

ROWS = Table()

_CHECKS = "torch.nn's forward calls it, the plain call does not"
_FLAT = "weights are read by their names"

# By row: the reason, and the kinds of module.
DIFFERENCES: dict[str, Difference] = {
    "results-resized-to-more": ("small results are not torch's memory", (*LAYERS, *CELLS)),
    "hooks_of_outputs": ("h' is not computed from the c' that is returned", ["LSTMCell"]),
    "override-check-forward-args": (_CHECKS, LAYERS),
    "override-check-forward-args-to-refuse": (_CHECKS, LAYERS),
    "override-check-input": (_CHECKS, LAYERS),
    "override-check-input-to-refuse": (_CHECKS, LAYERS),
    "override-check-hidden-size-to-refuse": (_CHECKS, LAYERS),
    "override-permute-hidden": (_CHECKS, LAYERS),
    "override-expected-hidden-size": (_CHECKS, LAYERS),
    "override-expected-cell-size": (_CHECKS, LAYERS),
    "override-update-flat-weights": (_CHECKS, LAYERS),
    "checks_of_the_instance": (_CHECKS, LAYERS),
    "a_weight_changed_that_backward_does_not_need": (
        "all weights are saved",
        ["RNN", "GRU", *CELLS],
    ),
    "flat_weights_swapped": (_FLAT, LAYERS),
    "flat_weights_changed_in_place": (_FLAT, LAYERS),
    "weights_that_shadow_parameters": (_FLAT, LAYERS),
    "outputs_changed_before_backward": ("the output itself is saved", ["RNN", "GRU"]),
    "hooks_see_what_is_saved": (
        "backward writes over what was saved",
        ["LSTM", "GRU", "LSTMCell", "GRUCell"],
    ),
}

# Inputs. Most of what is wrong with an input is in test_errors.py; here messages are compared.

ARGUMENTS: dict[str, Row] = {
    "keywords": lambda s: s.make()(input=s.x(), hx=s.hx()),
    "keywords-turned": lambda s: s.make()(hx=s.hx(), input=s.x()),
    "none": lambda s: s.make()(s.x(), None),
    "forward": lambda s: s.make().forward(s.x(), s.hx()),
    "forward-of-the-class": lambda s: s.type.forward(s.make(), s.x()),
    "list-state": lambda s: s.make()(s.x(), list(s.hx()) if s.kind.startswith("LSTM") else s.hx()),
    "a-parameter": lambda s: s.make()(nn.Parameter(s.x())),
    "a-leaf": lambda s: s.make()(s.x().requires_grad_()),
    "transposed": lambda s: s.make()(s.x().transpose(0, 1).contiguous().transpose(0, 1)),
    "expanded": lambda s: s.make()(s.x()[:1].expand(5, *s.x().shape[1:])),
    "sliced": lambda s: s.make()(drawn(1, *s.x().shape[:-1], 9)[..., 2 : 2 + I]),
    "conjugated-and-back": lambda s: s.make()(s.x(dtype=torch.complex64).conj().real),
    "negated": lambda s: s.make()(s.x(dtype=torch.complex64).conj().imag),
    "negated-view": lambda s: s.make()(torch._neg_view(s.x())),
    "zero-rows": lambda s: s.make()(s.x()[..., :0, :]),
    "one-row": lambda s: s.make()(s.x()[..., :1, :]),
    "inputs-of-nan": lambda s: s.make()(s.x() * float("nan")),
    "inputs-of-infinity": lambda s: s.make()(s.x() / 0),
}
ARGUMENTS_OF_LAYERS: dict[str, Row] = {
    "unbatched": lambda s: s.make()(s.x(T, I)),
    "unbatched-with-state": lambda s: s.make()(s.x(T, I), s.hx(1, H)),
    "unbatched-batch-first": lambda s: s.make(batch_first=True)(s.x(T, I), s.hx(1, H)),
    "one-step": lambda s: s.make()(s.x(1, N, I)),
    "batch-first": lambda s: s.make(batch_first=True)(s.x(N, T, I), s.hx()),
    "state-of-one-layer-too-few": lambda s: attempt(lambda: s.make(num_layers=2)(s.x(), s.hx())),
    "state-expanded": lambda s: s.make()(s.x(), _each(s.hx(1, 1, H), lambda h: h.expand(1, N, H))),
}
ARGUMENTS_OF_CELLS: dict[str, Row] = {
    "one-row-1d": lambda s: s.make()(s.x(I)),
    "one-row-1d-with-state": lambda s: s.make()(s.x(I), s.hx(H)),
    "a-bias-less": lambda s: s.make(bias=False)(s.x(), s.hx()),
}

WRONG: dict[str, Row] = {
    "0-D": lambda s: s.make()(torch.tensor(1.0)),
    "4-D": lambda s: s.make()(s.x(1, T, N, I)),
    "features": lambda s: s.make()(s.x(*s.x().shape[:-1], 7)),
    "float64": lambda s: s.make()(s.x(dtype=torch.float64)),
    "int64": lambda s: s.make()(s.x(dtype=torch.int64)),
    "complex": lambda s: s.make()(s.x(dtype=torch.complex64)),
    "meta": lambda s: s.make()(s.x(device="meta")),
    "sparse": lambda s: s.make()(s.x().to_sparse()),
    "a-list": lambda s: s.make()([1.0, 2.0]),
    "none": lambda s: s.make()(None),
    "no-argument": lambda s: s.make()(),
    "three-arguments": lambda s: s.make()(s.x(), s.hx(), 1),
    "unknown-keyword": lambda s: s.make()(s.x(), foo=1),
    "twice": lambda s: s.make()(s.x(), input=s.x()),
    "state-size": lambda s: s.make()(s.x(), s.hx(*((1,) if s.is_layer else ()), N, 5)),
    "state-rows": lambda s: s.make()(s.x(), s.hx(*((1,) if s.is_layer else ()), 3, H)),
    "state-4-D": lambda s: s.make()(s.x(), s.hx(1, 1, N, H)),
    "state-float64": lambda s: s.make()(s.x(), s.hx(dtype=torch.float64)),
    "state-number": lambda s: s.make()(s.x(), 0.0),
    "state-string": lambda s: s.make()(s.x(), "ab"),
    "state-of-three": lambda s: s.make()(s.x(), (s.x(), s.x(), s.x())),
    "no-steps": lambda s: s.make()(s.x()[:0]),
}


def _each(state: Any, change: Any) -> Any:
    return tuple(change(h) for h in state) if isinstance(state, tuple) else change(state)


def gradients_too(row: Row) -> Row:
    def run(side: Side) -> Any:
        outputs = row(side)
        loss = loss_of(outputs) if len(outputs) else None
        if loss is not None and loss.requires_grad:
            loss.backward()
        return outputs, [tuple(y.stride()) for y in flatten(outputs).values()]

    return run


def attempted(row: Row) -> Row:
    return lambda side: warned(lambda: row(side))


ROWS.add({f"call-{name}": gradients_too(row) for name, row in ARGUMENTS.items()})
ROWS.add({f"call-{n}": attempted(row) for n, row in ARGUMENTS_OF_LAYERS.items()}, *LAYERS)
ROWS.add({f"call-{n}": gradients_too(row) for n, row in ARGUMENTS_OF_CELLS.items()}, *CELLS)
ROWS.add({f"wrong-{name}": attempted(row) for name, row in WRONG.items()})


@ROWS.row()
def types_of_the_results(side: Side) -> Any:
    outputs = side.make()(side.x())
    seen = flatten(outputs).values()
    return (
        type(outputs).__name__,
        [(y.is_contiguous(), y.requires_grad, y.is_leaf, y.layout, y._is_view()) for y in seen],
    )


@ROWS.row()
def the_input_is_not_written_to(side: Side) -> Any:
    x, hx = side.x(), side.hx()
    before = x._version
    side.make()(x, hx)
    return x, hx, x._version == before


@ROWS.row()
def gradients_of_input_and_state(side: Side) -> Any:
    x, hx = side.x().requires_grad_(), _each(side.hx(), lambda h: h.requires_grad_())
    states = list(hx) if isinstance(hx, tuple) else [hx]
    return list(torch.autograd.grad(loss_of(side.make()(x, hx)), [x, *states]))


@ROWS.row()
def the_state_given_on(side: Side) -> Any:
    """Truncated backpropagation: a stream of calls."""
    module, state = side.make(), None
    for step in range(3):
        outputs = module(drawn(step, *side.x().shape), state)
        state = outputs[1] if side.is_layer else outputs
        if step == 0:
            state = _each(state, lambda h: h.detach())
    return outputs, gradients(module, flatten(outputs))


@ROWS.row(*LAYERS)
def packed_sequences(side: Side) -> Any:
    module, x = side.make(bidirectional=True), side.x()
    lengths = torch.tensor([3, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    outputs, state = module(packed)
    padded = pad_packed_sequence(outputs, total_length=7, padding_value=-1.0)
    rows = unpack_sequence(outputs)
    fields = outputs.batch_sizes, outputs.sorted_indices, outputs.unsorted_indices
    return type(outputs).__name__, padded, rows, fields, state, outputs.is_pinned()


@ROWS.row(*LAYERS)
def packed_sequences_moved(side: Side) -> Any:
    packed = pack_sequence([side.x(5, I), side.x(2, I)])
    module = side.make()
    before = flatten(module(packed))
    return before, flatten(module.double()(packed.to(torch.float64))), packed.double().data.dtype


@ROWS.row(*LAYERS)
def packed_with_a_state(side: Side) -> Any:
    packed = pack_sequence([side.x(2, I), side.x(5, I)], enforce_sorted=False)
    outputs, state = side.make()(packed, side.hx())
    return outputs.data, state


@ROWS.row(*LAYERS)
def packed_and_wrong(side: Side) -> Any:
    packed = pack_sequence([side.x(5, I), side.x(2, I)])
    module = side.make()
    return [
        attempt(lambda: module(PackedSequence(packed.data[:, :2], packed.batch_sizes))),
        attempt(lambda: module(packed, side.hx(1, 3, H))),
        attempt(lambda: module(packed, side.hx(N, H))),
        attempt(lambda: module(packed.double())),
        attempt(lambda: module(packed.to("meta"))),
    ]


# Hooks.


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


# Subclasses.


@ROWS.row()
def a_subclass_with_its_own_forward(side: Side) -> Any:
    class Mine(side.type):
        def __init__(self, *sizes: int, scale: float = 1.0) -> None:
            super().__init__(*sizes)
            self.scale = nn.Parameter(torch.tensor(scale))

        def forward(self, input: Tensor, hx: Any = None, extra: float = 1.0) -> Any:
            return super().forward(input * self.scale * extra, hx)

    module = side.make(of=Mine, scale=2.0)
    return repr(module), side.outcome(module), module(side.x(), extra=3.0)


@ROWS.row()
def a_subclass_that_wraps_its_call(side: Side) -> Any:
    class Mine(side.type):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(args[0] * 2, *args[1:], **kwargs)

    return side.outcome(side.make(of=Mine))


@ROWS.row()
def several_bases(side: Side) -> Any:
    class Mixin:
        def __init__(self, *args: Any, note: str = "", **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.note = note

        def forward(self, input: Tensor, *rest: Any) -> Any:
            return super().forward(input * 2, *rest)  # type: ignore[misc]

    class Mine(Mixin, side.type):
        pass

    module = side.make(of=Mine, note="kept")
    return module.note, side.outcome(module)


@ROWS.row()
def attributes_that_are_properties(side: Side) -> Any:
    class Mine(side.type):
        @property
        def hidden_size(self) -> int:
            return self._size

        @hidden_size.setter
        def hidden_size(self, size: int) -> None:
            self._size = size

    return side.outcome(side.make(of=Mine))


@ROWS.row()
def weights_that_are_properties(side: Side) -> Any:
    def doubled(self: Any) -> Tensor:
        return self._parameters[side.weight] * 2

    made = type("Mine", (side.type,), {})
    module = side.make(of=made)
    setattr(made, side.weight, property(doubled))
    return type(attempt(lambda: side.outcome(module))), getattr(module, side.weight)


@ROWS.row()
def attributes_looked_up_in_its_own_way(side: Side) -> Any:
    class Mine(side.type):
        def __getattr__(self, name: str) -> Any:
            if name == "answer":
                return 42
            return super().__getattr__(name)

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)

    module = side.make(of=Mine)
    return module.answer, attempt(lambda: module.question), side.outcome(module)


@ROWS.row()
def every_attribute_looked_up_in_its_own_way(side: Side) -> Any:
    class Mine(side.type):
        def __getattribute__(self, name: str) -> Any:
            value = super().__getattribute__(name)
            return 2 * value if name == "weights" else value

    return side.outcome(side.make(of=Mine))


def overriding(name: str, method: Any) -> Row:
    """A subclass that overrides one of the methods which torch.nn's forward calls."""

    def row(side: Side) -> Any:
        seen: list[Any] = []
        made = type("Mine", (side.type,), {})

        def own(self: Any, *args: Any, **kwargs: Any) -> Any:
            seen.append(name)
            return method(super(made, self), *args, **kwargs)

        setattr(made, name, own)
        module = side.make(of=made)
        packed = pack_sequence([side.x(5, I), side.x(2, I)])
        calls = [
            attempt(lambda: module(side.x())),
            attempt(lambda: module(side.x(), side.hx())),
            attempt(lambda: flatten(module(packed, side.hx()))),
            attempt(lambda: module(side.x(T, I))),
            attempt(lambda: module(side.x(T, N, 7))),
        ]
        return calls, len(seen)

    return row


def _refusing(base: Any, *args: Any) -> Any:
    raise ValueError("not today")


ROWS.add(
    {
        "override-check-forward-args": overriding(
            "check_forward_args", lambda base, *args: base.check_forward_args(*args)
        ),
        "override-check-forward-args-to-refuse": overriding("check_forward_args", _refusing),
        "override-check-input": overriding(
            "check_input", lambda base, *args: base.check_input(*args)
        ),
        "override-check-input-to-refuse": overriding("check_input", _refusing),
        "override-check-hidden-size-to-refuse": overriding("check_hidden_size", _refusing),
        "override-permute-hidden": overriding(
            "permute_hidden", lambda base, hx, order: _each(hx, lambda h: h * 2)
        ),
        "override-expected-hidden-size": overriding(
            "get_expected_hidden_size", lambda base, *args: base.get_expected_hidden_size(*args)
        ),
        "override-update-flat-weights": overriding("_update_flat_weights", _refusing),
    },
    *LAYERS,
)
ROWS.add({"override-expected-cell-size": overriding("get_expected_cell_size", _refusing)}, "LSTM")


@ROWS.row(*LAYERS)
def checks_of_the_instance(side: Side) -> Any:
    module, seen = side.make(), []
    old = module.check_forward_args
    module.check_forward_args = lambda *args: (seen.append(1), old(*args))
    return module(side.x()), seen


@ROWS.row(*LAYERS)
def methods_of_the_checks(side: Side) -> Any:
    """Called by themselves."""
    module, x, hx = side.make(), side.x(), side.hx()
    return (
        module.check_forward_args(x, hx, None),
        module.check_input(x, None),
        module.get_expected_hidden_size(x, None),
        module.get_expected_hidden_size(x, torch.tensor([2, 1])),
        module.permute_hidden(hx, None) is hx,
        module.permute_hidden(hx, torch.tensor([1, 0])),
        attempt(lambda: module.check_input(side.x(3), None)),
        module._weights_have_changed(),
        module._update_flat_weights(),
    )


# Weights put elsewhere.


@ROWS.row(*LAYERS)
def flat_weights_swapped(side: Side) -> Any:
    class Mine(side.type):
        def forward(self, input: Tensor, hx: Any = None) -> Any:
            kept = self._flat_weights
            self._flat_weights = [w * 0.5 for w in kept]
            try:
                return super().forward(input, hx)
            finally:
                self._flat_weights = kept

    return side.outcome(side.make(of=Mine))


@ROWS.row(*LAYERS)
def flat_weights_changed_in_place(side: Side) -> Any:
    module = side.make()
    module._flat_weights[1] = module._flat_weights[1].detach() * 0.5
    return side.outcome(module)


@ROWS.row()
def weights_that_shadow_parameters(side: Side) -> Any:
    module = side.make()
    vars(module)[side.weight] = torch.zeros_like(getattr(module, side.weight))
    return side.outcome(module)


# Modes.

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
    "profiler": lambda: torch.profiler.profile(),
    "record-function": lambda: torch.profiler.record_function("mine"),
    "function-mode": lambda: _PassingMode(),
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


class _PassingMode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


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
def nan_found_by_anomaly_mode(side: Side) -> Any:
    module = side.make()
    with warned_silently(), torch.autograd.detect_anomaly():
        y = first(module(side.x()))
        error = attempt(lambda: (y * float("nan")).sum().backward())
    return type(error).__name__, "returned nan" in str(error)


@contextlib.contextmanager
def warned_silently() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@ROWS.row()
def no_gradient_is_wanted(side: Side) -> Any:
    module = side.make().requires_grad_(False)
    y = first(module(side.x()))
    return y.requires_grad, y.is_leaf, attempt(lambda: y.sum().backward())


@ROWS.row()
def backward_twice(side: Side) -> Any:
    module = side.make()
    loss = loss_of(module(side.x()))
    loss.backward(retain_graph=True)
    loss.backward()
    return [p.grad for p in module.parameters()], attempt(loss.backward)


@ROWS.row()
def a_weight_changed_before_backward(side: Side) -> Any:
    module = side.make()
    loss = loss_of(module(side.x(), _each(side.hx(), lambda h: h.requires_grad_())))
    with torch.no_grad():
        getattr(module, side.weight).add_(1)
    return type(attempt(loss.backward)).__name__


@ROWS.row()
def a_weight_changed_that_backward_does_not_need(side: Side) -> Any:
    """No gradient goes through it where neither input nor state wants one."""
    module = side.make()
    loss = loss_of(module(side.x(*((1, 1, I) if side.is_layer else ()))))
    with torch.no_grad():
        getattr(module, side.weight).add_(1)
    return type(attempt(loss.backward)).__name__


@ROWS.row("RNN", "GRU", "LSTMCell", "GRUCell")
def outputs_changed_before_backward(side: Side) -> Any:
    """Those of LSTM and RNNCell may not be with torch.nn either."""
    module = side.make()
    y = first(module(side.x()))
    y += 1
    y.relu_()
    y.square().sum().backward()
    return [p.grad for p in module.parameters()]


@ROWS.row()
def outputs_changed_without_a_graph(side: Side) -> Any:
    with torch.no_grad():
        outputs = side.make()(side.x())
        for y in flatten(outputs).values():
            y.mul_(2).add_(1)
    return outputs


@ROWS.row()
def outputs_detached_in_place(side: Side) -> Any:
    """A cell's outputs and a layer's states, as loops of truncated backpropagation do it."""
    outputs = side.make()(side.x())
    seen = [attempt(lambda y=y: y.detach_()) for y in flatten(outputs).values()]
    return [type(each).__name__ if isinstance(each, Exception) else each for each in seen]


@ROWS.row()
def hooks_see_what_is_saved(side: Side) -> Any:
    """What a hook was given is the same after backward."""
    module, kept = side.make(), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append((tensor, tensor.detach().clone()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        outputs = module(side.x())
    loss_of(outputs).backward()
    numbers = [pair for pair in kept if pair[1].is_floating_point()]  # not what oneDNN works in
    return all(torch.equal(a.detach(), b) for a, b in numbers)


@ROWS.row()
def gradient_edges(side: Side) -> Any:
    from torch.autograd.graph import get_gradient_edge

    module = side.make()
    outputs = module(side.x())
    edges = [get_gradient_edge(p) for p in module.parameters()]
    given = [get_gradient_edge(y) for y in flatten(outputs).values()]
    return list(
        torch.autograd.grad(given, edges, [torch.ones_like(y) for y in flatten(outputs).values()])
    )


@ROWS.row()
def parameters_found_in_the_graph(side: Side) -> Any:
    """As drawings of the graph, and searches for unused parameters, walk it."""
    module, found, seen = side.make(), set(), set()
    waiting = [first(module(side.x())).grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        waiting += [following for following, _ in node.next_functions]
    return [name for name, p in module.named_parameters() if id(p) in found]


@ROWS.row()
def backward_of_some(side: Side) -> Any:
    module = side.make()
    loss = loss_of(module(side.x()))
    loss.backward(inputs=[getattr(module, side.weight)])
    return [p.grad for p in module.parameters()]


@ROWS.row()
def gradients_of_what_is_not_used(side: Side) -> Any:
    module, other = side.make(), nn.Parameter(torch.ones(1))
    loss = loss_of(module(side.x()))
    return torch.autograd.grad(loss, [*module.parameters(), other], allow_unused=True)


@ROWS.row()
def gradients_lie_as_their_parameters(side: Side) -> Any:
    """Each in memory of its own, so that one may be changed in place."""
    module = side.make()
    side.outcome(module)
    grads = [p.grad for p in module.parameters()]
    return (
        [(g.stride(), g.is_contiguous(), g.is_leaf, g.grad_fn, g._is_view()) for g in grads],
        len({g.data_ptr() for g in grads}) == len(grads),
        [g.mul_(2) for g in grads],
    )


@ROWS.row()
def gradients_added_up(side: Side) -> Any:
    module = side.make()
    for step in range(3):
        loss_of(module(drawn(step, *side.x().shape))).backward()
    return [p.grad for p in module.parameters()]


# What is done with results, which may lie in memory that torch has not allocated.
RESULTS: dict[str, Any] = {
    "numpy": lambda y: torch.from_numpy(y.numpy() * 2),
    "numpy-in-place": lambda y: (y.numpy().__imul__(2), y)[1],
    "dlpack": torch.from_dlpack,
    "shared-memory": lambda y: (y.share_memory_().is_shared(), y),
    "storage": lambda y: (y.untyped_storage().nbytes() >= y.nbytes, y.storage_offset()),
    "saved": lambda y: _loaded(y),
    "copied": lambda y: y.clone(memory_format=torch.preserve_format),
    "deepcopied": lambda y: _deepcopied(y),
    "written-to": lambda y: y.zero_().add_(1),
    "set-to-another": lambda y: y.set_(torch.ones(2)),
    "given-other-data": lambda y: (setattr(y, "data", torch.ones(3)), y)[1],
    "viewed": lambda y: y.view(-1).as_strided((2,), (1,)),
    "viewed-as-integers": lambda y: y.view(torch.int32).view(torch.float32),
    "resized": lambda y: y.resize_(2),
    "resized-to-more": lambda y: y.resize_(1000).shape,
    "used-as-out": lambda y: torch.mul(y, 2, out=y),
    "a-leaf": lambda y: y.requires_grad_().is_leaf,
    "a-parameter": lambda y: nn.Parameter(y),
    "swapped": lambda y: (torch.utils.swap_tensors(y, torch.ones(2)), y)[1],
    "pinned": lambda y: y.is_pinned(),
}


def _loaded(y: Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save(y, buffer)
    buffer.seek(0)
    return torch.load(buffer), pickle.loads(pickle.dumps(y))


def _deepcopied(y: Tensor) -> Tensor:
    return copy.deepcopy(y)


def resulting(change: Any) -> Row:
    def row(side: Side) -> Any:
        module = side.make()
        with torch.no_grad():
            results = [*flatten(module(side.x())).values()]
        side.outcome(module)
        grads = [p.grad for p in module.parameters()]
        return [attempt(lambda y=y: change(y)) for y in (*results, *grads)]

    return row


ROWS.add({f"results-{name}": resulting(change) for name, change in RESULTS.items()})


@ROWS.row()
def results_outlive_the_module(side: Side) -> Any:
    outputs = side.make()(side.x())
    array = first(outputs).detach().numpy()
    kept = torch.from_numpy(array).clone()
    del outputs
    side.make()(side.x() * 2)
    return torch.from_numpy(array), kept


@ROWS.row(*LAYERS)
def a_dropout_of_everything(side: Side) -> Any:
    module = side.make(num_layers=2, dropout=1.0)
    return side.outcome(module), side.outcome(module.eval())


@ROWS.row(*LAYERS)
def dropout_draws_the_same_numbers(side: Side) -> Any:
    module = side.make(num_layers=3, dropout=0.5)
    torch.manual_seed(3)
    return side.outcome(module), torch.rand(2)


@pytest.mark.parametrize("row", ROWS)
def test_as_torch_nn(row: str) -> None:
    ROWS.check(row, DIFFERENCES)
