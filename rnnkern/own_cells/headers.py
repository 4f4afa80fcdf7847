"""The files of ``csrc`` from which libraries of cells are compiled. setup.py runs this, too."""

from __future__ import annotations

import hashlib
from pathlib import Path

SOURCES = ("cpu/kernels.cpp", "cpu/library.cpp", "cuda/scan.cu", "cuda/cell_library.cu")


def files(root: Path) -> list[Path]:
    """Those in ``csrc`` or in a copy of it: all headers that do not know Python, and `SOURCES`."""
    found = [p for folder in (".", "cells", "cpu", "cuda") for p in (root / folder).glob("*.h")]
    found += (root / "cuda").glob("*.cuh")
    return sorted(p for p in found if p.name != "list.h") + [root / name for name in SOURCES]


def digest(root: Path) -> str:
    """A digest of the names and contents of these files."""
    made = hashlib.sha256()
    for path in files(root):
        name = path.relative_to(root).as_posix()
        made.update(name.encode() + b"\0" + path.read_bytes())
    return made.hexdigest()
