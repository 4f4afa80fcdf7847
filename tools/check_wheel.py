"""Prove wheels: each goes, from an index, into a fresh virtual environment that has torch and whose
PATH has no compiler; there `rnnkern info` tells what the wheel's name says, and
`rnnkern compare --quick` passes. The code for GPUs is also listed by cuobjdump. What a wheel wants
of glibc is at most what its tag names, as objdump of the GNU binutils tells.

Usage: python tools/check_wheel.py WHEEL... [--torch 2.13.0 2.12.1]
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import InvalidWheelFilename, parse_wheel_filename
from packaging.version import InvalidVersion, Version
from wheel_index import WheelError, write_index

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
OLDEST_TORCH = Version("2.10")  # as in pyproject.toml
GLIBC = Version("2.28")  # of RHEL 8, and the oldest that torch's own wheels run on
PLATFORM = f"manylinux_{GLIBC.major}_{GLIBC.minor}_x86_64"
MAX_BYTES = 40_000_000

# Variables that the caller may have set and that a proof or a build must not see. pip's pins are
# passed on by name, because paths in them are relative. A wheel has code for every architecture,
# whatever CUDAARCHS says.
HIDDEN = ("RNNKERN_", "PYTHON", "PIP_CONSTRAINT", "CUDAARCHS")
HIDDEN_FROM_PROOFS = (*HIDDEN, "CUDA", "LD_", "CC", "CXX")

CODE = re.compile(r"^(ELF|PTX) file .*\.sm_(\d+)(\w*)\.(?:cubin|ptx)$", re.MULTILINE)


class Row(NamedTuple):
    """The line about a wheel in the table at the end."""

    wheel: Path
    code: list[str]
    torches: list[str]
    seconds: float  # from the index to the last line of compare, the slowest


def say(text: str) -> None:
    print(f"==== {text}", flush=True)


def run(*command: str | Path, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What the command writes to stdout. Its stderr is passed through."""
    words = [str(word) for word in command]
    done = subprocess.run(words, env=env, cwd=cwd, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise WheelError(f"{shlex.join(words)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def environment(path: str, hidden: tuple[str, ...] = HIDDEN) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    return {**kept, "PATH": path}


def pip(
    python: Path, *arguments: str | Path, env: Mapping[str, str], cwd: Path | None = None
) -> None:
    """Runs this program's own pip for that interpreter."""
    run(
        *(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python),
        *arguments,
        env=env,
        cwd=cwd,
    )


def pip_target(folder: Path, *requirements: str | Path) -> None:
    """Installs programs into a separate folder."""
    own_path = environment(os.environ["PATH"])
    python = Path(sys.executable)
    pip(python, "install", "--quiet", "--target", folder, *requirements, env=own_path)


def find_program(name: str) -> Path:
    found = shutil.which(name)
    if not found:
        raise WheelError(f"want a program {name} on the PATH, found none")
    return Path(found)


def find_python(release: str) -> Path:
    if release == f"{sys.version_info.major}.{sys.version_info.minor}":
        return Path(sys.executable)
    return find_program(f"python{release}")


def pinned(project: str) -> str:
    """The version that constraints.txt pins."""
    lines = (line.partition("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    for requirement in map(Requirement, filter(None, lines)):
        if requirement.name == project:
            return next(iter(requirement.specifier)).version
    raise WheelError(f"want a pin of {project} in {CONSTRAINTS.name}, found none")


def torch_version(text: str) -> str:
    try:
        if Version(text) >= OLDEST_TORCH:
            return text
    except InvalidVersion:
        pass
    raise argparse.ArgumentTypeError(f"want torch {OLDEST_TORCH} or later, got {text!r}")


def local_version(cuda: str) -> str:
    """`cu130` of 13.0; `cpu` stays."""
    return cuda if cuda == "cpu" else "cu" + cuda.replace(".", "")


class Name(NamedTuple):
    """The facts that a wheel's name states."""

    version: Version
    python: str  # 3.11
    platforms: set[str]


def read_name(wheel: Path) -> Name:
    try:
        project, version, _, tags = parse_wheel_filename(wheel.name)
    except InvalidWheelFilename as error:
        raise WheelError(f"want a wheel, got {wheel}: {error}") from error
    if project != "rnnkern" or version.local is None:
        raise WheelError(f"want a wheel of rnnkern with +cpu or +cu130, got {wheel.name}")
    interpreters = {tag.interpreter for tag in tags}
    match = re.fullmatch(r"cp(\d)(\d+)", interpreters.pop())
    if interpreters or not match:
        raise WheelError(f"want a wheel for one CPython, got {wheel.name}")
    return Name(version, ".".join(match.groups()), {tag.platform for tag in tags})


def check_file(wheel: Path) -> None:
    """Checks the size and the tag of a wheel, and that it contains no library."""
    size = wheel.stat().st_size
    if size > MAX_BYTES:
        raise WheelError(f"want at most {MAX_BYTES / 1e6:g} MB, {wheel.name} has {size / 1e6:.1f}")
    if read_name(wheel).platforms != {PLATFORM}:
        raise WheelError(f"want a wheel tagged {PLATFORM}, got {wheel.name}")
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".libs/" in name]
    if libraries:
        raise WheelError(f"want no libraries in the wheel, {wheel.name} has {libraries}")


def extract_extension(wheel: Path, to: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if re.match(r"rnnkern/_C\..*so$", n))
        return Path(archive.extract(name, to))


def check_needs(headers: str) -> None:
    """Checks that the output of `objdump -p` names no newer glibc, and no libstdc++."""
    if "libstdc++.so.6" in re.findall(r"^ +NEEDED +(\S+)", headers, re.MULTILINE):
        raise WheelError("want libstdc++ linked statically, the extension needs libstdc++.so.6")
    versions = set(map(Version, re.findall(r" GLIBC_([\d.]+)$", headers, re.MULTILINE)))
    if not versions:
        raise WheelError(f"want versions of glibc from objdump -p, got {headers!r}")
    if max(versions) > GLIBC:
        raise WheelError(
            f"want at most glibc {GLIBC}, the extension needs {max(versions)}: objdump -T shows"
            " which symbols, cmake/manylinux.cmake where the old ones come from"
        )


def code_in(listing: str) -> list[str]:
    """Names of machine code and PTX in what cuobjdump lists: sm_80, compute_80."""
    found = sorted(set(CODE.findall(listing)), key=lambda code: (code[0], int(code[1]), code[2]))
    return [f"{'sm' if kind == 'ELF' else 'compute'}_{n}{suffix}" for kind, n, suffix in found]


def parse_info(text: str) -> dict[str, str]:
    """The table that `rnnkern info` prints, up to the first empty line."""
    lines = text.partition("\n\n")[0].splitlines()
    return {name: value.strip() for name, _, value in (line.partition(" ") for line in lines)}


def check_info(info: Mapping[str, str], version: Version, code: Iterable[str], torch: str) -> None:
    """Checks that the build reports what the wheel's name states and cuobjdump has found."""
    if info["torch"] not in SpecifierSet(f"=={torch}"):
        raise WheelError(f"want torch {torch} beside the wheel, rnnkern info says {info['torch']}")
    cuda = "cpu" if info["cuda"] == "none" else info["cuda"]
    if info["version"] != str(version) or local_version(cuda) != version.local:
        raise WheelError(
            f"want {version}, rnnkern info says version {info['version']}, cuda {info['cuda']}"
        )
    named = {name for name in info["cuda_architectures"].split(", ") if name != "none"}
    if named != set(code):
        raise WheelError(f"cuobjdump finds {sorted(code)}, rnnkern info says {sorted(named)}")
    if "baseline" not in info["isa_compiled"].split(", "):
        raise WheelError(f"want kernels for any CPU, rnnkern info says {info['isa_compiled']}")


class Prover:
    """Proves wheels with each of these versions of torch, which it installs once, in `work`."""

    def __init__(self, torches: Iterable[str], work: Path) -> None:
        self.torches = list(dict.fromkeys(torches))
        self._work = work

    def prove(self, wheel: Path) -> Row:
        """
        Raises:
            WheelError: something is not as it should be.
        """
        version, release, _ = read_name(wheel)
        python = find_python(release)
        check_file(wheel)
        with TemporaryDirectory(dir=self._work) as folder:
            extension = extract_extension(wheel, Path(folder))
            check_needs(run(find_program("objdump"), "-p", extension))
            code = [] if version.local == "cpu" else self._code_of(extension)
        seconds = [self._prove_with(torch, wheel, python, code) for torch in self.torches]
        return Row(wheel, code, self.torches, max(seconds))

    def _code_of(self, extension: Path) -> list[str]:
        tools = self._work / "cuobjdump"
        if not tools.exists():
            pip_target(tools, "--constraint", CONSTRAINTS, "nvidia-cuda-cuobjdump")
        (cuobjdump,) = tools.glob("nvidia/cu*/bin/cuobjdump")
        return code_in(run(cuobjdump, "--list-elf", "--list-ptx", extension))

    def _prove_with(self, torch: str, wheel: Path, python: Path, code: list[str]) -> float:
        with_torch = self._site_with(torch, python)
        say(f"{wheel.name} with torch {torch} and no compiler")
        with TemporaryDirectory(dir=self._work) as folder:
            index, venv = Path(folder) / "index", Path(folder) / "venv"
            index.mkdir()
            shutil.copy(wheel, index)
            write_index(index)
            (new_venv(venv, python) / "torch.pth").write_text(f"{with_torch}\n")
            begin = time.monotonic()
            install_and_run(read_name(wheel).version, index / "simple", venv, code, torch)
            seconds = time.monotonic() - begin
        say(f"{wheel.name} with torch {torch}: proved, {seconds:.0f} s from the index on")
        return seconds

    def _site_with(self, torch: str, python: Path) -> Path:
        """site-packages with that torch and numpy, and nothing else."""
        place = self._work / f"torch-{torch}-{python.name}"
        if place.exists():
            return site_packages(place)
        site = new_venv(place, python)
        # Other versions of torch need other versions than the pinned ones.
        pins = ("--constraint", CONSTRAINTS) if torch == pinned("torch") else ()
        say(f"torch {torch}")
        env = environment(os.environ["PATH"], HIDDEN_FROM_PROOFS)
        pip(
            place / "bin" / "python",
            *("install", "--quiet", *pins, f"torch=={torch}", "numpy"),
            env=env,
            cwd=place,
        )
        return site


def install_and_run(
    version: Version, index: Path, venv: Path, code: Iterable[str], torch: str
) -> None:
    """The proof itself, in an environment with torch and with no other programs."""
    programs = venv / "bin"
    env = environment(str(programs), HIDDEN_FROM_PROOFS)
    source = ("--index-url", index.as_uri(), "--only-binary", ":all:", "--no-cache-dir")
    pip(
        programs / "python", "install", "--quiet", *source, f"rnnkern=={version}", env=env, cwd=venv
    )
    where = "import rnnkern; print(rnnkern.__file__)"
    loaded = run(programs / "python", "-c", where, env=env, cwd=venv).strip()
    if not Path(loaded).is_relative_to(venv):
        raise WheelError(f"want rnnkern from {venv}, got {loaded}")
    info = run(programs / "rnnkern", "info", env=env, cwd=venv)
    print(info, flush=True)
    check_info(parse_info(info), version, code, torch)
    print(run(programs / "rnnkern", "compare", "--quick", env=env, cwd=venv), flush=True)


def new_venv(place: Path, python: Path) -> Path:
    """Makes a virtual environment without pip, and returns its site-packages."""
    run(python, "-m", "venv", "--without-pip", place, env=environment(os.environ["PATH"]))
    return site_packages(place)


def site_packages(venv: Path) -> Path:
    (found,) = venv.glob("lib/python3.*/site-packages")
    return found


def table(rows: Iterable[Row]) -> str:
    """The wheels, as a table in Markdown."""
    lines = ["| wheel | MB | code for GPUs | torch | index to compare |", "|---|---|---|---|---|"]
    for row in rows:
        size = row.wheel.stat().st_size / 1e6
        code, torches = ", ".join(row.code) or "none", ", ".join(row.torches)
        lines.append(
            f"| {row.wheel.name} | {size:.1f} | {code} | {torches} | {row.seconds:.0f} s |"
        )
    return "\n".join(lines)


def add_torch_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--torch",
        nargs="+",
        type=torch_version,
        default=[pinned("torch")],
        metavar="VERSION",
        help="versions of torch to prove wheels with (default: the one in constraints.txt)",
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("wheels", nargs="+", type=Path, metavar="WHEEL")
    add_torch_argument(parser)
    given = parser.parse_args(arguments)
    try:
        for wheel in given.wheels:
            if not wheel.is_file():
                raise WheelError(f"want a wheel, there is no file {wheel}")
        with TemporaryDirectory() as work:
            prover = Prover(given.torch, Path(work))
            print(table([prover.prove(wheel) for wheel in given.wheels]))
    except WheelError as error:
        print(f"check_wheel: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
