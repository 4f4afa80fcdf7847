"""A plugin of pytest: cells that are written in Python are compiled for the stand-in for a GPU
(tests/simt), whose build of the package the tests run on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from rnnkern import kernels
from rnnkern.own_cells import build
from rnnkern.own_cells.targets import Target, find_compiler

SIMT = Path(__file__).parents[1] / "simt"


@dataclass(frozen=True)
class StandIn:
    """As `rnnkern.own_cells.targets.CudaTarget`."""

    element: str
    gpu: int

    place: ClassVar[str] = "stand-in"
    source: ClassVar[str] = "cuda/cell_library.cu"

    @property
    def flags(self) -> tuple[str, ...]:
        header = hashlib.sha256((SIMT / "simt.h").read_bytes()).hexdigest()[:16]
        return (
            *("-x", "c++", "-std=c++20", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
            *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-DRNNKERN_SIMT"),
            *("-DRNNKERN_CELL_LIBRARY", "-DRNNKERN_NAMESPACE=gpu", "-DRNNKERN_CELL=OwnCell"),
            f"-DRNNKERN_ELEMENT={self.element}",
            f'-DRNNKERN_HEADERS="{kernels.headers}"',
            f"-DRNNKERN_OF_SIMT={header}",  # for the name of the library
        )

    def compiler(self) -> list[str]:
        return [*find_compiler(), f"-I{SIMT}"]

    def load(self, path: str, mode: str) -> None:
        kernels.load_cuda_library(path, mode, self.element, self.gpu)


def target_for(mode: str, element: str, gpu: int) -> Target:
    return StandIn(element, gpu)


assert kernels.IS_STAND_IN
build.target_for = target_for
