"""Cells that are written in Python: what they compute, and what cannot be a cell."""

from __future__ import annotations

import copy
import functools
import io
import math
import pickle
from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from support import WIDE_DTYPES, Leaves, assert_agree, evaluate, flatten
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import cells, kernels, known_cells, run
from rnnkern.kernels import Refusal, Why
from rnnkern.ops import second_order
from rnnkern.own_cells import expression
from rnnkern.own_cells.cell import OwnCell

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.own_cells,
    pytest.mark.skipif(kernels.IS_STAND_IN, reason="kernels of own cells are for CPUs"),
]

SHIPPED = [getattr(cells, name) for name in cells.__all__]
T, N, I, H = 5, 3, 4, 19


@rnnkern.cell(gates=("a", "b"), states=("h", "c"), parameters=("u",))
def strange(x: Any, h: Any, prev: Any, own: Any) -> Any:
    """Reads h beside c, has a gate with two slots, and most functions."""
    kept = rnnkern.where((x.a + h.a > 0) & (prev.c <= 1), prev.c, 0.5 * prev.c)
    c = rnnkern.sigmoid(x.a + h.a) * kept + rnnkern.hard_sigmoid(own.u * prev.h)
    bounded = rnnkern.minimum(rnnkern.maximum(abs(c), 0.1), rnnkern.softplus(h.b))
    grown = rnnkern.exp(-bounded) - rnnkern.log(1 + c * c) * rnnkern.rsqrt(1 + prev.h * prev.h)
    return rnnkern.tanh(x.b / (2 + bounded)) + 0.1 * grown, c


@rnnkern.cell(gates=("a",), states=("h",))
def bent(x: Any, h: Any, prev: Any) -> Any:
    return abs(x.a) + 0.5 * prev.h


def by_reference(module: nn.Module, leaves: Leaves) -> Any:
    return module._torch_forward(leaves["x"], states_of(leaves))


def by_kernels(module: nn.Module, leaves: Leaves) -> Any:
    return module(leaves["x"], states_of(leaves))


def states_of(leaves: Leaves) -> Any:
    states = tuple(leaf for name, leaf in leaves.items() if name != "x")
    return states if len(states) > 1 else states[0]


def inputs(module: Any, dtype: torch.dtype = torch.float64) -> Leaves:
    torch.manual_seed(1)
    shape = (module.num_layers * (1 + module.bidirectional), N, H)
    leaves = {"x": torch.randn(T, N, I)}
    # n of the sLSTM, by which h is divided, is not below zero.
    leaves |= {f"{state}0": torch.rand(shape) for state in module.cell.states}
    return {name: leaf.to(dtype) for name, leaf in leaves.items()}


@rnnkern.cell(gates=("a", "b"), states=("h", "c", "same", "before"))
def plain(x: Any, h: Any, prev: Any) -> Any:
    """States that are one expression, a state before the step, and a sum itself."""
    made = rnnkern.tanh(x.a + h.a) * prev.c
    return made, made, x.b + h.b, prev.h


@rnnkern.cell(gates=("a",), states=("h", "c"))
def leaky(x: Any, h: Any, prev: Any) -> Any:
    """Saves its c and nothing else, because backward needs h and c alone."""
    c = 0.9 * prev.c + 0.1 * (x.a + h.a)
    return rnnkern.tanh(c), c


def compares(x: Any, h: Any, prev: Any) -> Any:
    """What backward needs of a is the outcome of the comparison."""
    a, b = x.a + h.a, x.b + h.b
    return rnnkern.tanh(rnnkern.where(a * b < 1, 0.3 * prev.h, b))


def check_against_reference(cell: OwnCell, dtype: torch.dtype) -> None:
    """The kernels and the function on tensors: results, and all gradients."""
    module = rnnkern.Recurrent(cell, I, H, num_layers=2, bidirectional=True, dtype=dtype)
    leaves = inputs(module, dtype)
    ours, theirs = (evaluate(module, leaves, call) for call in (by_kernels, by_reference))
    assert not kernels.WITHOUT_KERNELS
    if dtype == torch.float64:
        torch.testing.assert_close(ours, theirs)
    else:
        wide = copy.deepcopy(module).double()
        assert_agree(ours, theirs, evaluate(wide, leaves, by_reference))


