"""generate: a layer that is fed its own output."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import LAYERS, build
from torch import Tensor, nn

import rnnkern


def setup(kind: str, **options: Any) -> tuple[nn.Module, nn.Linear, Tensor]:
    module = build(kind, 3, 6, **options)
    return module, nn.Linear(6, 3), torch.randn(4, 3)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_each_input_is_made_from_the_output_before(kind: str, batch_first: bool) -> None:
    """The whole sequence of those inputs, given at once, brings the same outputs and state."""
    module, readout, x = setup(kind, num_layers=2, batch_first=batch_first)
    made, state = rnnkern.generate(module, readout, x, 5)
    assert made.shape == (5, 4, 3)
    given = torch.cat((x[None], made[:-1]))
    output, expected = module(given.transpose(0, 1) if batch_first else given)
    output = output.transpose(0, 1) if batch_first else output
    torch.testing.assert_close(made, readout(output).detach())
    torch.testing.assert_close(state, expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_it_goes_on_where_it_has_stopped(kind: str) -> None:
    module, readout, x = setup(kind)
    whole, last = rnnkern.generate(module, readout, x, 7)
    first, state = rnnkern.generate(module, readout, x, 3)
    rest, end = rnnkern.generate(module, readout, first[-1], 4, state)
    assert torch.equal(torch.cat((first, rest)), whole)
    torch.testing.assert_close(end, last, rtol=0, atol=0)


def test_a_module_of_torch_nn_gives_the_same() -> None:
    module, readout, x = setup("GRU")
    theirs = nn.GRU(3, 6)
    theirs.load_state_dict(module.state_dict())
    ours, _ = rnnkern.generate(module, readout, x, 4)
    other, _ = rnnkern.generate(theirs.to(x.device), readout, x, 4)
    torch.testing.assert_close(ours, other)


def test_nothing_is_recorded() -> None:
    module, readout, x = setup("LSTM")
    made, (h, c) = rnnkern.generate(module, readout, x.requires_grad_(), 2)
    assert not any(z.requires_grad for z in (made, h, c))


def test_wrong_arguments() -> None:
    module, readout, x = setup("RNN")
    with pytest.raises(TypeError, match="module must be an RNN, LSTM or GRU"):
        rnnkern.generate(readout, readout, x, 2)
    with pytest.raises(ValueError, match="one direction"):
        rnnkern.generate(build("RNN", 3, 6, bidirectional=True), readout, x, 2)
    with pytest.raises(TypeError, match="steps must be an int, got float"):
        rnnkern.generate(module, readout, x, 2.0)
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        rnnkern.generate(module, readout, x, 0)
    with pytest.raises(ValueError, match=r"input must be \[N, 3\], got \[4, 1, 3\]"):
        rnnkern.generate(module, readout, x[:, None], 2)
    with pytest.raises(ValueError, match=r"feedback must give \[4, 3\], as input, got \[4, 6\]"):
        rnnkern.generate(module, lambda h: h, x, 2)
