"""The machines that `make test-machines` describes: tools/test_machines.py."""

from __future__ import annotations

import itertools

import pytest
from test_machines import KIB, machines, share, third

pytestmark = pytest.mark.cpu_only

SETS = ["x86-64-v4-amx", "x86-64-v4-bf16", "x86-64-v4-vnni", "x86-64-v4", "x86-64-v3", "baseline"]


@pytest.mark.parametrize("sets", [SETS, SETS[3:], ["baseline"]], ids=["amx", "v4", "baseline"])
def test_every_set_cache_and_number_of_threads_is_on_a_machine(sets: list[str]) -> None:
    described = [machine for group, _ in machines(sets, 0) for machine in group]
    assert {machine["RNNKERN_ISA"] for machine in described} == set(sets)
    caches = {machine["RNNKERN_L2_BYTES"] for machine in described}
    assert caches == {str(size * KIB) for size in (512, 1024, 2048)}
    assert {machine["RNNKERN_TEST_THREADS"] for machine in described} == {"1", "2", "64"}


def test_in_81_parts_every_file_meets_every_machine() -> None:
    files = [f"{i:02}" for i in range(17)]
    met: dict[str, set[tuple[str, ...]]] = {name: set() for name in files}
    for part in range(81):
        chosen, turn = third(files, part)
        described, _ = next(machines(SETS, turn))
        shares = [share(chosen, place, len(described), turn) for place in range(len(described))]
        assert sorted(itertools.chain(*shares)) == chosen
        for machine, names in zip(described, shares, strict=True):
            for name in names:
                met[name].add(tuple(machine.values()))
    assert {len(seen) for seen in met.values()} == {27}
