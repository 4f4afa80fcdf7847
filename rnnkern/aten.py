"""A layer as torch's own operators, for programs that run where rnnkern is not installed.

A layer becomes one of ``aten.lstm``, ``aten.gru``, ``aten.rnn_tanh`` and ``aten.rnn_relu``. torch
traces those step by step to find the shapes of their results, which ties a program to the number of
steps of its example. So their nodes are written into the graph here, with the shapes that rnnkern's
operator knows for any number of steps.

None of them takes ``lengths``. Steps past a row's end run on zeros, and their outputs are zeroed
afterwards; the reverse direction runs forward over rows that are turned around.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnnkern import onnx
from rnnkern.derivatives import Maybe, Spec
from rnnkern.sequence import Steps, active_rows, ranked

_OPERATORS = {
    "LSTM": torch.ops.aten.lstm.input,
    "GRU": torch.ops.aten.gru.input,
    "RNN_TANH": torch.ops.aten.rnn_tanh.input,
    "RNN_RELU": torch.ops.aten.rnn_relu.input,
}

_SATURATED = 1e4
"""A sum at which a sigmoid is exactly 0 or 1 in every dtype, float16 included."""


def exported(
    x: Tensor,
    h0: Maybe,
    c0: Maybe,
    weights: list[Tensor],
    lengths: Maybe,
    reset: Maybe,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """``y, h_n, c_n`` of a layer, in torch's operators or in ONNX's; an empty c_n for no state.

    Args:
        lengths: int64 ``[N]``, unchecked.
        rest: the fields of `Spec`, and whether gradients may be wanted.

    Raises:
        NotImplementedError: there are no such operators.
    """
    layer, training = Spec(*rest[:-1]), rest[-1]
    if torch.onnx.is_in_onnx_export():
        return onnx.nodes(layer, x, h0, c0, weights, lengths, reset)
    if reset is not None:
        raise NotImplementedError(
            "reset cannot be exported, because torch has no operator that zeroes a state within a "
            "sequence. Export inside `with rnnkern.exporting_kernels()`: the program then keeps "
            "rnnkern's operators, and needs rnnkern where it runs"
        )
    O = weights[1].shape[1]
    N = x.shape[0 if layer.batch_first else 1]
    h0 = x.new_zeros(layer.directions, N, O) if h0 is None else h0
    if layer.has_cell_state and c0 is None:
        c0 = x.new_zeros(layer.directions, N, layer.hidden(weights))
    if lengths is not None:
        return _with_lengths(layer, x, h0, c0, weights, lengths, training)
    return _node(layer, x, h0, c0, weights, training)


def _node(
    layer: Spec, x: Tensor, h0: Tensor, c0: Maybe, weights: Sequence[Tensor], training: bool
) -> tuple[Tensor, ...]:
    """One operator of torch in the graph that is being traced."""
    from torch.fx.experimental.proxy_tensor import (
        disable_proxy_modes_tracing,
        get_proxy_mode,
        track_tensor_tree,
    )
    from torch.utils._pytree import tree_map

    with disable_proxy_modes_tracing():
        y, hn, cn, _ = torch.ops.rnnkern.scan(
            x, h0, c0, list(weights), None, None, None, None, False, *layer, False
        )
    mode = get_proxy_mode()
    if mode is None:  # Dynamo looks for the shapes alone; the graph is traced after it
        return y, hn, cn
    operator = _OPERATORS[layer.mode]
    operands = (
        x,
        [h0, c0] if layer.has_cell_state else h0,
        list(weights),
        layer.bias,
        1,  # layer
        0.0,  # dropout
        training,
        layer.directions == 2,
        layer.batch_first,
    )
    node = mode.tracer.create_proxy(
        "call_function",
        operator,
        tree_map(mode.tracer.unwrap_proxy, operands),
        {},
        name=operator.overloadpacket.__name__,
    )
    made = (y, hn, cn) if layer.has_cell_state else (y, hn)
    track_tensor_tree(made, node, constant=None, tracer=mode.tracer)
    return y, hn, cn


def _with_lengths(
    layer: Spec,
    x: Tensor,
    h0: Tensor,
    c0: Maybe,
    weights: Sequence[Tensor],
    lengths: Tensor,
    training: bool,
) -> tuple[Tensor, ...]:
    axis = 1 if layer.batch_first else 0
    lengths = lengths.to(x.device).unsqueeze(axis)  # [1, N], or [N, 1] batch first
    steps = torch.arange(x.shape[axis], device=x.device).unsqueeze(1 - axis)
    active = (steps < lengths).unsqueeze(-1)
    x = torch.where(active, x, 0)  # what stands past the end may be NaN
    # Each row's steps from its last to its first; those past its end stay where they are.
    turned = torch.where(steps < lengths, lengths - 1 - steps, steps).unsqueeze(-1)
    last = (lengths - 1).clamp(min=0).unsqueeze(-1)
    one_way = layer._replace(directions=1)
    parts = []
    for d in range(layer.directions):
        own = list(weights[d * layer.tensors : (d + 1) * layer.tensors])
        own_x = x if d == 0 else _taken(x, axis, turned)
        if layer.has_cell_state:
            own_x = torch.cat((own_x, (~active).to(x.dtype)), -1)
            own[0] = torch.cat((own[0], _frozen(own[0])), 1)
        h, c = h0[d : d + 1], None if c0 is None else c0[d : d + 1]
        y, _, cn = _node(one_way, own_x, h, c, own, training)
        # h of the last step, or the initial one of a row without any.
        hn = _taken(y, axis, last).transpose(0, axis)
        hn = torch.where(lengths.reshape(1, -1, 1) > 0, hn, h)
        y = torch.where(active, y, 0)
        parts.append((y if d == 0 else _taken(y, axis, turned), hn, cn))
    y, hn, cn = zip(*parts, strict=True)
    return torch.cat(y, -1), torch.cat(hn), torch.cat(cn) if layer.has_cell_state else cn[0]


def _taken(z: Tensor, axis: int, steps: Tensor) -> Tensor:
    """``z[steps[t, n, 0], n]``, or of ``[n, t]`` batch first."""
    return z.gather(axis, steps.expand(*steps.shape[:-1], z.shape[-1]))


def _frozen(w_ih: Tensor) -> Tensor:
    """Weights ``[4 * H, 1]`` of an input that, at 1, keeps the cell state of an LSTM as it is."""
    H = w_ih.shape[0] // 4
    shut, kept = w_ih.new_full((H, 1), -_SATURATED), w_ih.new_full((H, 1), _SATURATED)
    return torch.cat((shut, kept, w_ih.new_zeros(2 * H, 1)))  # nothing in, nothing forgotten


def _scan(
    x: Tensor, h0: Maybe, c0: Maybe, weights: list[Tensor], *rest: Any
) -> tuple[Tensor, ...]:
    """``rnnkern::scan`` in torch's operators."""
    steps, layer = Steps(*rest[:3], packed=rest[4], placed=rest[3]), rest[5:]
    lengths = None if steps.active is None else active_rows(steps).sum(0)
    outputs = exported(x, h0, c0, weights, lengths, steps.reset, *layer)
    return *outputs, x.new_empty(0)


