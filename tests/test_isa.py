"""Instruction sets: every one that this CPU has can be forced, and all give the same numbers."""

from __future__ import annotations

import os
from typing import TypeAlias

import pytest
import subprocesses
import torch
from forks import ChildError
from support import (
    DTYPES,
    FORMS,
    assert_agree,
    assert_bitwise,
    has_smooth_gradient,
    in_a_process,
    yardsticks,
)
from torch import Tensor

import rnnkern
from rnnkern.bench.timing import threads_set

pytestmark = pytest.mark.cpu_only

# From the most capable down, and what torch calls a CPU that has it.
KNOWN = {
    "x86-64-v4-amx": "AVX512",
    "x86-64-v4-bf16": "AVX512",
    "x86-64-v4-vnni": "AVX512",
    "x86-64-v4": "AVX512",
    "x86-64-v3": "AVX2",
    "baseline": "DEFAULT",
}
EXTENDED = {
    "x86-64-v4-vnni": [torch.cpu._is_vnni_supported],
    "x86-64-v4-bf16": [torch.cpu._is_vnni_supported, torch.cpu._is_avx512_bf16_supported],
    "x86-64-v4-amx": [
        torch.cpu._is_vnni_supported,
        torch.cpu._is_avx512_bf16_supported,
        torch.cpu._is_amx_tile_supported,
    ],
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
        and all(has() for has in EXTENDED.get(name, []))
    ]


Results: TypeAlias = dict[str, dict[str, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def numbers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Results]:
    """By instruction set, case and way to call it, what a process forced to it computed."""
    folder = tmp_path_factory.mktemp("numbers")
    results = {}
    for name in supported():
        assert in_a_process(subprocesses.numbers, str(folder / name), RNNKERN_ISA=name) == name
        results[name] = torch.load(folder / name)
    return results


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """By case, what torch.nn and the oracle give."""
    with threads_set(1):
        return {
            case: yardsticks(module, leaves, backward=has_smooth_gradient(module))
            for case, module, leaves in subprocesses.cases()
        }


def test_the_table_has_every_set() -> None:
    compiled = rnnkern.build_info()["isa_compiled"]
    assert set(compiled) <= set(KNOWN)
    assert supported(), "torch does not find the instruction set that is built"
    assert supported()[-1] == ("baseline" if len(compiled) > 1 else compiled[0])


@pytest.mark.parametrize("name", supported())
def test_each_is_within_tolerance(
    numbers: dict[str, Results],
    expected: dict[str, tuple[dict[str, Tensor], dict[str, Tensor]]],
    name: str,
) -> None:
    assert len(expected) == len(FORMS) * len(DTYPES) * len(subprocesses.SIZES)
    for case, yardstick in expected.items():
        assert_agree(numbers[name][case]["training"], *yardstick)


@pytest.mark.parametrize("name", supported())
def test_outputs_do_not_depend_on_threads(numbers: dict[str, Results], name: str) -> None:
    for ways in numbers[name].values():
        for way in ways:
            if "threads=1" in way:
                assert_bitwise(ways[way], ways[way.replace("threads=1", "threads=2")])


@pytest.mark.skipif(
    not set(WITH_FMA) <= set(supported()),
    reason="one of the sets with fma is not built, or not of this CPU",
)
def test_bitwise_equal_with_fma(numbers: dict[str, Results]) -> None:
    """Under deterministic algorithms, forward, all dtypes."""
    first, second = (numbers[name] for name in WITH_FMA)
    for case in first.keys() - {"integers"}:
        for threads in (1, 2):
            way = f"deterministic=True {threads=}"
            assert_bitwise(first[case][way], second[case][way])


@pytest.mark.parametrize("name", supported())
def test_integers_are_exact_everywhere(numbers: dict[str, Results], name: str) -> None:
    """Outputs and gradients of integers agree in every bit, with or without fma."""
    least = numbers[supported()[-1]]["integers"]["training"]  # of baseline, unless it is not built
    assert len(least) > 5
    assert_bitwise(numbers[name]["integers"]["training"], least)
    assert_bitwise(least, {key: value.round() for key, value in least.items()})


@pytest.mark.parametrize("name", supported())
def test_frozen_weights_are_right_everywhere(name: str) -> None:
    assert in_a_process(subprocesses.frozen_weights, RNNKERN_ISA=name) == name


def test_the_best_is_used_unless_told_otherwise() -> None:
    assert in_a_process(subprocesses.isa, RNNKERN_ISA=None) == supported()[0]


def test_build_info_names_what_is_in_use() -> None:
    info = rnnkern.build_info()
    assert info["isa"] in info["isa_compiled"]
    assert info["isa"] == os.environ.get("RNNKERN_ISA", supported()[0])


def refused(name: str) -> str:
    """The last line of what importing says with `name` forced."""
    with pytest.raises(ChildError) as raised:
        in_a_process(subprocesses.isa, RNNKERN_ISA=name)
    return str(raised.value).strip().splitlines()[-1]


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
