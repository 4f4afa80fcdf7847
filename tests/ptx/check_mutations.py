"""Kernels of PTX that are changed in one place give wrong results. If one did not, the tests of
check_ptx.py would prove less than they say.

Run by tools/ptx.sh.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from kernels import Built, compile_library, read_ptx
from ptx import Instruction, Kernel
from scans import LAYOUTS, Record, Scans, all_scans, on, stand_in
from support import assert_agree, evaluate, leaves_for, yardsticks
from table import MUTATION

pytestmark = pytest.mark.kernel

MOST_LOOKS = 1 << 26  # kMostLooks of csrc/cuda/device.cuh


@dataclass(frozen=True)
class Mutation:
    """What becomes of each instruction, and in which memory that shows."""

    name: str
    change: Callable[[Instruction], Instruction | None]
    weak: bool = False
    place: Instruction | None = None  # if it is a single one


def without(wanted: Instruction) -> Mutation:
    name = f"no {wanted} in line {wanted.line}"
    return Mutation(name, lambda i: None if i == wanted else i, place=wanted)


def without_release(wanted: Instruction) -> Mutation:
    relaxed = replace(wanted, opcode=wanted.opcode.replace(".release.", ".relaxed."))
    name = f"{wanted.opcode} in line {wanted.line} releases nothing"
    return Mutation(name, lambda i: relaxed if i == wanted else i, weak=True, place=wanted)


def with_plain_loads() -> Mutation:
    """Of the exchange, without the acquire before them."""

    def change(i: Instruction) -> Instruction | None:
        if i.opcode.startswith("fence.acquire."):
            return None
        opcode = i.opcode.replace("ld.global.cg.", "ld.global.")
        return replace(i, opcode=opcode.replace("ld.acquire.", "ld.relaxed."))

    return Mutation("plain loads and no acquire", change, weak=True)


def with_plain_looks() -> Mutation:
    """Of the exchange by value: each look may then find what the cache has kept."""

    def change(i: Instruction) -> Instruction:
        opcode = i.opcode.replace("ld.relaxed.gpu.global.v", "ld.global.v")
        # Such a look never changes, so that its loop would go on until it gives up.
        looks = tuple("64" if word == str(MOST_LOOKS) else word for word in i.operands)
        return replace(i, opcode=opcode, operands=looks)

    return Mutation("plain looks at values", change, weak=True)


def without_order(wanted: Instruction) -> Mutation:
    return replace(without(wanted), weak=True)


def with_words_exchanged() -> Mutation:
    """Of the first operand of products, the second word and the third: rows in place of k."""

    def change(i: Instruction) -> Instruction:
        if not i.opcode.startswith("mma."):
            return i
        d, a, *rest = i.operands
        w = a.strip("{}").split(",")
        return replace(i, operands=(d, f"{{{w[0]},{w[2]},{w[1]},{w[3]}}}", *rest))

    return Mutation("words of an operand exchanged", change)


def with_trap(wanted: Instruction) -> Mutation:
    """Shows whether any thread comes by."""
    trap = replace(wanted, opcode="trap", operands=())
    return Mutation(f"a trap in line {wanted.line}", lambda i: trap if i == wanted else i)


def mutations(kernel: Kernel) -> Iterator[Mutation]:
    """Of barriers of warps only those after a wait: the others keep the compiler from moving loads,
    and have no effect on what it has made.
    """
    has_waited = False
    for i in kernel.instructions():
        if i.opcode.startswith(("ld.acquire.", "fence.acquire.")):
            has_waited = True
        elif i.opcode.startswith("bar.warp.sync") and has_waited:
            has_waited = False
            yield without(i)
        elif i.opcode.startswith("bar.sync"):
            yield without(i)
        elif i.opcode.startswith("st.release."):
            yield without_release(i)
        elif i.opcode.startswith("fence.acq_rel.") and "ResidentForward" in kernel.name:
            yield without_order(i)  # no trial of backward has shown yet that it needs the fence
    names = {i.opcode.split(".")[0] for i in kernel.instructions()}
    if any(i.opcode.startswith("ld.global.cg.") for i in kernel.instructions()):
        yield with_plain_loads()
    if any(i.opcode.startswith("ld.relaxed.gpu.global.v") for i in kernel.instructions()):
        yield with_plain_looks()
    if "mma" in names:
        yield with_words_exchanged()


class Trial:
    """One call, on any kernels."""

    def __init__(self, scans: Scans, **options: str) -> None:
        T, N, _, H = LAYOUTS["several blocks"][1]
        I = 70  # products of several chunks
        self._options = {**on("several blocks"), **options}
        self._module = scans.module(I, H)
        self._leaves = leaves_for(self._module, T, N)
        self._theirs, self._reference = yardsticks(self._module, self._leaves)

    def is_right(self, libraries: str, *, weak: bool) -> bool:
        with stand_in(libraries, **self._options, SIMT_WEAK=str(int(weak))):
            try:
                results = evaluate(self._module, self._leaves)
                assert_agree(results, self._theirs, self._reference)
            except AssertionError:
                return False
            except RuntimeError as error:  # a wait without an end, or an access out of bounds
                if not re.search(r"(^|: )(simt|ptx): ", str(error)):
                    raise
                return False
        return True


# Kernels, and what it takes that they run.
OPTIONS: dict[str, dict[str, str]] = {
    "ResidentForward": {},
    "ResidentBackward": {},
    "SlotSums": {},
    "MatrixProduct": {"CUBLAS": "0"},
}
# Threads take turns in another order each time, and some orders hide what is missing.
TRIALS = 12


def kernels_that_run(scans: Scans, trial: Trial, name: str) -> Iterator[tuple[Built, Kernel]]:
    before = [built.launches() for built in scans.built]
    for weak in (False, True):
        assert trial.is_right(scans.libraries, weak=weak)
    for built, launches in zip(scans.built, before, strict=True):
        after = built.launches()
        for kernel in read_ptx(Path(built.ptx)).kernels:
            if f"{len(name)}{name}" in kernel.name and after[kernel.name] > launches[kernel.name]:
                yield built, kernel


@pytest.mark.parametrize("name", OPTIONS)
@all_scans(cells=("Lstm",))
def test_what_is_wrong_shows(scans: Scans, name: str, record_property: Record) -> None:
    """Of instructions that are carried out: without tensor cores no weights are held in registers,
    and the barrier before that is in kernels all the same.
    """
    trial = Trial(scans, **OPTIONS[name])

    def is_right(built: Built, kernel: Kernel, mutation: Mutation, trials: int = 1) -> bool:
        changed = kernel.changed(mutation.change)
        assert changed != kernel, mutation.name
        module = read_ptx(Path(built.ptx))
        own = compile_library(f"mutation-{scans.name}-{name}", module, [changed])
        libraries = f"{own}:{scans.libraries}"
        return all(trial.is_right(libraries, weak=mutation.weak) for _ in range(trials))

    survivors = []
    found = list(kernels_that_run(scans, trial, name))
    assert found
    for built, kernel in found:
        for mutation in mutations(kernel):
            if not is_right(built, kernel, mutation, TRIALS):
                record_property(MUTATION, built.name)
            elif not (mutation.place and is_right(built, kernel, with_trap(mutation.place))):
                survivors.append(f"{kernel.name}: {mutation.name}")
    assert not survivors
