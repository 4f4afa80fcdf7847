"""Cells that a user writes as Python functions, and how they become kernels.

`cell` is the decorator. A function is called once on symbols (`trace`, `expression`), its
derivatives are expressions as well (`derive`), `generate` writes all of them as the struct of a
cell (`csrc/cells/cell.h`), and `build` compiles that into a cached library. `recurrent` is the
module that runs such a cell.
"""

from rnnkern.own_cells.cell import OwnCell, cell
from rnnkern.own_cells.expression import CellError

__all__ = ["CellError", "OwnCell", "cell"]
