"""benchmarks/gpu/run_all.sh, rehearsed: with stand-ins for the GPU that hang, die and err, and the
smoke program on the stand-in of tests/simt.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FAKE = Path(__file__).with_name("fake_gpu.py")

pytestmark = pytest.mark.cpu_only

WELL, HANGS, DIES, STICKY = "well", "hangs", "dies", "sticky"
MODES = (WELL, HANGS, DIES, STICKY)
#: Most files that may come back, and their most bytes.
MOST_FILES, MOST_BYTES = 8, 16 << 20

#: Seconds that a step may take where nothing hangs, which are more than any machine needs.
ENOUGH = 600
#: Seconds for what hangs, on a machine that imports pytest in `A_START` seconds.
SHORT = {
    "LIMIT_SMOKE": 2, "LIMIT_ROW": 2, "LIMIT_ROW_OF_PEERS": 2, "LIMIT_SANITIZER": 3,
    "LIMIT_SINGLE_TEST": 3,
}  # fmt: skip
LONG = ("LIMIT_SPEED", "LIMIT_PEERS", "LIMIT_TESTS", "LIMIT_CONCURRENCY")
A_START = 0.2


def slower() -> float:
    """By how much the limits are longer here: the time of an import over `A_START`, at least 1."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import pytest"], check=True)
    return max(1.0, (time.monotonic() - begin) / A_START)


def limits(mode: str) -> dict[str, str]:
    """The rehearsal waits for the whole of a limit only where a program hangs."""
    seconds: dict[str, float] = dict.fromkeys((*LONG, *SHORT), ENOUGH)
    if mode == HANGS:
        times = slower()
        seconds |= {name: limit * times for name, limit in SHORT.items()}
    return {name: str(limit) for name, limit in seconds.items()} | {"LIMIT_GRACE": "0.2"}


TESTS = """
import os, signal, sys, time, types, pytest

def test_before(): pass
def test_that_fails(): assert 1 == 2
def test_of_the_gpu():
    mode = os.environ["FAKE_GPU"]
    if mode == "hangs":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(600)
    if mode == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if mode == "sticky":
        def synchronize(): raise RuntimeError("CUDA error: misaligned address")
        cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=synchronize)
        sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
        raise RuntimeError("CUDA error: misaligned address")
def test_behind(): pass
@pytest.mark.skip
def test_skipped(): pass
"""


