"""Outputs that the caller changes in place, which backward may need unchanged."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import subprocesses
import torch
from support import CELLS, LAYERS, build, in_a_process, pack_rows
from torch import Tensor, nn

import rnnkern

Module = Callable[..., Any]

EDITS: dict[str, Callable[[Tensor], Tensor]] = {
    "add": lambda y: y.add_(1.5),
    "relu": lambda y: y.relu_(),
    "scale": lambda y: y.mul_(2).sub_(0.5),
    "zero": lambda y: y.zero_(),
    "one step": lambda y: y.index_fill_(0, torch.tensor([0]), 0.25),
    "a view": lambda y: y[1:].mul_(3)._base,  # type: ignore[return-value]
    "two edits": lambda y: y.add_(y.detach()).tanh_(),
    "module": lambda y: nn.ReLU(inplace=True)(y),
    "threshold": lambda y: nn.functional.threshold_(y, 0.1, 0.0),
}


SIZES = {"small": (5, 3, 4, 6), "large": (40, 16, 4, 33)}  # in memory of its own, and of torch


def edited(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor], *, copies: bool) -> Any:
    y, state = module(x)
    y = edit(y.clone() if copies else y)
    loss = y.square().sum() + sum(
        s.sum() for s in (state if isinstance(state, tuple) else (state,))
    )
    return [y.detach(), *torch.autograd.grad(loss, list(module.parameters()))]


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_changed_in_place(kind: str, size: str, edit: str) -> None:
    """The gradients are those of the same edits of a copy."""
    T, N, inputs, H = SIZES[size]
    module = build(kind, inputs, H)
    x = torch.randn(T, N, inputs)
    got = edited(module, x, EDITS[edit], copies=False)
    wanted = edited(module, x, EDITS[edit], copies=True)
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_first": True},
        {"bidirectional": True},
        {"num_layers": 2},
        {"num_layers": 2, "bidirectional": True, "batch_first": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_of_other_layers_changed_in_place(
    kind: str, size: str, options: dict[str, Any]
) -> None:
    T, N, inputs, H = SIZES[size]
    module = build(kind, inputs, H, **options)
    x = torch.randn(T, N, inputs)
    for edit in ("scale", "relu"):
        got = edited(module, x, EDITS[edit], copies=False)
        wanted = edited(module, x, EDITS[edit], copies=True)
        for mine, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(mine, other)


def packed_call(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    packed = pack_rows([row[: 2 + i] for i, row in enumerate(x)], enforce_sorted=False)
    y, _ = module(packed)
    return edit(y.data)


def ragged_call(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    lengths = torch.arange(2, 2 + x.shape[1]).clamp(max=x.shape[0])
    return edit(module(x, lengths=lengths)[0])


def unbatched_call(module: nn.Module, x: Tensor, edit: Callable[[Tensor], Tensor]) -> Tensor:
    return edit(module(x[:, 0])[0])


@pytest.mark.parametrize("call", [packed_call, ragged_call, unbatched_call])
@pytest.mark.parametrize("kind", LAYERS)
def test_other_calls_whose_output_is_changed_in_place(kind: str, call: Module) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)
    results = []
    for copies in (False, True):

        def edit(y: Tensor, copies: bool = copies) -> Tensor:
            return (y.clone() if copies else y).mul_(2).relu_()

        y = call(module, x, edit)
        results.append(torch.autograd.grad(y.square().sum(), list(module.parameters())))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", LAYERS)
def test_an_output_changed_in_place_under_other_modes(kind: str) -> None:
    """Second derivatives, deterministic algorithms, and a transform of torch.func."""
    module = build(kind, 4, 6, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def penalty(x: Tensor, copies: bool) -> Tensor:
        y = module(x)[0]
        y = (y.clone() if copies else y).mul_(2)
        (dx,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return dx.square().sum()

    def total(x: Tensor, copies: bool) -> Tensor:
        y = module(x)[0]
        return (y.clone() if copies else y).mul_(2).pow(3).sum()

    for function in (
        lambda copies: torch.autograd.grad(penalty(x, copies), x)[0],
        lambda copies: torch.func.grad(total)(x, copies),
    ):
        torch.testing.assert_close(function(False), function(True))
    torch.use_deterministic_algorithms(True)
    torch.testing.assert_close(
        *(torch.autograd.grad(total(x, copies), x)[0] for copies in (False, True))
    )


def test_an_output_that_does_not_change_is_not_copied() -> None:
    """torch copies the large one when it is written to, and no sooner."""
    y, _ = build("GRU", 4, 33)(torch.randn(40, 16, 4))
    is_shared = torch._C._is_cow_tensor
    before = y.detach().clone()
    assert is_shared(y)
    y.data.mul_(2)
    assert not is_shared(y)
    assert torch.equal(y, 2 * before)


def address(tensor: Tensor) -> int:
    """Where a tensor is. `data_ptr` would make it leave memory that it shares."""
    return tensor.const_data_ptr()


shares_memory = pytest.mark.skipif(
    not hasattr(Tensor, "const_data_ptr"), reason="this torch does not tell where a copy is"
)


@shares_memory
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_backward_does_not_copy_the_output(kind: str) -> None:
    """What it keeps of a large output stays in the same memory, also if backward runs twice."""
    cell = kind in CELLS
    x = torch.randn(64, 4) if cell else torch.randn(40, 16, 4)
    made = build(kind, 4, 100)(x)
    y = made[0] if isinstance(made, tuple) else made
    assert y.grad_fn is not None
    kept = y.grad_fn.saved_tensors[0]  # type: ignore[attr-defined]
    for _ in range(2):
        y.sum().backward(retain_graph=True)
        assert address(kept) == address(y)
        assert torch._C._is_cow_tensor(y)
    y.data.mul_(2)
    assert address(kept) != address(y)
    torch.testing.assert_close(2 * kept, y.detach())


@shares_memory
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_the_next_call_does_not_copy_the_output(kind: str) -> None:
    """As an input, as a state, and in the backward pass of the call that has read it."""
    module, x, cell = build(kind, 100, 100), torch.randn(64, 100), kind in CELLS

    def outputs(made: Any) -> tuple[Tensor, ...]:
        if not cell:
            return (made[0],)
        return made if isinstance(made, tuple) else (made,)

    def gradients(first: tuple[Tensor, ...]) -> Any:
        state = first if len(first) == 2 else first[0]
        second = module(first[0], state) if cell else module(first[0])
        loss = outputs(second)[0].square().sum()
        return torch.autograd.grad(loss, [*module.parameters(), *first])

    first = outputs(module(x if cell else x.view(4, 16, 100)))
    at = address(first[0])
    got = gradients(tuple(z.detach().requires_grad_() for z in first))
    assert torch._C._is_cow_tensor(first[0])
    assert address(first[0]) == at
    wanted = gradients(tuple(z.detach().clone().requires_grad_() for z in first))
    for mine, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("kind", LAYERS)
def test_what_a_small_call_saves_is_bytes_until_somebody_looks(kind: str) -> None:
    module, x = build(kind, 4, 6), torch.randn(5, 3, 4)
    y = module(x)[0]
    assert type(y.grad_fn.own) is bytearray
    wanted = torch.autograd.grad(y.sum(), list(module.parameters()))
    seen = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = module(x)[0]
    assert all(type(tensor) in (Tensor, nn.Parameter) for tensor in seen)
    assert not hasattr(y.grad_fn, "own")
    for mine, other in zip(
        torch.autograd.grad(y.sum(), list(module.parameters())), wanted, strict=True
    ):
        torch.testing.assert_close(mine, other)


def test_an_output_may_move_while_another_thread_reads_it() -> None:
    assert in_a_process(subprocesses.moves_while_read) == 20


@pytest.mark.parametrize("to", ["to_sparse", "to_sparse_csr", "to_mkldnn"])
def test_a_waiting_graph_changes_no_other_call(to: str) -> None:
    """While a large output has a lazy copy, operands without plain memory are what they were."""
    module, x = build("RNNCell", 3, 5), getattr(torch.eye(3), to)()

    def result() -> Any:
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore", rnnkern.FallbackWarning)
                return module(x).shape
        except (RuntimeError, TypeError, NotImplementedError) as error:
            return str(error)

    alone = result()
    waiting, _ = build("GRU", 4, 33)(torch.randn(40, 16, 4))
    assert torch._C._is_cow_tensor(waiting)
    assert result() == alone


@pytest.mark.parametrize("dtypes", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("kind", LAYERS)
def test_small_calls_whose_input_a_hook_has_converted(
    kind: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    own, other = dtypes
    module = build(kind, 4, 6, dtype=own)
    x = torch.randn(5, 3, 4).to(own).requires_grad_()
    wanted = torch.autograd.grad(module(x)[0].sum(), [x, *module.parameters()])
    y = module(x)[0]
    y.grad_fn._raw_saved_tensors[1].register_hooks(lambda t: t.to(other), lambda t: t)
    got = torch.autograd.grad(y.sum(), [x, *module.parameters()])
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
