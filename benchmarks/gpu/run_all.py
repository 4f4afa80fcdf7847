"""Everything that wants a GPU, in two parts of at most five minutes each: see README.md here.

    benchmarks/gpu/run_all.sh first
    SITE=site.tar.gz benchmarks/gpu/run_all.sh second

Names of single steps run those alone. Each thing that is built, measured or tested is a process of
its own with a time limit. What it finds is in a file in the folder OUT before the next one starts.
"""

from __future__ import annotations

import datetime
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from threading import Thread
from time import monotonic, sleep
from typing import Any, ClassVar

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OUT = Path(os.environ.get("OUT") or ROOT / "build/gpu").resolve()
WORK = Path(os.environ.get("WORK") or ROOT / "build/gpu-work").resolve()
PYTHON = os.environ.get("PYTHON", sys.executable)
SITE, SOURCE, WHEELS, BIN = (WORK / name for name in ("site", "source", "wheels", "bin"))

OK, OUT_OF_TIME = "ok", "out of time"
PART_SECONDS = 290  # of each part, with what is still left to write
LARGEST_FILE = 16 << 20  # of what is carried from one part to the other

#: Most seconds of a step: LIMIT_SPEED=580 is another one. What is left of the part is a limit too.
#: "grace" is from the interruption of a process to its end.
LIMITS = {
    "env": 20, "constants": 65, "smoke": 60, "speed": 250, "sweeps": 120, "compare": 60,
    "tests": 170, "concurrency": 40, "sanitizer": 20, "peers": 120, "pack": 30,
    "build of the package": 200, "build of a program": 150,
    "process of tests": 40, "single test": 30, "row": 25, "row of peers": 60, "grace": 4,
}  # fmt: skip


def limit(name: str) -> float:
    """The most seconds of a step."""
    return float(os.environ.get(f"LIMIT_{name.upper().replace(' ', '_')}", LIMITS[name]))


@dataclass(frozen=True)
class Shape:
    """One run of the smoke program. ``element`` and ``cell`` are the names that C++ has."""

    name: str
    cell: str
    element: str
    sizes: tuple[int, int, int, int]  # T, N, I, H
    tf32: bool = False
    by_value: bool = False  # kExchangesByValue of csrc/cuda/plan.h

    @property
    def program(self) -> str:
        return f"smoke-{self.cell}-{self.element}{'-values' * self.by_value}"

    def command(self, results: Path) -> list[str]:
        sizes = map(str, self.sizes)
        return [str(BIN / self.program), str(results), self.name, *sizes, *["tf32"] * self.tf32]


SHAPES = (
    Shape("flash768", "Lstm", "Bf16", (1024, 16, 768, 768)),
    Shape("gru768", "Gru", "Bf16", (1024, 16, 768, 768)),
    Shape("h256", "Lstm", "Bf16", (512, 16, 256, 256)),
    Shape("h1024", "Lstm", "Bf16", (256, 64, 1024, 1024)),
    *(
        Shape(f"{name}_by_value", "Lstm", "Bf16", sizes, by_value=True)
        for name, sizes in (
            ("flash768", (1024, 16, 768, 768)),
            ("h256", (512, 16, 256, 256)),
            ("h1024", (256, 64, 1024, 1024)),
        )
    ),
    Shape("h256_tf32", "Lstm", "float", (512, 64, 256, 256), tf32=True),
    Shape("h256_float32", "Lstm", "float", (512, 64, 256, 256)),
)
PROGRAMS = tuple(dict.fromkeys(shape.program for shape in SHAPES))

#: Several tiles, blocks and chunks, none of them whole; and few enough for the sanitizers.
SANITIZED = tuple(
    Shape(f"small_{shape.name}", shape.cell, shape.element, (5, 11, 20, 70), shape.tf32)
    for shape in SHAPES
    if shape.name in ("flash768", "gru768", "h256_tf32", "h256_float32")
)
SANITIZERS = ("memcheck", "racecheck", "synccheck", "initcheck")

