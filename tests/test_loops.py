"""A cell called many times in one graph: the gradients of its weights are summed in one place."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, DTYPES, Leaves, build, check, initial_states, states_of
from torch import Tensor, nn
from torch.func import functional_call

from rnnkern import kernels, loops

pytestmark = pytest.mark.cpu_only


def run(cell: nn.Module, x: Tensor, state: Any = None) -> Tensor:
    """All outputs of a loop over the steps of x."""
    outputs = []
    for step in x:
        state = cell(step, state)
        outputs.append(state if isinstance(state, Tensor) else state[0])
    return torch.stack(outputs)


def twin(cell: nn.Module, kind: str) -> nn.Module:
    theirs = getattr(nn, kind)(cell.input_size, cell.hidden_size, bias=cell.bias)
    theirs = theirs.to(cell.weight_ih.dtype)
    theirs.load_state_dict(cell.state_dict())
    return theirs


def gradients(cell: nn.Module) -> list[Tensor]:
    return [p.grad.clone() for p in cell.parameters()]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def hidden_of(kind: str) -> int:
    """The least that makes sums worth while."""
    mode = "RNN_TANH" if kind == "RNNCell" else kind.removesuffix("Cell")
    x = torch.zeros(1, 1)
    return next(
        H
        for H in range(1, 1000)
        if kernels.are_worth_sums(kernels.kernel(mode, 1, H, 0, True, False, is_cell=True), x)
    )


def pair(kind: str) -> tuple[nn.Module, nn.Module, Tensor]:
    cell = build(kind, 5, hidden_of(kind), dtype=torch.float64)
    return cell, twin(cell, kind), torch.randn(6, 3, 5, dtype=torch.float64)


@pytest.fixture
def sums(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each backward step of a loop, whether it added to a sum."""
    seen: list[bool] = []
    found = loops.Sums._found

    def watched(self: loops.Sums, wanted: Any) -> Any:
        result = found(self, wanted)
        seen.append(result is not None)
        return result

    monkeypatch.setattr(loops.Sums, "_found", watched)
    return seen


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_of_calls_agrees_with_torch_nn(kind: str, dtype: torch.dtype, rows: int) -> None:
    cell = build(kind, 5, hidden_of(kind) + 1, dtype=dtype)
    leaves = {"x": torch.randn(7, rows, 5)} | initial_states(cell, rows)

    def call(module: nn.Module, own: Leaves) -> Tensor:
        return run(module, own["x"], states_of(own))

    check(cell, {name: leaf.to(dtype) for name, leaf in leaves.items()}, call)


@pytest.mark.parametrize("kind", CELLS)
def test_all_steps_but_two_add_to_a_sum(kind: str, sums: list[bool]) -> None:
    """The first call of a graph knows of no other, and the last one begins the sum."""
    cell, theirs, x = pair(kind)
    for _ in range(2):
        for module in (cell, theirs):
            module.zero_grad()
            run(module, x).square().sum().backward()
        assert sums == [False, *[True] * 4]
        assert_same(gradients(cell), gradients(theirs))
        sums.clear()


@pytest.mark.parametrize("kind", CELLS)
def test_small_cells_have_none(kind: str, sums: list[bool]) -> None:
    cell = build(kind, 5, hidden_of(kind) - 1)
    run(cell, torch.randn(6, 3, 5)).sum().backward()
    assert sums == []


@pytest.mark.parametrize("kind", CELLS)
def test_anomaly_mode_has_none(kind: str, sums: list[bool]) -> None:
    """It looks at what each step returns."""
    cell, _, x = pair(kind)
    with torch.autograd.set_detect_anomaly(True):
        run(cell, x).sum().backward()
    assert sums
    assert not any(sums)


@pytest.mark.parametrize("kind", CELLS)
def test_a_single_call_has_none(kind: str, sums: list[bool]) -> None:
    cell, _, x = pair(kind)
    for _ in range(3):
        run(cell, x[:1]).sum().backward()
    assert sums == []


