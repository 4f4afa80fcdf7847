"""Add a cell that torch.nn does not have, as docs/tour.md says how, to a copy of the tree in
build/toy-cell; and run the kernel tests on it there, on the CPU's kernels and on those for CUDA, on
the stand-in of tests/simt. Part 0 is that of the CPU, part 1 that of the stand-in.

Usage, from the repository: python tools/toy_cell.py [--part NUMBER] [pytest arguments]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

ROOT = Path(__file__).parent.parent
COPY = ROOT / "build" / "toy-cell"
FOLDERS = ("csrc", "cmake", "rnnkern", "tests", "tools")
FILES = ("CMakeLists.txt", "LICENSE", "pyproject.toml", "setup.py")

# The recipe: what is put in front of a pattern, file by file; the header is the fourth file.
INSERTED = {
    "csrc/cells/list.h": [
        ('#include "cells/elman.h"', '#include "cells/coupled_lstm.h"\n'),
        (">;", ", CoupledLstm"),
    ],
    "rnnkern/known_cells.py": [
        (
            "_STEPS: ",
            """\
def _coupled_lstm(a: Tensor, b: Tensor, state: State) -> State:
    f, g, o = (a + b).chunk(3, -1)
    f = torch.sigmoid(f)
    c = f * state[1] + (1 - f) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


""",
        ),
        ('    "LSTM": _lstm,', '    "COUPLED": _coupled_lstm,\n'),
    ],
    "rnnkern/modules.py": [
        (
            r"\Z",
            '''

class CoupledLSTM(OwnRNN):
    """LSTM that writes as much as it forgets."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__("COUPLED", *sizes, **options)
