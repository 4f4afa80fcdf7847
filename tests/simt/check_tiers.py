"""Both tiers on the stand-in for a GPU, the resident one in every layout that a plan may choose.

Run by tools/simt.sh, with the package that has the CUDA kernels in place of the CPU's.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from cuda_layouts import expect_every_layout
from support import (
    Call,
    Leaves,
    assert_agree,
    assert_bitwise,
    check,
    check_as_tf32,
    evaluate,
    leaves_for,
    plain,
    states_of,
    yardsticks,
)
from torch.nn.utils.rnn import pack_padded_sequence

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


# Rows of x in memory, which rows take part, and where episodes begin.
SEQUENCES = ("time first", "batch first", "lengths and reset", "packed")


def call_of(sequence: str, T: int, N: int) -> Call:
    lengths, reset = torch.randint(0, T + 1, (N,)), torch.rand(T, N) < 0.3
    lengths[0] = T

    def call(module: Any, leaves: Leaves) -> Any:
        if sequence == "lengths and reset":
            return module(leaves["x"], states_of(leaves), lengths=lengths, reset=reset)
        if sequence == "packed":
            x = pack_padded_sequence(leaves["x"], lengths.clamp(min=1), enforce_sorted=False)
            return module(x, states_of(leaves))
        return plain(module, leaves)

    return call


WINDOWS = ("0", "700", "2500")  # bytes: one step, some, more


@pytest.mark.parametrize("sequence", SEQUENCES)
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "LSTM-proj", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_windows_give_the_bits_of_one(
    tier: str, cell: str, directions: int, dtype: torch.dtype, sequence: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """But for sums over steps, the gradients of weights, whose order the windows change."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")  # whose order depends on the number of rows
    T, N, I, H = 7, 3, 3, 10
    kind, _, proj = cell.partition("-")
    own = {"proj_size": 3} if proj else {}
    batch_first = sequence == "batch first"
    module = getattr(rnnkern, kind)(
        I, H, bidirectional=directions == 2, batch_first=batch_first, **own
    ).to(dtype)
    leaves, call = leaves_for(module, T, N), call_of(sequence, T, N)
    yardstick = yardsticks(module, leaves, call) if sequence == "time first" else None
    for backward in (False, True):
        whole = evaluate(module, leaves, call, backward=backward)
        for limit in WINDOWS:
            with monkeypatch.context() as patch:
                patch.setenv("RNNKERN_CUDA_WINDOW_BYTES", limit)
                parts = evaluate(module, leaves, call, backward=backward)
            sums = {name for name in parts if "weight" in name}
            assert_bitwise(without(parts, sums), without(whole, sums))
            near = {name: whole[name].double() for name in sums}
            assert_agree(
                {name: parts[name] for name in sums}, {name: whole[name] for name in sums}, near
            )
    if yardstick:
        assert_agree(parts, *yardstick)


def without(results: dict[str, torch.Tensor], names: set[str]) -> dict[str, torch.Tensor]:
    return {name: result for name, result in results.items() if name not in names}


