"""What the tests share: building modules and inputs, and comparing a module with torch.nn and the
oracle.
"""

from __future__ import annotations

import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from socket import socket
from typing import Any, TypeAlias

import forks
import oracle
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

import rnnkern
from rnnkern import tolerance

Leaves: TypeAlias = dict[str, Tensor]
Call: TypeAlias = Callable[[nn.Module, Leaves], Any]

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3, "RNNCell": 1, "LSTMCell": 4, "GRUCell": 3}
WIDE_DTYPES = (torch.float32, torch.float64)
DTYPES = (*WIDE_DTYPES, torch.bfloat16, torch.float16)

# Each cell in each form it has: the table most tests run over.
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNN": ("RNN", {}),
    "RNN-relu": ("RNN", {"nonlinearity": "relu"}),
    "LSTM": ("LSTM", {}),
    "LSTM-proj": ("LSTM", {"proj_size": 3}),
    "GRU": ("GRU", {}),
}
CELL_FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNNCell": ("RNNCell", {}),
    "RNNCell-relu": ("RNNCell", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}


def build(kind: str, *sizes: int, dtype: torch.dtype = torch.float32, **options: Any) -> nn.Module:
    """rnnkern's module `kind`; its weights are float32 numbers also in float64, so that torch.nn
    can have the same.

    On a GPU they are in one block that is laid out for cuDNN, as those of users are.
    """
    module = getattr(rnnkern, kind)(*sizes, **options).to(dtype)
    if isinstance(module, nn.RNNBase):
        with cudnn():
            module.flatten_parameters()
    return module


def build_form(form: str, *sizes: int, proj_size: int | None = None, **options: Any) -> nn.Module:
    """The module of a form. `proj_size` changes that of a form with a projection, and no other."""
    kind, own = (FORMS | CELL_FORMS)[form]
    if proj_size is not None and "proj_size" in own:
        own = own | {"proj_size": proj_size}
    return build(kind, *sizes, **own, **options)


@contextmanager
def cudnn(enabled: bool = True) -> Iterator[None]:
    """cuDNN in torch.nn, or torch's own operators."""
    before = torch.backends.cudnn.enabled
    torch.backends.cudnn.enabled = enabled
    try:
        yield
    finally:
        torch.backends.cudnn.enabled = before


def autocast(dtype: torch.dtype = torch.bfloat16, *, enabled: bool = True) -> torch.autocast:
    """`torch.autocast` for the device of the test."""
    return torch.autocast(torch.get_default_device().type, dtype=dtype, enabled=enabled)


@functools.cache
def torch_nn_autocasts_lstm() -> bool:
    """Whether torch.nn.LSTM runs under autocast on this CPU. On x86-64 without AVX-512 oneDNN
    refuses it (Zen 3, torch 2.13).
    """
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        lstm, x = nn.LSTM(1, 1), torch.ones(1, 1, 1)
    try:
        with torch.no_grad(), torch.autocast("cpu"):
            lstm(x)
    except RuntimeError as error:
        if "primitive" not in str(error):
            raise
        return False
    return True


def without_onednn(is_so: bool) -> AbstractContextManager[None]:
    """A context in which torch takes no kernels of oneDNN; if not ``is_so``, all is as it was."""
    return torch.backends.mkldnn.flags(enabled=False) if is_so else nullcontext()


def pack_rows(rows: list[Tensor], *, enforce_sorted: bool = True) -> PackedSequence:
    """`pack_sequence`, which needs its lengths on the CPU but makes them on the default device."""
    with torch.device("cpu"):
        return pack_sequence(rows, enforce_sorted=enforce_sorted)


def initial_states(module: nn.Module, rows: int | None) -> Leaves:
    """`h0`, and `c0` for LSTM: [layers * directions, rows, size] for a layer, [rows, size] for a
    cell.
    """
    if isinstance(module, nn.RNNBase):
        count: tuple[int, ...] = (module.num_layers * (2 if module.bidirectional else 1),)
        width = module.proj_size or module.hidden_size
    else:
        count, width = (), module.hidden_size
    batch = () if rows is None else (rows,)
    states = {"h0": torch.randn(*count, *batch, width)}
    if oracle.has_cell_state(module):
        states["c0"] = torch.randn(*count, *batch, module.hidden_size)
    return states


def leaves_for(module: nn.RNNBase, T: int, N: int | None, *, hx: bool = True) -> Leaves:
    """Random inputs for a layer, unbatched where N is None: `x`, and the states with `hx`."""
    shape: tuple[int, ...] = (T,) if N is None else (N, T) if module.batch_first else (T, N)
    leaves = {"x": torch.randn(*shape, module.input_size)}
    return leaves | initial_states(module, N) if hx else leaves


