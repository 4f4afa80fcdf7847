"""What is done with outputs, the graph behind them, and gradients."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import threading
import warnings
import weakref
from typing import Any

import torch
from support import LAYERS, flatten
from torch import Tensor, nn

from like_torch_nn import (
    ROWS,
    H,
    I,
    N,
    Row,
    Side,
    attempt,
    drawn,
    each_state,
    first,
    gradients,
    loss_of,
)


@ROWS.row()
def nan_found_by_anomaly_mode(side: Side) -> Any:
    module = side.make()
    with warned_silently(), torch.autograd.detect_anomaly():
        y = first(module(side.x()))
        error = attempt(lambda: (y * float("nan")).sum().backward())
    return type(error).__name__, "returned nan" in str(error)


@contextlib.contextmanager
def warned_silently() -> Any:

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
    loss = loss_of(module(side.x(), each_state(side.hx(), lambda h: h.requires_grad_())))
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


@ROWS.row()
def a_bias_changed_before_backward(side: Side) -> Any:
    module = side.make()
    loss = loss_of(module(side.x()))
    with torch.no_grad():
        getattr(module, side.weight.replace("weight", "bias")).add_(1)
    return type(attempt(loss.backward)).__name__


@ROWS.row()
def backward_again_after_a_hook_has_failed(side: Side) -> Any:
    y = first(side.make()(side.x()))

    def fail(*_: Any) -> None:
        raise KeyError("once")

    hook = y.grad_fn.register_hook(fail)
    told = [type(attempt(y.sum().backward)).__name__]
    hook.remove()
    return [*told, type(attempt(y.sum().backward)).__name__]


@ROWS.row()
def an_input_changed_that_backward_does_not_need(side: Side) -> Any:
    """W_ih has no gradient."""
    module = side.make()
    for name, weight in module.named_parameters():
        weight.requires_grad_("_ih" not in name)
    x = side.x()
    loss = loss_of(module(x))
    x.add_(1)
    return type(attempt(loss.backward)).__name__


@ROWS.row()
def operands_with_other_memory(side: Side) -> Any:
    module, x = side.make(), side.x(requires_grad=True)
    loss = loss_of(module(x))
    for operand in (x, *module.parameters()):
        operand.data = operand.data + 1
    loss.backward()
    return x.grad, [p.grad for p in module.parameters()]


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
    # Up to torch 2.12 the node of an autograd.Function ends with its output, so the output is kept.
    output = first(module(side.x()))
    waiting = [output.grad_fn]
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


# What is done with results, which may be in memory that torch has not allocated.
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


@ROWS.row()
def nothing_is_kept(side: Side) -> Any:
    """Without the garbage collector: neither module nor graph is in a cycle."""
    module, x = side.make(), side.x().requires_grad_()
    outputs = module(x)
    watched = [weakref.ref(each) for each in (x, first(outputs), module)]
    loss_of(outputs).backward()
    del x, outputs, module
    return [reference() is None for reference in watched]


@ROWS.row()
def the_graph_keeps_what_it_needs(side: Side) -> Any:
    module, x = side.make(), side.x().requires_grad_()
    outputs, watched = module(x), weakref.ref(x)
    del x, module
    alive = watched() is not None
    del outputs
    return alive, watched() is None


@ROWS.row()
def one_output_detached(side: Side) -> Any:
    outputs = flatten(side.make()(side.x()))
    y, *rest = outputs.values()
    y.detach_()
    return y.requires_grad, [h.requires_grad for h in rest]


@ROWS.row("RNN", "GRU", "LSTMCell", "GRUCell")
def parts_of_an_output_changed(side: Side) -> Any:
    module = side.make()
    y = first(module(side.x()))
    y[..., :2].mul_(2)
    return gradients(module, {"y": y})


@ROWS.row()
def some_parameters_frozen(side: Side) -> Any:
    module = side.make()
    getattr(module, side.weight).requires_grad_(False)
    return side.outcome(module)


@ROWS.row()
def only_a_state_wants_a_gradient(side: Side) -> Any:
    module, hx = side.make().requires_grad_(False), side.hx()
    last = hx[-1] if isinstance(hx, tuple) else hx
    last.requires_grad_()
    return torch.autograd.grad(loss_of(module(side.x(), hx)), last)


@ROWS.row()
def only_the_last_output_has_a_gradient(side: Side) -> Any:
    module = side.make()
    *_, last = flatten(module(side.x())).values()
    return gradients(module, {"last": last})


@ROWS.row()
def the_input_is_the_state(side: Side) -> Any:
    module = side.make(H, H)
    x = side.x(1, N, H) if side.is_layer else side.x(N, H)
    return side.outcome(module, x, (x, x) if side.kind.startswith("LSTM") else x)


@ROWS.row()
def one_weight_for_input_and_state(side: Side) -> Any:
    module = side.make(H, H)
    setattr(module, side.weight.replace("hh", "ih"), getattr(module, side.weight))
    return side.outcome(module, side.x(*side.x().shape[:-1], H))


GIVEN: dict[str, Any] = {
    "expanded": lambda y: torch.ones(()).expand(y.shape),
    "transposed": lambda y: torch.ones(y.shape[::-1]).permute(*reversed(range(y.dim()))),
    "float64": lambda y: torch.ones_like(y, dtype=torch.float64),
    "other-shape": lambda y: torch.ones(2, 2, 2, 2),
    "none": lambda y: None,
    "nan": lambda y: torch.full_like(y, float("nan")),
    "negated": lambda y: torch._neg_view(torch.ones_like(y)),
    "lazy-zero": lambda y: torch._efficientzerotensor(tuple(y.shape)),
}


def given_gradient(make: Any) -> Row:
    def row(side: Side) -> Any:
        module = side.make()
        y = first(module(side.x()))
        told = attempt(lambda: y.backward(make(y)))
        return told, [p.grad for p in module.parameters()]

    return row


ROWS.add({f"gradient-given-{name}": given_gradient(make) for name, make in GIVEN.items()})


@ROWS.row()
def a_batch_of_gradients(side: Side) -> Any:
    module = side.make()
    y = first(module(side.x()))
    given = torch.stack([torch.ones_like(y), torch.zeros_like(y)])
    parameters = list(module.parameters())
    return torch.autograd.grad(y, parameters, given, is_grads_batched=True)


@ROWS.row()
def backward_on_another_thread(side: Side) -> Any:
    module = side.make()
    loss = loss_of(module(side.x()))
    worker = threading.Thread(target=loss.backward)
    worker.start()
    worker.join()
    return [p.grad for p in module.parameters()]


def overwritten(what: Any) -> Row:
    """Whether backward notices that an operand has changed."""

    def row(side: Side) -> Any:
        module = side.make()
        x, hx = side.x(), side.hx()
        outputs = flatten(module(x, hx))
        for each in what(x, hx):
            each.zero_()
        return type(attempt(lambda: gradients(module, outputs))).__name__

    return row


ROWS.add(
    {
        "the-input-changed-before-backward": overwritten(lambda x, hx: [x]),
        "the-state-changed-before-backward": overwritten(
            lambda x, hx: hx if isinstance(hx, tuple) else [hx]
        ),
    }
)
