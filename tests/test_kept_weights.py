"""Packed weights and casts of weights, which are kept for a region of autocast."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
import torch
from support import CELLS, LAYERS, build
from torch import Tensor, nn

from rnnkern import kept_weights, kernels
from rnnkern.call import read_cell

pytestmark = pytest.mark.cpu_only

N, I, H = 16, 768, 256


def region(**options: Any) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, **options)


def kernel_of(cell: nn.Module, x: Tensor) -> kernels.Kernel:
    with region():
        call = read_cell(cell, x)
    return kernels.kernel_of(call.layer, H, 0)


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[kernels.Frozen]:
    """What has been packed for a region."""
    made: list[kernels.Frozen] = []

    def watched(*operands: Any) -> kernels.Frozen:
        made.append(kernels._C.Frozen(*operands))
        return made[-1]

    monkeypatch.setattr(kernels, "Frozen", watched)
    return made


def wanted(cell: nn.Module) -> int:
    """1 if the kernels of this CPU multiply such a cell as bfloat16, else 0."""
    x = torch.zeros(N, I)
    return int(kernels.multiplies_as_bfloat16(kernel_of(cell, x), x))


def is_anything_kept() -> bool:
    return any(kept_weights._regions.values())


def hidden(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def steps(cell: nn.Module, xs: Tensor, **options: Any) -> list[Tensor]:
    """The hidden states of all steps, in one region."""
    state, made = None, []
    with region(**options):
        for x in xs:
            state = cell(x, state)
            made.append(hidden(state))
    return made


@pytest.mark.kernel
@pytest.mark.parametrize("kind", CELLS)
def test_the_second_call_packs_for_the_others(kind: str, packings: list[Any]) -> None:
    cell, xs = build(kind, I, H), torch.randn(5, N, I)
    with torch.no_grad():
        made = steps(cell, xs)
        state, alone = None, []
        for x in xs:
            with region():  # one call in each region
                state = cell(x, state)
            alone.append(hidden(state))
    assert len(packings) == wanted(cell)
    assert all(torch.equal(a, b) for a, b in zip(made, alone, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.usefixtures("deterministic")
def test_few_rows_under_deterministic_algorithms(kind: str, packings: list[Any]) -> None:
    """They are multiplied as many are."""
    cell, xs = build(kind, I, H), torch.randn(5, 3, I)
    with torch.no_grad():
        packed = steps(cell, xs)
        assert len(packings) == wanted(cell)
        plain = steps(cell, xs, cache_enabled=False)
    assert len(packings) == wanted(cell)
    assert all(torch.equal(a, b) for a, b in zip(packed, plain, strict=True))


@pytest.mark.kernel
@pytest.mark.parametrize("kind", CELLS)
def test_gradients_are_the_same(kind: str, packings: list[Any]) -> None:
    cell, xs = build(kind, I, H), torch.randn(5, N, I)

    def gradients(**options: Any) -> list[Tensor]:
        torch.stack(steps(cell, xs, **options)).float().square().sum().backward()
        found = [p.grad for p in cell.parameters()]
        cell.zero_grad()
        return found

    packed = gradients()
    assert len(packings) == wanted(cell)
    plain = gradients(cache_enabled=False)
    assert len(packings) == wanted(cell)
    for a, b in zip(packed, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("own", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("trains", [False, True])
def test_layers_that_are_called_many_times(kind: str, own: dict[str, Any], trains: bool) -> None:
    """The same numbers as in regions of their own; of gradients, sums in the casts' type."""
    layer, xs = build(kind, I, H, **own), torch.randn(3, 2, N, I)

    def results(**options: Any) -> list[Tensor]:
        with torch.set_grad_enabled(trains), region(**options):
            outputs = [layer(x)[0] for x in xs]
        if not trains:
            return outputs
        torch.stack(outputs).float().square().sum().backward()
        gradients = [p.grad for p in layer.parameters()]
        layer.zero_grad()
        return [*outputs, *gradients]

    kept, plain = results(), results(cache_enabled=False)
    for a, b in zip(kept[:3], plain[:3], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(kept[3:], plain[3:], strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


def test_each_mode_has_casts_of_its_own() -> None:
    """Those that were made without a graph are of no use to a call that records one."""
    layer, x = build("LSTM", I, H), torch.randn(1, N, I)
    with region():
        with torch.inference_mode():
            layer(x)
        with torch.no_grad():
            layer(x)
        layer(x)[0].float().sum().backward()
        layer.requires_grad_(False)
        assert not layer(x)[0].requires_grad
        layer.requires_grad_(True)
        layer(x)[0].float().sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_a_step_of_an_optimizer_inside_a_region() -> None:
    layer, x = build("LSTM", I, H), torch.randn(1, N, I)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
    with region():
        layer(x)[0].float().sum().backward()
        optimizer.step()
        inside = layer(x)[0]
    with region():
        assert torch.equal(layer(x)[0], inside)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "in place": lambda cell: cell.weight_hh.mul_(2),
    "data": lambda cell: setattr(cell.weight_ih, "data", cell.weight_ih * 2),
    "bias": lambda cell: cell.bias_hh.add_(1),
    "replaced": lambda cell: setattr(cell, "weight_hh", nn.Parameter(cell.weight_hh * 2)),
    "loaded": lambda cell: cell.load_state_dict({k: v * 2 for k, v in cell.state_dict().items()}),
    "without biases": lambda cell: (setattr(cell, "bias_ih", None), setattr(cell, "bias_hh", None)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_weights_count(change: str) -> None:
    cell, x, h = build("GRUCell", I, H), torch.randn(N, I), torch.randn(N, H)
    with torch.no_grad():
        with region():
            before = [cell(x, h) for _ in range(3)]
            CHANGES[change](cell)
            after = [cell(x, h) for _ in range(3)]
        with region():
            again = cell(x, h)
    assert not torch.equal(before[0], again)
    assert all(torch.equal(z, before[0]) for z in before)
    assert all(torch.equal(z, again) for z in after)


def test_weights_that_change_between_regions() -> None:
    """By a way that leaves no trace on the tensor."""
    cell, x = build("GRUCell", I, H), torch.randn(N, I)
    made = []
    with torch.no_grad():
        for _ in range(2):
            with region():
                made += [cell(x, x[:, :H].contiguous()) for _ in range(3)]
            cell.weight_hh.data.mul_(0).add_(0.1)
            cell.weight_ih.data.mul_(0).add_(0.1)
    assert not torch.equal(made[0], made[3])
    assert torch.equal(made[3], made[5])


def test_nothing_is_kept_after_a_region() -> None:
    cell, x = build("LSTMCell", I, H), torch.randn(N, I)
    lstm, xs = build("LSTM", I, H), torch.randn(1, N, I)
    with torch.no_grad():
        with region():
            with region():
                cell(x), cell(x)
            kept = [k for each in kept_weights._regions.values() for k in each.values()]
            assert [k.made is not None for k in kept] == [True] * wanted(cell)
            lstm(xs)
            assert [len(each) for each in kept_weights._regions.values()] == [wanted(cell) + 1]
        assert not is_anything_kept()
        with suppress(ZeroDivisionError), region():
            cell(x), cell(x)
            raise ZeroDivisionError
        assert not is_anything_kept()


def test_weights_that_are_gone_are_forgotten(packings: list[Any]) -> None:
    """As those that a parametrization makes for each call."""
    x = torch.randn(N, I)
    with torch.no_grad(), region():
        for _ in range(4):
            build("GRUCell", I, H)(x)
        assert not is_anything_kept()
    assert packings == []


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
@pytest.mark.parametrize(
    "case", ["cache_enabled", "few numbers", "inference mode", "inference tensors", "float64"]
)
def test_calls_that_keep_nothing(kind: str, case: str) -> None:
    with torch.inference_mode(case == "inference tensors"):
        module = build(kind, I, 32 if case == "few numbers" else H)
    x = torch.randn(1, N, I) if kind == "LSTM" else torch.randn(N, I)
    if case == "float64":
        module, x = module.double(), x.double()
    mode = torch.inference_mode() if case == "inference mode" else torch.no_grad()
    with mode, region(cache_enabled=case != "cache_enabled"):
        made = [module(x)[0] for _ in range(3)]
        assert not is_anything_kept()
    assert torch.equal(made[0], made[2])


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_weights_of_which_torch_keeps_no_casts(kind: str) -> None:
    """A change that leaves no trace on them is seen, as by torch.nn."""
    module = build(kind, I, H).requires_grad_(False)
    x = torch.randn(1, N, I) if kind in LAYERS else torch.randn(N, I)
    with region():
        before = [module(x)[0] for _ in range(3)]
        for parameter in module.parameters():
            parameter.data.mul_(2)
        after = module(x)[0]
    with region():
        assert torch.equal(module(x)[0], after)
    assert not torch.equal(before[2], after)


def test_weights_that_are_views() -> None:
    """torch casts them in each call."""
    cell, x = build("GRUCell", I, H), torch.randn(N, I)
    weights = {
        name: parameter.detach().flatten().view(parameter.shape).requires_grad_()
        for name, parameter in cell.named_parameters()
    }
    with torch.no_grad(), region():
        before = [torch.func.functional_call(cell, weights, (x,)) for _ in range(3)]
        assert not is_anything_kept()
        for weight in weights.values():
            weight.data.mul_(2)
        assert not torch.equal(torch.func.functional_call(cell, weights, (x,)), before[2])


def test_modules_that_share_their_weights(packings: list[Any]) -> None:
    gru, cell = build("GRU", I, H), build("GRUCell", I, H)
    other = build("GRU", I, H, batch_first=True)
    for name, weight in gru.named_parameters():
        setattr(cell, name.removesuffix("_l0"), weight)
        setattr(other, name, weight)
    x = torch.randn(N, I)
    with torch.no_grad(), region():
        for _ in range(3):
            y, again, transposed = gru(x[None])[0][0], cell(x), other(x[:, None])[0][:, 0]
            torch.testing.assert_close(y, again)
            torch.testing.assert_close(y, transposed)
    assert len(packings) == 3 * wanted(cell)


def test_cells_of_two_activations_that_share_their_weights(packings: list[Any]) -> None:
    tanh, relu = build("RNNCell", I, H), build("RNNCell", I, H, nonlinearity="relu")
    for name, weight in tanh.named_parameters():
        setattr(relu, name, weight)
    x = torch.randn(N, I)
    with torch.no_grad(), region():
        for _ in range(3):
            torch.testing.assert_close(torch.tanh(relu(x)), tanh(x).relu(), rtol=0.02, atol=0.02)
    assert len(packings) == 2 * wanted(tanh)


@pytest.mark.parametrize("kind", ["RNN", "LSTM"])  # a GRU computes in float32, and casts nothing
@pytest.mark.parametrize("own", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
def test_a_region_casts_once_in_each_mode(
    kind: str, own: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    casts: list[Any] = []
    keep = kept_weights._keep

    def watched(weights: Any, mode: Any, made: Any) -> None:
        if isinstance(made, list):
            casts.append(mode)
        keep(weights, mode, made)

    monkeypatch.setattr(kept_weights, "_keep", watched)
    layer, x = build(kind, I, H, **own), torch.randn(1, N, I)
    with region():
        for _ in range(3):
            layer(x)
            with torch.no_grad():
                layer(x)
    assert casts == [(torch.bfloat16, True), (torch.bfloat16, False)]


def test_hooks_of_saved_tensors_see_those_of_the_cell_alone(packings: list[Any]) -> None:
    cell, x = build("GRUCell", I, H), torch.randn(N, I)
    seen: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        seen[-1] += 1
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), region():
        for _ in range(3):
            seen.append(0)
            cell(x)
    assert len(set(seen)) == 1
    assert packings == []


def test_threads_with_regions_of_their_own() -> None:
    """Each end of a region frees torch's casts, those of other threads as well."""
    cells = [build("GRUCell", I, H) for _ in range(3)]
    x = torch.randn(N, I)
    with torch.no_grad(), region():
        wanted = [cell(x) for cell in cells]
    wrong: list[Any] = []

    def serve(cell: nn.Module, result: Tensor) -> None:
        with torch.no_grad():
            for _ in range(30):
                with region():
                    wrong.extend(1 for _ in range(4) if not torch.equal(cell(x), result))

    workers = [threading.Thread(target=serve, args=(cells[i % 3], wanted[i % 3])) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert wrong == []
    assert not is_anything_kept()


def test_packed_weights_of_another_layer_are_refused() -> None:
    cell, x = build("GRUCell", I, H), torch.randn(N, I)
    weights = list(cell.parameters())
    wide = [torch.randn(3 * H, I + 1), *weights[1:]]
    kernel = kernel_of(cell, x)
    used, other = ("bfloat16", "own") if wanted(cell) else ("own", "bfloat16")
    for packed in (
        kernels.Frozen(kernel, I, 1, other, weights, ()),
        kernels.Frozen(kernel, I + 1, 1, used, wide, ()),
    ):
        with pytest.raises(kernels.RefusedError, match="the packed weights are of another layer"):
            kernel.forward(x, None, None, weights, None, packed_weights=packed)
