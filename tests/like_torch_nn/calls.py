"""Arguments of a call, right and wrong."""

from __future__ import annotations

from typing import Any

import torch
from support import CELLS, LAYERS, flatten
from torch import nn
from torch.nn.utils.rnn import (
    PackedSequence,
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    unpack_sequence,
    unpad_sequence,
)

from like_torch_nn import (
    ROWS,
    H,
    I,
    N,
    Row,
    Side,
    T,
    attempt,
    drawn,
    each_state,
    gradients,
    loss_of,
    warned,
)

ARGUMENTS: dict[str, Row] = {
    "keywords": lambda s: s.make()(input=s.x(), hx=s.hx()),
    "keywords-turned": lambda s: s.make()(hx=s.hx(), input=s.x()),
    "none": lambda s: s.make()(s.x(), None),
    "forward": lambda s: s.make().forward(s.x(), s.hx()),
    "forward-of-the-class": lambda s: s.type.forward(s.make(), s.x()),
    "list-state": lambda s: s.make()(s.x(), list(s.hx()) if s.kind.startswith("LSTM") else s.hx()),
    "a-parameter": lambda s: s.make()(nn.Parameter(s.x())),
    "a-leaf": lambda s: s.make()(s.x().requires_grad_()),
    "transposed": lambda s: s.make()(s.x().transpose(0, 1).contiguous().transpose(0, 1)),
    "expanded": lambda s: s.make()(s.x()[:1].expand(5, *s.x().shape[1:])),
    "sliced": lambda s: s.make()(drawn(1, *s.x().shape[:-1], 9)[..., 2 : 2 + I]),
    "conjugated-and-back": lambda s: s.make()(s.x(dtype=torch.complex64).conj().real),
    "negated": lambda s: s.make()(s.x(dtype=torch.complex64).conj().imag),
    "negated-view": lambda s: s.make()(torch._neg_view(s.x())),
    "zero-rows": lambda s: s.make()(s.x()[..., :0, :]),
    "one-row": lambda s: s.make()(s.x()[..., :1, :]),
    "inputs-of-nan": lambda s: s.make()(s.x() * float("nan")),
    "inputs-of-infinity": lambda s: s.make()(s.x() / 0),
}
ARGUMENTS_OF_LAYERS: dict[str, Row] = {
    "unbatched": lambda s: s.make()(s.x(T, I)),
    "unbatched-with-state": lambda s: s.make()(s.x(T, I), s.hx(1, H)),
    "unbatched-batch-first": lambda s: s.make(batch_first=True)(s.x(T, I), s.hx(1, H)),
    "one-step": lambda s: s.make()(s.x(1, N, I)),
    "batch-first": lambda s: s.make(batch_first=True)(s.x(N, T, I), s.hx()),
    "state-of-one-layer-too-few": lambda s: attempt(lambda: s.make(num_layers=2)(s.x(), s.hx())),
    "state-expanded": lambda s: s.make()(
        s.x(), each_state(s.hx(1, 1, H), lambda h: h.expand(1, N, H))
    ),
}
ARGUMENTS_OF_CELLS: dict[str, Row] = {
    "one-row-1d": lambda s: s.make()(s.x(I)),
    "one-row-1d-with-state": lambda s: s.make()(s.x(I), s.hx(H)),
    "a-bias-less": lambda s: s.make(bias=False)(s.x(), s.hx()),
}

WRONG: dict[str, Row] = {
    "0-D": lambda s: s.make()(torch.tensor(1.0)),
    "4-D": lambda s: s.make()(s.x(1, T, N, I)),
    "features": lambda s: s.make()(s.x(*s.x().shape[:-1], 7)),
    "float64": lambda s: s.make()(s.x(dtype=torch.float64)),
    "int64": lambda s: s.make()(s.x(dtype=torch.int64)),
    "complex": lambda s: s.make()(s.x(dtype=torch.complex64)),
    "meta": lambda s: s.make()(s.x(device="meta")),
    "sparse": lambda s: s.make()(s.x().to_sparse()),
    "a-list": lambda s: s.make()([1.0, 2.0]),
    "none": lambda s: s.make()(None),
    "no-argument": lambda s: s.make()(),
    "three-arguments": lambda s: s.make()(s.x(), s.hx(), 1),
    "unknown-keyword": lambda s: s.make()(s.x(), foo=1),
    "twice": lambda s: s.make()(s.x(), input=s.x()),
    "state-size": lambda s: s.make()(s.x(), s.hx(*((1,) if s.is_layer else ()), N, 5)),
    "state-rows": lambda s: s.make()(s.x(), s.hx(*((1,) if s.is_layer else ()), 3, H)),
    "state-4-D": lambda s: s.make()(s.x(), s.hx(1, 1, N, H)),
    "state-float64": lambda s: s.make()(s.x(), s.hx(dtype=torch.float64)),
    "state-number": lambda s: s.make()(s.x(), 0.0),
    "state-string": lambda s: s.make()(s.x(), "ab"),
    "state-of-three": lambda s: s.make()(s.x(), (s.x(), s.x(), s.x())),
    "no-steps": lambda s: s.make()(s.x()[:0]),
}


