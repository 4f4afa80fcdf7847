"""Runs scans on the kernels of PTX and on the stand-in's own, for the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import oracle
import pytest
import torch
from kernels import Built, read_built
from support import (
    Call,
    Leaves,
    assert_agree,
    build,
    evaluate,
    has_smooth_gradient,
    plain,
    states_of,
    yardsticks,
)
from table import CASE
from torch import nn

Record = Callable[[str, object], None]  # the fixture record_property

MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "Elman<Tanh>": ("RNN", {}),
    "Elman<Relu>": ("RNN", {"nonlinearity": "relu"}),
    "Lstm": ("LSTM", {}),
    "Gru": ("GRU", {}),
}
DTYPES = {
    "float": torch.float32,
    "double": torch.float64,
    "Bf16": torch.bfloat16,
    "F16": torch.float16,
}
STAND_IN = ""  # in place of libraries: the stand-in's own kernels


def module_for(
    cell: str, element: str, I: int, H: int, *, directions: int = 1, **options: Any
) -> Any:
    kind, own = MODULES[cell]
    options |= {"bidirectional": directions == 2, **own}
    return build(kind, I, H, dtype=DTYPES[element], **options)


@dataclass(frozen=True)
class Scans:
    """The kernels of a cell and an element type: those of its scans and of its products, for an
    architecture that has some of its own or for the first one.
    """

    built: tuple[Built, Built]
    architecture: str = ""

    @property
    def name(self) -> str:
        """As in the table."""
        return self.built[0].name

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.built[0].element]

    @property
    def libraries(self) -> str:
        own = [one.other_libraries.get(self.architecture, "") for one in self.built]
        return ":".join(filter(None, [*own, *(one.library for one in self.built)]))

    def module(self, I: int, H: int, **options: Any) -> Any:
        return module_for(self.built[0].cell, self.built[0].element, I, H, **options)


def all_scans(
    *, cells: tuple[str, ...] = tuple(MODULES), elements: tuple[str, ...] = tuple(DTYPES)
) -> pytest.MarkDecorator:
    """Those of these that have been built, as a parameter of a test."""
    products = {built.element: built for built in read_built() if not built.cell}
    found = []
    for built in read_built():
        if built.cell not in cells or built.element not in elements:
            continue
        both = (built, products[built.element])
        for architecture in ("", *sorted({key for one in both for key in one.other_libraries})):
            name = "-".join(filter(None, (built.cell, built.element, architecture)))
            found.append(pytest.param(Scans(both, architecture), id=name))
    return pytest.mark.parametrize("scans", found)


@contextmanager
def stand_in(
    libraries: str, *, device: str = "13,100000", tier: str = "", **options: str
) -> Iterator[None]:
    """With those kernels, on a device of so many multiprocessors and bytes of shared memory."""
    values = {"SIMT_KERNELS": libraries, "SIMT_DEVICE": device, "CUDA_TIER": tier, **options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(f"RNNKERN_{name}", value)
        yield


def compare(
    scans: Scans,
    module: nn.Module,
    leaves: Leaves,
    call: Call = plain,
    *,
    oracle_call: Call | None = None,
    record: Record,
    **options: str,
) -> None:
    """Asserts that the kernels of PTX are as near to the oracle as torch.nn is, that the stand-in's
    are, and that the former are as near to the latter.
    """
    backward = has_smooth_gradient(module)
    with stand_in(STAND_IN, **options):
        native = evaluate(module, leaves, call, backward=backward)
    with stand_in(scans.libraries, **options):
        ours = evaluate(module, leaves, call, backward=backward)
    theirs, reference = yardsticks(module, leaves, oracle_call or call, backward=backward)
    assert_agree(native, theirs, reference)
    assert_agree(ours, theirs, reference)
    assert_agree(ours, theirs, {name: tensor.double() for name, tensor in native.items()})
    record(CASE, scans.name)


def ragged(T: int, N: int) -> dict[str, Any]:
    """Rows that end and episodes that begin at random, as arguments of `compare`."""
    lengths, reset = torch.randint(0, T + 1, (N,)), torch.rand(T, N) < 0.3

    def call(module: nn.Module, leaves: Leaves) -> Any:
        return module(leaves["x"], states_of(leaves), lengths=lengths, reset=reset)

    def oracle_call(module: nn.Module, leaves: Leaves) -> Any:
        return oracle.run(module, leaves["x"], states_of(leaves), lengths, reset)

    return {"call": call, "oracle_call": oracle_call}


# Multiprocessors and KiB of shared memory of a block, and T, N, I, H. A GPU's blocks are larger
# than those of tests/simt/check_tiers.py, so the shapes that lead to a layout are other ones.
# Some have so many steps that each buffer of the exchange is used again.
LAYOUTS = {
    "one block": ((1, 90), (3, 3, 2, 5)),
    "several blocks": ((5, 90), (9, 3, 2, 33)),
    "teams of rows": ((12, 90), (9, 20, 2, 9)),
    "two tiles of rows, forward": ((4, 90), (3, 12, 2, 30)),
    "two tiles of rows, backward": ((4, 90), (3, 12, 2, 60)),
    "passes": ((1, 120), (3, 70, 2, 9)),
    "groups": ((2, 120), (3, 2, 3, 150)),
    "passes and groups": ((2, 227), (9, 75, 2, 40)),
    "little shared memory": ((3, 12), (3, 2, 2, 40)),
    "large tiles": ((4, 227), (2, 31, 2, 40)),
    "registers, shared memory and more": ((60, 20), (2, 3, 2, 900)),
}
SMALL = [name for name, (_, (_, _, _, H)) in LAYOUTS.items() if H < 200]


def on(layout: str) -> dict[str, Any]:
    """The device of a layout, as options of `stand_in`."""
    multiprocessors, kib = LAYOUTS[layout][0]
    return {"device": f"{multiprocessors},{kib << 10}", "tier": "resident"}
