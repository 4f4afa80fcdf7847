"""The notebook's comparison: own RNN and LSTM beside torch.nn's, all parameters 0.3.

    python examples/compare_notebook.py [--fast] [--cells RNN LSTM GRU]

The squared difference of the outputs must be about 0; then each is called 10**4 times. It is what
``rnnkern compare`` begins with.
"""

# %%
from __future__ import annotations

import torch
from common import arguments, fail, parser

from rnnkern.compare import Options, compare_notebook
from rnnkern.workloads import CELLS

LARGEST = 1e-10  # of the squared difference


# %%
def main() -> None:
    made = parser(__doc__)
    made.add_argument("--cells", nargs="+", default=["RNN", "LSTM"], help=f"of {', '.join(CELLS)}")
    options = arguments(made)
    if unknown := sorted(set(options.cells) - set(CELLS)):
        fail(f"unknown cell {', '.join(unknown)}: choose from {', '.join(CELLS)}")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for cell in options.cells:
        found = compare_notebook(cell, Options(quick=options.fast), torch.float32)
        print(f"{cell}: squared difference of the outputs {found.output_difference:.2g}")
        print(f"    {found.runs} calls: rnnkern {found.seconds:.3f} s, ", end="")
        print(f"torch.nn {found.torch_seconds:.3f} s: {found.speedup:.1f}x")
        assert found.output_difference < LARGEST, "the outputs differ"


# %%
if __name__ == "__main__":
    main()
