"""A recurrent layer that is fed its own output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern.functional import expect_layer


@torch.no_grad()
def generate(
    module: nn.RNNBase,
    feedback: Callable[[Tensor], Tensor],
    input: Tensor,
    steps: int,
    hx: Any = None,
) -> tuple[Tensor, Any]:
    """Steps of a layer, each of whose inputs is made from the output before.

    One call of the kernels a step, and nothing of it recorded for autograd.

    Args:
        module: an RNN, LSTM or GRU of rnnkern or of ``torch.nn``, in one direction.
        feedback: what the next input is, ``[N, I]``, for an output ``[N, H]``: a readout layer, or
            one and a draw from what it says.
        input: what the first step takes, ``[N, I]``.
        steps: how many, at least 1.
        hx: the state to begin with, as the module takes it; zeros if None.

    Returns:
        What feedback has made, ``[steps, N, I]``, and the state after the last step: to go on,
        pass that state and ``made[-1]``.

    Raises:
        TypeError, ValueError: not such a module, no steps, or a feedback of another shape.

    Example::

        >>> _, state = lstm(warm_up)
        >>> drawn, state = rnnkern.generate(lstm, readout, warm_up[-1], 100, state)
    """
    expect_layer(module)
    if module.bidirectional:
        raise ValueError("generate takes a module of one direction: another has to know the end")
    if isinstance(steps, bool) or not isinstance(steps, int):
        raise TypeError(f"steps must be an int, got {type(steps).__name__}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if input.dim() != 2 or input.shape[1] != module.input_size:
        wanted = f"[N, {module.input_size}]"
        raise ValueError(f"input must be {wanted}, got {list(input.shape)}")
    axis = 1 if module.batch_first else 0
    made = []
    now = input
    for _ in range(steps):
        output, hx = module(now.unsqueeze(axis), hx)
        now = feedback(output.squeeze(axis))
        if now.shape != input.shape:
            raise ValueError(
                f"feedback must give {list(input.shape)}, as input, got {list(now.shape)}"
            )
        made.append(now)
    return torch.stack(made), hx
