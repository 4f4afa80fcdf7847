"""Living with the rest of torch: weights of every kind, state_dicts, copies, convert and revert,
tracing, fallbacks.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from support import (
    CELLS,
    FORMS,
    LAYERS,
    WIDE_DTYPES,
    Halved,
    Leaves,
    assert_agree,
    assert_bitwise,
    build,
    build_form,
    check,
    evaluate,
    flatten,
    initial_states,
    leaves_for,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import rnnkern

Change = Callable[[nn.Module], object]
NAME = "weight_hh_l0"


def replace(module: nn.Module, name: str, parameter: Tensor) -> None:
    setattr(module, name, nn.Parameter(parameter))


def each_weight(of: Callable[[Tensor], Tensor]) -> Change:
    """Replaces every parameter by another, of the same values, in memory as `of` says."""

    def change(module: nn.Module) -> None:
        for name, parameter in list(module.named_parameters()):
            replace(module, name, of(parameter.detach()))

    return change


def with_gaps(weight: Tensor) -> Tensor:
    """Every other element of memory in each axis."""
    for axis in range(weight.dim()):
        weight = weight.repeat_interleave(2, axis)
    return weight[tuple(slice(None, None, 2) for _ in range(weight.dim()))]


def later_in_memory(weight: Tensor) -> Tensor:
    """A slice of rows and columns of something larger, starting at an odd element."""
    larger = torch.zeros([size + 3 for size in weight.shape], dtype=weight.dtype)
    part = larger[tuple(slice(1, 1 + size) for size in weight.shape)]
    return part.copy_(weight)


def constant(module: nn.Module) -> None:
    """Biases and a weight that are one number, expanded."""
    for name in ("bias_ih_l0", "bias_hh_l0", NAME):
        shape = getattr(module, name).shape
        replace(module, name, torch.tensor(0.125, dtype=dtype_of(module)).expand(shape))


def tied_layers(module: nn.Module) -> None:
    module.weight_hh_l1 = module.weight_hh_l0


def tied_biases(module: nn.Module) -> None:
    module.bias_hh_l0 = module.bias_ih_l0


def behind_the_attributes(module: nn.Module) -> None:
    """As functional_call and some optimizers do it, past __setattr__."""
    module._parameters[NAME] = nn.Parameter(module._parameters[NAME].detach() * 0.5)


def new_data(module: nn.Module) -> None:
    parameter = getattr(module, NAME)
    parameter.data = parameter.data.clone() * 0.5


def frozen(module: nn.Module) -> None:
    module.weight_ih_l0.requires_grad_(False)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


CHANGES: dict[str, Change] = {
    "transposed": each_weight(lambda w: w.t().contiguous().t()),
    "with-gaps": each_weight(with_gaps),
    "later-in-memory": each_weight(later_in_memory),
    "constant": constant,
    "tied-layers": tied_layers,
    "tied-biases": tied_biases,
    "behind-the-attributes": behind_the_attributes,
    "new-data": new_data,
    "weight-norm": lambda m: parametrizations.weight_norm(m, NAME),
    "weight-norm-of-the-input": lambda m: parametrizations.weight_norm(m, "weight_ih_l1"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, NAME),
    "own-parametrization": lambda m: parametrize.register_parametrization(m, NAME, Halved()),
    "bias-parametrization": lambda m: parametrize.register_parametrization(
        m, "bias_ih_l0", Halved()
    ),
    "pruned": lambda m: prune.l1_unstructured(m, NAME, amount=0.3),
    "frozen": frozen,
}


def check_changed(
    module: nn.Module, change: Change, leaves: Leaves, call: Callable[..., Any] = plain
) -> None:
    """Compares after `change`, and again after all parameters were halved in place."""
    theirs, wide = oracle.twin(module, torch.float32), oracle.twin(module, torch.float64)
    for each in (module, theirs, wide):
        change(each)
    for _ in range(2):
        assert_agree(*(evaluate(each, leaves, call) for each in (module, theirs, wide)))
        for each in (module, theirs, wide):
            with torch.no_grad():
                for parameter in each.parameters():
                    if not all(stride == 0 for stride in parameter.stride()):
                        parameter.mul_(0.5)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", LAYERS)
def test_weights_of_every_kind(kind: str, change: str) -> None:
    module = build(kind, 6, 6, num_layers=2)
    check_changed(module, CHANGES[change], leaves_for(module, 5, 3))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_the_old_weight_norm(kind: str) -> None:
    module = build(kind, 4, 6)
    check_changed(module, lambda m: nn.utils.weight_norm(m, NAME), leaves_for(module, 5, 3))


@pytest.mark.kernel
@pytest.mark.parametrize("layout", ["transposed", "with-gaps", "later-in-memory"])
@pytest.mark.parametrize("form", FORMS)
def test_weight_layouts(form: str, layout: str) -> None:
    module = build_form(form, 4, 17, bidirectional=True)
    check_changed(module, CHANGES[layout], leaves_for(module, 5, 3))


def make_raw(*names: str) -> Change:
    """Weight-drop: the weights become plain tensors, recomputed from raw parameters before every
    call.
    """

    def change(module: nn.Module) -> None:
        for name in names:
            weight = getattr(module, name)
            del module._parameters[name]
            module.register_parameter(f"{name}_raw", nn.Parameter(weight.detach()))
            setattr(module, name, weight.detach())

    return change


@pytest.mark.parametrize(
    "names", [(NAME,), (NAME, "weight_ih_l1", "bias_ih_l0")], ids=["recurrent", "several"]
)
@pytest.mark.parametrize("kind", LAYERS)
def test_weight_drop(kind: str, names: tuple[str, ...]) -> None:
    module = build(kind, 4, 6, num_layers=2)
    keep = {name: (torch.rand(getattr(module, name).shape) < 0.7).float() for name in names}

    def call(m: nn.Module, leaves: Leaves) -> Any:
        for name in names:
            raw = getattr(m, f"{name}_raw")
            setattr(m, name, raw * keep[name].to(raw.dtype))
        return plain(m, leaves)

    check_changed(module, make_raw(*names), leaves_for(module, 5, 3), call)


@pytest.mark.parametrize("kind", LAYERS)
def test_all_weights_are_views_of_one_tensor(kind: str) -> None:
    """As a hypernetwork or a flat optimizer has them."""
    module = build(kind, 4, 6)
    names = [name for name, _ in module.named_parameters()]
    shapes = [getattr(module, name).shape for name in names]

    def change(m: nn.Module) -> None:
        flat = torch.cat([getattr(m, name).detach().flatten() for name in names])
        for name in names:
            delattr(m, name)
        m.register_parameter("flat", nn.Parameter(flat))

    def call(m: nn.Module, leaves: Leaves) -> Any:
        parts = m.flat.split([shape.numel() for shape in shapes])
        for name, part, shape in zip(names, parts, shapes, strict=True):
            setattr(m, name, part.view(shape))
        return plain(m, leaves)

    check_changed(module, change, leaves_for(module, 5, 3), call)


@pytest.mark.parametrize("kind", LAYERS)
def test_changes_that_torch_does_not_count_are_seen(kind: str) -> None:
    """`parameter.data.copy_()` and a write through another library, as numpy, leave the version of
    the parameter as it was.
    """
    module = build(kind, 4, 6)
    leaves = leaves_for(module, 5, 3)
    with torch.no_grad():
        before = flatten(plain(module, leaves))["out.0"]
        module.weight_ih_l0.data.copy_(0.3 * torch.randn_like(module.weight_ih_l0))
        between = flatten(plain(module, leaves))["out.0"]
        torch.from_dlpack(module.weight_hh_l0.detach()).add_(0.1)
        after = flatten(plain(module, leaves))["out.0"]
    assert not torch.equal(between, before)
    assert not torch.equal(after, between)
    check(module, leaves)


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_shared_between_modules(kind: str) -> None:
    """Both modules' gradients arrive in the one parameter; the other parameters stay their own."""
    first, second = build(kind, 4, 6), build(kind, 4, 6)
    second.weight_hh_l0 = first.weight_hh_l0
    second.bias_ih_l0 = first.bias_ih_l0
    pair = nn.ModuleList([first, second])
    theirs, wide = (
        nn.ModuleList([oracle.twin(first, dtype), oracle.twin(second, dtype)])
        for dtype in WIDE_DTYPES
    )
    for modules in (theirs, wide):
        modules[1].weight_hh_l0 = modules[0].weight_hh_l0
        modules[1].bias_ih_l0 = modules[0].bias_ih_l0

    def call(m: nn.Module, leaves: Leaves) -> Any:
        return [plain(each, leaves) for each in m]

    leaves = leaves_for(first, 5, 3)
    assert_agree(*(evaluate(modules, leaves, call) for modules in (pair, theirs, wide)))


