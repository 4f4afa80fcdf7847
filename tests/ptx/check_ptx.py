"""The CUDA kernels as nvcc has made them, on the stand-in of tests/simt: their results beside those
of the stand-in's own kernels, torch.nn's and the oracle's. All have the blocks of a GPU.

Run by tools/ptx.sh.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cuda_layouts import expect_every_layout
from hypothesis import given
from hypothesis import strategies as st
from scans import (
    DTYPES,
    LAYOUTS,
    MODULES,
    SMALL,
    STAND_IN,
    Record,
    Scans,
    all_scans,
    compare,
    module_for,
    on,
    ragged,
    stand_in,
)
from support import (
    assert_agree,
    assert_bitwise,
    check,
    evaluate,
    leaves_for,
    of_integers,
    penalized,
    plain,
    with_integer_gradients,
    yardsticks,
)
from table import CASE

pytestmark = pytest.mark.kernel

TIERS = ("resident", "stepwise")


@pytest.mark.parametrize(
    ("layout", "directions"), [*((name, 1) for name in LAYOUTS), *((name, 2) for name in SMALL)]
)
@all_scans()
def test_every_layout(scans: Scans, layout: str, directions: int, record_property: Record) -> None:
    T, N, I, H = LAYOUTS[layout][1]
    module = scans.module(I, H, directions=directions)
    compare(scans, module, leaves_for(module, T, N), record=record_property, **on(layout))


@pytest.mark.parametrize(
    ("element", "layout"),
    [
        *((element, layout) for element in DTYPES for layout in SMALL),
        *((element, "registers, shared memory and more") for element in ("Bf16", "F16")),
    ],
)
@pytest.mark.parametrize("cell", MODULES)
def test_the_stand_in_with_the_blocks_of_a_gpu(cell: str, element: str, layout: str) -> None:
    """All cells and types, whichever of them are built from PTX."""
    T, N, I, H = LAYOUTS[layout][1]
    module = module_for(cell, element, I, H)
    with stand_in(STAND_IN, **on(layout)):
        check(module, leaves_for(module, T, N))


@pytest.mark.parametrize("layout", SMALL)
@all_scans()
def test_weak_memory(scans: Scans, layout: str, record_property: Record) -> None:
    """Of what a block stores the others see nothing before its release, and what it has loaded
    stays as it was until it acquires. Rows end and begin.
    """
    T, N, I, H = LAYOUTS[layout][1]
    module = scans.module(I, H, directions=2)
    leaves, options = leaves_for(module, T, N), {**on(layout), "SIMT_WEAK": "1"}
    compare(scans, module, leaves, record=record_property, **options)
    compare(scans, module, leaves, **ragged(T, N), record=record_property, **options)


@pytest.mark.parametrize("layout", ["passes", "groups", "passes and groups"])
@all_scans()
def test_rows_that_end_and_begin(scans: Scans, layout: str, record_property: Record) -> None:
    T, N, I, H = LAYOUTS[layout][1]
    module = scans.module(I, H, directions=2)
    leaves = leaves_for(module, T, N)
    compare(scans, module, leaves, **ragged(T, N), record=record_property, **on(layout))


@pytest.mark.parametrize("weak", ["0", "1"], ids=["", "weak memory"])
@pytest.mark.parametrize("layout", ["several blocks", "passes and groups"])
@all_scans()
def test_windows_of_steps(scans: Scans, layout: str, weak: str, record_property: Record) -> None:
    """A launch for each step, whose input product is made beside the launch before."""
    T, N, I, H = LAYOUTS[layout][1]
    module = scans.module(I, H, directions=2)
    leaves = leaves_for(module, T, N)
    options = {**on(layout), "CUDA_WINDOW_BYTES": "0", "SIMT_WEAK": weak}
    compare(scans, module, leaves, **ragged(T, N), record=record_property, **options)


@pytest.mark.parametrize("library", [True, False], ids=["library", "own products"])
@pytest.mark.parametrize("tier", TIERS)
@all_scans()
def test_tiers_and_products(
    scans: Scans, tier: str, library: bool, record_property: Record
) -> None:
    """Without a library of products they are made by our own kernel."""
    module = scans.module(3, 21, directions=2, batch_first=True)
    options: dict[str, Any] = {"tier": tier, "CUBLAS": str(int(library))}
    compare(scans, module, leaves_for(module, 4, 5), record=record_property, **options)


@all_scans()
def test_products_of_several_tiles(scans: Scans, record_property: Record) -> None:
    """And of more numbers than one sum may have."""
    module = scans.module(300, 70)
    leaves = leaves_for(module, 2, 40)
    compare(scans, module, leaves, record=record_property, tier="stepwise", CUBLAS="0")


@pytest.mark.parametrize("weak", ["0", "1"], ids=["", "weak memory"])
@all_scans(cells=("Lstm",))
def test_projections(scans: Scans, weak: str, record_property: Record) -> None:
    module = scans.module(3, 21, directions=2, proj_size=9)
    leaves = leaves_for(module, 4, 5)
    compare(scans, module, leaves, **ragged(4, 5), record=record_property, SIMT_WEAK=weak)


@pytest.mark.parametrize("library", ["1", "0"], ids=["library", "own products"])
@all_scans(elements=("float", "double"))
def test_second_derivatives(scans: Scans, library: str, record_property: Record) -> None:
    module = scans.module(3, 21, directions=2)
    options: dict[str, Any] = {"record": record_property, "CUBLAS": library}
    compare(scans, module, leaves_for(module, 4, 5), penalized(plain), **options)
    own = ragged(4, 5)
    call, oracle_call = penalized(own["call"]), penalized(own["oracle_call"])
    compare(scans, module, leaves_for(module, 4, 5), call, oracle_call=oracle_call, **options)


@all_scans(cells=("Lstm",), elements=("float", "double"))
def test_second_derivatives_of_projections(scans: Scans, record_property: Record) -> None:
    module = scans.module(3, 21, proj_size=9)
    leaves = leaves_for(module, 4, 5)
    compare(scans, module, leaves, penalized(plain), record=record_property)


@pytest.mark.parametrize(
    "layout", ["several blocks", "two tiles of rows, forward", "passes", "groups", "large tiles"]
)
@all_scans(cells=("Elman<Relu>",))
def test_integers_are_exact(scans: Scans, layout: str, record_property: Record) -> None:
    """Small integers have room in every mantissa, also in that of TF32."""
    T, N, I, H = LAYOUTS[layout][1]
    module, leaves = of_integers(T, N, I, H, scans.dtype)
    results = []
    for libraries in (STAND_IN, scans.libraries):
        for own in ({}, {"CUBLAS": "0"}, {"SIMT_TF32": "1"}, {"CUDA_WINDOW_BYTES": "0"}):
            with stand_in(libraries, **on(layout), **own):
                results.append(with_integer_gradients(module, leaves))
    for other in results[1:]:
        assert_bitwise(results[0], other)
    record_property(CASE, scans.name)


@pytest.mark.parametrize(
    ("layout", "cublas"), [*((name, "1") for name in SMALL), ("several blocks", "0")]
)
@all_scans(elements=("float",))
def test_tf32_rounds_as_the_stand_in_does(
    scans: Scans, layout: str, cublas: str, record_property: Record
) -> None:
    T, N, I, H = LAYOUTS[layout][1]
    module = scans.module(I, H, directions=2)
    leaves = leaves_for(module, T, N)
    _, reference = yardsticks(module, leaves)
    own = {**on(layout), "SIMT_TF32": "1", "CUBLAS": cublas}
    with stand_in(STAND_IN, **own):
        native = evaluate(module, leaves)
    with stand_in(scans.libraries, **own):
        ours = evaluate(module, leaves)
    assert_agree(ours, native, reference)
    record_property(CASE, scans.name)


@all_scans()
def test_a_state_whose_bits_are_all_ones(scans: Scans, record_property: Record) -> None:
    """It is a NaN, and what an exchange by value takes for a number that is not there yet."""
    T, N, I, H = LAYOUTS["several blocks"][1]
    module = scans.module(I, H)
    h0 = torch.full((1, N, H), -1, dtype=BITS[scans.dtype.itemsize]).view(scans.dtype)
    states = (h0, torch.zeros_like(h0)) if module.mode == "LSTM" else h0
    for libraries in (STAND_IN, scans.libraries):
        with stand_in(libraries, **on("several blocks")), torch.no_grad():
            y, _ = module(torch.zeros(T, N, I, dtype=scans.dtype), states)
        assert y.isnan().all()
    record_property(CASE, scans.name)


BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of a number
# Capability, multiprocessors and KiB of shared memory.
GPUS = {
    "A100": ((8, 0), 108, 163),
    "RTX 4090": ((8, 9), 128, 99),
    "H100": ((9, 0), 132, 227),
    "B200": ((10, 0), 148, 227),
}


def on_gpu(name: str) -> str:
    (major, minor), multiprocessors, kib = GPUS[name]
    return f"{multiprocessors},{kib << 10},{major},{minor}"


@pytest.mark.parametrize("gpu", GPUS)
@all_scans()
def test_the_plans_of_gpus(scans: Scans, gpu: str, record_property: Record) -> None:
    """What would run there, in either tier, at the width of its device."""
    module = scans.module(20, 256)
    leaves = leaves_for(module, 2, 17)
    compare(scans, module, leaves, record=record_property, device=on_gpu(gpu))


@all_scans(cells=("Lstm",), elements=("Bf16", "F16"))
def test_the_weights_of_a_large_layer_in_registers(scans: Scans, record_property: Record) -> None:
    """768 units of a 16-bit type are the largest layer of which they all are."""
    module = scans.module(20, 768)
    leaves = leaves_for(module, 2, 16)
    compare(scans, module, leaves, record=record_property, device=on_gpu("H100"))


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    size = st.integers(1, 9) | st.integers(1, 70)
    return {
        "T": draw(st.integers(1, 5)),
        "N": draw(size),
        "I": draw(size),
        "H": draw(size),
        "directions": draw(st.integers(1, 2)),
        "is_ragged": draw(st.booleans()),
        "multiprocessors": draw(st.integers(1, 30)),
        "kib": draw(st.integers(8, 227)),
        "tier": draw(st.sampled_from(TIERS)),
        "weak": draw(st.sampled_from(("0", "1"))),
        "seed": draw(st.integers(0, 2**31)),
    }


@all_scans()
def test_any_shape(scans: Scans, record_property: Record) -> None:
    @given(problems())
    def check(p: dict[str, Any]) -> None:
        T, N = p["T"], p["N"]
        torch.manual_seed(p["seed"])
        module = scans.module(p["I"], p["H"], directions=p["directions"])
        compare(
            scans,
            module,
            leaves_for(module, T, N),
            **(ragged(T, N) if p["is_ragged"] else {}),
            record=record_property,
            device=f"{p['multiprocessors']},{p['kib'] << 10}",
            tier=p["tier"],
            SIMT_WEAK=p["weak"],
        )

    check()


def test_the_layouts_are_all_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that there are kernels for; and all that a plan may do."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    expect_every_layout(LAYOUTS)
