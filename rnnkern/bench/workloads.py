"""The named workloads, as sizes and as pairs of modules ready to be checked and timed.

Everything that runs them (``rnnkern compare``, the benchmarks, the tests) builds its modules,
inputs and calls here, so that they all mean the same by "LSTM at char_lm, forward+backward".
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

import rnnkern
from rnnkern import tolerance

CELLS = ("RNN", "LSTM", "GRU")
#: The modules of a single step.
STEP_CELLS = ("RNNCell", "LSTMCell", "GRUCell")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}

FORWARD = "forward"
FORWARD_GRAD = "forward (grad)"
FORWARD_BACKWARD = "forward+backward"
#: Without recording for autograd; recorded; recorded and followed by backward to parameters and
#: input.
PASSES = (FORWARD, FORWARD_GRAD, FORWARD_BACKWARD)

# relu has a kink at 0. If rounding decides on which side of it a pre-activation is, every library's
# gradient in float32 can be wrong by any amount. With this seed no pre-activation in mnist_rnn is
# within 5e-6 of 0 (tests/test_workloads.py).
SEED = 93

_NONLINEARITY = {"mnist_rnn": "relu"}


@dataclass(frozen=True)
class Precision:
    """A named precision: the dtype of all tensors, and whether products of float32 may round their
    operands to TF32, which only a GPU does.
    """

    name: str
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = {
    "float32": Precision("float32", torch.float32),
    "tf32": Precision("tf32", torch.float32, tf32=True),
    "bfloat16": Precision("bfloat16", torch.bfloat16),
    "float16": Precision("float16", torch.float16),
    "float64": Precision("float64", torch.float64),
}
#: Of single steps on the CPU, which are short enough for every type.
STEP_PRECISIONS = tuple(precision for precision in PRECISIONS.values() if not precision.tf32)


@contextmanager
def tf32_allowed(allowed: bool) -> Iterator[None]:
    """Allows or forbids TF32 for a while, in products and in cuDNN, where it is the default."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32
    cudnn.allow_tf32 = matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32 = before


@dataclass(frozen=True)
class Workload:
    """Sizes of a layer's job: ``steps`` T, ``batch`` N, ``input_size`` I, ``hidden_size`` H.

    ``regime`` is a word for the amount of work and ``origin`` says where the sizes come from;
    ``nonlinearity`` is for the RNN cell only. ``is_step``: of the modules of a single step.
    """

    name: str
    steps: int
    batch: int
    input_size: int
    hidden_size: int
    regime: str = ""
    origin: str = ""
    nonlinearity: str = "tanh"
    is_step: bool = False

    @property
    def cells(self) -> tuple[str, ...]:
        """The modules it is for."""
        return STEP_CELLS if self.is_step else CELLS


def _load() -> Any:
    return json.loads(Path(__file__).with_name("workloads.json").read_text(encoding="utf-8"))


@lru_cache
def default_precisions(device_type: str = "cpu") -> tuple[Precision, ...]:
    """The default precisions on a device type, ``"cpu"`` or ``"cuda"``."""
    names = ["float32"] if device_type == "cpu" else _load()["gpu_dtypes"]
    return tuple(PRECISIONS[name] for name in names)


@lru_cache
def load_workloads(device_type: str = "cpu") -> dict[str, Workload]:
    """The workloads for a device type, ``"cpu"`` or ``"cuda"``, by name and in order of size."""
    data = _load()
    entries = data["workloads" if device_type == "cpu" else "gpu_workloads"]
    if device_type != "cpu":  # the notebook's comparison belongs to every device
        entries = [e for e in data["workloads"] if e["name"] == "notebook"] + entries
    return {e["name"]: _workload(e) for e in entries}


@lru_cache
def load_step_workloads() -> dict[str, Workload]:
    """The workloads of the modules of a single step, by name and in order of size."""
    return {e["name"]: _workload(e) for e in _load()["step_workloads"]}


def _workload(entry: dict[str, Any]) -> Workload:
    return Workload(
        name=entry["name"],
        steps=entry.get("T", 1),
        batch=entry["N"],
        input_size=entry["I"],
        hidden_size=entry["H"],
        regime=entry.get("regime", ""),
        origin=entry.get("from", entry.get("why", "")),
        nonlinearity=_NONLINEARITY.get(entry["name"], "tanh"),
        is_step="T" not in entry,
    )