@pytest.mark.parametrize("kind", LAYERS)
def test_functional_call(kind: str) -> None:
    module = build(kind, 4, 6)
    weights = {name: 0.3 * torch.randn_like(p) for name, p in module.named_parameters()}
    before = {name: p.detach().clone() for name, p in module.named_parameters()}

    def call(m: nn.Module, leaves: Leaves) -> Any:
        given = {name: leaves[f"w.{name}"] for name in weights}
        return functional_call(m, given, (leaves["x"], states_of(leaves)))

    leaves = leaves_for(module, 5, 3) | {f"w.{name}": w for name, w in weights.items()}
    values = check(module, leaves, call)
    assert all(values[f"dw.{name}"].any() and not values[f"d{name}"].any() for name in weights)
    assert_bitwise({name: p.detach() for name, p in module.named_parameters()}, before)
    check(module, leaves_for(module, 5, 3))


def pairs() -> list[tuple[str, dict[str, Any]]]:
    options = {"num_layers": 2, "bidirectional": True}
    return [(kind, own | options) for kind, own in FORMS.values()] + [(kind, {}) for kind in CELLS]


def inputs_for(module: nn.Module) -> Leaves:
    if isinstance(module, nn.RNNBase):
        return leaves_for(module, 5, 3)
    return {"x": torch.randn(3, module.input_size)} | initial_states(module, 3)


