"""What a library of a cell is compiled for, and by which compiler: a CPU by g++ or clang, a GPU by
nvcc.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import torch

from rnnkern import kernels

ELEMENTS = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "Bf16",
    torch.float16: "F16",
}
"""The names of the element types in C++. The kernels of float32 multiplied as bfloat16
are ``F32ByBf16``, and as sums of two bfloat16 ``F32By3Bf16``, on CPUs alone.
"""

DTYPES = {element: dtype for dtype, element in ELEMENTS.items()} | dict.fromkeys(
    ("F32ByBf16", "F32By3Bf16"), torch.float32
)


class Target(Protocol):
    """What one library is compiled for."""

    @property
    def element(self) -> str:
        """The element type."""

    @property
    def place(self) -> str:
        """The instruction set or GPU that runs it, as a part of the library's name."""

    @property
    def source(self) -> str:
        """The file that is compiled, in the folder of headers."""

    @property
    def flags(self) -> tuple[str, ...]:
        """The compiler's flags, without paths."""

    def compiler(self) -> list[str]:
        """The compiler's command, and the arguments that depend on where it is.

        Raises:
            RuntimeError: there is none.
        """

    def load(self, path: str, mode: str) -> None:
        """Loads the kernels in the file of a library.

        Raises:
            RuntimeError: the file is no such library.
        """


_MULTIPLIED = {
    "F32ByBf16": " multiplied as bfloat16",
    "F32By3Bf16": " multiplied as sums of two bfloat16",
}


def words(target: Target) -> str:
    """The type of the tensors and what runs the library, for people to read."""
    dtype = str(DTYPES[target.element]).removeprefix("torch.")
    own = _MULTIPLIED.get(target.element, "")
    return f"{dtype}{own} on {target.place.partition('-nvcc')[0]}"


# ---- CPUs ----

_V4 = ("-march=x86-64-v4", "-mprefer-vector-width=512")
_SETS = {
    "baseline": ("baseline", ()),
    "x86-64-v3": ("x86_64_v3", ("-march=x86-64-v3",)),
    "x86-64-v4": ("x86_64_v4", _V4),
    "x86-64-v4-vnni": ("x86_64_v4", _V4),  # its own kernels are of frozen weights alone
}
_OF_BFLOAT16 = {
    "x86-64-v4-bf16": ("x86_64_v4_bf16", (*_V4, "-mavx512bf16")),
    "x86-64-v4-amx": ("x86_64_v4_amx", (*_V4, "-mavx512bf16", "-DRNNKERN_AMX")),
    "x86-64-v4-amx-stand-in": (
        "x86_64_v4_amx",
        (*_V4, "-mavx512bf16", "-DRNNKERN_AMX", "-DRNNKERN_AMX_STAND_IN"),
    ),
}
"""The namespace of an instruction set and the flags of the compiler, as in CMakeLists.txt. Sets of
the second table have kernels of their own for products of bfloat16 only.
"""

INSTRUCTION_SETS = (*_SETS, *_OF_BFLOAT16)


def elements_of(dtype: torch.dtype, instruction_set: str) -> list[str]:
    """The element types whose kernels tensors of a dtype may need on a CPU.

    Those of float32 may be multiplied as bfloat16, under autocast and in the precision "medium", or
    as sums of two in the precision "high", if the instruction set has such products.
    """
    if dtype != torch.float32 or instruction_set not in _OF_BFLOAT16:
        return [ELEMENTS[dtype]]
    _, flags = _OF_BFLOAT16[instruction_set]
    return ["float", "F32ByBf16", *["F32By3Bf16"] * ("-DRNNKERN_AMX" in flags)]


_FLAGS = (
    *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-DRNNKERN_CELL_LIBRARY"),
)


@dataclass(frozen=True)
class CpuTarget:
    """CPUs of an instruction set."""

    element: str
    place: str

    source: ClassVar[str] = "cpu/library.cpp"

    @property
    def flags(self) -> tuple[str, ...]:
        of_bfloat16 = self.element in ("Bf16", *_MULTIPLIED)
        if self.place in _OF_BFLOAT16:
            namespace, own = _OF_BFLOAT16[self.place] if of_bfloat16 else _SETS["x86-64-v4"]
        else:
            namespace, own = _SETS[self.place]
        return (
            *_FLAGS,
            *own,
            f"-DRNNKERN_NAMESPACE={namespace}",
            f"-DRNNKERN_ELEMENT={self.element}",
        )

    def compiler(self) -> list[str]:
        found = find_compiler()
        return found if "clang" in " ".join(found) else [*found, "-fno-gnu-unique"]

    def load(self, path: str, mode: str) -> None:
        kernels.load_library(path, mode, self.element)


