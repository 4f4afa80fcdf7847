"""Counts the instructions of a call, ours and torch.nn's, where no clock can be trusted.

    python -m benchmarks.instructions [--cell RNNCell,LSTM] [--workload step_h20,notebook]

Runs itself under ``valgrind --tool=callgrind``, on one thread. Valgrind knows no AVX-512. So both
libraries take their kernels for x86-64-v3, whatever the CPU, and rnnkern must have been built with
``RNNKERN_INSTRUCTION_SETS=all``. The numbers are thousands of instructions of one call, after the
first ones. A vector of four numbers and one of eight are one instruction each, and so are a hit and
a miss of a cache: the ratio is no speed-up, but it is the same on every machine.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

INSIDE = "RNNKERN_INSTRUCTIONS_FOLDER"
# Requests to callgrind, from its header valgrind/callgrind.h.
DUMP, ZERO, START, STOP = (0x43540000 + number for number in (0, 1, 4, 5))
# mov rax, rdi; xor edx, edx; four rotations of rdi and xchg rbx, rbx, which valgrind takes for a
# request; ret.
REQUEST = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db c3")
MOST_CALLS, FEW_MS = 20, 20.0


class Callgrind:
    """The tool under which this process runs."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._seen = folder, 0
        self._memory = mmap.mmap(-1, mmap.PAGESIZE, prot=7)
        self._memory.write(REQUEST)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._call = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)

    def _ask(self, request: int) -> None:
        words = (ctypes.c_uint64 * 6)(request)
        self._call(ctypes.addressof(words))

    def count(self, call: object, calls: int) -> float:
        """Instructions of one call."""
        assert callable(call)
        self._ask(START)
        call()  # translated by valgrind
        self._ask(ZERO)
        for _ in range(calls):
            call()
        self._ask(DUMP)
        self._ask(STOP)
        self._seen += 1
        text = (self._folder / f"out.{self._seen}").read_text()
        found = re.search(r"^totals: (\d+)", text, re.MULTILINE)
        assert found is not None, text[-200:]
        return int(found[1]) / calls


def measure(cells: list[str], workloads: list[str]) -> None:
    """Prints the rows. Runs under callgrind."""
    import torch
    from torch import nn

    import rnnkern
    from rnnkern.bench import timing
    from rnnkern.bench.workloads import (
        FORWARD,
        FORWARD_BACKWARD,
        draw_case,
        grad_mode,
        load_step_workloads,
        load_workloads,
    )

    torch.set_num_threads(1)
    tool = Callgrind(Path(os.environ[INSIDE]))
    print(f"rnnkern: {rnnkern.build_info()['isa']}, torch {torch.__version__}", flush=True)
    print(f"{'':22}{'pass':18}{'torch.nn':>12}{'rnnkern':>12}{'ratio':>8}", flush=True)
    for name, workload in (load_workloads() | load_step_workloads()).items():
        for cell in workload.cells:
            if cell not in cells or name not in workloads:
                continue
            case = draw_case(cell, workload)
            for pass_name in (FORWARD, FORWARD_BACKWARD):
                with grad_mode(pass_name):
                    found = []
                    for library in (nn, rnnkern):
                        call = case.side(library, torch.float32).call(pass_name)
                        for _ in range(3):
                            call()
                        is_short = timing.host_clock(call, 1) * 1e3 < FEW_MS
                        found.append(tool.count(call, MOST_CALLS if is_short else 2))
                theirs, ours = found
                row = f"{theirs / 1e3:12.1f}{ours / 1e3:12.1f}{theirs / ours:8.2f}"
                print(f"{cell:9}{name:13}{pass_name:18}{row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", default="RNNCell,LSTMCell,GRUCell")
    parser.add_argument(
        "--workload", default="step_h20,step_h100,step_h200,step_h129,step_h1024,step_h512"
    )
    options = parser.parse_args()
    if INSIDE in os.environ:
        measure(options.cell.split(","), options.workload.split(","))
        return
    valgrind = shutil.which("valgrind")
    if valgrind is None or platform.machine() != "x86_64":
        parser.error("needs valgrind, and an x86-64 machine")
    with TemporaryDirectory() as folder:
        tool = ["--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/out"]
        program = [sys.executable, "-m", "benchmarks.instructions", *sys.argv[1:]]
        environment = os.environ | {INSIDE: folder}
        sys.exit(subprocess.run([valgrind, "-q", *tool, *program], env=environment).returncode)


if __name__ == "__main__":
    main()
