"""Around the graph: edits of what was saved, memory, hooks, checkpoints, forward mode and batched
gradients.
"""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import oracle
import pytest
import torch
from support import (
    CELL_FORMS,
    FORMS,
    LAYERS,
    WIDE_DTYPES,
    Leaves,
    assert_agree,
    build,
    build_form,
    check,
    flatten,
    leaves_for,
    plain,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

IN_PLACE = "modified by an inplace operation"


def edit_and_differentiate(module: nn.Module, leaves: Leaves, what: str) -> dict[str, Tensor]:
    """Gradients of `y.sum()` after the tensor called `what` was doubled in place. If it is y, the
    loss is that of the doubled y.
    """
    own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    used = {name: leaf * 1 for name, leaf in own.items()}
    outputs = flatten(plain(module, used))
    tensors = used | dict(module.named_parameters()) | outputs
    with torch.no_grad() if isinstance(tensors[what], nn.Parameter) else nullcontext():
        tensors[what].mul_(2)
    wanted = own | dict(module.named_parameters())
    gradients = torch.autograd.grad(outputs["out.0"].sum(), list(wanted.values()))
    return dict(zip(wanted, gradients, strict=True))


def edited_cases() -> list[tuple[str, str, bool]]:
    """Every tensor around a call, and whether any backward must need its old value."""
    cases = []
    for form, (kind, own) in FORMS.items():
        module = build(kind, 4, 6, **own)
        leaves = leaves_for(module, 5, 3)
        weights = [name for name, _ in module.named_parameters()]
        needed = ["x", *(name for name in weights if "weight" in name)]
        others = [*(name for name in leaves if name != "x"), *(n for n in weights if "bias" in n)]
        others += list(flatten(plain(module, leaves)))
        cases += [(form, name, True) for name in needed] + [(form, name, False) for name in others]
    return cases


@pytest.mark.parametrize(("form", "what", "needed"), edited_cases())
def test_edits_between_forward_and_backward(form: str, what: str, needed: bool) -> None:
    """Editing what was saved is torch's usual error; editing anything else leaves the gradients
    right.
    """
    module = build_form(form, 4, 6)
    leaves = leaves_for(module, 5, 3)
    factor = 2.0 if what == "out.0" else 1.0
    theirs, exact = (sum_gradients(oracle.twin(module, d), leaves, factor) for d in WIDE_DTYPES)
    if needed:
        with pytest.raises(RuntimeError, match=IN_PLACE):
            edit_and_differentiate(module, leaves, what)
        return
    try:
        gradients = edit_and_differentiate(module, leaves, what)
    except RuntimeError as error:
        if "inplace" not in str(error):
            raise
        return
    assert_agree(gradients, theirs, exact)


def sum_gradients(module: nn.Module, leaves: Leaves, factor: float) -> dict[str, Tensor]:
    dtype = next(module.parameters()).dtype
    own = {name: leaf.to(dtype, copy=True).requires_grad_() for name, leaf in leaves.items()}
    wanted = own | dict(module.named_parameters())
    gradients = torch.autograd.grad(plain(module, own)[0].sum() * factor, list(wanted.values()))
    return dict(zip(wanted, gradients, strict=True))


@pytest.mark.parametrize("kind", LAYERS)
def test_an_optimizer_step_before_backward(kind: str) -> None:
    module = build(kind, 4, 6)
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    x = torch.randn(5, 3, 4, requires_grad=True)
    module(x)[0].sum().backward()
    y, _ = module(x)
    optimizer.step()
    with pytest.raises(RuntimeError, match=IN_PLACE):
        y.sum().backward()


@pytest.mark.parametrize("kind", LAYERS)
def test_nothing_keeps_the_graph_alive(kind: str) -> None:
    """No cycle between an output and what is saved for its backward: memory goes with the last
    reference.
    """
    module = build(kind, 4, 6, num_layers=2)
    x = torch.randn(5, 3, 4, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        y, states = module(x)
        outputs = [weakref.ref(output) for output in flatten((y, states)).values()]
        del y, states
        assert [output() for output in outputs] == [None] * len(outputs)
    finally:
        gc.enable()


@pytest.mark.parametrize("form", FORMS)
def test_saved_tensor_hooks(form: str) -> None:
    """What is saved goes through torch's hooks, so that it can be moved elsewhere and checked for
    edits.
    """
    module = build_form(form, 4, 6)
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        saved.append(tensor.detach().clone())
        return len(saved) - 1

    def call(m: nn.Module, leaves: Leaves) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(pack, saved.__getitem__):
            return plain(m, leaves)

    check(module, leaves_for(module, 5, 3), call, oracle_call=plain)
    assert any(tensor.numel() >= 5 * 3 * 4 for tensor in saved)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "not-reentrant"])
