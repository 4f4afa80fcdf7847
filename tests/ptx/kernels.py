"""Libraries of the CUDA kernels as nvcc makes them: from the build's own commands, with PTX for
output, through translate.py and g++, into build/ptx/kernels.

Usage, from the repository: python tests/ptx/kernels.py [PART]. Part 0, 1, 2 or 3 has one cell of
each element type, each part another one, for one architecture. By default all of them are built.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import ptx
import pybind11
from ptx import Kernel, Module
from translate import to_cpp

ROOT = Path(__file__).parents[2]
EXCHANGE = os.environ.get("RNNKERN_CUDA_EXCHANGE", "FLAGS")
FOLDER = ROOT / "build" / ("ptx" if EXCHANGE == "FLAGS" else f"ptx-{EXCHANGE.lower()}")
KERNELS = FOLDER / "kernels"
BUILT = KERNELS / "built.json"

# The first one is tested, the others where nvcc makes something else of a kernel for them.
ARCHITECTURES = ("compute_90a", "compute_80")
PARTS = 4

HEADERS = [ROOT / "tests" / name for name in ("ptx/machine.h", "ptx/memory.h", "simt/simt.h")]


def digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


# In a folder of its own, because the compiler would take an old one.
PRECOMPILED = KERNELS / digest(*(header.read_text() for header in HEADERS)) / "machine.h.gch"

# Half a minute of optimizing a source would save seconds of running it. Rounding is PTX's.
COMPILER = [
    *os.environ.get("CXX", "g++").split(),
    *("-std=c++20", "-Og", "-march=native", "-ffp-contract=off", "-fno-strict-aliasing"),
    *("-ftrivial-auto-var-init=pattern", "-w", "-fPIC"),
    *(f"-I{path.parent}" for path in (PRECOMPILED, *HEADERS)),
]


@dataclass(frozen=True)
class Source:
    """What the build compiles once for each element type, and scans once for each cell too."""

    element: str
    cell: str  # or nothing, of products
    command: tuple[str, ...]
    folder: str

    @property
    def name(self) -> str:
        return re.sub(r"\W", "_", f"{self.element}_{self.cell or 'product'}")


@dataclass(frozen=True, eq=False)
class Built:
    """A library, and what is in it."""

    element: str
    cell: str
    ptx: str
    library: str
    kernels: tuple[str, ...]  # as in PTX
    instructions: int
    forms: tuple[str, ...]  # of instructions
    other_libraries: dict[str, str]  # of kernels that differ, by architecture

    @property
    def name(self) -> str:
        return f"{self.cell or 'products'} {self.element}"

    def launches(self) -> dict[str, int]:
        """How often each kernel has been launched in this process."""
        library = ctypes.CDLL(self.library)
        library.launches_of_kernel.restype = ctypes.c_int64
        return {kernel: library.launches_of_kernel(kernel.encode()) for kernel in self.kernels}


def sources() -> list[Source]:
    """From CMake, as it would compile them for a GPU."""
    build = FOLDER / "commands"
    configure = [
        *("cmake", "--log-level=NOTICE", "-S", str(ROOT), "-B", str(build), "-G", "Ninja"),
        f"-DRNNKERN_CUDA_EXCHANGE={EXCHANGE}",
        *("-DRNNKERN_CUDA=ON", "-DCMAKE_CUDA_ARCHITECTURES=90a-real"),
        *("-DRNNKERN_INSTRUCTION_SETS=native", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"),
    ]
    subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
    found = []
    for entry in json.loads((build / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        definitions = dict(re.findall(r"-D(RNNKERN_\w+)=(\S*)", "\n".join(words)))
        if entry["file"].endswith(".cu") and "RNNKERN_CELL" in definitions:
            element, cell = definitions["RNNKERN_ELEMENT"], definitions["RNNKERN_CELL"]
            found.append(Source(element, cell, tuple(words), entry["directory"]))
    return found


def part_of(everything: Sequence[Source], part: int) -> list[Source]:
    """Of each element type the products, and one cell; all cells are in one of the parts."""
    elements = sorted({source.element for source in everything})
    cells = sorted({source.cell for source in everything if source.cell})
    chosen = {
        (element, cell)
        for i, element in enumerate(elements)
        for j, cell in enumerate(cells)
        if (i + j) % PARTS == part % PARTS
    }
    return [s for s in everything if not s.cell or (s.element, s.cell) in chosen]


def make_ptx(source: Source, architecture: str) -> Path:
    to = KERNELS / f"{source.name}.{architecture}.ptx"
    words = [word for word in source.command if not word.startswith("--generate-code")]
    words[words.index("-c")] = "-ptx"
    words[words.index("-o") + 1] = str(to)
    subprocess.run([*words, f"-arch={architecture}"], cwd=source.folder, check=True)
    return to


@cache
def read_ptx(path: Path) -> Module:
    return ptx.parse(path.read_text(), path.name)


def compile_library(name: str, module: Module, kernels: Sequence[Kernel]) -> Path:
    """A library of those kernels; the one that is there, if it is of the same."""
    text = to_cpp(module, kernels)
    library = KERNELS / f"{name}.{digest(text, *COMPILER)}.so"  # the headers' digest is among them
    if not library.exists():
        for old in KERNELS.glob(f"{name}.*.so"):
            old.unlink()  # processes that have it keep it
        source = KERNELS / f"{name}.cpp"
        source.write_text(text)
        unfinished = library.with_suffix(".tmp")
        command = [*COMPILER, "-shared", str(source), "-o", str(unfinished)]
        subprocess.run(command, check=True)
        unfinished.rename(library)
    return library


def differing(module: Module, others: Module) -> list[Kernel]:
    """Of `others`, kernels that are not in the module as they are."""
    known = {kernel.name: [str(item) for item in kernel.body] for kernel in module.kernels}
    return [
        kernel
        for kernel in others.kernels
        if [str(item) for item in kernel.body] != known.get(kernel.name)
    ]


def build(source: Source, architectures: Sequence[str] = ARCHITECTURES) -> Built:
    first = make_ptx(source, architectures[0])
    module = read_ptx(first)
    library = compile_library(source.name, module, module.kernels)
    other_libraries = {}
    for architecture in architectures[1:]:
        others = read_ptx(make_ptx(source, architecture))
        if own := differing(module, others):
            name = f"{source.name}.{architecture}"
            other_libraries[architecture] = str(compile_library(name, others, own))
    opcodes = [i.opcode for kernel in module.kernels for i in kernel.instructions()]
    return Built(
        element=source.element,
        cell=source.cell,
        ptx=str(first),
        library=str(library),
        kernels=tuple(kernel.name for kernel in module.kernels),
        instructions=len(opcodes),
        forms=tuple(sorted(set(opcodes))),
        other_libraries=other_libraries,
    )


def main(arguments: Sequence[str]) -> None:
    KERNELS.mkdir(parents=True, exist_ok=True)
    if not PRECOMPILED.exists():
        PRECOMPILED.parent.mkdir(exist_ok=True)
        command = [*COMPILER, "-x", "c++-header", str(HEADERS[0]), "-o", str(PRECOMPILED)]
        subprocess.run(command, check=True)
    chosen = part_of(sources(), int(arguments[0])) if arguments else sources()
    architectures = ARCHITECTURES[:1] if arguments else ARCHITECTURES
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(lambda source: build(source, architectures), chosen))
    BUILT.write_text(json.dumps([asdict(one) for one in built], indent=1))


@cache
def read_built() -> tuple[Built, ...]:
    return tuple(Built(**one) for one in json.loads(BUILT.read_text()))


if __name__ == "__main__":
    main(sys.argv[1:])
