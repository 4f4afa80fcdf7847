"""Models for inference: recurrent modules whose weights are packed once for this CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence

from rnnkern import kernels
from rnnkern.call import is_compiling, mode_of, read, read_cell
from rnnkern.constructor import options_besides_torchs
from rnnkern.convert import expect_module, recurrent_modules
from rnnkern.interop import scripting
from rnnkern.interop.exporting import to_torch
from rnnkern.kernels import Refusal, Why
from rnnkern.known_cells import CELLS, name_of
from rnnkern.layer import Maybe, Operands, dense
from rnnkern.ops.kernel_ops import LIBRARY, TAGS, arguments, batch_of, rows_like, steps_of
from rnnkern.run import DTYPES
from rnnkern.sequence import Steps

_M = TypeVar("_M", bound=nn.Module)

LARGEST = 127
"""Integers of int8 weights lie between this and its negative."""

_MOST_COLUMNS = 2**31 // (128 * LARGEST)
"""Columns that a matrix of int8 may have: sums of its products have 32 bits (csrc/cpu/int8.h)."""

_KEY = "frozen_"
"""What keys of a ``state_dict`` begin with, so that no other module takes them for its own."""

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)

_increment_version = torch._C._increment_version

_living: WeakValueDictionary[int, Any] = WeakValueDictionary()
"""Packed weights by their number, which is what a compiled program knows of them."""


def freeze(model: _M, weights: torch.dtype | None = None) -> _M:
    """A copy of a model for inference on the CPU, whose recurrent weights are packed once.

    Each RNN, LSTM, GRU and cell in it, of rnnkern or of ``torch.nn``, is replaced by a
    `FrozenLayer` or a `FrozenCell`. These take the same calls, ``lengths`` and ``reset`` too, and
    give the same results. With ``weights=None`` these are, in every bit, those of
    ``torch.use_deterministic_algorithms(True)``. Dropout is off.

    ``model`` itself is left as it is, and everything else in it is copied, as ``copy.deepcopy``
    does. The frozen modules keep no reference to the parameters: they do not follow later edits of
    these. Forward hooks of the recurrent modules are kept. A module of a class that overrides
    ``forward``, or a method that ``forward`` calls, is left alone, as by `rnnkern.convert`.

    Args:
        model: any module. It may be a recurrent module itself.
        weights: as what the matrices are kept. None: their own dtype. ``torch.bfloat16``: half the
            memory of float32. CPUs that multiply bfloat16 round the input and the state for the
            products, too. ``torch.int8``: a quarter of the memory. Each row of a matrix has a
            scale, and in each step the rows of the input and of the state are rounded to int8, too,
            with a scale of their own. Sums are exact integers of 32 bits. Biases keep their dtype,
            and everything but the products is computed in float32.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
        ValueError: ``weights`` is another dtype, or the parameters of a recurrent module are not
            float32 as bfloat16 and int8 need them, not on the CPU, not of one dtype that the
            kernels know, not finite or with more than 132104 columns (int8), or computed by a hook.

    Example::

        >>> frozen = rnnkern.freeze(model, weights=torch.int8)
        >>> with torch.inference_mode():
        ...     output = frozen(x)
    """
    expect_module(model)
    if weights not in (None, torch.bfloat16, torch.int8):
        raise ValueError(f"weights must be None, torch.bfloat16 or torch.int8, got {weights}")
    for name, module in model.named_modules():
        if isinstance(module, _Frozen) and weights not in (None, module.weights):
            where = f" ({name})" if name else ""
            raise ValueError(
                f"{type(module).__name__}{where} is frozen already, with weights="
                f"{module.weights}: thaw it first to freeze it with weights={weights}"
            )
    memo = {
        id(module): _frozen(name, module, weights)
        for name, module in recurrent_modules(model, "rnnkern.freeze")
    }
    return copy.deepcopy(model, memo)


def thaw(model: _M) -> _M:
    """A copy of a frozen model that can be trained: the inverse of `freeze`.

    Its recurrent modules are of the classes that were frozen, with new parameters: the same numbers
    if ``weights`` was None, otherwise those that bfloat16 or int8 has left of them. A weight that
    was parametrized is a plain parameter. Weights that several modules shared are separate, with
    the same numbers.

    Args:
        model: any module.

    Raises:
        TypeError: ``model`` is no ``torch.nn.Module``.
    """
    expect_module(model)
    memo = {id(m): m.thawed() for m in model.modules() if isinstance(m, (FrozenLayer, FrozenCell))}
    return copy.deepcopy(model, memo)


class _Frozen(nn.Module):
    """What frozen layers and cells share. `freeze` makes them.

    Attributes:
        mode: the name of the cell.
        dtype: of input, output and state.
        weights: the dtype in which the matrices are kept.
    """

    mode: str
    dtype: torch.dtype
    weights: torch.dtype
    input_size: int
    hidden_size: int
    bias: bool
    num_layers: int
    bidirectional: bool
    batch_first: bool
    proj_size: int
    _is_cell: bool

    __prepare_scriptable__ = scripting.refuse
    _instead_of_script = "script the model before it is frozen, or thaw it (rnnkern.thaw)"

    def __init__(
        self, original: nn.Module, names: Sequence[str], weights: torch.dtype | None
    ) -> None:
        super().__init__()
        given = dict(zip(names, (getattr(original, name) for name in names), strict=True))
        self.mode, self.dtype = mode_of(original), given[names[0]].dtype
        self.weights, self._are_own = weights or self.dtype, weights is None
        self.input_size = original.input_size  # type: ignore[assignment]
        self.hidden_size = original.hidden_size  # type: ignore[assignment]
        self.bias = any(name.startswith("bias") for name in names)
        for name, default in (
            ("num_layers", 1),
            ("bidirectional", False),
            ("batch_first", False),
            ("proj_size", 0),
        ):
            setattr(self, name, default if self._is_cell else getattr(original, name))
        self._names = list(names)
        self._shell = [_without_weights(original)]  # in a list, because it is no part of the model
        kept: dict[str, Tensor] = {}
        for name, weight in given.items():
            kept |= self._kept(name, weight.detach())
        self._pack(kept)
        for name in _HOOKS:
            setattr(self, name, copy.copy(getattr(original, name)))
        self.eval()

    @property
    def nbytes(self) -> int:
        """Bytes that the weights take: packed matrices, biases, and scales of int8."""
        own = (*self._biases.values(), *self._scales.values())
        return int(self._packed.nbytes) + sum(t.numel() * t.element_size() for t in own)

    def step(self, x: Tensor, state: Any) -> Tensor:
        """One step of a stream, which writes the new state into the tensors of the state before.

        It allocates nothing but its output.

        Args:
            x: ``[N, I]``, or ``[I]`` for a single row.
            state: ``h``, or for an LSTM ``(h, c)``, which are overwritten. Of a layer
                ``[num_layers, N, H]``, as ``forward`` returns it, or ``[num_layers, H]``. Of a cell
                ``[N, H]`` or ``[H]``. With a projection, h has ``proj_size`` features.

        Returns:
            The output of the step, ``[N, O]`` or ``[O]``: h of the last layer, as a new tensor that
            later steps do not change. Of a GRU, an RNN and a cell as well.

        Raises:
            ValueError: the module is bidirectional.
            RuntimeError: a gradient would be recorded, forward mode is on, a tensor does not fit or
                has another dtype than the module, or the rows of a state overlap in memory.
        """
        if self.bidirectional:
            raise ValueError(
                f"{type(self).__name__}.step needs a module of one direction: the reverse "
                "direction reads future inputs"
            )
        given = tuple(state) if isinstance(state, list) else state
        states = given if isinstance(given, tuple) else (given,)
        try:
            made = self._step_of_casts(x, states) if self._casts else self._packed.step(x, given)
        except kernels.RefusedError:
            self._expect_dtypes_of_step(x, states)
            raise
        if made is None:
            for name, t in (("x", x), *(("state", s) for s in states)):
                if not isinstance(t, Tensor):
                    raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
            has_c = CELLS[self.mode].has_cell_state
            if len(states) != 1 + has_c or isinstance(given, Tensor) == has_c:
                wanted = "(h, c)" if has_c else "the tensor h"
                raise TypeError(f"state must be {wanted}, got {type(state).__name__}")
            self._refuse_gradient(x, *states)
            refusal = kernels.mode_refusal()
            why = "a profiler of torch" if refusal is None else refusal.text
            raise RuntimeError(f"{type(self).__name__}.step does not run under {why}")
        _increment_version(states)  # autograd notices edits of what it has saved
        return made

    def _step_of_casts(self, x: Tensor, states: tuple[Tensor, ...]) -> Tensor | None:
        """`step` in the dtype of the kernels, for a module of another one."""
        self._expect_dtypes_of_step(x, states)
        if not all(isinstance(t, Tensor) for t in (x, *states)):
            return None
        wide = _converted(states, self._computed)
        made = self._packed.step(x.to(self._computed), wide if len(wide) > 1 else wide[0])
        if made is None:
            return None
        with torch.inference_mode():  # as the kernels, it writes to any state
            for state, new in zip(states, wide, strict=True):
                state.copy_(new)
        return made.to(self.dtype)

    def _expect_dtypes_of_step(self, x: Any, states: tuple[Any, ...]) -> None:
        for name, t in zip(("x", "h", "c"), (x, *states), strict=False):
            if isinstance(t, Tensor) and t.dtype != self.dtype:
                raise RuntimeError(self._of_another_dtype(name, t))

    def thawed(self) -> nn.Module:
        """The trainable module, with new parameters."""
        module = copy.deepcopy(self._shell[0])
        for name, weight in self._unpacked().items():
            before = getattr(module, name)
            if self.weights == torch.int8 and name in self._matrices():
                weight = weight * self._scales[name][:, None]
            made = nn.Parameter(weight.to(self.dtype), requires_grad=before.requires_grad)
            setattr(module, name, made)
        if isinstance(module, nn.RNNBase):
            module._init_flat_weights()
        return module

    def flatten_parameters(self) -> None:
        """Nothing, because there are no parameters. Models call it in their forward."""

    def extra_repr(self) -> str:
        options = [f"{name_of(self.mode)}, {self.input_size}, {self.hidden_size}"]
        for name, default in (
            ("num_layers", 1),
            ("bidirectional", False),
            ("batch_first", False),
            ("proj_size", 0),
            ("bias", True),
        ):
            if getattr(self, name) != default:
                options.append(f"{name}={getattr(self, name)}")
        return ", ".join([*options, f"weights={self.weights}, nbytes={self.nbytes}"])

    # The weights

    def _matrices(self) -> list[str]:
        return [name for name in self._names if name.startswith("weight")]

    def _shape(self, name: str) -> tuple[int, ...]:
        kind, _, layer = name.partition("_")[2].partition("_l")
        rows, out = CELLS[self.mode].gates * self.hidden_size, self.proj_size or self.hidden_size
        if name.startswith("bias"):
            return (rows,)
        if kind == "hr":
            return out, self.hidden_size
        first = not layer or layer.partition("_")[0] == "0"
        wide = self.input_size if first else out * (2 if self.bidirectional else 1)
        return rows, wide if kind == "ih" else out

    def _kept(self, name: str, weight: Tensor) -> dict[str, Tensor]:
        """A weight as it is kept, by its keys of the ``state_dict`` without their prefix."""
        if name.startswith("bias"):
            return {name: weight}
        if self.weights != torch.int8:
            return {name: weight.to(self.weights)}
        integers, scale = quantized(weight)
        return {name: integers, f"scale_{name}": scale}

    @property
    def _computed(self) -> torch.dtype:
        """The dtype of the kernels' operands: float32 if the weights are of a smaller dtype."""
        return self.dtype if self.weights == self.dtype else torch.float32

    def _dtype_of(self, key: str) -> torch.dtype:
        return self.weights if key.startswith("weight") else self._computed

    def _pack(self, kept: dict[str, Tensor]) -> None:
        """Packs what `_kept` gave of all weights."""
        given = [kept[name].to(self._computed).contiguous() for name in self._names]
        scales = {
            name: kept[f"scale_{name}"].contiguous().clone()
            for name in self._matrices()
            if self.weights == torch.int8
        }
        numbers = "own" if self.weights == self.dtype else str(self.weights).partition(".")[2]
        kernel = kernels.kernel(
            self.mode,
            directions=2 if self.bidirectional else 1,
            hidden=self.hidden_size,
            proj=self.proj_size,
            bias=self.bias,
            batch_first=self.batch_first,
            is_cell=self._is_cell,
        )
        self._packed = kernels.Frozen(
            kernel, self.input_size, self.num_layers, numbers, given, list(scales.values())
        )
        self._scales = scales
        biases = (name for name in self._names if name.startswith("bias"))
        self._biases = {name: kept[name].to(self._computed, copy=True) for name in biases}
        self._casts = self._computed != self.dtype
        self._number: int = self._packed.number
        _living[self._number] = self._packed

    def _unpacked(self) -> dict[str, Tensor]:
        """Copies of the weights by name, the matrices as they are kept, in torch's order."""
        wide = torch.float64 if self._computed == torch.float64 else torch.float32
        matrices = {
            name: torch.empty(self._shape(name), dtype=wide, device="cpu")
            for name in self._matrices()
        }
        self._packed.unpack(list(matrices.values()))
        return {
            name: matrices[name].to(self.weights)
            if name in matrices
            else self._biases[name].clone()
            for name in self._names
        }

    def _tensors(self) -> dict[str, Tensor]:
        """Copies of all that is kept, by the keys of `_kept`."""
        scales = {f"scale_{name}": scale.clone() for name, scale in self._scales.items()}
        return self._unpacked() | scales

    # Copies and files

    def __getstate__(self) -> dict[str, Any]:
        state = {k: v for k, v in self.__dict__.items() if k not in _MADE_BY_PACK}
        return state | {"_tensors_kept": self._tensors()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = state.pop("_tensors_kept")
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack(kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        for name, value in self.__dict__.items():  # packed weights are never written to
            shared = name in _MADE_BY_PACK
            made.__dict__[name] = value if shared else copy.deepcopy(value, memo)
        return made

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        for key, tensor in self._tensors().items():
            destination[prefix + _KEY + key] = tensor

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        keys = [*self._names, *(f"scale_{name}" for name in self._scales)]
        own = {prefix + _KEY + key: key for key in keys}
        if strict:
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in own]
        missing = [full for full in own if full not in state_dict]
        missing_keys += missing if strict else []
        wrong = []
        for full, key in own.items():
            if full in state_dict:
                given = state_dict[full]
                if not isinstance(given, Tensor):
                    wrong.append(f"{full} must be a torch.Tensor, got {type(given).__name__}")
                    continue
                is_scale = key.startswith("scale_")
                shape = self._shape(key.removeprefix("scale_"))[: 1 if is_scale else 2]
                if tuple(given.shape) != shape or given.dtype != self._dtype_of(key):
                    wrong.append(
                        f"{full} must be {self._dtype_of(key)} of shape {shape}, "
                        f"got {given.dtype} of shape {tuple(given.shape)}"
                    )
        error_msgs += wrong
        if not wrong:
            given = {
                k: state_dict[full].detach().cpu() for full, k in own.items() if full in state_dict
            }
            self._pack(self._tensors() | given)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follows the model to another dtype, as parameters do. The kernels are of the CPU."""
        probe = fn(torch.empty(0, dtype=self.dtype, device="cpu"))
        if probe.device.type != "cpu" or probe.dtype not in DTYPES:
            raise RuntimeError(
                f"{type(self).__name__} is for one of {DTYPES} on the CPU, and cannot become "
                f"{probe.dtype} on {probe.device}: thaw the model (rnnkern.thaw) and change that. "
                "What comes before it in the model has been changed already"
            )
        if probe.dtype != self.dtype:
            kept = self._tensors()
            self.dtype = probe.dtype
            if self._are_own:
                self.weights, kept = probe.dtype, {k: fn(t) for k, t in kept.items()}
            self._pack(kept)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    # Calls

    def _refuse_gradient(self, *operands: Any) -> None:
        given = [t for t in operands if isinstance(t, Tensor)]
        _refuse_recording(type(self).__name__, given)
        if not is_compiling() and any(map(_has_tangent, given)):
            raise RuntimeError(
                f"{type(self).__name__} has no forward-mode derivative, and an operand has a "
                "tangent: thaw the model (rnnkern.thaw)"
            )

    def _run(self, operands: Operands, steps: Steps | None) -> Sequence[Tensor]:
        """``y, h_n`` and c_n if there is one; of a cell without y."""
        made = self._run_kernels(operands, steps)
        return [t.to(self.dtype) for t in made] if self._casts else made

    def _run_kernels(self, operands: Operands, steps: Steps | None) -> Sequence[Tensor]:
        names = ("input", "h_0", "c_0")
        x, h0, c0 = map(self._cast, names, (operands.x, operands.h0, operands.c0))
        self._refuse_gradient(x, h0, c0)
        if to_torch() or (not is_compiling() and torch._C._get_tracing_state() is not None):
            raise NotImplementedError(
                f"{type(self).__name__} cannot be exported or traced: its weights are packed for "
                "this CPU; export the model before it is frozen, or thaw it (rnnkern.thaw)"
            )
        if is_compiling() or kernels.mode_refusal() is not None:
            return torch.ops.rnnkern.frozen_kernel(  # type: ignore[no-any-return]
                x, self._number, h0, c0, *arguments(steps)
            )
        run = kernels.profiled(self._packed.forward, self.mode, " frozen")
        return _with_dense(run, x, h0, c0, steps)

    def _cast(self, name: str, t: Any) -> Any:
        """An operand as the kernels take it.

        Autocast has no say: what it has made of an operand becomes the module's dtype again.
        """
        if t is None or t.dtype == self._computed == self.dtype:
            return t
        of_autocast = torch.is_autocast_enabled("cpu") and t.is_floating_point()
        if t.dtype != self.dtype and not of_autocast:
            raise ValueError(self._of_another_dtype(name, t))
        return t.to(self._computed)

    def _of_another_dtype(self, name: str, t: Tensor) -> str:
        return f"{type(self).__name__} computes in {self.dtype}, got {name} of {t.dtype}"

    def _expect(self, call: Any) -> Any:
        if isinstance(call, Refusal):
            raise ValueError(f"{type(self).__name__}: {call.text}")
        return call


_MADE_BY_PACK = ("_packed", "_scales", "_biases", "_casts", "_number")


class FrozenLayer(_Frozen):
    """A frozen RNN, LSTM or GRU, which `freeze` makes.

    ``forward(input, hx=None, *, lengths=None, reset=None)`` is that of `rnnkern.LSTM`. Input and
    states must be of the module's ``dtype``, under ``torch.autocast`` too, unless autocast has made
    another one of them; results are of that dtype. ``model.half()`` and the like change it: weights
    of the module's own dtype change, too, and others stay, and are computed with in float32. The
    keys of its ``state_dict`` begin with
    ``frozen_``. It loads that of a module frozen with the same sizes and ``weights``.

    Attributes:
        dtype: of input, output and state.
        weights: the dtype in which the matrices are kept.
        nbytes: bytes that the weights take.

    Raises:
        RuntimeError: an operand requires a gradient and grad mode is on, or has a tangent of
            forward mode.
        TypeError, ValueError: an operand does not fit.
    """

    _is_cell = False
    # What `call.current_weights` reads.
    _flat_weights: Sequence[Tensor] = ()
    _flat_weights_names: Sequence[str] = ()

    def forward(
        self,
        input: Any,
        hx: Any = None,
        *,
        lengths: Tensor | None = None,
        reset: Tensor | None = None,
    ) -> Any:
        if lengths is None and reset is None and not self._casts and not is_compiling():
            try:
                result = self._packed.plain_call(input, hx)
            except kernels.RefusedError:
                result = None
            if result is not None:
                return result
        if not isinstance(input, (Tensor, PackedSequence)):
            raise TypeError(
                f"input must be a torch.Tensor or a PackedSequence, got {type(input).__name__}"
            )
        call = self._expect(read(self, input, hx, lengths, reset))
        y, hn, *cn = self._run(call.given, call.steps)
        return call.results(y, hn, cn[0] if cn else None)


class FrozenCell(_Frozen):
    """A frozen RNNCell, LSTMCell or GRUCell, which `freeze` makes; see `FrozenLayer`.

    ``forward(input, hx=None)`` is that of `rnnkern.LSTMCell`.

    Raises:
        RuntimeError, TypeError, ValueError: as of a `FrozenLayer`.
    """

    _is_cell = True
    # What `call.read_cell` reads.
    weight_ih: Tensor | None = None
    weight_hh: Tensor | None = None
    bias_ih: Tensor | None = None
    bias_hh: Tensor | None = None

    def forward(self, input: Any, hx: Any = None) -> Any:
        if not self._casts and not is_compiling():
            try:
                result = self._packed.plain_call(input, hx)
            except kernels.RefusedError:
                result = None
            if result is not None:
                return result
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a torch.Tensor, got {type(input).__name__}")
        call = self._expect(read_cell(self, input, hx))
        made = self._run(call.given, None)
        return made[0] if len(made) == 1 else tuple(made)


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as int8 and the scale of each row: ``weight = integers * scale[:, None]``."""
    if not torch.isfinite(weight).all():
        raise ValueError("weights=torch.int8 needs finite parameters, got NaN or infinity")
    if weight.shape[1] > _MOST_COLUMNS:
        raise ValueError(
            f"weights=torch.int8 needs matrices of at most {_MOST_COLUMNS} columns, because longer "
            f"sums do not fit into 32 bits, got {weight.shape[1]}"
        )
    most = weight.abs().amax(1) if weight.shape[1] else weight.new_zeros(weight.shape[0])
    scale = most / LARGEST
    integers = (weight / scale.where(scale > 0, 1)[:, None]).round()
    return integers.clamp(-LARGEST, LARGEST).to(torch.int8), scale


# What is frozen


def _converted(states: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Copies that share memory where these do, so that the kernels refuse them alike."""
    memory = {t.untyped_storage().data_ptr(): t for t in states}
    if len(memory) == len(states) and all(t.is_contiguous() for t in states):
        return tuple(t.to(dtype) for t in states)
    copies = {
        place: t.detach().new_empty(0).set_(t.untyped_storage()).to(dtype)
        for place, t in memory.items()
    }
    return tuple(
        copies[t.untyped_storage().data_ptr()].as_strided(t.size(), t.stride(), t.storage_offset())
        for t in states
    )


def _frozen(name: str, module: nn.Module, weights: torch.dtype | None) -> _Frozen:
    try:
        return _twin(module, weights)
    except ValueError as error:
        where = f"{type(module).__name__}{f' ({name})' if name else ''}"
        raise ValueError(f"rnnkern.freeze: {where}: {error}") from None


def _twin(module: nn.Module, weights: torch.dtype | None) -> _Frozen:
    if kernels.IS_STAND_IN:
        raise ValueError("this build has no kernels for the CPU")
    for name, value in options_besides_torchs(module):
        if name != "recurrent_dropout":
            raise ValueError(f"frozen layers have no {name}, got {name}={value}")
    if parametrize.is_parametrized(module):
        module = _without_parametrizations(module)
    names = list(_names(module))
    for name in names:
        if name not in module._parameters:
            raise ValueError(f"a hook computes {name}; remove it first (remove_weight_norm)")
    given = [module._parameters[name] for name in names]
    dtypes = {None if t is None else t.dtype for t in given}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        raise ValueError(f"parameters must be of one of {DTYPES}, got {dtypes}")
    devices = {t.device.type for t in given if t is not None}
    if devices != {"cpu"}:
        raise ValueError(f"parameters must be on the CPU, got {devices}")
    (dtype,) = dtypes
    assert dtype is not None
    if weights not in (None, dtype) and dtype != torch.float32:
        raise ValueError(f"weights={weights} needs parameters of torch.float32, got {dtype}")
    kind = FrozenCell if isinstance(module, nn.RNNCellBase) else FrozenLayer
    return kind(module, names, weights)


def _without_parametrizations(module: nn.Module) -> nn.Module:
    """A copy that shares the parameters, with plain ones in place of those that are computed.

    ``remove_parametrizations`` would change the class, which the copy shares with the module.
    """
    plain: Any = object.__new__(type(module).__mro__[1])  # parametrizing has derived its class
    plain.__dict__.update(module.__dict__)
    plain._modules = {k: v for k, v in module._modules.items() if k != "parametrizations"}
    computed = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
    plain._parameters = module._parameters | {
        name: nn.Parameter(value.detach().clone()) for name, value in computed.items()
    }
    if isinstance(module, nn.RNNBase):
        plain._flat_weights = [plain._parameters[name] for name in module._flat_weights_names]
    return plain  # type: ignore[no-any-return]


def _names(module: nn.Module) -> Iterator[str]:
    """The weights of a module in torch's flat order."""
    if isinstance(module, nn.RNNBase):
        yield from module._flat_weights_names
        return
    yield from ("weight_ih", "weight_hh")
    if module._parameters["bias_ih"] is not None or module._parameters["bias_hh"] is not None:
        yield from ("bias_ih", "bias_hh")


def _without_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters have no memory."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in module.parameters(recurse=False)
    }
    return copy.deepcopy(module, memo)


# The operator that compiled programs call


def _with_dense(run: Any, x: Tensor, h0: Maybe, c0: Maybe, steps: Steps | None) -> list[Tensor]:
    """Runs the kernels, with dense copies if the operands have gaps."""
    try:
        return list(run(x, h0, c0, steps))
    except kernels.RefusedError:
        refusal = kernels.refusal(Operands(x, h0, c0, ()))
        if refusal is None or refusal.why is not Why.GAPS:
            raise
    return list(run(dense(x), dense(h0), dense(c0), steps))


def _has_tangent(t: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(t).tangent is not None  # type: ignore[no-untyped-call]


def _packed_of(number: int) -> Any:
    packed = _living.get(number)
    if packed is None:
        raise RuntimeError("the frozen module of this compiled program is gone")
    return packed


def _run_frozen(x: Tensor, number: int, h0: Maybe, c0: Maybe, *steps: Any) -> list[Tensor]:
    return _with_dense(_packed_of(number).forward, x, h0, c0, steps_of(*steps))


def _fake_run_frozen(x: Tensor, number: int, h0: Maybe, c0: Maybe, *steps: Any) -> list[Tensor]:
    active, order, _, _, packed = steps
    own = _packed_of(number)
    kernel, H = own.kernel, own.hidden
    if kernel.is_cell:
        count = 1 + kernel.has_cell_state
        return [x.new_empty(*x.shape[:-1], H) for _ in range(count)]
    D, O = kernel.directions, kernel.out
    N = batch_of(kernel, x, active, order, h0, packed)
    y = rows_like(kernel, x, D * O, packed)
    widths = (O, H) if kernel.has_cell_state else (O,)
    return [y, *(x.new_empty(own.layers * D, N, width) for width in widths)]


def _refuse_recording(name: str, given: Sequence[Tensor]) -> None:
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        raise RuntimeError(
            f"{name} records no gradient, and an operand requires one: call it under "
            "torch.no_grad() or torch.inference_mode(), or thaw the model (rnnkern.thaw)"
        )


LIBRARY.define(
    "frozen_kernel(Tensor x, int frozen, Tensor? h0, Tensor? c0, Tensor? active, Tensor? order, "
    "Tensor? reset, Tensor? placed, bool packed) -> Tensor[]",
    tags=TAGS,
)
LIBRARY.impl("frozen_kernel", _run_frozen, "CPU")
LIBRARY.impl("frozen_kernel", _fake_run_frozen, "Meta")


def _run_one_by_one(info: Any, in_dims: Any, *operands: Any) -> tuple[list[Tensor], list[int]]:
    """`torch.func.vmap` over a frozen module."""
    # The module cannot see it, because a batch does not say that it requires a gradient.
    _refuse_recording("a frozen module", [z for z in operands if isinstance(z, Tensor)])
    pairs = list(zip(operands, in_dims, strict=True))
    made = [
        torch.ops.rnnkern.frozen_kernel(*(z if d is None else z.select(d, i) for z, d in pairs))
        for i in range(info.batch_size)
    ]
    if made:
        return [torch.stack(parts) for parts in zip(*made, strict=True)], [0] * len(made[0])
    # Of no sample: the shapes are those of one that has not been drawn.
    one = (z if d is None else z.new_zeros(z.movedim(d, 0).shape[1:]) for z, d in pairs)
    outputs = [part.new_empty(0, *part.shape) for part in torch.ops.rnnkern.frozen_kernel(*one)]
    return outputs, [0] * len(outputs)


torch.library.register_vmap("rnnkern::frozen_kernel", _run_one_by_one, lib=LIBRARY)
