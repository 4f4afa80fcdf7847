"""RNNCell, LSTMCell and GRUCell against torch.nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import (
    CELL_FORMS,
    CELLS,
    DTYPES,
    Leaves,
    build,
    build_form,
    check,
    initial_states,
    on_threads,
    plain,
    states_of,
)
from torch import Tensor, nn

import rnnkern
from rnnkern import kernels


def leaves_for(cell: nn.Module, rows: int | None, *, hx: bool = True) -> Leaves:
    shape = (cell.input_size,) if rows is None else (rows, cell.input_size)
    return {"x": torch.randn(shape)} | (initial_states(cell, rows) if hx else {})


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [3, 1, None], ids=["batched", "one-row", "unbatched"])
@pytest.mark.parametrize("hx", [True, False], ids=["hx", "no-hx"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("form", CELL_FORMS)
def test_every_option_agrees_with_torch_nn(
    form: str, bias: bool, dtype: torch.dtype, hx: bool, rows: int | None
) -> None:
    cell = build_form(form, 4, 6, dtype=dtype, bias=bias)
    check(cell, leaves_for(cell, rows, hx=hx))


@pytest.mark.kernel
@pytest.mark.parametrize(
    ("rows", "I", "H"),
    [(1, 1, 1), (2, 3, 1), (5, 1, 15), (6, 7, 17), (7, 16, 16), (13, 5, 33), (64, 31, 65)],
)
@pytest.mark.parametrize("form", CELL_FORMS)
def test_any_size_agrees_with_torch_nn(form: str, rows: int, I: int, H: int) -> None:
    cell = build_form(form, I, H)
    check(cell, leaves_for(cell, rows))


@pytest.mark.parametrize("form", CELL_FORMS)
def test_construction_is_torchs(form: str) -> None:
    kind, own = CELL_FORMS[form]
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
def test_positional_arguments_are_torchs(kind: str, arguments: tuple[Any, ...]) -> None:
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
@pytest.mark.parametrize("form", CELL_FORMS)
def test_input_layouts(form: str, layout: str) -> None:
    shape, view = LAYOUTS[layout]
    cell = build_form(form, 4, 6)
    leaves = initial_states(cell, 3) | {"x": torch.randn(shape)}
    check(cell, leaves, lambda m, own: m(view(own["x"]), states_of(own)))


@pytest.mark.kernel
@pytest.mark.parametrize("form", CELL_FORMS)
def test_state_layouts(form: str) -> None:
    cell = build_form(form, 4, 6)

    def call(module: nn.Module, leaves: Leaves) -> Any:
        views = {
            "h0": leaves["h0"][:1].expand(3, 6),
            "c0": leaves.get("c0", leaves["h0"]).t().contiguous().t(),
        }
        return module(leaves["x"], states_of({name: views[name] for name in leaves if name != "x"}))

    check(cell, leaves_for(cell, 3), call)


@pytest.mark.kernel
@pytest.mark.parametrize("form", CELL_FORMS)
def test_called_step_by_step(form: str) -> None:
    """The usual loop over a sequence, with gradients through all of it."""
    cell = build_form(form, 4, 6)

    def call(module: nn.Module, leaves: Leaves) -> Any:
        state, outputs = states_of(leaves), []
        for step in leaves["x"]:
            state = module(step, state)
            outputs.append(state if isinstance(state, Tensor) else state[0])
        return torch.stack(outputs), state

    leaves = {"x": torch.randn(7, 3, 4)} | initial_states(cell, 3)
    check(cell, leaves, call)


@pytest.mark.parametrize("form", CELL_FORMS)
def test_a_layer_is_its_cell_in_a_loop(form: str) -> None:
    kind, own = CELL_FORMS[form]
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
    """torch.nn's cells compute without a bias that has been set to None (not on a GPU)."""
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