@pytest.mark.parametrize("cell", [*SHIPPED, strange, plain, leaky], ids=lambda cell: cell.name)
def test_kernels_and_reference_agree(cell: OwnCell) -> None:
    check_against_reference(cell, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_type_is_as_exact_as_the_reference(dtype: torch.dtype) -> None:
    check_against_reference(cells.peephole_lstm, dtype)


@pytest.mark.parametrize(
    ("cell", "listed"),
    [
        (cells.rnn_tanh, rnnkern.RNN),
        (cells.lstm, rnnkern.LSTM),
        (cells.gru, rnnkern.GRU),
    ],
    ids=lambda given: getattr(given, "name", None),
)
def test_cells_of_torch_nn(cell: OwnCell, listed: Callable[..., Any]) -> None:
    """Written in Python they compute what their hand-written kernels compute, and load the
    parameters of torch.nn's modules.
    """
    theirs = listed(I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    ours = rnnkern.Recurrent(cell, I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    leaves = inputs(ours)
    torch.testing.assert_close(
        evaluate(ours, leaves, by_kernels), evaluate(theirs, leaves, by_kernels)
    )


@pytest.mark.parametrize("cell", [*SHIPPED, strange, plain, leaky], ids=lambda cell: cell.name)
def test_derivatives(cell: OwnCell, monkeypatch: pytest.MonkeyPatch) -> None:
    """With lengths and episodes, of the first and second order, also by differences."""
    module = rnnkern.Recurrent(cell, 2, 3, bidirectional=True, dtype=torch.float64)
    names = [name for name, _ in module.named_parameters()]
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[2, 0] = True
    options = {"lengths": torch.tensor([4, 3]), "reset": reset}
    torch.manual_seed(2)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, weights, strict=True))
        return tuple(flatten(functional_call(module, named, (x,), options)).values())

    operands = (x, *module.parameters())
    assert torch.autograd.gradcheck(outputs, operands, fast_mode=True)
    assert torch.autograd.gradgradcheck(outputs, operands, fast_mode=True)
    monkeypatch.setattr(second_order, "has_kernel", lambda _: False)  # by torch's operators
    assert torch.autograd.gradgradcheck(outputs, operands, fast_mode=True)


def test_derivatives_of_abs_at_zero_are_those_of_torch() -> None:
    module = rnnkern.Recurrent(bent, 1, 1, bias=False, dtype=torch.float64)
    nn.init.ones_(module.weight_ih_l0)
    nan = float("nan")
    x = torch.tensor([0.0, -0.0, 2.0, -3.0, nan], dtype=torch.float64, requires_grad=True)
    wanted = torch.autograd.grad(x.abs().sum(), x)[0]
    found = torch.autograd.grad(module(x.view(1, -1, 1))[0].sum(), x, create_graph=True)[0]
    torch.testing.assert_close(found.detach(), wanted, equal_nan=True)
    assert torch.equal(torch.autograd.grad(found[:4].sum(), x)[0][:4], torch.zeros(4).double())


def test_derivatives_of_gradients_of_samples() -> None:
    """Of a cell's own parameters too, whose gradients are then those of each row."""
    module = rnnkern.Recurrent(cells.peephole_lstm, I, H, dtype=torch.float64)
    x = torch.randn(T, N, I, dtype=torch.float64)

    def loss(p: Tensor, x: Tensor) -> Tensor:
        return functional_call(module, {"p_i_l0": p}, (x[:, None],))[0].sin().sum()

    def derivative(slopes: Callable[[Tensor], Tensor]) -> Tensor:
        p = module.p_i_l0.detach().requires_grad_()
        return torch.autograd.grad(slopes(p).pow(3).sum(), p)[0]

    def one_by_one(p: Tensor) -> Tensor:
        samples = (loss(p, x[:, n]) for n in range(N))
        return torch.stack([torch.autograd.grad(z, p, create_graph=True)[0] for z in samples])

    found = derivative(lambda p: vmap(grad(loss), (None, 1))(p, x))
    torch.testing.assert_close(found, derivative(one_by_one))


def test_a_gate_that_is_only_compared() -> None:
    cell = rnnkern.cell(gates=("a", "b"))(compares)
    check_against_reference(cell, torch.float64)
    module = rnnkern.Recurrent(cell, 2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)


@pytest.mark.parametrize("cell", [leaky, strange, cells.s_lstm], ids=lambda c: c.name)
def test_gradients_of_compiled_programs_and_of_samples(cell: OwnCell) -> None:
    module = rnnkern.Recurrent(cell, I, H, num_layers=2, bidirectional=True, dtype=torch.float64)
    x, lengths = torch.randn(T, N, I, dtype=torch.float64), torch.tensor([T, 1, 3])
    named = dict(module.named_parameters())
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for options in ({}, {"lengths": lengths}):
        found = [
            torch.autograd.grad(run(x, **options)[0].square().sum(), module.parameters())
            for run in (module, compiled)
        ]
        torch.testing.assert_close(*found)

    def loss(named: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(module, named, (x,))[0].square().sum()

    samples = vmap(grad(loss), (None, 1))(named, x.unsqueeze(2))
    torch.testing.assert_close({k: z.sum(0) for k, z in samples.items()}, grad(loss)(named, x))


FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "exp": (rnnkern.exp, np.exp),
    "log": (rnnkern.log, np.log),
    "softplus": (rnnkern.softplus, lambda z: np.logaddexp(z, 0)),
    "rsqrt": (rnnkern.rsqrt, lambda z: 1 / np.sqrt(z)),
}


@rnnkern.cell(gates=("a", "b", "c", "d"), states=("h", "c"))
def of_functions(x: Any, h: Any, prev: Any) -> Any:
    """Each function of its own input, chosen by c."""
    made = rnnkern.where(prev.c == 0, rnnkern.exp(x.a + h.a), rnnkern.log(x.b + h.b))
    made = rnnkern.where(prev.c == 2, rnnkern.softplus(x.c + h.c), made)
    made = rnnkern.where(prev.c == 3, rnnkern.rsqrt(x.d + h.d), made)
    return rnnkern.where(prev.c == 4, rnnkern.hard_sigmoid(x.a + h.a), made), prev.c + 1


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_functions_are_exact(dtype: torch.dtype) -> None:
    """Within 3 units of the last place, over the range of the results."""
    largest = 88 if dtype == torch.float32 else 709
    given = {
        "exp": torch.linspace(-largest + 2, largest + 0.7, 4001, dtype=dtype),
        "log": torch.logspace(-30, 30, 4001, dtype=dtype),
        "softplus": torch.linspace(-60, 60, 4001, dtype=dtype),
        "rsqrt": torch.logspace(-30, 30, 4001, dtype=dtype),
    }
    module = rnnkern.Recurrent(of_functions, 4, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_ih_l0.copy_(torch.eye(4))
        module.weight_hh_l0.zero_()
        for k, (name, z) in enumerate(given.items()):
            x = torch.ones(1, len(z), 4, dtype=dtype)
            x[0, :, k] = z
            c0 = torch.full((1, len(z), 1), float(k), dtype=dtype)
            y, _ = module(x, (torch.zeros_like(c0), c0))
            exact = FUNCTIONS[name][1](z.numpy().astype(np.longdouble))
            unit = np.spacing(np.abs(exact).astype(z.numpy().dtype)).astype(np.longdouble)
            worst = np.max(np.abs(y[0, :, 0].numpy().astype(np.longdouble) - exact) / unit)
            assert worst <= 3, (name, float(worst))


def test_a_function_with_attributes_of_those_names() -> None:
    def function(x: Any, h: Any, prev: Any) -> Any:
        return rnnkern.tanh(x.a + h.a)

    function.mode = function.step = function.source = "its own"  # type: ignore[attr-defined]
    function.note = "kept"  # type: ignore[attr-defined]
    cell = rnnkern.cell(gates=("a",))(function)
    assert cell.note == "kept"  # type: ignore[attr-defined]

    @functools.wraps(cell)
    def half(x: Any, h: Any, prev: Any) -> Any:
        return 0.5 * cell(x, h, prev)

    again = rnnkern.cell(gates=("a",))(half)
    assert cell.mode != again.mode
    assert {cell.mode, again.mode} <= known_cells.CELLS.keys()
    assert "tanh" in cell.source
    assert "def half" in again.source


@pytest.mark.parametrize("dtype", WIDE_DTYPES, ids=str)
def test_functions_at_the_ends(dtype: torch.dtype) -> None:
    inf, nan = math.inf, math.nan
    given = [inf, -inf, nan, 0.0, -1.0]
    expected = {
        0: [inf, 0.0, nan, 1.0, math.exp(-1)],
        1: [inf, nan, nan, -inf, nan],
        2: [inf, 0.0, nan, math.log(2), math.log1p(math.exp(-1))],
        4: [1.0, 0.0, nan, 0.5, 1 / 3],
    }
    module = rnnkern.Recurrent(of_functions, 4, 1, bias=False, dtype=dtype)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        for k, values in expected.items():
            module.weight_ih_l0.zero_()
            module.weight_ih_l0[k % 4, 0] = 1
            x = torch.zeros(1, len(given), 4, dtype=dtype)
            x[0, :, 0] = torch.tensor(given, dtype=dtype)
            c0 = torch.full((1, len(given), 1), float(k), dtype=dtype)
            y, _ = module(x, (torch.zeros_like(c0), c0))
            wanted = torch.tensor(values, dtype=dtype)
            torch.testing.assert_close(y[0, :, 0], wanted, equal_nan=True)
    on_tensors = rnnkern.hard_sigmoid(torch.tensor(given, dtype=dtype))
    torch.testing.assert_close(on_tensors, torch.tensor(expected[4], dtype=dtype), equal_nan=True)


# What cannot be a cell


def _branch(x: Any, h: Any, prev: Any) -> Any:
    if x.f + h.f > 0:
        return prev.h
    return -prev.h


def _loop(x: Any, h: Any, prev: Any) -> Any:
    return sum(x.f) + h.f


def _power(x: Any, h: Any, prev: Any) -> Any:
    return (x.f + h.f) ** 2


def _prints(x: Any, h: Any, prev: Any) -> Any:
    print(x.f)
    return x.f + h.f


def _formats(x: Any, h: Any, prev: Any) -> Any:
    assert f"{x.f}"
    return x.f + h.f


def _math(x: Any, h: Any, prev: Any) -> Any:
    return math.exp(x.f + h.f)


def _numpy(x: Any, h: Any, prev: Any) -> Any:
    return np.exp(x.f + h.f)


def _numpy_scalar(x: Any, h: Any, prev: Any) -> Any:
    return np.ones(3) * (x.f + h.f)


def _torch(x: Any, h: Any, prev: Any) -> Any:
    return torch.erf(x.f + h.f)


def _method(x: Any, h: Any, prev: Any) -> Any:
    return (x.f + h.f).clamp(0)


def _tensor(x: Any, h: Any, prev: Any) -> Any:
    return (x.f + h.f) * torch.ones(3)


def _unknown_gate(x: Any, h: Any, prev: Any) -> Any:
    return x.g + h.f


def _unknown_state(x: Any, h: Any, prev: Any) -> Any:
    return x.f + h.f + prev.c


def _sets(x: Any, h: Any, prev: Any) -> Any:
    prev.h = x.f
    return x.f + h.f


def _nothing(x: Any, h: Any, prev: Any) -> Any:
    assert x.f is not None


def _too_many(x: Any, h: Any, prev: Any) -> Any:
    return x.f + h.f, prev.h


def _numpy_number(x: Any, h: Any, prev: Any) -> Any:
    return (x.f + h.f) * np.float32(0.1)


def _condition(x: Any, h: Any, prev: Any) -> Any:
    return x.f + h.f > 0


def _adds_a_condition(x: Any, h: Any, prev: Any) -> Any:
    return (x.f > 0) + h.f


def _number(x: Any, h: Any, prev: Any) -> Any:
    return 0.0


def _unused(x: Any, h: Any, prev: Any) -> Any:
    return rnnkern.tanh(prev.h)


def _raises(x: Any, h: Any, prev: Any) -> Any:
    raise KeyError("own")


def _divides(x: Any, h: Any, prev: Any) -> Any:
    return (x.f + h.f) * (rnnkern.exp(1.0) / (1 - 1))


WRONG: dict[Any, str] = {
    _branch: "a branch depends on a value",
    _loop: "cannot be indexed or looped over",
    _power: r"no \*\*",
    _prints: "cannot be printed",
    _formats: "cannot be printed",
    _math: "cannot become a number",
    _numpy: "numpy.exp is not known",
    _numpy_scalar: r"numpy.multiply is not known .*float\(\) makes Python's",
    _numpy_number: r"got float32: float\(\) makes such a number",
    _torch: "torch.erf is not known",
    _method: ".clamp is not known",
    _tensor: "not known in a cell|expressions and Python numbers",
    _unknown_gate: "x.g: the cell has no gate 'g'; it has f",
    _unknown_state: "prev.c: the cell has no state 'c'; it has h",
    _sets: "prev.h cannot be set",
    _nothing: "must return numbers .* got NoneType for h",
    _too_many: r"must return its 1 states \(h\), returned 2",
    _condition: "must return numbers .* got a comparison",
    _adds_a_condition: "wants a number",
    _number: "must return numbers .* got float",
    _unused: "does not use its gate 'f'",
    _raises: "KeyError: 'own'",
    _divides: "ZeroDivisionError",
}


@pytest.mark.parametrize("function", WRONG, ids=lambda f: f.__name__)
def test_what_is_no_cell(function: Any) -> None:
    with pytest.raises(rnnkern.CellError, match=WRONG[function]) as caught:
        rnnkern.cell(gates=("f",))(function)
    assert function.__name__ in str(caught.value)


def test_states_are_a_tuple() -> None:
    with pytest.raises(rnnkern.CellError, match=r"its 2 states \(h, c\) as a tuple, returned one"):
        rnnkern.cell(gates=("a",), states=("h", "c"))(lambda x, h, prev: [x.a + h.a, prev.c])


def test_a_long_name() -> None:
    def cell(x: Any, h: Any, prev: Any) -> Any:
        return rnnkern.tanh(x.a + h.a) + 0.25

    cell.__name__ = 100 * "long"
    module = rnnkern.Recurrent(rnnkern.cell(gates=("a",))(cell), I, H)
    module(torch.randn(T, N, I))
    assert not kernels.WITHOUT_KERNELS


@pytest.mark.parametrize(
    ("parameters", "called"), [((), r"\(x, h, prev\)"), (("p",), r"\(x, h, prev, own\)")]
)
def test_a_function_of_other_arguments(parameters: tuple[str, ...], called: str) -> None:
    message = rf"test_own_cells.py:\d+: the cell 'odd' is called with {called}, and takes \(x, p\)"
    with pytest.raises(rnnkern.CellError, match=message):

        @rnnkern.cell(gates=("a",), parameters=parameters)
        def odd(x, p):  # type: ignore[no-untyped-def]
            return rnnkern.tanh(x.a) * p


def test_a_wrong_parameter_is_named() -> None:
    layer = rnnkern.Recurrent(rnnkern.cells.ind_rnn, 3, 4)
    layer.u_l0 = torch.nn.Parameter(torch.zeros(5))
    with pytest.raises(RuntimeError, match=r"u has shape \[5\], expected \[4\]"):
        layer(torch.randn(2, 1, 3))


def test_the_error_names_the_line() -> None:
    with pytest.raises(rnnkern.CellError) as caught:
        rnnkern.cell(gates=("f",))(_branch)
    line = _branch.__code__.co_firstlineno + 1
    assert f"{__file__}:{line}: 'if x.f + h.f > 0:'" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gates": ()}, "1 to 8 gates"),
        ({"gates": "fg"}, "must be a tuple of names"),
        ({"gates": ("f", "f")}, "there twice"),
        ({"gates": ("f", "no name")}, "not the name of an attribute"),
        ({"gates": ("class",)}, "not the name of an attribute"),
        ({"gates": ("_f",)}, "not the name of an attribute"),
        ({"gates": (1,)}, "not the name of an attribute"),
        ({"gates": ('f"; evil(',)}, "not the name of an attribute"),
        ({"gates": ("f",), "states": ("c",)}, "states must be"),
        ({"gates": ("f",), "states": ("h", "h")}, "there twice"),
        ({"gates": ("f",), "parameters": tuple("abcde")}, "at most 4 parameters"),
        ({"gates": ("f",), "parameters": ("weight_ih",)}, "the name of a weight"),
    ],
    ids=str,
)
def test_names_that_are_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(rnnkern.CellError, match=message):
        rnnkern.cell(**options)


