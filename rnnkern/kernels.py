"""The extension ``rnnkern._C``, with types and documentation.

Of the other modules only `rnnkern.known_cells` imports it.
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
from rnnkern.known_cells import is_own
from rnnkern.layer import Layer, Operands

_F = TypeVar("_F", bound=Callable[..., Any])


class Why(enum.Enum):
    """Why the kernels do not run a call."""

    INVALID = enum.auto()  # torch.nn refuses such a call, too, and raises its own error
    MODULE = enum.auto()  # the module overrides a method that torch.nn's forward calls
    MODE = enum.auto()  # torch is in a mode in which no kernel may run
    OPERAND = enum.auto()  # no kernel covers an operand
    CELL = enum.auto()  # a cell that a user has written has no kernels here
    GAPS = enum.auto()  # the kernels cover dense copies of the operands


class Refusal(NamedTuple):
    """Why the kernels do not run a call, and the same in words: a pattern and what it names."""

    why: Why
    pattern: str
    values: tuple[Any, ...] = ()

    @property
    def text(self) -> str:
        return self.pattern.format(*self.values)


def profiled(kernel: _F, mode: str, part: str = "") -> _F:
    """The kernel, inside a range of that name while one of torch's profilers runs."""
    if not profiler._is_profiler_enabled:
        return kernel

    def recorded(*operands: Any, **named: Any) -> Any:
        with profiler.record_function(f"rnnkern::{mode}{part}"):
            return kernel(*operands, **named)

    return recorded  # type: ignore[return-value]


Kernel = _C.Kernel
"""The kernels of one `rnnkern.layer.Layer` with its sizes H and P.

``forward(x, h0, c0, weights, steps, training=None, keeps_y=False, cells=False, options=None,
packed_weights=None)`` returns

- the outputs: ``(y, h_n)`` or ``(y, h_n, c_n)``; for a cell whose tensors have no time axis,
  ``(h,)`` or ``(h, c)``;
- whether a gradient has to be recorded; torch's modes and the operands say so if ``training`` is
  None;
- y for backward. With ``keeps_y`` it stays the same if the caller changes the output. A small y is
  then None, because a copy of it is the last part of the next tensor. A large one is a tensor over
  the same memory; torch copies the output as soon as it is written to;
- None, or one flat tensor of what else backward needs: activated slots ``[D, rows, S * H]``, cell
  states ``[D, rows, H]``, with zoneout also those before it, hidden states before a projection or
  zoneout ``[D, rows, H]``, and what normalisation has made (``csrc/cpu/normalised.h``), as far as
  the layer has them. With ``cells`` the cell states alone if backward needs nothing.

``options`` are None or ``reset_h, reset_c, seed, number, recurrent_dropout, zoneout, draws, gains``
of `rnnkern.options.Options`, the gains as one list, on the CPU and not if ``IS_STAND_IN``.
``packed_weights`` is a `Frozen` of this layer alone with the same weights, which are then not
packed again.

``backward(x, h0, c0, weights, steps, y, saved, dy, dhn, dcn, wanted, overwrite, sums=(),
options=None, dcells=None)`` returns

- a list of gradients: of ``x``, ``*weights``, the given initial states, the given states of a reset
  and the gains; None for those that are not ``wanted``;
- a flat tensor that begins with the gradients of the slots before their activation,
  ``[D, rows, S * H]``.

None means zeros for ``dy``, ``dhn`` and ``dcn``, and the last part of ``saved`` for ``y``. With
``overwrite``, gradients of the slots replace the saved slots. On the CPU, gradients of the weights
are added to ``sums``, one for each weight, and the list has None in their place.

``second_order(point, direction, wanted)`` returns the derivatives of both passes in a direction: of
the outputs ``(y, h_n, c_n)``, of the gradients as backward lists them, and of the gradients of the
slots. The point is ``(x, h0, c0, weights, steps, y, saved, slots, incoming)``: ``slots`` are their
gradients, ``incoming`` those of ``(y, h_n, c_n)``. The direction is ``(x, h0, c0, weights, slots,
incoming)``: ``slots`` are their sums. None means zeros. It runs in float32 and float64.

``closed_loop(inputs, h0, c0, weights, readout, bias)`` reads ``inputs[0]``, feeds the layer what
the readout makes of its outputs, writes that to ``inputs[1:]``, and returns ``h_n, c_n``. It runs
on the CPU, and not if ``IS_STAND_IN``.

All raise `RefusedError` before anything is written.
"""

Frozen = _C.Frozen
"""The packed weights of a module, and the kernels that read them: `rnnkern.frozen`.

``Frozen(kernel, input_size, layers, numbers, weights, scales)``: ``numbers`` is what the matrices
become: ``"own"``, or of float32 ``"bfloat16"`` or ``"int8"``. Of int8 the weights are whole numbers
in float32, and ``scales`` has the scale of each row for each matrix.

- ``forward(x, h0, c0, steps)``: ``(y, h_n)`` or ``(y, h_n, c_n)``; of a cell without y.
- ``plain_call(x, hx)``: what the module returns, or None if the call is not plain, or if a mode of
  torch, a profiler or autograd has to see it.
- ``step(x, hx)``: the output of one step, whose state is written into the tensors of hx; or None.
- ``unpack(tensors)``: writes the matrices to tensors.
- ``number``: no other instance of the process has it. ``nbytes``: of the packed weights.

All raise `RefusedError` before anything is written.
"""

