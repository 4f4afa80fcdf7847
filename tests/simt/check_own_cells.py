"""Cells that are written in Python, as libraries of CUDA kernels on the stand-in for a GPU: what
the kernel tests do not ask, and all that a library calls of the extension
(csrc/cuda/cell_library.h).

Run by tools/simt.sh, with the plugins stand_in and three_cells of tests/own_cells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import stand_in
import torch
from check_tiers import (
    DTYPES,
    LAUNCHES,
    LAYOUTS,
    RAGGED,
    TIERS,
    WINDOWS,
    call_of,
    check_ragged,
    expect_error_of_launch,
    layout,
)
from support import (
    WIDE_DTYPES,
    assert_bitwise,
    check,
    check_as_tf32,
    evaluate,
    leaves_for,
)
from test_own_cells import (
    N,
    T,
    check_against_reference,
    of_functions,
    plain,
    strange,
    test_derivatives,
)

import rnnkern
from rnnkern import cells, kernels
from rnnkern.own_cells import build

pytestmark = pytest.mark.kernel
__all__ = ["layout", "test_derivatives"]  # a fixture, and a test that runs here, too

SHIPPED = [getattr(cells, name) for name in cells.__all__]
# The resident tier knows the first two.
MODULES = ("OwnLSTM", "OwnMGU", "OwnPeepholes")


# A library takes seconds to compile, so not every cell has every type.
CASES = [(cell, torch.float64) for cell in (*SHIPPED, strange, plain)]
CASES += [
    (cell, dtype)
    for cell in (cells.lstm, cells.mgu, cells.peephole_lstm)
    for dtype in DTYPES
    if dtype != torch.float64
]


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(
    ("cell", "dtype"), CASES, ids=lambda case: getattr(case, "name", str(case))
)
def test_kernels_and_reference_agree(
    cell: Any, dtype: torch.dtype, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    check_against_reference(cell, dtype)


@pytest.mark.parametrize("name", ["lstm", "mgu", "peephole_lstm", "s_lstm", "ind_rnn"])
def test_which_tier_runs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    kernel = kernels.kernel(getattr(cells, name).mode, 1, 16, 0, True, False)
    device = kernels.CudaDevice(capability=(9, 0), multiprocessors=13, shared_bytes=60 << 10)
    plan, text = kernels.cuda_plan(
        kernel, device, torch.zeros(1), T=3, N=3, I=2, tf32=False, backward=False
    )
    assert plan.resident == (name in ("lstm", "mgu"))
    assert plan.resident or "the cell is none that the resident tier knows" in text


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_functions(dtype: torch.dtype) -> None:
    """Each of them, chosen by c."""
    module = rnnkern.Recurrent(of_functions, 4, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(4))
        module.weight_hh_l0.zero_()
        for k in range(4):
            x = torch.ones(1, 201, 4, dtype=dtype)
            x[0, :, k] = torch.linspace(0.01 if k % 2 else -9, 9, 201, dtype=dtype)
            c0 = torch.full((1, 201, 1), float(k), dtype=dtype)
            hx = torch.zeros_like(c0), c0
            torch.testing.assert_close(module(x, hx)[0], module._torch_forward(x, hx)[0])


@pytest.mark.parametrize("layout", LAYOUTS, indirect=True)
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_layout(layout: str, directions: int, cell: str, dtype: torch.dtype) -> None:
    T, N, I, H = LAYOUTS[layout][1]
    module = getattr(rnnkern, cell)(I, H, bidirectional=directions == 2).to(dtype)
    check(module, leaves_for(module, T, N))
    if layout in RAGGED:
        check_ragged(module, torch.randint(0, T + 1, (N,)), torch.rand(T, N) < 0.3)


# ---- What a library calls of the extension ----


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", MODULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_library_of_products(
    tier: str, cell: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All products are made by the extension's own kernel."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")
    module = getattr(rnnkern, cell)(3, 5, bidirectional=True).to(dtype)
    check(module, leaves_for(module, 4, 3))


@pytest.mark.parametrize("cell", MODULES)
def test_tf32(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")
    module = getattr(rnnkern, cell)(9, 40)
    leaves = leaves_for(module, 6, 9)
    with torch.no_grad():
        exact = module(leaves["x"])[0]
        monkeypatch.setenv("RNNKERN_SIMT_TF32", "1")
        assert 0 < (module(leaves["x"])[0] - exact).abs().max() < 2**-9
    if cell == "OwnLSTM":  # the oracle knows cells of torch.nn alone
        check_as_tf32(module, leaves)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("cell", MODULES)
def test_windows_give_the_bits_of_one(
    tier: str, cell: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The products of the next window are made in a stream of the extension."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")  # whose order depends on the number of rows
    module = getattr(rnnkern, cell)(3, 10, bidirectional=True)
    leaves, call = leaves_for(module, 7, 3), call_of("lengths and reset", 7, 3)
    with torch.no_grad():
        whole = evaluate(module, leaves, call, backward=False)
        for limit in WINDOWS:
            monkeypatch.setenv("RNNKERN_CUDA_WINDOW_BYTES", limit)
            assert_bitwise(evaluate(module, leaves, call, backward=False), whole)


@pytest.mark.parametrize("blocks", [5, 1, 0])
def test_a_share_of_the_device_is_enough(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library says that a launch is refused, and gets a smaller plan."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    monkeypatch.setenv("RNNKERN_SIMT_BLOCKS", str(blocks))
    module = rnnkern.OwnLSTM(3, 40, bidirectional=True)  # type: ignore[attr-defined]
    check(module, leaves_for(module, 3, 10))


@pytest.mark.parametrize(("tier", "kernel"), [*LAUNCHES, ("stepwise", "a product")])
def test_a_launch_that_fails_is_an_error(
    tier: str, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And another call is right."""
    monkeypatch.setenv("RNNKERN_CUBLAS", "0")
    expect_error_of_launch(rnnkern.Recurrent(cells.lstm, 3, 40), tier, kernel, monkeypatch)
    module = rnnkern.OwnLSTM(3, 40)  # type: ignore[attr-defined]
    check(module, leaves_for(module, 3, 10))