# How a step reads its weights (`csrc/plan.h`)


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "I", "H"),
    [(16, 40, 33), (17, 70, 67), (31, 300, 65), (64, 65, 129), (70, 3, 70), (130, 17, 20)],
    ids=str,
)
@pytest.mark.parametrize("form", CELL_FORMS)
def test_rows_that_fill_vectors(
    form: str, rows: int, I: int, H: int, dtype: torch.dtype, threads: int
) -> None:
    """Weights are broadcast; the last vector of rows, panel of rows or panel of units is not full,
    and sums are longer than a block of k.
    """
    cell = build_form(form, I, H, dtype=dtype)
    check(cell, leaves_for(cell, rows), on_threads(plain, threads))


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_broadcast_weights_have_the_bits_of_packed_ones(kind: str, dtype: torch.dtype) -> None:
    """One step reads them in place, a long sequence packs them (test_plan.py)."""
    module = build(kind, 300, 70, dtype=dtype)
    x = torch.randn(200, 47, 300).to(dtype)
    # Many steps, because 16 bits hide most differences.
    one: list[torch.Tensor] = []
    state = None
    with torch.no_grad():
        long, _ = module(x)
        for t in range(20):
            output, state = module(x[t : t + 1], state)
            one.append(output)
    assert torch.equal(long[:20], torch.cat(one))


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", [33, 250, 257, 289])
@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_broadcast_weights_whose_columns_fill_no_tile(
    kind: str, inputs: int, dtype: torch.dtype
) -> None:
    """The bits are those of packed weights, for units that fill tiles and units that do not."""
    for units in (32, 40, 64):
        module = build(kind, inputs, units, dtype=dtype)
        packed = rnnkern.freeze(module)
        for rows in (16, 17, 33):
            x = torch.randn(1, rows, inputs).to(dtype)
            with torch.no_grad():
                assert torch.equal(module(x)[0], packed(x)[0])


@pytest.mark.kernel
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("form", CELL_FORMS)
def test_gradients_of_few_rows(form: str, rows: int) -> None:
    """Weight gradients are outer products, of whole and partial vectors."""
    for I, H in ((64, 48), (70, 37)):
        cell = build_form(form, I, H)
        check(cell, leaves_for(cell, rows))


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.parametrize("form", CELL_FORMS)
def test_rows_of_weights_are_apart_in_backward(form: str) -> None:
    """It reads vectors that reach into the next row, and nothing of that row is seen."""
    cell = build_form(form, 37, 20)
    leaves = leaves_for(cell, 2)
    for leaf in leaves.values():
        leaf.requires_grad_()
    outputs = as_tuple(cell(leaves["x"], states_of(leaves)))
    for weight in (cell.weight_ih, cell.weight_hh):
        weight.data[:, 0] = torch.inf
    sum(output.sum() for output in outputs).backward()
    for leaf in (leaves["x"], leaves["h0"]):
        assert leaf.grad is not None
        assert not leaf.grad[:, 0].isfinite().all()
        assert leaf.grad[:, 1:].isfinite().all()


# The plain call: one crossing of the boundary


def is_plain(cell: nn.Module, x: Tensor, hx: Any = None) -> bool:
    """Whether a call without a gradient is one crossing."""
    with torch.no_grad():
        try:
            return kernels.plain_cell(cell, x, hx, None, None) is not None
        except kernels.RefusedError:
            return False


@pytest.mark.parametrize("form", CELL_FORMS)
@pytest.mark.parametrize("rows", [3, None], ids=["batched", "unbatched"])
def test_a_plain_call_is_one_crossing(form: str, rows: int | None) -> None:
    for bias in (True, False):
        cell = build_form(form, 4, 6, bias=bias)
        leaves = leaves_for(cell, rows)
        assert is_plain(cell, leaves["x"], states_of(leaves))
        assert is_plain(cell, leaves["x"])
    assert not is_plain(cell, torch.randn(2, 3, 4))
    assert not is_plain(cell, torch.randn(3, 5))
    assert not is_plain(cell, torch.randn(3, 4).double())


