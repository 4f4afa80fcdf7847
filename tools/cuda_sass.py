"""What the CUDA compiler has made of the resident kernels, from their machine code.

Usage: python tools/cuda_sass.py [--table] FILE... with object files or cubins. A step of the loop
over time waits for other blocks twice: for their flags, and for what they have computed. This
program counts the instructions between such waits, because each of them costs time in every step.
It fails if a kernel exceeds one of Limits. Needs cuobjdump and nvdisasm (packages
nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm).
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from cuda_report import plain_names

SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),")
TARGET = re.compile(r"^\s*\.target\s+(\w+)|EF_CUDA_(SM\d+)")
LABEL = re.compile(r"^(\.L\w+):")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
JUMP = re.compile(r"`\((\.L\w+)\)")
BARRIER = re.compile(r"^(B\d+)")

POLL = re.compile(r"LDG\.E\.STRONG\.GPU$")
STATE = re.compile(r"LDG\.E\.128\.STRONG\.GPU$")
ELEMENT = re.compile(r"LDG\.E(\.U16)?$")
PACKS = re.compile(rf"{ELEMENT.pattern}|ST(\.E|S|G\.E)?\.(U16|128)$")


class Limits(NamedTuple):
    """At most so many; at least so many `ahead`."""

    load: int = 25  # instructions from the look that sees a flag to the first load of the state
    sums: int = 20  # from the barrier of the sums to the first load of a sum
    cell: float = 320  # from there to the barrier before the flag, for each cell of a thread
    pack: float = 20  # instructions before the loop, for each load of a weight
    calls: int = 0  # in the loop, as all below
    fences: int = 1
    invalidations: int = 1
    local: int = 0  # loads and stores of local memory
    ahead: int = 3  # loads of 16 bytes on their way before the first product


# What a part of a kernel's name changes, one after the other. A lane packs half as many numbers of
# float32 at once, and rows of the widest backward tile share few addresses. Wide tiles, and sums of
# all rows in a lane, keep a few words in memory from step to step.
CHANGES: dict[str, dict[str, Any]] = {
    "<float, ": {"pack": 24},
    "<float, float, ": {"pack": 40, "ahead": 2, "local": 16},
    "TileShape{2, 4": {"pack": 40},
    ", 4, 0}": {"local": 16},
}


class Instruction(NamedTuple):
    guard: str
    name: str
    operands: str

    @property
    def is_jump(self) -> bool:
        return self.name.startswith("BRA")

    @property
    def calls(self) -> bool:
        """Not to meet a warp that has diverged: before sm_90 that is a jump, or a function."""
        return self.name.startswith("CALL") and bool(
            re.search(r"`\(\$(?!.*__cuda_sm70_)", self.operands)
        )


class Kernel:
    """The instructions of a kernel, and which ones may follow each."""

    def __init__(self, name: str, architecture: str) -> None:
        self.name, self.architecture = name, architecture
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self._next: list[list[int]] = []

    def link(self) -> None:
        ends: dict[str, set[int]] = {}  # of a convergence barrier
        for i in self.instructions:
            if i.name == "BSSY" or i.name.startswith("BSSY."):
                where = JUMP.search(i.operands)
                barrier = BARRIER.match(i.operands)
                if where and barrier and where[1] in self.labels:
                    ends.setdefault(barrier[1], set()).add(self.labels[where[1]])
        all_ends = {end for some in ends.values() for end in some}
        for index, i in enumerate(self.instructions):
            following = {index + 1} if index + 1 < len(self.instructions) else set()
            if i.is_jump or (i.name.startswith("CALL") and JUMP.search(i.operands)):
                where = JUMP.search(i.operands)
                if i.is_jump and not i.guard and not i.name.startswith("BRA.DIV"):
                    following = set()
                if where and where[1] in self.labels:
                    following.add(self.labels[where[1]])
            elif i.name.startswith(("EXIT", "RET", "BRX", "BPT")) and not i.guard:
                following = set()
            elif i.name.startswith("BSYNC") and index + 1 not in all_ends and not i.guard:
                barrier = BARRIER.match(i.operands)
                following = ends.get(barrier[1], set()) if barrier else set()
            self._next.append(sorted(following))

    def next(self, index: int) -> list[int]:
        return self._next[index]

    def loops(self) -> list[set[int]]:
        """Sets of instructions that reach each other (Tarjan, without recursion)."""
        order: dict[int, int] = {}
        low: dict[int, int] = {}
        stack: list[int] = []
        on_stack: set[int] = set()
        found = []
        for root in range(len(self.instructions)):
            if root in order:
                continue
            work = [(root, iter(self.next(root)))]
            order[root] = low[root] = len(order)
            stack.append(root)
            on_stack.add(root)
            while work:
                node, following = work[-1]
                for other in following:
                    if other not in order:
                        order[other] = low[other] = len(order)
                        stack.append(other)
                        on_stack.add(other)
                        work.append((other, iter(self.next(other))))
                        break
                    if other in on_stack:
                        low[node] = min(low[node], order[other])
                else:
                    work.pop()
                    if work:
                        low[work[-1][0]] = min(low[work[-1][0]], low[node])
                    if low[node] == order[node]:
                        members = set()
                        while True:
                            member = stack.pop()
                            on_stack.remove(member)
                            members.add(member)
                            if member == node:
                                break
                        if len(members) > 1:
                            found.append(members)
        return found

    def distance(self, starts: Iterable[int], within: set[int], ends: re.Pattern[str]) -> int:
        """Instructions after `starts` up to the first that ends the way, on the shortest way."""
        seen: set[int] = set()
        ring, count = set(starts), 0
        while ring:
            following = {n for i in ring for n in self.next(i)} & within - seen
            count += 1
            if any(ends.match(self.instructions[i].name) for i in following):
                return count
            seen |= following
            ring = following
        return 0


class Figures(NamedTuple):
    """Of a resident kernel, as in Limits; and what is only shown."""

    load: int
    sums: int
    cell: float
    pack: float
    calls: int
    fences: int
    invalidations: int
    local: int
    ahead: int
    branches: int
    loop: int  # instructions

    def excesses(self, limits: Limits) -> list[str]:
        over = [
            f"{name} is {value:.4g}, at most {limit}"
            for name, value, limit in zip(limits._fields, self, limits, strict=False)
            if name != "ahead" and value > limit
        ]
        if self.ahead < limits.ahead:
            over.append(f"ahead is {self.ahead}, at least {limits.ahead}")
        return over


def figures(kernel: Kernel) -> Figures:
    """Raises ValueError if the loop over time does not look as expected."""
    code = kernel.instructions

    def in_loop(pattern: str) -> list[int]:
        return [i for i in sorted(loop) if re.match(pattern, code[i].name)]

    polled = [loop for loop in kernel.loops() if any(POLL.match(code[i].name) for i in loop)]
    if not polled:
        raise ValueError("no loop waits for flags")
    loop = max(polled, key=len)
    polls, barriers = in_loop(r"LDG\.E\.STRONG\.GPU$"), in_loop(r"BAR\.SYNC")
    stores = in_loop(r"STS")
    if not polls or len(barriers) < 2 or not stores:
        raise ValueError("the loop has no flag, no two barriers, or no sums")
    # The barrier of the sums is the one that loads from shared memory follow at once.
    to_sums = {b: kernel.distance([b], loop, re.compile(r"LDS")) for b in barriers}
    of_sums = min(barriers, key=lambda b: to_sums[b] or len(code))
    others = [b for b in barriers if b != of_sums]
    first = min(loop)
    cells = cells_of_a_thread(kernel.name)
    return Figures(
        load=kernel.distance(polls[:1], loop, STATE),
        sums=to_sums[of_sums],
        cell=straight(of_sums, others, loop) / cells,
        pack=packing(code[:first]),
        calls=sum(code[i].calls for i in loop),
        fences=len(in_loop(r"MEMBAR")),
        invalidations=len(in_loop(r"CCTL")),
        local=len(in_loop(r"LDL|STL")),
        ahead=loads_ahead(kernel, polls[0], loop),
        branches=len(in_loop(r"BRA")),
        loop=len(loop),
    )


GATES = {"Elman<Tanh>": 1, "Elman<Relu>": 1, "Lstm": 4, "Gru": 3}


def cells_of_a_thread(name: str) -> int:
    """As Pairs in csrc/cuda/resident.cuh has it, of 256 threads."""
    rows, columns = (int(n) for n in re.findall(r"TileShape\{(\d+), (\d+)", name)[0])
    gates = GATES[name.split(", ")[2]] if "Forward" in name else 1
    at_once = 256 // (16 * rows // gates)
    return -(-8 * columns // at_once)


def packing(code: list[Instruction]) -> float:
    """Instructions for each load of a weight, counted where many loads of elements are close
    together, with the stores of what they become.
    """
    apart, few = 200, 8
    runs: list[list[int]] = []
    for i, instruction in enumerate(code):
        if not PACKS.match(instruction.name):
            continue
        if runs and i - runs[-1][-1] <= apart:
            runs[-1].append(i)
        else:
            runs.append([i])
    loads = [sum(bool(ELEMENT.match(code[i].name)) for i in run) for run in runs]
    long = [(run[-1] - run[0] + 1, n) for run, n in zip(runs, loads, strict=True) if n > few]
    return sum(length for length, _ in long) / max(1, sum(n for _, n in long))


def straight(start: int, ends: list[int], loop: set[int]) -> int:
    """Instructions in their order, from one barrier to the next one."""
    end = min((e for e in ends if e > start), default=0)
    return sum(start < i < end for i in loop)


def loads_ahead(kernel: Kernel, poll: int, loop: set[int]) -> int:
    """Loads of the state before the first product that follows in the order of the code."""
    count = 0
    for i in sorted(loop):
        if i <= poll:
            continue
        name = kernel.instructions[i].name
        count += bool(STATE.match(name))
        if re.match(r"HMMA|FFMA|DFMA", name) and count:
            break
    return count


def disassembled(file: Path) -> Iterator[str]:
    """The listings of the cubins of a file."""
    with tempfile.TemporaryDirectory() as folder:
        cubins = [file.resolve()]
        if file.suffix != ".cubin":
            subprocess.run(
                ["cuobjdump", "-xelf", "all", str(file.resolve())],
                cwd=folder,
                check=True,
                capture_output=True,
            )
            cubins = sorted(Path(folder).glob("*.cubin"))
        for cubin in cubins:
            yield subprocess.run(
                ["nvdisasm", "-c", str(cubin)], check=True, capture_output=True, text=True
            ).stdout


def kernels(listing: str) -> list[Kernel]:
    found: list[Kernel] = []
    architecture = ""
    for line in listing.splitlines():
        if match := TARGET.search(line):
            architecture = (match[1] or match[2]).lower()
        elif match := SECTION.match(line):
            found.append(Kernel(match[1], architecture))
        elif not found:
            continue
        elif match := LABEL.match(line):
            found[-1].labels[match[1]] = len(found[-1].instructions)
        elif match := INSTRUCTION.match(line):
            found[-1].instructions.append(Instruction(match[1] or "", match[2], match[3]))
    names = plain_names(kernel.name for kernel in found)
    for kernel, name in zip(found, names, strict=True):
        kernel.name = name
        kernel.link()
    # As in cuda_report, float64 is to be right, not fast.
    return [k for k in found if k.name.startswith("Resident") and "<double" not in k.name]


def limits_of(name: str) -> Limits:
    limits = Limits()
    for part, changes in CHANGES.items():
        if part in name:
            limits = limits._replace(**changes)
    return limits


def check(file: Path) -> list[tuple[str, Figures | None, list[str]]]:
    """Of every kernel of a file: its architecture and name, its figures, and what is wrong."""
    found: list[tuple[str, Figures | None, list[str]]] = []
    for listing in disassembled(file):
        for kernel in kernels(listing):
            where = f"{kernel.architecture} {kernel.name}"
            try:
                seen = figures(kernel)
                found.append((where, seen, seen.excesses(limits_of(where))))
            except ValueError as error:
                found.append((where, None, [str(error)]))
    return found


def main() -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--table", action="store_true", help="print the figures of every kernel")
    parser.add_argument("files", nargs="+", type=Path)
    arguments = parser.parse_args()
    for tool in ("cuobjdump", "nvdisasm"):
        if not shutil.which(tool):
            parser.error(f"no {tool} on the PATH; pip install nvidia-cuda-{tool}")
    with ProcessPoolExecutor() as pool:
        found = [kernel for of_file in pool.map(check, arguments.files) for kernel in of_file]
    if not found:
        parser.error("no resident kernel in these files")
    if arguments.table:
        print("| kernel | " + " | ".join(Figures._fields) + " |")
        print("|---" * (1 + len(Figures._fields)) + "|")
        for where, seen, _ in sorted(found):
            if seen:
                print(f"| {where} | " + " | ".join(f"{value:.4g}" for value in seen) + " |")
    wrong = [f"  WRONG: {where}: {excess}" for where, _, all_ in found for excess in all_]
    print("\n".join(wrong), end="\n" * bool(wrong))
    print(f"cuda-sass: {len(found)} resident kernels, {len(wrong)} figures beyond their limits")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