def states_of(leaves: Mapping[str, Tensor]) -> Tensor | tuple[Tensor, Tensor] | None:
    """The `hx` argument that the leaves stand for."""
    if "c0" in leaves:
        return leaves["h0"], leaves["c0"]
    return leaves.get("h0")


def plain(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves))


def on_threads(call: Call, threads: int) -> Call:
    """`call`, and what follows it, with another number of threads."""

    def with_threads(module: nn.Module, leaves: Leaves) -> Any:
        torch.set_num_threads(threads)
        return call(module, leaves)

    return with_threads


def flatten(outputs: Any, name: str = "out") -> dict[str, Tensor]:
    """Every tensor of nested outputs under a name of its own."""
    if isinstance(outputs, PackedSequence):
        return {name: outputs.data}
    if isinstance(outputs, Tensor):
        return {name: outputs}
    found: dict[str, Tensor] = {}
    for index, output in enumerate(outputs):
        found |= flatten(output, f"{name}.{index}")
    return found


def weighted_sum(outputs: Mapping[str, Tensor]) -> Tensor:
    """A loss in float64 in which every element of every output has a random weight of its own."""
    generator = torch.Generator().manual_seed(1)
    parts = []
    for output in outputs.values():
        weights = torch.randn(output.shape, generator=generator, device="cpu")
        parts.append((output.double() * weights.to(output.device)).sum())
    return torch.stack(parts).sum()


def penalized(call: Call) -> Call:
    """The outputs, and the gradients of them by every leaf and parameter, themselves
    differentiable: what a penalty is made of.
    """

    def with_gradients(module: nn.Module, leaves: Leaves) -> Any:
        outputs = flatten(call(module, leaves))
        wanted = [*leaves.values(), *module.parameters()]
        gradients = torch.autograd.grad(weighted_sum(outputs), wanted, create_graph=True)
        return [*outputs.values(), *gradients]

    return with_gradients


def evaluate(
    module: nn.Module, leaves: Leaves, call: Call = plain, *, backward: bool = True
) -> dict[str, Tensor]:
    """Every output of one call, and the gradient of every leaf and parameter that requires it, zero
    if unused.
    """
    dtype = next(p.dtype for p in module.parameters())
    own = {name: leaf.detach().to(dtype, copy=True) for name, leaf in leaves.items()}
    for leaf in own.values():
        leaf.requires_grad_(backward)
    module.zero_grad()
    with torch.set_grad_enabled(backward):
        outputs = flatten(call(module, own))
    values = {name: output.detach().clone() for name, output in outputs.items()}
    if backward:
        loss = weighted_sum(outputs)
        if loss.requires_grad:  # the oracle's does not if no row takes a step
            loss.backward()
        for name, tensor in [*own.items(), *module.named_parameters()]:
            if tensor.requires_grad:
                grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
                values[f"d{name}"] = grad.detach().clone()
    return values


def assert_agree(
    ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], reference: Mapping[str, Tensor]
) -> None:
    """Every tensor of ours is as near to the reference as rnnkern.tolerance wants it to be."""
    assert ours.keys() == reference.keys()
    verdicts = {name: tolerance.check(ours[name], theirs[name], reference[name]) for name in ours}
    assert not {name: str(verdict) for name, verdict in verdicts.items() if not verdict}


def has_smooth_gradient(module: nn.Module) -> bool:
    """Not that of relu in 16 bits: rounding moves a unit over the kink now and then."""
    dtype = next(p.dtype for p in module.parameters())
    return dtype in WIDE_DTYPES or getattr(module, "nonlinearity", "tanh") != "relu"