kernel = _C.kernel
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

headers: str = _C.HEADERS
"""A digest of the headers that the extension was built from (`rnnkern.own_cells.headers`)."""

load_library = _C.load_library
"""``load_library(path, mode, element)``: loads the kernels of a cell that a user has written.

Raises:
    RuntimeError: the file is no library of that cell and element type.
"""

load_cuda_library = _C.load_cuda_library
"""``load_cuda_library(path, mode, element, device)``: loads those for a GPU.

Raises:
    RuntimeError: as `load_library`; or the library was compiled from other headers, or this build
        has no CUDA kernels.
"""

CPU = -1
"""In place of the number of a GPU."""

set_loader = _C.set_loader
"""``set_loader(load)``: ``load(mode, element type, gpu)`` is called when kernels of such a cell are
needed for the first time. It loads them, or returns why it cannot.
"""

RefusedError = _C.RefusedError
"""A RuntimeError: an operand does not fit, or no kernel covers it (`refusal` says why)."""


def refusal(operands: Operands) -> Refusal | None:
    """Why no kernel covers these tensors, from their types, devices, dtypes and memory; or None."""
    text = _C.refusal(operands.x, operands.h0, operands.c0, operands.weights)
    if text is None:
        return None
    return Refusal(Why.GAPS if text == _C.GAPS else Why.OPERAND, text)


WITHOUT_KERNELS: dict[tuple[str, torch.dtype, int], str] = {}
"""Why a cell that a user has written has no kernels, by its mode, the dtype of the tensors, and the
GPU or `CPU`. `rnnkern.own_cells` finds out.
"""


def gpu_of(device: torch.device) -> int:
    """The number of the GPU whose kernels run for tensors of that device, or `CPU`."""
    if device.type == "cuda":
        return device.index or 0
    return 0 if IS_STAND_IN else CPU


def refusal_on_gpus() -> str | None:
    """Why this build runs no cell that a user has written on a GPU, or None."""
    if cuda is not None or IS_STAND_IN:
        return None
    return "CUDA tensors, and this build of rnnkern has no CUDA kernels"


def refusal_of_cell(layer: Layer, x: Tensor) -> Refusal | None:
    """Why there are no kernels of the layer's cell for that input, or None.

    Those of a user's cell are compiled when they are first called. Until then there are some.
    """
    mode = layer.mode
    if not is_own(mode):
        return None
    if x.device.type not in ("cpu", "meta", "cuda"):
        why: str | None = "device other than cpu and cuda"
    else:
        gpu = gpu_of(x.device)
        why = None if gpu == CPU else refusal_on_gpus()
        why = why or WITHOUT_KERNELS.get((mode, x.dtype, gpu))
    # One warning for each cell: the pattern names it.
    return (
        None if why is None else Refusal(Why.CELL, f"the cell {mode} is not compiled: {{}}", (why,))
    )


def mode_refusal() -> Refusal | None:
    """Why no kernel may run in the current mode of torch, or None.

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
"""``plan(kernel, machine, *, T, N, I, total, deterministic, backward, frozen=False,
from_zeros=False)``: the plan and its text.
"""

compiler: str = _C.compiler
compiled_sets = _C.compiled_sets
instruction_set = _C.instruction_set
"""What the extension was built with, and the instruction set in use.

A set whose name extends that of another has kernels of its own for products of int8 (``vnni``) or
of int8 and bfloat16 (``bf16``, ``amx``) only.
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
(`rnnkern.autograd.record`). What is saved may be a bytearray, with the numbers of the tensor that
``Kernel.forward`` saves.

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

It also takes calls with ``lengths`` and ``reset``. None if no gradient arrives, if what was saved
is used up, or if the backward pass is not a plain one: it must be differentiable, a mode of torch
or a profiler has to see it, a hook has what was saved, a loop sums its gradients, or an operand is
refused.
"""

multiplies_as_bfloat16 = _C.multiplies_as_bfloat16
"""``multiplies_as_bfloat16(kernel, x)``: whether the kernels multiply float32 as bfloat16."""

are_worth_sums = _C.are_worth_sums
"""``are_worth_sums(kernel, x)``: whether `rnnkern.loops` should sum the gradients of a cell."""

CudaDevice = _C.CudaDevice
"""``CudaDevice(*, capability, multiprocessors, shared_bytes)``: a GPU as its plan sees it."""

cuda_plan = _C.cuda_plan
"""``cuda_plan(kernel, device, x, *, T, N, I, tf32, backward, deterministic=False,
has_library=True, records=False)``: the plan on that device and its text.

Only the dtype of x counts. `records`: forward saves what backward needs.
"""


def multiplied_as(kernel: Kernel, x: Tensor) -> str:
    """What products take this input of float32 as, if not as what it is."""
    return _C.multiplied_as(kernel, x) if x.device.type == "cpu" else ""


def describe(
    kernel: Kernel, x: Tensor, *, T: int, N: int, features: int, backward: bool, from_zeros: bool
) -> str:
    """Kernel and plan of one layer in words."""
    if x.device.type == "cuda":
        return _C.cuda_describe(kernel, x, T=T, N=N, I=features, backward=backward)
    _, text = plan(
        kernel,
        machine(kernel, torch.get_num_threads(), x),
        T=T,
        N=N,
        I=features,
        total=x.numel() // x.size(-1),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        backward=backward,
        from_zeros=from_zeros,
    )
    return f"{instruction_set()}, {text}"
