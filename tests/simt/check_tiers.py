"""Both tiers on the stand-in for a GPU, the resident one in every layout that a plan may choose.

Run by tools/simt.sh, with the package that has the CUDA kernels in place of the CPU's.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
from support import check, leaves_for, states_of

import rnnkern
from rnnkern import kernels

pytestmark = pytest.mark.kernel

# Multiprocessors and KiB of shared memory of a block, and T, N, I, H.
LAYOUTS = {
    "one block": ((1, 40), (3, 3, 2, 5)),
    "several blocks": ((5, 40), (4, 3, 2, 33)),
    "teams of rows": ((12, 40), (3, 20, 2, 9)),
    "two tiles of rows": ((1, 60), (3, 12, 2, 9)),
    "passes": ((2, 40), (3, 35, 2, 9)),
    "groups": ((2, 60), (3, 2, 3, 150)),
    "passes and groups": ((2, 90), (3, 35, 2, 70)),
    "little shared memory": ((3, 5), (3, 2, 2, 40)),
    "large tiles": ((4, 90), (2, 31, 2, 40)),
    "registers, shared memory and more": ((30, 17), (2, 3, 2, 240)),
}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.fixture
def layout(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    multiprocessors, kib = LAYOUTS[name][0]
    monkeypatch.setenv("RNNKERN_SIMT_DEVICE", f"{multiprocessors},{kib << 10}")
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    return name


def module_for(cell: str, layout: str, directions: int = 1, **options: Any) -> Any:
    _, _, I, H = LAYOUTS[layout][1]
    return getattr(rnnkern, cell)(I, H, bidirectional=directions == 2, **options)


def check_ragged(module: Any, lengths: torch.Tensor, reset: torch.Tensor) -> None:
    check(
        module,
        leaves_for(module, *reset.shape),
        lambda m, leaves: m(leaves["x"], states_of(leaves), lengths=lengths, reset=reset),
        oracle_call=lambda m, leaves: oracle.run(m, leaves["x"], states_of(leaves), lengths, reset),
    )


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout(layout: str, directions: int, cell: str, dtype: torch.dtype) -> None:
    T, N, _, _ = LAYOUTS[layout][1]
    module = module_for(cell, layout, directions).to(dtype)
    check(module, leaves_for(module, T, N))


RAGGED = ("passes", "groups", "passes and groups", "registers, shared memory and more")


@pytest.mark.parametrize("layout", RAGGED, indirect=True)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_end_and_begin(layout: str, cell: str, dtype: torch.dtype) -> None:
    T, N, _, _ = LAYOUTS[layout][1]
    module = module_for(cell, layout, 2).to(dtype)
    check_ragged(module, torch.randint(0, T + 1, (N,)), torch.rand(T, N) < 0.3)


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize("directions", [1, 2])
def test_integers_are_exact_as_tf32(
    layout: str, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small integers have room in the mantissa of TF32."""
    T, N, I, H = LAYOUTS[layout][1]
    module = module_for("RNN", layout, directions, nonlinearity="relu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((torch.rand(parameter.shape) < min(0.2, 2 / H)).float())
    x = torch.randint(-1, 2, (T, N, I)).float()
    outputs = []
    for tf32 in (False, True):
        if tf32:
            monkeypatch.setenv("RNNKERN_SIMT_TF32", "1")
        leaf = x.clone().requires_grad_()
        y, h_n = module(leaf)
        module.zero_grad()
        (y.sum() + h_n.sum()).backward()
        outputs.append([y, h_n, leaf.grad, *(p.grad for p in module.parameters())])
    for exact, rounded in zip(*outputs, strict=True):
        assert exact.abs().max() < 2**11
        assert torch.equal(exact, rounded)


TIERS = ("resident", "stepwise")


@pytest.mark.parametrize("blocks", [5, 2, 1, 0])
def test_a_share_of_the_device_is_enough(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to none: then nothing may ask for several blocks at once."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    monkeypatch.setenv("RNNKERN_SIMT_BLOCKS", str(blocks))
    module = rnnkern.LSTM(3, 40, bidirectional=True)
    check(module, leaves_for(module, 3, 10))


@pytest.mark.parametrize(
    ("tier", "kernel"),
    [
        ("resident", "resident forward"),
        ("stepwise", "stepwise forward"),
        ("resident", "resident backward"),
        ("stepwise", "stepwise backward"),
        ("stepwise", "sums of gradients"),
    ],
)
def test_a_launch_that_fails_is_an_error(
    tier: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    monkeypatch.setenv("RNNKERN_SIMT_FAILS", kernel)
    module = rnnkern.LSTM(3, 40)
    with pytest.raises(RuntimeError, match=kernel + r" of LSTM \(T=3 N=10 I=3 H=40\): "):
        module(torch.randn(3, 10, 3))[0].sum().backward()


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "LSTM-proj", "GRU"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", TIERS)
def test_without_a_library_of_products(
    tier: str, cell: str, directions: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where cuBLAS is missing all products are made by our own kernel; rows end and begin."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")
    kind, _, proj = cell.partition("-")
    own = {"proj_size": 3} if proj else {}
    module = getattr(rnnkern, kind)(3, 5, bidirectional=directions == 2, **own).to(dtype)
    check(module, leaves_for(module, 4, 3))
    check_ragged(module, torch.tensor([4, 0, 2]), torch.rand(4, 3) < 0.3)


@pytest.mark.parametrize("sizes", [(90, 4, 2, 3), (2, 40, 300, 30), (1, 70, 20, 270)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_several_tiles_without_a_library(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of more numbers than one sum may have."""
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")
    T, N, I, H = sizes
    module = rnnkern.GRU(I, H).to(dtype)
    check(module, leaves_for(module, T, N))


def test_integers_are_exact_as_tf32_without_a_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")
    module = rnnkern.RNN(20, 30, nonlinearity="relu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_((torch.rand(parameter.shape) < 0.1).float())
    x = torch.randint(-1, 2, (3, 9, 20)).float()
    exact = module(x)[0]
    monkeypatch.setenv("RNNKERN_SIMT_TF32", "1")
    assert torch.equal(module(x)[0], exact)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "LSTM-proj", "GRU"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_of_the_stepwise_tier(
    cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is kept for backward: states pass from step to step elsewhere."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "stepwise")
    kind, _, proj = cell.partition("-")
    own = {"proj_size": 3} if proj else {}
    module = getattr(rnnkern, kind)(3, 5, bidirectional=True, **own).to(dtype)
    check(module, leaves_for(module, 4, 3), backward=False)


@pytest.mark.parametrize("cell", ["RNN", "LSTM", "LSTM-proj", "GRU"])
@pytest.mark.parametrize("dtype", [*DTYPES, "tf32"], ids=str)
def test_deterministic_rows_stand_alone(
    cell: str, dtype: torch.dtype | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the other rows nor where a sequence is cut show in the bits."""
    if isinstance(dtype, str):
        monkeypatch.setenv("RNNKERN_SIMT_TF32", "1")
        dtype = torch.float32
    kind, _, proj = cell.partition("-")
    own = {"proj_size": 9} if proj else {}
    module = getattr(rnnkern, kind)(20, 40, **own).to(dtype)
    x = torch.randn(5, 70, 20, dtype=dtype)
    lengths, reset = torch.randint(0, 6, (70,)), torch.rand(5, 70) < 0.3
    lengths[3:9] = lengths[65] = 5
    torch.set_deterministic_debug_mode("error")
    try:
        with torch.no_grad():
            whole = module(x, lengths=lengths, reset=reset)[0]
            row, _ = module(x[:, 65:66], reset=reset[:, 65:66])
            first, state = module(x[:2, 3:9], reset=reset[:2, 3:9])
            last, _ = module(x[2:, 3:9], state, reset=reset[2:, 3:9])
    finally:
        torch.set_deterministic_debug_mode("default")
    assert torch.equal(row, whole[:, 65:66])
    assert torch.equal(torch.cat([first, last]), whole[:, 3:9])


@pytest.mark.parametrize("tier", TIERS)
def test_weights_of_one_row_may_have_any_stride(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    for module in (rnnkern.LSTM(3, 5, proj_size=1), rnnkern.RNN(4, 1)):
        for name, parameter in module.named_parameters():
            if parameter.dim() == 2 and parameter.size(0) == 1:
                column = parameter.detach().clone().view(-1, 1)
                setattr(module, name, torch.nn.Parameter(column.t()))
                assert getattr(module, name).stride() == (1, 1)
        check(module, leaves_for(module, 3, 4))


def test_tf32_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the test above is not one of float32."""
    module = rnnkern.LSTM(20, 30)
    x = torch.randn(5, 3, 20)
    exact = module(x)[0]
    monkeypatch.setenv("RNNKERN_SIMT_TF32", "1")
    error = (module(x)[0] - exact).abs().max()
    assert 0 < error < 2**-10


def test_the_layouts_are_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that there are kernels for; and all that a plan may do."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    tiles: dict[tuple[bool, bool], set[tuple[int, int]]] = {}
    seen = set()
    for name, ((multiprocessors, kib), (T, N, I, H)) in LAYOUTS.items():
        device = kernels.CudaDevice(
            capability=(9, 0), multiprocessors=multiprocessors, shared_bytes=kib << 10
        )
        for mode in ("RNN_TANH", "LSTM", "GRU"):
            layer = kernels.kernel(mode, 1, H, 0, True, False)
            for dtype in (torch.float32, torch.bfloat16):
                for backward in (False, True):
                    plan, _ = kernels.cuda_plan(
                        layer, device, torch.zeros(1, dtype=dtype),
                        T=T, N=N, I=I, tf32=False, backward=backward,
                    )  # fmt: skip
                    assert plan.resident, name
                    stay = plan.held_chunks + plan.shared_chunks
                    tile = (plan.row_tiles, plan.column_tiles)
                    tiles.setdefault((dtype == torch.bfloat16, backward), set()).add(tile)
                    seen |= {
                        ("teams", plan.row_teams > 1),
                        ("passes", plan.passes > 1),
                        ("groups", plan.groups > 1),
                        ("held", plan.held_chunks > 0),
                        ("shared", plan.shared_chunks > 0),
                        ("streamed", stay < plan.warp_chunks),
                        ("all three", 0 < plan.held_chunks < stay < plan.warp_chunks),
                    }
    assert tiles == {
        (True, False): {(2, 1), (2, 2), (2, 4), (3, 4), (4, 4)},
        (True, True): {(1, 1), (1, 2), (2, 4)},
        (False, False): {(2, 1), (2, 2)},
        (False, True): {(1, 1), (1, 2), (1, 4)},
    }
    names = ("teams", "passes", "groups", "held", "shared", "streamed", "all three")
    assert seen == {(name, value) for name in names for value in (False, True)}
