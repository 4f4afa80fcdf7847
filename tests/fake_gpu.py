"""Stands in for the programs that benchmarks/gpu/run_all.py starts: see test_gpu_run.py.

It is installed under the names nvidia-smi, nvcc, compute-sanitizer and python3. A compiler makes
copies of it, as the programs that it compiles. What happens on the GPU does well, hangs, dies by a
signal or ends with a sticky error, as FAKE_GPU says; a compiler may err. Tests run in the real
pytest, on FAKE_TESTS in place of the files that are asked for.
"""

import faulthandler
import json
import os
import runpy
import shutil
import signal
import sys
import time
from itertools import pairwise
from pathlib import Path

MODE = os.environ["FAKE_GPU"]
NAME = Path(sys.argv[0]).name
ARGUMENTS = sys.argv[1:]


def fail() -> None:
    """What the GPU does in this mode; nothing if it does well."""
    if MODE == "hangs":
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(600)
    if MODE == "dies":
        os.kill(os.getpid(), signal.SIGSEGV)
    if MODE == "sticky":
        print("CUDA error: an illegal memory access was encountered", flush=True)
        sys.exit(70 if NAME == "python3" else 1)


def append(file: str, **fields: object) -> None:
    with Path(file).open("a", encoding="utf-8") as out:
        out.write(json.dumps(fields) + "\n")


def after(option: str) -> str:
    return ARGUMENTS[ARGUMENTS.index(option) + 1]


def nvidia_smi() -> None:
    print("9.0" if "compute_cap" in ARGUMENTS[0] else "A fake, 1.0, 1 MiB, 1, 1, 1, 1")


def nvcc() -> None:
    if "--version" in ARGUMENTS:
        print("Cuda compilation tools, release 13.0")
        return
    if Path(after("-o")).name == os.environ.get("FAKE_NVCC"):
        sys.exit("error: expected a ';'")
    shutil.copy(__file__, after("-o"))


def smoke() -> None:
    append(ARGUMENTS[0], shape=ARGUMENTS[1], first_steps={"right": True})
    if ARGUMENTS[1].endswith("h256"):
        fail()
    append(ARGUMENTS[0], shape=ARGUMENTS[1], forward_us_per_step=1.5)


def constants() -> None:
    Path(ARGUMENTS[0]).write_text('{"constants": []}', encoding="utf-8")


def compute_sanitizer() -> None:
    if "racecheck" in ARGUMENTS:
        fail()
    program = ARGUMENTS.index("9") + 1
    sys.argv = ARGUMENTS[program:]
    os.execv(sys.argv[0], sys.argv)


def speed() -> None:
    """Four rows, of which the third does not do well."""
    file, begin = ARGUMENTS[1], int(after("--from-row"))
    faulthandler.dump_traceback_later(float(after("--row-seconds")), exit=True)
    if begin == 0:
        append(file, device="a fake")
    for row in range(begin, 4):
        is_broken = row == 2
        if is_broken and MODE != "sticky":
            fail()
        append(
            file, row=row, **({"failed": "an illegal memory access"} if is_broken else {"us": 1.5})
        )
        if is_broken:
            fail()


def pip() -> None:
    """Installs an extension of a few bytes."""
    if os.environ.get("FAKE_PIP"):
        sys.exit("error: no wheel could be built")
    site = Path(after("--target"))
    (site / "rnnkern").mkdir(parents=True, exist_ok=True)
    (site / "rnnkern/_C.so").write_text("a fake")


def pytest() -> None:
    plugins = [value for name, value in pairwise(ARGUMENTS) if name == "-p"]
    assert plugins == ["loaded_from", "journal", "no:cacheprovider"]
    file = Path(os.environ["FAKE_TESTS"])
    options = ["-q", "-p", "journal", "-p", "no:cacheprovider", "-c", os.devnull]
    sys.argv = ["pytest", str(file), *options, "--rootdir", str(file.parent)]
    runpy.run_module("pytest", run_name="__main__")


def python() -> None:
    if ARGUMENTS[0] == "-m":
        {"pip": pip, "pytest": pytest, "rnnkern": lambda: None}[ARGUMENTS[1]]()
    elif ARGUMENTS[0].endswith("speed.py"):
        speed()
    else:
        raise ValueError(ARGUMENTS)


if __name__ == "__main__":
    named = {
        "nvidia-smi": nvidia_smi,
        "nvcc": nvcc,
        "compute-sanitizer": compute_sanitizer,
        "python3": python,
        "constants": constants,
    }
    named.get(NAME, smoke)()
