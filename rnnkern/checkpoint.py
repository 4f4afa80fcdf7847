"""Long sequences in little memory: the gates are made anew in backward, segment by segment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from rnnkern import functional, modules
from rnnkern.sequence import padded_steps, place_of


def checkpointed(
    module: nn.RNNBase,
    input: Any,
    hx: Any = None,
    *,
    checkpoint_every: int,
    lengths: Tensor | None = None,
    reset: Tensor | None = None,
) -> Any:
    """``module(input, hx)``, keeping for backward the states of every ``checkpoint_every``-th step.

    Backward computes each segment of that many steps a second time. Beside inputs and outputs,
    memory grows as ``T / checkpoint_every`` states and ``checkpoint_every`` steps' gates, instead
    of T steps' gates; the gradients are the same but for the order of sums and, in 16 bits, cell
    states rounded where a segment ends. Not for torch.compile and the transforms of torch.func.

    Args:
        module: an RNN, LSTM or GRU of rnnkern or of ``torch.nn``.
        input: ``[T, N, I]``, ``[N, T, I]`` batch first, or a `PackedSequence`.
        hx, lengths, reset: as the module takes them.
        checkpoint_every: steps of a segment, at least 1; the square root of T needs least.

    Raises:
        TypeError, ValueError: ``checkpoint_every`` is no positive int, or ``module`` no such
            module; for all else, what the module raises.
    """
    if not isinstance(input, (Tensor, PackedSequence)):
        kind = type(input).__name__
        raise TypeError(f"input must be a torch.Tensor or a PackedSequence, got {kind}")
    if not isinstance(checkpoint_every, int) or isinstance(checkpoint_every, bool):
        kind = type(checkpoint_every).__name__
        raise TypeError(f"checkpoint_every must be an int, got {kind}")
    if checkpoint_every < 1:
        raise ValueError(f"checkpoint_every must be at least 1, got {checkpoint_every}")
    functional.expect_layer(module)
    if isinstance(input, PackedSequence):
        if lengths is not None or reset is not None:
            raise ValueError("a PackedSequence brings its own lengths; it takes no reset")
        padded, own = pad_packed_sequence(input, batch_first=module.batch_first)
        y, state = checkpointed(module, padded, hx, checkpoint_every=checkpoint_every, lengths=own)
        asked = functional.autocast_dtype(padded)
        if asked is not None:
            h0 = hx[0] if isinstance(hx, tuple) else hx
            dtype = functional.dtype_under_autocast(module, asked, padded, h0, True)
            y, state = tree_map(lambda z: next(functional.autocast(dtype, z)), (y, state))
        data = y.transpose(0, 1) if module.batch_first else y
        if input.sorted_indices is not None:
            data, own = data.index_select(1, input.sorted_indices), own[input.sorted_indices.cpu()]
        return input._replace(data=pack_padded_sequence(data, own).data), state
    return _Segments(module, input, hx, checkpoint_every, lengths, reset).run()


class _Segments:
    """A padded batch, time first, in segments."""

    def __init__(
        self, module: Any, input: Tensor, hx: Any, every: int, lengths: Any, reset: Any
    ) -> None:
        self.module, self.every = module, every
        x = input.transpose(0, 1) if module.batch_first and input.dim() == 3 else input
        N = x.shape[1] if x.dim() == 3 else 1
        self.h0, self.c0, fits = functional.initial_states(module, hx, N)
        if x.dim() != 3 or not fits or x.shape[-1] != module.input_size or not x.shape[0]:
            module.check_input(input, None)
            raise ValueError(
                f"a batch of {N} sequences of at least one step is wanted, and states for it; "
                f"got an input of shape {tuple(input.shape)}"
            )
        T = x.shape[0]
        place = place_of(x)
        padded_steps(lengths, reset, T, N, module.batch_first, place)  # its checks
        self.x, self.lengths = x, None if lengths is None else lengths.to(x.device)
        self.reset = None if reset is None else reset.to(x.device)
        if self.reset is not None and module.batch_first:
            self.reset = self.reset.t()
        if not module.bidirectional:
            return
        # Row n backwards from its own end; what is past it stays where it is.
        t = torch.arange(T, device=x.device)[:, None].expand(T, N)
        ends = self.lengths if self.lengths is not None else torch.full_like(t[0], T)
        self.backwards = torch.where(t < ends, ends - 1 - t, t)

    def run(self) -> Any:
        module, x = self.module, self.x
        D, count = 2 if module.bidirectional else 1, 2 + 2 * module.bias + (module.proj_size > 0)
        weights = functional.current_weights(module)
        finals = []
        for i in range(module.num_layers):
            if i:
                x = functional.dropout(module, x)
            outputs = []
            for d in range(D):
                k = i * D + d
                state = [None if s is None else s[k : k + 1] for s in (self.h0, self.c0)]
                y, final = self._direction(x, weights[k * count : (k + 1) * count], state, d)
                outputs.append(y)
                finals.append(final)
            x = outputs[0] if D == 1 else torch.cat(outputs, -1)
        states = tuple(torch.cat(parts) for parts in zip(*finals, strict=True))
        y = x.transpose(0, 1) if module.batch_first else x
        return y, states if len(states) == 2 else states[0]

    def _direction(
        self, x: Tensor, weights: list[Tensor], state: list[Any], d: int
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        module, reset = self.module, self.reset
        kind, _, nonlinearity = functional.mode_of(module).partition("_")
        options = {"proj_size": module.proj_size} if module.proj_size else {}
        if kind == "RNN":
            options = {"nonlinearity": nonlinearity.lower()}
        sizes = x.shape[-1], module.hidden_size
        layer = getattr(modules, kind, type(module))(
            *sizes, bias=module.bias, device="meta", dtype=x.dtype, **options
        )
        layer.train(module.training)
        named = dict(zip(layer._flat_weights_names, weights, strict=True))
        if d:
            x = x.gather(0, self.backwards[..., None].expand(x.shape))
            if reset is not None:  # step t takes nothing over from t + 1 where that is a beginning
                reset = reset.gather(0, self.backwards)
                reset = torch.cat((torch.zeros_like(reset[:1]), reset[:-1]))

        def segment(x: Tensor, h: Any, c: Any, lengths: Any, reset: Any) -> Any:
            hx = (h if c is None else (h, c)) if h is not None else None
            return functional_call(layer, named, (x, hx), {"lengths": lengths, "reset": reset})

        outputs = []
        h, c = state
        for begin in range(0, x.shape[0], self.every):
            part = x[begin : begin + self.every]
            own = None if self.lengths is None else (self.lengths - begin).clamp(0, part.shape[0])
            flags = None if reset is None else reset[begin : begin + self.every]
            y, final = checkpoint(
                segment, part, h, c, own, flags, use_reentrant=False, preserve_rng_state=False
            )
            h, c = final if isinstance(final, tuple) else (final, None)
            outputs.append(y)
        y = torch.cat(outputs)
        y = y.gather(0, self.backwards[..., None].expand(y.shape)) if d else y
        return y, (h,) if c is None else (h, c)
