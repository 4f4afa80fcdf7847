"""``torch.set_float32_matmul_precision``: products of float32 as bfloat16, where that is faster."""

from __future__ import annotations

from collections.abc import Iterator

import oracle
import pytest
import torch
from support import CELLS, LAYERS, assert_bitwise, build, compiled, evaluate, leaves_for, plain
from torch import Tensor, nn

import rnnkern
from rnnkern import kernels, tolerance

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.cpu_only,
    pytest.mark.skipif(kernels.IS_STAND_IN, reason="a stand-in for GPUs"),
]

KNOWN = "bf16" in kernels.instruction_set() or "amx" in kernels.instruction_set()
"""Whether the CPU multiplies bfloat16."""
HAS_TILES = "amx" in kernels.instruction_set()


@pytest.fixture(autouse=True)
def _highest() -> Iterator[None]:
    yield
    torch.set_float32_matmul_precision("highest")


def results(module: nn.Module, leaves: dict[str, Tensor], precision: str) -> dict[str, Tensor]:
    torch.set_float32_matmul_precision(precision)
    return evaluate(module, leaves)


def by_bfloat16(module: nn.RNNBase, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output, and the gradients by input and weights of its sum, of kernels that multiply so."""
    kernel = kernels.kernel(module.mode, 1, module.hidden_size, 0, True, False, by_bfloat16=True)
    x, weights = leaves["x"], [w.detach() for w in module._flat_weights]
    (y, *_), _, _, saved = kernel.forward(x, None, None, weights, None, training=True)
    wanted = [True] * (1 + len(weights))
    made, _ = kernel.backward(
        x, None, None, weights, None, y, saved, torch.ones_like(y), None, None, wanted, True
    )
    return {str(i): t for i, t in enumerate([y, *made])}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("deterministic", [False, True])
def test_medium_multiplies_as_bfloat16(kind: str, deterministic: bool) -> None:
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    module = build(kind, 20, 37)
    leaves = leaves_for(module, 6, 5, hx=False)
    wanted = by_bfloat16(module, leaves)
    torch.set_float32_matmul_precision("medium")
    for call in (module, compiled(module)):
        module.zero_grad()
        x = leaves["x"].clone().requires_grad_()
        y = call(x)[0]
        y.sum().backward()
        got = [y.detach(), x.grad, *(p.grad for p in module.parameters())]
        assert_bitwise({str(i): t for i, t in enumerate(got)}, wanted)
    highest = results(module, leaves, "highest")["out.0"]
    assert torch.equal(wanted["0"], highest) != KNOWN


@pytest.mark.parametrize("kind", LAYERS)
def test_few_rows_stay_in_float32(kind: str) -> None:
    module = build(kind, 20, 37)
    for T, N in ((1, 15), (15, 1), (3, 5)):
        leaves = leaves_for(module, T, N)
        highest = results(module, leaves, "highest")
        assert_bitwise(results(module, leaves, "medium"), highest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_do_not_change(dtype: torch.dtype) -> None:
    module = build("LSTM", 20, 37, dtype=dtype)
    leaves = leaves_for(module, 6, 5)
    assert_bitwise(results(module, leaves, "medium"), results(module, leaves, "highest"))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("sizes", [(16, 4, 20, 37), (8, 40, 150, 70)])
def test_high_makes_three_products_on_amx(kind: str, sizes: tuple[int, int, int, int]) -> None:
    T, N, I, H = sizes
    module = build(kind, I, H)
    leaves = leaves_for(module, T, N)
    highest, high, medium = (results(module, leaves, p) for p in ("highest", "high", "medium"))
    if not HAS_TILES:
        assert_bitwise(high, highest)
        return
    for name, exact in evaluate(oracle.twin(module, torch.float64), leaves).items():
        size = exact.abs().max()
        error_of_high, error_of_medium = (
            ((made[name] - exact).abs().max() / size).item() for made in (high, medium)
        )
        assert 2**-26 < error_of_high < 2**-13, name
        assert error_of_high < error_of_medium / 20, name


@pytest.mark.parametrize("kind", LAYERS)
def test_high_is_highest_where_few_rows_share_the_weights(kind: str) -> None:
    module = build(kind, 20, 37)
    for T, N in ((100, 1), (40, 3), (1, 63), (9, 7)):
        leaves = leaves_for(module, T, N)
        assert_bitwise(results(module, leaves, "high"), results(module, leaves, "highest"))


@pytest.mark.parametrize("kind", LAYERS)
def test_high_of_any_split(kind: str) -> None:
    """With deterministic algorithms, threads, batch and cuts of the sequence change no bit."""
    torch.set_deterministic_debug_mode("error")
    torch.set_float32_matmul_precision("high")
    module, x = build(kind, 20, 37), torch.randn(7, 70, 20)
    with torch.no_grad():
        whole = module(x)[0]
        for threads in (1, 3):
            torch.set_num_threads(threads)
            parts = [module(part)[0] for part in x.split([1, 32, 37], dim=1)]
            assert torch.equal(torch.cat(parts, dim=1), whole)
        first, state = module(x[:3])
        assert torch.equal(torch.cat([first, module(x[3:], state)[0]]), whole)


@pytest.mark.parametrize("kind", LAYERS)
def test_medium_is_as_accurate_as_bfloat16(kind: str) -> None:
    """Of the same numbers, rounded to bfloat16 in the end."""
    module = build(kind, 20, 37).bfloat16().float()
    leaves = {k: v.bfloat16().float() for k, v in leaves_for(module, 6, 5).items()}
    got = results(module, leaves, "medium")
    theirs = evaluate(oracle.twin(module, torch.bfloat16), leaves)
    exact = evaluate(oracle.twin(module, torch.float64), leaves)
    for name, ours in got.items():
        verdict = tolerance.check(ours.bfloat16(), theirs[name], exact[name])
        assert verdict, f"{name}: {verdict}"


@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str) -> None:
    module = build(kind, 20, 37)
    x = torch.randn(16, 20)
    layer = build(kind.removesuffix("Cell"), 20, 37)
    for name, weight in module.named_parameters():
        getattr(layer, f"{name}_l0").data.copy_(weight)
    torch.set_float32_matmul_precision("medium")
    with torch.no_grad():
        made, (y, _) = module(x), layer(x[None])
        h = made[0] if isinstance(made, tuple) else made
        assert torch.equal(h, y[0])
        torch.set_float32_matmul_precision("highest")
        assert torch.equal(layer(x[None])[0], y) != KNOWN


def test_frozen_layers_keep_their_own_numbers() -> None:
    frozen = rnnkern.freeze(build("LSTM", 20, 37))
    leaves = leaves_for(build("LSTM", 20, 37), 6, 5)
    wanted = plain(frozen, leaves)[0]
    torch.set_float32_matmul_precision("medium")
    assert torch.equal(plain(frozen, leaves)[0], wanted)
