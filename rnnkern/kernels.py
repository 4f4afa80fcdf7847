"""The extension ``rnnkern._C``, with types and documentation.

Of the other modules only `rnnkern.cells` imports it.
"""

from __future__ import annotations

import enum
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import profiler

from rnnkern import _C
from rnnkern.layer import Layer, Operands

_F = TypeVar("_F", bound=Callable[..., Any])


class Why(enum.Enum):
    """Why the kernels do not run a call."""

    INVALID = enum.auto()  # torch.nn refuses such a call, too, and raises its own error
    MODULE = enum.auto()  # the module overrides a method that torch.nn's forward calls
    MODE = enum.auto()  # torch is in a mode in which no kernel may run
    OPERAND = enum.auto()  # no kernel covers an operand
    GAPS = enum.auto()  # the kernels cover the operands after a copy without gaps


class Refusal(NamedTuple):
    """Why the kernels do not run a call, and the same in words."""

    why: Why
    text: str


def profiled(kernel: _F, mode: str, part: str = "") -> _F:
    """The kernel, inside a range of that name while one of torch's profilers runs."""
    if not profiler._is_profiler_enabled:
        return kernel

    def recorded(*operands: Any, **named: Any) -> Any:
        with profiler.record_function(f"rnnkern::{mode}{part}"):
            return kernel(*operands, **named)

    return recorded  # type: ignore[return-value]


Kernel = _C.Layer
"""The kernels of one `rnnkern.layer.Layer` with its sizes H and P.

``forward(x, h0, c0, weights, steps, training=None, keeps_y=False)`` returns

- the outputs: ``(y, h_n)`` or ``(y, h_n, c_n)``; for a cell whose tensors have no time axis,
  ``(h,)`` or ``(h, c)``;
- whether a gradient has to be recorded; torch's modes and the operands say so if ``training`` is
  None;
- y for backward. With ``keeps_y`` it stays the same if the caller changes the output. A small y is
  then None, because a copy of it is the last part of the next tensor. A large y is copied by torch
  as soon as one of the two is written to;
- None, or one flat tensor of what else backward needs: activated slots ``[D, rows, S * H]``, cell
  states ``[D, rows, H]`` and hidden states before a projection ``[D, rows, H]``, as far as the cell
  has them.

``backward(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite, sums=())`` returns

- a list of gradients: of ``x``, ``*weights`` and the given initial states; None for those that are
  not ``wanted``;
- a flat tensor that begins with the gradients of the slots before their activation,
  ``[D, rows, S * H]``.

None means zeros for ``dy``, ``dhn`` and ``dcn``, and the last part of ``saved`` for ``y``. With
``overwrite``, gradients of the slots replace the saved slots. On the CPU, gradients of the weights
are added to ``sums``, one for each weight, and the list has None in their place.

``second_order(point, direction, wanted)`` returns the derivatives of both passes in a direction: of
the outputs ``(y, h_n, c_n)``, of the gradients as backward lists them, and of the gradients of the
slots. The point is ``(x, h0, c0, weights, steps, y, saved, slots, incoming)``: ``slots`` are their
gradients, ``incoming`` those of ``(y, h_n, c_n)``. The direction is ``(x, h0, c0, weights, slots,
incoming)``: ``slots`` are their sums. None means zeros. It runs on the CPU in float32 and float64,
and not if ``IS_STAND_IN``.

``closed_loop(inputs, h0, c0, weights, readout, bias)`` reads ``inputs[0]``, feeds the layer what
the readout makes of its outputs, writes that to ``inputs[1:]``, and returns ``h_n, c_n``. It runs
on the CPU, and not if ``IS_STAND_IN``.

All raise `RefusedError` before anything is written.
"""

kernel = _C.layer
"""``kernel(mode, directions, hidden, proj, bias, batch_first, by_bfloat16=False, is_cell=False)``.

Equal kernels usually share one cached object. With ``by_bfloat16``, products may take float32 as
bfloat16. A CPU that multiplies bfloat16 does so from 16 rows on (over all steps), and always under
deterministic algorithms. A GPU uses TF32. Without ``by_bfloat16``, a GPU uses TF32 if torch.nn
would: for a cell (``is_cell``) if torch's products may, for a layer if cuDNN's recurrent layers
may.
"""


@functools.lru_cache(maxsize=256)
def kernel_of(layer: Layer, hidden: int, proj: int) -> Kernel:
    """The kernels of a layer with H hidden units and P projected features, or 0."""
    return kernel(
        layer.mode,
        directions=layer.directions,
        hidden=hidden,
        proj=proj,
        bias=layer.bias,
        batch_first=layer.batch_first,
        by_bfloat16=layer.by_bfloat16,
        is_cell=layer.is_cell,
    )


