"""Cells that are written in Python, compiled for GPUs: nvcc, its libraries in the cache, and
machines without it. No test needs a GPU; those that need nvcc are skipped if there is none.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_compiled_cells import of_its_own
from test_own_cells import of_functions
from torch._subclasses.fake_tensor import FakeTensorMode

import rnnkern
from rnnkern import cells, kernels
from rnnkern.kernels import Why
from rnnkern.own_cells import build, targets
from rnnkern.own_cells.targets import ELEMENTS, CpuTarget, CudaTarget

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(kernels.IS_STAND_IN, reason="a stand-in has no nvcc"),
]

MODE = cells.mgu.mode
VERSION = "13.0.88"
GPU = 1
Loaded = list[tuple[str, str, int, bytes]]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Loaded:
    """As if there were an H200, its driver, and a build with CUDA kernels. Gives what is loaded."""
    loaded: Loaded = []

    def load(path: str, mode: str, element: str, gpu: int) -> None:
        content = Path(path).read_bytes()
        if not content.startswith(b"a library"):
            raise RuntimeError(f"{path}: invalid ELF header")
        loaded.append((mode, element, gpu, content))

    monkeypatch.setattr(kernels, "cuda", "13.0")
    monkeypatch.setattr(kernels, "cuda_driver", lambda: "13.0")
    monkeypatch.setattr(kernels, "load_cuda_library", load)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    return loaded


def script(path: Path, version: str, then: str) -> Path:
    """A program in place of nvcc of that version."""
    said = f"Cuda compilation tools, release {version.rpartition('.')[0]}, V{version}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo "{said}" && exit\n{then}\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def nvcc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """In place of nvcc: writes its arguments as a library. Gives those of all calls."""
    calls = tmp_path / "calls"
    write = f'echo "$@" >> {calls}\n'
    write += 'while [ "$1" != -o ]; do shift; done; echo "a library" >"$2"'
    monkeypatch.setenv("CUDACXX", str(script(tmp_path / "nvcc", VERSION, write)))
    return lambda: calls.read_text().splitlines() if calls.exists() else []


def take(mode: str = MODE, element: str = "float") -> Path:
    """Loads the library, and returns its path in the cache."""
    target = build.target_for(mode, element, GPU)
    build.load_content(mode, target, build.library(mode, target))
    return build.cache_folder() / build._name(mode, build.SOURCES[mode](), target)


def test_it_is_compiled_once_for_the_gpu(
    cell_cache: Path,
    gpu: Loaded,
    nvcc: Callable[[], list[str]],
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert {take(), take()} == set(cell_cache.glob(f"{MODE}-float-sm_90a-nvcc{VERSION}-*.so"))
    assert gpu == 2 * [(MODE, "float", GPU, b"a library\n")]
    (arguments,) = nvcc()
    assert "-gencode=arch=compute_90a,code=sm_90a" in arguments
    assert "cuda/cell_library.cu" in arguments
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rnnkern: compiling the cell mgu for float32 on sm_90a, once")


def test_the_loader_finds_it_for_each_gpu(
    cell_cache: Path, gpu: Loaded, nvcc: Callable[[], list[str]], no_refusals: None
) -> None:
    """GPUs of one kind share the file."""
    mode = of_its_own("each").mode
    assert [build.load(mode, "Bf16", index) for index in (0, 1, 1)] == [None] * 3
    assert [(element, index) for _, element, index, _ in gpu] == [("Bf16", 0), ("Bf16", 1)]
    assert len(nvcc()) == 1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"library", b"virus!!")),
        lambda path: path.chmod(0o777),
    ],
    ids=["cut", "changed", "writable-by-all"],
)
def test_a_spoiled_library_is_compiled_again(
    spoil: Callable[[Path], Any], cell_cache: Path, gpu: Loaded, nvcc: Callable[[], list[str]]
) -> None:
    path = take()
    spoil(path)
    assert take() == path
    assert len(nvcc()) == 2
    assert build.whole(path) is not None
    assert gpu[1] == gpu[0]


def test_the_name_says_what_it_was_made_of() -> None:
    source = build.SOURCES[MODE]()
    names = [
        build._name(MODE, source, CudaTarget("float", "sm_90a", VERSION, 0)),
        build._name(MODE, source + " ", CudaTarget("float", "sm_90a", VERSION)),
        build._name(MODE, source, CudaTarget("float", "sm_90a", "13.0.99")),
        build._name(MODE, source, CudaTarget("float", "sm_80", VERSION)),
        build._name(MODE, source, CudaTarget("double", "sm_90a", VERSION)),
        build._name(MODE, source, CpuTarget("float", "baseline")),
    ]
    assert len(set(names)) == len(names)
    assert names[0] == build._name(MODE, source, CudaTarget("float", "sm_90a", VERSION, 1))


@pytest.mark.parametrize(
    ("name", "version", "then", "message"),
    [
        (
            "none",
            None,
            "",
            "there is no nvcc here; install CUDA's toolkit.*pip install \"cuda-tool",
        ),
        ("missing", "", "", "CUDACXX names '.*missing', which is no program here"),
        ("mute", "no number", "", "does not say which version it is"),
        ("old", "11.8.89", "", "is 11.8.89, wanted 12.0 or later"),
        ("new", "14.1.2", "", "compiles for drivers of CUDA 14 or later, and the one here is for"),
        (
            "fails",
            VERSION,
            "echo nvcc fatal: error: no such architecture >&2; exit 3",
            "ends with 3:\nnvcc fatal: error: no such architecture",
        ),
        ("silent", VERSION, "exit 0", "ends with 0"),
        (
            "wrong",
            VERSION,
            'while [ "$1" != -o ]; do shift; done; echo no >"$2"',
            "invalid ELF header",
        ),
    ],
)
def test_without_a_compiler_that_works(
    name: str,
    version: str | None,
    then: str,
    message: str,
    cell_cache: Path,
    gpu: Loaded,
    no_refusals: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason is kept for that GPU and dtype alone, and whoever asks before a call sees it."""
    if version:
        monkeypatch.setenv("CUDACXX", str(script(tmp_path / name, version, then)))
    elif version is None:
        monkeypatch.delenv("CUDACXX", raising=False)
        monkeypatch.delenv("CUDA_HOME", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setenv("CUDACXX", str(tmp_path / name))
    cell = of_its_own(f"cuda {name}")
    why = build.load(cell.mode, "float", GPU)
    assert why is not None
    assert re.search(message, why), why
    assert build.load(cell.mode, "float", GPU) == why
    assert dict(kernels.WITHOUT_KERNELS) == {(cell.mode, torch.float32, GPU): why}
    layer: Any = SimpleNamespace(mode=cell.mode)
    for index, dtype, expected in ((GPU, torch.float32, why), (0, torch.float32, None)):
        x: Any = SimpleNamespace(device=torch.device("cuda", index), dtype=dtype)
        refusal = kernels.refusal_of_cell(layer, x)
        assert (refusal and refusal.values) == (expected and (expected,))


def test_nvcc_is_found_where_a_build_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The order is that of cmake/choose_nvcc.cmake."""
    packages = tmp_path / "nvidia"
    places = {
        "CUDACXX": script(tmp_path / "own", VERSION, ""),
        "CUDA_HOME": script(tmp_path / "home" / "bin" / "nvcc", VERSION, ""),
        "PATH": script(tmp_path / "path" / "nvcc", VERSION, ""),
    }
    from_pip = script(packages / "cu13" / "bin" / "nvcc", VERSION, "")
    (packages / "cu13" / "lib").mkdir()
    (packages / "cu13" / "lib" / "libcudart_static.a").touch()
    spec = SimpleNamespace(submodule_search_locations=[str(packages)])
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setenv("CUDACXX", str(places["CUDACXX"]))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    for name, path in places.items():
        assert targets.find_nvcc() == str(path)
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", str(tmp_path))
    target = CudaTarget("float", "sm_90a", VERSION)
    assert target.compiler() == [str(from_pip), f"-L{packages / 'cu13' / 'lib'}"]


def test_precompiled_libraries_need_no_nvcc(
    cell_cache: Path,
    gpu: Loaded,
    nvcc: Callable[[], list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "shipped"
    (path,) = rnnkern.precompile(cells.mgu, folder=folder, cuda_capability=(9, 0))
    assert path.parent == folder
    assert not cell_cache.exists()
    (folder / path.name.replace(VERSION, "13.0.99")).write_bytes(path.read_bytes())  # of no version
    monkeypatch.setenv("RNNKERN_CACHE", str(folder))
    monkeypatch.setenv("CUDACXX", "nothing")
    assert take() == path
    assert len(gpu) == len(nvcc()) == 1
    with pytest.raises(RuntimeError, match="CUDACXX names 'nothing'"):
        take(element="double")
    monkeypatch.setattr(kernels, "cuda_driver", lambda: "12.9")
    with pytest.raises(RuntimeError, match="compiles for drivers of CUDA 13 or later"):
        take()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_capability": (7, 5)}, "cuda_capability must be that of a GPU, from"),
        ({"cuda_capability": "sm_90"}, "cuda_capability must be that of a GPU, from"),
        ({"cuda_capability": (9, 0), "instruction_set": "baseline"}, "name one"),
    ],
    ids=["old", "text", "both"],
)
def test_what_cannot_be_precompiled_for_gpus(
    options: dict[str, Any], message: str, nvcc: Callable[[], list[str]], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        rnnkern.precompile(cells.mgu, folder=tmp_path, **options)
    assert not nvcc()


# ---- Calls that no kernel covers ----


@pytest.mark.skipif(kernels.cuda is not None, reason="a build with CUDA kernels")
def test_a_build_without_cuda_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA tensors, here fake ones, take the reference, with one warning. Nothing is compiled."""
    monkeypatch.setattr(rnnkern.Recurrent, "reset_parameters", lambda module: None)
    monkeypatch.setattr(rnnkern.Recurrent, "_torch_forward", lambda module, x, hx: "the reference")
    with FakeTensorMode():
        module = rnnkern.Recurrent(of_its_own("no CUDA"), 3, 4, device="cuda")
        x = torch.empty(5, 2, 3, device="cuda")
        with pytest.warns(rnnkern.FallbackWarning, match="has no CUDA kernels") as warned:
            assert [module(x), module(x)] == 2 * ["the reference"]
    assert len(warned) == 1
    path = tmp_path / "library.so"
    with pytest.raises(RuntimeError, match="this build of rnnkern has no CUDA kernels"):
        kernels.load_cuda_library(str(path), MODE, "float", 0)


def test_other_devices_have_no_kernels() -> None:
    layer: Any = SimpleNamespace(mode=MODE)
    x: Any = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32)
    refusal = kernels.refusal_of_cell(layer, x)
    assert refusal is not None
    assert refusal.why is Why.CELL
    assert "device other than cpu and cuda" in refusal.text