@pytest.mark.parametrize(("kind", "options"), pairs(), ids=str)
def test_state_dicts_both_ways(kind: str, options: dict[str, Any]) -> None:
    ours, theirs = build(kind, 4, 6, **options), getattr(nn, kind)(4, 6, **options)
    leaves = inputs_for(ours)
    for source, target in ((theirs, ours), (ours, theirs)):
        for parameter in source.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_bitwise(dict(target.state_dict()), dict(source.state_dict()))
        assert_agree(
            *(evaluate(m, leaves) for m in (ours, theirs, oracle.twin(theirs, torch.float64)))
        )


@pytest.mark.parametrize("kind", LAYERS)
def test_state_dicts_that_do_not_fit(kind: str) -> None:
    for make in (getattr(rnnkern, kind), getattr(nn, kind)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            make(4, 6).load_state_dict(make(4, 7).state_dict())
        with pytest.raises(RuntimeError, match="Missing key"):
            make(4, 6, 2).load_state_dict(make(4, 6).state_dict())


@pytest.mark.parametrize("kind", LAYERS)
def test_load_state_dict_by_assignment(kind: str) -> None:
    module = build(kind, 4, 6)
    new = {name: 0.3 * torch.randn_like(w) for name, w in module.state_dict().items()}
    module.load_state_dict(new, assign=True)
    for name, value in new.items():
        assert getattr(module, name).data_ptr() == value.data_ptr()
    check(module, leaves_for(module, 5, 3))


def saved_and_loaded(module: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "save": saved_and_loaded,
}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize(("kind", "options"), pairs(), ids=str)
def test_a_copy_computes_the_same(kind: str, options: dict[str, Any], way: str) -> None:
    """A copy computes the same, is of the same class, and has parameters of its own."""
    module = build(kind, 4, 6, **options).eval()
    leaves = inputs_for(module)
    before = evaluate(module, leaves)
    other = COPIES[way](module)
    assert type(other) is type(module)
    assert not other.training
    assert_bitwise(evaluate(other, leaves), before)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1)
    assert_bitwise(evaluate(module, leaves), before)
    check(other, leaves)


def test_deepcopy_of_a_weight_drop() -> None:
    """A weight that is a plain tensor is copied too, and does not stay shared."""
    module = build("LSTM", 4, 6)
    make_raw(NAME)(module)
    leaves = leaves_for(module, 5, 3)
    before = evaluate(module, leaves)
    other = copy.deepcopy(module)
    assert_bitwise(evaluate(other, leaves), before)
    other.weight_hh_l0.add_(1)
    assert_bitwise(evaluate(module, leaves), before)
    assert not torch.equal(evaluate(other, leaves)["out.0"], before["out.0"])


