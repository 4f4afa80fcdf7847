"""What the layouts of the tests of CUDA kernels have to reach."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from rnnkern import kernels

Layout = tuple[tuple[int, int], tuple[int, int, int, int]]
"""``(multiprocessors, KiB of shared memory), (T, N, I, H)``"""


def expect_every_layout(layouts: Mapping[str, Layout]) -> None:
    """They have every tile that there are kernels for, and all that a plan may do."""
    tiles: dict[tuple[bool, bool], set[tuple[int, int]]] = {}
    seen = set()
    for name, ((multiprocessors, kib), (T, N, I, H)) in layouts.items():
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
