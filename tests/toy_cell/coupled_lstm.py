"""A plugin of pytest: the tests of all forms of all layers run on the toy cell alone, and their
oracle is its equations in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.register_assert_rewrite("support")

import oracle  # noqa: E402
import support  # noqa: E402
import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.functional import dropout, linear  # noqa: E402
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence  # noqa: E402

import rnnkern  # noqa: E402
from rnnkern import modules  # noqa: E402

MODE = "COUPLED"


class CoupledLSTM(nn.RNNBase):
    """What `tests/toy_cell/coupled_lstm.h` says, with the options of ``torch.nn.LSTM``."""

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__("GRU", *sizes, **options)  # three gates as well
        self.mode = MODE

    def forward(self, x: Any, hx: Any = None) -> Any:
        if isinstance(x, PackedSequence):
            return self._packed(x, hx)
        if x.dim() == 2:
            batch = 0 if self.batch_first else 1
            states = None if hx is None else tuple(state.unsqueeze(1) for state in hx)
            y, states = self(x.unsqueeze(batch), states)
            return y.squeeze(batch), tuple(state.squeeze(1) for state in states)
        if self.batch_first:
            x = x.transpose(0, 1)
        h, c = hx or oracle.zeros(self, x)
        D = 2 if self.bidirectional else 1
        lasts = []
        for layer in range(self.num_layers):
            if layer:
                x = dropout(x, self.dropout, self.training)
            outputs = []
            for k in range(layer * D, layer * D + D):
                y, *last = self._direction(k, x, h[k], c[k], backwards=k % D == 1)
                outputs.append(y)
                lasts.append(last)
            x = torch.cat(outputs, -1)
        states = tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))
        return x.transpose(0, 1) if self.batch_first else x, states

    def _direction(
        self, k: int, x: Tensor, h: Tensor, c: Tensor, *, backwards: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = [getattr(self, name) for name in self._all_weights[k]]
        w_ih, w_hh, *biases = weights[: 4 if self.bias else 2]
        b_ih, b_hh = biases or (None, None)
        outputs = []
        for step in x.flip(0) if backwards else x:
            f, g, o = (linear(step, w_ih, b_ih) + linear(h, w_hh, b_hh)).chunk(3, -1)
            f = torch.sigmoid(f)
            c = f * c + (1 - f) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            if self.proj_size:
                h = linear(h, weights[-1])
            outputs.append(h)
        return torch.stack(outputs[::-1] if backwards else outputs), h, c

    def _packed(self, packed: PackedSequence, hx: Any) -> Any:
        x, lengths = pad_packed_sequence(packed, self.batch_first)
        y, states = oracle.run(self, x, hx, lengths)
        rows = y.transpose(0, 1) if self.batch_first else y
        if packed.sorted_indices is not None:
            rows = rows[:, packed.sorted_indices]
        data = torch.cat([rows[t, :n] for t, n in enumerate(packed.batch_sizes.tolist())])
        return packed._replace(data=data), states


rnnkern.CoupledLSTM = modules.CoupledLSTM
oracle.LAYERS[MODE] = oracle.Kind(CoupledLSTM, has_cell_state=True)
support.LAYERS = ("CoupledLSTM",)
support.FORMS.clear()
support.FORMS["CoupledLSTM"] = ("CoupledLSTM", {})
support.FORMS["CoupledLSTM-proj"] = ("CoupledLSTM", {"proj_size": 3})
