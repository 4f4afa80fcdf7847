"""Long sequences in little memory: backward recomputes the gates, segment by segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from rnnkern import autocast, modules
from rnnkern.call import Call, expect_layer, read
from rnnkern.forward import expect_no_own_method
from rnnkern.kernels import Refusal
from rnnkern.known_cells import is_own
from rnnkern.layer import Operands
from rnnkern.options import Options, asked_of, expect_none, options_of
from rnnkern.run import dropout


def checkpointed(
    module: nn.RNNBase,
    input: Any,
    hx: Any = None,
    *,
    checkpoint_every: int,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
    reset_to: Any = None,
) -> Any:
    """Runs ``module(input, hx)``, and keeps for backward only the states between segments.

    A segment has ``checkpoint_every`` steps, and backward recomputes it. Besides inputs and
    outputs, memory holds ``T / checkpoint_every`` states and the gates of ``checkpoint_every``
    steps, instead of the gates of T steps. The gradients are the same but for the order of sums
    and, in 16 bits, cell states that are rounded at the end of a segment. It does not work under
    torch.compile and the transforms of torch.func.

    Args:
        module: an RNN, LSTM or GRU of rnnkern or of ``torch.nn``.
        input: ``[T, N, I]``, ``[N, T, I]`` batch first, or a `PackedSequence`.
        hx, lengths, reset, reset_to: as the module takes them.
        checkpoint_every: steps of a segment, at least 1. The square root of T needs the least
            memory.

    Returns:
        What the module returns.

    Raises:
        TypeError, ValueError: ``checkpoint_every`` is not a positive int, ``module`` is not such a
            module, or it has ``layer_norm`` or ``zoneout``, or ``recurrent_dropout`` while it
            trains. For everything else, what the module raises.
    """
    if not isinstance(input, (Tensor, PackedSequence)):
        kind = type(input).__name__
        raise TypeError(f"input must be a torch.Tensor or a PackedSequence, got {kind}")
    if not isinstance(checkpoint_every, int) or isinstance(checkpoint_every, bool):
        kind = type(checkpoint_every).__name__
        raise TypeError(f"checkpoint_every must be an int, got {kind}")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    expect_layer(module)
    expect_none(module, "checkpointed")
    expect_no_own_method(module)
    asked = asked_of(module, reset, reset_to, False)
    if isinstance(input, PackedSequence):
        packed = read(module, input, hx, lengths, reset)
        padded, own = pad_packed_sequence(input, batch_first=module.batch_first)
        y, state = checkpointed(module, padded, hx, checkpoint_every=checkpoint_every, lengths=own)
        dtype = None if isinstance(packed, Refusal) else autocast.dtype_of_results(packed)
        if dtype is not None:
            y, state = tree_map(lambda z: next(autocast.cast(dtype, z)), (y, state))
        data = y.transpose(0, 1) if module.batch_first else y
        if input.sorted_indices is not None:
            data, own = data.index_select(1, input.sorted_indices), own[input.sorted_indices.cpu()]
        return input._replace(data=pack_padded_sequence(data, own).data), state
    call = read(module, input, hx, lengths, reset) if input.dim() == 3 else None
    if not isinstance(call, Call):
        module.check_input(input, None)
        text = "the input has another number of axes" if call is None else call.text
        raise ValueError(
            f"checkpointed needs a batch of sequences of at least one step, and states for it: "
            f"{text}; got an input of shape {tuple(input.shape)}"
        )
    options = options_of(call, asked or Options(), reset_to)
    return _Segments(call, checkpoint_every, lengths, reset, options).run()


class _Segments:
    """A padded batch, time first, in segments."""

    def __init__(self, call: Call, every: int, lengths: Any, reset: Any, options: Options) -> None:
        self.call, self.every, self.options = call, every, options
        x, module = call.given.x, call.module
        self.x = x = x.transpose(0, 1) if module.batch_first else x
        self.lengths = None if lengths is None else lengths.to(x.device)
        self.reset = None if reset is None else reset.to(x.device)
        if self.reset is not None and module.batch_first:
            self.reset = self.reset.t()
        if not module.bidirectional:
            return
        # The steps of row n backwards from its own end. The padding past it keeps its positions.
        t = torch.arange(call.T, device=x.device)[:, None].expand(call.T, call.N)
        ends = self.lengths if self.lengths is not None else torch.full_like(t[0], call.T)
        self.backwards = torch.where(t < ends, ends - 1 - t, t)

    def run(self) -> Any:
        module, layer, x = self.call.module, self.call.layer, self.x
        one_way = layer._replace(directions=1)
        finals = []
        for i in range(module.num_layers):
            if i:
                x = dropout(module, x)
            outputs = []
            for d in range(layer.directions):
                own = one_way.of_stack(i * layer.directions + d, self.call.given, x)
                number = i * layer.directions + d
                y, final = self._direction(own, d, self.options.of_layer(number, 1))
                outputs.append(y)
                finals.append(final)
            x = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        states = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
        y = x.transpose(0, 1) if module.batch_first else x
        return y, states if len(states) == 2 else states[0]

    def _direction(
        self, operands: Operands, d: int, options: Options
    ) -> tuple[Tensor, tuple[Any, ...]]:
        module, reset, (x, h, c, weights, _) = self.call.module, self.reset, operands
        arguments = {"bias": module.bias, "device": "meta", "dtype": x.dtype}
        if module.proj_size:
            arguments["proj_size"] = module.proj_size
        sizes = x.shape[-1], module.hidden_size
        if is_own(self.call.layer.mode):
            from rnnkern.own_cells.recurrent import Recurrent

            layer: Any = Recurrent(module.cell, *sizes, **arguments)
        elif isinstance(module, modules.OwnRNN):
            layer = type(module)(*sizes, **arguments)
        else:
            kind, _, nonlinearity = self.call.layer.mode.partition("_")
            if kind == "RNN":
                arguments["nonlinearity"] = nonlinearity.lower()
            layer = getattr(modules, kind)(*sizes, **arguments)
        layer.train(module.training)
        named = dict(zip(layer._flat_weights_names, weights, strict=True))
        if d:
            x = x.gather(0, self.backwards[..., None].expand(x.shape))
            if reset is not None:  # nothing passes from an episode to the step before it
                reset = reset.gather(0, self.backwards)
                reset = torch.cat((torch.zeros_like(reset[:1]), reset[:-1]))

        def states(h: Any, c: Any) -> Any:
            return h if c is None else (h, c)

        def segment(x: Tensor, h: Any, c: Any, lengths: Any, reset: Any, to: Any) -> Any:
            own = {"lengths": lengths, "reset": reset, "reset_to": to}
            return functional_call(layer, named, (x, states(h, c)), own)

        outputs = []
        for begin in range(0, x.shape[0], self.every):
            part = x[begin : begin + self.every]
            own = None if self.lengths is None else (self.lengths - begin).clamp(0, part.shape[0])
            flags = None if reset is None else reset[begin : begin + self.every]
            y, final = checkpoint(
                segment,
                part,
                h,
                c,
                own,
                flags,
                states(options.reset_h, options.reset_c),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            h, c = final if isinstance(final, tuple) else (final, None)
            outputs.append(y)
        y = torch.cat(outputs)
        y = y.gather(0, self.backwards[..., None].expand(y.shape)) if d else y
        return y, (h,) if c is None else (h, c)
