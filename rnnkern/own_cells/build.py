"""Compiles cells, once, into libraries that are kept on disk, and loads them.

A library has the kernels of one cell for one element type, and one instruction set of CPUs
(`csrc/cpu/library.h`) or one architecture of GPUs (`csrc/cuda/cell_library.h`). Its name says what
it was compiled from: the generated source, the headers, the flags, and the version of nvcc if that
compiles it. Its last bytes in the cache are a checksum of the rest. A library is written under
another name and then renamed, so that nobody sees a part of it, and one process compiles it while
others wait.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import itertools
import os
import shlex
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rnnkern import kernels
from rnnkern.kernels import CPU
from rnnkern.known_cells import name_of
from rnnkern.own_cells import headers
from rnnkern.own_cells.targets import (
    DTYPES,
    ELEMENTS,
    INSTRUCTION_SETS,
    CpuTarget,
    CudaTarget,
    Target,
    architecture_of,
    elements_of,
    find_compiler,
    find_nvcc,
    refusal_of_driver,
    version_of,
    words,
)

SOURCES: dict[str, Callable[[], str]] = {}
"""The generated source of each cell, by its mode."""

_ready: set[tuple[str, str, int]] = set()
"""Modes, elements and GPUs (or the CPU) whose kernels are loaded."""

_CHECKSUM = 32
_lock = threading.Lock()
_making = threading.Lock()
_loaded = itertools.count(1)


def load(mode: str, element: str, gpu: int = CPU) -> str | None:
    """Loads the kernels of a cell for a GPU or the CPU, and compiles them if they are not in the
    cache.

    Returns:
        Why that is not possible, or None.
    """
    key = mode, DTYPES[element], gpu
    with _lock:
        if key in kernels.WITHOUT_KERNELS:
            return kernels.WITHOUT_KERNELS[key]
        if (mode, element, gpu) in _ready:
            return None
        try:
            target = target_for(mode, element, gpu)
            load_content(mode, target, library(mode, target))
        except (OSError, RuntimeError) as error:
            kernels.WITHOUT_KERNELS[key] = str(error)
            return kernels.WITHOUT_KERNELS[key]
        _ready.add((mode, element, gpu))
    return None


def target_for(mode: str, element: str, gpu: int) -> Target:
    """What a library of the cell must be for, to run on this CPU or that GPU.

    Raises:
        RuntimeError: this build has no CUDA kernels; or the GPU's driver is too old for nvcc; or
            there is no nvcc, and no library in the cache.
    """
    if gpu == CPU:
        return CpuTarget(element, kernels.instruction_set())
    refusal = kernels.refusal_on_gpus()
    if refusal is not None:
        raise RuntimeError(refusal)
    architecture = architecture_of(torch.cuda.get_device_capability(gpu))
    try:
        versions = [version_of(find_nvcc())]
    except RuntimeError:
        versions = _versions_in_cache(mode, element, architecture)
        if not versions:
            raise
    refusals = [refusal_of_driver(version) for version in versions]
    for version, refusal in zip(versions, refusals, strict=True):
        if refusal is None:
            return CudaTarget(element, architecture, version, gpu)
    raise RuntimeError(refusals[0])


def _versions_in_cache(mode: str, element: str, architecture: str) -> list[str]:
    """The versions of nvcc that have compiled this very cell for GPUs, the latest first."""
    found = {
        path.name.removeprefix(f"{mode}-{element}-{architecture}-nvcc").rpartition("-")[0]
        for path in cache_folder().glob(f"{mode}-{element}-{architecture}-nvcc*.so")
    }
    source = SOURCES[mode]()
    fitting = (
        version
        for version in found
        if whole(cache_folder() / _name(mode, source, CudaTarget(element, architecture, version)))
    )
    return sorted(fitting, key=lambda version: [*map(int, version.split("."))], reverse=True)


def load_content(mode: str, target: Target, content: bytes) -> None:
    """Loads a library from memory, so that nobody can change it while this process runs it."""
    file = os.memfd_create(f"rnnkern-{mode}")
    try:
        with os.fdopen(os.dup(file), "wb") as memory:
            memory.write(content)
        # The loader takes two files of one name for one library, and numbers of files come again.
        slashes = "/" * next(_loaded)
        target.load(f"/proc/self/fd{slashes}{file}", mode)
    finally:
        os.close(file)


def look_ahead(mode: str) -> None:
    """Refuses a cell on the CPU that nothing can compile here, unless there are libraries of it."""
    try:
        find_compiler()
    except RuntimeError as error:
        try:
            names = [path.name for path in libraries()]
        except RuntimeError:
            names = []
        for dtype, element in ELEMENTS.items():
            if not any(name.startswith(f"{mode}-{element}-") for name in names):
                kernels.WITHOUT_KERNELS.setdefault((mode, dtype, CPU), str(error))


def library(mode: str, target: Target) -> bytes:
    """The library of a cell: that of the cache, or a new one, which the cache keeps."""
    source = SOURCES[mode]()
    path = cache_folder() / _name(mode, source, target)
    found = whole(path)
    if found is not None:
        return found
    made = None
    try:
        with _only_process(path):
            found = whole(path)  # another process may have made it meanwhile
            if found is None:
                found = made = _compile(mode, source, target, path.parent)
                _keep(path, made)
            return found
    except OSError as error:  # nobody can write there
        print(
            f"rnnkern: the cache {path.parent} cannot be used ({error}); what is compiled is not "
            "kept",
            file=sys.stderr,
        )
        return _compile(mode, source, target, None) if made is None else made


def _name(mode: str, source: str, target: Target) -> str:
    text = "\0".join((source, target.place, *target.flags, _digest_of_headers()))
    key = hashlib.sha256(text.encode()).hexdigest()[:24]
    return f"{mode}-{target.element}-{target.place}-{key}.so"


def include_folder() -> Path:
    """The headers that the compiler needs: in a wheel beside the package, else in the sources."""
    package = Path(__file__).parent.parent
    inside = package / "include"
    return inside if inside.is_dir() else package.parent / "csrc"


@functools.cache
def _digest_of_headers() -> str:
    """Of the headers here.

    Raises:
        RuntimeError: the extension was built from others.
    """
    found = headers.digest(include_folder())
    if found != kernels.headers:
        raise RuntimeError(
            f"the headers in {include_folder()} are not those that rnnkern was built from; "
            "build it again"
        )
    return found


def _compile(mode: str, source: str, target: Target, folder: Path | None) -> bytes:
    """A new library, which the folder will keep, if there is one.

    Raises:
        RuntimeError: there is no compiler, or it fails.
    """
    compiler, root = target.compiler(), include_folder()
    once, kept = ("", "") if folder is None else (", once", f" ({folder} keeps it)")
    print(
        f"rnnkern: compiling the cell {name_of(mode)} for {words(target)}{once}: this takes some "
        f"seconds{kept}",
        file=sys.stderr,
    )
    with tempfile.TemporaryDirectory(prefix="rnnkern-") as place:
        (Path(place) / "cells").mkdir()
        (Path(place) / "cells" / "list.h").write_text(source, encoding="utf-8")
        made = Path(place) / "library.so"
        command = [*compiler, *target.flags, f"-I{place}", f"-I{root}"]
        command += [str(root / target.source), "-o", str(made)]
        try:
            run = subprocess.run(
                command, capture_output=True, encoding="utf-8", errors="replace", check=False
            )
        except OSError as error:
            raise RuntimeError(f"{shlex.join(compiler)} cannot be run: {error}") from error
        if run.returncode or not made.exists():
            text = f":\n{_errors(run.stderr)}" if run.stderr.strip() else ""
            if not run.returncode:
                text = f" and writes no library{text}"
            raise RuntimeError(f"{shlex.join(compiler)} ends with {run.returncode}{text}")
        return made.read_bytes()


def _keep(path: Path, content: bytes) -> None:
    """Writes a library into the cache, whole or not at all."""
    number, name = tempfile.mkstemp(prefix=".tmp", dir=path.parent)
    made = Path(name)
    try:
        with os.fdopen(number, "wb") as file:
            file.write(content + hashlib.sha256(content).digest())
        made.chmod(0o644)  # a service may run as another user than who compiled
        made.replace(path)
    except BaseException:
        made.unlink(missing_ok=True)
        raise


def _errors(text: str) -> str:
    """The first lines of what a compiler says, errors before others."""
    lines = text.splitlines()
    first = next((i for i, line in enumerate(lines) if "error" in line), 0)
    return "\n".join(lines[first : first + 8])


def whole(path: Path) -> bytes | None:
    """A library of the cache, if it is complete and nobody else can have written it."""
    try:
        with path.open("rb") as file:
            _expect_private(path, os.fstat(file.fileno()))  # of what is read, whatever is there now
            content = file.read()
    except OSError:
        return None
    content, checksum = content[:-_CHECKSUM], content[-_CHECKSUM:]
    return content if checksum == hashlib.sha256(content).digest() else None


def _expect_private(path: Path, found: os.stat_result) -> None:
    """Raises a PermissionError if another user could have changed the file or the folder."""
    if found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
        raise PermissionError(f"{path} belongs to another user, or others may write to it")


def cache_folder() -> Path:
    """``RNNKERN_CACHE``, or ``rnnkern`` in the user's folder for caches.

    Raises:
        RuntimeError: it is in a home folder, and there is none.
    """
    named = os.environ.get("RNNKERN_CACHE")
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = named or f"{caches}/rnnkern"
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise RuntimeError(
            f"there is no home folder for the cache of cells, {path}: set RNNKERN_CACHE to a folder"
        ) from None


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """While this process alone makes this library in its folder, which is made if it is missing.

    The locks of all libraries are bytes of one file, so that different ones are made side by side.
    They belong to the process, so only one of its threads holds any.
    """
    folder = path.parent
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _expect_private(folder, folder.stat())
    with tempfile.TemporaryFile(dir=folder):
        pass  # the folder can be written to
    with _making, (folder / "lock").open("w") as file:
        digest = hashlib.sha256(path.name.encode()).digest()
        fcntl.lockf(file, fcntl.LOCK_EX, 1, int.from_bytes(digest[:7], "big"))
        yield


def clear() -> int:
    """Removes the cache's libraries, and returns their number.

    What processes have left behind that were killed is removed, too, unless one compiles just now.
    """
    found, folder = libraries(), cache_folder()
    for path in found:
        path.unlink(missing_ok=True)
    if _making.acquire(blocking=False):
        try:
            with contextlib.suppress(OSError), (folder / "lock").open("r+") as file:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of all libraries
                for path in folder.glob(".tmp*"):
                    path.unlink(missing_ok=True)
        finally:
            _making.release()
    return len(found)


def libraries() -> list[Path]:
    """The libraries that are in the cache."""
    return sorted(path for path in cache_folder().glob("*.so") if not path.is_dir())


def precompile(
    modes: Sequence[str],
    dtypes: Sequence[torch.dtype],
    folder: Path,
    instruction_set: str | None,
    cuda_capability: tuple[int, int] | None,
) -> list[Path]:
    """Writes the libraries of cells into a folder (`rnnkern.precompile`)."""
    wanted = kernels.instruction_set() if instruction_set is None else instruction_set
    if wanted not in INSTRUCTION_SETS:
        raise ValueError(f"instruction_set must be one of {[*INSTRUCTION_SETS]}, got {wanted!r}")
    if cuda_capability is not None and instruction_set is not None:
        raise ValueError("instruction_set is of CPUs, and cuda_capability of GPUs: name one")
    for dtype in dtypes:
        if dtype not in ELEMENTS:
            raise ValueError(f"dtypes must be among {[*ELEMENTS]}, got {dtype}")
    make: Callable[[str], Target] = functools.partial(CpuTarget, place=wanted)
    if cuda_capability is not None:
        make = _for_gpus(cuda_capability)
    made = []
    for mode, dtype in itertools.product(modes, dtypes):
        on_cpu = elements_of(dtype, wanted)
        for element in on_cpu if cuda_capability is None else on_cpu[:1]:
            source, target = SOURCES[mode](), make(element)
            path = folder / _name(mode, source, target)
            if whole(path) is None:
                with _only_process(path):
                    if whole(path) is None:  # another process may have made it meanwhile
                        _keep(path, _compile(mode, source, target, folder))
            made.append(path)
    return made


def _for_gpus(capability: Any) -> Callable[[str], Target]:
    """The targets for GPUs, by element type."""
    numbers = tuple(capability) if isinstance(capability, Sequence) else ()
    if len(numbers) != 2 or not all(isinstance(n, int) for n in numbers) or numbers[0] < 8:
        raise ValueError(
            f"cuda_capability must be that of a GPU, from (8, 0) on, got {capability!r}"
        )
    architecture, version = architecture_of(numbers), version_of(find_nvcc())
    return lambda element: CudaTarget(element, architecture, version)


kernels.set_loader(load)