def test_an_exception_on_one_side_is_one_on_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the stand-in of cuBLAS, through the library, to Python."""
    module = rnnkern.Recurrent(cells.lstm, 3, 4)
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "stepwise")
    monkeypatch.setenv("RNNKERN_SIMT_REFUSES", "products")
    with pytest.raises(RuntimeError, match="cuBLAS would refuse what a test wants"):
        module(torch.randn(3, 10, 3))


# ---- Libraries ----


def test_no_compiler_is_one_warning_and_the_reference(
    cell_cache: Path, no_refusals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    @rnnkern.cell(gates=("a",))
    def fresh(x: Any, h: Any, prev: Any) -> Any:
        return rnnkern.tanh(x.a + 3 * h.a)

    module = rnnkern.Recurrent(fresh, 3, 4)
    monkeypatch.setenv("CXX", "nothing")
    x = torch.randn(T, N, 3)
    with pytest.warns(rnnkern.FallbackWarning, match="CXX names 'nothing'") as warned:
        y = (module(x)[0], module(x)[0])[1]
    assert len(warned) == 1
    assert torch.equal(y, module._torch_forward(x)[0])
    y.sum().backward()


def test_a_library_of_other_headers_is_refused(cell_cache: Path) -> None:
    class OfOthers(stand_in.StandIn):
        @property
        def flags(self) -> tuple[str, ...]:
            return tuple(flag.replace(kernels.headers, "others") for flag in super().flags)

    mode = cells.rnn_tanh.mode
    target = OfOthers("float", 0)
    content = build.library(mode, target)
    with pytest.raises(RuntimeError, match="from the headers of another version of rnnkern"):
        build.load_content(mode, target, content)


def test_libraries_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "right.so"
    mode = cells.mgu.mode
    path.write_bytes(build.library(mode, build.target_for(mode, "float", 0)))
    with pytest.raises(RuntimeError, match=f"it has {mode} for float, wanted other for float"):
        kernels.load_cuda_library(str(path), "other", "float", 0)
    with pytest.raises(RuntimeError, match=r"wanted .* for double"):
        kernels.load_cuda_library(str(path), mode, "double", 0)
    with pytest.raises(RuntimeError, match="it is not the library of a cell"):
        kernels.load_cuda_library(kernels._C.__file__, mode, "float", 0)
    with pytest.raises(RuntimeError, match="the stand-in has no kernels for the CPU"):
        kernels.load_library(str(path), mode, "float")
    with pytest.raises(IndexError):
        kernels.load_cuda_library(str(path), mode, "float", 64)