@pytest.mark.parametrize("layout", RAGGED, indirect=True)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_states_pass_from_window_to_window(
    layout: str, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever passes, groups and rows a block has; with products in an order of their own."""
    T, N, _, _ = LAYOUTS[layout][1]
    module = module_for(cell, layout, 2).to(dtype)
    leaves, call = leaves_for(module, T, N + N % 2), call_of("lengths and reset", T, N + N % 2)
    with torch.no_grad():
        whole = evaluate(module, leaves, call, backward=False)
        monkeypatch.setenv("RNNKERN_CUDA_WINDOW_BYTES", "0")
        assert_bitwise(evaluate(module, leaves, call, backward=False), whole)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "LSTM-proj", "GRU"])
def test_scratch_memory_does_not_grow_with_the_steps(
    tier: str, cell: str, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    monkeypatch.setenv("RNNKERN_CUDA_WINDOW_BYTES", "0")
    kind, _, proj = cell.partition("-")
    own = {"proj_size": 3} if proj else {}
    module = getattr(rnnkern, kind)(3, 5, batch_first=True, **own).bfloat16()

    def scratch(T: int) -> str:
        monkeypatch.delenv("RNNKERN_SIMT_MEMORY", raising=False)
        x = torch.randn(64, T, 3, dtype=torch.bfloat16)
        if backward:
            loss = module(x)[0].sum()
        monkeypatch.setenv("RNNKERN_SIMT_MEMORY", "0")
        with pytest.raises(RuntimeError, match=r"no memory of \d+ bytes") as refused:
            loss.backward() if backward else module(x)
        return str(refused.value)

    assert scratch(60) == scratch(120)


def test_a_share_of_the_device_takes_windows_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a refused launch has left in the second stream disturbs no other call."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    monkeypatch.setenv("RNNKERN_CUDA_WINDOW_BYTES", "0")
    module = rnnkern.LSTM(3, 40, bidirectional=True)
    for blocks in (5, 1, 0):
        monkeypatch.setenv("RNNKERN_SIMT_BLOCKS", str(blocks))
        check(module, leaves_for(module, 3, 10), backward=False)


@pytest.mark.parametrize("blocks", [5, 2, 1, 0])
def test_a_share_of_the_device_is_enough(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Down to none: then nothing may ask for several blocks at once."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    monkeypatch.setenv("RNNKERN_SIMT_BLOCKS", str(blocks))
    module = rnnkern.LSTM(3, 40, bidirectional=True)
    check(module, leaves_for(module, 3, 10))


# Tiers, and kernels of them.
LAUNCHES = [(tier, f"{tier} {which}") for which in ("forward", "backward") for tier in TIERS]


def expect_error_of_launch(
    module: torch.nn.RNNBase, tier: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launch of the kernel fails: the error names it, the cell and the shape."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    with monkeypatch.context() as patch:
        patch.setenv("RNNKERN_SIMT_FAILS", kernel)
        wanted = f"{kernel} of {module.mode} (T=3 N=10 I=3 H=40): "
        with pytest.raises(RuntimeError, match=re.escape(wanted)):
            module(torch.randn(3, 10, 3))[0].sum().backward()


@pytest.mark.parametrize(("tier", "kernel"), [*LAUNCHES, ("stepwise", "sums of gradients")])
def test_a_launch_that_fails_is_an_error(
    tier: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expect_error_of_launch(rnnkern.LSTM(3, 40), tier, kernel, monkeypatch)


def test_a_block_that_waits_in_vain_is_an_error_that_names_the_kernel(tmp_path: Path) -> None:
    """If a flag is never set, a block on a GPU gives up after a while."""
    source = Path(__file__).parents[2] / "csrc" / "cuda" / "resident.cuh"
    lines = source.read_text(encoding="utf-8").splitlines()
    (line,) = (n for n, text in enumerate(lines, 1) if text.strip().startswith("set_flag("))
    run = "import torch, rnnkern; rnnkern.LSTM(3, 40)(torch.randn(3, 10, 3))"
    env = {
        **os.environ,
        "RNNKERN_CUDA_TIER": "resident",
        "RNNKERN_SIMT_WITHOUT": f"{source.name}:{line}",
    }
    done = subprocess.run(  # elsewhere, because the current folder comes first
        [sys.executable, "-c", run], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("RuntimeError: resident forward of LSTM (T=3 N=10 I=3 H=40): ")
    assert "wait for flags that nobody sets" in last


def test_multiprocessors_may_be_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    layer = kernels.kernel("LSTM", 1, 150, 0, True, False)
    for free, blocks in (("0", 13), ("4", 9), ("13", 0), ("99", 0)):
        monkeypatch.setenv("RNNKERN_CUDA_LEAVE_FREE", free)
        device = kernels.CudaDevice(capability=(9, 0), multiprocessors=13, shared_bytes=60 << 10)
        plan, text = kernels.cuda_plan(
            layer, device, torch.zeros(1), T=3, N=3, I=2, tf32=False, backward=False
        )
        assert plan.resident == (blocks > 0)
        assert not blocks or f"blocks of {blocks} at once" in text
        module = rnnkern.LSTM(2, 150)
        check(module, leaves_for(module, 3, 3))


@pytest.mark.parametrize("function", ["tanh", "sigmoid"])
def test_quotients_without_a_branch(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GRU whose state is z h or n (1 - z), and whose gates are 1 or an activation of x."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "stepwise")
    module = rnnkern.GRU(1, 1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
        module.weight_ih_l0[1 if function == "sigmoid" else 2] = 1
        module.bias_ih_l0[1] = 0 if function == "sigmoid" else -1e30  # z
        x = torch.cat([torch.linspace(-90, 90, 1001), torch.linspace(-1, 1, 1001)]).view(1, -1, 1)
        y, _ = module(x, torch.ones(1, x.shape[1], 1))
    exact = getattr(x.double(), function)()[0]
    ulp = 2.0 ** (exact.abs().clamp(min=2**-126).log2().floor() - 23)
    normal = exact.abs() > 2**-126
    assert ((y[0] - exact).abs() / ulp)[normal].max() <= 2.5
    assert (y[0].abs() <= 1).all()


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
    """The bits show neither the other rows nor the cut of a sequence."""
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


@pytest.mark.parametrize("H", [40, 129])
@pytest.mark.parametrize("cell", ["RNN", "LSTM", "GRU"])
@pytest.mark.parametrize("tier", TIERS)
def test_tf32_is_as_exact_as_its_operands(
    tier: str, cell: str, H: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")  # our own product rounds as well
    monkeypatch.setenv("RNNKERN_SIMT_TF32", "1")
    module = getattr(rnnkern, cell)(9, H)
    check_as_tf32(module, leaves_for(module, 6, 9))


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
    expect_every_layout(LAYOUTS)
