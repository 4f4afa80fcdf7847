"""A layer as torch's own operators, for programs that run where rnnkern is not installed.

A layer becomes one of ``aten.lstm``, ``aten.gru``, ``aten.rnn_tanh`` and ``aten.rnn_relu``. torch
traces these step by step to find the shapes of their results, which ties a program to the number of
steps of its example. So this module writes their nodes into the graph, with the shapes that
rnnkern's operator knows for any number of steps.

None of them takes ``lengths`` or ``reset``. With ``lengths``, steps past a row's end run on zeros
and their outputs are zeroed afterwards; the reverse direction runs forward over turned rows.
With ``reset``, each episode is a row of a packed batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rnnkern import onnx, reference
from rnnkern.known_cells import CELLS, is_own, name_of
from rnnkern.layer import PACKED, Layer, Maybe, Operands, unflatten
from rnnkern.sequence import Steps, active_mask, ranked

_OPERATORS = {
    "LSTM": torch.ops.aten.lstm,
    "GRU": torch.ops.aten.gru,
    "RNN_TANH": torch.ops.aten.rnn_tanh,
    "RNN_RELU": torch.ops.aten.rnn_relu,
}
"""Each has the overloads ``input``, of a padded batch, and ``data``, of a packed one."""

_LARGE = 3e4
"""A finite number of every dtype. Its square outweighs all else in the sum of a gate; in float16,
which has no such number, it is infinite, and a sigmoid of it is still 0 or 1.
"""


def exported(
    x: Tensor,
    h0: Maybe,
    c0: Maybe,
    weights: list[Tensor],
    lengths: Maybe,
    reset: Maybe,
    *rest: Any,
) -> tuple[Tensor, ...]:
    """``y, h_n, c_n`` of a layer, in torch's operators or in ONNX's; c_n is empty if there is none.

    Args:
        lengths: int64 ``[N]``, unchecked.
        rest: the fields of `Layer`, and whether gradients may be wanted.

    Raises:
        NotImplementedError: ONNX has no such operator.
    """
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    layer, training = Layer(*rest[:-1]), rest[-1]
    given = Operands(x, h0, c0, weights)
    if get_proxy_mode() is None:  # Dynamo needs only the shapes; the graph is traced later
        return _shapes(layer, given, None)
    if is_own(layer.mode) and (lengths is not None or reset is not None):
        raise NotImplementedError(
            "torch has no operator for a cell of your own with lengths or reset: export it inside "
            "rnnkern.exporting_kernels()"
        )
    if is_own(layer.mode):  # step by step, so that the program runs without rnnkern
        y, hn, *cn = reference.layer(layer, given)
        return y, hn, cn[0] if cn else x.new_empty(0)
    if torch.onnx.is_in_onnx_export():
        return onnx.nodes(layer, given, lengths, reset)
    O = layer.out(weights)
    N = x.shape[0 if layer.batch_first else 1]
    h0 = x.new_zeros(layer.directions, N, O) if h0 is None else h0
    if layer.has_cell_state and c0 is None:
        c0 = x.new_zeros(layer.directions, N, layer.hidden(weights) * CELLS[layer.mode].planes)
    given = Operands(x, h0, c0, weights)
    if reset is not None:
        return _by_episodes(layer, given, lengths, reset, training)
    if lengths is not None:
        return _with_lengths(layer, given, lengths, training)
    return _node(layer, given, training)


def _shapes(layer: Layer, operands: Operands, batch_sizes: Maybe) -> tuple[Tensor, ...]:
    """``y, h_n, c_n`` of a layer, for their shapes alone."""
    x, h0, c0, weights, _ = operands
    is_packed = batch_sizes is not None
    y, hn, cn, _ = torch.ops.rnnkern.scan(
        x, h0, c0, list(weights), batch_sizes, None, None, None, is_packed, *layer, False
    )
    return y, hn, cn


def _node(
    layer: Layer, given: Operands, training: bool, batch_sizes: Maybe = None
) -> tuple[Tensor, ...]:
    """One operator of torch in the graph that is being traced."""
    from torch.fx.experimental.proxy_tensor import (
        disable_proxy_modes_tracing,
        get_proxy_mode,
        track_tensor_tree,
    )
    from torch.utils._pytree import tree_map

    tracer: Any = get_proxy_mode().tracer  # type: ignore[union-attr]
    with disable_proxy_modes_tracing():
        y, hn, cn = _shapes(layer, given, batch_sizes)
    x, h0, c0, weights, _ = given
    operator = _OPERATORS.get(layer.mode)
    if operator is None:
        cell = name_of(layer.mode)
        raise NotImplementedError(f"torch has no operator for {cell}: it cannot be exported")
    operands = [
        x,
        [h0, c0] if layer.has_cell_state else h0,
        list(weights),
        layer.bias,
        1,  # layer
        0.0,  # dropout
        training,
        layer.directions == 2,
    ]
    if batch_sizes is None:
        operands.append(layer.batch_first)
    else:
        operands.insert(1, batch_sizes)
    node = tracer.create_proxy(
        "call_function",
        operator.input if batch_sizes is None else operator.data,
        tree_map(tracer.unwrap_proxy, tuple(operands)),
        {},
        name=operator.__name__,
    )
    made = (y, hn, cn) if layer.has_cell_state else (y, hn)
    track_tensor_tree(made, node, constant=None, tracer=tracer)
    return y, hn, cn


def _with_lengths(
    layer: Layer, operands: Operands, lengths: Tensor, training: bool
) -> tuple[Tensor, ...]:
    x, h0, c0, weights, _ = operands
    axis = 1 if layer.batch_first else 0
    lengths = lengths.to(x.device).unsqueeze(axis)  # [1, N], or [N, 1] batch first
    steps = torch.arange(x.shape[axis], device=x.device).unsqueeze(1 - axis)
    active = (steps < lengths).unsqueeze(-1)
    x = torch.where(active, x, 0)  # padding may be NaN
    # Each row's steps from its last to its first. Those past its end keep their positions.
    turned = torch.where(steps < lengths, lengths - 1 - steps, steps).unsqueeze(-1)
    last = (lengths - 1).clamp(min=0).unsqueeze(-1)
    one_way = layer._replace(directions=1)
    parts = []
    for d in range(layer.directions):
        own = list(weights[d * layer.tensors : (d + 1) * layer.tensors])
        own_x = x if d == 0 else _taken(x, axis, turned)
        if layer.has_cell_state:
            own_x = torch.cat((own_x, (~active).to(x.dtype) * _LARGE), -1)
            own[0] = torch.cat((own[0], _frozen(own[0])), 1)
        h, c = h0[d : d + 1], None if c0 is None else c0[d : d + 1]
        y, _, cn = _node(one_way, Operands(own_x, h, c, own), training)
        # h of the last step. A row without steps keeps its initial state.
        hn = _taken(y, axis, last).transpose(0, axis)
        hn = torch.where(lengths.reshape(1, -1, 1) > 0, hn, h)
        y = torch.where(active, y, 0)
        parts.append((y if d == 0 else _taken(y, axis, turned), hn, cn))
    ys, hns, cns = zip(*parts, strict=True)
    return torch.cat(ys, -1), torch.cat(hns), torch.cat(cns) if layer.has_cell_state else cns[0]


def _taken(z: Tensor, axis: int, steps: Tensor) -> Tensor:
    """``z[steps[t, n, 0], n]``, or of ``[n, t]`` batch first."""
    return z.gather(axis, steps.expand(*steps.shape[:-1], z.shape[-1]))


def _frozen(w_ih: Tensor) -> Tensor:
    """Weights ``[4 * H, 1]`` of an input that keeps the cell state of an LSTM if it is `_LARGE`."""
    H = w_ih.shape[0] // 4
    shut, kept = w_ih.new_full((H, 1), -_LARGE), w_ih.new_full((H, 1), _LARGE)
    return torch.cat((shut, kept, w_ih.new_zeros(2 * H, 1)))  # input gate 0, forget gate 1


def _by_episodes(
    layer: Layer, operands: Operands, lengths: Maybe, reset: Tensor, training: bool
) -> tuple[Tensor, ...]:
    """Each episode is a row of a packed batch, the longest first.

    One more row takes part in all steps, because each step of a packed batch needs an active row.
    """
    x, h0, c0, weights, _ = operands
    if layer.batch_first:
        x, reset = x.transpose(0, 1), reset.t()
    T, N = x.shape[:2]
    device = x.device
    steps = torch.arange(T, device=device)
    lengths = torch.full((N,), T, device=device) if lengths is None else lengths.to(device)
    resets = reset.to(device).t()
    begins = (resets | (steps == 0)) & (steps < lengths[:, None])  # [N, T]
    count = begins.sum(1)
    end = count.cumsum(0)
    row, start = begins.nonzero().unbind(1)  # of each episode, one row's after the other's
    number = torch.arange(row.shape[0], device=device)
    is_last = number + 1 == end[row]
    none = torch.zeros_like(lengths[:1])
    following = torch.cat((start, none))[number + 1]  # the start of the next episode
    size = torch.where(is_last, lengths[row], following) - start
    # From here on everything is in the order of the packed batch, which has the additional row.
    size, order = torch.cat((size, none + T)).sort(descending=True, stable=True)
    own_row, own_start = torch.cat((row, none))[order], torch.cat((start, none))[order]
    taken = steps[:, None] < size  # [T, episodes]
    step, episode = taken.nonzero().unbind(1)
    is_extra = order[episode] == row.shape[0]
    index = (own_start[episode] + step) * N + own_row[episode]
    data = torch.where(is_extra[:, None], 0, x.flatten(0, 1)[index])
    # A row's first episode begins with the initial state unless it is reset. In the reverse
    # direction the row's last episode does.
    carried = [
        torch.cat((each, none > 0))[order, None]
        for each in ((start == 0) & ~resets[:, 0][row], is_last)
    ]

    def initial(state: Tensor) -> Tensor:
        own = zip(state, carried, strict=False)
        return torch.stack([torch.where(is_carried, z[own_row], 0) for z, is_carried in own])

    packed = layer._replace(batch_first=False)
    given = Operands(data, initial(h0), None if c0 is None else initial(c0), weights)
    y, *finals = _node(packed, given, training, taken.sum(1).cpu())
    # Outputs of the additional row go behind all others, and are cut off.
    index = torch.where(is_extra, T * N, index)
    y = y.new_zeros(T * N + 1, y.shape[-1]).index_copy(0, index, y)[:-1]
    y = unflatten(y, 0, (T, N))
    sorted_at = order.argsort()
    outermost = sorted_at[(end - 1).clamp(min=0)], sorted_at[end - count]  # of each row

    def final(z: Tensor, before: Tensor) -> Tensor:
        ends = zip(z, outermost, before, strict=False)
        return torch.stack([torch.where(count[:, None] > 0, own[e], b) for own, e, b in ends])

    hn = final(finals[0], h0)
    cn = finals[1] if c0 is None else final(finals[1], c0)
    return y.transpose(0, 1) if layer.batch_first else y, hn, cn


def _kernel(
    x: Tensor,
    weights: list[Tensor],
    code: int,
    training: bool,
    h0: Maybe = None,
    c0: Maybe = None,
    active: Maybe = None,
    order: Maybe = None,
    reset: Maybe = None,
    placed: Maybe = None,
) -> list[Tensor]:
    """``rnnkern::scan_kernel`` in torch's operators.

    It omits what rnnkern's backward pass needs, because torch's operators have their own.
    """
    layer, steps = Layer.of_code(code), (active, order, reset, placed)
    outputs = _scan(x, h0, c0, weights, *steps, bool(code & PACKED), *layer, training)
    return list(outputs[: 2 + layer.has_cell_state])


def _scan(x: Tensor, h0: Maybe, c0: Maybe, weights: list[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    """``rnnkern::scan`` in torch's operators."""
    active, order, reset, placed, packed, *layer, training = rest
    if packed:
        assert h0 is not None  # only torch's operators are exported packed, and they have one
        given = Operands(x, h0, c0, weights)
        outputs = _node(Layer(*layer), given, training, active)
    else:
        steps = Steps(active, order, reset, packed, placed)
        lengths = None if active is None else active_mask(steps).sum(0)
        outputs = exported(x, h0, c0, weights, lengths, reset, *layer, training)
    return *outputs, x.new_empty(0)


