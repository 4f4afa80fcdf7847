"""Whatever is done to a module of torch.nn has the same effect on one of rnnkern.

The rows are in like_torch_nn/, one file for each kind of thing that is done.
"""

from __future__ import annotations

import importlib
import pkgutil

import like_torch_nn
import pytest
from like_torch_nn import ROWS, Difference
from support import CELLS, LAYERS

for _file in pkgutil.iter_modules(like_torch_nn.__path__):
    importlib.import_module(f"like_torch_nn.{_file.name}")

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

# What is not alike, by row: the reason, and the kinds of module.
DIFFERENCES: dict[str, Difference] = {
    "results-resized-to-more": ("small results are not torch's memory", (*LAYERS, *CELLS)),
    "hooks_of_outputs": ("h' is not computed from the c' that is returned", ["LSTMCell"]),
    "hooks_of_an_output_without_gradient": (
        "all outputs are of one node, whose hooks autograd calls",
        [*LAYERS, "LSTMCell"],
    ),
    "checks_of_the_instance": ("torch.nn's forward calls them, the plain call does not", LAYERS),
    "a_weight_changed_that_backward_does_not_need": (
        "all weights are saved",
        ["RNN", "GRU", *CELLS],
    ),
    "an_input_changed_that_backward_does_not_need": (
        "the input is saved",
        ["RNN", "GRU", *CELLS],
    ),
    "packed_and_wrong": (
        "torch.nn does not compare states with a packed sequence, and may read past their end",
        ["LSTM"],
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_as_torch_nn(row: str) -> None:
    ROWS.check(row, DIFFERENCES)
