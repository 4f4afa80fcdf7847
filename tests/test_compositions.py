"""Transforms of torch within each other, on a layer and on a loop of torch's operators.

Each takes a function of one tensor to another such function, whose value is a number.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

import pytest
import torch
from support import LAYERS, build, flatten
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vjp, vmap

from rnnkern.known_cells import CELLS

pytestmark = pytest.mark.cpu_only

Function: TypeAlias = Callable[[Tensor], Tensor]
T, N, I, H = 3, 2, 2, 3


def number(z: Tensor) -> Tensor:
    """One number of all elements, to which each contributes in its own way."""
    factors = torch.linspace(-1, 1.3, z.numel(), dtype=z.dtype).view(z.shape)
    return (factors * z).sum() + z.square().sum()


def direction_like(z: Tensor) -> Tensor:
    return torch.linspace(-0.7, 1.1, z.numel(), dtype=z.dtype).view(z.shape)


def by_batches(f: Function) -> Function:
    """The older vmap, which autograd has for itself."""

    def slopes(z: Tensor) -> Tensor:
        if not z.requires_grad:
            z = z.detach().requires_grad_()
        values = torch.stack((f(z), 2 * f(z)))
        weights = torch.eye(2, dtype=z.dtype) + 0.1
        (batch,) = torch.autograd.grad(
            values, z, weights, is_grads_batched=True, create_graph=True, materialize_grads=True
        )
        return number(batch)

    return slopes


def by_dual_numbers(f: Function) -> Function:
    def tangent(z: Tensor) -> Tensor:
        with forward_ad.dual_level():
            made = forward_ad.unpack_dual(f(forward_ad.make_dual(z, direction_like(z)))).tangent
        return torch.zeros((), dtype=z.dtype) if made is None else made

    return tangent


def by_functional(f: Function) -> Function:
    jacobian = torch.autograd.functional.jacobian
    return lambda z: number(jacobian(f, z, create_graph=True, vectorize=True))


TRANSFORMS: dict[str, Callable[[Function], Function]] = {
    "grad": lambda f: lambda z: number(grad(f)(z)),
    "vjp": lambda f: lambda z: number(vjp(f, z)[1](torch.tensor(1.3, dtype=z.dtype))[0]),
    "jvp": lambda f: lambda z: jvp(f, (z,), (direction_like(z),))[1],
    "jacrev": lambda f: lambda z: number(jacrev(f)(z)),
    "jacfwd": lambda f: lambda z: number(jacfwd(f)(z)),
    "vmap": lambda f: lambda z: number(vmap(f)(torch.stack((z, 0.5 * z)))),
    "vmap of grad": lambda f: lambda z: number(vmap(grad(f))(torch.stack((z, 2 * z)))),
    "gradients in batches": by_batches,
    "dual numbers": by_dual_numbers,
    "functional": by_functional,
}


def loop(mode: str, reset: Tensor, operands: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a layer of one direction gives, by the reference of its cell."""
    state = tuple(operands[name][0] for name in ("h", "c") if name in operands)
    outputs = []
    for x, begins in zip(operands["x"], reset, strict=True):
        state = tuple(torch.where(begins[:, None], 0, z) for z in state)
        of_x = x @ operands["weight_ih_l0"].mT + operands["bias_ih_l0"]
        of_h = state[0] @ operands["weight_hh_l0"].mT + operands["bias_hh_l0"]
        state = CELLS[mode].step(of_x, of_h, state)
        outputs.append(state[0])
    return flatten((torch.stack(outputs), tuple(z[None] for z in state)))


OPERANDS = ["x", "h", "c", "weight_ih_l0", "weight_hh_l0", "bias_hh_l0"]
# What torch refuses, of its own operators too: the inner transform, and the outer one.
REFUSED = {
    *itertools.product(
        ("gradients in batches", "functional"),
        ("grad", "vjp", "jvp", "jacrev", "jacfwd", "vmap", "vmap of grad"),
    ),
    *itertools.product(("dual numbers",), ("dual numbers", "jvp", "jacfwd", "vmap")),
    ("jvp", "dual numbers"),
    ("jacfwd", "dual numbers"),
}
COMPOSITIONS = [
    *((name,) for name in TRANSFORMS),
    *(names for names in itertools.product(TRANSFORMS, repeat=2) if names not in REFUSED),
    ("jacrev", "functional", "dual numbers"),
]


@pytest.mark.parametrize("names", COMPOSITIONS, ids=", ".join)
def test_as_a_loop_of_operators(names: tuple[str, ...]) -> None:
    place = COMPOSITIONS.index(names)  # so that neighbours differ in the rest
    kind, of = LAYERS[place % 3], OPERANDS[place // 3 % len(OPERANDS)]
    used = ("all", "y", "states")[place // 18 % 3]
    torch.manual_seed(place)
    module = build(kind, I, H, dtype=torch.float64)
    operands = {name: p.detach() for name, p in module.named_parameters()}
    operands["x"] = torch.randn(T, N, I, dtype=torch.float64)
    states = ("h", "c") if kind == "LSTM" else ("h",)
    operands |= {name: torch.randn(1, N, H, dtype=torch.float64) for name in states}
    of = of if of in operands else "h"
    reset = torch.zeros(T, N, dtype=torch.bool)
    reset[1, 0] = True

    def layer(operands: dict[str, Tensor]) -> dict[str, Tensor]:
        weights = {name: operands[name] for name, _ in module.named_parameters()}
        state: Any = tuple(operands[name] for name in states)
        given = (operands["x"], state if len(state) > 1 else state[0])
        return flatten(functional_call(module, weights, given, {"reset": reset}))

    def result(outputs: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> list[Tensor]:
        def f(z: Tensor) -> Tensor:
            y, *others = outputs(operands | {of: z}).values()
            chosen = {"all": [y, *others], "y": [y], "states": others}[used]
            return sum((number(part.sin()) for part in chosen), torch.zeros(()))

        for name in names:
            f = TRANSFORMS[name](f)
        z = operands[of].clone().requires_grad_()
        value = f(z)
        slopes = torch.autograd.grad(value, z) if value.requires_grad else ()
        return [value.detach(), *slopes]

    expected = result(lambda given: loop(module.mode, reset, given))
    assert any(z.count_nonzero() for z in expected)
    torch.testing.assert_close(result(layer), expected, rtol=1e-7, atol=1e-7)