@pytest.mark.parametrize("kind", CELLS)
def test_weights_that_are_no_parameters(kind: str) -> None:
    """A property of the class is asked for in the plain call, as torch.nn asks."""
    x = torch.randn(3, 4)

    class Own(getattr(rnnkern, kind)):  # type: ignore[misc]
        @property
        def weight_hh(self) -> Tensor:
            return self._parameters["weight_hh"] * 2

    doubled = build(kind, 4, 6)
    doubled.__class__ = Own
    shadowed = build(kind, 4, 6)
    shadowed.__dict__["weight_hh"] = shadowed._parameters["weight_hh"].detach() * 2
    parametrized = build(kind, 4, 6)
    nn.utils.parametrizations.weight_norm(parametrized, "weight_hh")
    for cell in (doubled, shadowed, parametrized):
        assert is_plain(cell, x) == (cell is not shadowed)
        theirs = getattr(nn, kind)(4, 6)
        with torch.no_grad():
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                getattr(theirs, name).copy_(getattr(cell, name))
        for mine, other in zip(as_tuple(cell(x)), as_tuple(theirs.to(x.device)(x)), strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("nonlinearity", ["sigmoid", "TANH", None])
def test_an_unknown_nonlinearity_has_torchs_error(nonlinearity: str | None) -> None:
    ours, theirs = build("RNNCell", 4, 6), nn.RNNCell(4, 6)
    messages = []
    for cell in (ours, theirs):
        cell.nonlinearity = nonlinearity
        with pytest.raises(RuntimeError) as caught:
            cell(torch.randn(3, 4))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


# Gradients


@pytest.mark.parametrize("rows", [3, 200, None], ids=["few-rows", "many-rows", "unbatched"])
@pytest.mark.parametrize("kind", CELLS)
def test_states_changed_in_place(kind: str, rows: int | None) -> None:
    """Whatever becomes of h and c after the call, gradients are those of before."""
    cell = build(kind, 4, 40)
    leaves = leaves_for(cell, rows)

    def gradients(change: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        own = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
        changed = [change(state) for state in as_tuple(plain(cell, own))]
        loss = sum((state * (i + 2)).sum() for i, state in enumerate(changed))
        return torch.autograd.grad(loss, [*own.values(), *cell.parameters()])

    for mine, other in zip(gradients(lambda z: z.mul_(3)), gradients(lambda z: z * 3), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("rows", [3, None], ids=["batched", "unbatched"])
@pytest.mark.parametrize("form", CELL_FORMS)
def test_second_derivatives(form: str, rows: int | None) -> None:
    cell = build_form(form, 3, 4, dtype=torch.float64)
    leaves = {k: v.double().requires_grad_() for k, v in leaves_for(cell, rows).items()}
    names = list(leaves)

    def call(*given: Tensor) -> Any:
        return plain(cell, dict(zip(names, given, strict=True)))

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(call, tuple(leaves.values()))


@pytest.mark.parametrize("kind", CELLS)
def test_batched_gradients(kind: str) -> None:
    cell, x = build(kind, 3, 4), torch.randn(2, 3, requires_grad=True)
    h = as_tuple(cell(x))[0]
    many = torch.randn(5, 2, 4)
    (found,) = torch.autograd.grad(h, x, many, is_grads_batched=True, retain_graph=True)
    wanted = [torch.autograd.grad(h, x, one, retain_graph=True)[0] for one in many]
    torch.testing.assert_close(found, torch.stack(wanted))


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.cpu_only
def test_what_a_step_keeps_for_backward(kind: str) -> None:
    """Besides operands and outputs: the gates and the new cell state, and h if it is small."""
    rows, H = 64, 128
    cell = build(kind, 32, H)
    leaves = {k: v.requires_grad_() for k, v in leaves_for(cell, rows).items()}
    known = {leaf.data_ptr() for leaf in (*leaves.values(), *cell.parameters())}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in known:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        plain(cell, leaves)
    slots = {"RNNCell": 0, "LSTMCell": 4 + 1, "GRUCell": 4}[kind]
    assert sum(tensor.numel() for tensor in kept) <= (slots + 1) * rows * H
