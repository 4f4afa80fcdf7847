"""The decorator that makes a Python function a cell."""

from __future__ import annotations

import functools
import hashlib
import inspect
import keyword
import os
import re
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rnnkern import known_cells
from rnnkern.known_cells import State
from rnnkern.own_cells import build
from rnnkern.own_cells.derive import derive
from rnnkern.own_cells.expression import CellError
from rnnkern.own_cells.generate import generate, shape_of
from rnnkern.own_cells.trace import arguments, trace

MAX_GATES, MAX_STATES, MAX_PARAMETERS = 8, 4, 4
LONGEST_NAME = 64
_adding = threading.Lock()
_TAKEN = ("weight_ih", "weight_hh", "weight_hr", "bias_ih", "bias_hh")


def cell(
    *, gates: Sequence[str], states: Sequence[str] = ("h",), parameters: Sequence[str] = ()
) -> Callable[[Callable[..., Any]], OwnCell]:
    """Makes a function of one unit in one time step a cell for `rnnkern.Recurrent`.

    The function is called as ``function(x, h, prev)``, or ``function(x, h, prev, own)`` if it has
    parameters, and returns the new states in the order of ``states``. ``x.g`` is ``W_ih x + b_ih``
    of gate g, ``h.g`` is ``W_hh h + b_hh``, ``prev.h`` the state before the step, and ``own.p`` a
    parameter, which has one number for each unit. It may use + - * / abs, comparisons, and
    `rnnkern.sigmoid`, ``tanh``, ``relu``, ``exp``, ``log``, ``rsqrt``, ``softplus``,
    ``hard_sigmoid``, ``maximum``, ``minimum`` and ``where``.

    Args:
        gates: names of the blocks of ``hidden_size`` rows of the weights, in their order. Gates of
            which x and h are used apart, and not as the sum ``x.g + h.g``, take twice the memory;
            put them last.
        states: ``("h",)``, or h and up to three more. The module takes and returns a tuple of them.
            Only h enters the products of the next step.
        parameters: names of parameters, at most 4.

    Raises:
        CellError: a name is wrong, or the function does something that cannot be traced, such as a
            branch on a value; the error names the line.

    Example::

        >>> @rnnkern.cell(gates=("f", "g"), states=("h",))
        ... def mgu(x, h, prev):
        ...     f = rnnkern.sigmoid(x.f + h.f)
        ...     return (1 - f) * prev.h + f * rnnkern.tanh(x.g + f * h.g)
        >>> layer = rnnkern.Recurrent(mgu, input_size=80, hidden_size=256)
    """
    gates, states, parameters = (
        _names(what, given)
        for what, given in (("gates", gates), ("states", states), ("parameters", parameters))
    )
    if not 1 <= len(gates) <= MAX_GATES:
        raise CellError(f"a cell has 1 to {MAX_GATES} gates, got {len(gates)}")
    if states[:1] != ("h",) or len(states) > MAX_STATES:
        raise CellError(f'states must be "h" and at most {MAX_STATES - 1} others, got {states}')
    if len(parameters) > MAX_PARAMETERS:
        raise CellError(
            f"a cell has at most {MAX_PARAMETERS} parameters of its own, got {len(parameters)}"
        )
    for name in parameters:
        if name in _TAKEN:
            raise CellError(f"parameters: {name!r} is the name of a weight")
    return lambda function: OwnCell(function, gates, states, parameters)