class Rehearsal:
    """A folder with the stand-ins, and the runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.out = folder / "out"
        programs = folder / "programs"
        programs.mkdir()
        text = FAKE.read_text(encoding="utf-8")
        for name in ("nvidia-smi", "nvcc", "compute-sanitizer", "python3"):
            (programs / name).write_text(f"#!{sys.executable}\n{text}", encoding="utf-8")
            (programs / name).chmod(0o755)
        (folder / "test_fake.py").write_text(TESTS, encoding="utf-8")
        self.env = os.environ | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHON": str(programs / "python3"),
            "OUT": str(self.out),
            "WORK": str(folder / "work"),
            "FAKE_TESTS": str(folder / "test_fake.py"),
            "JOBS": "3",
            "TESTS": "test_cells test_memory test_threads",
        }

    def run(self, *arguments: str, mode: str = WELL, **env: str) -> dict[str, Any]:
        """The summary; the run itself must end within the limits of its steps."""
        command = [sys.executable, str(ROOT / "benchmarks/gpu/run_all.py"), *arguments]
        done = subprocess.run(
            command, env=self.env | limits(mode) | {"FAKE_GPU": mode} | env, capture_output=True,
            text=True, timeout=3 * ENOUGH, cwd=self.folder, check=False,
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        summary = json.loads((self.out / "summary.json").read_text(encoding="utf-8"))
        statuses = {name: step["status"] for name, step in summary["steps"].items()}
        assert done.returncode == any(status != "ok" for status in statuses.values())
        assert all(name in done.stdout for name in statuses)
        files = list(self.out.iterdir())
        assert len(files) <= MOST_FILES
        assert all(file.stat().st_size <= MOST_BYTES for file in files)
        return {"statuses": statuses, "notes": summary["notes"], "printed": done.stdout}

    def lines(self, name: str) -> list[dict[str, Any]]:
        text = (self.out / name).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def rehearsal(tmp_path: Path) -> Rehearsal:
    return Rehearsal(tmp_path)


ENDS = {
    WELL: "ok",
    HANGS: "out of time",
    DIES: "ended by signal 11",
    STICKY: "failed with 1",
}


@pytest.mark.parametrize("mode", MODES)
def test_the_first_part(rehearsal: Rehearsal, mode: str) -> None:
    found = rehearsal.run("first", mode=mode)
    statuses = found["statuses"]
    assert statuses["smoke h256"] == ENDS[mode]
    others = {name: status for name, status in statuses.items() if name not in ("smoke h256",)}
    assert set(others.values()) == {"ok"}, others
    assert len([name for name in statuses if name.startswith("smoke ")]) == 9
    # What was found before the fault is there, and what the steps behind it have found.
    smoke = rehearsal.lines("smoke.jsonl")
    assert len(smoke) == 18 - (mode != WELL)
    assert sum(line["shape"] == "h256_float32" for line in smoke) == 2
    header, *rows = rehearsal.lines("speed.jsonl")
    assert header == {"device": "a fake"}
    assert [row["row"] for row in rows] == [0, 1, 2, 3]
    reasons = [row.get("failed") for row in rows]
    assert reasons[:2] == [None] * 2
    assert reasons[3] is None
    assert {
        WELL: "an illegal memory access",  # a row that merely fails
        HANGS: "the process of this row failed with 1",
        DIES: "the process of this row ended by signal 11",
        STICKY: "an illegal memory access",
    }[mode] == reasons[2]
    assert "speed: 3 rows measured, failed: [2]" in found["notes"]
    with tarfile.open(rehearsal.out / "site.tar.gz") as archive:
        names = archive.getnames()
    assert "site/rnnkern/_C.so" in names
    assert {"bin/smoke-Lstm-Bf16", "bin/smoke-Lstm-Bf16-values"} <= set(names)
    assert json.loads((rehearsal.out / "env.json").read_text())["gpu"]["name"] == "A fake"


@pytest.mark.parametrize("mode", MODES)
def test_the_second_part(rehearsal: Rehearsal, mode: str) -> None:
    rehearsal.run("pack")
    site = rehearsal.folder / "site.tar.gz"
    (rehearsal.out / "site.tar.gz").rename(site)
    found = rehearsal.run("second", mode=mode, SITE=str(site), FAKE_PIP="fails")
    statuses = found["statuses"]
    assert statuses["build package"] == "ok"
    assert [name for name in statuses if name.startswith("build")] == ["build package"]
    assert statuses["tests"] == statuses["concurrency"] == "failed"  # one test always fails
    assert list(statuses).index("concurrency") == list(statuses).index("tests") + 1
    for name, status in statuses.items():
        if name.startswith("racecheck"):
            assert status == ENDS[mode]
        if name.startswith(("memcheck", "initcheck", "synccheck", "peers")):
            assert status == "ok", name

    journal = rehearsal.lines("tests.jsonl")
    units = {line["unit"] for line in journal}
    assert units == {  # test_memory has no test for a GPU, and test_threads runs alone
        "test_cells", "test_cells, stepwise", "test_cells, own products",
        "test_threads, concurrency",
    }  # fmt: skip
    for unit in units:
        ends = {
            line["test"].partition("::")[2]: line["outcome"]
            for line in journal
            if line["unit"] == unit and "outcome" in line
        }
        assert ends == {
            "test_before": "passed",
            "test_that_fails": "failed",
            "test_of_the_gpu": {WELL: "passed", STICKY: "failed"}.get(mode, "died"),
            "test_behind": "passed",
            "test_skipped": "skipped",
        }, unit
    sticky = [line["sticky"] for line in journal if "sticky" in line]
    assert sticky == ["CUDA error: misaligned address"] * (len(units) if mode == STICKY else 0)
    if mode == HANGS:
        log = (rehearsal.folder / "work/tests-test_cells.log").read_text(encoding="utf-8")
        assert "in test_of_the_gpu" in log  # where it hangs
    begun = [(line["unit"], line["begins"]) for line in journal if "begins" in line]
    assert len(begun) == len(set(begun)) == 5 * len(units)  # nothing has run twice
    assert "failed: test_fake.py::test_that_fails" in found["printed"]


def test_builds_that_fail(rehearsal: Rehearsal) -> None:
    found = rehearsal.run("first", FAKE_NVCC="smoke-Gru-Bf16", FAKE_PIP="fails")
    statuses = found["statuses"]
    assert statuses["build smoke-Gru-Bf16"] == statuses["build package"] == "failed with 1"
    assert statuses["smoke gru768"] == "not run: no smoke-Gru-Bf16"
    assert statuses["speed"] == statuses["pack"] == "not run: no package"
    assert statuses["smoke flash768"] == statuses["constants"] == "ok"
    log = (rehearsal.out / "log.txt").read_text(encoding="utf-8")
    assert "error: expected a ';'" in log
    assert "error: no wheel could be built" in log


def test_the_time_of_a_part(rehearsal: Rehearsal) -> None:
    """What is left of it limits each step, and what has no time left does not run."""
    part = str(10 * slower())
    found = rehearsal.run("smoke", mode=HANGS, SECONDS_OF_PART=part, LIMIT_SMOKE=str(ENOUGH))
    statuses = found["statuses"]
    assert statuses["smoke h256"] == "out of time"
    assert statuses["smoke h256_float32"] == "not run: no time is left"


def test_unknown_steps_are_refused(rehearsal: Rehearsal) -> None:
    command = ["sh", str(ROOT / "benchmarks/gpu/run_all.sh"), "third"]
    env = rehearsal.env | {"PYTHON": sys.executable}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "first | second" in done.stdout


# ---- The smoke program ----

SOURCES = ("benchmarks/gpu/smoke.cu", "csrc/cuda/scan.cu", "csrc/cuda/product.cu",
           "csrc/cuda/plan.cpp", "tests/simt/library.cpp")  # fmt: skip


@pytest.fixture(scope="module", params=["flags", "values"])
def smoke(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smoke program of one cell and type, on the stand-in for a GPU, with each exchange."""
    folder = tmp_path_factory.mktemp("smoke")
    options = ["-std=c++20", "-O1", "-Wno-unknown-pragmas", "-DRNNKERN_SIMT", "-ffp-contract=fast"]
    options += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'tests/simt'}", "-x", "c++"]
    options += ["-DRNNKERN_ELEMENT=Bf16", "-DRNNKERN_CELL=Lstm"]
    options += ["-DRNNKERN_CUDA_BY_VALUE"] * (request.param == "values")
    objects = [folder / f"{Path(source).name}.o" for source in SOURCES]

    def compiled(source: str, to: Path) -> None:
        own = [] if "library" in source else ["-DRNNKERN_NAMESPACE=gpu"]
        command = ["g++", *options, *own, "-c", str(ROOT / source), "-o", str(to)]
        subprocess.run(command, check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compiled, SOURCES, objects))
    program = folder / "smoke"
    subprocess.run(["g++", *map(str, objects), "-pthread", "-o", str(program)], check=True)
    return program


