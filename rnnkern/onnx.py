"""A layer as one ONNX operator: ``RNN``, ``LSTM`` or ``GRU``.

``torch.onnx.export(model, args)`` needs nothing of this module: while it traces a model, rnnkern's
layers write these operators into the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnnkern.known_cells import name_of
from rnnkern.layer import Layer, Maybe, Operands


class _Operator(NamedTuple):
    """An operator of ONNX.

    Attributes:
        order: the index that each of its gates has in torch's weights.
    """

    name: str
    order: tuple[int, ...]
    attributes: dict[str, Any]


_OPERATORS = {
    "RNN_TANH": _Operator("RNN", (0,), {"activations": "Tanh"}),
    "RNN_RELU": _Operator("RNN", (0,), {"activations": "Relu"}),
    "LSTM": _Operator("LSTM", (0, 3, 1, 2), {}),  # i, o, f, c of i, f, g, o
    "GRU": _Operator("GRU", (1, 0, 2), {"linear_before_reset": 1}),  # z, r, h of r, z, n
}


def nodes(layer: Layer, operands: Operands, lengths: Maybe, reset: Maybe) -> tuple[Tensor, ...]:
    """``y, h_n, c_n`` of a layer in the graph that ``torch.onnx.export`` is tracing.

    bfloat16 is computed in float32, as the kernels do. ONNX before opset 22 has no other way.

    Raises:
        NotImplementedError: ONNX has no such operator.
    """
    if reset is not None or layer.proj:
        what = "reset" if reset is not None else "proj_size"
        why = "zeroes a state within a sequence" if reset is not None else "has projections"
        raise NotImplementedError(
            f"{what} cannot be exported to ONNX, because no recurrent operator of ONNX {why}"
        )
    operator = _OPERATORS.get(layer.mode)
    if operator is None:
        cell = name_of(layer.mode)
        raise NotImplementedError(f"ONNX has no operator for {cell}: it cannot be exported")
    x, h0, c0, weights, _ = operands
    if x.dtype == torch.bfloat16:
        given = [t if t is None else t.float() for t in (x, h0, c0, *weights)]
        outputs = nodes(layer, Operands(given[0], given[1], given[2], given[3:]), lengths, None)
        return tuple(z.to(x.dtype) for z in outputs)
    D, H = layer.directions, layer.hidden(weights)

    def of_all_directions(k: int) -> Tensor:
        own = weights[k :: layer.tensors]
        gates = [[w[g * H : (g + 1) * H] for g in operator.order] for w in own]
        return torch.stack([torch.cat(parts) for parts in gates])

    ih, hh, *biases = (of_all_directions(k) for k in range(layer.tensors))
    x = x.transpose(0, 1) if layer.batch_first else x
    T, N = x.shape[:2]
    attributes: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if D == 2 else "forward",
    }
    for name, value in operator.attributes.items():
        attributes[name] = [value] * D if name == "activations" else value
    states = [(D, N, H)] * (1 + layer.has_cell_state)
    made = torch.onnx.ops.symbolic_multi_out(
        operator.name,
        [
            x,
            ih,
            hh,
            torch.cat(biases, -1) if biases else None,
            None if lengths is None else lengths.to(torch.int32),
            h0,
            *([c0] if layer.has_cell_state else []),
        ],
        attributes,
        dtypes=[x.dtype] * (1 + len(states)),
        shapes=[(T, D, N, H), *states],
    )
    y, *finals = made
    if lengths is not None:
        # For a row without a step ONNX Runtime returns zeros.
        initial = (h0, c0)[: len(finals)]
        empty = (lengths == 0).reshape(1, -1, 1)
        finals = [
            z if own is None else torch.where(empty, own, z)
            for own, z in zip(initial, finals, strict=True)
        ]
    y = y.transpose(1, 2).flatten(2)  # [T, D, N, H] to [T, N, D * H]
    y = y.transpose(0, 1) if layer.batch_first else y
    return (y, *finals) if layer.has_cell_state else (y, *finals, x.new_empty(0))


def translations() -> dict[Any, Callable[..., Any]]:
    """The table for ``torch.onnx.export(..., custom_translation_table=)``.

    Exporting a model needs no table. This one is for programs that ``torch.export`` has made
    before, in which a layer is an operator of torch. torch's own table makes one ``LSTM`` or
    ``GRU`` of it, but takes an RNN apart into steps. This table makes one ``RNN``. Such a model has
    as many steps as the program's example, because torch's exporter fixes their number.

    Returns:
        A new table, by operator.
    """
    return {
        torch.ops.aten.rnn_tanh.input: _rnn("Tanh"),
        torch.ops.aten.rnn_relu.input: _rnn("Relu"),
    }


def _rnn(activation: str) -> Callable[..., Any]:
    def rnn(
        input: Any,
        hx: Any,
        params: Any,
        has_biases: bool,
        num_layers: int,
        dropout: float,
        train: bool,
        bidirectional: bool,
        batch_first: bool,
    ) -> Any:
        import onnxscript

        op: Any = onnxscript.opset18
        D = 1 + bidirectional
        count = len(params) // (num_layers * D)
        y = op.Transpose(input, perm=[1, 0, 2]) if batch_first else input
        finals = []
        for i in range(num_layers):
            own = params[i * D * count : (i + 1) * D * count]
            parts = [
                op.Concat(*(op.Unsqueeze(w, [0]) for w in own[k::count]), axis=0)
                for k in range(count)
            ]
            y, final = op.RNN(
                y,
                *parts[:2],
                op.Concat(*parts[2:], axis=1) if has_biases else None,
                None,
                op.Slice(hx, [i * D], [(i + 1) * D], [0]),
                hidden_size=hx.shape[2],
                direction="bidirectional" if bidirectional else "forward",
                activations=[activation] * D,
            )
            y = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), [0, 0, -1])
            finals.append(final)
        y = op.Transpose(y, perm=[1, 0, 2]) if batch_first else y
        return y, op.Concat(*finals, axis=0)

    return rnn