def gradients_too(row: Row) -> Row:
    def run(side: Side) -> Any:
        outputs = row(side)
        loss = loss_of(outputs) if len(outputs) else None
        if loss is not None and loss.requires_grad:
            loss.backward()
        return outputs, [tuple(y.stride()) for y in flatten(outputs).values()]

    return run


def attempted(row: Row) -> Row:
    return lambda side: warned(lambda: row(side))


ROWS.add({f"call-{name}": gradients_too(row) for name, row in ARGUMENTS.items()})
ROWS.add({f"call-{n}": attempted(row) for n, row in ARGUMENTS_OF_LAYERS.items()}, *LAYERS)
ROWS.add({f"call-{n}": gradients_too(row) for n, row in ARGUMENTS_OF_CELLS.items()}, *CELLS)
ROWS.add({f"wrong-{name}": attempted(row) for name, row in WRONG.items()})


@ROWS.row()
def types_of_the_results(side: Side) -> Any:
    outputs = side.make()(side.x())
    seen = flatten(outputs).values()
    return (
        type(outputs).__name__,
        [(y.is_contiguous(), y.requires_grad, y.is_leaf, y.layout, y._is_view()) for y in seen],
    )


@ROWS.row()
def the_input_is_not_written_to(side: Side) -> Any:
    x, hx = side.x(), side.hx()
    before = x._version
    side.make()(x, hx)
    return x, hx, x._version == before


@ROWS.row()
def gradients_of_input_and_state(side: Side) -> Any:
    x, hx = side.x().requires_grad_(), each_state(side.hx(), lambda h: h.requires_grad_())
    states = list(hx) if isinstance(hx, tuple) else [hx]
    return list(torch.autograd.grad(loss_of(side.make()(x, hx)), [x, *states]))


@ROWS.row()
def the_state_given_on(side: Side) -> Any:
    """Truncated backpropagation: a stream of calls."""
    module, state = side.make(), None
    for step in range(3):
        outputs = module(drawn(step, *side.x().shape), state)
        state = outputs[1] if side.is_layer else outputs
        if step == 0:
            state = each_state(state, lambda h: h.detach())
    return outputs, gradients(module, flatten(outputs))


@ROWS.row(*CELLS)
def a_cell_without_units(side: Side) -> Any:
    module, x = side.make(I, 0), side.x().requires_grad_()
    loss = loss_of(module(x))
    loss.backward()
    return loss, x.grad, [p.grad for p in module.parameters()]


@ROWS.row("LSTMCell")
def both_states_of_a_row_in_one_tensor(side: Side) -> Any:
    """torch.nn takes its two rows apart. Of a batch it is no state."""
    module = side.make()
    return (
        module(side.x(I), side.x(2, H)),
        isinstance(attempt(lambda: module(side.x(), side.x(2, N, H))), Exception),
    )


@ROWS.row(*LAYERS)
def packed_sequences(side: Side) -> Any:
    module, x = side.make(bidirectional=True), side.x()
    lengths = torch.tensor([3, 5])
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    outputs, state = module(packed)
    padded = pad_packed_sequence(outputs, total_length=7, padding_value=-1.0)
    rows = unpack_sequence(outputs)
    rows += unpad_sequence(*pad_packed_sequence(outputs))
    fields = outputs.batch_sizes, outputs.sorted_indices, outputs.unsorted_indices
    return type(outputs).__name__, padded, rows, fields, state, outputs.is_pinned()


@ROWS.row(*LAYERS)
def packed_sequences_moved(side: Side) -> Any:
    packed = pack_sequence([side.x(5, I), side.x(2, I)])
    module = side.make()
    before = flatten(module(packed))
    return before, flatten(module.double()(packed.to(torch.float64))), packed.double().data.dtype


@ROWS.row(*LAYERS)
def packed_with_a_state(side: Side) -> Any:
    packed = pack_sequence([side.x(2, I), side.x(5, I)], enforce_sorted=False)
    outputs, state = side.make()(packed, side.hx())
    return outputs.data, state


@ROWS.row(*LAYERS)
def packed_and_wrong(side: Side) -> Any:
    packed = pack_sequence([side.x(5, I), side.x(2, I)])
    module = side.make()
    return [
        attempt(lambda: module(PackedSequence(packed.data[:, :2], packed.batch_sizes))),
        attempt(lambda: module(packed, side.hx(1, 3, H))),
        attempt(lambda: module(packed, side.hx(N, H))),
        attempt(lambda: module(packed.double())),
        attempt(lambda: module(packed.to("meta"))),
    ]
