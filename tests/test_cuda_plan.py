"""The plan of a GPU as a table: tier, tile, split and residency, from sizes and properties alone.
No GPU is needed.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnnkern import kernels
from rnnkern.bench.workloads import load_workloads

pytestmark = pytest.mark.cpu_only

# Compute capability, multiprocessors, shared memory that a block may have in KiB.
GPUS = {
    "A100": ((8, 0), 108, 163),
    "RTX 4090": ((8, 9), 128, 99),
    "H100": ((9, 0), 132, 227),  # H200 is the same
    "B200": ((10, 0), 148, 227),
}
FP32, TF32, BF16 = (torch.float32, False), (torch.float32, True), (torch.bfloat16, False)
FP16, FP64 = (torch.float16, False), (torch.float64, False)
Kind = tuple[torch.dtype, bool]


def plan(
    gpu: str,
    mode: str,
    sizes: tuple[int, int, int, int],
    kind: Kind,
    *,
    backward: bool = False,
    directions: int = 1,
    proj: int = 0,
    **options: bool,
) -> tuple[Any, str]:
    capability, multiprocessors, kib = GPUS[gpu]
    T, N, I, H = sizes
    return kernels.cuda_plan(
        kernels.kernel(mode, directions, H, proj, True, False),
        kernels.CudaDevice(
            capability=capability, multiprocessors=multiprocessors, shared_bytes=kib << 10
        ),
        torch.zeros(1, dtype=kind[0]),
        T=T,
        N=N,
        I=I,
        tf32=kind[1],
        backward=backward,
        **options,
    )


SIZES = {
    name: (w.steps, w.batch, w.input_size, w.hidden_size)
    for name, w in load_workloads("cuda").items()
}

# Tile of 16 rows by 8 columns, teams of rows, blocks of a team, passes over rows, groups of units,
# units of a group; chunks of weights of a warp in registers, in shared memory, and all.
Row = tuple[tuple[int, int], int, int, int, int, int, tuple[int, int, int]]
TABLE: list[tuple[str, str, str, Kind, bool, Row]] = [
    ("H100", "LSTM", "notebook", BF16, False, ((2, 1), 1, 1, 1, 1, 4, (1, 0, 1))),
    ("H100", "LSTM", "notebook", BF16, True, ((1, 1), 1, 1, 1, 1, 16, (1, 0, 1))),
    ("H100", "LSTM", "mnist_lstm", BF16, False, ((2, 1), 8, 16, 1, 1, 4, (1, 0, 1))),
    ("H100", "LSTM", "mnist_lstm", BF16, True, ((1, 1), 8, 4, 1, 1, 16, (1, 0, 1))),
    ("H100", "LSTM", "h128", BF16, False, ((2, 1), 2, 32, 1, 1, 4, (1, 0, 1))),
    ("H100", "LSTM", "h128", BF16, True, ((1, 1), 2, 8, 1, 1, 16, (2, 0, 2))),
    ("H100", "LSTM", "h129", BF16, False, ((2, 1), 2, 33, 1, 1, 4, (1, 0, 1))),
    ("H100", "LSTM", "h129", BF16, True, ((1, 1), 2, 9, 1, 1, 16, (3, 0, 3))),
    ("H100", "LSTM", "h256", BF16, False, ((2, 1), 2, 64, 1, 1, 4, (1, 0, 1))),
    ("H100", "LSTM", "h256", BF16, True, ((1, 1), 2, 16, 1, 1, 16, (4, 0, 4))),
    ("H100", "LSTM", "h512", BF16, False, ((2, 2), 2, 64, 1, 1, 8, (2, 0, 2))),
    ("H100", "LSTM", "h512", BF16, True, ((1, 1), 4, 32, 1, 1, 16, (8, 0, 8))),
    ("H100", "LSTM", "flash768", BF16, False, ((2, 2), 1, 96, 1, 1, 8, (3, 0, 3))),
    ("H100", "LSTM", "flash768", BF16, True, ((1, 1), 2, 48, 1, 1, 16, (12, 0, 12))),
    ("H100", "LSTM", "h1024", BF16, False, ((4, 4), 2, 64, 1, 1, 16, (0, 4, 4))),
    ("H100", "LSTM", "h1024", BF16, True, ((1, 2), 2, 64, 2, 1, 16, (9, 10, 19))),
    ("H100", "LSTM", "h2048", BF16, False, ((4, 4), 1, 128, 2, 1, 16, (0, 5, 10))),
    ("H100", "LSTM", "h2048", BF16, True, ((2, 4), 2, 64, 1, 1, 32, (0, 11, 32))),
    ("H100", "LSTM", "rl", BF16, False, ((4, 4), 8, 16, 1, 1, 16, (0, 1, 1))),
    ("H100", "LSTM", "rl", BF16, True, ((1, 2), 8, 16, 2, 1, 16, (5, 0, 5))),
    ("H100", "LSTM", "long", BF16, False, ((2, 1), 2, 64, 1, 1, 4, (1, 0, 1))),
    ("H100", "LSTM", "long", BF16, True, ((1, 1), 2, 16, 1, 1, 16, (4, 0, 4))),
    ("H100", "LSTM", "h512", FP32, False, ((2, 1), 2, 64, 2, 1, 8, (0, 5, 5))),
    ("H100", "LSTM", "h512", FP32, True, ((1, 1), 4, 32, 1, 1, 16, (0, 16, 16))),
    ("H100", "LSTM", "h1024", FP32, False, ((2, 2), 1, 128, 4, 1, 8, (0, 10, 10))),
    ("H100", "LSTM", "h1024", FP32, True, ((1, 4), 2, 64, 1, 1, 16, (0, 25, 32))),
    ("H100", "LSTM", "rl", FP32, False, ((2, 2), 8, 16, 2, 2, 8, (0, 3, 3))),
    ("H100", "LSTM", "rl", FP32, True, ((1, 2), 8, 16, 2, 1, 16, (0, 10, 10))),
    ("H100", "LSTM", "h1024", TF32, False, ((4, 4), 2, 64, 1, 1, 16, (0, 4, 8))),
    ("A100", "LSTM", "mnist_lstm", BF16, False, ((2, 1), 8, 8, 1, 1, 8, (1, 0, 1))),
    ("A100", "LSTM", "mnist_lstm", BF16, True, ((1, 1), 8, 4, 1, 1, 16, (1, 0, 1))),
    ("A100", "LSTM", "h512", BF16, False, ((2, 2), 1, 64, 2, 1, 8, (3, 0, 3))),
    ("A100", "LSTM", "h512", BF16, True, ((1, 1), 2, 32, 2, 1, 16, (10, 0, 10))),
    ("A100", "LSTM", "flash768", BF16, False, ((2, 1), 1, 96, 2, 1, 8, (4, 0, 4))),
    ("A100", "LSTM", "flash768", BF16, True, ((1, 1), 1, 48, 2, 1, 16, (12, 2, 14))),
    ("A100", "LSTM", "h2048", BF16, False, ((4, 4), 2, 43, 1, 3, 16, (0, 0, 8))),
    ("A100", "LSTM", "h2048", BF16, True, ((2, 4), 1, 64, 2, 1, 32, (0, 8, 37))),
    ("RTX 4090", "LSTM", "mnist_lstm", BF16, False, ((2, 1), 8, 16, 1, 1, 4, (1, 0, 1))),
    ("RTX 4090", "LSTM", "mnist_lstm", BF16, True, ((1, 1), 8, 4, 1, 1, 16, (1, 0, 1))),
    ("RTX 4090", "LSTM", "h512", BF16, False, ((2, 2), 2, 64, 1, 1, 8, (2, 0, 2))),
    ("RTX 4090", "LSTM", "h512", BF16, True, ((1, 1), 2, 32, 2, 1, 16, (10, 0, 10))),
    ("RTX 4090", "LSTM", "flash768", BF16, False, ((2, 2), 1, 96, 1, 1, 8, (3, 0, 3))),
    ("RTX 4090", "LSTM", "flash768", BF16, True, ((1, 1), 1, 48, 2, 1, 16, (12, 2, 14))),
    ("RTX 4090", "LSTM", "h2048", BF16, False, ((4, 4), 1, 128, 2, 1, 16, (0, 0, 10))),
    ("RTX 4090", "LSTM", "h2048", BF16, True, ((2, 4), 2, 64, 1, 1, 32, (0, 3, 32))),
    ("B200", "LSTM", "mnist_lstm", BF16, False, ((2, 1), 8, 16, 1, 1, 4, (1, 0, 1))),
    ("B200", "LSTM", "mnist_lstm", BF16, True, ((1, 1), 8, 4, 1, 1, 16, (1, 0, 1))),
    ("B200", "LSTM", "h512", BF16, False, ((2, 2), 2, 64, 1, 1, 8, (2, 0, 2))),
    ("B200", "LSTM", "h512", BF16, True, ((1, 1), 4, 32, 1, 1, 16, (8, 0, 8))),
    ("B200", "LSTM", "flash768", BF16, False, ((2, 2), 1, 96, 1, 1, 8, (3, 0, 3))),
    ("B200", "LSTM", "flash768", BF16, True, ((1, 1), 2, 48, 1, 1, 16, (12, 0, 12))),
    ("B200", "LSTM", "h2048", BF16, False, ((4, 4), 1, 128, 2, 1, 16, (0, 5, 10))),
    ("B200", "LSTM", "h2048", BF16, True, ((2, 4), 2, 64, 1, 1, 32, (0, 11, 32))),
    ("H100", "GRU", "h512", BF16, False, ((2, 2), 2, 52, 1, 1, 10, (2, 0, 2))),
    ("H100", "GRU", "h512", BF16, True, ((1, 1), 4, 32, 1, 1, 16, (6, 0, 6))),
    ("H100", "RNN_TANH", "h512", BF16, False, ((2, 1), 4, 32, 1, 1, 16, (2, 0, 2))),
    ("H100", "RNN_TANH", "h512", FP64, True, ((1, 1), 4, 32, 1, 1, 16, (0, 8, 8))),
]


@pytest.mark.parametrize(("gpu", "mode", "name", "kind", "backward", "expected"), TABLE)
def test_the_plan_of_each_workload_is_the_one_in_the_table(
    gpu: str,
    mode: str,
    name: str,
    kind: Kind,
    backward: bool,
    expected: Row,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """How the resident tier is laid out, wherever it is chosen."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    p, _ = plan(gpu, mode, SIZES[name], kind, backward=backward)
    assert p.resident
    assert (
        (p.row_tiles, p.column_tiles),
        p.row_teams,
        p.unit_blocks,
        p.passes,
        p.groups,
        p.units,
        (p.held_chunks, p.shared_chunks, p.warp_chunks),
    ) == expected


