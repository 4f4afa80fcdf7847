"""What forward saves for backward, and hooks that see or replace it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, LAYERS, build, pair
from torch import Tensor


@pytest.mark.parametrize("kind", LAYERS)
def test_hooks_that_narrow_what_is_saved(kind: str) -> None:
    """First and second derivatives, from 32 bits of 64."""
    module = build(kind, 4, 6, dtype=torch.float64)
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)

    def second() -> list[Tensor]:
        y, _ = module(x)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), [x, *module.parameters()]))

    expected = second()
    with torch.autograd.graph.saved_tensors_hooks(Tensor.float, lambda saved: saved):
        found = second()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.bfloat16(),
        lambda t: t.double(),
        lambda t: torch.stack((t, t), 1)[:, 0],
        lambda t: t.new_zeros(()).expand(t.shape),
    ],
    ids=["bfloat16", "float64", "strided", "expanded"],
)
def test_hooks_that_hand_back_another_saved_buffer(change: Callable[[Tensor], Tensor]) -> None:
    """Whatever comes back is checked before it is read; what was given in float32 is recomputed."""
    module = build("LSTM", 8, 16)
    x = torch.randn(20, 4, 8)

    def pack(t: Tensor) -> Tensor:
        return change(t) if t.dim() == 1 and t.numel() > 1000 else t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = module(x)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in module.parameters())


def test_hooks_that_hand_back_transposed_tensors() -> None:
    ours, theirs = pair("GRU", 5, 7)
    x = torch.randn(6, 3, 5)
    for module in (ours, theirs):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.t().contiguous() if t.dim() == 2 else t,
            lambda t: t.t() if t.dim() == 2 else t,
        ):
            y, _ = module(x)
        y.square().sum().backward()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}], ids=str)
def test_backward_writes_into_nothing_that_a_hook_has_seen(
    kind: str, options: dict[str, Any]
) -> None:
    module, kept = build(kind, 8, 16, **options), []

    def pack(t: Tensor) -> Tensor:
        kept.append((t, t.detach().clone()))
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y, _ = module(torch.randn(20, 4, 8))
    y.sum().backward()
    assert len(kept) > 3
    assert all(torch.equal(t.detach(), before) for t, before in kept)


@pytest.mark.parametrize("kind", LAYERS)
def test_backward_writes_into_nothing_that_a_node_shows(kind: str) -> None:
    y, _ = build(kind, 8, 16)(torch.randn(20, 4, 8))
    shown = [t for t in y.grad_fn.saved_tensors if t is not None]  # type: ignore[union-attr]
    before = [t.detach().clone() for t in shown]
    y.sum().backward()
    assert all(torch.equal(t.detach(), b) for t, b in zip(shown, before, strict=True))


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_backward_after_a_hook_has_failed(kind: str) -> None:
    """Of the node: backward has written over what was saved, and says so when it runs again."""
    module, x = build(kind, 4, 6), torch.randn(5, 3, 4)[: 1 if kind in CELLS else 5]
    y = module(x[0] if kind in CELLS else x)
    y = y[0] if isinstance(y, tuple) else y

    def fail(*_: object) -> None:
        raise KeyError("once")

    hook = y.grad_fn.register_hook(fail)
    with pytest.raises(KeyError, match="once"):
        y.sum().backward()
    hook.remove()
    with pytest.raises(RuntimeError, match="Call the module again"):
        y.sum().backward()