def smoked(program: Path, folder: Path, **env: str) -> tuple[int, list[dict[str, Any]]]:
    results = folder / "smoke.jsonl"
    results.unlink(missing_ok=True)
    command = [str(program), str(results), "small", "12", "5", "9", "40"]
    done = subprocess.run(command, env=os.environ | env, timeout=ENOUGH, check=False)
    lines = results.read_text(encoding="utf-8").splitlines()
    return done.returncode, [json.loads(line) for line in lines]


def test_the_smoke_program_finds_it_right(smoke: Path, tmp_path: Path) -> None:
    status, lines = smoked(smoke, tmp_path)
    assert status == 0
    assert [line["tier"] for line in lines] == ["resident"] * 2 + ["stepwise"] * 2
    for line in lines:
        assert (line["cell"], line["dtype"], line["T"], line["H"]) == ("LSTM", "bfloat16", 12, 40)
    for checked in lines[::2]:
        assert checked["first_steps"]["right"]
        assert checked["forward_plan"].startswith(checked["tier"])
    for timed in lines[1::2]:
        assert timed["same_bits"]["right"]
        assert timed["first_outputs"]["right"]
        assert timed["forward_us_per_step"] > 0
        assert timed["scan_backward_us_per_step"] > 0
    assert lines[3]["tiers_agree"]["right"]


def test_the_smoke_program_finds_it_wrong(smoke: Path, tmp_path: Path) -> None:
    """Without a wait between the steps the states are those of steps before."""
    text = (ROOT / "csrc/cuda/resident.cuh").read_text(encoding="utf-8").splitlines()
    place = next(i for i, line in enumerate(text, 1) if line.lstrip().startswith("wait_until("))
    status, lines = smoked(smoke, tmp_path, RNNKERN_SIMT_WITHOUT=f"resident.cuh:{place}")
    assert status == 1
    assert not lines[0]["first_steps"]["right"]
    assert lines[2]["first_steps"]["right"]  # the other tier has no such wait


def test_the_smoke_program_goes_on_after_an_error(smoke: Path, tmp_path: Path) -> None:
    status, lines = smoked(smoke, tmp_path, RNNKERN_SIMT_FAILS="resident backward")
    assert status == 1
    assert "as a test wants it" in lines[0]["failed"]
    assert lines[1]["first_steps"]["right"]
