"""Writes a ``cells/list.h`` of generated cells for the programs of tests/any_gates, which check the
drivers of the CPU and, on the stand-in, those for CUDA: relu of weighted sums, as there by hand.

Usage: python tests/own_cells/weighted_sums.py FILE
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import rnnkern

GATES_AND_SLOTS = ((1, 1), (4, 4), (1, 2), (3, 5), (5, 8))

HEADER = """#pragma once

#include <array>

#include "cells/cell.h"
#include "cells/functions.h"

namespace rnnkern {
namespace RNNKERN_NAMESPACE {

constexpr double weight_of(int slot) { return 1 + slot; }
"""


def struct(gates: int, slots: int) -> str:
    """A cell whose h is relu of the sum of (1 + k) times slot k; the last gates have two slots."""
    names = tuple(f"g{k}" for k in range(gates))
    apart = slots - gates
    whole, split = names[: gates - apart], names[gates - apart :]

    def weighted_sum(x: Any, h: Any, prev: Any) -> Any:
        values = [getattr(h, name) for name in split]
        values += [getattr(x, name) + getattr(h, name) for name in whole]
        values += [getattr(x, name) for name in split]
        total = values[0]
        for k, value in enumerate(values[1:], 1):
            total = total + (1 + k) * value
        return rnnkern.relu(total)

    source = rnnkern.cell(gates=names)(weighted_sum).source
    found = re.search(r"struct OwnCell \{.*?\n\};\n", source, re.DOTALL)
    assert found is not None
    return found[0].replace("OwnCell", f"WeightedSum{gates}{slots}")


def main() -> None:
    structs = "\n".join(struct(*each) for each in GATES_AND_SLOTS)
    names = ", ".join(f"WeightedSum{gates}{slots}" for gates, slots in GATES_AND_SLOTS)
    end = "}  // namespace RNNKERN_NAMESPACE\n}  // namespace rnnkern\n"
    Path(sys.argv[1]).write_text(f"{HEADER}\n{structs}\nusing Cells = CellList<{names}>;\n\n{end}")


if __name__ == "__main__":
    main()
