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
BESIDE_PYTHON = str(Path(sys.executable).parent)
CMAKE = shutil.which("cmake", path=os.pathsep.join([BESIDE_PYTHON, os.environ["PATH"]]))
EVERY = "80;90a-real;100-real;120-real"
NO_GPU = "no NVIDIA GPU of compute capability 8.0 or later"


def program(path: Path, prints: str) -> None:
    path.write_text(f"#!/bin/sh\nprintf '%s\\n' '{prints}'\n")
    path.chmod(0o755)


def nvcc(path: Path, release: str) -> None:
    program(path, f"Cuda compilation tools, release {release}, V{release}.1")


class Machine:
    """A folder with these programs, the only one on the PATH."""

    python = Path(sys.executable)
    kept = ""  # what CMake has kept of the last build as CMAKE_CUDA_ARCHITECTURES

    def __init__(self, folder: Path, release: str | None, gpus: str | None) -> None:
        folder.mkdir()
        self._folder = folder
        if release is not None:
            nvcc(folder / "nvcc", release)
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
                *(CMAKE, f"-DRNNKERN_CUDA={setting}", f"-DPython_EXECUTABLE={self.python}"),
                *([f"-DCMAKE_CUDA_ARCHITECTURES={self.kept}"] if self.kept else []),
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


@pytest.mark.parametrize(("release", "wanted"), [("13.0", EVERY), ("12.4", "80;90a-real")])
@pytest.mark.parametrize("gpus", [None, "8.0"])
def test_on_builds_for_every_generation(
    tmp_path: Path, release: str, wanted: str, gpus: str | None
) -> None:
    here = Machine(tmp_path / "bin", release, gpus)
    assert here.chosen("ON") == f"version={release} for={wanted}"


@pytest.mark.parametrize("setting", ["AUTO", "ON"])
def test_cudaarchs_names_the_architectures(tmp_path: Path, setting: str) -> None:
    here = Machine(tmp_path / "bin", "13.0", "8.0")
    assert here.chosen(setting, CUDAARCHS="89;90a-real") == "version=13.0 for=89;90a-real"
    of_default = {"AUTO": "80-real", "ON": EVERY}[setting]
    assert here.chosen(setting, CUDAARCHS="") == f"version=13.0 for={of_default}"


def test_the_last_builds_architectures_do_not_matter(tmp_path: Path) -> None:
    here = Machine(tmp_path / "bin", "13.0", "9.0")
    here.kept = "75"
    assert here.chosen("AUTO") == "version=13.0 for=90a-real"


def test_where_nvcc_is_looked_for(tmp_path: Path) -> None:
    """CUDACXX, CUDA_HOME, the PATH, and the packages of pip, in this order."""
    pip = tmp_path / "packages" / "nvidia" / "cu13" / "bin"
    home = tmp_path / "home" / "bin"
    for folder, release in ((pip, "13.1"), (home, "13.2")):
        folder.mkdir(parents=True)
        nvcc(folder / "nvcc", release)
    nvcc(tmp_path / "named", "13.3")
    bare = Machine(tmp_path / "bare", None, "9.0")
    full = Machine(tmp_path / "full", "13.0", "9.0")
    program(tmp_path / "python", str(tmp_path / "packages"))
    for machine in (bare, full):
        machine.python = tmp_path / "python"
    environment = {"CUDA_HOME": str(home.parent)}
    assert bare.chosen("ON").startswith("version=13.1 ")
    assert full.chosen("ON").startswith("version=13.0 ")
    assert full.chosen("ON", **environment).startswith("version=13.2 ")
    environment["CUDACXX"] = str(tmp_path / "named")
    assert full.chosen("ON", **environment).startswith("version=13.3 ")


def test_without_nvcc(tmp_path: Path) -> None:
    bare = Machine(tmp_path / "bin", None, "9.0")
    program(tmp_path / "python", str(tmp_path / "no packages"))
    bare.python = tmp_path / "python"
    auto, on = bare.configure("AUTO"), bare.configure("ON")
    assert auto.returncode == 0
    assert "no nvcc was found (CUDACXX, CUDA_HOME, PATH, pip): building for" in auto.stderr
    assert on.returncode


@pytest.mark.parametrize(
    ("release", "environment", "reason"),
    [
        ("11.8", {}, "is 11.8, wanted 12.0 or later"),
        ("13.0", {"CUDACXX": "/nonexistent/nvcc"}, "/nonexistent/nvcc does not run"),
    ],
)
def test_on_is_an_error_where_auto_says_why(
    tmp_path: Path, release: str, environment: dict[str, str], reason: str
) -> None:
    here = Machine(tmp_path / "bin", release, "9.0")
    auto = here.configure("AUTO", **environment)
    assert auto.returncode == 0
    assert f"{reason}: building for the CPU alone" in auto.stderr
    on = here.configure("ON", **environment)
    assert on.returncode
    assert "RNNKERN_CUDA is set, but" in on.stderr
    assert reason in " ".join(on.stderr.split())