def _of_torch(mode: str, packed: bool) -> Callable[..., Any]:
    """One of torch's operators as layers of rnnkern, which know the shapes for any T."""

    def layers(x: Tensor, *operands: Any) -> tuple[Tensor, ...]:
        batch_sizes, *rest = operands if packed else (None, *operands)
        hx, params, bias, num_layers, dropout, training, bidirectional, *batch_first = rest
        h0, c0 = hx if mode == "LSTM" else (hx, None)
        D, count = 1 + bidirectional, len(params) // num_layers
        proj = count // D > 2 + 2 * bias
        layer = Layer(mode, D, bias, any(batch_first), proj, by_bfloat16=False, is_cell=False)
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
                batch_sizes,
                None,
                None,
                None,
                packed,
                *layer,
                training,
            )
            finals.append(final if layer.has_cell_state else final[:1])
        return x, *(torch.cat(parts) for parts in zip(*finals, strict=True))

    return layers


def decompositions() -> dict[Any, Callable[..., Any]]:
    """A table for ``ExportedProgram.run_decompositions`` that makes rnnkern's operators torch's.

    A layer, of ``torch.nn`` as well, becomes one ``aten.lstm``, ``aten.gru``, ``aten.rnn_tanh`` or
    ``aten.rnn_relu``. With ``lengths`` in two directions it becomes two. Time and batch stay as
    dynamic as they were. torch's own table takes these operators apart into the steps of the
    example, which fixes their number. All other operators are left as they are.

    A layer of a cell of your own is taken apart into its steps, which fixes their number. So is a
    layer with options, such as ``layer_norm``, if their number is fixed and it has no ``lengths``;
    otherwise it stays, and the program still needs rnnkern.

    A program without ``rnnkern.exporting_kernels`` has torch's operators already.

    Returns:
        A new table, by operator.

    Example::

        >>> with rnnkern.exporting_kernels():
        ...     program = torch.export.export(model, (x,))
        >>> portable = program.run_decompositions(rnnkern.decompositions())
        >>> table = torch.export.default_decompositions()  # and Core ATen for all the rest
        >>> table.update(rnnkern.decompositions())
    """
    from rnnkern.ops import with_options

    return {
        torch.ops.rnnkern.scan.default: _scan,
        torch.ops.rnnkern.scan_with_options.default: with_options.decomposed,
        torch.ops.rnnkern.scan_kernel.default: _kernel,
        torch.ops.rnnkern.ranked.default: ranked,
        **{each.input: _of_torch(mode, False) for mode, each in _OPERATORS.items()},
        **{each.data: _of_torch(mode, True) for mode, each in _OPERATORS.items()},
    }