@pytest.mark.parametrize("kind", CELLS)
def test_a_call_after_a_graph_that_is_gone_has_none(kind: str, sums: list[bool]) -> None:
    """It was dropped without a backward pass, or its output outlives it."""
    cell, _, x = pair(kind)
    outputs = []
    for _ in range(3):
        run(cell, x)
        outputs.append(run(cell, x[:1]))
        outputs[-1].sum().backward()
    assert sums == []


@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_of_many_rows_has_sums(kind: str, sums: list[bool]) -> None:
    """Where backward reads the output itself, and no copy of it."""
    cell, theirs = pair(kind)[:2]
    x = torch.randn(4, 600, 5, dtype=torch.float64)
    for module in (cell, theirs):
        run(module, x).square().sum().backward()
    assert sums == [False, True, True]
    assert_same(gradients(cell), gradients(theirs))
    assert loops.loop_of(cell.weight_ih) is None


@pytest.mark.parametrize("kind", CELLS)
def test_a_loop_over_inputs_with_gaps_has_sums(kind: str, sums: list[bool]) -> None:
    """The copies that the kernels need are of the inputs alone."""
    cell, theirs, x = pair(kind)
    x = x.repeat_interleave(2, -1)[..., ::2]
    for module in (cell, theirs):
        run(module, x).square().sum().backward()
    assert sums == [False, True, True, True, True]
    assert_same(gradients(cell), gradients(theirs))


@pytest.mark.parametrize("kind", CELLS)
def test_parameters_can_be_swapped_after_a_loop(kind: str) -> None:
    """torch refuses to swap tensors to which there are weak references."""
    cell, _, x = pair(kind)
    cell.weight_hh.requires_grad_(False)
    made = run(cell, x)
    made.sum().backward()
    for weight in (cell.weight_ih, cell.weight_hh):
        other = torch.nn.Parameter(torch.zeros_like(weight), requires_grad=weight.requires_grad)
        torch.utils.swap_tensors(weight, other)
        assert not weight.any()


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("first", ["biased", "plain"])
def test_cells_of_one_loop_with_biases_and_without(kind: str, first: str) -> None:
    biased, theirs, x = pair(kind)
    plain = build(kind, 5, hidden_of(kind), dtype=torch.float64, bias=False)
    their_plain = twin(plain, kind)
    for name in ("weight_ih", "weight_hh"):
        setattr(plain, name, getattr(biased, name))
        setattr(their_plain, name, getattr(theirs, name))
    for own in ((biased, plain), (theirs, their_plain)):
        one, other = own if first == "biased" else own[::-1]
        sum(run(cell, x[:n]).sum() for cell, n in ((one, 4), (other, 2), (one, 3))).backward()
    assert_same(gradients(biased), gradients(theirs))


@pytest.mark.parametrize("kind", CELLS)
def test_weights_that_are_views_have_no_sums(kind: str, sums: list[bool]) -> None:
    """The graph would not hold them."""
    cell, _, x = pair(kind)
    weights = {
        name: parameter.detach().flatten().view(parameter.shape).requires_grad_()
        for name, parameter in cell.named_parameters()
    }
    state = None
    for step in x:
        state = torch.func.functional_call(cell, weights, (step, state))
    (state[0] if isinstance(state, tuple) else state).sum().backward()
    assert sums == []
    assert all(weight.grad is not None for weight in weights.values())


def twice(loss: Callable[[nn.Module], Tensor]) -> Callable[[nn.Module], None]:
    def backward(module: nn.Module) -> None:
        made = loss(module)
        made.backward(retain_graph=True)
        made.backward()

    return backward


def several(module: nn.Module, x: Tensor) -> None:
    """Graphs that are there at once, in another order."""
    first, second = run(module, x), run(module, x * 2)
    (first.sum() + second.square().sum()).backward(retain_graph=True)
    second.sum().backward(retain_graph=True)
    first.square().sum().backward()


def of_weights_too(module: nn.Module, x: Tensor) -> None:
    """Others have gradients of the same weights, before and after."""
    before = module.weight_hh.square().sum()
    made = run(module, x)
    (before + made.sum() + (module.weight_ih * 3).sum() + module.bias_ih.exp().sum()).backward()


