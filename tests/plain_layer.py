"""A stack of layers of any cell in plain PyTorch, from the equations of one step: the oracle of the
cells that torch.nn does not have.
"""

from __future__ import annotations

from typing import Any

import oracle
import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, linear
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

States = tuple[Tensor, ...]


class PlainLayer(nn.RNNBase):
    """Layers of a cell, with the options of torch.nn. A subclass gives the attributes and the step.

    Attributes:
        kind: the mode of the cell.
        gates: the number of gates.
        own: the names of the cell's own parameters.
        has_c: there is a cell state.
    """

    kind: str
    gates: int
    own: tuple[str, ...] = ()
    has_c = False

    def __init__(self, *sizes: int, **options: Any) -> None:
        super().__init__("RNN_TANH", *sizes, **options)
        for names in self._all_weights:
            suffix = names[0].removeprefix("weight_ih")
            for name in names:
                if not name.startswith("weight_hr"):
                    weight = getattr(self, name)
                    weight.data = weight.new_empty(self.gates * self.hidden_size, *weight.shape[1:])
            for own in self.own:
                setattr(self, own + suffix, nn.Parameter(torch.empty(self.hidden_size)))
        self.mode = self.kind
        self.reset_parameters()

    def flatten_parameters(self) -> None:
        pass

    @staticmethod
    def step(a: Tensor, b: Tensor, state: States, own: States) -> States:
        """The state after one step, with ``a = W_ih x + b_ih`` and ``b = W_hh h + b_hh``, both
        ``[N, gates * H]``. ``own`` are the cell's own parameters.
        """
        raise NotImplementedError

    def forward(self, x: Any, hx: Any = None) -> Any:
        if isinstance(x, PackedSequence):
            return self._packed(x, hx)
        states = (hx,) if isinstance(hx, Tensor) else hx
        if x.dim() == 2:
            batch = 0 if self.batch_first else 1
            states = None if states is None else [state.unsqueeze(1) for state in states]
            y, *ends = self._layers(x.unsqueeze(batch), states)
            y, ends = y.squeeze(batch), [end.squeeze(1) for end in ends]
        else:
            y, *ends = self._layers(x, states)
        return y, tuple(ends) if self.has_c else ends[0]

    def _layers(self, x: Tensor, states: Any) -> States:
        if self.batch_first:
            x = x.transpose(0, 1)
        D = 2 if self.bidirectional else 1
        if states is None:
            states = [
                x.new_zeros(self.num_layers * D, x.shape[1], self.proj_size or self.hidden_size)
            ]
            states += [x.new_zeros(*states[0].shape[:2], self.hidden_size)] * self.has_c
        lasts = []
        for layer in range(self.num_layers):
            if layer:
                x = dropout(x, self.dropout, self.training)
            outputs = []
            for k in range(layer * D, layer * D + D):
                y, last = self._direction(k, x, tuple(s[k] for s in states), k % D == 1)
                outputs.append(y)
                lasts.append(last)
            x = torch.cat(outputs, -1)
        ends = tuple(torch.stack(parts) for parts in zip(*lasts, strict=True))
        return (x.transpose(0, 1) if self.batch_first else x, *ends)

    def _direction(
        self, k: int, x: Tensor, state: States, backwards: bool
    ) -> tuple[Tensor, States]:
        names = self._all_weights[k]
        w_ih, w_hh, *rest = (getattr(self, name) for name in names)
        b_ih, b_hh = rest[:2] if self.bias else (None, None)
        own = tuple(getattr(self, o + names[0].removeprefix("weight_ih")) for o in self.own)
        outputs = []
        for step in x.flip(0) if backwards else x:
            state = self.step(linear(step, w_ih, b_ih), linear(state[0], w_hh, b_hh), state, own)
            if self.proj_size:
                state = (linear(state[0], rest[-1]), *state[1:])
            outputs.append(state[0])
        return torch.stack(outputs[::-1] if backwards else outputs), state

    def _packed(self, packed: PackedSequence, hx: Any) -> Any:
        x, lengths = pad_packed_sequence(packed, self.batch_first)
        y, states = oracle.run(self, x, hx, lengths)
        rows = y.transpose(0, 1) if self.batch_first else y
        if packed.sorted_indices is not None:
            rows = rows[:, packed.sorted_indices]
        data = torch.cat([rows[t, :n] for t, n in enumerate(packed.batch_sizes.tolist())])
        return packed._replace(data=data), states
