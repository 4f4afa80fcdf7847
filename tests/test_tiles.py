"""The machine code of the register tiles: all sums of a product stay in registers.

A sum that the compiler puts on the stack is loaded and stored for every k, and these loads and
stores wait for each other. On x86-64-v3 that has doubled the time of every product, and no test of
results sees it.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest


def is_tested_compiler() -> bool:
    """Another compiler may know better, or worse."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        return False
    version = subprocess.run(["g++", "-dumpversion"], check=True, capture_output=True, text=True)
    return version.stdout.startswith("12")


pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not is_tested_compiler(), reason="no g++ 12 for x86-64"),
]

CSRC = Path(__file__).resolve().parents[1] / "csrc"
#: As CMakeLists.txt has them.
OPTIONS = (
    *("-std=c++20", "-O3", "-DNDEBUG"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
)
SETS = {
    "x86_64_v3": ["-march=x86-64-v3"],
    "x86_64_v4": ["-march=x86-64-v4", "-mprefer-vector-width=512"],
    "x86_64_v4_bf16": [
        *("-march=x86-64-v4", "-mprefer-vector-width=512"),
        *("-mavx512bf16", "-mavx512vnni"),
    ],
}
SOURCE = """
#define RNNKERN_NAMESPACE {name}
#include "cpu/gemm.h"
namespace rnnkern {{
namespace {name} {{
#define TILE(E, P, vectors, rows)                                                             \\
  template void tile<E, P, vectors, rows, true>(int64_t, int64_t, const E* const*, const P*, \\
                                                int64_t, Compute<E>*, int64_t);
#define TILES(E, P)                                             \\
  TILE(E, P, 1, tile_rows(1))                                   \\
  TILE(E, P, 2, tile_rows(2))                                   \\
  TILE(E, P, 3, tile_rows(3))                                   \\
  TILE(E, P, 4, tile_rows(4))
TILES(float, float)
TILES(double, double)
TILES(float, Bf16)
TILES(float, F16)
#ifdef __AVX512BF16__
TILES(Bf16, float)
#endif
template void tile_of_integers<kVectorsOfIntegers, kRowsOfIntegers>(
    int64_t, int64_t, const I8* const*, const float*, int64_t, float*, int64_t);
}}
}}
"""


def sums_on_the_stack(assembly: str) -> Counter[str]:
    """How often each function moves a vector to or from its stack frame."""
    found: Counter[str] = Counter()
    function, bases = "", {"rsp"}
    for line in assembly.splitlines():
        if name := re.match(r"(_ZN\w+):", line):
            function, bases = name[1], {"rsp"}
            found[function] = 0
        elif re.search(r"\bmovq\s+%rsp, %rbp", line):
            bases.add("rbp")
        elif base := re.search(r"-?\d*\(%(r[sb]p)\b.*[xyz]mm|[xyz]mm.*\(%(r[sb]p)\b", line):
            found[function] += (base[1] or base[2]) in bases
    return found


@pytest.mark.parametrize("name", SETS)
def test_sums_stay_in_registers(name: str, tmp_path: Path) -> None:
    source, assembly = tmp_path / "tiles.cpp", tmp_path / "tiles.s"
    source.write_text(SOURCE.format(name=name))
    command = ["g++", *OPTIONS, *SETS[name], f"-I{CSRC}", "-S", "-o", assembly, source]
    subprocess.run(command, check=True, capture_output=True, text=True)
    found = sums_on_the_stack(assembly.read_text())
    assert len(found) > 16, "every tile is a function"
    assert not +found