@pytest.mark.parametrize("kind", LAYERS)
def test_weights_saved_and_loaded(kind: str) -> None:
    module, other = build(kind, 4, 6), getattr(nn, kind)(4, 6)
    buffer = io.BytesIO()
    torch.save(module.state_dict(), buffer)
    buffer.seek(0)
    other.load_state_dict(torch.load(buffer))
    assert_bitwise(dict(other.state_dict()), dict(module.state_dict()))


@pytest.mark.parametrize(("kind", "options"), pairs(), ids=str)
def test_to_dtype_and_back(kind: str, options: dict[str, Any]) -> None:
    module = build(kind, 4, 6, **options)
    leaves = inputs_for(module)
    for dtype in (torch.float64, torch.float32, torch.float64):
        module.to(dtype)
        values = check(module, leaves)
        assert {value.dtype for value in values.values()} == {dtype}


@pytest.mark.filterwarnings("ignore::rnnkern.FallbackWarning")
@pytest.mark.parametrize("kind", LAYERS)
def test_meta_device(kind: str, device: torch.device) -> None:
    """Built without memory, called for its shapes, then given memory in both usual ways."""
    source = build(kind, 4, 6)
    leaves = leaves_for(source, 5, 3)
    for assign in (True, False):
        module = getattr(rnnkern, kind)(4, 6, device="meta")
        y, _ = module(leaves["x"].to("meta"))
        assert y.device.type == "meta"
        assert y.shape == (5, 3, 6)
        if not assign:
            module.to_empty(device=device)
        module.load_state_dict(source.state_dict(), assign=assign)
        assert_bitwise(
            evaluate(module.requires_grad_(), leaves, backward=False),
            evaluate(source, leaves, backward=False),
        )
        check(module, leaves)


@pytest.mark.parametrize("kind", LAYERS)
def test_requires_grad_of_the_module(kind: str) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)
    module.requires_grad_(False)
    assert not module(x)[0].requires_grad
    module.bias_hh_l0.requires_grad_()
    module(x)[0].sum().backward()
    assert [name for name, p in module.named_parameters() if p.grad is not None] == ["bias_hh_l0"]


@pytest.mark.parametrize("kind", LAYERS)
def test_module_hooks(kind: str) -> None:
    module = build(kind, 4, 6)
    calls: list[str] = []
    module.register_forward_pre_hook(lambda m, args: (args[0] * 2, *args[1:]))
    module.register_forward_hook(lambda m, args, out: calls.append("forward"))
    module.register_full_backward_hook(lambda m, gin, gout: calls.append("backward"))
    x = torch.randn(5, 3, 4, requires_grad=True)
    y, _ = module(x)
    y.sum().backward()
    assert calls == ["forward", "backward"]
    expected, _ = oracle.twin(module)(x * 2)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("kind", LAYERS)
def test_training_follows_torch(kind: str) -> None:
    """Ten steps of an optimizer end where torch.nn ends."""
    ours = build(kind, 4, 6)
    theirs, wide = oracle.twin(ours), oracle.twin(ours, torch.float64)
    x, target = torch.randn(2, 5, 3, 4)
    for module in (ours, theirs, wide):
        optimizer = torch.optim.SGD(module.parameters(), 0.1, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            y, _ = module(x.to(dtype_of(module)))
            (y[..., :4] - target.to(y.dtype)).square().mean().backward()
            optimizer.step()
    assert_agree(*(dict(module.state_dict()) for module in (ours, theirs, wide)))


def test_no_weights_of_earlier_calls_are_kept() -> None:
    """Two modules of the same sizes, and one module with other weights, called in turn."""
    modules = [build("GRU", 4, 6) for _ in range(3)]
    x = torch.randn(5, 3, 4)
    alone = [module(x)[0].detach() for module in modules]
    for _ in range(3):
        for module, expected in zip(modules, alone, strict=True):
            assert torch.equal(module(x)[0].detach(), expected)


@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_profilers_see_the_kernels_by_name(kind: str) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(3, 4) if kind in CELLS else torch.randn(5, 3, 4)
    with torch.profiler.profile() as seen:
        sum(output.sum() for output in flatten(module(x)).values()).backward()
    name = "RNN_TANH" if kind.startswith("RNN") else kind.removesuffix("Cell")
    counts = {event.key: event.count for event in seen.key_averages()}
    assert counts[f"rnnkern::{name}"] == 1
    assert counts[f"rnnkern::{name} backward"] >= 1  # once more where gradients have gaps
    assert ("ScanOfCellBackward" if kind in CELLS else "ScanBackward") in counts