def a_part(module: nn.Module, x: Tensor) -> None:
    made = run(module, x)
    made[3].sum().backward(retain_graph=True)
    wanted = [module.weight_hh, module.bias_hh]
    found = torch.autograd.grad(made.square().sum(), wanted, retain_graph=True)
    for weight, gradient in zip(wanted, found, strict=True):
        weight.grad += gradient
    made[1].sum().backward()


def frozen(module: nn.Module, x: Tensor) -> None:
    module.weight_hh.requires_grad_(False)
    run(module, x).sum().backward()
    module.weight_hh.requires_grad_(True)
    run(module, x).square().sum().backward()


def truncated(module: nn.Module, x: Tensor) -> None:
    """Backward passes between the steps of a loop."""
    state: Any = None
    for i, step in enumerate(x):
        state = module(step, state)
        h = state if isinstance(state, Tensor) else state[0]
        if i % 3 == 2:
            h.square().sum().backward()
            state = h.detach() if isinstance(state, Tensor) else tuple(s.detach() for s in state)


def in_a_backward_pass(module: nn.Module, x: Tensor) -> None:
    """A hook runs another backward pass through the same cell."""
    other = run(module, x * 0.5).square().sum()
    made = run(module, x)
    made.register_hook(lambda g: other.backward() and None)
    made.sum().backward()


def checkpointed(module: nn.Module, x: Tensor) -> None:
    checkpoint = torch.utils.checkpoint.checkpoint
    state = run(module, x[:3])[-1]
    made = checkpoint(
        lambda a, s: run(module, a, s), x[3:], _state(module, state), use_reentrant=False
    )
    made.sum().backward()


def _state(module: nn.Module, h: Tensor) -> Any:
    return (h, h * 0.5) if isinstance(module, nn.LSTMCell) else h


def hooked(module: nn.Module, x: Tensor) -> None:
    handle = module.weight_hh.register_hook(lambda g: g * 2)
    run(module, x).sum().backward()
    handle.remove()


def saved_elsewhere(module: nn.Module, x: Tensor) -> None:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        made = run(module, x)
    made.square().sum().backward()


def second_derivatives(module: nn.Module, x: Tensor) -> None:
    made = run(module, x)
    (g,) = torch.autograd.grad(made.square().sum(), module.weight_ih, create_graph=True)
    g.square().sum().backward()


def other_memory(module: nn.Module, x: Tensor) -> None:
    first = run(module, x)
    module.weight_hh.data = module.weight_hh.data * 1.5
    (first.sum() + run(module, x).square().sum()).backward()


def with_another_parameter(module: nn.Module, x: Tensor) -> None:
    """On the same memory, while a graph with the one before is alive."""
    before = run(module, x[:3])
    module.weight_hh = nn.Parameter(module.weight_hh.data)
    (before.sum() + run(module, x[3:]).square().sum()).backward()


def with_an_alias(module: nn.Module, x: Tensor) -> None:
    before = run(module, x)
    alias = module.weight_hh.detach().requires_grad_()
    step = module(x[0])
    made = functional_call(module, {"weight_hh": alias}, (x[1], step))
    made = functional_call(module, {"weight_hh": alias}, (x[2], made))
    h = made if isinstance(made, Tensor) else made[0]
    (before.sum() + h.square().sum()).backward()
    module.weight_hh.grad += 3 * alias.grad


def frozen_at_first(module: nn.Module, x: Tensor) -> None:
    module.weight_hh.requires_grad_(False)
    before = run(module, x[:3])
    module.weight_hh.requires_grad_(True)
    (before.sum() + run(module, x[3:]).square().sum()).backward()


def frozen_between(module: nn.Module, x: Tensor) -> None:
    parts = [run(module, x[:2])]
    for weight in (module.weight_hh, module.bias_ih):
        weight.requires_grad_(False)
    parts.append(run(module, x[2:4], _state(module, parts[0][-1])))
    for weight in (module.weight_hh, module.bias_ih):
        weight.requires_grad_(True)
    parts.append(run(module, x[4:], _state(module, parts[1][-1])))
    torch.cat(parts).square().sum().backward()