def test_too_many_slots() -> None:
    with pytest.raises(rnnkern.CellError, match="needs 10 numbers for each unit"):

        @rnnkern.cell(gates=tuple("abcde"))
        def apart(x: Any, h: Any, prev: Any) -> Any:
            return x.a * h.a + x.b + h.b + x.c + h.c + x.d + h.d + x.e + h.e


def test_a_gate_apart_may_come_first() -> None:
    """Then the others have two slots as well."""

    @rnnkern.cell(gates=("n", "r"))
    def turned(x: Any, h: Any, prev: Any) -> Any:
        return rnnkern.tanh(x.n + rnnkern.sigmoid(h.r + x.r) * h.n)

    module = rnnkern.Recurrent(turned, I, H, dtype=torch.float64)
    leaves = inputs(module)
    torch.testing.assert_close(
        evaluate(module, leaves, by_kernels), evaluate(module, leaves, by_reference)
    )


# The module


def test_arguments_of_the_module() -> None:
    with pytest.raises(TypeError, match="cell must be a function with the decorator"):
        rnnkern.Recurrent(_branch, I, H)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="proj_size needs a cell"):
        rnnkern.Recurrent(cells.mgu, I, H, proj_size=3)
    module = rnnkern.Recurrent(cells.peephole_lstm, I, H, num_layers=2, bias=False)
    assert repr(module) == "Recurrent(peephole_lstm, 4, 19, num_layers=2, bias=False)"
    assert [name for name, _ in module.named_parameters()][:5] == [
        "weight_ih_l0",
        "weight_hh_l0",
        "p_i_l0",
        "p_f_l0",
        "p_o_l0",
    ] or set(dict(module.named_parameters())) >= {"p_i_l0", "p_o_l1"}
    bound = 1 / math.sqrt(H)
    assert all(p.abs().max() <= bound for p in module.parameters())