def yardsticks(
    ours: nn.Module, leaves: Leaves, call: Call = plain, *, backward: bool = True
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What torch.nn and the oracle give, with the weights of ours."""
    dtype = next(p.dtype for p in ours.parameters())
    theirs = oracle.twin(ours, tolerance.yardstick_dtype(dtype))
    wide = oracle.twin(ours, torch.float64)
    return (
        evaluate(theirs, leaves, call, backward=backward),
        evaluate(wide, leaves, call, backward=backward),
    )


def check(
    ours: nn.Module,
    leaves: Leaves,
    call: Call = plain,
    *,
    oracle_call: Call | None = None,
    backward: bool = True,
) -> dict[str, Tensor]:
    """Compares outputs and gradients of `call(ours, leaves)` with torch.nn's and the oracle's;
    returns ours.

    If the gradient jumps, it compares only the outputs. `test_integers_are_exact` looks at such
    gradients.
    """
    backward = backward and has_smooth_gradient(ours)
    got = evaluate(ours, leaves, call, backward=backward)
    assert_agree(got, *yardsticks(ours, leaves, oracle_call or call, backward=backward))
    return got


def check_as_tf32(ours: nn.Module, leaves: Leaves) -> None:
    """That a layer in float32 has at most twice the error that its products must have as TF32.

    No library is the yardstick, because one may multiply small matrices in float32 all the same.
    """
    reference = oracle.twin(ours, torch.float64)
    as_tf32 = evaluate(
        reference, leaves, lambda m, own: oracle.run_as_tf32(m, own["x"], states_of(own))
    )
    assert_agree(
        evaluate(ours, leaves),
        {name: result.float() for name, result in as_tf32.items()},
        evaluate(reference, leaves),
    )


def of_integers(T: int, N: int, I: int, H: int, dtype: torch.dtype) -> tuple[nn.Module, Leaves]:
    """A relu network of small integers, and its input: every product and sum is exact."""

    def integers(*shape: int, low: int = -1, high: int = 2) -> Tensor:
        return torch.randint(low, high, shape).float()

    module = build("RNN", I, H, nonlinearity="relu", bidirectional=True, dtype=dtype)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(integers(*parameter.shape))
            if "weight_hh" in name:  # few terms, or the numbers outgrow 24 bits
                parameter.mul_(torch.rand(parameter.shape) < 2 / H)
    return module, {"x": integers(T, N, I, low=-3, high=4), "h0": integers(2, N, H)}


def with_integer_gradients(module: nn.Module, leaves: Leaves) -> dict[str, Tensor]:
    """Outputs, and gradients of a loss with integer weights."""
    dtype = next(module.parameters()).dtype
    own = {name: leaf.to(dtype, copy=True).requires_grad_() for name, leaf in leaves.items()}
    y, h_n = plain(module, own)
    (y.sum() - 2 * h_n.sum()).backward()
    tensors = [*own.items(), *module.named_parameters()]
    return {"y": y.detach(), "h_n": h_n.detach()} | {name: t.grad for name, t in tensors}


def assert_bitwise(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if not torch.equal(ours[name], theirs[name])]


def in_a_process(
    function: Callable[..., Any], *arguments: Any, timeout: float = 240, **env: str | None
) -> Any:
    """What a function of a module returns, called in a process of its own.

    It may crash or hang without taking the tests with it. Environment variables given as None are
    unset.

    Raises:
        ChildError: the process raised or died.
    """
    changed = {**os.environ, **env}
    given = {name: value for name, value in changed.items() if value is not None}
    (result,) = forks.results(forks.start(function, *arguments, env=given), timeout=timeout)
    return result


def in_two_processes(
    function: Callable[..., Any], *arguments: Any, timeout: float = 120
) -> list[Any]:
    """The same of two processes at once, to which the environment says what torchrun would say."""
    with socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    started = [
        forks.start(function, *arguments, env={**os.environ, **shared, "RANK": str(rank)})
        for rank in range(2)
    ]
    return forks.results(*started, timeout=timeout)


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Its modules can be imported, and are gone afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if (folder / f"{name}.py").exists():
                del sys.modules[name]


def pair(kind: str, *sizes: int, **options: object) -> tuple[nn.Module, nn.Module]:
    """Ours and torch's with the same parameters."""
    ours = build(kind, *sizes, **options)
    theirs = getattr(nn, kind)(*sizes, **options)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


class Seen(TorchDispatchMode):
    """The operators of rnnkern that have run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "rnnkern":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def compiled(call: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(call, fullgraph=True, backend="aot_eager", **options)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_of(module: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """Of weights and input: all outputs count."""

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs = flatten(functional_call(module, weights, (x,), options))
        return sum(output.square().sum() for output in outputs.values())  # type: ignore[return-value]

    return loss


class PassingMode(torch.overrides.TorchFunctionMode):
    """A user's mode, which sees torch's functions and leaves them as they are."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class Halved(nn.Module):
    """A parametrization."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight * 2


class Tagger(nn.Module):
    def __init__(self, rnn: nn.Module, features: int) -> None:
        super().__init__()
        self.rnn, self.head = rnn, nn.Linear(features, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.rnn(x)
        return self.head(y)


def reverted(model: nn.Module) -> nn.Module:
    """A copy of a model, with torch.nn's modules in place of rnnkern's."""
    return rnnkern.revert(copy.deepcopy(model))
