"""A recurrent layer that is fed its own output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern import kernels
from rnnkern.functional import (
    autocast_dtype,
    current_weights,
    expect_layer,
    forward,
    initial_states,
    is_compiling,
    layer_of,
    refusal_of,
)


@torch.no_grad()
def generate(
    module: nn.RNNBase,
    feedback: Callable[[Tensor], Tensor],
    input: Tensor,
    steps: int,
    hx: Any = None,
) -> tuple[Tensor, Any]:
    """Steps of a layer, each of whose inputs is made from the output before.

    Nothing of it is recorded for autograd. Where ``feedback`` is an `torch.nn.Linear` behind a
    module of rnnkern of one layer, on a CPU, all steps are one call of the kernels, the readout
    among them, and the cell state of 16 bits is carried in float32 from the first to the last; else
    they are taken one by one.

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
    if not isinstance(input, Tensor):
        raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
    if input.dim() != 2 or input.shape[1] != module.input_size:
        wanted = f"[N, {module.input_size}]"
        raise ValueError(f"input must be {wanted}, got {list(input.shape)}")
    found = _in_one_call(module, feedback, input, steps, hx)
    if found is not None:
        return found
    axis = 1 if module.batch_first else 0
    made = []
    now = input
    for _ in range(steps):
        output, hx = module(now.unsqueeze(axis), hx)
        now = feedback(output.squeeze(axis))
        if not isinstance(now, Tensor) or now.shape != input.shape:
            got = list(now.shape) if isinstance(now, Tensor) else now
            raise ValueError(f"feedback must give {list(input.shape)}, as input, got {got}")
        made.append(now)
    return torch.stack(made), hx


def _in_one_call(
    module: nn.RNNBase, feedback: Any, input: Tensor, steps: int, hx: Any
) -> tuple[Tensor, Any] | None:
    """None where somebody looks on, or no kernel covers it."""
    if (
        is_compiling()
        or input.device.type != "cpu"
        or kernels.IS_STAND_IN
        or module.num_layers > 1
        or type(feedback) is not nn.Linear
        or not (_runs_as(forward, module) and _runs_as(nn.Linear.forward, feedback))
        or autocast_dtype(input) is not None
        or kernels.mode_refusal() is not None
        or refusal_of(module) is not None
    ):
        return None
    h0, c0, fits = initial_states(module, hx, input.shape[0])
    if not fits:
        return None
    layer = layer_of(module)
    inputs = input.new_empty(steps + 1, *input.shape)
    inputs[0] = input
    run: Any = kernels.profiled(layer.closed_loop, layer.mode, " closed loop")
    try:
        hn, cn = run(inputs, h0, c0, current_weights(module), feedback.weight, feedback.bias)
    except kernels.RefusedError:
        return None
    return inputs[1:], hn if cn is None else (hn, cn)


def _runs_as(forward: Any, module: Any) -> bool:
    """A call of the module is a call of that function, and nobody else sees it."""
    own = (module._forward_hooks, module._forward_pre_hooks)
    return (
        type(module).forward is forward
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in vars(module)
        and not any(own)
        and not torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )
