"""Writes measured constants into the table that the plan of the CUDA kernels reads.

    python -m benchmarks.gpu.kinds benchmarks/results/gpu-h200-constants.json

The row of the device's compute capability in csrc/cuda/kinds.h is replaced.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

TABLE = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "kinds.h"


def row_of(measured: dict[str, Any]) -> tuple[tuple[int, int], str]:
    """The compute capability and the row of a device.

    Raises:
        KeyError: naming a constant that has not been measured.
    """
    device = measured["device"]
    constants = {entry["name"]: float(entry["value"]) for entry in measured["constants"]}
    capability = device["major"], device["minor"]
    count = device["multiprocessors"]
    clock_ghz = device["clock_khz"] / 1e6
    # With a state that is stored before the flag, because a fence takes longer while stores are in
    # flight. The plan counts the reading of the state itself: here 8 KB at 64 bytes a clock.
    hand_off = constants[f"gather_flags_relaxed_n16_h256_{count}"] - 8192 / 64 / clock_ghz / 1e3
    # By values, as far as pieces of 16 bytes are like them, of which 12 are data.
    by_value = constants[f"gather_words_of_16_n16_h256_{count}"] - 10923 / 64 / clock_ghz / 1e3
    numbers = (
        clock_ghz,
        constants["l2_read_by_all_16_mib"] / 1e3,
        device["l2_bytes"] / 1e6,
        constants["memory_read"] / 1e3,
        hand_off,
        by_value,
        constants[f"launch_kernel_{count}_blocks"],
    )
    texts = [*map(str, capability), *(f"{number:.3g}" for number in numbers)]
    return capability, f"    {{{', '.join(texts)}}},  // {device['name']}, measured"


def replaced(table: str, measured: dict[str, Any]) -> str:
    """The table with that device's row.

    Raises:
        ValueError: the table has no row of its compute capability.
    """
    (major, minor), row = row_of(measured)
    text, count = re.subn(rf"^    \{{{major}, {minor}, .*$", row, table, flags=re.MULTILINE)
    if count != 1:
        raise ValueError(f"{TABLE.name} has {count} rows of compute capability {major}.{minor}")
    return text


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("constants", type=Path, help="what benchmarks/gpu/constants.cu has written")
    measured = json.loads(parser.parse_args().constants.read_text(encoding="utf-8"))
    TABLE.write_text(replaced(TABLE.read_text(encoding="utf-8"), measured), encoding="utf-8")
    print(f"written: {TABLE}; tests/test_cuda_plan.py says what the plans are now")


if __name__ == "__main__":
    main()
