"""The cache of compiled cells, and machines without a compiler."""

from __future__ import annotations

import stat
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import rnnkern
from rnnkern import cells, kernels
from rnnkern.bench import cli
from rnnkern.own_cells import build
from rnnkern.own_cells.targets import CpuTarget

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(kernels.IS_STAND_IN, reason="kernels of own cells are for CPUs"),
]

MODE = cells.rnn_tanh.mode
TARGET = CpuTarget("float", kernels.instruction_set())


@pytest.fixture(scope="module")
def compiled() -> bytes:
    """A library of that cell, as the compiler has made it."""
    return build.library(MODE, TARGET)


@pytest.fixture
def compiler(compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """In place of a compiler: writes that library after a while. Gives how often it has run."""
    script, calls = tmp_path / "compiler", tmp_path / "calls"
    (tmp_path / "library").write_bytes(compiled)
    script.write_text(
        f"#!/bin/sh\necho called >> {calls}\n"
        'while [ "$1" != -o ]; do shift; done\n'
        f'sleep 0.3; cp {tmp_path}/library "$2"\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return lambda: len(calls.read_text().splitlines()) if calls.exists() else 0


def take() -> Path:
    """Loads the library, and returns its path in the cache, which may not have it."""
    build.load_content(MODE, TARGET, build.library(MODE, TARGET))
    return build.cache_folder() / build._name(MODE, build.SOURCES[MODE](), TARGET)


def test_it_is_compiled_once(
    cell_cache: Path, compiler: Callable[[], int], capfd: pytest.CaptureFixture[str]
) -> None:
    assert {take(), take()} == set(cell_cache.glob("*.so"))
    assert compiler() == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("rnnkern: compiling the cell rnn_tanh for float32 on ")
    assert f" on {TARGET.place}, once: " in line
    assert stat.S_IMODE(cell_cache.stat().st_mode) == 0o700
    assert not [path for path in cell_cache.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:1000]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"more"),
        lambda path: path.write_bytes(path.read_bytes().replace(b"GLIBC", b"GLUBC")),
        lambda path: path.chmod(0o777),
        lambda path: (path.unlink(), path.mkdir(), path.rmdir()),
    ],
    ids=["cut", "empty", "longer", "changed", "writable-by-all", "gone"],
)
def test_a_spoiled_library_is_compiled_again(
    spoil: Callable[[Path], Any], cell_cache: Path, compiler: Callable[[], int]
) -> None:
    path = take()
    spoil(path)
    assert take() == path
    assert compiler() == 2
    assert build.whole(path) is not None