def _names(what: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise CellError(f"{what} must be a tuple of names, got {given!r}")
    for name in given:
        wrong = not isinstance(name, str) or not name.isidentifier() or not name.isascii()
        if wrong or keyword.iskeyword(name) or name.startswith("_"):
            raise CellError(f"{what}: {name!r} is not the name of an attribute")
    if len(set(given)) != len(given):
        raise CellError(f"{what}: a name is there twice, in {tuple(given)}")
    return tuple(given)


class OwnCell:
    """A cell that a user has written. Calling it calls the function.

    Attributes:
        name: of the function.
        gates, states, parameters: as `cell` was given them.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        gates: tuple[str, ...],
        states: tuple[str, ...],
        parameters: tuple[str, ...],
    ) -> None:
        if not callable(function):
            raise CellError(f"a cell is a function, got {type(function).__name__}")
        for attribute, value in getattr(function, "__dict__", {}).items():
            if not hasattr(type(self), attribute):  # a cell has a `mode` of its own, for example
                setattr(self, attribute, value)
        functools.update_wrapper(self, function, updated=())
        self.__qualname__: str = getattr(function, "__qualname__", "cell")
        self.function = function
        # It becomes a part of names of files, which may not be long.
        name = getattr(function, "__name__", "cell")[:LONGEST_NAME]
        self.name = re.sub(r"\W", "_", name, flags=re.ASCII)
        self.gates, self.states, self.parameters = gates, states, parameters
        traced = trace(function, self.name, gates, states, parameters)
        self._derived = derive(traced, self.name, gates, parameters)
        _ = self.mode  # makes the cell known to programs that are loaded

    def __call__(self, *arguments: Any) -> Any:
        return self.function(*arguments)

    def __repr__(self) -> str:
        return f"<rnnkern cell {self.name} of the gates {', '.join(self.gates)}>"

    def __reduce__(self) -> str:
        """A cell is pickled as a function is: by its name."""
        return self.__qualname__

    @functools.cached_property
    def mode(self) -> str:
        """The name of the cell for the kernels, which follows from what it computes."""
        digest = hashlib.sha256(self._text_without_mode().encode()).hexdigest()
        mode = f"{self.name}-{digest[:12]}"
        with _adding:
            if mode not in known_cells.CELLS:
                known_cells.add_cell(
                    mode,
                    self.gates,
                    self.parameters,
                    **shape_of(self._derived),
                    number=int(digest[:10], 16),
                    step=self.step,
                )
                build.SOURCES[mode] = lambda: self._generated(mode)
        return mode

    @functools.cached_property
    def source(self) -> str:
        """The cell in C++."""
        return self._generated(self.mode)

    def _text_without_mode(self) -> str:
        return self._generated("") + repr((self.gates, self.states, self.parameters))

    def _generated(self, mode: str) -> str:
        try:
            # Of its code, because of the function itself it may be that of another, wrapped one.
            about = inspect.getsource(getattr(self.function, "__code__", self.function))
        except (OSError, TypeError):
            about = self.name
        if not mode:
            about = ""  # comments and layout change nothing
        return generate(self._derived, mode, self.gates, self.parameters, about)

    def step(self, a: Tensor, b: Tensor, state: State, *own: Tensor) -> State:
        """The reference: the function on tensors (`rnnkern.known_cells.Cell.step`)."""
        x, h = a.chunk(len(self.gates), -1), b.chunk(len(self.gates), -1)
        values = {"x": x, "h": h, "prev": state, "own": own}
        made = self.function(
            *arguments(self.gates, self.states, self.parameters, lambda kind, i, _: values[kind][i])
        )
        made = made if isinstance(made, tuple) else (made,)
        # A state may be a parameter alone, or a choice of two numbers. Another one stays the very
        # tensor from which the function may have made h.
        return tuple(
            z
            if z.shape == x[0].shape and z.dtype == before.dtype
            else z.to(before.dtype).expand_as(x[0])
            for z, before in zip(made, state, strict=True)
        )


def precompile(
    *cells: OwnCell,
    dtypes: torch.dtype | Sequence[torch.dtype] = torch.float32,
    folder: str | os.PathLike[str] | None = None,
    instruction_set: str | None = None,
    cuda_capability: tuple[int, int] | None = None,
) -> list[Path]:
    """Compiles cells now, for this machine or for others, which then need no compiler.

    A machine finds the libraries if its environment variable ``RNNKERN_CACHE`` names a folder with
    them, and if it has the same version of rnnkern. It may have another processor, if that has the
    instruction set. A GPU must have the compute capability, and a driver that is not older than
    nvcc.

    Args:
        cells: what `rnnkern.cell` has made of functions.
        dtypes: of the layers, one or several. If the instruction set multiplies bfloat16, float32
            has a second library, for ``torch.autocast`` and
            ``torch.set_float32_matmul_precision("medium")``, and with AMX a third one for "high".
        folder: where to write; the cache if it is None. ``~`` is the home folder.
        instruction_set: one of `rnnkern.build_info`'s ``isa_compiled``, the one in use if None.
            On the machines it must be the one that ``isa`` names.
        cuda_capability: of GPUs, such as ``(9, 0)``, as ``torch.cuda.get_device_capability`` gives
            it. Then the libraries are those of the CUDA kernels, and nvcc compiles them.

    Returns:
        The paths of the libraries.

    Raises:
        TypeError: there is something else than a cell among ``cells``, or no dtypes in
            ``dtypes``.
        ValueError: a dtype, the instruction set or the compute capability is not known.
        RuntimeError: there is no compiler, or it fails; or there is no home folder for ``~``.
        OSError: the folder cannot be made or written to, or others may write to it.
    """
    for each in cells:
        if not isinstance(each, OwnCell):
            raise TypeError(f"precompile takes cells of rnnkern.cell, got {type(each).__name__}")
    wanted = [dtypes] if isinstance(dtypes, torch.dtype) else dtypes
    if not isinstance(wanted, (list, tuple)):
        raise TypeError(f"dtypes must be a torch.dtype or a list of them, got {dtypes!r}")
    where = build.cache_folder() if folder is None else Path(folder).expanduser()
    modes = [each.mode for each in cells]
    return build.precompile(modes, wanted, where, instruction_set, cuda_capability)