IS_STAND_IN: bool = _C.IS_STAND_IN
"""The CUDA kernels run on the CPU's tensors, on a stand-in for a GPU (`tests/simt`)."""

RefusedError = _C.RefusedError
"""A RuntimeError: an operand does not fit, or no kernel covers it (`refusal` says why)."""


def refusal(operands: Operands) -> Refusal | None:
    """Why no kernel covers these tensors, from their types, devices, dtypes and memory; or None."""
    text = _C.refusal(operands.x, operands.h0, operands.c0, operands.weights)
    if text is None:
        return None
    return Refusal(Why.GAPS if text == _C.GAPS else Why.OPERAND, text)


def mode_refusal() -> Refusal | None:
    """Why no kernel may run in the present mode of torch, or None.

    Ask before a kernel runs. `plain_call` and `plain_cell` ask by themselves.
    """
    text = _C.mode_refusal()
    return None if text is None else Refusal(Why.MODE, text)


CALLED_BY_FORWARD: tuple[str, ...] = _C.CALLED_BY_FORWARD
"""The methods that ``forward`` of torch.nn's layers calls, and that a class may override."""

Machine = _C.Machine
machine = _C.machine
"""``machine(kernel, threads, x)``: what a plan reads of this CPU, for that kernel on x's dtype."""

plan = _C.plan
"""``plan(kernel, machine, *, T, N, I, total, deterministic, backward)``: the plan and its text."""

compiler: str = _C.compiler
compiled_sets = _C.compiled_sets
instruction_set = _C.instruction_set
"""What the extension was built with, and the instruction set in use.

A set whose name extends that of another has kernels of its own for products of bfloat16 only.
"""

cuda_version = _C.cuda_version
cuda_architectures = _C.cuda_architectures
cuda_driver = _C.cuda_driver
"""Versions and architectures of the CUDA kernels, and the driver's CUDA version.

None if there are no CUDA kernels, or no driver.
"""

cuda_driver_refusal = _C.cuda_driver_refusal
"""``cuda_driver_refusal()``: why the driver here is too old for this build, or None.

``cuda_driver_refusal(driver, built)``: the same for a driver and a build of these CUDA versions,
given as numbers: 13020 is 13.2.
"""

cuda: str | None = cuda_version()
"""The CUDA version of the kernels, or None."""

plain_call = _C.plain_call
"""``plain_call(module, x, hx, record)``: what the module returns for an input and its state.

None if the call is not that of one layer, if the module is changed in a way that only Python sees,
or if a mode of torch forbids it. If a gradient is wanted, the outputs pass through
``record((kernel, None, number of states), outputs, y, saved, x, *weights, *states)``
(`rnnkern.autograd.record`).

Raises:
    RefusedError: an operand does not fit, or no kernel covers it.
"""

plain_cell = _C.plain_cell
"""``plain_cell(module, x, hx, record, record_in_loop)``: `plain_call` for a cell.

Its outputs are ``(h,)`` or ``(h, c)``, without y. It calls ``record_in_loop`` instead of ``record``
if `are_worth_sums` (`rnnkern.autograd.record_cell`, `record_cell_in_loop`).
"""

plain_backward = _C.plain_backward
"""``plain_backward(ctx, dy, dhn, dcn)``: the gradients of all that ``record`` was given.

None if the backward pass is not a plain one: it must be differentiable, a mode of torch or a
profiler has to see it, a hook has what was saved, a loop sums its gradients, or an operand is
refused.
"""

are_worth_sums = _C.are_worth_sums
"""``are_worth_sums(kernel, x)``: whether `rnnkern.loops` should sum the gradients of a cell."""

CudaDevice = _C.CudaDevice
"""``CudaDevice(*, capability, multiprocessors, shared_bytes)``: a GPU as its plan sees it."""

cuda_plan = _C.cuda_plan
"""``cuda_plan(kernel, device, x, *, T, N, I, tf32, backward, deterministic=False,
has_library=True)``: the plan on that device and its text.

Only the dtype of x counts.
"""


def multiplied_as_bfloat16(kernel: Kernel, x: Tensor) -> bool:
    """Whether products take this input, of float32, as bfloat16."""
    return x.device.type == "cpu" and machine(kernel, 1, x).rounded_for_products


def describe(kernel: Kernel, x: Tensor, T: int, N: int, features: int, back: bool) -> str:
    """Kernel and plan of one layer in words."""
    if x.device.type == "cuda":
        return _C.cuda_describe(kernel, x, T=T, N=N, I=features, backward=back)
    _, text = plan(
        kernel,
        machine(kernel, torch.get_num_threads(), x),
        T=T,
        N=N,
        I=features,
        total=x.numel() // x.size(-1),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        backward=back,
    )
    return f"{instruction_set()}, {text}"