def test_copies_and_pickles() -> None:
    module = rnnkern.Recurrent(strange, I, H, dtype=torch.float64)
    leaves = inputs(module)
    expected = evaluate(module, leaves, by_kernels)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.cell is strange
        torch.testing.assert_close(evaluate(other, leaves, by_kernels), expected)


def test_with_the_rest_of_torch() -> None:
    """Compiled, exported, mapped, packed, and with hooks of `rnnkern` itself."""
    module = rnnkern.Recurrent(cells.peephole_lstm, I, H, bidirectional=True, dtype=torch.float64)
    x = inputs(module)["x"]
    y, _ = module(x)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x)[0], y)
    lengths = torch.tensor([5, 2, 4])
    torch.testing.assert_close(compiled(x, lengths=lengths), module(x, lengths=lengths))
    torch.testing.assert_close(torch.export.export(module, (x,)).module()(x)[0], y)
    with rnnkern.exporting_kernels():
        program = torch.export.export(module, (x,), {"lengths": lengths})
    torch.testing.assert_close(
        program.module()(x, lengths=lengths)[0], module(x, lengths=lengths)[0]
    )
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.testing.assert_close(module(packed)[1], module(x, lengths=lengths)[1])
    torch.testing.assert_close(rnnkern.checkpointed(module, x, checkpoint_every=2)[0], y)
    assert rnnkern.inspect.trace(module, x).layers[0][0].h.shape == (T, N, H)
    assert "peephole_lstm" in str(rnnkern.explain(module, x))
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def loss(weights: Any, x: Tensor) -> Tensor:
        return functional_call(module, weights, (x,))[0].square().sum()  # type: ignore[no-any-return]

    samples = torch.stack((x, x + 1))
    each = vmap(grad(loss), (None, 0))(weights, samples)
    for k, sample in enumerate(samples):
        torch.testing.assert_close({n: g[k] for n, g in each.items()}, grad(loss)(weights, sample))


