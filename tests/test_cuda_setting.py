"""What RNNKERN_CUDA makes of the compiler and the GPUs of a machine: cmake/choose_nvcc.cmake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu_only

CHOICE = Path(__file__).parents[1] / "cmake" / "choose_nvcc.cmake"
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.defpath]))
EVERY = "80;90a-real;100-real;120-real"
NO_GPU = "no NVIDIA GPU of compute capability 8.0 or later"


def program(path: Path, prints: str) -> None:
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' '{prints}'\n")
    path.chmod(0o755)


class Machine:
    """A folder with these programs, the only one on the PATH."""

    def __init__(self, folder: Path, nvcc: str | None, gpus: str | None) -> None:
        folder.mkdir()
        self._folder = folder
        if nvcc is not None:
            program(folder / "nvcc", f"Cuda compilation tools, release {nvcc}, V{nvcc}.1")
        if gpus is not None:
            program(folder / "nvidia-smi", gpus.replace(" ", "\n"))

    def configure(self, setting: str, **environment: str) -> subprocess.CompletedProcess[str]:
        assert CMAKE, "want cmake beside this Python: pip install --group build"
        script = self._folder / "choose.cmake"
        script.write_text(
            f'include("{CHOICE}")\n'
            'message("version=${rnnkern_nvcc_version} for=${CMAKE_CUDA_ARCHITECTURES}")\n'
        )
        return subprocess.run(
            [
                *(CMAKE, f"-DRNNKERN_CUDA={setting}", f"-DPython_EXECUTABLE={sys.executable}"),
                *("-P", script),
            ],
            capture_output=True,
            text=True,
            env={"PATH": str(self._folder), **environment},
            timeout=60,
        )

    def chosen(self, setting: str, **environment: str) -> str:
        done = self.configure(setting, **environment)
        assert done.returncode == 0, done.stderr
        return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("gpus", "wanted"),
    [
        ("8.0", "80-real"),
        ("9.0", "90a-real"),
        ("8.9 9.0 8.9", "89-real;90a-real"),
        ("7.5 12.0", "120-real"),
    ],
)
def test_auto_builds_for_the_gpus_here(tmp_path: Path, gpus: str, wanted: str) -> None:
    here = Machine(tmp_path / "bin", "13.0", gpus)
    assert here.chosen("AUTO") == f"version=13.0 for={wanted}"


@pytest.mark.parametrize("gpus", [None, "7.5", "No devices were found"])
@pytest.mark.parametrize("environment", [{}, {"CUDAARCHS": "90a-real"}], ids=["", "CUDAARCHS"])
def test_auto_builds_for_the_cpu_alone_where_no_gpu_runs_the_kernels(
    tmp_path: Path, gpus: str | None, environment: dict[str, str]
) -> None:
    done = Machine(tmp_path / "bin", "13.0", gpus).configure("AUTO", **environment)
    assert done.returncode == 0
    assert NO_GPU in done.stderr
    assert "RNNKERN_CUDA=ON builds" in done.stderr
    assert done.stderr.endswith("version= for=\n")


@pytest.mark.parametrize(("nvcc", "wanted"), [("13.0", EVERY), ("12.4", "80;90a-real")])
@pytest.mark.parametrize("gpus", [None, "8.0"])
def test_on_builds_for_every_generation(
    tmp_path: Path, nvcc: str, wanted: str, gpus: str | None
) -> None:
    here = Machine(tmp_path / "bin", nvcc, gpus)
    assert here.chosen("ON") == f"version={nvcc} for={wanted}"


@pytest.mark.parametrize("setting", ["AUTO", "ON"])
def test_cudaarchs_names_the_architectures(tmp_path: Path, setting: str) -> None:
    """CMake itself reads that variable."""
    here = Machine(tmp_path / "bin", "13.0", "8.0")
    assert here.chosen(setting, CUDAARCHS="90a-real") == "version=13.0 for="


@pytest.mark.parametrize(
    ("nvcc", "environment", "reason"),
    [
        ("11.8", {}, "is 11.8, wanted 12.0 or later"),
        ("13.0", {"CUDACXX": "/nonexistent/nvcc"}, "/nonexistent/nvcc does not run"),
    ],
)
def test_on_is_an_error_where_auto_says_why(
    tmp_path: Path, nvcc: str, environment: dict[str, str], reason: str
) -> None:
    here = Machine(tmp_path / "bin", nvcc, "9.0")
    auto = here.configure("AUTO", **environment)
    assert auto.returncode == 0
    assert f"{reason}: building for the CPU alone" in auto.stderr
    on = here.configure("ON", **environment)
    assert on.returncode
    assert "RNNKERN_CUDA is set, but" in on.stderr
    assert reason in " ".join(on.stderr.split())