def hidden_states(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Of all steps, as the cell returns them."""
    made = [module(x[0])]
    for step in x[1:]:
        made.append(module(step, made[-1]))
    return [each if isinstance(each, Tensor) else each[0] for each in made]


def kept_by_hooks(module: nn.Module, x: Tensor) -> None:
    """Of nodes: one keeps the gradients, one puts others in their place."""
    hs = hidden_states(module, x)
    kept: list[tuple[Tensor, Tensor]] = []

    def keep(given: Any, _: Any) -> None:
        kept.extend((g, g.clone()) for g in given if g is not None)

    def replace(given: Any, _: Any) -> Any:
        keep(given, _)
        return tuple(g if g is None else g * 1 for g in given)

    hs[-1].grad_fn.register_hook(keep)
    hs[3].grad_fn.register_hook(replace)
    sum(h.square().sum() for h in hs).backward()
    assert kept
    for now, then in kept:
        assert torch.equal(now, then)


def memory_kept_by_hooks(module: nn.Module, x: Tensor) -> None:
    """Of the gradients, and not the tensors."""
    hs = hidden_states(module, x)
    kept: list[tuple[Tensor, Tensor]] = []
    aliases = (Tensor.detach, lambda g: g[:1], Tensor.numpy)
    for i, h in enumerate(hs):

        def keep(given: Any, _: Any, alias: Any = aliases[i % 3]) -> None:
            kept.extend((alias(g), alias(g.clone())) for g in given if g is not None)

        h.grad_fn.register_hook(keep)
    sum(h.square().sum() for h in hs).backward()
    assert len(kept) >= 6
    for now, then in kept:
        assert (now == then).all()


def other_strides(module: nn.Module, x: Tensor) -> None:
    """Of a weight at the same place in memory."""
    rows, columns = module.weight_hh.shape
    wide = torch.arange(2.0 * rows * columns, dtype=x.dtype).sin().view(rows, 2 * columns) / columns
    module.weight_hh.data = wide.flatten()[: rows * columns].view(rows, columns)
    before = run(module, x[:3])
    module.weight_hh.data = wide[:, :columns]
    (before.sum() + run(module, x[3:]).square().sum()).backward()


def under_anomaly_mode(module: nn.Module, x: Tensor) -> None:
    with torch.autograd.set_detect_anomaly(True):
        run(module, x).square().sum().backward()


def both_kinds(module: nn.Module, x: Tensor) -> None:
    """Differentiable backward passes and plain ones of one graph."""
    made = run(module, x).square().sum()
    gs = torch.autograd.grad(made, list(module.parameters()), create_graph=True)
    made.backward(retain_graph=True)
    sum(g.square().sum() for g in gs).backward()


def accumulated_hooks(module: nn.Module, x: Tensor) -> None:
    seen: list[int] = []
    for weight in module.parameters():
        weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.numel()))
    run(module, x).square().sum().backward()
    assert sorted(seen) == sorted(p.numel() for p in module.parameters())


PROGRAMS = {
    "with-another-parameter": with_another_parameter,
    "with-an-alias": with_an_alias,
    "frozen-at-first": frozen_at_first,
    "frozen-between": frozen_between,
    "kept-by-hooks": kept_by_hooks,
    "memory-kept-by-hooks": memory_kept_by_hooks,
    "other-strides": other_strides,
    "under-anomaly-mode": under_anomaly_mode,
    "both-kinds": both_kinds,
    "accumulated-hooks": accumulated_hooks,
    "twice": lambda module, x: twice(lambda m: run(m, x).square().sum())(module),
    "several": several,
    "of-weights-too": of_weights_too,
    "a-part": a_part,
    "frozen": frozen,
    "truncated": truncated,
    "in-a-backward-pass": in_a_backward_pass,
    "checkpointed": checkpointed,
    "hooked": hooked,
    "saved-elsewhere": saved_elsewhere,
    "second-derivatives": second_derivatives,
    "other-memory": other_memory,
}


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("kind", CELLS)
def test_as_torch_nn(kind: str, program: str) -> None:
    cell, theirs, x = pair(kind)
    for module in (cell, theirs):
        PROGRAMS[program](module, x)
    assert_same(gradients(cell), gradients(theirs))


@pytest.mark.parametrize("kind", CELLS)
def test_cells_that_share_a_weight(kind: str) -> None:
    ours, theirs, x = pair(kind)
    found = []
    for module in (ours, theirs):
        other = copy.deepcopy(module)
        other.weight_ih = module.weight_ih
        made = torch.stack([run(module, x), run(other, x), run(module, x)])
        made.square().sum().backward()
        found.append([*gradients(module), *gradients(other)])
    assert_same(*found)


@pytest.mark.parametrize("kind", CELLS)
def test_after_a_backward_pass_that_failed(kind: str) -> None:
    cell, theirs, x = pair(kind)
    for module in (cell, theirs):
        made = run(module, x)

        def fail(_: Tensor) -> None:
            raise KeyError("some reason")

        state = module(x[0])
        h = state if isinstance(state, Tensor) else state[0]
        h.register_hook(fail)
        with pytest.raises(KeyError):
            (made.sum() + run(module, x, _state(module, h)).sum()).backward(retain_graph=True)
        module.zero_grad()
        made.square().sum().backward()
    assert_same(gradients(cell), gradients(theirs))


@pytest.mark.parametrize("kind", CELLS)
def test_changed_weights_are_an_error(kind: str) -> None:
    """As in torch.nn: backward would take the new ones for the old."""
    for module in pair(kind)[:2]:
        made = run(module, torch.randn(4, 3, 5, dtype=torch.float64))
        with torch.no_grad():
            module.weight_hh.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            made.sum().backward()


@pytest.mark.parametrize("kind", CELLS)
def test_saved_tensors_that_come_back_changed(kind: str, sums: list[bool]) -> None:
    """The kernel refuses the first try; the sum is none the worse."""
    cell, theirs, x = pair(kind)

    def spread(t: Tensor) -> Tensor:
        return torch.stack([t, t], -1)

    made = []
    for module in (cell, theirs):
        states = run(module, x[:2])  # the views are alive
        with torch.autograd.graph.saved_tensors_hooks(spread, lambda t: t[..., 0]):
            made.append(states.sum() + run(module, x[2:]).square().sum())
    for loss in made:
        loss.backward()
    assert_same(gradients(cell), gradients(theirs))


def test_threads_have_sums_of_their_own() -> None:
    cell, theirs, x = pair("LSTMCell")
    for module in (cell, theirs):
        graphs = [run(module, x * (i + 1)).square().sum() for i in range(4)]
        workers = [threading.Thread(target=graph.backward) for graph in graphs]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert_same(gradients(cell), gradients(theirs))


def test_nothing_is_kept() -> None:
    """Not the graph, not the sums, not the module; and a module in a loop can be pickled."""
    cell, _, x = pair("GRUCell")
    made = run(cell, x)
    pickle.loads(pickle.dumps(copy.deepcopy(cell)))
    weight, count = weakref.ref(cell.weight_ih), len(loops._loops)
    loop = loops.loop_of(cell.weight_ih)
    assert loop is not None
    sums = loop._sums
    del loop
    views = [view() for view in sums._views]
    assert all(view is not None for view in views)
    del views
    made.sum().backward()
    assert not any(each() for refs in sums._sums.values() for each in refs)
    del made
    gc.collect()
    assert not any(view() is not None for view in sums._views)
    del cell
    gc.collect()
    assert weight() is None
    assert len(loops._loops) == count - 1


def test_wrong_sums() -> None:
    layer = kernels.kernel("GRU", 1, 4, 0, True, False, False, True)
    x, weights = torch.randn(2, 3), [torch.randn(12, 3), torch.randn(12, 4), *torch.randn(2, 12)]
    outputs, _, y, saved = layer.forward(x, None, None, weights, None, True, True)
    operands = (x, None, None, weights, None, y, saved, outputs[0], None, None, [True] * 5, False)
    for sums in (weights[:3], [w.double() for w in weights], [w[:-1] for w in weights]):
        with pytest.raises(kernels.RefusedError):
            layer.backward(*operands, sums)
    with pytest.raises(kernels.RefusedError, match="dense"):
        layer.backward(*operands, [torch.randn(12, 5)[:, :3], *weights[1:]])