# Every step is a product of the library and a kernel, because the weights do not fit.
STEPWISE: dict[tuple[str, str, Kind], dict[str, str]] = {
    ("H100", "LSTM", BF16): {"h1024": "backward", "h2048": "both"},
    ("H100", "LSTM", TF32): {"h1024": "both", "h2048": "both"},
    ("H100", "LSTM", FP32): {"h1024": "both", "h2048": "both", "rl": "backward"},
    ("H100", "GRU", BF16): {"h1024": "backward", "h2048": "both"},
    ("H100", "RNN_TANH", BF16): {"h2048": "both"},
}


@pytest.mark.parametrize("case", STEPWISE, ids=str)
def test_which_tier_each_workload_runs_in(case: tuple[str, str, Kind]) -> None:
    gpu, mode, kind = case
    for name, sizes in SIZES.items():
        stepwise = STEPWISE[case].get(name, "")
        for backward in (False, True):
            p, text = plan(gpu, mode, sizes, kind, backward=backward)
            expected = stepwise == "both" or (backward and stepwise == "backward")
            assert p.resident != expected, (name, text)
            assert text.startswith("stepwise tier" if expected else "resident tier")


MORE_SIZES = [(1, 1, 1, 1), (3, 7, 5, 31), (9, 1, 2, 4096), (2, 3000, 8, 20), (2, 5, 3, 20000)]


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
@pytest.mark.parametrize("directions", [1, 2])
def test_every_plan_covers_all_and_fits(
    gpu: str, mode: str, directions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "resident")
    _, multiprocessors, kib = GPUS[gpu]
    gates = {"RNN_TANH": 1, "LSTM": 4, "GRU": 3}[mode]
    for sizes in [*SIZES.values(), *MORE_SIZES]:
        _, N, _, H = sizes
        for kind in (FP32, TF32, BF16, FP16, FP64):
            for backward in (False, True):
                p, text = plan(gpu, mode, sizes, kind, backward=backward, directions=directions)
                assert p.resident, text
                assert directions * p.row_teams * p.unit_blocks <= multiprocessors, text
                assert p.shared_bytes <= kib << 10, text
                rows = p.passes * p.column_tiles * 8
                assert (p.row_teams - 1) * p.column_tiles * 8 < N <= p.row_teams * rows, text
                units = p.groups * p.units
                assert (p.unit_blocks - 1) * units < H <= p.unit_blocks * units, text
                assert p.units * (1 if backward else gates) <= p.row_tiles * 16, text
                k_bytes = kind[0].itemsize * H * (gates if backward else 1)
                assert (p.chunks - 1) * 64 < k_bytes <= p.chunks * 64, text
                # With several passes the last warp sets the flags and does not multiply.
                warps = 8 if p.passes == 1 else 7
                assert (p.warp_chunks - 1) * warps < p.chunks <= p.warp_chunks * warps, text
                assert 0 <= p.held_chunks + p.shared_chunks <= p.warp_chunks, text
                assert p.held_chunks == 0 or p.groups == 1, text
                assert p.us_per_step > 0, text
                assert p.bytes_per_step > 0, text


