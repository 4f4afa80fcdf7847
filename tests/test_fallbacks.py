"""What no kernel covers: tracing, other dtypes and devices, transforms and modes; and what
`explain` says of it.
"""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import torch
from processes import FALLBACKS, Mode
from support import (
    FORMS,
    LAYERS,
    Leaves,
    assert_bitwise,
    build,
    check,
    evaluate,
    flatten,
    in_a_process,
    leaves_for,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.func import functional_call

import rnnkern


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_jit_trace(kind: str) -> None:
    """Recorded as torch.nn's own operators, without a warning."""
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)
    traced = torch.jit.trace(module, x)
    other = torch.randn(5, 3, 4)
    torch.testing.assert_close(flatten(traced(other)), flatten(oracle.twin(module)(other)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compile(kind: str) -> None:
    module = build(kind, 4, 6)
    compiled = torch.compile(module, backend="eager")
    check(
        module, leaves_for(module, 5, 3), lambda m, own: plain(compiled if m is module else m, own)
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_compile_with_lengths(kind: str) -> None:
    module = build(kind, 4, 6)
    compiled = torch.compile(module, backend="eager")
    lengths = torch.tensor([5, 0, 2])
    check(
        module,
        leaves_for(module, 5, 3),
        lambda m, own: compiled(own["x"], states_of(own), lengths=lengths),
        oracle_call=lambda m, own: oracle.run(m, own["x"], states_of(own), lengths),
    )


@pytest.fixture(scope="module")
def fallbacks() -> dict[str, list[str] | None]:
    return in_a_process("fallbacks")


# What the warning must name for the user to know what to change.
NAMED = {
    "complex64": "dtype|complex64",
    "meta": "meta",
    "subclass": "subclass",
    "subclass-of-a-weight": "subclass",
    "functorch": "(?i)functorch|torch.func|transform",
    "dispatch-mode": "mode",
    "flop-counter": "mode",
    "negative-view": "(?i)neg",
    "complex64-lengths": "dtype|complex64",
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", FALLBACKS)
def test_fallbacks_warn_once(fallbacks: dict[str, list[str] | None], name: str) -> None:
    messages = fallbacks[name]
    assert messages is not None, "the call failed"
    assert len(messages) == 1
    assert re.search(NAMED[name], messages[0])


@pytest.mark.cpu_only
def test_the_warning_is_a_user_warning() -> None:
    assert issubclass(rnnkern.FallbackWarning, UserWarning)


@pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")
@pytest.mark.parametrize("form", FORMS)
def test_fallback_results(form: str) -> None:
    """What torch.nn computes, and `lengths` and `reset` too."""
    kind, own = FORMS[form]
    module = build(kind, 4, 6, bidirectional=True, **own)
    leaves = leaves_for(module, 5, 3)
    lengths, reset = torch.tensor([2, 5, 0]), torch.rand(5, 3) < 0.4

    def elsewhere(m: nn.Module, own: Leaves, **options: Tensor) -> Any:
        with Mode():  # no kernel runs under it
            return m(own["x"], states_of(own), **options)

    ours = evaluate(module, leaves, elsewhere)
    # The very same weights in the same place, or a product on a GPU may take another way.
    assert_bitwise(ours, evaluate(rnnkern.revert(module), leaves, elsewhere))
    rnnkern.convert(module)
    check(
        module,
        leaves,
        lambda m, own: elsewhere(m, own, lengths=lengths, reset=reset),
        oracle_call=lambda m, own: oracle.run(m, own["x"], states_of(own), lengths, reset),
    )


@pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_torch_func_transforms(kind: str) -> None:
    module = build(kind, 4, 6, dtype=torch.float64)
    theirs = oracle.twin(module)
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def results(m: nn.Module) -> list[Any]:
        by_weights = torch.func.grad(lambda w: functional_call(m, w, (x,))[0].square().sum())(
            weights
        )
        if kind != "RNN" and x.device.type != "cpu":  # torch's own operators have no vmap there
            return [by_weights]
        return [by_weights, torch.func.jacrev(lambda a: m(a)[0])(x)]

    torch.testing.assert_close(results(module), results(theirs))


@pytest.mark.parametrize("kind", LAYERS)
def test_explain(kind: str) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)
    kernel = rnnkern.explain(module, x)
    assert "torch.nn" not in str(kernel)
    if x.device.type == "cpu":
        assert rnnkern.build_info()["isa"] in str(kernel)
    assert repr(kernel) == str(kernel)
    fallback = rnnkern.explain(
        module.to(torch.complex64), torch.randn(5, 3, 4, dtype=torch.complex64)
    )
    assert "torch.nn" in str(fallback)
    assert re.search("dtype|complex64", str(fallback))


@pytest.mark.cpu_only
def test_build_info() -> None:
    info = rnnkern.build_info()
    keys = {"version", "compiler", "cuda", "isa", "isa_compiled", "openmp", "torch", "threads"}
    assert keys <= info.keys()
    assert info["version"] == rnnkern.__version__
    assert info["torch"] == torch.__version__