def flops(cell: str, workload: Workload, pass_name: str = FORWARD) -> int:
    """Floating-point operations: ``2 T N G H (I + H)`` forward, three times that with backward.

    Only the matrix products count, a multiply and an add as two. G gates: RNN 1, GRU 3, LSTM 4.
    Each product of the forward pass has two in the backward pass, for the gradients of its two
    factors.
    """
    w = workload
    products = GATES[cell] * w.hidden_size * (w.input_size + w.hidden_size)
    forward = 2 * w.steps * w.batch * products
    return 3 * forward if pass_name == FORWARD_BACKWARD else forward


def grad_mode(pass_name: str) -> torch.set_grad_enabled:
    """The context in which a pass runs: gradients off for the plain forward pass."""
    return torch.set_grad_enabled(pass_name != FORWARD)


@dataclass(frozen=True)
class Side:
    """A module of one library with its input and the gradient of its output, ready to run.

    ``x`` is a leaf ``[T, N, I]`` that requires a gradient; ``dy`` is ``[T, N, H]``. Of a single
    step they have no axis of time, and the states before it, ``[N, H]``, are leaves too.
    """

    module: nn.RNNBase | nn.RNNCellBase
    x: Tensor
    dy: Tensor
    states: tuple[Tensor, ...] = ()

    @property
    def operands(self) -> tuple[Any, ...]:
        """What the module is called with."""
        if not self.states:
            return (self.x,)
        return self.x, self.states[0] if len(self.states) == 1 else self.states

    def call(self, pass_name: str) -> Callable[[], object]:
        """What is timed for a pass, to be called within ``grad_mode(pass_name)``.

        The mode is left to the caller because a loop of calls enters it once. Forward+backward
        drops the old gradients first, as ``zero_grad()`` does.
        """
        module, operands, dy = self.module, self.operands, self.dy
        if pass_name != FORWARD_BACKWARD:
            return lambda: module(*operands)
        leaves = [self.x, *self.states, *module.parameters()]

        def forward_backward() -> None:
            for leaf in leaves:
                leaf.grad = None
            torch.autograd.backward(_first(module(*operands)), dy)

        return forward_backward

    def results(self, pass_name: str) -> dict[str, Tensor]:
        """All that a pass computes, by name: output, final states, with backward the gradients."""
        with grad_mode(pass_name):
            made = self.module(*self.operands)
        output = _first(made)
        if self.states:
            found = {"output": output} | ({"c": made[1]} if isinstance(made, tuple) else {})
        else:
            states = made[1] if isinstance(made[1], tuple) else (made[1],)
            found = {"output": output, **dict(zip(("h_n", "c_n"), states, strict=False))}
        if pass_name == FORWARD_BACKWARD:
            leaves = {"input": self.x, **dict(self.module.named_parameters())}
            leaves |= dict(zip(("h_0", "c_0"), self.states, strict=False))
            for leaf in leaves.values():
                leaf.grad = None
            torch.autograd.backward(output, self.dy)
            for name, leaf in leaves.items():
                if leaf.grad is not None:
                    found[f"grad of {name}"] = leaf.grad
                leaf.grad = None
        return {name: tensor.detach() for name, tensor in found.items()}


def _first(made: Any) -> Tensor:
    """The output of a layer, or the hidden state of a cell."""
    return made[0] if isinstance(made, tuple) else made  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Case:
    """One cell at one workload, as numbers: parameters, input ``x``, output gradient ``dy``, and of
    a single step the states before it.

    Drawn once, on the CPU, in float32 so that a float64 reference starts from exactly the same
    numbers.
    """

    cell: str
    workload: Workload
    state: dict[str, Tensor]
    x: Tensor
    dy: Tensor
    states: tuple[Tensor, ...] = ()

    def side(
        self, library: ModuleType, dtype: torch.dtype, device: str | torch.device = "cpu"
    ) -> Side:
        """The module of ``library`` (``torch.nn`` or ``rnnkern``) with these numbers."""
        module = _module(library, self.cell, self.workload, dtype, device)
        module.load_state_dict(self.state)
        x, *states = (
            leaf.to(device, dtype, copy=True).requires_grad_() for leaf in (self.x, *self.states)
        )
        return Side(module, x, self.dy.to(device, dtype), tuple(states))


