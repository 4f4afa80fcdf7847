"""The notebook's comparison: own RNN and LSTM beside torch.nn's, all parameters 0.3.

    python examples/compare_notebook.py [--fast] [--cells RNN LSTM GRU]

The squared differences of the outputs and of the gradients must be about 0; each is called 10**4
times. It is what ``rnnkern compare`` begins with.
"""

# %%
from __future__ import annotations

import torch
from common import arguments, expect, plain_parser

from rnnkern.bench.compare import Options, compare_notebook
from rnnkern.bench.workloads import CELLS
from rnnkern.tolerance import NOTEBOOK_LIMIT


# %%
def main() -> None:
    made = plain_parser(__doc__)
    made.add_argument("--cells", nargs="+", choices=CELLS, default=["RNN", "LSTM"])
    options = arguments(made)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    for cell in options.cells:
        found = compare_notebook(cell, Options(quick=options.fast), torch.float32)
        print(f"{cell}: squared difference of the outputs {found.output_difference:.2g}, ", end="")
        print(f"of the gradients {found.gradient_difference:.2g}")
        print(f"    {found.runs} calls: rnnkern {found.seconds:.3f} s, ", end="")
        print(f"torch.nn {found.torch_seconds:.3f} s: {found.speedup:.1f}x")
        expect(found.ok, f"{cell}: a squared difference is not below {NOTEBOOK_LIMIT:g}")


# %%
if __name__ == "__main__":
    main()
