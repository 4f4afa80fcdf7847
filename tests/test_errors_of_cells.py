"""Wrong and odd input of the cells: the exception that torch.nn raises for the same call, or its
result.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, build
from torch import Tensor
from wrong_calls import HERE, Case, H, I, Make, N, check_as_torch, x, zeros

pytestmark = pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")


def h() -> Tensor:
    return torch.zeros(N, H)


def c() -> Tensor:
    return torch.ones(N, H)


CELL_CASES: dict[str, Callable[[str], Case]] = {
    "0-D": lambda k: (lambda m: m()(torch.tensor(1.0)), ["0D", "1D or 2D"]),
    "3-D": lambda k: (lambda m: m()(x(1, N, I)), ["3D", "1D or 2D"]),
    "features": lambda k: (lambda m: m()(x(N, 5)), ["5", "3"]),
    "features-1D": lambda k: (lambda m: m()(x(5)), ["5", "3"]),
    "no-rows": lambda k: (lambda m: m()(x(0, I)), []),
    "no-rows-with-state": lambda k: (lambda m: m()(x(0, I), zeros(k, 0, H)), []),
    "float64": lambda k: (lambda m: m()(x(N, I).double()), []),
    "float16": lambda k: (lambda m: m()(x(N, I).half()), []),
    "int64": lambda k: (lambda m: m()(x(N, I).long()), []),
    "all-complex64": lambda k: (lambda m: m().to(torch.complex64)(x(N, I).to(torch.complex64)), []),
    "meta": lambda k: (lambda m: m()(x(N, I).to("meta")), ["meta", HERE]),
    "all-meta": lambda k: (lambda m: m(device="meta")(x(N, I).to("meta")), []),
    "sparse": lambda k: (lambda m: m()(x(N, I).to_sparse()), []),
    "sparse-csr": lambda k: (lambda m: m()(x(N, I).to_sparse_csr()), []),
    "mkldnn": lambda k: (lambda m: m()(x(N, I).to_mkldnn()), []),
    "list": lambda k: (lambda m: m()([1.0]), []),
    "none": lambda k: (lambda m: m()(None), []),
    "no-argument": lambda k: (lambda m: m()(), ["input"]),
    "state-size": lambda k: (lambda m: m()(x(N, I), zeros(k, N, 5)), ["5", "4"]),
    "state-rows": lambda k: (lambda m: m()(x(N, I), zeros(k, 3, H)), ["3", "2"]),
    "state-one-row": lambda k: (lambda m: m()(x(N, I), zeros(k, 1, H)), ["1", "2"]),
    "state-1D": lambda k: (lambda m: m()(x(N, I), zeros(k, H)), []),
    "state-2D": lambda k: (lambda m: m()(x(I), zeros(k, 1, H)), []),
    "state-3D": lambda k: (lambda m: m()(x(N, I), zeros(k, 1, N, H)), ["3D", "1D or 2D"]),
    "state-float64": lambda k: (lambda m: m()(x(N, I), zeros(k, N, H, dtype=torch.float64)), []),
    "state-int64": lambda k: (lambda m: m()(x(N, I), zeros(k, N, H, dtype=torch.int64)), []),
    "state-meta": lambda k: (lambda m: m()(x(N, I), zeros(k, N, H, device="meta")), []),
    "tuple-or-not": lambda k: (
        lambda m: m()(x(N, I), torch.zeros(N, H) if k == "LSTMCell" else (torch.zeros(N, H),) * 2),
        [],
    ),
    "state-list": lambda k: (lambda m: m()(x(N, I), [torch.zeros(N, H)] * 2), []),
    "state-number": lambda k: (lambda m: m()(x(N, I), 0.0), []),
}
LSTM_CELL_CASES: dict[str, Case] = {
    "one": (lambda m: m()(x(N, I), (h(),)), ["two"]),
    "three": (lambda m: m()(x(N, I), (h(),) * 3), ["two"]),
    "c-size": (lambda m: m()(x(N, I), (h(), torch.zeros(N, 5))), ["5", "4"]),
    "c-rows": (lambda m: m()(x(N, I), (h(), torch.zeros(3, H))), ["3", "2"]),
    "c-1D": (lambda m: m()(x(N, I), (h(), torch.zeros(H))), []),
    "c-float64": (lambda m: m()(x(N, I), (h(), c().double())), []),
}


@pytest.mark.parametrize("case", CELL_CASES)
@pytest.mark.parametrize("kind", CELLS)
def test_wrong_calls_of_cells_raise_torchs_errors(kind: str, case: str) -> None:
    check_as_torch(kind, *CELL_CASES[case](kind))


@pytest.mark.parametrize("case", LSTM_CELL_CASES)
def test_lstm_cell(case: str) -> None:
    check_as_torch("LSTMCell", *LSTM_CELL_CASES[case])


def test_unknown_nonlinearity_of_a_cell() -> None:
    """torch.nn takes the name and refuses the call."""

    def call(make: Make) -> Any:
        return make(nonlinearity="sine")(x(N, I))

    check_as_torch("RNNCell", call, ["sine"])


@pytest.mark.parametrize("kind", CELLS)
def test_cells_have_no_lengths(kind: str) -> None:
    with pytest.raises(TypeError):
        build(kind, I, H)(x(N, I), lengths=torch.tensor([1, 1]))
