"""A plugin of pytest: the tests of all forms of all layers run on the toy cell alone, and their
oracle is its equations in plain PyTorch.
"""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("support")

import oracle  # noqa: E402
import support  # noqa: E402
import torch  # noqa: E402
from plain_layer import PlainLayer, States  # noqa: E402
from torch import Tensor  # noqa: E402

import rnnkern  # noqa: E402
from rnnkern import modules  # noqa: E402

MODE = "COUPLED"


class CoupledLSTM(PlainLayer):
    """What `tests/toy_cell/coupled_lstm.h` says."""

    kind, gates, has_c = MODE, 3, True

    @staticmethod
    def step(a: Tensor, b: Tensor, state: States, own: States) -> States:
        f, g, o = (a + b).chunk(3, -1)
        f = torch.sigmoid(f)
        c = f * state[1] + (1 - f) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


rnnkern.CoupledLSTM = modules.CoupledLSTM
oracle.LAYERS[MODE] = oracle.Kind(CoupledLSTM, has_cell_state=True)
support.LAYERS = ("CoupledLSTM",)
support.FORMS.clear()
support.FORMS["CoupledLSTM"] = ("CoupledLSTM", {})
support.FORMS["CoupledLSTM-proj"] = ("CoupledLSTM", {"proj_size": 3})
