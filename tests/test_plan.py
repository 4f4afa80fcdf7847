"""The plan as a table: which threads, split and layout of weights, from sizes and machine alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rnnkern import kernels

pytestmark = pytest.mark.cpu_only

V4 = {
    "lanes": 16,
    "tile_rows": 6,
    "element_bytes": 4,
    "group": 1,
    "multiplies_in_place": True,
    "converts": False,
    "rounded_for_products": False,
    "by_tiles": False,
    "l2_bytes": 2**20,
}
V3 = V4 | {"lanes": 8, "tile_rows": 3, "l2_bytes": 2**18}
V4_BF16 = V4 | {"element_bytes": 2, "group": 2, "multiplies_in_place": False}
AMX = V4_BF16 | {"tile_rows": 8, "by_tiles": True}
V4_BY_BF16 = V4_BF16 | {"rounded_for_products": True}
V4_DOUBLE = V4 | {"lanes": 8, "element_bytes": 8}


def plan(
    mode: str,
    sizes: tuple[int, int, int, int],
    threads: int = 2,
    cpu: dict[str, int] = V4,
    *,
    directions: int = 1,
    proj: int = 0,
    deterministic: bool = False,
    backward: bool = False,
) -> tuple[dict[str, Any], str]:
    T, N, I, H = sizes
    found, text = kernels.plan(
        kernels.kernel(mode, directions, H, proj, True, False),
        kernels.Machine(threads=threads, **cpu),
        T=T,
        N=N,
        I=I,
        total=T * N,
        deterministic=deterministic,
        backward=backward,
    )
    names = ("threads", "row_blocks", "unit_blocks", "block_steps")
    reads = {"reads": (found.input, found.recurrent), "by_dots": found.by_dots}
    return {name: getattr(found, name) for name in names} | reads, text


PACKED, DOTS, BROADCAST, IN_PLACE = "packed", "dots", "broadcast", "in place"
"""How a matrix of weights is read."""


def expect(
    threads: int,
    rows: int,
    units: int,
    reads: tuple[str, str] = (PACKED, PACKED),
    steps: int = 1,
) -> dict[str, Any]:
    return {
        "threads": threads,
        "row_blocks": rows,
        "unit_blocks": units,
        "block_steps": steps,
        "reads": reads,
        "by_dots": (0, 0),
    }


# mode, (T, N, I, H), threads, the plan of forward
TABLE = {
    "notebook": ("LSTM", (10, 1, 3, 3), 2, expect(1, 1, 1, steps=10)),
    "one step": ("LSTM", (1, 1, 64, 256), 2, expect(2, 1, 2, (DOTS, DOTS))),
    "one step of many rows": (
        "LSTM",
        (1, 64, 64, 256),
        2,
        expect(2, 1, 2, (BROADCAST, BROADCAST)),
    ),
    "rows": ("LSTM", (28, 64, 28, 64), 2, expect(2, 2, 1)),
    "few rows of small weights": ("LSTM", (32, 8, 64, 64), 2, expect(2, 2, 1, steps=12)),
    "seven rows of small weights": ("LSTM", (32, 7, 64, 64), 2, expect(1, 1, 1, steps=6)),
    "few rows with little work": ("RNN_TANH", (32, 8, 64, 64), 2, expect(1, 1, 1, steps=6)),
    "few rows of larger weights": ("LSTM", (32, 12, 256, 256), 2, expect(2, 1, 2, steps=4)),
    "few rows of a large input": ("LSTM", (64, 8, 2048, 64), 2, expect(1, 1, 1, steps=32)),
    "few rows of eight threads": ("LSTM", (32, 32, 64, 64), 8, expect(8, 8, 1, steps=12)),
    "few rows for eight threads": ("LSTM", (32, 16, 64, 64), 8, expect(1, 1, 1, steps=3)),
    "few rows that are broadcast": (
        "LSTM",
        (1, 16, 64, 64),
        2,
        expect(1, 1, 1, (BROADCAST, BROADCAST)),
    ),
    "rows of eight threads": ("GRU", (28, 2000, 28, 64), 8, expect(8, 8, 1)),
    "one row of few units": ("RNN_TANH", (28, 1, 28, 64), 2, expect(1, 1, 1, steps=28)),
    "one row of many units": ("LSTM", (16, 1, 80, 512), 2, expect(2, 1, 2, (DOTS, DOTS), 16)),
    "one row, longer": ("LSTM", (60, 1, 80, 512), 2, expect(2, 1, 2, (PACKED, DOTS), 48)),
    "one row, longer yet": ("LSTM", (200, 1, 80, 512), 2, expect(2, 1, 2, steps=48)),
    "large": ("LSTM", (50, 64, 512, 512), 2, expect(2, 1, 2, steps=4)),
    "large, alone": ("LSTM", (50, 64, 512, 512), 1, expect(1, 1, 1, steps=4)),
    "rows and units": ("LSTM", (50, 64, 512, 512), 64, expect(40, 5, 8, steps=21)),
    "xlarge": ("LSTM", (25, 128, 1024, 1024), 2, expect(2, 1, 2, steps=2)),
}


@pytest.mark.parametrize("name", TABLE)
def test_each_case_of_the_table_has_its_plan(name: str) -> None:
    mode, sizes, threads, wanted = TABLE[name]
    found, text = plan(mode, sizes, threads)
    assert found == wanted, text
    assert f"threads {wanted['threads']} of {threads}" in text


@pytest.mark.parametrize(("cpu", "row_blocks"), [(V3, 2), (V4, 2), (V4_BF16, 2), (AMX, 1)])
def test_tiles_of_amx_keep_few_rows_together(cpu: dict[str, int], row_blocks: int) -> None:
    found, text = plan("LSTM", (32, 12, 64, 64), 2, cpu)
    assert found["row_blocks"] == row_blocks, text


@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    "cpu",
    [V4, V3, V4_DOUBLE, V4_BF16, V4_BY_BF16, AMX],
    ids=["v4", "v3", "v4-float64", "v4-bf16", "v4-by-bf16", "amx"],
)
def test_every_plan_can_be_run(mode: str, backward: bool, cpu: dict[str, int]) -> None:
    """No more threads than allowed, none without a task, no part without rows or units."""
    for threads in (1, 2, 3, 8, 64):
        for directions in (1, 2):
            for T, N, H in ((1, 1, 1), (1000, 1, 3), (7, 5, 65), (3, 300, 200), (50, 64, 1500)):
                own = {"directions": directions, "backward": backward}
                found, text = plan(mode, (T, N, 33, H), threads, cpu, **own)
                rows, units = found["row_blocks"], found["unit_blocks"]
                assert 1 <= found["threads"] <= threads, text
                assert found["threads"] <= rows * units * directions, text
                assert found["threads"] % units == 0, text
                assert rows <= N, text
                assert units <= H, text
                assert 1 <= found["block_steps"] <= T, text


@pytest.mark.parametrize("threads", [2, 3, 8, 16])
@pytest.mark.parametrize(
    ("I", "H"), [(1024, 256), (30000, 64), (30000, 32), (512, 512), (28, 1500), (4, 1024)]
)
def test_no_thread_is_left_idle_where_rows_abound(I: int, H: int, threads: int) -> None:
    for backward in (False, True):
        found, text = plan("LSTM", (2, 512, I, H), threads, backward=backward)
        assert found["threads"] == threads, text
        assert found["row_blocks"] * found["unit_blocks"] == threads, text


def test_no_dot_products_where_the_order_of_summation_must_be_one() -> None:
    assert plan("LSTM", (1, 1, 64, 256))[0]["reads"] == (DOTS, DOTS)
    assert plan("LSTM", (1, 1, 64, 256), backward=True)[0]["reads"] == (IN_PLACE, IN_PLACE)
    found = plan("LSTM", (1, 1, 64, 256), deterministic=True, backward=True)[0]
    assert found["reads"] == (PACKED, PACKED)
    found = plan("LSTM", (1, 1, 64, 256), deterministic=True)[0]
    assert DOTS not in found["reads"]
    # Weights that are broadcast have the bits of packed ones.
    found = plan("LSTM", (1, 16, 64, 256), deterministic=True)[0]
    assert found["reads"] == (BROADCAST, BROADCAST)


CPUS = [(V4, 16), (V3, 8), (V4_BF16, 16), (V4_DOUBLE, 8)]


@pytest.mark.parametrize(("cpu", "lanes"), CPUS)
@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
def test_a_step_of_many_rows_broadcasts_and_a_sequence_packs(
    mode: str, cpu: dict[str, int], lanes: int
) -> None:
    for threads in (1, 2, 64):
        step, text = plan(mode, (1, 47, 300, 70), threads, cpu, deterministic=True)
        assert BROADCAST in step["reads"], text
        assert "each weight times a vector" in text
        long, text = plan(mode, (200, 47, 300, 70), threads, cpu, deterministic=True)
        assert long["reads"] == (PACKED, PACKED), text


@pytest.mark.parametrize(("cpu", "lanes"), CPUS)
@pytest.mark.parametrize("sizes", [(64, 65), (250, 200), (512, 513)], ids=str)
@pytest.mark.parametrize("mode", ["RNN_TANH", "LSTM", "GRU"])
def test_what_each_step_of_a_loop_packs(
    mode: str, sizes: tuple[int, int], cpu: dict[str, int], lanes: int
) -> None:
    """Nothing up to 16 rows, but for the backward pass in 16 bits."""
    for rows in (1, 2, 8, 16):
        for threads in (1, 2, 64):
            own = plan(mode, (1, rows, *sizes), threads, cpu)[0]["reads"]
            assert PACKED not in own
            own = plan(mode, (1, rows, *sizes), threads, cpu, backward=True)[0]["reads"]
            assert own == ((IN_PLACE, IN_PLACE) if cpu["multiplies_in_place"] else (PACKED, PACKED))


@pytest.mark.parametrize(("rows", "reads"), [(1, IN_PLACE), (24, IN_PLACE), (25, PACKED)])
def test_backward_reads_weights_of_fewer_bits_in_place_for_few_rows(rows: int, reads: str) -> None:
    """float16, which every tile widens again."""
    converted = V4 | {"converts": True}
    own = plan("LSTM", (1, rows, 300, 300), cpu=converted, backward=True)[0]["reads"]
    assert own == (reads, reads)


def test_backward_packs_where_rows_of_weights_are_no_rows_of_a_panel() -> None:
    sizes = (4, 2, 64, 64)
    found, text = plan("LSTM", sizes, backward=True)
    assert found["reads"][1] == IN_PLACE
    assert "W_hh as they lie" in text
    found, text = plan("LSTM", sizes, cpu=V4_BF16, backward=True)
    assert found["reads"] == (PACKED, PACKED)
    assert "W_ih packed into panels; W_hh packed into panels" in text


@pytest.mark.parametrize(("cpu", "lanes"), CPUS)
def test_weights_are_packed_where_it_pays(cpu: dict[str, int], lanes: int) -> None:
    """Forward, of a single row: packing is repaid later if rows of weights are longer, and if they
    come from beyond the cache.
    """
    for l2_bytes, packing in ((2**27, 8), (2**18, 16)):
        machine = cpu | {"l2_bytes": l2_bytes}
        for columns in (256, 512, 1024):
            longest = packing * columns // (3 * lanes * cpu["group"])
            sizes = (columns, columns)
            assert plan("GRU", (longest, 1, *sizes), 1, machine)[0]["reads"] == (DOTS, DOTS)
            assert plan("GRU", (longest + 1, 1, *sizes), 1, machine)[0]["reads"] == (PACKED, PACKED)


@pytest.mark.parametrize(("cpu", "lanes"), CPUS)
def test_weights_are_packed_earlier_for_several_rows(cpu: dict[str, int], lanes: int) -> None:
    """Dot products of several rows are slower than packed weights."""
    aligned, unaligned = {3: (0.33, 0.9), 6: (0.2, 0.2)}[cpu["tile_rows"]]
    for l2_bytes, packing in ((2**27, 16), (2**18, 24)):
        machine = cpu | {"l2_bytes": l2_bytes}
        for columns, more in (
            (256, aligned),
            (511, unaligned),
            (512, aligned),
            (1024, aligned),
        ):
            longest = packing / (more + 3 * lanes * cpu["group"] / columns)
            sizes = (3, columns, columns)
            below, above = int(longest / 3), int(longest / 3) + 1
            assert plan("GRU", (below, *sizes), 1, machine)[0]["reads"] == (DOTS, DOTS)
            assert plan("GRU", (above, *sizes), 1, machine)[0]["reads"] == (PACKED, PACKED)


@pytest.mark.parametrize(("cpu", "lanes"), CPUS)
def test_weights_are_broadcast_where_rows_fill_vectors(cpu: dict[str, int], lanes: int) -> None:
    for rows, wanted in (
        (1, DOTS),
        (lanes // 2, DOTS),
        (lanes, BROADCAST),
        (4 * lanes, BROADCAST),
    ):
        assert plan("LSTM", (1, rows, 512, 512), 1, cpu)[0]["reads"] == (wanted, wanted), rows
    assert plan("LSTM", (1000, lanes, 512, 512), 1, cpu)[0]["reads"] == (PACKED, PACKED)


@pytest.mark.parametrize(
    ("cpu", "columns", "rows", "reads"),
    [
        (V4, 512, (1, 9, 12, 17, 33), DOTS),
        (V4, 512, (16, 32), BROADCAST),
        (V4, 511, (1, 9, 12), DOTS),
        (V4, 511, (16, 17, 20, 32, 33), BROADCAST),
        (V3, 512, (1, 6, 7, 9), DOTS),
        (V3, 512, (8, 16, 17, 24, 33), BROADCAST),
        # Every other load is from two lines of the cache.
        (V3, 511, (1, 5), DOTS),
        (V3, 511, (8, 9, 12, 17, 33), BROADCAST),
        (V3 | {"converts": True}, 511, (1, 6, 7, 9, 17, 33), DOTS),
    ],
)
def test_dot_products_of_several_rows_take_longer_with_few_registers(
    cpu: dict[str, int], columns: int, rows: tuple[int, ...], reads: str
) -> None:
    for N in rows:
        found, text = plan("RNN_TANH", (1, N, columns, columns), 1, cpu)
        assert found["reads"] == (reads, reads), (N, text)


def test_the_last_rows_of_one_step_may_be_apart() -> None:
    """Rows that fill whole vectors are broadcast, and the few others are in dot products. With 32
    registers only if rows of weights are not whole vectors.
    """
    for rows, apart in ((16, 0), (17, 1), (19, 3), (23, 0), (24, 0), (33, 1), (47, 0)):
        for threads in (1, 2, 64):
            found, text = plan("LSTM", (1, rows, 512, 512), threads, V3)
            assert found["reads"] == (BROADCAST, BROADCAST), text
            assert found["by_dots"] == (apart, apart), text
            assert text.count(f"rows by dot products: {apart}") == 2 * (apart > 0)
    for rows, apart in ((16, 0), (17, 1), (20, 4), (31, 0), (33, 1), (36, 4)):
        assert plan("LSTM", (1, rows, 511, 511), 1, V4)[0]["by_dots"] == (apart, apart), rows
    for sizes, cpu, deterministic in (
        ((1, 33, 512, 512), V3, True),
        ((2, 33, 512, 512), V3, False),
        ((1, 33, 512, 512), V4, False),
        ((1, 33, 511, 511), AMX, False),
        ((1, 33, 512, 512), V3 | {"converts": True}, False),
    ):
        found, _ = plan("LSTM", sizes, 1, cpu, deterministic=deterministic)
        assert found["by_dots"] == (0, 0)


@pytest.mark.parametrize("threads", [1, 2, 7, 64])
@pytest.mark.parametrize("T", [1, 3, 30])
@pytest.mark.parametrize("N", [1, 15, 16, 33, 300])
@pytest.mark.parametrize("H", [3, 65, 512])
def test_how_weights_are_read_does_not_depend_on_threads(
    N: int, T: int, H: int, threads: int
) -> None:
    for deterministic in (False, True):
        for cpu in (V3, V4):
            own = {"cpu": cpu, "deterministic": deterministic}
            alone, here = (plan("GRU", (T, N, 40, H), n, **own)[0] for n in (1, threads))
            assert here["reads"] == alone["reads"]
            assert here["by_dots"] == alone["by_dots"]


def test_weights_are_packed_where_they_become_fewer_bytes() -> None:
    assert plan("GRU", (8, 1, 512, 512), 1, V4_BF16)[0]["reads"] == (DOTS, DOTS)
    for rows in (1, 16):
        found = plan("GRU", (8, rows, 512, 512), 1, V4_BY_BF16)[0]
        assert found["reads"] == (PACKED, PACKED)


def test_weights_that_are_converted_are_broadcast_later() -> None:
    """float16 is multiplied as float32."""
    converted = V4 | {"converts": True}
    assert plan("GRU", (8, 16, 64, 64), 1, V4)[0]["reads"] == (PACKED, PACKED)
    assert plan("GRU", (4, 16, 512, 512), 1, V4)[0]["reads"] == (BROADCAST, BROADCAST)
    assert plan("GRU", (4, 16, 64, 64), 1, converted)[0]["reads"] == (PACKED, PACKED)
    assert plan("GRU", (1, 16, 64, 64), 1, converted)[0]["reads"] == (BROADCAST, BROADCAST)


@pytest.mark.parametrize("rows", [1, 15, 16, 1000])
@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_is_multiplied_as_bfloat16_where_it_pays(rows: int, deterministic: bool) -> None:
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    known = "bf16" in kernels.instruction_set() or "amx" in kernels.instruction_set()
    for by_bfloat16 in (False, True):
        layer = kernels.kernel("GRU", 1, 8, 0, True, False, by_bfloat16)
        wanted = "bfloat16" * (by_bfloat16 and known and (rows >= 16 or deterministic))
        for x in (torch.zeros(rows, 1, 4), torch.zeros(1, rows, 4), torch.zeros(rows, 4)):
            assert kernels.multiplied_as(layer, x) == wanted
        assert not kernels.multiplied_as(layer, torch.zeros(rows, 4).double())


def test_rows_that_want_one_place_of_the_cache_are_drawn_together() -> None:
    """Backward, if a row of W has 4096 bytes."""
    for sizes, cpu, wanted in (
        ((5, 2, 512, 1024), V4, (IN_PLACE, PACKED)),
        ((5, 2, 512, 1030), V4, (IN_PLACE, IN_PLACE)),
        ((50, 2, 512, 1030), V4, (PACKED, PACKED)),
        ((1, 1, 512, 512), V4_BF16, (PACKED, PACKED)),
    ):
        assert plan("LSTM", sizes, 1, cpu, backward=True)[0]["reads"] == wanted


def test_rows_that_are_shorter_than_a_vector_are_packed_in_backward() -> None:
    """A vector would reach beyond the next row."""
    for (I, H), wanted in {
        (15, 15): (PACKED, PACKED),
        (15, 16): (PACKED, IN_PLACE),
        (16, 15): (IN_PLACE, PACKED),
    }.items():
        assert plan("LSTM", (1, 1, I, H), backward=True)[0]["reads"] == wanted


def test_more_cache_makes_weights_small() -> None:
    sizes = (50, 64, 512, 512)
    assert plan("LSTM", sizes)[0] == expect(2, 1, 2, steps=4)
    assert plan("LSTM", sizes, cpu=V4 | {"l2_bytes": 2**23})[0] == expect(2, 2, 1)


def test_the_text_of_a_plan_gives_its_reason() -> None:
    for sizes, threads, words in (
        ((10, 1, 3, 3), 1, "no more are allowed"),
        ((10, 1, 3, 3), 2, "too little work"),
        ((28, 64, 28, 64), 2, "no barrier"),
        ((50, 64, 512, 512), 2, "the recurrent weights are large"),
        ((30, 4, 100, 256), 2, "too few rows to split"),
        ((1, 1, 64, 256), 2, "W_hh as they lie"),
    ):
        assert words in plan("LSTM", sizes, threads)[1]