#: The tests that say most come first.
FIRST_TESTS = ("test_cells", "test_sequences", "test_cuda", "test_numerics", "test_autograd")
CONCURRENT_TESTS = "threads or streams or side_stream"


# ---- Processes ----


def status_of(returncode: int) -> str:
    """What an exit status means."""
    if returncode == 0:
        return OK
    return f"failed with {returncode}" if returncode > 0 else f"ended by signal {-returncode}"


class Process:
    """A command with a time limit, in a process group of its own; its output goes to a file."""

    all: ClassVar[list[Process]] = []

    def __init__(
        self,
        command: Iterable[str],
        log: Path,
        seconds: float,
        *,
        env: dict[str, str] | None = None,
        cwd: Path = WORK,
        nice: int = 0,
    ) -> None:
        self.status: str | None = None
        self.started = self.ended = monotonic()
        command = [*(["nice", f"-n{nice}"] if nice else []), *command]
        with log.open("ab") as file:
            file.write(f"\n$ {' '.join(command)}\n".encode())
            file.flush()
            try:
                self.popen = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=cwd,
                    env=os.environ | environment() | (env or {}),
                    start_new_session=True,
                )
            except OSError as error:
                self.status = f"cannot start: {error}"
                return
        self.watch = Thread(target=self._see_to_its_end, args=(max(1, seconds),), daemon=True)
        self.watch.start()
        Process.all.append(self)

    def wait(self) -> str:
        """How it has ended, once it has."""
        while self.status is None:
            self.watch.join(0.5)
        return self.status

    def stop(self) -> None:
        """Interrupts it, so that it may write what it has, and then kills it."""
        for number in (signal.SIGINT, signal.SIGKILL):
            self._signal_group(number)
            with suppress(subprocess.TimeoutExpired):
                self.popen.wait(limit("grace"))
                return
        # It cannot be ended: the driver holds it. The run goes on without waiting.

    def _see_to_its_end(self, seconds: float) -> None:
        try:
            status = status_of(self.popen.wait(seconds))
        except subprocess.TimeoutExpired:
            self.stop()
            status = OUT_OF_TIME
        self._signal_group(signal.SIGKILL)  # what it has left running
        self.ended = monotonic()
        self.status = status

    def _signal_group(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)


def environment() -> dict[str, str]:
    """What every process has in its environment."""
    paths = [str(path) for path in (SITE, SOURCE / "tools", SOURCE / "benchmarks/gpu", WHEELS)]
    spec = importlib.util.find_spec("nvidia")
    libraries = [
        str(folder)
        for root in (spec.submodule_search_locations or [] if spec else [])
        for folder in Path(root).glob("*/lib")
        if any(folder.glob("libcublas.so.*"))
    ]

    def before(variable: str, folders: list[str]) -> str:
        found = os.environ.get(variable)  # an empty entry would be the current folder
        return os.pathsep.join([*folders, *([found] if found else [])])

    return {
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": before("PATH", [str(WHEELS / "bin")]),
        "LD_LIBRARY_PATH": before("LD_LIBRARY_PATH", libraries),
    }


# ---- The run ----


@dataclass
class Build:
    """A command in the background, on which steps wait."""

    name: str
    process: Process


