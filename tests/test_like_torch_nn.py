"""Whatever is done to a module of torch.nn has the same effect on one of rnnkern.

The rows are in like_torch_nn/, one file for each kind of thing that is done.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from pathlib import Path

import like_torch_nn
import pytest
import torch
from like_torch_nn import ROWS, Difference
from support import CELLS, LAYERS, torch_nn_autocasts_lstm
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, stateless

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
    "a_bias_changed_before_backward": ("all weights are saved", ["RNN", "GRU", *CELLS]),
    "backward_again_after_a_hook_has_failed": (
        "backward writes over what was saved",
        (*LAYERS, *CELLS),
    ),
    "operands_with_other_memory": ("the operands themselves are saved", (*LAYERS, *CELLS)),
    "an_input_changed_that_backward_does_not_need": (
        "the input is saved",
        ["RNN", "GRU", *CELLS],
    ),
    "packed_and_wrong": (
        "torch.nn does not compare states with a packed sequence, and may read past their end",
        ["LSTM"],
    ),
}
OF_SOME_CPUS: dict[str, Difference] = dict.fromkeys(
    ("within-autocast", "within-autocast-without-cache"),
    ("torch.nn's raises on x86-64 without AVX-512", ["LSTM"]),
)


class _Plain:
    number: int


OF_EVERY_CLASS = {*dir(_Plain)}
# What no row names, because nothing of a recurrent module can reach it, or because rows do it
# without its name.
UNNAMED = {
    "what has another name": {
        *("__delattr__", "__dir__", "__repr__"),
        *("_call_impl", "_wrapped_call_impl", "_compiled_call_impl", "_slow_forward"),
        *("_get_backward_hooks", "_get_backward_pre_hooks", "_named_members"),
        *("_maybe_warn_non_full_backward_hook", "_register_load_state_dict_pre_hook"),
        *("_init_flat_weights", "clip_grad_norm", "bind", "PackedSequence_", "ParametrizationList"),
        *("BasePruningMethod", "CustomFromMask", "LnStructured", "PruningContainer"),
        *("RandomStructured", "RandomUnstructured", "NamedMemberAccessor"),
    },
    "a type or a constant": {"T_destination", "call_super_init", "dump_patches"},
    "no module": {"invert_permutation", "pad_sequence"},
    "other modules": {
        *("convert_conv3d_weight_memory_format", "fuse_conv_bn_eval", "fuse_conv_bn_weights"),
        *("fuse_linear_bn_eval", "fuse_linear_bn_weights"),
    },
}


def test_every_member_and_function_of_torch_is_named() -> None:
    """In the files of the rows or above. Another torch than 2.13 may have more, or fewer."""
    folder = Path(like_torch_nn.__path__[0])
    words = set(re.findall(r"\w+", "".join(file.read_text() for file in folder.glob("*.py"))))
    wanted = {name for kind in (*LAYERS, *CELLS) for name in dir(getattr(nn, kind))}
    for module in (nn.utils, parametrizations, parametrize, prune, nn.utils.rnn, stateless):
        wanted |= {
            name
            for name, value in vars(module).items()
            if getattr(value, "__module__", "").startswith("torch.nn.utils")
            and not name.startswith("_")
        }
    wanted = {name for name in wanted if not name.startswith("___")}  # which Dynamo adds
    unnamed = set().union(*UNNAMED.values())
    if torch.__version__.startswith("2.13"):
        assert wanted - words - OF_EVERY_CLASS <= unnamed
        assert unnamed <= wanted
    assert len(wanted & words) > 100


@pytest.mark.parametrize("row", ROWS)
def test_as_torch_nn(row: str) -> None:
    ROWS.check(row, DIFFERENCES | ({} if torch_nn_autocasts_lstm() else OF_SOME_CPUS))