def find_compiler() -> list[str]:
    """The C++ compiler and its arguments: those of ``CXX``, else g++, clang++ or c++.

    Raises:
        RuntimeError: there is none, or ``CXX`` is no command.
    """
    named = os.environ.get("CXX")
    tried = [["g++"], ["clang++"], ["c++"]]
    if named:
        try:
            tried = [shlex.split(named) or [named]]
        except ValueError as error:
            raise RuntimeError(f"CXX is no command: {named!r} ({error})") from None
    for name, *arguments in tried:
        found = shutil.which(name)
        if found:
            return [found, *arguments]
    raise RuntimeError(
        f"CXX names {named!r}, which is no program here"
        if named
        else "there is no C++ compiler here; install g++ 12 or later, or clang 16 or later "
        "(apt-get install g++), or take a library of rnnkern.precompile along"
    )


# ---- GPUs ----

OLDEST_NVCC = 12
"""The first release with C++20 and sm_90a, as in cmake/choose_nvcc.cmake."""

_CUDA_FLAGS = (
    *("-std=c++20", "-O3", "-DNDEBUG", "-shared", "-cudart=static", "-w"),
    *("-ftz=true", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"),
    *("-DRNNKERN_CELL_LIBRARY", "-DRNNKERN_NAMESPACE=gpu", "-DRNNKERN_CELL=OwnCell"),
)


@dataclass(frozen=True)
class CudaTarget:
    """GPUs of an architecture.

    Attributes:
        architecture: as nvcc names it, ``sm_90a``.
        nvcc: its version, ``13.0.88``.
        gpu: for which the library is loaded; None if for none here.
    """

    element: str
    architecture: str
    nvcc: str
    gpu: int | None = None

    source: ClassVar[str] = "cuda/cell_library.cu"

    @property
    def place(self) -> str:
        return f"{self.architecture}-nvcc{self.nvcc}"

    @property
    def flags(self) -> tuple[str, ...]:
        virtual = self.architecture.replace("sm_", "compute_")
        return (
            *_CUDA_FLAGS,
            f"-gencode=arch={virtual},code={self.architecture}",
            f"-DRNNKERN_ELEMENT={self.element}",
            f'-DRNNKERN_HEADERS="{kernels.headers}"',
        )

    def compiler(self) -> list[str]:
        path = find_nvcc()
        toolkit = Path(path).resolve().parent.parent
        # pip's nvcc looks for the runtime in a folder lib64 that it does not have.
        is_pips = (toolkit / "lib" / "libcudart_static.a").exists()
        return [path, f"-L{toolkit / 'lib'}"] if is_pips else [path]

    def load(self, path: str, mode: str) -> None:
        assert self.gpu is not None
        kernels.load_cuda_library(path, mode, self.element, self.gpu)


def architecture_of(capability: tuple[int, int]) -> str:
    """The name of a GPU's architecture: of compute capability 9.0 it is ``sm_90a``."""
    major, minor = capability
    return "sm_90a" if (major, minor) == (9, 0) else f"sm_{major}{minor}"


def find_nvcc() -> str:
    """nvcc: that of ``CUDACXX``, that of ``CUDA_HOME``, that on the ``PATH``, or one that pip has
    installed, as for a build of rnnkern (cmake/choose_nvcc.cmake).

    Raises:
        RuntimeError: there is none.
    """
    named = os.environ.get("CUDACXX")
    for place in [named] if named else _places_of_nvcc():
        found = shutil.which(place)
        if found:
            return found
    raise RuntimeError(
        f"CUDACXX names {named!r}, which is no program here"
        if named
        else "there is no nvcc here; install CUDA's toolkit, 12.0 or later and of the release of "
        'the GPU\'s driver (pip install "cuda-toolkit[nvcc,cudart,cccl]"), or take a library of '
        "rnnkern.precompile along"
    )


def _places_of_nvcc() -> Iterator[str]:
    if home := os.environ.get("CUDA_HOME"):
        yield str(Path(home) / "bin" / "nvcc")
    yield "nvcc"
    found = importlib.util.find_spec("nvidia")
    for folder in (found and found.submodule_search_locations) or ():
        yield from (str(place) for place in Path(folder).glob("cu*/bin/nvcc"))


@functools.cache
def version_of(nvcc: str) -> str:
    """``13.0.88``.

    Raises:
        RuntimeError: it does not run, or is too old.
    """
    try:
        run = subprocess.run(
            [nvcc, "--version"], capture_output=True, encoding="utf-8", errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise RuntimeError(f"{nvcc} cannot be run: {error}") from error
    found = re.search(r"release \d+\.\d+, V(\d+(?:\.\d+)+)", run.stdout)
    if not found:
        raise RuntimeError(f"{nvcc} does not say which version it is")
    if int(found[1].split(".")[0]) < OLDEST_NVCC:
        raise RuntimeError(f"{nvcc} is {found[1]}, wanted {OLDEST_NVCC}.0 or later")
    return found[1]


def refusal_of_driver(nvcc: str) -> str | None:
    """Why this machine's driver does not run what that version of nvcc compiles, or None."""
    driver = kernels.cuda_driver()
    if driver is None or int(driver.split(".")[0]) >= int(nvcc.split(".")[0]):
        return None
    return (
        f"nvcc {nvcc} compiles for drivers of CUDA {nvcc.split('.')[0]} or later, and the one here "
        f"is for CUDA {driver}; install an older nvcc"
    )