@dataclass
class Run:
    """The files of a run, its time, and what has become of its steps."""

    seconds: float
    started: float = field(default_factory=monotonic)
    steps: dict[str, dict[str, Any]] = field(default_factory=dict)
    builds: dict[str, Build] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def log(self) -> Path:
        return OUT / "log.txt"

    def at(self) -> float:
        return monotonic() - self.started

    def left(self) -> float:
        return self.seconds - self.at()

    def time_for(self, name: str) -> float:
        return min(limit(name), self.left())

    def say(self, text: str) -> None:
        print(text, flush=True)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(text + "\n")

    def record(self, name: str, status: str, began: float, ended: float | None = None) -> str:
        """Writes down how a step has ended."""
        took = (ended or monotonic()) - began
        self.steps[name] = {"status": status, "seconds": round(took, 1)}
        self.say(f"==== {name}: {status}, {took:.1f} s, at {self.at():.0f} s")
        summary = {"seconds": round(self.at(), 1), "steps": self.steps, "notes": self.notes}
        (OUT / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
        return status

    def execute(self, name: str, command: Iterable[str], seconds: float) -> str:
        """Runs a command as a step."""
        self.say(f"\n==== {name}, at most {seconds:.0f} s")
        began = monotonic()
        return self.record(name, Process(command, self.log, seconds).wait(), began)

    def build(self, name: str) -> None:
        """Begins to build what has that name, unless it is there or being built."""
        if name in self.builds:
            return
        if name in carried():
            self.build("package")
            self.builds[name] = self.builds["package"]
            return
        log = WORK / f"{name}.log"
        log.unlink(missing_ok=True)
        if name == "package":
            process = build_package(log, self.time_for("build of the package"))
        else:
            process = build_program(name, log, self.time_for("build of a program"))
        self.builds[name] = Build(name, process)

    def built(self, name: str) -> str | None:
        """How a build has ended, or None while it goes on."""
        name, process = self.builds[name].name, self.builds[name].process
        if process.status is not None and f"build {name}" not in self.steps:
            text = (WORK / f"{name}.log").read_text(encoding="utf-8", errors="replace")
            with self.log.open("a", encoding="utf-8") as file:
                file.write(text if process.status == OK else text[-8000:])
            self.record(f"build {name}", process.status, process.started, process.ended)
        return process.status


@lru_cache
def carried() -> frozenset[str]:
    """The programs in the file that SITE names, which come with the package."""
    if not os.environ.get("SITE"):
        return frozenset()
    with tarfile.open(os.environ["SITE"]) as archive:
        paths = map(Path, archive.getnames())
        return frozenset(path.name for path in paths if path.parent.name == BIN.name)


@lru_cache
def architecture() -> str:
    """ "90a" for compute capability 9.0: only with the letter are there wgmma and the like."""
    found = os.environ.get("ARCH")
    if not found:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = (lines_of(*query) or ["9.0"])[0].replace(".", "").strip()
    return found + "a" if found in ("90", "100", "103", "120") else found


def build_program(name: str, log: Path, seconds: float) -> Process:
    """The measurements of constants.cu, or the smoke program of one cell and type."""
    arch = architecture()
    command = ["nvcc", "-std=c++20", "-O3", "-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    command += ["-o", str(BIN / name)]
    if name == "constants":
        return Process([*command, str(HERE / "constants.cu")], log, seconds)
    _, cell, element, *values = name.split("-")
    kernels = ("scan.cu", "product.cu", "probe.cu", "plan.cpp", "library.cpp", "runtime.cpp")
    command += [
        "-ftz=true", "--expt-relaxed-constexpr", "-diag-suppress=1675", f"-I{ROOT / 'csrc'}",
        "-DRNNKERN_NAMESPACE=gpu", f"-DRNNKERN_CELL={cell}", f"-DRNNKERN_ELEMENT={element}",
        f'-DRNNKERN_CUDA_ARCHITECTURES="sm_{arch}"', "--threads", "0",
        *["-DRNNKERN_CUDA_BY_VALUE"] * len(values),
        str(HERE / "smoke.cu"), *(str(ROOT / "csrc/cuda" / kernel) for kernel in kernels), "-ldl",
    ]  # fmt: skip
    return Process(command, log, seconds)


def build_package(log: Path, seconds: float) -> Process:
    """The package for this GPU alone; or that of an earlier part, which SITE names.

    It is built from a copy, because the build writes among the sources. The tests run in that copy,
    which then loses its folder `rnnkern`: that would come before the installed package.
    """
    shutil.rmtree(SOURCE, ignore_errors=True)
    skipped = shutil.ignore_patterns(".*", "build", "dist", "_C*.so", "__pycache__", "shared")
    shutil.copytree(ROOT, SOURCE, ignore=skipped)
    without = f"{PYTHON} -m rnnkern info && rm -r {SOURCE / 'rnnkern'}"
    pip = f"{PYTHON} -m pip --disable-pip-version-check install --no-index --no-deps --upgrade"
    if os.environ.get("WHEELS"):
        wheels = f"{pip} --quiet --target {WHEELS} {Path(os.environ['WHEELS']).resolve()}/*.whl"
        without = f"{without}; {wheels} || echo no wheels"
    if os.environ.get("SITE"):
        site = Path(os.environ["SITE"]).resolve()
        return Process(["sh", "-c", f"tar -xf {site} && {without}"], log, seconds)
    shutil.rmtree(SITE, ignore_errors=True)
    # Some cores are left to the programs that the first steps need, and to the measurements.
    jobs = str(max(1, (os.cpu_count() or 2) - 4))
    return Process(
        ["sh", "-c", f"{pip} --no-build-isolation --target {SITE} {SOURCE} && {without}"],
        log,
        seconds,
        nice=10,
        env={
            "RNNKERN_CUDA": "ON",
            "RNNKERN_INSTRUCTION_SETS": "native",
            "CUDAARCHS": f"{architecture()}-real",
            "CMAKE_BUILD_PARALLEL_LEVEL": jobs,
        },
    )


# ---- Steps ----


def lines_of(*command: str) -> list[str]:
    """What a command prints, or why it does not."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=5, stdin=subprocess.DEVNULL
        )
        return done.stdout.strip().splitlines()
    except (OSError, subprocess.SubprocessError) as error:
        print(error, file=sys.stderr)
        return []


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def env(run: Run) -> None:
    """The GPU, versions and the commit."""
    began = monotonic()
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,clocks.max.sm,power.limit"
    gpu = lines_of("nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader")
    git = ("git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    commit = os.environ.get("COMMIT") or "".join(lines_of(*git)[:1])
    os.environ["COMMIT"] = commit
    packages = (
        "torch", "triton", "numpy", "pybind11", "setuptools", "cmake", "ninja", "pytest",
        "hypothesis", "nvidia-cudnn-cu13", "nvidia-cublas", "torchrl",
    )  # fmt: skip
    found = {
        "commit": commit or None,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "gpu": dict(zip(query.split(","), (gpu or [""])[0].split(", "), strict=False)),
        "nvcc": lines_of("nvcc", "--version")[-2:],
        "compiler": lines_of("g++", "--version")[:1],
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
    }
    text = json.dumps(found, indent=1)
    (OUT / "env.json").write_text(text, encoding="utf-8")
    run.say(text)
    run.record("env", OK if gpu else "no GPU answers", began)


def smoke(run: Run, shape: Shape) -> None:
    """Right, and microseconds a step, on each tier."""
    name = f"smoke {shape.name}"
    run.execute(name, shape.command(OUT / "smoke.jsonl"), run.time_for("smoke"))


def constants(run: Run) -> None:
    """What the plan of the kernels is computed from."""
    command = [str(BIN / "constants"), str(OUT / "constants.json")]
    run.execute("constants", command, run.time_for("constants"))


def measure(run: Run, name: str, *options: str, row_limit: str = "row") -> None:
    """Rows of speed.py. A process that a row has ended is followed by one behind that row."""
    file = OUT / f"{name}.jsonl"
    began = monotonic()
    end = began + run.time_for(name) - limit("grace") * 2
    row, status = 0, OUT_OF_TIME
    run.say(f"\n==== {name}, at most {end - began:.0f} s")
    while end - monotonic() > 1:
        left = end - monotonic()
        command = [PYTHON, str(HERE / "speed.py"), str(file), *options, "--from-row", str(row)]
        command += ["--seconds", f"{left:.0f}", "--row-seconds", f"{limit(row_limit):g}"]
        status = Process(command, run.log, left + limit("grace")).wait()
        done = [entry["row"] for entry in entries(file) if "row" in entry]
        if status in (OK, OUT_OF_TIME) or not entries(file):
            break
        row = max([row, *(number + 1 for number in done)])
        # The exit status 70 says that the last row is written, and has left a sticky error.
        if status != "failed with 70":
            append(file, {"row": row, "failed": f"the process of this row {status}"})
            row += 1
    failed = [entry["row"] for entry in entries(file) if "row" in entry and "failed" in entry]
    count = sum("us" in entry for entry in entries(file))
    run.notes.append(f"{name}: {count} rows measured, failed: {failed or 'none'}")
    run.record(name, status, began)


def speed(run: Run) -> None:
    """rnnkern beside torch.nn."""
    measure(run, "speed", "--dtype", "bfloat16", "--dtype", "tf32", "--dtype", "float32",
            "--cell", "GRU", "--cell", "LSTM")  # fmt: skip


def sweeps(run: Run) -> None:
    """The same over H and T."""
    measure(run, "sweeps", "--sweeps")


def peers(run: Run) -> None:
    """Those whose wheels are in WHEELS. They compile at their first call."""
    measure(run, "peers", "--peers", "--workload", "flash768", "--workload", "rl",
            "--dtype", "bfloat16", "--dtype", "float32", row_limit="row of peers")  # fmt: skip


def compare(run: Run) -> None:
    """`rnnkern compare` as users run it."""
    command = [PYTHON, "-m", "rnnkern", "compare", "--device", "cuda", "--quick"]
    command += ["--json", str(OUT / "compare.json")]
    run.execute("compare", command, run.time_for("compare"))


def pack(run: Run) -> None:
    """The installed package and the smoke programs, which the second part uses."""
    began = monotonic()
    file = OUT / "site.tar.gz"
    for names in ((SITE, BIN), (SITE,)):
        with tarfile.open(file, "w:gz", compresslevel=6) as archive:
            for folder in names:
                archive.add(folder, folder.name, filter=without_caches)
        if file.stat().st_size <= LARGEST_FILE:
            break
    size = file.stat().st_size
    run.notes.append(f"site.tar.gz has {size / 2**20:.1f} MiB")
    run.record("pack", OK if size <= LARGEST_FILE else "too large to be carried", began)


def without_caches(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in entry.name else entry


def entries(file: Path) -> list[dict[str, Any]]:
    """The lines of JSON of a file; a last one that is not whole is left out."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(file: Path, entry: dict[str, Any]) -> None:
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(entry) + "\n")


@dataclass(frozen=True)
class Unit:
    """Tests that share processes: one at a time, one after the other until all have run."""

    name: str
    arguments: tuple[str, ...]
    env: tuple[tuple[str, str], ...] = ()


def test_files() -> dict[str, Path]:
    """All of them, or those that TESTS names."""
    files = {path.stem: path for path in sorted((SOURCE / "tests").glob("test_*.py"))}
    chosen = os.environ.get("TESTS", "").split() or files
    return {name: path for name, path in files.items() if name in chosen}


def test_units() -> list[Unit]:
    """A file each; some again on the stepwise tier, and with products of our own."""
    files = test_files()
    whole_file_on_cpu = [
        name
        for name, path in files.items()
        if any(
            line.startswith("pytestmark") and "cpu_only" in line
            for line in path.read_text(encoding="utf-8").splitlines()
        )
    ]
    names = [name for name in FIRST_TESTS if name in files]
    names += [name for name in files if name not in names and name not in whole_file_on_cpu]
    rest = ("-k", f"not ({CONCURRENT_TESTS})")
    units = [Unit(name, (f"tests/{name}.py", *rest)) for name in names if name != "test_threads"]
    again = [
        Unit(f"{name}, {label}", (f"tests/{name}.py", "-k", some), (setting,))
        for label, setting, some in (
            ("stepwise", ("RNNKERN_CUDA_TIER", "stepwise"), "float32 or LSTM"),
            ("own products", ("RNNKERN_CUBLAS", "0"), "random or mixed or Cell"),
        )
        for name in ("test_cells", "test_sequences")
        if name in files
    ]
    first = len([name for name in FIRST_TESTS if name in files])
    return units[:first] + again + units[first:]


def run_unit(unit: Unit, journal: Path, end: float) -> None:
    """Processes of a unit until all of its tests have begun or the time is over."""
    log = WORK / f"tests-{unit.name.replace(', ', '-').replace(' ', '-')}.log"
    log.unlink(missing_ok=True)
    command = [PYTHON, "-m", "pytest", *unit.arguments, "-m", "cuda", "-q", "--tb=short"]
    command += ["-p", "loaded_from", "-p", "journal", "-p", "no:cacheprovider"]
    while (left := end - monotonic()) > 1:
        before = len(lines_of_unit(unit, journal))
        env = {
            "RNNKERN_LOADED_FROM": str(SITE),
            "RNNKERN_JOURNAL": str(journal),
            "RNNKERN_JOURNAL_UNIT": unit.name,
            "RNNKERN_JOURNAL_SECONDS": f"{min(limit('process of tests'), left):g}",
            "RNNKERN_JOURNAL_TEST_SECONDS": f"{limit('single test'):g}",
        } | dict(unit.env)
        status = Process(command, log, left + limit("grace"), cwd=SOURCE, env=env).wait()
        lines = lines_of_unit(unit, journal)
        ended = {entry.get("test") for entry in lines}
        died = [e["begins"] for e in lines if "begins" in e and e["begins"] not in ended]
        for test in died:
            what = "took too long" if status == "failed with 1" else f"the process {status}"
            append(journal, {"unit": unit.name, "test": test, "outcome": "died", "message": what})
        if status in (OK, "failed with 1", "failed with 5") and not died:
            return  # 1: tests have failed; 5: none was left
        if len(lines) == before:  # pytest itself has failed, and would again
            text = log.read_text(encoding="utf-8", errors="replace")[-400:]
            append(journal, {"unit": unit.name, "outcome": "no tests", "message": text})
            return


def lines_of_unit(unit: Unit, journal: Path) -> list[dict[str, Any]]:
    return [entry for entry in entries(journal) if entry["unit"] == unit.name]


def run_units(run: Run, name: str, units: list[Unit], jobs: int) -> None:
    """Units side by side, and what became of their tests."""
    began = monotonic()
    end = began + run.time_for(name) - limit("grace") * 2
    run.say(f"\n==== {name}, at most {end - began:.0f} s")
    journal = OUT / "tests.jsonl"
    journal.touch()
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda unit: run_unit(unit, journal, end), units))
    mine = {unit.name for unit in units}
    found = [e for e in entries(journal) if e["unit"] in mine and "outcome" in e]
    counts = Counter(entry["outcome"] for entry in found)
    never = sorted(mine - {entry["unit"] for entry in entries(journal)})
    for entry in found:
        if entry["outcome"] not in ("passed", "skipped"):
            what = entry.get("test", entry["unit"])
            run.say(f"{entry['outcome']}: {what}: {entry.get('message', '')[:160]!r}")
    text = ", ".join(f"{count} {outcome}" for outcome, count in counts.items()) or "no tests"
    if never:
        text += f"; nothing of {', '.join(never)}"
    run.notes.append(f"{name}: {text}")
    bad = set(counts) - {"passed", "skipped"}
    late = monotonic() > end
    run.record(name, OUT_OF_TIME if late else "failed" if bad else OK, began)


