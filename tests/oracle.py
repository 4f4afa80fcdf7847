"""What the right answer is: torch.nn in float64, one row and one episode at a time.

Nothing here knows rnnkern. `twin` builds torch.nn's own module with the weights of a given one;
`run` carries out `lengths` and `reset` by cutting every row into sequences of its own and running
torch.nn on each of them alone.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

States: TypeAlias = tuple[Tensor, ...]


class Kind(NamedTuple):
    """What runs the layers of a mode, and whether its state is ``(h, c)``."""

    module: type[nn.Module]
    has_cell_state: bool = False


LAYERS = {
    "RNN_TANH": Kind(nn.RNN),
    "RNN_RELU": Kind(nn.RNN),
    "LSTM": Kind(nn.LSTM, has_cell_state=True),
    "GRU": Kind(nn.GRU),
}
_CELLS = (nn.RNNCell, nn.LSTMCell, nn.GRUCell)


def twin(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """torch.nn's module with the options and the weights of `module`, computing in `dtype`."""
    if isinstance(module, nn.RNNBase):
        options = {
            name: getattr(module, name)
            for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
        }
        if module.mode.startswith("RNN"):
            options["nonlinearity"] = module.mode[4:].lower()
        if module.proj_size:
            options["proj_size"] = module.proj_size
        kind = LAYERS[module.mode].module
    else:
        assert isinstance(module, nn.RNNCellBase)
        options = {"bias": module.bias}
        if isinstance(module, nn.RNNCell):
            options["nonlinearity"] = module.nonlinearity
        kind = next(kind for kind in _CELLS if isinstance(module, kind))
    copy = kind(module.input_size, module.hidden_size, **options)
    weights = {name: getattr(module, name).detach() for name in copy.state_dict()}
    first = next(iter(weights.values()))
    copy.to(first.device, dtype or first.dtype).load_state_dict(weights)
    for name, parameter in copy.named_parameters():
        parameter.requires_grad_(getattr(module, name).requires_grad)
    return copy.train(module.training)


def run(
    module: nn.Module,
    x: Tensor,
    hx: Tensor | States | None = None,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor | States]:
    """`module(x, hx)` where row n ends after `lengths[n]` steps and an episode begins where `reset`
    is true.
    """
    assert isinstance(module, nn.RNNBase)
    if lengths is None and reset is None:
        return module(x, hx)
    batched = x.dim() == 3
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    if not batched:
        x, states = x.unsqueeze(1), tuple(state.unsqueeze(1) for state in states)
        reset = None if reset is None else reset.unsqueeze(1)
        lengths = None if lengths is None else lengths.reshape(1)
    elif module.batch_first:
        x = x.transpose(0, 1)
        reset = None if reset is None else reset.transpose(0, 1)
    T, N = x.shape[:2]
    states = states or zeros(module, x)
    outputs, lasts = [], []
    for n in range(N):
        end = T if lengths is None else int(lengths[n])
        begins = [False] * T if reset is None else reset[:, n].tolist()
        y, last = _row(module, x[:end, n], tuple(state[:, n] for state in states), begins)
        outputs.append(torch.cat([y, y.new_zeros(T - end, y.shape[1])]))
        lasts.append(last)
    output = torch.stack(outputs, 1)
    ends = tuple(torch.stack(of_rows, 1) for of_rows in zip(*lasts, strict=True))
    if not batched:
        output, ends = output.squeeze(1), tuple(state.squeeze(1) for state in ends)
    elif module.batch_first:
        output = output.transpose(0, 1)
    return output, ends if has_cell_state(module) else ends[0]


def _row(
    module: nn.RNNBase, x: Tensor, states: States, begins: list[bool]
) -> tuple[Tensor, States]:
    """One row: `x` is [length, I], the states are [layers * directions, size]."""
    length = x.shape[0]
    directions = 2 if module.bidirectional else 1
    if length == 0:
        width = directions * (module.proj_size or module.hidden_size)
        return x.new_zeros(0, width), states
    forward = (torch.arange(module.num_layers * directions) % directions == 0).unsqueeze(1)
    cuts = [0, *(t for t in range(1, length) if begins[t]), length]
    outputs, forward_end, reverse_end = [], states, states
    for begin, end in pairwise(cuts):
        enters = forward & (begin == 0 and not begins[0]) | ~forward & (end == length)
        start = tuple(torch.where(enters, state, torch.zeros_like(state)) for state in states)
        y, last = module(x[begin:end], start if has_cell_state(module) else start[0])
        outputs.append(y)
        forward_end = (last,) if isinstance(last, Tensor) else last
        if begin == 0:
            reverse_end = forward_end
    lasts = zip(forward_end, reverse_end, strict=True)
    return torch.cat(outputs), tuple(torch.where(forward, ahead, back) for ahead, back in lasts)


class _Tf32Product(torch.autograd.Function):
    """``x @ w.T`` of operands that are rounded to TF32, forward and backward."""

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return tf32(x) @ tf32(w).T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        (dy,) = gradients
        rows = dy.reshape(-1, dy.shape[-1])
        dw = tf32(rows).T @ tf32(x.reshape(-1, x.shape[-1]))
        return tf32(dy) @ tf32(w), dw


def tf32(x: Tensor) -> Tensor:
    """To 10 bits behind the point, to the nearest."""
    bits = x.float().view(torch.int32) + 0x1000 & ~0x1FFF
    return bits.view(torch.float32).to(x.dtype)


def run_as_tf32(
    module: nn.RNNBase, x: Tensor, hx: Tensor | States | None = None
) -> tuple[Tensor, Tensor | States]:
    """`module(x, hx)`, one layer in one direction, as exactly as products of TF32 allow."""
    product = _Tf32Product.apply
    w_ih, w_hh = module.weight_ih_l0, module.weight_hh_l0
    states = () if hx is None else (hx,) if isinstance(hx, Tensor) else tuple(hx)
    h, *c = (state[0] for state in states or zeros(module, x))
    outputs = []
    for inputs in product(x, w_ih) + module.bias_ih_l0:
        recurrent = product(h, w_hh) + module.bias_hh_l0
        if module.mode == "LSTM":
            i, f, g, o = (inputs + recurrent).chunk(4, 1)
            c = [f.sigmoid() * c[0] + i.sigmoid() * g.tanh()]
            h = o.sigmoid() * c[0].tanh()
        elif module.mode == "GRU":
            of_inputs, of_h = inputs.chunk(3, 1), recurrent.chunk(3, 1)
            r, z = ((a + b).sigmoid() for a, b in zip(of_inputs[:2], of_h[:2], strict=True))
            h = (1 - z) * (of_inputs[2] + r * of_h[2]).tanh() + z * h
        else:
            h = (inputs + recurrent).tanh()
        outputs.append(h)
    last = tuple(state.unsqueeze(0) for state in (h, *c))
    return torch.stack(outputs), last if has_cell_state(module) else last[0]


def has_cell_state(module: nn.Module) -> bool:
    """Whether the state of a layer or of a cell is a tuple."""
    if isinstance(module, nn.RNNBase):
        return LAYERS[module.mode].has_cell_state
    return isinstance(module, nn.LSTMCell)


def zeros(module: nn.RNNBase, x: Tensor) -> States:
    count = module.num_layers * (2 if module.bidirectional else 1)
    h = x.new_zeros(count, x.shape[1], module.proj_size or module.hidden_size)
    c = x.new_zeros(count, x.shape[1], module.hidden_size)
    return (h, c) if has_cell_state(module) else (h,)
