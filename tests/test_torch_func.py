"""The transforms of `torch.func`, and forward mode."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from layer_options import LENGTHS, RESET
from support import (
    CELLS,
    FORMS,
    LAYERS,
    Seen,
    build,
    build_form,
    flatten,
    loss_of,
    pair,
    weights_of,
)
from torch import Tensor, nn
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
from torch.utils._pytree import tree_map

from rnnkern import kernels

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def assert_near(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bidirectional": {"bidirectional": True, "num_layers": 2},
    "batch-first": {"batch_first": True},
    "no-bias": {"bias": False},
}


def make(form: str, option: str = "plain") -> tuple[nn.Module, nn.Module]:
    module = build_form(form, 2, 3, dtype=torch.float64, proj_size=2, **OPTIONS[option])
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


@pytest.mark.parametrize("form", [*FORMS, *CELLS])
def test_vectorized_jacobians_of_torch_autograd(form: str) -> None:
    """Their vmap is an older one, which has fewer rules."""
    if form in CELLS:
        module, x = build(form, 2, 3, dtype=torch.float64), torch.randn(2, 2, dtype=torch.float64)
        theirs: nn.Module = oracle.twin(module, torch.float64)
    else:
        module, theirs = make(form)
        x = torch.randn(3, 2, 2, dtype=torch.float64)

    def outputs(m: nn.Module) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return lambda a: tuple(flatten(m(a)).values())

    def loss(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda a: outputs(m)(a)[0].pow(3).sum()

    weight = next(iter(weights_of(module)))

    def by_weight(m: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda w: next(iter(flatten(functional_call(m, {weight: w}, (x,))).values()))

    at = weights_of(module)[weight]
    first = torch.autograd.functional.jacobian(outputs(theirs), x)
    of_weight = torch.autograd.functional.jacobian(by_weight(theirs), at)
    second = torch.autograd.functional.hessian(loss(theirs), x)
    for way in ("reverse-mode", "forward-mode"):
        assert_near(
            torch.autograd.functional.jacobian(by_weight(module), at, vectorize=True, strategy=way),
            of_weight,
        )
        found = torch.autograd.functional.jacobian(outputs(module), x, vectorize=True, strategy=way)
        for ours, expected in zip(found, first, strict=True):
            assert_near(ours, expected)
        assert_near(
            torch.autograd.functional.hessian(
                loss(module), x, vectorize=True, outer_jacobian_strategy=way
            ),
            second,
        )


@pytest.mark.parametrize("kind", CELLS)
def test_a_gradient_asks_for_parametrized_weights_once(kind: str) -> None:
    class Counted(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            seen.append(weight)
            return 2 * weight

    seen: list[Tensor] = []
    module = build(kind, 2, 3)
    nn.utils.parametrize.register_parametrization(module, "weight_hh", Counted())
    seen.clear()
    grad(loss_of(module))(weights_of(module), torch.randn(5, 2))
    assert len(seen) == 1


@pytest.mark.parametrize("kind", CELLS)
def test_cells_under_transforms(kind: str) -> None:
    module = build(kind, 2, 3, dtype=torch.float64)
    theirs = oracle.twin(module, torch.float64)
    weights, xs = weights_of(module), torch.randn(4, 5, 2, dtype=torch.float64)
    ours = vmap(grad(loss_of(module)), (None, 0))(weights, xs)
    assert_near(ours, looped(lambda x: grad(loss_of(theirs))(weights, x), xs))


@pytest.mark.parametrize("kind", ["RNN", "GRU"])
def test_forward_mode_over_a_backward(kind: str) -> None:
    """The forward pass outside of the dual level, the backward pass inside: tangents are kept."""
    tangents = []
    x = torch.randn(4, 2, 3, requires_grad=True)
    v, w = torch.randn(4, 2, 5), torch.randn(4, 2, 5)
    for module in pair(kind, 3, 5):
        y, _ = module(x)
        with forward_ad.dual_level():
            (dx,) = torch.autograd.grad(y, x, forward_ad.make_dual(v, w))
            tangents.append(forward_ad.unpack_dual(dx).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_no_view_of_an_input_that_a_transform_has_wrapped_is_asked_for(kind: str) -> None:
    """torch takes a millisecond to refuse one."""
    module, shape = build(kind, 2, 3), (2,) if kind.endswith("Cell") else (4, 1, 2)
    record: Any = None  # not asked for
    seen = []

    def loss(x: Tensor) -> Tensor:
        if kind.endswith("Cell"):
            seen.append(kernels.plain_cell(module, x, None, record, record))
        else:
            seen.append(kernels.plain_call(module, x, None, record))
        return module(x)[0].sum()

    grad(loss)(torch.randn(shape))
    assert seen == [None]