def test_a_program_says_which_cell_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a process that has not imported the module in which the cell is made."""

    @rnnkern.cell(gates=("f",))
    def forgotten(x: Any, h: Any, prev: Any) -> Any:
        return rnnkern.tanh(x.f + 0.25 * h.f)

    x = torch.randn(3, 2, I)
    with rnnkern.exporting_kernels():
        program = torch.export.export(rnnkern.Recurrent(forgotten, I, H), (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    number = known_cells.CELLS[forgotten.mode].number
    monkeypatch.delitem(known_cells.CELLS, forgotten.mode)
    monkeypatch.delitem(known_cells.MODES, number)
    file.seek(0)
    loaded = torch.export.load(file).module()
    words = f"the cell 'forgotten' of your own, .*{forgotten.mode}.*: import the module"
    with pytest.raises(known_cells.UnknownCellError, match=words):
        loaded(x)
    with pytest.raises(known_cells.UnknownCellError, match=r"a cell of your own.*import"):
        known_cells.MODES[number]


def test_functions_have_the_names_of_their_arguments() -> None:
    for name in expression.FUNCTIONS:
        function = getattr(rnnkern, name)
        two = ("a", "b") if name in ("maximum", "minimum") else ("x",)
        wanted = ("condition", "a", "b") if name == "where" else two
        assert tuple(signature(function).parameters) == wanted
        assert function.__name__ == name
        with pytest.raises(TypeError, match=rf"rnnkern\.{name}\({', '.join(wanted)}\) takes"):
            function()
    with pytest.raises(rnnkern.CellError, match=r"where\(condition, a, b\) takes 3 .*, got 2"):
        rnnkern.cell(gates=("f",))(lambda x, h, prev: rnnkern.where(x.f > 0, h.f))


def test_more_states_than_two() -> None:
    """They come and go as a tuple; unbatched, packed, with lengths, and compiled too."""
    module = rnnkern.Recurrent(cells.s_lstm, I, H, dtype=torch.float64)
    leaves = inputs(module)
    y, states = by_kernels(module, leaves)
    assert [state.shape for state in states] == 4 * [(1, N, H)]
    x, given = leaves["x"], states_of(leaves)
    lengths = torch.tensor([5, 2, 4])
    ends = module(x, given, lengths=lengths)[1]
    for n, length in enumerate(lengths.tolist()):
        alone = module(x[:length, n], tuple(state[:, n] for state in given))[1]
        torch.testing.assert_close(tuple(end[:, n] for end in ends), alone)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.testing.assert_close(module(packed, given)[1], ends)
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, given), (y, states))
    with pytest.raises(ValueError, match="hx must be a tuple of 4 states"):
        module(x, given[:2])
    with pytest.raises(NotImplementedError, match="more states than h and c"):
        rnnkern.checkpointed(module, x, checkpoint_every=2)


def test_a_cell_without_products_of_h() -> None:
    module = rnnkern.Recurrent(cells.ind_rnn, I, H, num_layers=2, bidirectional=True)
    assert not [name for name in module.state_dict() if "_hh_" in name]
    with pytest.raises(ValueError, match="proj_size needs a cell"):
        rnnkern.Recurrent(cells.ind_rnn, I, H, proj_size=3)


def test_unbatched_and_batch_first() -> None:
    module = rnnkern.Recurrent(strange, I, H, batch_first=True, dtype=torch.float64)
    leaves = leaves_for_own(module)
    torch.testing.assert_close(
        evaluate(module, leaves, by_kernels), evaluate(module, leaves, by_reference)
    )
    alone, _ = module(leaves["x"][0])
    torch.testing.assert_close(alone, module(leaves["x"][:1])[0][0])


def leaves_for_own(module: Any) -> Leaves:
    own = inputs(module)
    return own | {"x": own["x"].transpose(0, 1)}


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize(
    "cell", [strange, cells.ind_rnn, cells.mgu, cells.s_lstm], ids=lambda c: c.name
)
def test_options_of_layers(
    cell: OwnCell, layer_norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recurrent dropout, zoneout, the states of a reset and layer normalisation of the sums:
    gradients by differences, and the kernels beside the function on tensors.
    """
    own = {"recurrent_dropout": 0.3, "zoneout": 0.2, "orthogonal": True, "layer_norm": layer_norm}
    module = rnnkern.Recurrent(cell, 2, 3, bidirectional=True, dtype=torch.float64, **own)
    assert "recurrent_dropout=0.3, zoneout=0.2, orthogonal=True" in repr(module)
    names = {name.partition("_l0")[0] for name, _ in module.named_parameters()}
    gains = {"gain_ih", "gain_hh"} if "weight_hh" in names else {"gain_ih"}
    assert {name for name in names if name.startswith("gain")} == (gains if layer_norm else set())
    reset = torch.zeros(4, 2, dtype=torch.bool)
    reset[2, 0] = True
    torch.manual_seed(2)
    x = torch.randn(4, 2, 2, dtype=torch.float64, requires_grad=True)
    states = [torch.rand(2, 2, 3, dtype=torch.float64, requires_grad=True) for _ in cell.states]

    def outputs(x: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(3)  # of the random numbers
        to = states if len(states) > 1 else states[0]
        return tuple(flatten(module(x, reset=reset, reset_to=to)).values())

    assert torch.autograd.gradcheck(outputs, (x, *states), fast_mode=True)
    found = outputs(x, *states)
    refusal = Refusal(Why.OPERAND, f"a test refuses {cell.name}, layer_norm={layer_norm}")
    monkeypatch.setattr(run, "refusal_of_options", lambda *_: refusal)
    with pytest.warns(rnnkern.FallbackWarning, match="a test refuses"):
        torch.testing.assert_close(outputs(x, *states), found)


def test_cell_states_of_all_steps() -> None:
    layer = rnnkern.Recurrent(cells.peephole_lstm, I, H)
    output, (_, c_n), made = layer(torch.randn(T, N, I), return_cells=True)
    assert made.shape == output.shape
    assert torch.equal(made[-1], c_n[0])
    for cell, wanted in ((cells.mgu, "needs a cell state"), (cells.s_lstm, "has more states")):
        with pytest.raises(ValueError, match=wanted):
            rnnkern.Recurrent(cell, I, H)(torch.randn(T, N, I), return_cells=True)


def test_states_of_a_reset_that_do_not_fit() -> None:
    layer = rnnkern.Recurrent(cells.s_lstm, I, H)
    reset, state = torch.zeros(T, N, dtype=torch.bool), torch.zeros(1, N, H)
    with pytest.raises(TypeError, match=r"reset_to must be \(h, c, n, m\) as hx is, got tuple"):
        layer(torch.randn(T, N, I), reset=reset, reset_to=(state, state))
    with pytest.raises(ValueError, match=rf"n of reset_to must have shape \(1, {N}, {H}\)"):
        layer(torch.randn(T, N, I), reset=reset, reset_to=(state, state, state[0], state))


@rnnkern.cell(gates=("a",), states=("h", "c"), parameters=("p",))
def numbers(x: Any, h: Any, prev: Any, own: Any) -> Any:
    """A gate twice in a sum, Python numbers beside conditions, and a state without axes."""
    s = x.a + x.a + h.a
    large = rnnkern.where(s > 0.5, 1, 0)
    return (1 - large) * rnnkern.tanh(s) + rnnkern.where(s > 0.5, 0.5, prev.c), own.p * 2


def test_numbers_on_tensors() -> None:
    module = rnnkern.Recurrent(numbers, I, H, dtype=torch.float64)
    leaves = inputs(module)
    ours = evaluate(module, leaves, by_kernels)
    torch.testing.assert_close(ours, evaluate(module, leaves, by_reference))
    made = rnnkern.where(torch.tensor([True, False]), torch.tensor([7.0, 8.0]), 5.0)
    assert made.tolist() == [7.0, 5.0]


def test_vectorized_jacobians() -> None:
    """Of torch.autograd.functional, whose vmap has few rules."""
    module = rnnkern.Recurrent(rnnkern.cells.mgu, 2, 3, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda a: module(a)[0], x)
    for way in ("reverse-mode", "forward-mode"):
        found = torch.autograd.functional.jacobian(
            lambda a: module(a)[0], x, vectorize=True, strategy=way
        )
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
