"""Wrong and odd input: the exception that torch.nn raises for the same call, or its result, and
never a crash.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import subprocesses
import torch
from support import CELLS, GATES, LAYERS, build, check, flatten, in_a_process, leaves_for, plain
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from wrong_calls import (
    BROKEN,
    BROKEN_INDICES,
    HERE,
    Case,
    H,
    I,
    Make,
    N,
    T,
    both,
    check_as_torch,
    on_cpu,
    packed,
    with_indices,
    x,
    zeros,
)

import rnnkern

pytestmark = pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")

INPUTS: dict[str, Case] = {
    "0-D": (lambda m: m()(torch.tensor(1.0)), ["0D", "2D or 3D"]),
    "1-D": (lambda m: m()(x(I)), ["1D", "2D or 3D"]),
    "4-D": (lambda m: m()(x(1, T, N, I)), ["4D", "2D or 3D"]),
    "features": (lambda m: m()(x(T, N, 7)), ["3", "7"]),
    "no-features": (lambda m: m()(x(T, N, 0)), ["3", "0"]),
    "features-2D": (lambda m: m()(x(T, 7)), ["3", "7"]),
    "no-rows": (lambda m: m()(x(T, 0, I)), []),
    "no-rows-stacked": (lambda m: m(I, H, 2, bidirectional=True)(x(T, 0, I)), []),
    "no-rows-batch-first": (lambda m: m(batch_first=True)(x(0, T, I)), []),
    "no-steps": (lambda m: m()(x(0, N, I)), ["length"]),
    "no-steps-2D": (lambda m: m()(x(0, I)), ["length"]),
    "no-steps-batch-first": (lambda m: m(batch_first=True)(x(N, 0, I)), ["length"]),
    "nothing-at-all": (lambda m: m()(x(0, 0, I)), ["length"]),
    "float64": (lambda m: m()(x(dtype=torch.float64)), ["float64", "float32"]),
    "float16": (lambda m: m()(x(dtype=torch.float16)), ["float16", "float32"]),
    "bfloat16": (lambda m: m()(x(dtype=torch.bfloat16)), ["bfloat16", "float32"]),
    "int64": (lambda m: m()(x(dtype=torch.int64)), ["int64", "float32"]),
    "bool": (lambda m: m()(x(dtype=torch.bool)), ["bool", "float32"]),
    "complex64": (lambda m: m()(x(dtype=torch.complex64)), ["complex64", "float32"]),
    "float32-for-float64": (lambda m: m().double()(x()), ["float32", "float64"]),
    "meta": (lambda m: m()(x(device="meta")), ["meta", HERE]),
    "module-on-meta": (lambda m: m(device="meta")(x()), ["meta", HERE]),
    "all-complex64": (lambda m: m().to(torch.complex64)(x(dtype=torch.complex64)), []),
    "sparse": (lambda m: m()(x().to_sparse()), []),
    "sparse-csr": (lambda m: m()(x(T, I).to_sparse_csr()), []),
    "mkldnn": (lambda m: m()(x().to_mkldnn()), []),
    "nested": (lambda m: m()(torch.nested.nested_tensor([x(2, I), x(4, I)])), []),
    "quantized": (lambda m: m()(torch.quantize_per_tensor(x(), 0.1, 0, torch.qint8)), []),
    "list": (lambda m: m()([1.0, 2.0]), []),
    "numpy": (lambda m: m()(np.zeros((T, N, I), np.float32)), []),
    "none": (lambda m: m()(None), []),
    "no-argument": (lambda m: m()(), ["input"]),
    "unknown-argument": (lambda m: m()(x(), foo=1), ["foo"]),
    "parameter": (lambda m: m()(nn.Parameter(x())), []),
}


@pytest.mark.parametrize("case", INPUTS)
@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_inputs_raise_torchs_errors(kind: str, case: str) -> None:
    check_as_torch(kind, *INPUTS[case])


# Functions of the kind, as LSTM has two states.
STATES: dict[str, Callable[[str], Case]] = {
    "size": lambda k: (lambda m: m()(x(), zeros(k, 1, N, 5)), ["(1, 2, 4)", "[1, 2, 5]"]),
    "rows": lambda k: (lambda m: m()(x(), zeros(k, 1, 3, H)), ["(1, 2, 4)", "[1, 3, 4]"]),
    "one-row": lambda k: (lambda m: m()(x(), zeros(k, 1, 1, H)), ["(1, 2, 4)", "[1, 1, 4]"]),
    "layers": lambda k: (lambda m: m()(x(), zeros(k, 2, N, H)), ["(1, 2, 4)", "[2, 2, 4]"]),
    "directions": lambda k: (
        lambda m: m(bidirectional=True)(x(), zeros(k, 1, N, H)),
        ["(2, 2, 4)", "[1, 2, 4]"],
    ),
    "batch-first": lambda k: (
        lambda m: m(batch_first=True)(x(), zeros(k, T, 1, H)),
        ["(1, 5, 4)", "[5, 1, 4]"],
    ),
    "2D-for-3D": lambda k: (lambda m: m()(x(), zeros(k, N, H)), ["3-D", "2-D"]),
    "3D-for-2D": lambda k: (lambda m: m()(x(T, I), zeros(k, 1, 1, H)), ["2-D", "3-D"]),
    "1D-for-2D": lambda k: (lambda m: m()(x(T, I), zeros(k, H)), ["2-D", "1-D"]),
    "size-2D": lambda k: (lambda m: m()(x(T, I), zeros(k, 1, 5)), ["4", "5"]),
    "float64": lambda k: (lambda m: m()(x(), zeros(k, 1, N, H, dtype=torch.float64)), []),
    "float16": lambda k: (lambda m: m()(x(), zeros(k, 1, N, H, dtype=torch.float16)), []),
    "int64": lambda k: (lambda m: m()(x(), zeros(k, 1, N, H, dtype=torch.int64)), []),
    "complex64": lambda k: (lambda m: m()(x(), zeros(k, 1, N, H, dtype=torch.complex64)), []),
    "meta": lambda k: (lambda m: m()(x(), zeros(k, 1, N, H, device="meta")), [HERE, "meta"]),
    "tuple-or-not": lambda k: (
        lambda m: m()(x(), torch.zeros(1, N, H) if k == "LSTM" else (torch.zeros(1, N, H),) * 2),
        [],
    ),
    "tuple-or-not-2-layers": lambda k: (
        lambda m: m(I, H, 2)(x(), torch.zeros(2, N, H) if k == "LSTM" else (torch.zeros(2, N, H),)),
        [],
    ),
    "list": lambda k: (lambda m: m()(x(), [torch.zeros(1, N, H), torch.zeros(1, N, H)]), []),
    "number": lambda k: (lambda m: m()(x(), 0.0), []),
    "string": lambda k: (lambda m: m()(x(), "ab"), []),
    "tuple-of-none": lambda k: (lambda m: m()(x(), (None, None)), []),
    "no-rows": lambda k: (lambda m: m()(x(T, 0, I), zeros(k, 1, 0, H)), []),
    "keyword": lambda k: (lambda m: m()(input=x(), hx=zeros(k, 1, N, H)), []),
}


def h(size: int = H) -> Tensor:
    return torch.zeros(1, N, size)


def c(size: int = H) -> Tensor:
    return torch.ones(1, N, size)


LSTM_STATES: dict[str, Case] = {
    "one": (lambda m: m()(x(), (h(),)), []),
    "three": (lambda m: m()(x(), (h(), c(), c())), []),
    "c-size": (lambda m: m()(x(), (h(), c(5))), ["(1, 2, 4)", "[1, 2, 5]"]),
    "c-rows": (lambda m: m()(x(), (h(), torch.zeros(1, 1, H))), ["(1, 2, 4)", "[1, 1, 4]"]),
    "c-2D": (lambda m: m()(x(), (h(), torch.zeros(N, H))), ["3-D", "2-D"]),
    "c-float64": (lambda m: m()(x(), (h(), c().double())), []),
    "c-meta": (lambda m: m()(x(), (h(), c().to("meta"))), []),
    "c-none": (lambda m: m()(x(), (h(), None)), []),
    "h-not-projected": (lambda m: m(proj_size=2)(x(), (h(), c())), ["(1, 2, 2)", "[1, 2, 4]"]),
    "c-projected": (lambda m: m(proj_size=2)(x(), (h(2), c(2))), ["(1, 2, 4)", "[1, 2, 2]"]),
    "projected": (lambda m: m(proj_size=2)(x(), (h(2), c())), []),
}


@pytest.mark.parametrize("case", STATES)
@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_states_raise_torchs_errors(kind: str, case: str) -> None:
    check_as_torch(kind, *STATES[case](kind))


@pytest.mark.parametrize("case", LSTM_STATES)
def test_states_of_lstm(case: str) -> None:
    check_as_torch("LSTM", *LSTM_STATES[case])


PACKED: dict[str, Callable[[str], Case]] = {
    "features": lambda k: (lambda m: m()(packed(2, 2, 1, data=x(5, 7))), ["3", "7"]),
    "3D": lambda k: (lambda m: m()(packed(2, 2, 1, data=x(5, 2, I))), []),
    "1D": lambda k: (lambda m: m()(packed(2, 2, 1, data=x(5))), []),
    "float64": lambda k: (lambda m: m()(packed(2, 1, data=x(3, I).double())), []),
    "meta": lambda k: (lambda m: m()(packed(2, 1, data=x(3, I).to("meta"))), []),
    "rows": lambda k: (lambda m: m()(packed(2, 2, 1), zeros(k, 1, 3, H)), ["2", "3"]),
    "2D-state": lambda k: (lambda m: m()(packed(2, 2, 1), zeros(k, 2, H)), []),
    "size": lambda k: (lambda m: m()(packed(2, 2, 1), zeros(k, 1, 2, 5)), ["5", "4"]),
    "none-at-all": lambda k: (
        lambda m: m()(PackedSequence(x(0, I), on_cpu([]).long())),
        [],
    ),
    "sizes-of-int32": lambda k: (
        lambda m: m()(PackedSequence(x(6, I), on_cpu([3, 3]).int())),
        [],
    ),
}


@pytest.mark.parametrize("case", PACKED)
@pytest.mark.parametrize("kind", LAYERS)
def test_packed_sequences(kind: str, case: str) -> None:
    check_as_torch(kind, *PACKED[case](kind))


# On a GPU an index out of range ends all that the process wants of it.
@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_an_index_out_of_range(kind: str) -> None:
    order = torch.tensor([0, 1, 5])
    check_as_torch(kind, lambda m: m()(packed(3, 3, sorted_indices=order), zeros(kind, 1, 3, H)))


@pytest.mark.cpu_only  # test_cuda.py has them in a process of their own
@pytest.mark.parametrize("state", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("kind", LAYERS)
def test_broken_packed_sequences(kind: str, case: str, state: bool) -> None:
    module = build(kind, I, H)
    with pytest.raises((RuntimeError, ValueError, TypeError)):
        module(BROKEN[case](), zeros(kind, 1, 2, H) if state else None)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("indices", BROKEN_INDICES, ids=str)
def test_broken_indices(kind: str, indices: list[int]) -> None:
    """Wrong `sorted_indices` are refused, or nothing is read through them."""
    module = build(kind, I, H)
    with pytest.raises((RuntimeError, ValueError, IndexError)):
        module(with_indices(indices), zeros(kind, 1, 3, H))


CONSTRUCTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "no-hidden-size": ((3,), {}),
    "input-0": ((0, 4), {}),
    "hidden-0": ((3, 0), {}),
    "hidden-negative": ((3, -1), {}),
    "input-float": ((3.0, 4), {}),
    "hidden-float": ((3, 4.0), {}),
    "no-layers": ((3, 4, 0), {}),
    "layers-float": ((3, 4), {"num_layers": 1.5}),
    "bias-int": ((3, 4), {"bias": 1}),
    "batch-first-int": ((3, 4), {"batch_first": 1}),
    "dropout-too-large": ((3, 4, 2), {"dropout": 1.5}),
    "dropout-negative": ((3, 4, 2), {"dropout": -0.1}),
    "dropout-bool": ((3, 4, 2), {"dropout": True}),
    "dropout-string": ((3, 4, 2), {"dropout": "x"}),
    "projection-too-large": ((3, 4), {"proj_size": 4}),
    "projection-negative": ((3, 4), {"proj_size": -1}),
    "projection": ((3, 4), {"proj_size": 1}),
    "nonlinearity": ((3, 4), {"nonlinearity": "sigmoid"}),
    "unknown": ((3, 4), {"foo": 1}),
    "device": ((3, 4), {"device": "nowhere"}),
    "integers": ((3, 4), {"dtype": torch.int64}),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("case", CONSTRUCTIONS)
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_wrong_constructions_raise_torchs_errors(kind: str, case: str) -> None:
    sizes, options = CONSTRUCTIONS[case]

    def call(make: Make) -> str:
        return repr(make(*sizes, **options))

    check_as_torch(kind, call)


def wrong_weights(kind: str) -> dict[str, tuple[str, Tensor]]:
    G = GATES[kind]
    return {
        "hh-rows": ("weight_hh_l0", torch.zeros(G * H + 1, H)),
        "hh-columns": ("weight_hh_l0", torch.zeros(G * H, H + 1)),
        "hh-fewer-columns": ("weight_hh_l0", torch.zeros(G * H, H - 1)),
        "hh-twice": ("weight_hh_l0", torch.zeros(2 * G * H, H)),
        "hh-1D": ("weight_hh_l0", torch.zeros(G * H)),
        "hh-3D": ("weight_hh_l0", torch.zeros(1, G * H, H)),
        "hh-empty": ("weight_hh_l0", torch.zeros(0, H)),
        "hh-none": ("weight_hh_l0", torch.zeros(0)),
        "ih-rows": ("weight_ih_l0", torch.zeros(G * H - 1, I)),
        "ih-columns": ("weight_ih_l0", torch.zeros(G * H, I - 1)),
        "ih-1D": ("weight_ih_l0", torch.zeros(G * H)),
        "bias-short": ("bias_ih_l0", torch.zeros(G * H - 1)),
        "bias-long": ("bias_hh_l0", torch.zeros(G * H + 3)),
        "bias-empty": ("bias_hh_l0", torch.zeros(0)),
        "bias-column": ("bias_hh_l0", torch.zeros(G * H, 1)),
        "hh-float64": ("weight_hh_l0", torch.zeros(G * H, H, dtype=torch.float64)),
        "bias-float64": ("bias_hh_l0", torch.zeros(G * H, dtype=torch.float64)),
        "hh-meta": ("weight_hh_l0", torch.zeros(G * H, H, device="meta")),
    }


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (kind, case)
        for kind in (*LAYERS, *CELLS)
        for case in wrong_weights(kind)
        if kind in LAYERS or case != "hh-meta"  # torch.nn's cells take it
    ],
)
def test_wrong_weights(kind: str, case: str) -> None:
    """A weight of the wrong shape is set. torch.nn.LSTM takes some and reads out of bounds:
    not compared.
    """
    name, weight = wrong_weights(kind)[case]
    name = name if kind in LAYERS else name.removesuffix("_l0")
    given = x(N, I) if kind in CELLS else x()
    for wrong in (nn.Parameter(weight), weight):
        module = build(kind, I, H)
        right = getattr(module, name)
        if not isinstance(wrong, nn.Parameter):
            delattr(module, name)
        setattr(module, name, wrong)
        with pytest.raises((RuntimeError, IndexError)) as caught:
            module(given)
        if wrong.dim() == right.dim() and wrong.shape != right.shape:
            axis = int(wrong.shape[0] == right.shape[0])
            assert str(wrong.shape[axis]) in str(caught.value)


@pytest.mark.parametrize("shape", [(1,), (1, -1)], ids=["one-number", "2D"])
@pytest.mark.parametrize("kind", LAYERS)
def test_biases_that_torch_broadcasts(kind: str, shape: tuple[int, ...]) -> None:
    """torch.nn adds whatever broadcasts; the same comes out, or it is refused."""
    bias = torch.linspace(-1, 1, GATES[kind] * H)
    bias = bias[:1] if shape == (1,) else bias.view(shape)
    ours, theirs = build(kind, I, H), getattr(nn, kind)(I, H)
    theirs.load_state_dict(ours.state_dict())
    for module in (ours, theirs):
        module.bias_ih_l0 = nn.Parameter(bias)
    try:
        actual = ours(x())
    except RuntimeError:
        return
    torch.testing.assert_close(actual, theirs(x()))


@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_projection(kind: str) -> None:
    if kind != "LSTM":
        with pytest.raises(ValueError, match="only supported for LSTM"):
            build(kind, I, H, proj_size=2)
        return
    for weight in (torch.zeros(3, H), torch.zeros(2, H + 1), torch.zeros(H, 2), torch.zeros(2)):
        module = build(kind, I, H, proj_size=2)
        module.weight_hr_l0 = nn.Parameter(weight)
        with pytest.raises(RuntimeError):
            module(x())


@pytest.mark.parametrize("replacement", [None, 1.0, [1.0]], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_that_are_no_tensors(kind: str, replacement: object) -> None:
    def call(make: Make) -> Any:
        module = make()
        del module.weight_hh_l0
        module.weight_hh_l0 = replacement
        return module(x())

    check_as_torch(kind, call)


@pytest.mark.parametrize("case", ["1-D", "features", "no-steps", "float64", "sparse", "meta"])
@pytest.mark.parametrize("kind", LAYERS)
def test_wrong_inputs_with_lengths(kind: str, case: str) -> None:
    """`lengths` does not change what is wrong with an input."""

    def call(make: Make) -> Any:
        module = make()
        ours = isinstance(module, getattr(rnnkern, kind))
        lengths = {"lengths": torch.tensor([2, 0])} if ours else {}
        return INPUTS[case][0](lambda: lambda given: module(given, **lengths))

    check_as_torch(kind, call)


@pytest.mark.parametrize("kind", LAYERS)
def test_inference_tensors_in_training(kind: str) -> None:
    with torch.inference_mode():
        inside = x()
    check_as_torch(kind, lambda m: m()(inside)[0].sum().backward())


@pytest.mark.parametrize("kind", LAYERS)
def test_a_failed_call_leaves_the_module_usable(kind: str) -> None:
    module = build(kind, I, H, num_layers=2)
    leaves = leaves_for(module, T, N)
    for wrong in (x(T, N, 7), x(1), x().double(), None):
        with pytest.raises((RuntimeError, ValueError, AttributeError)):
            module(wrong)
    with pytest.raises(ValueError, match="lengths"):
        module(x(), lengths=torch.tensor([1, 9], device="cpu"))
    check(module, leaves)


@pytest.mark.parametrize("kind", LAYERS)
def test_no_rows_has_gradients(kind: str) -> None:
    module = build(kind, I, H, num_layers=2, bidirectional=True)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves_for(module, T, 0).items()}
    outputs = flatten(plain(module, leaves))
    torch.stack([output.sum() for output in outputs.values()]).sum().backward()
    for tensor in (*module.parameters(), *leaves.values()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


@pytest.mark.parametrize("kind", LAYERS)
def test_subclasses_of_tensor(kind: str) -> None:
    class Tagged(torch.Tensor):
        pass

    module = build(kind, I, H)
    y, _ = module(x().as_subclass(Tagged))
    assert type(y) is Tagged
    torch.testing.assert_close(y.as_subclass(Tensor), oracle.twin(module)(x())[0])
    states = both(torch.zeros(1, N, H).as_subclass(Tagged), kind)
    assert type(module(x(), states)[0]) is Tagged


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_fake_tensors(kind: str) -> None:
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        module = getattr(rnnkern, kind)(I, H)
        y, _ = module(torch.randn(T, N, I))
    assert tuple(y.shape) == (T, N, H)


@functools.cache
def raised_by_huge_calls(device: str) -> dict[str, str]:
    return in_a_process(subprocesses.huge, device)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_outputs_that_no_memory_holds(device: torch.device, kind: str) -> None:
    raised = raised_by_huge_calls(device.type)
    own = {name: error for name, error in raised.items() if name.split()[0] == kind}
    assert own
    assert set(own.values()) <= {"RuntimeError", "MemoryError"}


@pytest.mark.cpu_only
def test_no_malformed_state_kills_the_process() -> None:
    """Thousands of calls in one process of its own: each is an exception, or torch.nn's result."""
    killed, calls = in_a_process(subprocesses.malformed_states)
    assert killed == []
    assert calls > 2000
