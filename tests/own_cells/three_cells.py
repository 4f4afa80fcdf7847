"""A plugin of pytest: the tests of all forms of layers run on three cells that are written in
Python (`rnnkern.cells`) alone. Their oracle is torch.nn, or the equations in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.register_assert_rewrite("support")

import oracle  # noqa: E402
import support  # noqa: E402
import torch  # noqa: E402
from plain_layer import PlainLayer, States  # noqa: E402
from torch import Tensor, nn  # noqa: E402

import rnnkern  # noqa: E402


class PlainMGU(PlainLayer):
    gates = 2

    @staticmethod
    def step(a: Tensor, b: Tensor, state: States, own: States) -> States:
        a_f, a_g = a.chunk(2, -1)
        b_f, b_g = b.chunk(2, -1)
        f = torch.sigmoid(a_f + b_f)
        return (state[0] + f * (torch.tanh(a_g + f * b_g) - state[0]),)


class PlainPeepholes(PlainLayer):
    gates, own, has_c = 4, ("p_i", "p_f", "p_o"), True

    @staticmethod
    def step(a: Tensor, b: Tensor, state: States, own: States) -> States:
        a_i, a_f, a_g, a_o = (a + b).chunk(4, -1)
        p_i, p_f, p_o = own
        c = torch.sigmoid(a_f + p_f * state[1]) * state[1]
        c = c + torch.sigmoid(a_i + p_i * state[1]) * torch.tanh(a_g)
        return torch.sigmoid(a_o + p_o * c) * torch.tanh(c), c


class OwnLSTM(rnnkern.Recurrent):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(rnnkern.cells.lstm, *sizes, **options)


class OwnMGU(rnnkern.Recurrent):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(rnnkern.cells.mgu, *sizes, **options)


class OwnPeepholes(rnnkern.Recurrent):
    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__(rnnkern.cells.peephole_lstm, *sizes, **options)


support.LAYERS = ("OwnLSTM", "OwnMGU", "OwnPeepholes")
support.FORMS.clear()
for module, name, plain, has_c in (
    (OwnLSTM, "lstm", nn.LSTM, True),
    (OwnMGU, "mgu", PlainMGU, False),
    (OwnPeepholes, "peephole_lstm", PlainPeepholes, True),
):
    setattr(rnnkern, module.__name__, module)
    plain.kind = getattr(rnnkern.cells, name).mode
    oracle.LAYERS[plain.kind] = oracle.Kind(plain, has_cell_state=has_c)
    support.FORMS[module.__name__] = (module.__name__, {})
    support.GATES[module.__name__] = getattr(plain, "gates", 4)
support.FORMS["OwnLSTM-proj"] = ("OwnLSTM", {"proj_size": 3})