''',
        ),
    ],
}

# What is changed in the header of a cell, and what the compiler says then: what the cell misses, or
# which value is not initialized because the cell does not do what its shape says.
TOY, GRU = ("coupled_lstm.h", "CoupledLstm"), ("gru.h", "Gru")
Change: TypeAlias = tuple[tuple[str, str], str, str, str]
CONTRACT: tuple[Change, ...] = (
    (TOY, "kF", "kF", ""),
    (TOY, ".gates = 3", ".gates = 9", "a cell has kShape"),
    (TOY, "kMode", "kName", "a cell has kMode"),
    (TOY, '"f", "g", "o"', '"f", "g"', "a cell has kMode"),
    (TOY, ", .saves_slots = true", "", "a cell has kMode"),
    (TOY, "void forward", "void forwards", "a cell has forward"),
    (TOY, "void backward", "void backwards", "a cell has backward"),
    (TOY, "void tangent", "void tangents", "a cell has tangent"),
    (TOY, ".cell_state = true, ", "", "::c_prev' may be used uninitialized"),
    (TOY, "= true};", "= true, .reads_h = true};", "::dh_direct"),
    (TOY, "s.c = f", "const V c = f", "::c' may be used uninitialized"),
    (TOY, "s.h = o", "const V h = o", "::h' may be used uninitialized"),
    (GRU, "", "", ""),
    (GRU, ".slots = 4, ", "", "may be used uninitialized"),
    (GRU, ", .reads_h = true", "", "::h_prev' may be used uninitialized"),
    (GRU, "s.dh_direct =", "const V direct =", "::dh_direct"),
)
PARTS = 2
COMPILER = os.environ.get("CXX", "g++")
OPTIONS = ["-std=c++20", "-O1", "-march=native", "-fopenmp", "-ffp-contract=fast", "-Wall"]
OPTIONS += ["-Werror=uninitialized", "-Werror=maybe-uninitialized", "-Wno-unknown-pragmas"]
OPTIONS += ["-Icsrc", "-Itests/simt"]

# Tests of all forms of layers. Those of autocast ask for the dtypes that torch.nn has, and torch.nn
# has no such cell.
CPU_TESTS = ("test_sequences", "test_modules", "test_numerics", "test_16bit", "test_second_order")
SIMT_TESTS = ("test_sequences",)
CHOSEN = "CoupledLSTM and not autocast"


def main(given: list[str]) -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--part", type=int, metavar="NUMBER")
    options, arguments = parser.parse_known_args(given)
    parts = range(PARTS) if options.part is None else [options.part % PARTS]
    copy()
    add_the_cell()
    if 0 in parts:
        check_contract()
        check_any_gates("cpu")
        build("build_ext", "--inplace", RNNKERN_INSTRUCTION_SETS="native", RNNKERN_CUDA="OFF")
        check_generated()
        run_tests(COPY, CPU_TESTS, arguments)
    if 1 in parts:
        check_any_gates("cuda")
        base = Path("build") / "simt"
        lib = COPY / base / "lib"
        shutil.rmtree(lib, ignore_errors=True)
        build("build", "--build-base", str(base), "--build-lib", str(lib), RNNKERN_SIMT="ON")
        for tier in ("resident", "stepwise"):
            run_tests(lib, SIMT_TESTS, arguments, RNNKERN_CUDA_TIER=tier)


def copy() -> None:
    """Builds in the copy stay, so that a second run compiles what has changed."""
    COPY.mkdir(parents=True, exist_ok=True)
    for name in FOLDERS:
        shutil.rmtree(COPY / name, ignore_errors=True)
        unwanted = shutil.ignore_patterns("__pycache__", "_C*.so")
        shutil.copytree(ROOT / name, COPY / name, ignore=unwanted)
    for name in FILES:
        shutil.copy2(ROOT / name, COPY)
    (COPY / "README.md").write_text("A copy for tools/toy_cell.py.\n")


def add_the_cell() -> None:
    header = "coupled_lstm.h"
    shutil.copy2(COPY / "tests" / "toy_cell" / header, COPY / "csrc" / "cells" / header)
    for name, insertions in INSERTED.items():
        path = COPY / name
        text = path.read_text()
        for pattern, inserted in insertions:
            found = re.search(pattern, text)
            if not found:
                sys.exit(f"toy_cell: no {pattern!r} in {name}")
            text = text[: found.start()] + inserted + text[found.start() :]
        path.write_text(text)


def check_contract() -> None:
    """The compiler says what a cell misses, and where it does not do what its shape says."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for wrong in filter(None, pool.map(wrong_about, range(len(CONTRACT)), CONTRACT)):
            sys.exit(wrong)


def wrong_about(number: int, change: Change) -> str:
    """What is wrong with the compiler's answer to that change."""
    (header, cell), old, new, message = change
    text = (COPY / "csrc" / "cells" / header).read_text()
    assert old in text
    changed = COPY / f"changed_{number}"  # comes before csrc on the path
    shutil.rmtree(changed, ignore_errors=True)
    (changed / "cells").mkdir(parents=True)
    (changed / "cells" / header).write_text(text.replace(old, new))
    command = [COMPILER, f"-I{changed.name}", *OPTIONS, f"-DCELL={cell}", "-S", "-o", os.devnull]
    command += [str(Path("tests") / "toy_cell" / "drivers.cpp")]
    english = {**os.environ, "LC_ALL": "C"}
    result = subprocess.run(command, cwd=COPY, env=english, capture_output=True, text=True)
    if (result.returncode != 0) == bool(message) and message in result.stderr:
        return ""
    return f"toy_cell: {old} -> {new}: wanted {message!r}, got\n{result.stderr}"


def check_generated() -> None:
    """Cells that rnnkern.cell generates, in the same programs: on the CPU and on the stand-in."""
    cells = COPY / "generated" / "cells"
    cells.mkdir(parents=True, exist_ok=True)
    script = str(Path("tests") / "own_cells" / "weighted_sums.py")
    run([sys.executable, script, str(cells / "list.h")], PYTHONPATH=str(COPY))
    for name in ANY_GATES:
        check_any_gates(name, "-Igenerated", "-DRNNKERN_CELL=WeightedSum11")


# The programs of tests/any_gates, with what each is compiled with.
ANY_GATES = {
    "cpu": [],
    "cuda": ["-DRNNKERN_SIMT", "csrc/cuda/plan.cpp", "tests/simt/library.cpp"],
}


def check_any_gates(name: str, *options: str) -> None:
    """Made-up cells of 1 to 8 gates, in a program of their own, take the place of the list."""
    program = str(COPY / f"any_gates_{name}")
    own = [*options, "-Itests/any_gates", *OPTIONS, *ANY_GATES[name], f"tests/any_gates/{name}.cpp"]
    run([COMPILER, *own, "-o", program])
    run([program])


def build(*arguments: str, **environment: str) -> None:
    run([sys.executable, "setup.py", "--quiet", *arguments], **environment)


def run_tests(
    package: Path, names: tuple[str, ...], arguments: list[str], **environment: str
) -> None:
    """The kernel tests of the toy cell, on the package in that folder."""
    path = [package, COPY / "tools", COPY / "tests", COPY / "tests" / "toy_cell"]
    run(
        [
            str(Path(sys.executable).parent / "pytest"),
            *("-p", "loaded_from", "-p", "coupled_lstm", "-m", "kernel", "-k", CHOSEN),
            *(f"tests/{name}.py" for name in names),
            *arguments,
        ],
        PYTHONPATH=os.pathsep.join(map(str, path)),
        RNNKERN_LOADED_FROM=str(package),
        RNNKERN_TEST_DEVICES="cpu",
        **environment,
    )


def run(command: list[str], **environment: str) -> None:
    result = subprocess.run(command, cwd=COPY, env={**os.environ, **environment}, check=False)
    if result.returncode:
        sys.exit(result.returncode)


if __name__ == "__main__":
    main(sys.argv[1:])
