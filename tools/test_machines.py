"""Run the tests as on other machines: other caches, numbers of threads, instruction sets.

Every instruction set that this CPU has is in one of them. What a plan chooses depends on the
machine, so a test that passes here alone is found. Files whose tests start processes and compilers,
or look at tools and pictures, are left out: they take most of the time, and the machine is nothing
to them. own_cells is not left out, because each instruction set has code of its own for a cell.

Usage: python tools/test_machines.py [pytest arguments]
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from lower_isas import lower_isas

import rnnkern

PYTEST = Path(sys.executable).with_name("pytest")
KIB = 1024

LEFT_OUT = {
    "benchmarks",
    "compile",
    "compiled_cells",
    "cuda",
    "cuda_sass",
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


def machines(isas: list[str]) -> Iterator[tuple[dict[str, str], list[str]]]:
    """The environment that describes each machine, and the tests that run there."""
    # The sets of AVX-512 differ from one another only in the kernels of bfloat16 and int8.
    alike = [isa for isa in isas[1:] if isa.startswith("x86-64-v4")]
    different = [isa for isa in isas if isa not in alike]
    caches, threads = (512 * KIB, 1024 * KIB, 2048 * KIB), (64, 2, 1)
    count = max(3, len(different))
    rows: list[tuple[str, int, list[str]]]
    rows = [(different[i % len(different)], i % 3, []) for i in range(count)]
    rows += [(isa, 1, ["-k", "bfloat16 or int8"]) for isa in alike]
    for isa, i, selection in rows:
        environment = {
            "RNNKERN_ISA": isa,
            "RNNKERN_L2_BYTES": str(caches[i]),
            "RNNKERN_TEST_THREADS": str(threads[i]),
            "RNNKERN_TEST_DEVICES": "cpu",
            "OMP_WAIT_POLICY": "passive",  # there are more threads than CPUs
        }
        yield environment, selection


def main(arguments: list[str]) -> int:
    status = 0
    paths = {path.stem.removeprefix("test_"): path for path in Path("tests").glob("test_*.py")}
    if unknown := LEFT_OUT - paths.keys():
        sys.exit(f"test_machines: no such files of tests: {', '.join(sorted(unknown))}")
    files = sorted(str(path) for name, path in paths.items() if name not in LEFT_OUT)
    lower = lower_isas()
    best = rnnkern.build_info()["isa"]
    for environment, selection in machines([best, *lower]):
        command = [str(PYTEST), *files, *selection, *arguments]
        print(*(f"{k}={v}" for k, v in environment.items()), *selection, flush=True)
        status |= subprocess.run(command, env=os.environ | environment).returncode
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
