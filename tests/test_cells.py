"""RNNCell, LSTMCell and GRUCell against torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import CELLS, DTYPES, Leaves, build, check, initial_states, plain, states_of
from torch import Tensor, nn

import rnnkern

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "RNNCell": ("RNNCell", {}),
    "RNNCell-relu": ("RNNCell", {"nonlinearity": "relu"}),
    "LSTMCell": ("LSTMCell", {}),
    "GRUCell": ("GRUCell", {}),
}


def leaves_for(cell: nn.Module, rows: int | None, *, hx: bool = True) -> Leaves:
    shape = (cell.input_size,) if rows is None else (rows, cell.input_size)
    return {"x": torch.randn(shape)} | (initial_states(cell, rows) if hx else {})


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [3, 1, None], ids=["batched", "one-row", "unbatched"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("form", FORMS)
def test_options(form: str, bias: bool, dtype: torch.dtype, hx: bool, rows: int | None) -> None:
    kind, own = FORMS[form]
    cell = build(kind, 4, 6, dtype=dtype, bias=bias, **own)
    check(cell, leaves_for(cell, rows, hx=hx))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("rows", "I", "H"),
    [(1, 1, 1), (2, 3, 1), (5, 1, 15), (6, 7, 17), (7, 16, 16), (13, 5, 33), (64, 31, 65)],
)
@pytest.mark.parametrize("form", FORMS)
def test_sizes(form: str, rows: int, I: int, H: int) -> None:
    kind, own = FORMS[form]
    cell = build(kind, I, H, **own)
    check(cell, leaves_for(cell, rows))


@pytest.mark.parametrize("form", FORMS)
def test_construction_is_torchs(form: str) -> None:
    kind, own = FORMS[form]
    torch.manual_seed(3)
    ours = getattr(rnnkern, kind)(4, 6, **own)
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(4, 6, **own)
    assert isinstance(ours, getattr(nn, kind))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [("RNNCell", (4, 6, False, "relu")), ("LSTMCell", (4, 6, False)), ("GRUCell", (4, 6, False))],
)
def test_positional_arguments(kind: str, arguments: tuple[Any, ...]) -> None:
    cell = getattr(rnnkern, kind)(*arguments)
    assert repr(cell) == repr(getattr(nn, kind)(*arguments))
    check(cell, leaves_for(cell, 3))


@pytest.mark.parametrize("kind", CELLS)
def test_device_and_dtype_arguments(kind: str, device: torch.device) -> None:
    cell = getattr(rnnkern, kind)(4, 6, device=device, dtype=torch.float64)
    check(cell, leaves_for(cell, 3))
    on_meta = getattr(rnnkern, kind)(4, 6, device="meta")
    assert {parameter.device.type for parameter in on_meta.parameters()} == {"meta"}


LAYOUTS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], Tensor]]] = {
    "transposed": ((4, 3), lambda a: a.t()),
    "every-other-row": ((6, 4), lambda a: a[::2]),
    "every-other-feature": ((3, 8), lambda a: a[:, ::2]),
    "expanded-rows": ((1, 4), lambda a: a.expand(3, 4)),
    "expanded-features": ((3, 1), lambda a: a.expand(3, 4)),
    "one-step-of-a-batch": ((3, 7, 4), lambda a: a[:, 5]),
}


@pytest.mark.kernel
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_input_layouts(form: str, layout: str) -> None:
    kind, own = FORMS[form]
    shape, view = LAYOUTS[layout]
    cell = build(kind, 4, 6, **own)
    leaves = initial_states(cell, 3) | {"x": torch.randn(shape)}
    check(cell, leaves, lambda m, own: m(view(own["x"]), states_of(own)))


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_state_layouts(form: str) -> None:
    kind, own = FORMS[form]
    cell = build(kind, 4, 6, **own)

    def call(module: nn.Module, leaves: Leaves) -> Any:
        views = {
            "h0": leaves["h0"][:1].expand(3, 6),
            "c0": leaves.get("c0", leaves["h0"]).t().contiguous().t(),
        }
        return module(leaves["x"], states_of({name: views[name] for name in leaves if name != "x"}))

    check(cell, leaves_for(cell, 3), call)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_called_step_by_step(form: str) -> None:
    """The usual loop over a sequence, with gradients through all of it."""
    kind, own = FORMS[form]
    cell = build(kind, 4, 6, **own)

    def call(module: nn.Module, leaves: Leaves) -> Any:
        state, outputs = states_of(leaves), []
        for step in leaves["x"]:
            state = module(step, state)
            outputs.append(state if isinstance(state, Tensor) else state[0])
        return torch.stack(outputs), state

    leaves = {"x": torch.randn(7, 3, 4)} | initial_states(cell, 3)
    check(cell, leaves, call)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_is_its_cell_in_a_loop(form: str) -> None:
    kind, own = FORMS[form]
    cell = build(kind, 4, 6, dtype=torch.float64, **own)
    layer = build(kind.removesuffix("Cell"), 4, 6, dtype=torch.float64, **own)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x, state = torch.randn(7, 3, 4, dtype=torch.float64), None
    for step in x:
        state = cell(step, state)
    _, end = layer(x)
    for mine, other in zip(as_tuple(state), as_tuple(end), strict=True):
        torch.testing.assert_close(mine, other.squeeze(0))


@pytest.mark.parametrize("kind", CELLS)
def test_outputs_are_torchs_kind(kind: str) -> None:
    cell, theirs = build(kind, 4, 6), getattr(nn, kind)(4, 6)
    for rows in (3, None):
        leaves = leaves_for(cell, rows)
        mine, other = plain(cell, leaves), plain(theirs, leaves)
        assert type(mine) is type(other)
        assert [state.shape for state in as_tuple(mine)] == [
            state.shape for state in as_tuple(other)
        ]


def as_tuple(state: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (state,) if isinstance(state, Tensor) else state


@pytest.mark.parametrize("kind", CELLS)
def test_one_bias_missing(kind: str) -> None:
    """torch.nn's cells compute without a bias that somebody has set to None (not on a GPU)."""
    for name in ("bias_ih", "bias_hh"):
        cell = build(kind, 4, 6)
        theirs = getattr(nn, kind)(4, 6)
        theirs.load_state_dict(cell.state_dict())
        for module in (cell, theirs):
            setattr(module, name, None)
        x = torch.randn(3, 4)
        wanted = as_tuple(theirs.cpu()(x.cpu()))
        for mine, other in zip(as_tuple(cell(x)), wanted, strict=True):
            torch.testing.assert_close(mine, other.to(x.device))
