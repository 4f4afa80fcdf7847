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

_MODE = "a cell has an attribute `mode` of its own"
_CHECKS = "torch.nn's forward calls it, the plain call does not"
_FLAT = "weights are read by their names"

# What is not alike, by row: the reason, and the kinds of module.
DIFFERENCES: dict[str, Difference] = {
    "public_names_of_the_class": (_MODE, CELLS),
    "names_of_an_instance": (_MODE, CELLS),
    "attributes_of_ones_own": (_MODE, CELLS),
    "sizes_changed_afterwards": ("the plain call does not look at input_size", LAYERS),
    "results-resized-to-more": ("small results are not torch's memory", (*LAYERS, *CELLS)),
    "hooks_of_outputs": ("h' is not computed from the c' that is returned", ["LSTMCell"]),
    "override-check-forward-args": (_CHECKS, LAYERS),
    "override-check-forward-args-to-refuse": (_CHECKS, LAYERS),
    "override-check-input": (_CHECKS, LAYERS),
    "override-check-input-to-refuse": (_CHECKS, LAYERS),
    "override-check-hidden-size-to-refuse": (_CHECKS, LAYERS),
    "override-permute-hidden": (_CHECKS, LAYERS),
    "override-expected-hidden-size": (_CHECKS, LAYERS),
    "override-expected-cell-size": (_CHECKS, LAYERS),
    "override-update-flat-weights": (_CHECKS, LAYERS),
    "checks_of_the_instance": (_CHECKS, LAYERS),
    "a_weight_changed_that_backward_does_not_need": (
        "all weights are saved",
        ["RNN", "GRU", *CELLS],
    ),
    "flat_weights_swapped": (_FLAT, LAYERS),
    "flat_weights_changed_in_place": (_FLAT, LAYERS),
    "weights_that_shadow_parameters": (_FLAT, LAYERS),
    "parts_of_an_output_changed": ("the output itself is saved", ["RNN", "GRU"]),
    "outputs_changed_before_backward": ("the output itself is saved", ["RNN", "GRU"]),
    "hooks_see_what_is_saved": (
        "backward writes over what was saved",
        ["LSTM", "GRU", "LSTMCell", "GRUCell"],
    ),
    "how_often_parametrizations_are_evaluated": ("once; torch.nn looks several times", LAYERS),
    "fx_symbolic_trace": (
        "torch.fx traces into modules that are not of the package torch.nn",
        (*LAYERS, *CELLS),
    ),
    "jit_script": ("TorchScript cannot compile what finds the kernel", (*LAYERS, *CELLS)),
    "dynamic_quantization": (
        "torch.ao looks modules up by their exact type",
        (*LAYERS, *CELLS),
    ),
}


@pytest.mark.parametrize("row", ROWS)
def test_as_torch_nn(row: str) -> None:
    ROWS.check(row, DIFFERENCES)