def tests(run: Run) -> None:
    """The suite on the GPU, in short processes."""
    run_units(run, "tests", test_units(), int(os.environ.get("JOBS", "6")))


def concurrency(run: Run) -> None:
    """Tests of several threads and streams, with the GPU to themselves."""
    units = [
        Unit(f"{name}, concurrency", (f"tests/{name}.py", "-k", CONCURRENT_TESTS))
        for name in ("test_cuda", "test_threads")
        if name in test_files()
    ]
    run_units(run, "concurrency", units, 1)


def sanitizer(run: Run, tool: str, shape: Shape) -> None:
    """compute-sanitizer on our kernels in a smoke program."""
    command = ["compute-sanitizer", "--tool", tool, "--kernel-name", "kns=rnnkern"]
    command += ["--error-exitcode", "9", *shape.command(OUT / "sanitizer.jsonl")]
    run.execute(f"{tool} {shape.name}", command, run.time_for("sanitizer"))


@dataclass(frozen=True)
class Step:
    """Something to run, the builds that it needs, and those that it only waits for."""

    name: str
    work: Callable[[Run], object]
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()


def sanitizer_steps() -> list[Step]:
    return [
        Step(f"{tool} {shape.name}", lambda run, t=tool, s=shape: sanitizer(run, t, s),  # type: ignore[misc]
             (shape.program,))
        for tool in SANITIZERS
        for shape in SANITIZED
    ]  # fmt: skip