@pytest.mark.parametrize("what", ["a file", "read-only", "writable-by-all"])
def test_a_cache_that_cannot_be_used(
    what: str,
    cell_cache: Path,
    compiler: Callable[[], int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The cell is compiled for this process alone, and a line says so."""
    if what == "a file":
        cell_cache.write_text("")
    elif what == "writable-by-all":
        cell_cache.mkdir()
        cell_cache.chmod(0o777)
    else:
        cell_cache.mkdir()

        def refuse(**_: Any) -> Any:
            raise PermissionError(13, "Permission denied", str(cell_cache))

        # The tests may run as root, whom no mode stops.
        monkeypatch.setattr(build.tempfile, "TemporaryFile", refuse)
    path = take()
    assert compiler() == 1
    assert not path.exists()
    said = capfd.readouterr().err
    assert f"rnnkern: the cache {cell_cache} cannot be used" in said
    assert "what is compiled is not kept" in said
    assert "keeps it" not in said


@pytest.mark.parametrize("what", ["a folder in its place", "no room"])
def test_a_library_that_cannot_be_kept(
    what: str,
    cell_cache: Path,
    compiler: Callable[[], int],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is compiled once all the same, and leaves nothing behind."""
    path = take()
    path.unlink()
    if what == "a folder in its place":
        path.mkdir()
    else:

        def refuse(*_: Any) -> Any:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(Path, "replace", refuse)
    before = {each.name for each in cell_cache.iterdir()}
    take()
    assert compiler() == 2
    assert "cannot be used" in capfd.readouterr().err
    assert {each.name for each in cell_cache.iterdir()} == before


def test_without_a_home_folder(
    compiler: Callable[[], int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RNNKERN_CACHE", "~nobody-of-this-name/cells")
    with pytest.raises(RuntimeError, match=r"no home folder for the cache .* set RNNKERN_CACHE"):
        take()
    for action in ("show", "clear"):
        assert cli.main(["cache", action]) == 1
        assert "set RNNKERN_CACHE to a folder" in capsys.readouterr().err
    monkeypatch.setenv("CXX", "/nothing")
    rnnkern.Recurrent(of_its_own("without a home"), 3, 4)  # the first call says why


TAKES = """
import rnnkern
from rnnkern.own_cells import build
from rnnkern.own_cells.targets import CpuTarget
build.library(rnnkern.cells.rnn_tanh.mode, CpuTarget("float", rnnkern.kernels.instruction_set()))
print("taken")
"""


PRECOMPILES = """
import rnnkern
rnnkern.precompile(rnnkern.cells.rnn_tanh, instruction_set="x86-64-v3")
print("taken")
"""


@pytest.mark.parametrize("code", [TAKES, PRECOMPILES], ids=["takes", "precompiles"])
def test_two_processes_at_once(code: str, cell_cache: Path, compiler: Callable[[], int]) -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [process.communicate()[0] for process in processes] == 2 * ["taken\n"]
    assert compiler() == 1
    assert len(list(cell_cache.glob("*.so"))) == 1


def test_different_libraries_are_made_side_by_side(
    cell_cache: Path, compiler: Callable[[], int]
) -> None:
    other = CpuTarget("double", TARGET.place)
    path = cell_cache / build._name(MODE, build.SOURCES[MODE](), other)
    with build._only_process(path):
        command = [sys.executable, "-c", TAKES]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "taken\n"
    assert compiler() == 1


def of_its_own(name: str) -> rnnkern.own_cells.OwnCell:
    """A cell that no other test has compiled."""
    number = float(sum(map(ord, name)))

    @rnnkern.cell(gates=("a",))
    def fresh(x: Any, h: Any, prev: Any) -> Any:
        return rnnkern.tanh(x.a + h.a) * number

    return fresh


@pytest.mark.parametrize(
    ("name", "script", "message"),
    [
        ("none", None, "there is no C\\+\\+ compiler here; install g\\+\\+ 12"),
        ("missing", "", "CXX names '.*missing', which is no program here"),
        (
            "fails",
            "echo 'x.h:1: error: {no} such thing' >&2; exit 3",
            "ends with 3:\\nx.h:1: error",
        ),
        ("silent", "exit 0", "ends with 0 and writes no library\\)"),
        ("no-program", "\0", "cannot be run: .*Exec format error"),
        ("wrong", 'while [ "$1" != -o ]; do shift; done; echo no >"$2"', "(invalid ELF|file too)"),
    ],
)
def test_without_kernels_the_reference_runs(
    name: str,
    script: str | None,
    message: str,
    cell_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    no_refusals: None,
) -> None:
    """With one warning, and the same results: forward, backward, with lengths, and compiled."""
    program = tmp_path / name
    if script:
        program.write_text(script if script == "\0" else f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("CXX", str(program))
    if script is None:
        monkeypatch.delenv("CXX")
        monkeypatch.setenv("PATH", str(tmp_path))
    module = rnnkern.Recurrent(of_its_own(name), 3, 4)
    x, lengths = torch.randn(5, 2, 3), torch.tensor([5, 3])
    with pytest.warns(rnnkern.FallbackWarning, match=message):
        y, _ = module(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(y, module._torch_forward(x)[0])
        y.sum().backward()
        ragged, h_n = module(x, lengths=lengths)
        torch.testing.assert_close(h_n[0, 1], y[2, 1])
        assert not ragged[3:, 1].any()
        with torch.autocast("cpu", torch.bfloat16):  # as the kernels have it
            assert module(x)[0].dtype == torch.bfloat16
        reset = torch.zeros(5, 2, dtype=torch.bool)
        torch.testing.assert_close(module(x, reset=reset, reset_to=torch.ones(1, 2, 4))[0], y)
        torch._dynamo.reset()
        compiled = torch.compile(module, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(x)[0], y)


def test_a_compiler_that_is_no_command(
    monkeypatch: pytest.MonkeyPatch, cell_cache: Path, no_refusals: None
) -> None:
    monkeypatch.setenv("CXX", "g++ 'half")
    module = rnnkern.Recurrent(of_its_own("no command"), 3, 4)
    with pytest.warns(rnnkern.FallbackWarning, match="CXX is no command: .*No closing quotation"):
        module(torch.randn(5, 2, 3))


def test_precompiled_libraries_need_no_compiler(
    cell_cache: Path,
    tmp_path: Path,
    compiler: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "shipped"
    path, *others = rnnkern.precompile(cells.rnn_tanh, folder=folder)
    assert f"({folder} keeps it)" in capfd.readouterr().err
    assert path.parent == folder
    assert not cell_cache.exists()
    assert compiler() == 1 + len(others)
    monkeypatch.setenv("RNNKERN_CACHE", str(folder))
    monkeypatch.setenv("CXX", "nothing")
    assert take() == path


@pytest.mark.parametrize(
    ("instruction_set", "elements"),
    [
        ("x86-64-v3", ["float"]),
        ("x86-64-v4-vnni", ["float"]),
        ("x86-64-v4-bf16", ["float", "F32ByBf16"]),
        ("x86-64-v4-amx", ["float", "F32ByBf16", "F32By3Bf16"]),
    ],
)
def test_what_float32_needs_is_precompiled(
    instruction_set: str, elements: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of bfloat16, too, where the instruction set has them."""
    monkeypatch.setattr(build, "_compile", lambda mode, source, target, _: target.element.encode())
    given: dict[str, Any] = {"folder": tmp_path, "instruction_set": instruction_set}
    paths = rnnkern.precompile(cells.rnn_tanh, dtypes=torch.float32, **given)
    assert [build.whole(path) for path in paths] == [element.encode() for element in elements]
    assert paths == rnnkern.precompile(cells.rnn_tanh, dtypes=[torch.float32], **given)
    (path,) = rnnkern.precompile(cells.rnn_tanh, dtypes=torch.float64, **given)
    assert build.whole(path) == b"double"


def test_precision_medium_needs_no_compiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_refusals: None
) -> None:
    """The loader asks for the library that `rnnkern.precompile` has written."""
    wanted = CpuTarget("F32ByBf16", "x86-64-v4-bf16")
    monkeypatch.setattr(build, "_compile", lambda mode, source, target, _: target.element.encode())
    rnnkern.precompile(cells.rnn_tanh, folder=tmp_path, instruction_set=wanted.place)
    monkeypatch.setattr(build, "_compile", None)
    monkeypatch.setenv("RNNKERN_CACHE", str(tmp_path))
    assert build.library(cells.rnn_tanh.mode, wanted) == b"F32ByBf16"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtypes": [torch.int8]}, ValueError, "dtypes must be among"),
        ({"dtypes": torch.int8}, ValueError, "dtypes must be among"),
        ({"dtypes": "float32"}, TypeError, "dtypes must be a torch.dtype or a list of them"),
        ({"dtypes": ["float32"]}, ValueError, "dtypes must be among .*got float32"),
        ({"dtypes": None}, TypeError, "a list of them, got None"),
        ({"instruction_set": "mmx"}, ValueError, "instruction_set must be one of"),
        ({"cell": len}, TypeError, "takes cells of rnnkern.cell, got builtin"),
    ],
    ids=["dtype", "one-dtype", "text", "texts", "none", "instruction-set", "cell"],
)
def test_what_cannot_be_precompiled(
    options: dict[str, Any], error: type[Exception], message: str, cell_cache: Path
) -> None:
    given = options.pop("cell", cells.rnn_tanh)
    with pytest.raises(error, match=message):
        rnnkern.precompile(given, **options)
    assert not cell_cache.exists()


@pytest.mark.parametrize("who", ["nobody", "this process", "another process"])
def test_clear_leaves_what_is_being_written(who: str, cell_cache: Path) -> None:
    """And removes what a process has left that was killed."""
    cell_cache.mkdir(mode=0o700)
    (cell_cache / "lock").touch()
    written = cell_cache / ".tmp1"
    written.touch()
    if who == "nobody":
        assert build.clear() == 0
    elif who == "this process":
        with build._only_process(cell_cache / "some.so"):
            assert build.clear() == 0
    else:
        with build._only_process(cell_cache / "some.so"):
            code = "from rnnkern.own_cells import build; print(build.clear())"
            run = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
        assert run.stdout == "0\n"
    assert written.exists() == (who != "nobody")


def test_precompile_knows_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", lambda *_: b"library")
    monkeypatch.setenv("HOME", str(tmp_path))
    (path, *_) = rnnkern.precompile(cells.rnn_tanh, folder="~/cells")
    assert path.parent == tmp_path / "cells"


def test_the_command_clears_the_cache(
    cell_cache: Path, compiler: Callable[[], int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["cache", "clear"]) == 0
    take()
    assert cli.main(["cache", "show"]) == 0
    assert "1 compiled cells" in capsys.readouterr().out
    assert cli.main(["cache", "clear"]) == 0
    assert "1 compiled cells removed" in capsys.readouterr().out
    assert not list(cell_cache.glob("*.so"))
    (cell_cache / "folder.so").mkdir()
    for action in ("show", "clear"):
        assert cli.main(["cache", action]) == 0
        assert "0 compiled cells" in capsys.readouterr().out


def test_other_sources_have_other_names() -> None:
    """The name of a library says what it was made of."""
    source = build.SOURCES[MODE]()
    another = "baseline" if TARGET.place == "x86-64-v3" else "x86-64-v3"
    names = {
        build._name(MODE, source, TARGET),
        build._name(MODE, source + " ", TARGET),
        build._name(MODE, source, CpuTarget("double", TARGET.place)),
        build._name(MODE, source, CpuTarget("float", another)),
    }
    assert len(names) == 4


def test_libraries_that_do_not_fit_are_refused(compiled: bytes, tmp_path: Path) -> None:
    right = tmp_path / "right.so"
    right.write_bytes(compiled)
    with pytest.raises(RuntimeError, match=f"it has {MODE} for float, wanted other for float"):
        kernels.load_library(str(right), "other", "float")
    with pytest.raises(RuntimeError, match=r"wanted .* for double"):
        kernels.load_library(str(right), MODE, "double")
    with pytest.raises(RuntimeError, match="it is not the library of a cell"):
        kernels.load_library(kernels._C.__file__, MODE, "float")
    with pytest.raises(RuntimeError, match="cannot open shared object file"):
        kernels.load_library(str(tmp_path / "nothing"), MODE, "float")


def test_the_cache_is_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RNNKERN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert build.cache_folder() == Path("/somewhere/rnnkern")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path("~/.cache/rnnkern").expanduser()
    assert build.cache_folder().is_absolute()


def test_the_first_call_has_options(
    cell_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_refusals: None
) -> None:
    monkeypatch.setenv("CXX", str(tmp_path / "missing"))
    module = rnnkern.Recurrent(of_its_own("first"), 3, 4, zoneout=0.5)
    kernels.WITHOUT_KERNELS.clear()  # as if the compiler had gone after that
    x = torch.randn(5, 2, 3)
    with pytest.warns(rnnkern.FallbackWarning, match="is no program here"):
        y, h_n = module.eval()(x)
    assert torch.equal(y[-1], h_n[0])
