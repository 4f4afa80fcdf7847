"""Run the tests as on other machines: other caches, numbers of threads, instruction sets.

Every instruction set that this CPU has is in one of them. What a plan chooses depends on the
machine, so a test that passes here alone is found. Files whose tests start processes and compilers,
or look at tools and pictures, are left out: they take most of the time, and the machine is nothing
to them. With a lower instruction set than the best of this CPU, the tests are those of numbers: of
the kernels, and of cells that are compiled when they are first called. With --part a third of the
files run, and each on one machine of each group only; in 81 parts every file meets all three caches
and numbers of threads with each of three instruction sets.

Usage: python tools/test_machines.py [--part NUMBER] [pytest arguments]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lower_isas import lower_isas

import rnnkern

NOTHING_SELECTED = 5  # pytest's exit status
PYTEST = Path(sys.executable).with_name("pytest")
KIB = 1024

LEFT_OUT = {
    "benchmarks",
    "compile",
    "compiled_cells",
    "cuda",
    "cuda_sass",
    "cuda_setting",
    "derived_cells",
    "distributed",
    "docs",
    "ecosystem",
    "examples",
    "export",
    "gpu_run",
    "isa",
    "plot",
    "report",
    "what_torch_nn_cannot",
    "wheels",
}
OF_LOWER_SETS = ["-m", "kernel or own_cells"]


def environment(isa: str, l2_bytes: int, threads: int) -> dict[str, str]:
    return {
        "RNNKERN_ISA": isa,
        "RNNKERN_L2_BYTES": str(l2_bytes),
        "RNNKERN_TEST_THREADS": str(threads),
        "RNNKERN_TEST_DEVICES": "cpu",
        "OMP_WAIT_POLICY": "passive",  # there are more threads than CPUs
    }


def machines(isas: list[str], part: int) -> Iterator[tuple[list[dict[str, str]], list[str]]]:
    """The environments that describe machines, in groups, and the tests that run on each group."""
    # The sets of AVX-512 differ from one another only in the kernels of bfloat16 and int8.
    alike = [isa for isa in isas[1:] if isa.startswith("x86-64-v4")]
    different = [isa for isa in isas if isa not in alike]
    caches, threads = (512 * KIB, 1024 * KIB, 2048 * KIB), (64, 2, 1)
    yield (
        [
            environment(
                different[i % len(different)],
                caches[(i + part // 3) % len(caches)],
                threads[(i + part // 9) % len(threads)],
            )
            for i in range(max(3, len(different)))
        ],
        [],
    )
    yield [environment(isa, caches[1], threads[1]) for isa in alike], ["-k", "bfloat16 or int8"]


def share(files: list[str], place: int, places: int, part: int) -> list[str]:
    """The files that one of several machines takes, all others being taken by the others."""
    return files[(place + part) % places :: places]


def third(files: list[str], part: int) -> tuple[list[str], int]:
    """The files of that part, and how often they have had their turn."""
    return files[part % 3 :: 3], part // 3


def main(given: list[str]) -> int:
    description = (__doc__ or "").partition("\n\n")[0]
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--part", type=int, metavar="NUMBER")
    options, arguments = parser.parse_known_args(given)
    status = 0
    paths = {path.stem.removeprefix("test_"): path for path in Path("tests").glob("test_*.py")}
    if unknown := LEFT_OUT - paths.keys():
        sys.exit(f"test_machines: no such files of tests: {', '.join(sorted(unknown))}")
    files = sorted(str(path) for name, path in paths.items() if name not in LEFT_OUT)
    lower = lower_isas()
    best = rnnkern.build_info()["isa"]
    part = None
    if options.part is not None:
        files, part = third(files, options.part)
    for described, selection in machines([best, *lower], part or 0):
        for place, machine in enumerate(described):
            chosen = files if part is None else share(files, place, len(described), part)
            print(*(f"{k}={v}" for k, v in machine.items()), *selection, flush=True)
            of_set = [] if machine["RNNKERN_ISA"] == best else OF_LOWER_SETS
            command = [str(PYTEST), *chosen, *selection, *of_set, *arguments]
            found = subprocess.run(command, env=os.environ | machine).returncode
            # The few files of a part may have no such tests.
            status |= 0 if found == NOTHING_SELECTED and part is not None else found
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
