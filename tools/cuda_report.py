"""What the CUDA compiler says each kernel needs, from a build log with RNNKERN_CUDA_REPORT=ON.

Usage: python tools/cuda_report.py LOG. Fails if a hot kernel spills registers or keeps an object in
memory. Hot are the scans and products in float32 and narrower, because float64 has to be right and
not fast. With true float32 in the resident tier, all sums of a tile are in one lane, and the
compiler fills the other registers with loads ahead. It then keeps a few words in memory from step
to step, outside the loop of the products. These are allowed, and printed. The same holds for tiles
of 32 columns, and for our own product, which shares its multiprocessor with another block.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
MEMORY = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")

HOT = ("Resident", "Stepwise", "MatrixProduct")
WIDE = re.compile(r"TileShape\{\d, 4,")
FEW_BYTES, FEW_BYTES_OF_PRODUCT = 48, 64


class Kernel(NamedTuple):
    name: str
    architecture: str
    registers: int
    stack: int
    spilled: int

    @property
    def is_hot(self) -> bool:
        return self.name.startswith(HOT) and "<double" not in self.name

    @property
    def is_wrong(self) -> bool:
        allowed = 0
        if self.name.startswith("MatrixProduct"):
            allowed = FEW_BYTES_OF_PRODUCT
        elif "<float, float" in self.name or WIDE.search(self.name):
            allowed = FEW_BYTES
        return self.is_hot and max(self.spilled, self.stack) > allowed


def kernels(log: str) -> list[Kernel]:
    found = []
    name = architecture = ""
    stack = spilled = 0
    for line in log.splitlines():
        if match := ENTRY.search(line):
            name, architecture = match.groups()
        elif match := MEMORY.search(line):
            stack, spilled = int(match[1]), int(match[2]) + int(match[3])
        elif match := REGISTERS.search(line):
            found.append(Kernel(name, architecture, int(match[1]), stack, spilled))
    names = plain_names(kernel.name for kernel in found)
    return [kernel._replace(name=name) for kernel, name in zip(found, names, strict=True)]


def plain_names(mangled: Iterable[str]) -> list[str]:
    done = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    )
    return [plain(name) for name in done.stdout.splitlines()]


def plain(name: str) -> str:
    """``ResidentForward<float, ...>`` of ``void rnnkern::gpu::run_kernel<...>(...)``."""
    name = name.replace("rnnkern::gpu::", "").replace("rnnkern::", "")
    match = re.search(r"run_kernel<(.*)>\(", name)
    return match[1].strip() if match else name


def main() -> int:
    found = kernels(Path(sys.argv[1]).read_text())
    if not any(kernel.is_hot for kernel in found):
        print("cuda-report: no kernel of a scan in this log", file=sys.stderr)
        return 1
    wrong = 0
    for architecture in sorted({kernel.architecture for kernel in found}):
        here = [kernel for kernel in found if kernel.architecture == architecture]
        hot = [kernel for kernel in here if kernel.is_hot]
        spilling = [kernel for kernel in here if kernel.spilled or kernel.stack]
        print(
            f"{architecture}: {len(here)} kernels, {len(hot)} of them hot; at most "
            f"{max(kernel.registers for kernel in here)} registers; {len(spilling)} spill or have "
            f"a stack frame"
        )
        for kernel in spilling:
            wrong += kernel.is_wrong
            mark = "WRONG: " if kernel.is_wrong else ""
            print(
                f"  {mark}{kernel.name}: {kernel.registers} registers, "
                f"{kernel.stack} bytes of stack, {kernel.spilled} spilled"
            )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
