"""Instruction sets: every one that this CPU has can be forced, and all give the same numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import in_a_process
from torch import Tensor

import rnnkern

pytestmark = pytest.mark.cpu_only

# From the most capable down, and what torch calls a CPU that has it.
KNOWN = {
    "x86-64-v4-amx": "AVX512",
    "x86-64-v4-bf16": "AVX512",
    "x86-64-v4": "AVX512",
    "x86-64-v3": "AVX2",
    "baseline": "DEFAULT",
}
EXTENDED = {
    "x86-64-v4-amx": torch.cpu._is_amx_tile_supported,
    "x86-64-v4-bf16": torch.cpu._is_avx512_bf16_supported,
}
WITH_FMA = ("x86-64-v4", "x86-64-v3")


def supported() -> list[str]:
    """The compiled instruction sets that this CPU can run, the most capable first."""
    capability = torch.backends.cpu.get_cpu_capability()
    order = list(dict.fromkeys(KNOWN.values()))
    rank = order.index(capability) if capability in order else len(order) - 1
    compiled = rnnkern.build_info()["isa_compiled"]
    return [
        name
        for name, needs in KNOWN.items()
        if order.index(needs) >= rank
        and name in compiled
        and (name not in EXTENDED or EXTENDED[name]())
    ]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Tensor]]:
    """By instruction set, the results that a process forced to it computed, and there compared with
    torch.nn.
    """
    folder = tmp_path_factory.mktemp("numbers")
    results = {}
    for name in supported():
        in_a_process("numbers", str(folder / name), RNNKERN_ISA=name)
        results[name] = torch.load(folder / name)
    return results


def test_the_table_is_not_empty() -> None:
    assert "baseline" in supported()


@pytest.mark.parametrize("name", supported())
def test_each_is_within_tolerance(numbers: dict[str, dict[str, Tensor]], name: str) -> None:
    """The forced process used what it was told to, and its results passed the comparison there."""
    used = bytes(numbers[name]["isa"].tolist()).decode()
    assert used == name
    assert len(numbers[name]) > 500


@pytest.mark.parametrize("name", supported())
def test_outputs_do_not_depend_on_threads(numbers: dict[str, dict[str, Tensor]], name: str) -> None:
    results = numbers[name]
    differing = [
        key
        for key in results
        if "threads=1" in key
        and not torch.equal(results[key], results[key.replace("threads=1", "threads=2")])
    ]
    assert not differing


@pytest.mark.skipif(
    not set(WITH_FMA) <= set(supported()), reason="the CPU has not both instruction sets with fma"
)
def test_bitwise_equal_with_fma(numbers: dict[str, dict[str, Tensor]]) -> None:
    """Under deterministic algorithms, forward, all dtypes."""
    first, second = (numbers[name] for name in WITH_FMA)
    compared = [key for key in first if "deterministic=True" in key]
    assert len(compared) > 100
    assert not [key for key in compared if not torch.equal(first[key], second[key])]


@pytest.mark.parametrize("name", supported())
def test_integers_are_exact_everywhere(numbers: dict[str, dict[str, Tensor]], name: str) -> None:
    """Outputs and gradients of integers agree in every bit, with or without fma."""
    baseline = numbers["baseline"]
    compared = [key for key in baseline if key.startswith("integers")]
    assert len(compared) > 5
    for key in compared:
        assert torch.equal(numbers[name][key], baseline[key])
        assert torch.equal(baseline[key], baseline[key].round())


def test_the_best_is_used_unless_told_otherwise() -> None:
    assert in_a_process("isa", RNNKERN_ISA=None) == supported()[0]


def test_build_info_names_what_is_in_use() -> None:
    info = rnnkern.build_info()
    assert info["isa"] in info["isa_compiled"]
    assert info["isa"] == os.environ.get("RNNKERN_ISA", supported()[0])


def refused(name: str) -> str:
    """The last line of what importing says with `name` forced."""
    done = subprocess.run(
        [sys.executable, "-c", "import rnnkern"],
        env={**os.environ, "RNNKERN_ISA": name},
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["x86-64-v9", "AVX2", "baseline ", "-1"])
def test_unknown_names_are_refused(name: str) -> None:
    message = refused(name)
    assert message.startswith("ImportError")
    assert name in message
    for choice in supported():
        assert choice in message


@pytest.mark.parametrize(
    "name", [name for name in rnnkern.build_info()["isa_compiled"] if name not in supported()]
)
def test_what_the_cpu_lacks_is_refused(name: str) -> None:
    message = refused(name)
    assert message.startswith("ImportError")
    for choice in supported():
        assert choice in message