STEPS: dict[str, list[Step]] = {
    "env": [Step("env", env)],
    "smoke": [
        Step(f"smoke {shape.name}", lambda run, s=shape: smoke(run, s), (shape.program,))  # type: ignore[misc]
        for shape in SHAPES
    ],
    "constants": [Step("constants", constants, ("constants",))],
    "speed": [Step("speed", speed, ("package",))],
    "pack": [Step("pack", pack, ("package",), after=PROGRAMS)],
    "tests": [Step("tests", tests, ("package",))],
    "concurrency": [Step("concurrency", concurrency, ("package",))],
    "sanitizer": sanitizer_steps(),
    "peers": [Step("peers", peers, ("package",))],
    "sweeps": [Step("sweeps", sweeps, ("package",))],
    "compare": [Step("compare", compare, ("package",))],
}
PARTS = {
    "first": ("env", "smoke", "constants", "pack", "speed"),
    "second": ("env", "tests", "concurrency", "sanitizer", "peers"),
}


def perform(run: Run, steps: list[Step]) -> None:
    """The steps one after the other: of those whose builds have ended, the first."""
    for step in steps:
        for need in step.needs + step.after:
            run.build(need)
    while steps:
        ready = next((s for s in steps if all(run.built(need) for need in s.needs + s.after)), None)
        if ready is None:
            sleep(0.05)
            continue
        steps.remove(ready)
        broken = [need for need in ready.needs if run.built(need) != OK]
        if broken:
            run.record(ready.name, f"not run: no {', '.join(broken)}", monotonic())
        elif run.left() < 2:
            run.record(ready.name, "not run: no time is left", monotonic())
        else:
            try:
                ready.work(run)
            except Exception as error:  # one step's fault is not the others'
                run.record(ready.name, f"failed: {type(error).__name__}: {error}", monotonic())


def main(arguments: list[str]) -> int:
    """Runs a part, or single steps."""
    names = [name for argument in arguments for name in PARTS.get(argument, (argument,))]
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        print(f"usage: run_all.sh {' | '.join(PARTS)} | STEP ...; steps: {', '.join(STEPS)}")
        return 2
    for folder in (OUT, WORK, BIN):
        folder.mkdir(parents=True, exist_ok=True)
    run = Run(float(os.environ.get("SECONDS_OF_PART", PART_SECONDS)))
    run.log.write_text("", encoding="utf-8")
    try:
        perform(run, [step for name in names for step in STEPS[name]])
    finally:
        for process in Process.all:
            if process.status is None:
                process.stop()
    run.say("")
    for name, step in run.steps.items():
        run.say(f"{name:28} {step['seconds']:6.1f} s  {step['status']}")
    for note in run.notes:
        run.say(note)
    return 0 if all(step["status"] == OK for step in run.steps.values()) else 1


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    sys.exit(main(sys.argv[1:]))