# Steps whose input product is made at once, and bytes of it.
WINDOWS: list[tuple[str, str, Kind, bool, int]] = [
    ("LSTM", "mnist_lstm", BF16, True, 28),  # all T
    ("LSTM", "h256", BF16, True, 512),
    ("LSTM", "h512", BF16, True, 64),
    ("LSTM", "flash768", BF16, True, 79),
    ("LSTM", "flash768", BF16, False, 79),
    ("LSTM", "h1024", BF16, True, 16),
    ("LSTM", "h2048", BF16, True, 16),
    ("LSTM", "long", BF16, True, 250),
    ("LSTM", "flash768", FP32, True, 1024),  # in the memory of the slots
    ("LSTM", "flash768", FP32, False, 79),
    ("GRU", "flash768", BF16, True, 103),
    ("RNN_TANH", "flash768", BF16, True, 256),
]


@pytest.mark.parametrize(("mode", "name", "kind", "records", "expected"), WINDOWS)
def test_the_window_of_each_workload_is_the_one_in_the_table(
    mode: str, name: str, kind: Kind, records: bool, expected: int
) -> None:
    p, text = plan("H100", mode, SIZES[name], kind, records=records)
    assert p.window == expected
    assert (f"in windows of {expected} steps" in text) == (expected < SIZES[name][0])


