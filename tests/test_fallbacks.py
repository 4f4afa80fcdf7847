"""What no kernel covers: torch.jit, other dtypes, subclasses; and what `explain` says of it."""

from __future__ import annotations

import re
from typing import Any

import oracle
import processes
import pytest
import torch
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
    states_of,
)
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

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


@pytest.fixture(scope="module")
def fallbacks() -> dict[str, list[str] | None]:
    return in_a_process(processes.fallbacks)


# What the warning must name for the user to know what to change.
NAMED = {
    "complex64": "dtype|complex64",
    "subclass": "subclass",
    "subclass-of-a-weight": "subclass",
    "complex64-lengths": "dtype|complex64",
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", processes.FALLBACKS)
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
        x = own["x"].as_subclass(processes.Subclass)  # which no kernel takes
        result = m(x, states_of(own), **options)
        return tree_map_only(Tensor, lambda t: t.as_subclass(Tensor), result)

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