# ---- nvcc itself ----


def has_nvcc() -> bool:
    try:
        return bool(targets.version_of(targets.find_nvcc()))
    except RuntimeError:
        return False


class Entry(ctypes.Structure):
    """The fields of a `CellLibrary` (csrc/cuda/cell_library.h) that say what it is."""

    _fields_ = [(name, ctypes.c_char_p) for name in ("headers", "mode", "element")]


@pytest.mark.skipif(not has_nvcc(), reason="needs nvcc")
@pytest.mark.parametrize("dtype", ELEMENTS, ids=str)
def test_nvcc_compiles_a_cell(dtype: torch.dtype, cell_cache: Path) -> None:
    """One that calls every function, for the architecture of an H200. The library loads without a
    GPU and a driver, and says what it is.
    """
    if kernels.cuda is None and dtype != torch.float32:
        pytest.skip("without CUDA one type is enough; make cuda-check compiles for all")
    (path,) = rnnkern.precompile(of_functions, dtypes=[dtype], cuda_capability=(9, 0))
    loadable = path.with_suffix(".loaded")
    content = build.whole(path)
    assert content is not None
    loadable.write_bytes(content)
    library = ctypes.CDLL(str(loadable))
    library.rnnkern_cuda_cell_library.restype = ctypes.POINTER(Entry)
    entry = library.rnnkern_cuda_cell_library().contents
    assert entry.headers.decode() == kernels.headers
    assert entry.mode.decode() == of_functions.mode
    assert entry.element.decode() == ELEMENTS[dtype]
    if kernels.cuda is not None:
        kernels.load_cuda_library(str(loadable), of_functions.mode, ELEMENTS[dtype], 0)
        with pytest.raises(RuntimeError, match=r"wanted .* for another"):
            kernels.load_cuda_library(str(loadable), of_functions.mode, "another", 0)