@pytest.mark.parametrize("tier", ["resident", "stepwise"])
@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
def test_input_products_do_not_grow_with_the_steps(
    tier: str, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of 64 MiB is theirs, in two buffers if one is filled while another one is read."""
    monkeypatch.setenv("RNNKERN_CUDA_TIER", tier)
    gates = {"RNN_TANH": 1, "LSTM": 4, "GRU": 3}[mode]
    for _, N, I, H in [*SIZES.values(), *MORE_SIZES]:
        for T in (1, 100, 10_000, 1_000_000):
            for directions in (1, 2):
                p, _ = plan("H100", mode, (T, N, I, H), BF16, directions=directions)
                step = directions * N * gates * H * 4
                buffers = 1 if p.window == T or tier == "stepwise" else 2
                assert 1 <= p.window <= T
                assert p.window == 1 or buffers * p.window * step <= 32 << 20
                # No shorter than they have to be, but for equal parts.
                parts = -(-T // p.window)
                longer = -(-T // (parts - 1)) if parts > 1 else T + 1
                assert p.window == T or 2 * longer * step > 32 << 20 or tier == "stepwise"


def test_what_only_the_stepwise_tier_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = (10, 4, 8, 64)
    p, text = plan("H100", "LSTM", sizes, BF16, proj=16)
    assert not p.resident
    assert "projection" in text
    p, text = plan("H100", "LSTM", sizes, BF16)
    assert p.resident
    assert "us expected" in text
    monkeypatch.setenv("RNNKERN_CUDA_TIER", "stepwise")
    p, text = plan("H100", "LSTM", sizes, BF16)
    assert not p.resident
    assert "RNNKERN_CUDA_TIER" in text


def test_products_of_our_own_are_slower() -> None:
    """Forward under deterministic algorithms, and without a library."""
    sizes = SIZES["h2048"]
    library, text = plan("H100", "LSTM", sizes, BF16)
    assert "of our own" not in text
    own, text = plan("H100", "LSTM", sizes, BF16, deterministic=True)
    assert not own.resident
    assert "products by a kernel of our own" in text
    assert "; because deterministic algorithms" in text
    assert own.us_per_step > 1.5 * library.us_per_step
    backward, text = plan("H100", "LSTM", sizes, BF16, backward=True, deterministic=True)
    assert "of our own" not in text
    assert backward.us_per_step < own.us_per_step
    without, text = plan("H100", "LSTM", sizes, BF16, has_library=False)
    assert without.resident
    assert "products by a kernel of our own" in text


def test_one_step_is_not_worth_packing() -> None:
    for T, resident in ((1, False), (10, True)):
        p, text = plan("H100", "LSTM", (T, 1, 64, 256), FP32)
        assert p.resident == resident, text


def test_two_directions_are_two_products_in_turn() -> None:
    one, two = (
        plan("H100", "LSTM", SIZES["h1024"], TF32, directions=d)[0].us_per_step for d in (1, 2)
    )
    assert one + 2 < two < 2 * one


def test_more_rows_than_blocks_can_keep() -> None:
    """The resident tier keeps the states of all its rows in shared memory."""
    p, text = plan("H100", "LSTM", (2, 100_000, 8, 1024), BF16)
    assert not p.resident
    assert "memory" in text


@pytest.mark.parametrize("name", ["flash768", "h2048"])
def test_the_text_names_bytes_and_time(name: str) -> None:
    p, text = plan("H100", "LSTM", SIZES[name], BF16)
    words = [f"{p.bytes_per_step / 1e3:.0f} KB", f"{p.us_per_step:.1f} us expected"]
    if name == "flash768":
        words += [
            "resident tier",
            f"{p.unit_blocks * p.row_teams} blocks of 132",
            "100 % of the weights in registers, 0 % in shared memory",
        ]
    else:
        words += ["stepwise tier", "slower"]
    for word in words:
        assert word in text
