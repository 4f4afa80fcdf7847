"""Modules with layer_norm: their parameters, cells, and the rest of torch.

`test_options.py` compares the layers with a loop, in every form and type.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import options_oracle
import pytest
import torch
from options_cases import ON_A_GPU, Case, H, I, N, T, change_gains, tensors, twin
from support import autocast, build
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import layer_norm, linear
from torch.nn.utils import parametrize, prune

import rnnkern
from rnnkern import kernels

pytestmark = pytest.mark.filterwarnings(ON_A_GPU)

LAYERS = ("RNN", "LSTM", "GRU")
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
GATES = {"RNN": 1, "LSTM": 4, "GRU": 3}


def made(kind: str, *sizes: int, **options: Any) -> nn.Module:
    module = build(kind, *(sizes or (I, H)), layer_norm=True, **options)
    change_gains(module)
    return module


# Parameters


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_parameters(kind: str, bias: bool) -> None:
    """torch.nn's come first, with the numbers that torch.nn draws."""
    is_cell = kind.endswith("Cell")
    options = {"bias": bias} | ({} if is_cell else {"num_layers": 2, "bidirectional": True})
    torch.manual_seed(0)
    ours = getattr(rnnkern, kind)(I, H, layer_norm=True, **options)
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(I, H, **options).state_dict()
    own = ours.state_dict()
    assert list(own)[: len(theirs)] == list(theirs)
    assert all(torch.equal(own[name], weight) for name, weight in theirs.items())
    G = GATES[kind.removesuffix("Cell")]
    wanted = {"gain_ih": (1.0, G * H), "gain_hh": (1.0, G * H)}
    if kind.startswith("LSTM"):
        wanted["gain_c"] = (1.0, H)
        wanted |= {"bias_c": (0.0, H)} if bias else {}
    suffixes = [""] if is_cell else ["_l0", "_l0_reverse", "_l1", "_l1_reverse"]
    names = [name + suffix for suffix in suffixes for name in wanted]
    assert list(own)[len(theirs) :] == names
    for name in names:
        number, size = wanted[name.partition("_l")[0]]
        assert torch.equal(own[name], torch.full((size,), number))


def test_reset_parameters_and_the_other_options() -> None:
    module = made("LSTM", forget_bias=2.0, orthogonal=True)
    module.reset_parameters()
    assert torch.equal(module.gain_c_l0, torch.ones(H))
    assert torch.equal(module.bias_c_l0, torch.zeros(H))
    assert torch.equal(module.bias_ih_l0[H : 2 * H], torch.full((H,), 2.0))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_copies_and_pickles(kind: str) -> None:
    module = made(kind)
    assert str(module) == f"{kind}({I}, {H}, layer_norm=True)"
    x = torch.randn(N, I) if kind in CELLS else torch.randn(T, N, I)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert str(again) == str(module)
        assert torch.equal(tensors(again(x))[0], tensors(module(x))[0])
    fresh = getattr(rnnkern, kind)(I, H, layer_norm=True)
    fresh.load_state_dict(module.state_dict())
    assert torch.equal(tensors(fresh(x))[0], tensors(module(x))[0])
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gain_ih"):
        getattr(rnnkern, kind)(I, H).load_state_dict(module.state_dict())


def test_a_meta_module_is_initialised_later() -> None:
    module = rnnkern.GRU(I, H, layer_norm=True, device="meta")
    module.to_empty(device=torch.get_default_device()).reset_parameters()
    assert torch.equal(module.gain_hh_l0, torch.ones(3 * H))


@pytest.mark.parametrize("kind", LAYERS + CELLS)
def test_wrong_values(kind: str) -> None:
    with pytest.raises(TypeError, match="layer_norm must be a bool, got int"):
        getattr(rnnkern, kind)(I, H, layer_norm=1)


def test_an_unknown_nonlinearity() -> None:
    with pytest.raises(ValueError, match="Unknown nonlinearity: x"):
        rnnkern.RNNCell(I, H, nonlinearity="x", layer_norm=True)


def test_names_that_a_cell_of_your_own_has() -> None:
    @rnnkern.cell(gates=("a",), parameters=("gain_ih",))
    def cell(x: Any, h: Any, prev: Any, own: Any) -> Any:
        return rnnkern.tanh(own.gain_ih * x.a + h.a)

    with pytest.raises(ValueError, match="layer_norm adds a parameter gain_ih_l0"):
        rnnkern.Recurrent(cell, I, H, layer_norm=True)


# Cells


def step(module: Any, x: Tensor, hx: Any = None) -> Any:
    """A cell by the published formulas."""
    h, *c = hx if isinstance(hx, tuple) else (hx,)
    sums = zip((x, h), ("ih", "hh"), strict=True)
    a, b = (
        layer_norm(
            linear(z, getattr(module, f"weight_{name}")),
            getattr(module, f"gain_{name}").shape,
            getattr(module, f"gain_{name}"),
            getattr(module, f"bias_{name}"),
        )
        for z, name in sums
    )
    if isinstance(module, nn.RNNCell):
        return torch.tanh(a + b)
    if isinstance(module, nn.GRUCell):
        (a_r, a_z, a_n), (b_r, b_z, b_n) = a.chunk(3, -1), b.chunk(3, -1)
        z = torch.sigmoid(a_z + b_z)
        return (1 - z) * torch.tanh(a_n + torch.sigmoid(a_r + b_r) * b_n) + z * h
    i, f, g, o = (a + b).chunk(4, -1)
    now = torch.sigmoid(f) * c[0] + torch.sigmoid(i) * torch.tanh(g)
    read = layer_norm(now, now.shape[-1:], module.gain_c, getattr(module, "bias_c", None))
    return torch.sigmoid(o) * torch.tanh(read), now


def cell_and_operands(kind: str, *batch: int, **options: Any) -> tuple[nn.Module, Tensor, Any]:
    module = made(kind, dtype=torch.float64, **options)
    h = torch.randn(*batch, H, dtype=torch.float64)
    hx = (h, torch.randn_like(h)) if kind == "LSTMCell" else h
    return module, torch.randn(*batch, I, dtype=torch.float64, requires_grad=True), hx


@pytest.mark.kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (N,)])
@pytest.mark.parametrize("kind", CELLS)
def test_cells(kind: str, batch: tuple[int, ...], bias: bool) -> None:
    module, x, hx = cell_and_operands(kind, *batch, bias=bias)
    found = []
    for run in (module, lambda *given: step(module, *given)):
        outputs = tensors(run(x, hx))
        torch.manual_seed(0)
        loss = sum((z * torch.randn_like(z)).sum() for z in outputs)
        found.append((*outputs, *torch.autograd.grad(loss, [x, *module.parameters()])))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(tensors(module(x))[0], tensors(module(x, zero_of(hx)))[0])


def zero_of(hx: Any) -> Any:
    return tuple(map(zero_of, hx)) if isinstance(hx, tuple) else torch.zeros_like(hx)


@pytest.mark.parametrize("kind", CELLS)
def test_second_derivatives_of_cells(kind: str) -> None:
    module, x, hx = cell_and_operands(kind, N)
    weights = {name: p.detach().requires_grad_() for name, p in module.named_parameters()}

    def function(x: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(weights, given, strict=True))
        return tuple(tensors(functional_call(module, own, (x, hx))))

    given = (x, *weights.values())
    assert torch.autograd.gradcheck(function, given, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, given, fast_mode=True)


@pytest.mark.parametrize("kind", CELLS)
def test_cells_with_the_rest_of_torch(kind: str) -> None:
    module, x, hx = cell_and_operands(kind, N)
    x = x.detach()
    wanted = tensors(module(x, hx))
    torch._dynamo.reset()
    ways = (
        torch.compile(module, backend="aot_eager", fullgraph=True),
        torch.jit.trace(module, (x, hx), check_trace=False),
        torch.export.export(module, (x, hx)).module(),
        lambda x, hx: torch.func.vmap(module)(x, hx),
    )
    for way in ways:
        for ours, theirs in zip(tensors(way(x, hx)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    with autocast():
        kinds = [z.dtype for z in tensors(module.float()(x.float(), hx_of(hx)))]
        plain = getattr(rnnkern, kind)(I, H)
        assert kinds == [z.dtype for z in tensors(plain(x.float(), hx_of(hx)))]


def hx_of(hx: Any) -> Any:
    return tuple(map(hx_of, hx)) if isinstance(hx, tuple) else hx.float()


@pytest.mark.parametrize("kind", CELLS)
def test_wrong_calls_of_cells(kind: str) -> None:
    """torch.nn's own errors."""
    module = made(kind)
    for x in (torch.zeros(N, I + 1), torch.zeros(1, 1, N, I)):
        with pytest.raises((RuntimeError, ValueError)) as ours:
            module(x)
        with pytest.raises((RuntimeError, ValueError)) as theirs:
            getattr(nn, kind)(I, H)(x)
        assert str(ours.value) == str(theirs.value)


# Layers


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["LSTM", "GRU", "RNN"])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_bits(form: str) -> None:
    """Of a sequence in one call or in two, of a row in any batch, on one thread or two."""
    module = made(form, 40, 200)
    x = torch.randn(T, 7, 40)
    whole, _ = module(x)
    first, state = module(x[:2])
    second, _ = module(x[2:], state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert torch.equal(module(x[:, 2:4])[0], whole[:, 2:4])
    torch.set_num_threads(2)
    assert torch.equal(module(x)[0], whole)


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["LSTM", "GRU"])
def test_numbers_far_from_zero(form: str) -> None:
    """The mean of a row may be much larger than what its numbers differ by."""
    module = made(form, 8, 100)
    with torch.no_grad():
        module.weight_ih_l0.copy_(1 + 0.01 * torch.randn_like(module.weight_ih_l0))
    x = torch.full((T, N, 8), 10.0)
    wide = twin(module, torch.float64)
    wanted, _ = options_oracle.run(wide, x.double())
    torch.testing.assert_close(module(x)[0].double(), wanted, rtol=0, atol=1e-4)


def test_a_row_of_equal_sums() -> None:
    """Its variance is zero: what is left is the bias."""
    module = made("GRU")
    for weight in (module.weight_ih_l0, module.weight_hh_l0):
        nn.init.zeros_(weight)
    x = torch.randn(T, N, I)
    wide = twin(module, torch.float64)
    torch.testing.assert_close(module(x)[0].double(), options_oracle.run(wide, x.double())[0])


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
@pytest.mark.parametrize("name", ["gain_ih", "gain_hh", "gain_c", "bias_c"])
def test_a_wrong_gain_is_named(kind: str, name: str) -> None:
    module = made(kind)
    own = name if kind == "LSTMCell" else f"{name}_l0"
    x = torch.randn(N, I) if kind == "LSTMCell" else torch.randn(T, N, I)
    setattr(module, own, nn.Parameter(torch.ones(3, 2)))
    with pytest.raises(RuntimeError, match=rf"^{name} has shape \[3, 2\], expected \["):
        module(x)


@pytest.mark.parametrize("name", ["gain_hh_l0", "gain_c_l0"])
@pytest.mark.parametrize("way", ["parametrize", "prune", "functional_call"])
def test_other_tensors_in_place_of_gains(way: str, name: str) -> None:
    module, x = made("LSTM"), torch.randn(T, N, I)
    doubled = copy.deepcopy(module)
    with torch.no_grad():
        getattr(doubled, name).mul_(2)
    wanted = doubled(x)[0]
    if way == "functional_call":
        made_now = functional_call(module, {name: getattr(doubled, name)}, (x,))[0]
    elif way == "parametrize":

        class Twice(nn.Module):
            def forward(self, gain: Tensor) -> Tensor:
                return 2 * gain

        parametrize.register_parametrization(module, name, Twice())
        made_now = module(x)[0]
    else:
        prune.custom_from_mask(module, name, torch.ones_like(getattr(module, name)))
        getattr(module, f"{name}_orig").data.mul_(2)
        made_now = module(x)[0]
    assert torch.equal(made_now, wanted)


def test_only_gains_require_gradients() -> None:
    module = made("LSTM")
    module.requires_grad_(requires_grad=False)
    module.gain_hh_l0.requires_grad_()
    module(torch.randn(T, N, I))[0].sum().backward()
    assert module.gain_hh_l0.grad.abs().max() > 0


@pytest.mark.parametrize("kind", LAYERS + CELLS)
@pytest.mark.parametrize("normalised", [False, True])
def test_a_submodule_may_have_its_name(kind: str, *, normalised: bool) -> None:
    own = type("Own", (getattr(rnnkern, kind),), {})
    module = own(I, H, layer_norm=normalised)
    x = torch.randn(N, I) if kind in CELLS else torch.randn(T, N, I)
    before = module(x)
    module.layer_norm = torch.nn.LayerNorm(H)
    assert isinstance(module.layer_norm, torch.nn.LayerNorm)
    for made, wanted in zip(tensors(module(x)), tensors(before), strict=True):
        assert torch.equal(made, wanted)


@pytest.mark.parametrize("kind", LAYERS)
def test_explain_under_autocast(kind: str) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert "plain PyTorch" not in str(rnnkern.explain(made(kind), torch.randn(T, N, I)))


def test_exported_programs_are_torchs_own() -> None:
    module, x = made("LSTM", bidirectional=True), torch.randn(T, N, I)
    program = torch.export.export(module, (x,))
    assert "rnnkern" not in program.graph_module.code
    torch.testing.assert_close(program.module()(x)[0], module(x)[0])


@pytest.mark.skipif(kernels.IS_STAND_IN, reason="plain PyTorch runs it")
@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_explain(kind: str) -> None:
    x = torch.randn(N, I) if kind in CELLS else torch.randn(T, N, I)
    assert "layer_norm=True: the sums are normalised" in rnnkern.explain(made(kind), x)


@pytest.mark.parametrize(
    "use",
    [
        lambda m, x: rnnkern.checkpointed(m, x, checkpoint_every=2),
        lambda m, x: rnnkern.inspect.trace(m, x),
        lambda m, x: rnnkern.freeze(m),
        lambda m, x: torch.jit.script(m),
        lambda m, x: rnnkern.revert(m),
        lambda m, x: torch.ao.quantization.quantize_dynamic(m, {rnnkern.LSTM}),
    ],
    ids=["checkpointed", "trace", "freeze", "script", "revert", "quantize"],
)
def test_what_does_not_know_it_says_so(use: Callable[..., Any]) -> None:
    import torch.ao.quantization

    with pytest.raises(ValueError, match="layer_norm=True"):
        use(made("LSTM").eval(), torch.randn(T, N, I))


@pytest.mark.kernel
@pytest.mark.skipif(kernels.IS_STAND_IN, reason="plain PyTorch runs it")
@pytest.mark.cpu_only
def test_layers_and_cells_run_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And backward too, not on the reference."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference was called")

    monkeypatch.setattr("rnnkern.reference.layer", refuse)
    for case in ("norm", "norm-all"):
        for form in ("LSTM-proj", "GRU", "RNN"):
            case_of = Case(form, "plain", case)
            case_of.call(case_of.module, case_of.leaves)[0].sum().backward()
    for kind in CELLS:
        module, x, hx = cell_and_operands(kind, N)
        tensors(module(x, hx))[0].sum().backward()