def _of_torch(mode: str) -> Callable[..., Any]:
    """A decomposition of one of torch's operators into layers that know any number of steps."""

    def layers(
        x: Tensor,
        hx: Any,
        params: list[Tensor],
        bias: bool,
        num_layers: int,
        dropout: float,
        training: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> tuple[Tensor, ...]:
        h0, c0 = hx if mode == "LSTM" else (hx, None)
        D, count = 1 + bidirectional, len(params) // num_layers
        proj = count // D > 2 + 2 * bias
        layer = Spec(mode, D, bias, batch_first, proj, by_bfloat16=False, is_cell=False)
        finals = []
        for i in range(num_layers):
            if i and dropout and training:
                x = torch.dropout(x, dropout, training)
            part = slice(i * D, (i + 1) * D)
            x, *final, _ = torch.ops.rnnkern.scan(
                x,
                h0[part],
                None if c0 is None else c0[part],
                params[i * count : (i + 1) * count],
                None,
                None,
                None,
                None,
                False,
                *layer,
                training,
            )
            finals.append(final if layer.has_cell_state else final[:1])
        return x, *(torch.cat(parts) for parts in zip(*finals, strict=True))

    return layers


def decompositions() -> dict[Any, Callable[..., Any]]:
    """The table with which ``ExportedProgram.run_decompositions`` leaves torch's operators alone.

    Layers, those of ``torch.nn`` as well, become one ``aten.lstm.input``, ``aten.gru.input``,
    ``aten.rnn_tanh.input`` or ``aten.rnn_relu.input`` each, two with ``lengths`` in two directions.
    Time and batch stay as dynamic as they were; torch's own table takes layers apart into the steps
    of the example instead. All other operators are left as they are.

    Returns:
        A new table, by operator.

    Raises:
        NotImplementedError: by ``run_decompositions``, for a program with ``reset``.

    Example::

        >>> with rnnkern.exporting_kernels():
        ...     program = torch.export.export(model, (x,))
        >>> portable = program.run_decompositions(rnnkern.decompositions())
        >>> table = torch.export.default_decompositions()  # and Core ATen for all the rest
        >>> table.update(rnnkern.decompositions())
    """
    return {
        torch.ops.rnnkern.scan.default: _scan,
        torch.ops.rnnkern.ranked.default: ranked,
        **{operator: _of_torch(mode) for mode, operator in _OPERATORS.items()},
    }
