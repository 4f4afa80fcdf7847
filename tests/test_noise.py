"""The random numbers of recurrent dropout and zoneout."""

from __future__ import annotations

from typing import Any

import options_oracle
import oracle
import pytest
import torch
from options_cases import ON_A_GPU, SEED, H, I, N, T
from support import build
from torch import Tensor

from rnnkern import noise

pytestmark = pytest.mark.filterwarnings(ON_A_GPU)

KNOWN = (  # of Random123, the library of the generator's authors
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
)


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_known_answers_of_philox(counter: Any, key: Any, wanted: Any) -> None:
    assert options_oracle.philox(counter, key) == wanted
    made = noise.philox([torch.tensor([word]) for word in counter], key)
    assert tuple(int(word) for word in made) == wanted


def hidden_from_the_product(H: int = 4096, N: int = 4, p: float = 0.25) -> Tensor:
    """``[N, H]``, the factors of recurrent dropout as the kernel applies them."""
    module = build("RNN", 1, H, nonlinearity="relu", bias=False, recurrent_dropout=p)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.copy_(torch.eye(H))
    return module(torch.zeros(1, N, 1), torch.ones(1, N, H))[0][0].detach()


def test_how_often_units_are_hidden() -> None:
    torch.manual_seed(0)
    made = hidden_from_the_product()
    assert made.unique().tolist() == pytest.approx([0, 4 / 3])
    share = (made == 0).double().mean()
    deviation = (0.25 * 0.75 / made.numel()) ** 0.5
    assert abs(share - 0.25) < 4 * deviation
    assert not torch.equal(made[0], made[1])


@pytest.mark.kernel
def test_one_mask_for_all_steps() -> None:
    module = build("RNN", 1, H, nonlinearity="relu", bias=False, recurrent_dropout=0.5)
    with torch.no_grad():
        module.weight_ih_l0.zero_()
        module.weight_hh_l0.copy_(torch.eye(H))
    y = module(torch.zeros(T, N, 1), torch.ones(1, N, H))[0].detach()
    mask = y[0] / 2
    for t in range(T):
        assert torch.equal(y[t], mask * 2.0 ** (t + 1))


def test_each_call_draws_one_seed() -> None:
    module = build("GRU", I, H, num_layers=2, recurrent_dropout=0.5)
    x = torch.randn(T, N, I)
    torch.manual_seed(SEED)
    first, second = module(x)[0], module(x)[0]
    after = torch.rand(())
    torch.manual_seed(SEED)
    assert torch.equal(module(x)[0], first)
    assert not torch.equal(first, second)
    torch.manual_seed(SEED)
    noise.draw_seed(), noise.draw_seed()
    assert torch.equal(torch.rand(()), after)


@pytest.mark.parametrize("options", [{"zoneout": 0.4}, {"recurrent_dropout": 0.4}, {}])
def test_eval_draws_nothing(options: Any) -> None:
    module = build("LSTM", I, H, **options).eval()
    torch.manual_seed(SEED)
    before = torch.get_rng_state()
    x = torch.randn(T, N, I)
    torch.set_rng_state(before)
    first, second = module(x)[0], module(x)[0]
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, second)
    plain = oracle.twin(module)(x)[0]
    assert torch.allclose(first, plain, atol=1e-6) == ("zoneout" not in options)


def test_rows_and_layers_draw_apart() -> None:
    """The same input in each row and layer; other masks."""
    torch.manual_seed(0)
    masks = hidden_from_the_product(64, 8, 0.5)
    assert len({tuple(row.tolist()) for row in masks}) == 8
    seed = noise.draw_seed()
    rows = torch.arange(2)
    drawn = [
        noise.happens(0.5, seed, purpose, layer=k, direction=d, t=t, rows=rows, units=64)
        for purpose in noise.Purpose
        for k in (0, 1)
        for d in (0, 1)
        for t in (0, 1)
    ]
    assert len({tuple(row.tolist()) for each in drawn for row in each}) == 2 * len(drawn)
