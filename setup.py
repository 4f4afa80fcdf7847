"""Drives CMake with Ninja.

CMakeLists.txt is the one build definition, pyproject.toml holds the metadata but for the version:
RNNKERN_LOCAL_VERSION=cu130 makes 0.2.0 into 0.2.0+cu130. RNNKERN_WITHOUT_EXTENSION=1 leaves the
extension out: the Makefile installs the metadata that way, and builds the extension in view.
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

VERSION = "0.2.0"
ROOT = Path(__file__).parent.resolve()
HEADERS = runpy.run_path(str(ROOT / "rnnkern" / "own_cells" / "headers.py"))


class CMakeBuild(build_ext):
    """Builds rnnkern._C where setuptools wants it.

    In the wheel, or beside the sources (editable).
    """

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        # An editable build gets a new temporary folder each time; its own one keeps the objects.
        place = ROOT / "build" / "editable" if self.editable_mode else Path(self.build_temp)
        build = place.resolve() / ext.name
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "--log-level=NOTICE",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DRNNKERN_SANITIZE={os.environ.get('RNNKERN_SANITIZE', '')}",
            f"-DRNNKERN_SANITIZED={os.environ.get('RNNKERN_SANITIZED', '')}",
            f"-DRNNKERN_AMX_STAND_IN={os.environ.get('RNNKERN_AMX_STAND_IN', 'OFF')}",
            f"-DRNNKERN_SIMT={os.environ.get('RNNKERN_SIMT', 'OFF')}",
            f"-DRNNKERN_CUDA={os.environ.get('RNNKERN_CUDA', 'AUTO')}",
            f"-DRNNKERN_CUDA_EXCHANGE={os.environ.get('RNNKERN_CUDA_EXCHANGE', 'FLAGS')}",
            f"-DRNNKERN_INSTRUCTION_SETS={os.environ.get('RNNKERN_INSTRUCTION_SETS', 'all')}",
            f"-DRNNKERN_MANYLINUX={os.environ.get('RNNKERN_MANYLINUX', 'OFF')}",
            f"-DRNNKERN_HEADERS={HEADERS['digest'](ROOT / 'csrc')}",
            f"-DRNNKERN_CUDA_REPORT={os.environ.get('RNNKERN_CUDA_REPORT', 'OFF')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build), "--target", "_C"], check=True)
        if not self.editable_mode and not self.inplace:
            copy_headers(target / "include")


def copy_headers(target: Path) -> None:
    """Puts the files that `rnnkern.cell` compiles cells with beside the extension."""
    for source in HEADERS["files"](ROOT / "csrc"):
        copied = target / source.relative_to(ROOT / "csrc")
        copied.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, copied)


local = os.environ.get("RNNKERN_LOCAL_VERSION")
without_extension = os.environ.get("RNNKERN_WITHOUT_EXTENSION") == "1"
setup(
    version=f"{VERSION}+{local}" if local else VERSION,
    ext_modules=[] if without_extension else [Extension("rnnkern._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