@pytest.mark.parametrize("kind", LAYERS)
def test_checkpointing(kind: str, reentrant: bool) -> None:
    module = build(kind, 4, 6)

    def call(m: nn.Module, leaves: Leaves) -> Any:
        def outputs(x: Tensor) -> tuple[Tensor, ...]:
            return tuple(flatten(m(x)).values())

        return checkpoint(outputs, leaves["x"], use_reentrant=reentrant)

    check(module, {"x": torch.randn(5, 3, 4)}, call)


@pytest.mark.parametrize("kind", LAYERS)
def test_anomaly_mode(kind: str) -> None:
    module = build(kind, 4, 6)

    def call(m: nn.Module, leaves: Leaves) -> Any:
        with torch.autograd.detect_anomaly(check_nan=True):
            return plain(m, leaves)

    with pytest.warns(UserWarning, match="Anomaly"):
        check(module, leaves_for(module, 5, 3), call)


@pytest.mark.parametrize("kind", LAYERS)
def test_tensor_hooks(kind: str) -> None:
    """A hook on an output changes the gradient that flows on, one on an input sees it."""
    module = build(kind, 4, 6)
    seen: list[Tensor] = []

    def call(m: nn.Module, leaves: Leaves) -> Any:
        y, state = plain(m, leaves)
        y.register_hook(lambda gradient: gradient * 3)
        leaves["x"].register_hook(lambda gradient: seen.append(gradient.clone()))
        return y, state

    check(module, leaves_for(module, 5, 3), call)
    assert len(seen) == 3  # ours, torch.nn and the oracle


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_in_batches(kind: str) -> None:
    """Several backward passes at once, as torch's older vmap makes them; also of second order."""
    module = build(kind, 4, 6, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    y, _ = module(x)
    weights = torch.randn(7, *y.shape, dtype=torch.float64)
    one_by_one = [torch.autograd.grad(y, x, weight, retain_graph=True)[0] for weight in weights]
    (batched,) = torch.autograd.grad(y, x, weights, retain_graph=True, is_grads_batched=True)
    torch.testing.assert_close(batched, torch.stack(one_by_one))

    def loss(x: Tensor) -> Tensor:
        return module(x)[0].pow(3).sum()

    hessian = torch.autograd.functional.hessian
    torch.testing.assert_close(hessian(loss, x, vectorize=True), hessian(loss, x))


@pytest.mark.parametrize("way", ["plain", "both-ways", "batch-first", "ends", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_derivatives_of_gradients_in_batches(form: str, way: str) -> None:
    """Of each gradient, also where it depends on the input through the outputs before a step."""
    options = {"both-ways": {"bidirectional": True}, "batch-first": {"batch_first": True}}
    module = build_form(form, 2, 4, dtype=torch.float64, **options.get(way, {}))
    x = torch.randn(3, 3, 2, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 3, 1])
    given = pack_padded_sequence(x, lengths, enforce_sorted=False) if way == "packed" else x
    ends = {"lengths": lengths, "reset": torch.eye(3, dtype=torch.bool)} if way == "ends" else {}
    check_gradients_in_batches([x, *module.parameters()], module(given, **ends))


@pytest.mark.parametrize("form", CELL_FORMS)
def test_derivatives_of_gradients_of_cells_in_batches(form: str) -> None:
    module = build_form(form, 2, 4, dtype=torch.float64)
    x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    check_gradients_in_batches([x, *module.parameters()], module(x, module(2 * x)))


def check_gradients_in_batches(inputs: list[Tensor], made: Any) -> None:
    outputs = list(flatten(made).values())
    weights = [torch.randn(2, *z.shape, dtype=torch.float64) for z in outputs]
    for wanted in inputs:
        slopes = [
            torch.autograd.grad(outputs, wanted, each, create_graph=True)[0]
            for each in zip(*weights, strict=True)
        ]
        (batched,) = torch.autograd.grad(
            outputs, wanted, weights, create_graph=True, is_grads_batched=True
        )
        found, expected = (
            torch.autograd.grad(z.pow(3).sum(), inputs, retain_graph=True, materialize_grads=True)
            for z in (batched, torch.stack(slopes))
        )
        torch.testing.assert_close(found, expected)


@pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no-grad"])
@pytest.mark.parametrize("kind", LAYERS)
def test_forward_mode(kind: str, grad: bool) -> None:
    """Tangents are right, never dropped."""
    module = build(kind, 4, 6, dtype=torch.float64).requires_grad_(grad)
    theirs = oracle.twin(module).cpu()  # on a GPU torch.nn has no tangents
    x, tangent = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    with forward_ad.dual_level():
        y, _ = theirs(forward_ad.make_dual(x.cpu(), tangent.cpu()))
        wanted = forward_ad.unpack_dual(y).tangent
        y, _ = module(forward_ad.make_dual(x, tangent))
        actual = forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(actual, wanted.to(x.device))