def _module(
    library: ModuleType,
    cell: str,
    workload: Workload,
    dtype: torch.dtype,
    device: str | torch.device,
) -> nn.RNNBase | nn.RNNCellBase:
    is_elman = cell in ("RNN", "RNNCell")
    options: dict[str, str] = {"nonlinearity": workload.nonlinearity} if is_elman else {}
    build: Callable[..., nn.RNNBase | nn.RNNCellBase] = getattr(library, cell)
    return build(workload.input_size, workload.hidden_size, dtype=dtype, device=device, **options)


def draw_case(cell: str, workload: Workload) -> Case:
    """A case with torch.nn's own initial parameters, a normal input and a normal output gradient.

    The same numbers every time; the caller's random state is left alone.
    """
    w = workload
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)
        module = _module(nn, cell, workload, torch.float32, "cpu")
        on_cpu: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
        rows = (w.batch,) if w.is_step else (w.steps, w.batch)
        x = torch.randn(*rows, w.input_size, **on_cpu)
        dy = torch.randn(*rows, w.hidden_size, **on_cpu)
        count = (2 if cell == "LSTMCell" else 1) if w.is_step else 0
        states = tuple(torch.randn(*rows, w.hidden_size, **on_cpu) for _ in range(count))
    return Case(cell, workload, module.state_dict(), x, dy, states)


def notebook_case(cell: str) -> Case:
    """The notebook's own comparison: every parameter 0.3, loss = the sum of the output."""
    drawn = draw_case(cell, load_workloads()["notebook"])
    for parameter in drawn.state.values():
        nn.init.constant_(parameter, 0.3)
    return Case(cell, drawn.workload, drawn.state, drawn.x, torch.ones_like(drawn.dy))


def _runs(passes: Iterable[str]) -> list[str]:
    """The passes that a check of these runs; the first computes all that the others do."""
    names = set(passes)
    recorded = FORWARD_BACKWARD if FORWARD_BACKWARD in names else FORWARD_GRAD
    runs = [recorded] if names - {FORWARD} else []
    return runs + ([FORWARD] if FORWARD in names else [])


def reference_results(
    case: Case, device: str | torch.device = "cpu", passes: Iterable[str] = PASSES
) -> dict[str, Tensor]:
    """What torch.nn computes in float64: one reference for checks in several dtypes."""
    return case.side(nn, torch.float64, device).results(_runs(passes)[0])


def check_case(
    case: Case,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    passes: Iterable[str] = PASSES,
    reference: dict[str, Tensor] | None = None,
) -> dict[str, tolerance.Verdict]:
    """Checks rnnkern at one case by the rule of :mod:`rnnkern.tolerance`.

    Gradients are checked if forward+backward is among the passes. The plain forward pass is checked
    by itself, because it may run other kernels than the recorded one. A call that torch.nn runs
    because no kernel covers it fails the check.

    Args:
        reference: `reference_results` of the same case, device and passes, if computed already.

    Returns:
        A verdict for every output, final state and gradient, by name.
    """
    if reference is None:
        reference = reference_results(case, device, passes)
    torch_side = case.side(nn, tolerance.yardstick_dtype(dtype), device)
    our_side = case.side(rnnkern, dtype, device)
    verdicts = {}
    for run in _runs(passes):
        theirs = torch_side.results(run)
        with warnings.catch_warnings():
            warnings.simplefilter("error", rnnkern.FallbackWarning)
            try:
                ours = our_side.results(run)
            except rnnkern.FallbackWarning as warning:
                return {"kernel": tolerance.wrong(str(warning))}
        suffix = " without grad" if run == FORWARD else ""
        for name, tensor in theirs.items():
            if name not in ours:
                verdict = tolerance.wrong("missing")
            elif ours[name].dtype != dtype:
                verdict = tolerance.wrong(f"dtype {ours[name].dtype}, should be {dtype}")
            else:
                verdict = tolerance.check(ours[name], tensor, reference[name])
            verdicts[name + suffix] = verdict
    return verdicts
