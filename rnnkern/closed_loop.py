"""A recurrent layer that is fed its own output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from rnnkern import kernels
from rnnkern.call import expect_layer, is_compiling, read, refusal_of
from rnnkern.constructor import option
from rnnkern.forward import forward
from rnnkern.kernels import Refusal


@torch.no_grad()
def generate(
    module: nn.RNNBase,
    feedback: Callable[[Tensor], Tensor],
    input: Tensor,
    steps: int,
    hx: Any = None,
) -> tuple[Tensor, Any]:
    """Runs a layer on its own output: each input is made from the output before.

    Nothing is recorded for autograd. On a CPU, if ``module`` is of rnnkern and has one layer, and
    ``feedback`` is a `torch.nn.Linear`, one call of the kernels runs all steps, the readout
    included. A cell state of 16 bits is then carried in float32 from the first step to the last.
    Otherwise the steps run one by one.

    Args:
        module: an RNN, LSTM or GRU of rnnkern or of ``torch.nn``, in one direction.
        feedback: makes the next input, ``[N, I]``, of an output, ``[N, H]``: a readout layer, or a
            function that draws from what a readout predicts.
        input: the input of the first step, ``[N, I]``.
        steps: the number of steps, at least 1.
        hx: the initial state, as the module takes it; zeros if None.

    Returns:
        What feedback has made, ``[steps, N, I]``, and the state after the last step. To continue,
        pass that state and ``made[-1]``.

    Raises:
        TypeError, ValueError: ``module`` or ``input`` does not fit, there are no steps, or feedback
            makes another shape.

    Example::

        >>> _, state = lstm(warm_up)
        >>> drawn, state = rnnkern.generate(lstm, readout, warm_up[-1], 100, state)
    """
    expect_layer(module)
    recurrent_dropout = option(module, "recurrent_dropout")
    if module.training and recurrent_dropout:
        raise ValueError(
            "generate calls the module step by step, and recurrent_dropout has one mask for all "
            f"steps, got a module with recurrent_dropout={recurrent_dropout}; call "
            "module.eval()"
        )
    if module.bidirectional:
        raise ValueError(
            "generate needs a module of one direction: the reverse direction reads future inputs"
        )
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
        made.append(now.clone())  # feedback may write into the same tensor each time
    return torch.stack(made), hx


def _in_one_call(
    module: nn.RNNBase, feedback: Any, input: Tensor, steps: int, hx: Any
) -> tuple[Tensor, Any] | None:
    """None if a hook, transform or mode must see each step, or if no kernel covers the call."""
    if (
        is_compiling()
        or input.device.type != "cpu"
        or kernels.IS_STAND_IN
        or module.num_layers > 1
        or option(module, "zoneout")
        or getattr(module, "_gain_names", False)
        or type(feedback) is not nn.Linear
        or not (_runs_as(forward, module) and _runs_as(nn.Linear.forward, feedback))
        or kernels.mode_refusal() is not None
        or refusal_of(module) is not None
    ):
        return None
    call = read(module, input.unsqueeze(1 if module.batch_first else 0), hx)
    if isinstance(call, Refusal) or call.asked is not None:
        return None
    kernel = kernels.kernel_of(call.layer, module.hidden_size, module.proj_size)
    inputs = input.new_empty(steps + 1, *input.shape)
    inputs[0] = input
    run: Any = kernels.profiled(kernel.closed_loop, kernel.mode, " closed loop")
    _, h0, c0, weights, _ = call.given
    try:
        hn, cn = run(inputs, h0, c0, weights, feedback.weight, feedback.bias)
    except kernels.RefusedError:
        return None
    return inputs[1:], hn if cn is None else (hn, cn)


def _runs_as(forward: Any, module: Any) -> bool:
    """Whether a call of the module is a call of that function, and no hook sees it."""
    own = (module._forward_hooks, module._forward_pre_hooks)
    return (
        type(module).forward is forward
        and type(module).__call__ is nn.Module.__call__
        and "forward" not in vars(module)
        and not any(own)
        and not torch.nn.modules.module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )
