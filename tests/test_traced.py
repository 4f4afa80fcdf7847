"""Where torch sees operators only: compiled, exported, traced and counted; and the transforms of
torch.func.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import oracle
import processes
import pytest
import torch
from functorch.compile import make_boxed_func
from settings import LENGTHS, RESET, SETTINGS
from support import (
    CELLS,
    DTYPES,
    FORMS,
    LAYERS,
    assert_bitwise,
    build,
    evaluate,
    flatten,
    in_a_process,
    leaves_for,
    plain,
)
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch.autograd import forward_ad
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

import rnnkern
from rnnkern.layer import PACKED, Layer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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


# torch.compile


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_compiled_equals_eager(form: str, setting: str) -> None:
    """Without a break in the graph, forward and backward, bit for bit."""
    option = SETTINGS[setting]
    module, leaves = option.make(form)
    call = compiled(option.call)
    assert_bitwise(
        evaluate(module, leaves, lambda m, own: call(m, own)), evaluate(module, leaves, option.call)
    )


@pytest.mark.parametrize("kind", CELLS)
def test_compiled_cells(kind: str) -> None:
    module = build(kind, 4, 6)
    call = compiled(module)
    x, hx = torch.randn(3, 4), torch.randn(3, 6)
    state = (hx, hx) if kind == "LSTMCell" else hx
    assert_bitwise(flatten(call(x, state)), flatten(module(x, state)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_no_recompilation_for_other_lengths_and_batches(kind: str, training: bool) -> None:
    module = build(kind, 4, 6, num_layers=2, bidirectional=True)
    call = compiled(module, dynamic=True)
    torch._dynamo.utils.counters.clear()
    with torch.set_grad_enabled(training):
        for T, N in ((7, 3), (5, 3), (20, 3), (9, 2), (11, 8)):
            x = torch.randn(T, N, 4, requires_grad=training)
            y, _ = call(x)
            torch.testing.assert_close(y, module(x)[0], rtol=0, atol=0)
            if training:
                y.sum().backward()
                assert x.grad is not None
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_inductor_with_dropout_in_a_model(kind: str) -> None:
    """The default compiler, around a model with more in it; dropout draws in training only."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn = build(kind, 4, 6, num_layers=2, dropout=0.5)
            self.head = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(torch.tanh(self.rnn(2 * x)[0]))

    torch._dynamo.reset()
    model = Model()
    call = torch.compile(model, fullgraph=True)
    x = torch.randn(5, 3, 4)
    first, second = call(x), call(x)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    model.eval()
    torch.testing.assert_close(call(x), model(x))


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_is_few_operators_to_a_compiler(kind: str) -> None:
    """Forward and backward, however many steps: so it compiles in tenths of a second."""
    sizes: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        sizes.append(sum(node.op == "call_function" for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    for T in (2, 200):
        torch._dynamo.reset()
        call = torch.compile(
            build(kind, 6, 8), fullgraph=True, backend=aot_autograd(fw_compiler=count)
        )
        call(torch.randn(T, 4, 6))[0].sum().backward()
    assert len(sizes) == 4
    assert sizes[:2] == sizes[2:]
    assert max(sizes) <= 10


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_many_sizes_recompile_as_those_of_linear(kind: str) -> None:
    """One graph a size; and a model of many layers is one graph."""

    def graphs(make: Callable[[int], nn.Module], *shape: int) -> int:
        torch._dynamo.reset()
        seen = CompileCounter()
        for size in range(2, 8):
            torch.compile(make(size), backend=seen)(torch.randn(*shape, size))
        return seen.frame_count

    shape = (3,) if kind in CELLS else (5, 3)
    ours = graphs(lambda size: build(kind, size, size + 1), *shape)
    assert ours <= graphs(lambda size: nn.Linear(size, size + 1), *shape)

    torch._dynamo.reset()
    layers = nn.ModuleList(build(kind, size, size + 1) for size in range(2, 14))

    def model(x: Tensor) -> Tensor:
        for layer in layers:
            made = layer(x)
            x = made[0] if isinstance(made, tuple) else made
        return x

    seen = CompileCounter()
    torch.compile(model, backend=seen, fullgraph=True)(torch.randn(*shape, 2))
    assert seen.frame_count == 1


@pytest.mark.cpu_only
def test_dropout_draws_the_same_numbers_compiled() -> None:
    module = build("GRU", 4, 6, num_layers=3, dropout=0.5)
    call, x = compiled(module), torch.randn(5, 3, 4)
    torch.manual_seed(1)
    expected = module(x)[0]
    torch.manual_seed(1)
    assert torch.equal(call(x)[0], expected)


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", LAYERS)
def test_torch_nn_is_left_as_it_is(kind: str) -> None:
    """What torch.nn cannot do, and rnnkern does: importing rnnkern changes nothing for its
    modules.
    """
    call = compiled(getattr(nn, kind)(4, 6))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN, GRU, or LSTM"):
        call(torch.randn(5, 3, 4))


@pytest.mark.cpu_only
@pytest.mark.parametrize("order", ["rnnkern-first", "dynamo-first", "own-setting"])
def test_the_flag_of_dynamo(order: str) -> None:
    found = in_a_process(processes.allow_rnn, order)
    own = order == "own-setting"
    assert found == {"rnnkern": True, "torch.nn": own, "bool": own}


@pytest.mark.cpu_only
def test_lengths_out_of_range_are_refused_compiled() -> None:
    module = build("GRU", 4, 6)
    call = compiled(lambda x, lengths: module(x, lengths=lengths)[0])
    x = torch.randn(5, 2, 4)
    call(x, torch.tensor([5, 0]))
    with pytest.raises(
        ValueError, match="between 0 and the number of steps 5, got values from 2 to 6"
    ):
        call(x, torch.tensor([2, 6]))


def test_changes_in_place_around_a_compiled_layer() -> None:
    """Operators neither change nor return their operands."""
    module = build("LSTM", 4, 6)

    def call(x: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        x.mul_(2)
        y, (h, c_n) = module(x, (c, c))
        seen = y[0]
        y.add_(1)
        c.copy_(c_n)
        x.zero_()
        return y, h, seen

    x, c = torch.randn(5, 3, 4), torch.randn(1, 3, 6)
    with torch.no_grad():
        ours, theirs = (x.clone(), c.clone()), (x.clone(), c.clone())
        assert_bitwise(flatten(compiled(call)(*ours)), flatten(call(*theirs)))
    assert_bitwise(flatten(ours), flatten(theirs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_compiled_under_autocast(kind: str, dtype: torch.dtype) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(3, 4) if kind in CELLS else torch.randn(5, 3, 4)

    device = x.device.type

    def call(x: Tensor) -> Any:
        with torch.autocast(device, dtype=dtype):
            return module(x)

    assert_bitwise(flatten(compiled(call)(x)), flatten(call(x)))


# The operators themselves


def operands(form: str, setting: str, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    """Arguments of ``scan`` as they arrive in a call."""
    caught: list[Any] = []

    class Catch(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if function is torch.ops.rnnkern.scan_kernel.default:
                caught.append(args)
            return function(*args, **(kwargs or {}))

    option = SETTINGS[setting]
    module, leaves = option.make(form)
    module.to(dtype)
    with Catch(), torch.no_grad():
        option.call(module, {name: leaf.to(dtype) for name, leaf in leaves.items()})

    def fresh(tensor: Tensor) -> Tensor:
        copy = tensor.detach().clone(memory_format=torch.preserve_format)
        return copy.requires_grad_(copy.is_floating_point())

    given = tree_map(lambda t: fresh(t) if isinstance(t, Tensor) else t, caught[0])
    x, weights, code, _, *rest = given
    h0, c0, *steps = (*rest, *[None] * (6 - len(rest)))
    return (x, h0, c0, weights, *steps, bool(code & PACKED), *Layer.of_code(code), True)


def of_kernel(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The same for ``scan_kernel``, whose tensors ask for no gradients."""
    plain = tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, args[:9])
    x, h0, c0, weights, *steps, packed = plain
    return (x, weights, Layer(*args[9:-1]).code + PACKED * packed, args[-1], h0, c0, *steps)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if name != "layers2"])
@pytest.mark.parametrize("form", FORMS)
def test_opcheck(form: str, setting: str) -> None:
    args = operands(form, setting)
    # A packed sequence's batch is in its batch sizes: no operator knows it while it is traced.
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.rnnkern.scan, args, test_utils=utils)
    if setting in ("plain", "bidirectional", "lengths"):
        torch.library.opcheck(torch.ops.rnnkern.scan, args)
    x, h0, c0, weights, *rest = args
    with torch.no_grad():
        y, hn, cn, saved = torch.ops.rnnkern.scan(*args)
    flags = [True] * (1 + len(weights) + (h0 is not None) + (c0 is not None))
    flags[1] = False
    incoming = [torch.randn_like(z).requires_grad_() for z in (y, hn)]
    incoming.append(torch.randn_like(cn).requires_grad_() if cn.numel() else None)
    backward = (*incoming, x, h0, c0, weights, y, saved, *rest[:-1], flags)
    torch.library.opcheck(torch.ops.rnnkern.scan_backward, backward, test_utils=utils)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.rnnkern.scan_kernel, of_kernel(args), test_utils=utils)
    own_x, own_weights, code, _, *given = of_kernel(args)
    kept = saved if saved.numel() else None
    incoming = [None if z is None else z.detach() for z in incoming]
    backward = (own_x, own_weights, y, code, flags, *incoming, kept, *given)
    torch.library.opcheck(torch.ops.rnnkern.scan_backward_kernel, backward, test_utils=utils)


@pytest.mark.cpu_only
def test_opcheck_of_lengths() -> None:
    torch.library.opcheck(torch.ops.rnnkern.ranked, (torch.tensor([2, 0, 5]), 5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_operators_in_every_dtype(form: str, dtype: torch.dtype) -> None:
    """Through a mode that sees operators: what the kernels give, bit for bit."""
    kind, own = FORMS[form]
    module = build(kind, 4, 6, dtype=dtype, batch_first=True, **own)
    leaves = leaves_for(module, 5, 3)

    def watched(m: nn.Module, own: Any) -> Any:
        with Seen() as seen:
            result = plain(m, own)
        assert seen.names == ["scan_kernel"]
        return result

    assert_bitwise(evaluate(module, leaves, watched), evaluate(module, leaves))


@pytest.mark.parametrize("kind", LAYERS)
def test_make_fx(kind: str) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)

    def loss(x: Tensor) -> Tensor:
        y, _ = module(x)
        return torch.autograd.grad(y.square().sum(), x)[0]

    graph = make_fx(loss, tracing_mode="symbolic", _allow_non_fake_inputs=True)(
        x.clone().requires_grad_()
    )
    names = [str(node.target) for node in graph.graph.nodes]
    assert [name for name in names if "rnnkern" in name] == [
        "rnnkern.scan_kernel.default",
        "rnnkern.scan_backward_kernel.default",
    ]
    other = torch.randn(7, 2, 4, requires_grad=True)
    assert torch.equal(graph(other), loss(other))


@pytest.mark.cpu_only
@pytest.mark.parametrize("form", FORMS)
def test_meta_tensors(form: str) -> None:
    """Shapes and strides without memory, forward and backward."""
    kind, own = FORMS[form]
    module = build(kind, 4, 6, batch_first=True, bidirectional=True, **own)
    real = flatten(module(torch.randn(3, 5, 4)))
    x = torch.randn(3, 5, 4, device="meta", requires_grad=True)
    meta = flatten(module.to("meta")(x))
    for name, tensor in meta.items():
        assert (tensor.shape, tensor.stride()) == (real[name].shape, real[name].stride())
    meta["out.0"].sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    y = flatten(module(x))["out.0"]
    (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    gradient.square().sum().backward()


def test_empty_batches_and_sequences() -> None:
    module = build("LSTM", 4, 6)
    call = compiled(module)
    assert call(torch.randn(5, 0, 4))[0].shape == (5, 0, 6)
    assert vmap(lambda a: module(a)[0])(torch.randn(3, 5, 0, 4)).shape == (3, 5, 0, 6)
    x = torch.randn(5, 0, 4, requires_grad=True)
    for run in (module, call):
        run(x)[0].sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
    (gradient,) = torch.autograd.grad(module(x)[0].sum(), x, create_graph=True)
    gradient.square().sum().backward()
    assert not module.weight_hh_l0.grad.any()
    assert grad(lambda a: module(a)[0].sum())(x.detach()).shape == x.shape
    with pytest.raises((RuntimeError, torch._dynamo.exc.Unsupported), match="larger than 0"):
        call(torch.randn(0, 2, 4))


def test_explain_where_operators_run() -> None:
    module, x = build("GRU", 4, 6), torch.randn(5, 2, 4)
    with Seen():
        assert "torch.ops.rnnkern" in str(rnnkern.explain(module, x))
    assert "torch.ops.rnnkern" in str(rnnkern.explain(module.to("meta"), x.to("meta")))


def test_lazily_negated_input() -> None:
    module, x = build("GRU", 4, 6), torch.randn(5, 2, 4)
    negated = torch.complex(x, -x).conj().imag
    assert negated.is_neg()
    torch.testing.assert_close(module(negated)[0], module(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_flops_are_counted(kind: str) -> None:
    module = build(kind, 4, 6)
    weights = sum(p.numel() for p in module.parameters() if p.dim() == 2)
    with FlopCounterMode(display=False) as counter:
        y, _ = module(torch.randn(5, 2, 4))
    assert counter.get_total_flops() == 2 * 5 * 2 * weights
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 4 * 5 * 2 * weights


# torch.func


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def loss_of(module: nn.Module, **options: Any) -> Callable[..., Tensor]:
    """Of weights and input: all outputs count."""

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        outputs = flatten(functional_call(module, weights, (x,), options))
        return sum(output.square().sum() for output in outputs.values())  # type: ignore[return-value]

    return loss


def assert_near(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
}


def make(form: str, option: str = "plain") -> tuple[nn.Module, nn.Module]:
    kind, own = FORMS[form]
    module = build(
        kind,
        2,
        3,
        dtype=torch.float64,
        **({"proj_size": 2} if "proj_size" in own else own),
        **OPTIONS[option],
    )
    return module, oracle.twin(module, torch.float64)


def looped(function: Callable[..., Any], *batches: Any) -> Any:
    """What vmap does, one by one."""
    size = (
        next(iter(batches[0].values())).shape[0]
        if isinstance(batches[0], dict)
        else len(batches[0])
    )

    def at(i: int) -> Any:
        return function(*(tree_map(lambda t: t[i], batch) for batch in batches))

    found = [at(i) for i in range(size)]
    return tree_map(lambda *parts: torch.stack(parts), *found)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_per_sample_gradients(form: str, option: str) -> None:
    module, theirs = make(form, option)
    weights, xs = weights_of(module), torch.randn(4, 3, 2, 2, dtype=torch.float64)
    ours = vmap(grad(loss_of(module)), (None, 0))(weights, xs)
    assert_near(ours, looped(lambda x: grad(loss_of(theirs))(weights, x), xs))


@pytest.mark.parametrize("kind", LAYERS)
def test_per_sample_gradients_take_one_pass(kind: str) -> None:
    module, xs = build(kind, 4, 6), torch.randn(8, 5, 1, 4)
    with Seen() as seen:
        vmap(grad(loss_of(module)), (None, 0))(weights_of(module), xs)
    assert seen.names == ["scan_kernel", "scan_backward_kernel"]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_ensembles(form: str, option: str) -> None:
    """Over weights alone, and over weights and inputs."""
    module, theirs = make(form, option)
    others = [make(form, option)[0] for _ in range(3)]
    weights, _ = stack_module_state(others)
    weights = {name: w.detach() for name, w in weights.items()}
    x, xs = torch.randn(3, 2, 2, dtype=torch.float64), torch.randn(3, 3, 2, 2, dtype=torch.float64)
    for ours, wanted in (
        (loss_of(module), loss_of(theirs)),
        (grad(loss_of(module)), grad(loss_of(theirs))),
    ):
        by_weights = looped(functools.partial(_swapped, wanted, x), weights)
        assert_near(vmap(ours, (0, None))(weights, x), by_weights)
        assert_near(vmap(ours, (0, 0))(weights, xs), looped(wanted, weights, xs))


def _swapped(function: Callable[..., Any], second: Any, first: Any) -> Any:
    return function(first, second)


@pytest.mark.parametrize("out", [0, 1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_vmap_over_any_axis(kind: str, out: int) -> None:
    module, theirs = make(kind)
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    moved = x.movedim(0, out)
    ours = vmap(lambda a: module(a)[0], out)(moved)
    assert_near(ours, looped(lambda a: theirs(a)[0], x))
    twice = vmap(vmap(lambda a: module(a)[0]))(torch.stack((x, x + 1)))
    assert_near(twice[1], looped(lambda a: theirs(a)[0], x + 1))


@pytest.mark.parametrize("which", ["lengths", "reset", "both", "batched"])
@pytest.mark.parametrize("form", FORMS)
def test_vmap_with_lengths_and_reset(form: str, which: str) -> None:
    module, theirs = make(form, "bidirectional")
    xs = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    weights = weights_of(module)
    if which == "batched":
        resets = torch.rand(4, 3, 2) < 0.4
        ours = vmap(lambda x, r: grad(loss_of(module, reset=r))(weights, x), (0, 0))(xs, resets)
        expected = looped(lambda x, r: grad(loss_of(module, reset=r))(weights, x), xs, resets)
        assert_near(ours, expected)
        return
    options = {"lengths": LENGTHS, "reset": RESET}
    options = options if which == "both" else {which: options[which]}
    ours = vmap(grad(loss_of(module, **options)), (None, 0))(weights, xs)

    def one(x: Tensor) -> Any:
        leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
        outputs = flatten(functional_call(_Oracle(theirs, options), leaves_named(leaves), (x,)))
        total = sum(o.square().sum() for o in outputs.values())
        return dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))

    assert_near(ours, looped(one, xs))


def leaves_named(leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"module.{name}": leaf for name, leaf in leaves.items()}


class _Oracle(nn.Module):
    def __init__(self, module: nn.Module, options: dict[str, Tensor]) -> None:
        super().__init__()
        self.module, self.options = module, options

    def forward(self, x: Tensor) -> Any:
        return oracle.run(self.module, x, None, **self.options)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("form", FORMS)
def test_forward_mode(form: str, option: str) -> None:
    """Of all operands, against what reverse mode gives; by torch.func and by dual numbers."""
    module, _ = make(form, option)
    weights, x = weights_of(module), torch.randn(3, 2, 2, dtype=torch.float64)
    direction = ({name: torch.randn_like(w) for name, w in weights.items()}, torch.randn_like(x))
    function = loss_of(module)
    _, ours = jvp(function, (weights, x), direction)
    _, pulled = vjp(function, weights, x)
    by_weights, by_x = pulled(torch.ones((), dtype=torch.float64))
    expected = (by_x * direction[1]).sum() + sum(
        (by_weights[name] * d).sum() for name, d in direction[0].items()
    )
    assert_near(ours, expected)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(w, direction[0][name]) for name, w in weights.items()}
        result = function(dual, forward_ad.make_dual(x, direction[1]))
        assert_near(forward_ad.unpack_dual(result).tangent, expected)


@pytest.mark.parametrize("form", FORMS)
def test_jacobians_and_hessians(form: str) -> None:
    """Forward and reverse over forward and reverse."""
    module, theirs = make(form)
    x = torch.randn(3, 2, 2, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda a: theirs(a)[0], x)
    assert_near(jacrev(lambda a: module(a)[0])(x), expected)
    assert_near(jacfwd(lambda a: module(a)[0])(x), expected)

    def loss(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda a: m(a)[0].pow(3).sum()

    second = torch.autograd.functional.hessian(loss(theirs), x)
    for one in (jacfwd, jacrev):
        for other in (jacfwd, jacrev):
            assert_near(one(other(loss(module)))(x), second)
    weight = module.weight_hh_l0.detach()

    def by_weight(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda w: functional_call(m, {"weight_hh_l0": w}, (x,))[0].pow(3).sum()

    assert_near(
        hessian(by_weight(module))(weight),
        torch.autograd.functional.hessian(by_weight(theirs), weight),
    )


@pytest.mark.parametrize("kind", CELLS)
def test_cells_under_transforms(kind: str) -> None:
    module = build(kind, 2, 3, dtype=torch.float64)
    theirs = oracle.twin(module, torch.float64)
    weights, xs = weights_of(module), torch.randn(4, 5, 2, dtype=torch.float64)
    ours = vmap(grad(loss_of(module)), (None, 0))(weights, xs)
    assert_near(ours, looped(lambda x: grad(loss_of(theirs))(weights, x), xs))


# What torch.nn cannot do, for the table of docs/torch.md: rnnkern's part is tested above and in
# test_inspect.py, test_checkpoint.py. A test that fails here is good news, and a row to be changed.


def _vmapped(m: nn.Module, x: Tensor) -> Any:
    return vmap(lambda a: m(a)[0])(torch.stack((x, x)))


def _ensemble(m: nn.Module, x: Tensor) -> Any:
    weights = {name: torch.stack((w, w)) for name, w in weights_of(m).items()}
    return vmap(loss_of(m), (0, None))(weights, x)


def _per_sample(m: nn.Module, x: Tensor) -> Any:
    return vmap(grad(loss_of(m)), (None, 0))(weights_of(m), torch.stack((x, x)))


def _forward_mode(m: nn.Module, x: Tensor) -> Any:
    return jvp(lambda a: m(a)[0], (x,), (x,))


def _exported(m: nn.Module, x: Tensor) -> Any:
    shapes = ({0: torch.export.Dim("time", max=99)},)
    return torch.export.export(m, (x,), dynamic_shapes=shapes, strict=False)


def _in_onnx(m: nn.Module, x: Tensor) -> None:
    """Run for another number of steps."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    shapes = ({0: "time", 1: "batch"},)
    program = torch.onnx.export(m.eval(), (x,), dynamic_shapes=shapes, verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    y, *_ = session.run(None, {session.get_inputs()[0].name: torch.cat((x, x)).numpy()})
    assert len(y) == 2 * len(x), "time is fixed"


CANNOT: dict[str, tuple[Callable[[nn.Module, Tensor], Any], tuple[str, ...], str]] = {
    "lengths": (lambda m, x: m(x, lengths=torch.tensor([3, 2])), LAYERS, "lengths"),
    "reset": (lambda m, x: m(x, reset=torch.zeros(3, 2).bool()), LAYERS, "reset"),
    "compile": (lambda m, x: compiled(m)(x), LAYERS, "RNN, GRU, or LSTM"),
    "export": (_exported, LAYERS, "Constraints violated"),
    # From 2.15 on torch's exporter makes an LSTM node for any time.
    "onnx": (
        _in_onnx,
        ("LSTM",) if torch.__version__ < "2.15" else (),
        "static shape|time is fixed",
    ),
    "vmap": (_vmapped, LAYERS, "Batching rule not implemented"),
    "ensemble": (_ensemble, LAYERS, "Batching rule not implemented"),
    "per-sample": (_per_sample, ("RNN", "GRU"), "doesn't match the broadcast shape"),
    "forward-mode": (_forward_mode, ("LSTM",), "forward AD"),
}


@pytest.mark.cpu_only
@pytest.mark.parametrize(
    ("what", "kind"), [(what, kind) for what, (_, kinds, _) in CANNOT.items() for kind in kinds]
)
def test_what_torch_nn_cannot(what: str, kind: str) -> None:
    call, _, message = CANNOT[what]
    x = torch.randn(3, 2, 2)
    call(build(kind, 2, 3), x)
    with pytest.raises(Exception, match=message):
        call(getattr(nn, kind)(2, 3), x)
