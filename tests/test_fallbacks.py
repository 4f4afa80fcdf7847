"""What no kernel covers: torch.jit, other dtypes, subclasses; and what `explain` says of it."""

from __future__ import annotations

import re
from typing import Any

import oracle
import pytest
import subprocesses
import torch
from support import (
    FORMS,
    LAYERS,
    Leaves,
    assert_bitwise,
    build,
    build_form,
    check,
    evaluate,
    flatten,
    in_a_process,
    leaves_for,
    pack_rows,
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
    return in_a_process(subprocesses.fallbacks)


# What the warning must name for the user to know what to change.
NAMED = {
    "complex64": "dtype|complex64",
    "subclass": "subclass",
    "subclass-of-a-weight": "subclass",
    "complex64-lengths": "dtype|complex64",
}


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", subprocesses.FALLBACKS)
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
    module = build_form(form, 4, 6, bidirectional=True)
    leaves = leaves_for(module, 5, 3)
    lengths, reset = torch.tensor([2, 5, 0]), torch.rand(5, 3) < 0.4

    def elsewhere(m: nn.Module, own: Leaves, **options: Tensor) -> Any:
        x = own["x"].as_subclass(subprocesses.Subclass)  # which no kernel takes
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


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_traced_calls_with_lengths_check_the_state() -> None:
    module = build("LSTM", 3, 4)
    lengths = torch.tensor([2, 1])
    x, h = torch.randn(3, 2, 3), torch.zeros(1, 2, 4)
    with pytest.raises((RuntimeError, IndexError)):
        torch.jit.trace(lambda x: module(x, h, lengths=lengths)[0], (x,))
    packed = pack_rows([torch.randn(2, 3)])
    with pytest.raises(ValueError, match="PackedSequence"):
        torch.jit.trace(lambda x: module(packed, lengths=lengths)[0].data, (x,))


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_the_warning_names_the_line_of_the_call(kind: str) -> None:
    from rnnkern import forward

    forward._warned.clear()
    module = getattr(rnnkern, kind)(3, 4).to(torch.complex64)
    with pytest.warns(rnnkern.FallbackWarning) as caught:
        module(torch.randn(2, 3, dtype=torch.complex64))
    assert [warning.filename for warning in caught] == [__file__]
