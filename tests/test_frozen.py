"""`rnnkern.freeze`, `thaw` and `step`: the same results, and nothing of the original."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import int8_reference
import pytest
import torch
from support import (
    CELLS,
    DTYPES,
    FORMS,
    LAYERS,
    Seen,
    assert_bitwise,
    build,
    build_form,
    compiled,
    flatten,
    initial_states,
    leaves_for,
    on_threads,
    pack_rows,
    plain,
    states_of,
)
from torch import Tensor, nn
from torch.autograd import forward_ad

import rnnkern
from rnnkern import kernels, tolerance
from rnnkern.frozen import FrozenCell, FrozenLayer, quantized

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(kernels.IS_STAND_IN, reason="a stand-in for GPUs"),
]

KEPT = (None, torch.bfloat16, torch.int8)

WAYS: dict[str, tuple[dict[str, Any], Callable[[nn.Module, dict[str, Tensor]], Any]]] = {
    "plain": ({}, plain),
    "no state": ({}, lambda m, own: m(own["x"])),
    "two threads": ({}, on_threads(plain, 2)),
    "stack": ({"num_layers": 3, "bidirectional": True}, plain),
    "batch first": ({"batch_first": True, "bias": False}, plain),
    "lengths": (
        {"num_layers": 2},
        lambda m, own: m(own["x"], states_of(own), lengths=torch.tensor([4, 6, 0])),
    ),
    "reset": (
        {"bidirectional": True},
        lambda m, own: m(own["x"], reset=torch.arange(18).view(6, 3) % 5 == 3),
    ),
    "packed": (
        {"bidirectional": True},
        lambda m, own: m(
            pack_rows([own["x"][:n, i] for i, n in enumerate((2, 6, 1))], enforce_sorted=False)
        ),
    ),
    "one row": ({}, lambda m, own: m(own["x"][:, 0])),
    "gaps": ({}, lambda m, own: m(own["x"].repeat_interleave(2, -1)[..., ::2])),
}


def results(module: nn.Module, leaves: dict[str, Tensor], call: Any, dtype: torch.dtype) -> Any:
    own = {name: leaf.to(dtype) for name, leaf in leaves.items()}
    with torch.no_grad():
        return flatten(call(module, own))


def deterministic_results(*arguments: Any) -> Any:
    torch.set_deterministic_debug_mode("error")
    try:
        return results(*arguments)
    finally:
        torch.set_deterministic_debug_mode("default")


@pytest.mark.kernel
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", FORMS)
def test_results_are_those_of_deterministic_mode_to_the_bit(form: str, way: str) -> None:
    options, call = WAYS[way]
    for dtype in DTYPES:
        for H in (5, 70):
            module = build_form(form, 9, H, dtype=dtype, **options)
            leaves = leaves_for(module, 6, 3)
            frozen = rnnkern.freeze(module)
            assert isinstance(frozen, FrozenLayer)
            wanted = deterministic_results(module, leaves, call, dtype)
            assert_bitwise(results(frozen, leaves, call, dtype), wanted)


@pytest.mark.kernel
@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_so_are_those_of_cells(kind: str, dtype: torch.dtype) -> None:
    for rows in (4, None):
        for bias in (True, False):
            module = build(kind, 9, 21, dtype=dtype, bias=bias)
            leaves = initial_states(module, rows)
            leaves["x"] = torch.randn(9) if rows is None else torch.randn(rows, 9)
            frozen = rnnkern.freeze(module)
            assert isinstance(frozen, FrozenCell)
            for call in (plain, lambda m, own: m(own["x"])):
                wanted = deterministic_results(module, leaves, call, dtype)
                assert_bitwise(results(frozen, leaves, call, dtype), wanted)


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
def test_bfloat16_weights_are_those_of_autocast(form: str) -> None:
    """If the CPU multiplies bfloat16. Otherwise they are rounded and multiplied as float32."""
    module = build_form(form, 11, 37)
    frozen = rnnkern.freeze(module, torch.bfloat16)
    leaves = leaves_for(module, 5, 3)
    got = results(frozen, leaves, plain, torch.float32)
    rounded = rnnkern.thaw(frozen)
    for name, weight in module.named_parameters():
        wanted = weight.bfloat16().float() if name.startswith("weight") else weight
        assert torch.equal(getattr(rounded, name), wanted)
    kernel = kernels.kernel(rounded.mode, 1, 37, rounded.proj_size, True, False, by_bfloat16=True)
    torch.set_deterministic_debug_mode("error")
    weights = [w.detach() for w in rounded._flat_weights]
    made, *_ = kernel.forward(leaves["x"], leaves["h0"], leaves.get("c0"), weights, None)
    wanted = made if len(made) == 2 else (made[0], made[1:])
    assert_bitwise(got, flatten(wanted))


@pytest.mark.kernel
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("I", "H", "N"), [(1, 3, 1), (9, 33, 7), (70, 64, 2), (5, 150, 13)])
def test_int8_weights_are_multiplied_as_integers(form: str, I: int, H: int, N: int) -> None:
    module = build_form(form, I, max(H, 4))
    frozen = rnnkern.freeze(module, torch.int8)
    for ours, theirs, reference in int8_reference.worst(module, frozen, 3, N):
        verdict = tolerance.check(ours, theirs, reference)
        assert verdict, str(verdict)


@pytest.mark.kernel
def test_the_largest_sums_of_integers_are_exact() -> None:
    """127 * 127 and its negative, of more columns than a block of floats has."""
    I = 5003
    module = build("RNN", I, 18, nonlinearity="relu", bias=False)
    with torch.no_grad():
        module.weight_hh_l0.zero_()
        module.weight_ih_l0.fill_(127.0)
        module.weight_ih_l0[1::2] = -127.0
    frozen = rnnkern.freeze(module, torch.int8)
    for sign in (1.0, -1.0):
        y, _ = frozen(torch.full((1, 2, I), sign * 127.0))
        wanted = torch.zeros(18)
        wanted[0 if sign > 0 else 1 :: 2] = 127.0 * 127 * I
        assert torch.equal(y[0, 0], wanted)
        assert torch.equal(y[0, 1], wanted)


@pytest.mark.parametrize("weights", KEPT, ids=str)
def test_results_depend_neither_on_threads_nor_on_other_rows(weights: torch.dtype | None) -> None:
    for kind in LAYERS:
        frozen = rnnkern.freeze(build(kind, 40, 300), weights)
        x = torch.randn(8, 17, 40)
        (alone, _), found = frozen(x[:, 4:5]), []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(frozen(x)[0])
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])
        assert torch.equal(found[0][:, 4:5], alone)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_int8_passes_on_what_is_no_number(number: float) -> None:
    frozen = rnnkern.freeze(build("LSTM", 20, 30), torch.int8)
    x = torch.randn(4, 3, 20)
    wanted = frozen(x)[0]
    x[2, 1, 17] = number
    got = frozen(x)[0]
    assert got[2:, 1].isnan().all()
    assert torch.equal(got[:2], wanted[:2])
    assert torch.equal(got[:, ::2], wanted[:, ::2])


def test_int8_of_zeros_and_of_small_numbers() -> None:
    module = build("RNN", 6, 8, bias=False)
    with torch.no_grad():
        module.weight_ih_l0[0] = 0
    frozen = rnnkern.freeze(module, torch.int8)
    assert torch.equal(frozen(torch.zeros(2, 1, 6))[0], torch.zeros(2, 1, 8))
    for small in (1e-20, 1e-35, 1e-42):
        assert frozen(torch.full((1, 1, 6), small))[0].abs().max() < 1e-18
    assert frozen(torch.ones(1, 1, 6))[0][0, 0, 0] == 0


def test_plans_of_frozen_layers_are_packed() -> None:
    own = {"T": 1, "N": 1, "I": 64, "total": 1, "deterministic": False, "backward": False}
    kernel = kernels.kernel("LSTM", 1, 256, 0, True, False)
    machine = kernels.machine(kernel, 1, torch.zeros(1))
    plan, text = kernels.plan(kernel, machine, **own, frozen=True)
    assert (plan.input, plan.recurrent) == ("packed", "packed")
    assert "W_hh packed before" in text
    plan, _ = kernels.plan(kernel, machine, **own)
    assert (plan.input, plan.recurrent) == ("dots", "dots")


# Models


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.GRU(6, 10, num_layers=2, dropout=0.5)
        self.cells = nn.ModuleList([rnnkern.LSTMCell(10, 12)])
        self.same = self.encoder
        self.head = nn.Linear(12, 3)
        self.outside = [self.encoder]

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.outside[0](x)
        return self.head(self.cells[0](y[-1])[0])


def test_every_recurrent_module_of_a_model_is_replaced() -> None:
    model = Model()
    before = {name: type(module) for name, module in model.named_modules()}
    frozen = rnnkern.freeze(model)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert isinstance(frozen.encoder, FrozenLayer)
    assert isinstance(frozen.cells[0], FrozenCell)
    assert frozen.same is frozen.encoder
    assert frozen.outside[0] is frozen.encoder
    assert [name for name, _ in frozen.named_parameters()] == ["head.weight", "head.bias"]
    x = torch.randn(4, 2, 6)
    torch.set_deterministic_debug_mode("error")
    with torch.no_grad():
        wanted = rnnkern.convert(copy.deepcopy(model)).eval()(x)
        assert torch.equal(frozen(x), wanted)
        model.encoder.weight_hh_l0.zero_()
        model.head.weight.zero_()
        assert torch.equal(frozen(x), wanted)


@pytest.mark.parametrize("form", [*FORMS, *CELLS])
def test_thaw_gives_the_trainable_module_back(form: str) -> None:
    kind, own = FORMS.get(form, (form, {}))
    options = {} if kind in CELLS else {"num_layers": 2, "bidirectional": True}
    theirs = getattr(nn, kind)(7, 19, **own, **options)
    for module in (theirs, rnnkern.convert(copy.deepcopy(theirs)), theirs.double()):
        next(module.parameters()).requires_grad_(False)
        thawed = rnnkern.thaw(rnnkern.freeze(module))
        assert type(thawed) is type(module)
        assert thawed.training == module.training
        assert thawed.state_dict().keys() == module.state_dict().keys()
        for (name, ours), given in zip(thawed.named_parameters(), module.parameters(), strict=True):
            assert torch.equal(ours, given), name
            assert ours.requires_grad == given.requires_grad
            assert ours.data_ptr() != given.data_ptr()
        x = torch.randn(5, 7) if kind in CELLS else torch.randn(5, 3, 7)
        x = x.to(next(module.parameters()).dtype)
        sum(o.sum() for o in flatten(thawed(x)).values()).backward()
        assert all((p.grad is not None) == p.requires_grad for p in thawed.parameters())


def test_thaw_of_fewer_bits_gives_what_is_left() -> None:
    module = build("GRU", 30, 40)
    thawed = rnnkern.thaw(rnnkern.freeze(module, torch.int8))
    for name, weight in module.named_parameters():
        error = (getattr(thawed, name) - weight).abs()
        if name.startswith("bias"):
            assert error.max() == 0
        else:
            assert (error <= weight.abs().amax(1, keepdim=True) / 127 * 0.501).all()
    again = rnnkern.thaw(rnnkern.freeze(thawed, torch.int8))
    for ours, given in zip(again.parameters(), thawed.parameters(), strict=True):
        torch.testing.assert_close(ours, given)


def test_quantized_rows_reach_from_end_to_end() -> None:
    integers, scale = quantized(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
    assert integers.tolist() == [[64, -127, 32], [0, 0, 0]]
    assert torch.equal(scale, torch.tensor([2 / 127, 0]))


class OwnForward(rnnkern.LSTM):
    def forward(self, input: Tensor, hx: Any = None) -> Any:
        return super().forward(2 * input, hx)


class Inherits(nn.LSTM):
    pass


def test_a_class_with_a_forward_of_its_own_is_left_alone() -> None:
    model = nn.ModuleList([OwnForward(3, 4), Inherits(3, 4)])
    with pytest.warns(UserWarning, match=r"rnnkern.freeze leaves .*OwnForward \(0\)"):
        frozen = rnnkern.freeze(model)
    assert type(frozen[0]) is OwnForward
    assert frozen[0] is not model[0]
    assert isinstance(frozen[1], FrozenLayer)
    assert type(rnnkern.thaw(frozen)[1]) is Inherits


def test_parametrized_weights_are_frozen_as_they_are() -> None:
    module = nn.LSTM(4, 5)
    nn.utils.parametrizations.weight_norm(module, "weight_hh_l0")
    x = torch.randn(3, 2, 4)
    wanted = module(x)[0].detach()
    frozen = rnnkern.freeze(module)
    torch.testing.assert_close(frozen(x)[0], wanted)
    torch.testing.assert_close(rnnkern.thaw(frozen)(x)[0], wanted)
    assert nn.utils.parametrize.is_parametrized(module)


def test_hooks_are_kept() -> None:
    module = build("GRU", 4, 5)
    seen = []
    module.register_forward_hook(lambda m, args, out: seen.append(type(m)))
    rnnkern.freeze(module)(torch.randn(2, 1, 4))
    assert seen == [FrozenLayer]


@pytest.mark.parametrize("weights", KEPT, ids=str)
def test_copies_and_files(weights: torch.dtype | None) -> None:
    model = nn.ModuleList([build("LSTM", 5, 9, num_layers=2, proj_size=3), build("GRUCell", 5, 9)])
    frozen = rnnkern.freeze(model, weights)
    x = torch.randn(4, 2, 5)

    def outputs(model: Any) -> dict[str, Tensor]:
        return flatten((model[0](x), model[1](x[0])))

    wanted = outputs(frozen)
    file = io.BytesIO()
    torch.save(frozen, file)
    file.seek(0)
    others = [
        copy.deepcopy(frozen),
        pickle.loads(pickle.dumps(frozen)),
        torch.load(file, weights_only=False),
        nn.ModuleList([copy.copy(module) for module in frozen]),
    ]
    for other in others:
        assert_bitwise(outputs(other), wanted)
        assert repr(other) == repr(frozen)


@pytest.mark.parametrize("weights", KEPT, ids=str)
def test_state_dict(weights: torch.dtype | None) -> None:
    def make() -> nn.ModuleDict:
        return nn.ModuleDict(
            {"rnn": build("GRU", 5, 9, num_layers=2), "cell": build("RNNCell", 5, 9)}
        )

    first, second = rnnkern.freeze(make(), weights), rnnkern.freeze(make(), weights)
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert all(key.partition(".")[2].startswith("frozen_") for key in state)
    kept = {None: torch.float32}.get(weights, weights)
    assert state["rnn.frozen_weight_hh_l1"].dtype == kept
    assert ("cell.frozen_scale_weight_ih" in state) == (weights == torch.int8)
    x = torch.randn(3, 2, 5)
    assert not torch.equal(second["rnn"](x)[0], first["rnn"](x)[0])
    other = copy.deepcopy(second)
    before = other["rnn"](x)[0]
    assert second.load_state_dict(state).missing_keys == []
    assert torch.equal(second["rnn"](x)[0], first["rnn"](x)[0])
    assert torch.equal(second["cell"](x[0]), first["cell"](x[0]))
    assert torch.equal(other["rnn"](x)[0], before)
    for tensor in second.state_dict().values():  # copies, of which nobody sees an edit
        tensor.zero_()
    for name, tensor in second.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    with pytest.raises(RuntimeError, match=r"(?s)Missing key.*Unexpected key"):
        second.load_state_dict(make().state_dict())
    wrong = state | {"cell.frozen_weight_ih": torch.zeros(2, 2)}
    with pytest.raises(RuntimeError, match=r"cell.frozen_weight_ih must be .* of shape \(9, 5\)"):
        second.load_state_dict(wrong)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_memory(kind: str) -> None:
    """Of sizes that fill panels on every CPU: matrices, packed biases, biases; for int8 scales."""
    I, H = 128, 64
    gates, slots = {"LSTM": (4, 4), "GRU": (3, 4), "RNN": (1, 1)}[kind]
    module = build(kind, I, H)
    matrix, biases = gates * H * (I + H), (slots + 2 * gates) * H * 4
    # Two rows before each packed matrix, and the scales themselves.
    scales = 2 * (2 * gates * H * 4) + 2 * gates * H * 4
    assert rnnkern.freeze(module).nbytes == 4 * matrix + biases
    assert rnnkern.freeze(module, torch.bfloat16).nbytes == 2 * matrix + biases
    assert rnnkern.freeze(module, torch.int8).nbytes == matrix + biases + scales


def test_the_original_is_not_kept() -> None:
    import weakref

    module = build("LSTM", 5, 6)
    gone = [weakref.ref(module), *(weakref.ref(p) for p in module.parameters())]
    frozen = rnnkern.freeze(module)
    del module
    import gc

    gc.collect()
    assert [ref() for ref in gone] == [None] * len(gone)
    frozen(torch.randn(2, 1, 5))


# What torch has around a module


@pytest.mark.parametrize("weights", KEPT, ids=str)
def test_compiled(weights: torch.dtype | None) -> None:
    model = rnnkern.freeze(
        nn.ModuleList(
            [build("LSTM", 5, 9, num_layers=2, batch_first=True), build("GRUCell", 9, 4)]
        ),
        weights,
    )
    other = rnnkern.freeze(
        nn.ModuleList(
            [build("LSTM", 5, 9, num_layers=2, batch_first=True), build("GRUCell", 9, 4)]
        ),
        weights,
    )

    def run(model: Any, x: Tensor, lengths: Tensor) -> Any:
        y, state = model[0](x, lengths=lengths)
        z, (h, c) = model[0](x, state)
        return y, z, h, c, model[1](z[:, -1])

    program = compiled(run)
    with torch.no_grad():
        for N in (2, 3):
            x, lengths = torch.randn(N, 4, 5), torch.tensor([4, 1, 2][:N])
            for each in (model, other):
                assert_bitwise(flatten(program(each, x, lengths)), flatten(run(each, x, lengths)))


def test_dispatch_modes_see_one_operator() -> None:
    frozen = rnnkern.freeze(build("GRU", 5, 9))
    x = torch.randn(3, 2, 5)
    wanted = frozen(x)
    with Seen() as seen:
        got = frozen(x)
    assert seen.names == ["frozen_kernel"]
    assert_bitwise(flatten(got), flatten(wanted))


def test_autocast_and_profilers_change_nothing() -> None:
    frozen = rnnkern.freeze(build("LSTM", 5, 9))
    x = torch.randn(3, 2, 5).bfloat16()
    wanted = flatten(frozen(x.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert_bitwise(flatten(frozen(x)), wanted)
        assert_bitwise(flatten(frozen(x.float())), wanted)
    with torch.profiler.profile() as profile:
        assert_bitwise(flatten(frozen(x.float())), wanted)
    assert "rnnkern::LSTM frozen" in {event.name for event in profile.events()}


def test_a_call_that_would_record_a_gradient_raises() -> None:
    layer, cell = rnnkern.freeze(build("LSTM", 3, 4)), rnnkern.freeze(build("GRUCell", 3, 4))
    x = torch.randn(2, 1, 3, requires_grad=True)
    h, c = torch.zeros(1, 1, 4, requires_grad=True), torch.zeros(1, 1, 4)
    for call in (
        lambda: layer(x),
        lambda: layer(x, lengths=torch.tensor([2])),
        lambda: layer(x.detach(), (h, c)),
        lambda: layer.step(x[0], (c, c.clone())),
        lambda: cell(x[0]),
        lambda: compiled(layer)(x),
    ):
        with pytest.raises(RuntimeError, match=r"records no gradient.*thaw"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_forward_mode_raises_instead_of_losing_the_tangent(kind: str) -> None:
    module = rnnkern.freeze(build(kind, 3, 4))
    x = torch.randn(2, 1, 3) if kind == "LSTM" else torch.randn(2, 3)
    h = torch.zeros(1, 1, 4) if kind == "LSTM" else torch.zeros(2, 4)
    hx = (h, h) if kind == "LSTM" else h

    def of_state(h: Tensor) -> Any:
        return flatten(module(x, (h, h) if kind == "LSTM" else h))

    for call in (
        lambda: torch.func.jvp(lambda z: flatten(module(z)), (x,), (x,)),
        lambda: torch.func.jacfwd(lambda z: flatten(module(z)))(x),
        lambda: torch.func.jvp(of_state, (h,), (h,)),
    ):
        for mode in (torch.no_grad, torch.enable_grad):
            with mode(), pytest.raises(RuntimeError, match=r"no forward-mode derivative.*thaw"):
                call()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=r"no forward-mode derivative.*thaw"):
            module(dual)
        plain = flatten(module(x, hx))  # what has no tangent runs
    assert_bitwise(plain, flatten(module(x, hx)))


@pytest.mark.parametrize("weights", KEPT, ids=str)
def test_vmap(weights: torch.dtype | None) -> None:
    layer = rnnkern.freeze(build("LSTM", 3, 4, num_layers=2), weights)
    cell = rnnkern.freeze(build("GRUCell", 3, 4), weights)
    x, c = torch.randn(5, 2, 6, 3), torch.randn(2, 1, 6, 4)
    lengths = torch.tensor([5, 1, 0, 2, 5, 3])

    def run(x: Tensor, c: Tensor) -> Any:
        y, state = layer(x, (torch.zeros(2, 6, 4), c.expand(2, 6, 4)), lengths=lengths)
        return flatten((y, *state, cell(x[0], c[0])))

    made = torch.func.vmap(run, in_dims=(1, 0))(x, c)
    for b in range(2):
        assert_bitwise({k: z[b] for k, z in made.items()}, run(x[:, b], c[b]))


def test_vmap_of_an_input_that_requires_a_gradient() -> None:
    frozen = rnnkern.freeze(build("GRU", 2, 3))
    x = torch.randn(6, 4, 5, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="a frozen module records no gradient"):
        torch.func.vmap(lambda x: frozen(x)[0])(x)
    with torch.no_grad():
        torch.func.vmap(lambda x: frozen(x)[0])(x)


@pytest.mark.cpu_only
def test_vmap_of_no_sample() -> None:
    frozen = rnnkern.freeze(rnnkern.GRU(2, 3))
    made = torch.func.vmap(lambda x: frozen(x)[0])(torch.randn(0, 4, 5, 2))
    assert made.shape == (0, 4, 5, 3)


def test_wrong_calls_name_what_is_wrong() -> None:
    layer, cell = rnnkern.freeze(build("LSTM", 3, 4)), rnnkern.freeze(build("GRUCell", 3, 4))
    x, state = torch.randn(2, 5, 3), (torch.zeros(1, 5, 4), torch.zeros(1, 5, 4))
    for call, error, words in (
        (lambda: layer(torch.randn(2, 5, 4)), ValueError, "3 features, got 4"),
        (lambda: layer(x, state[0]), ValueError, r"hx must be \(h_0, c_0\)"),
        (lambda: layer(x, (state[0][:, :2], state[1])), ValueError, "of shapes"),
        (lambda: layer(x.double()), ValueError, "in torch.float32, got input of torch.float64"),
        (lambda: layer(x, (state[0], state[1].half())), ValueError, "got c_0 of torch.float16"),
        (lambda: layer([1]), TypeError, "got list"),
        (lambda: layer(x[:0]), ValueError, "no steps"),
        (lambda: layer(x, lengths=torch.tensor([9] * 5)), ValueError, "between 0 and"),
        (lambda: cell(torch.randn(2, 4)), ValueError, "input of shape"),
        (lambda: cell(x[0], state), ValueError, "hx of type tuple"),
        (lambda: layer.to(torch.complex64), RuntimeError, "cannot become torch.complex64"),
        (lambda: layer.to("meta"), RuntimeError, "cannot become torch.float32 on meta: thaw"),
        (lambda: torch.jit.trace(layer, (x,)), NotImplementedError, "exported or traced"),
        (lambda: torch.export.export(layer, (x,)), Exception, "exported or traced"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert layer.to("cpu").float() is layer


def test_a_step_of_another_dtype_refuses_states_that_share_memory() -> None:
    frozen = rnnkern.freeze(build("LSTM", 3, 4), torch.int8).half()
    x, memory = torch.randn(2, 3).half(), torch.zeros(1, 2, 8).half()
    h, c = memory[..., :4], memory[..., 4:]  # rows that alternate in memory
    with torch.no_grad():
        frozen.step(x, (h, c))
        wanted = memory.clone()
        for wrong in ((h, h), (h, memory[..., 2:6]), (h, c[:, :1].expand(1, 2, 4))):
            with pytest.raises(RuntimeError, match=r"share no memory|overlap"):
                frozen.step(x, wrong)
        assert torch.equal(memory, wanted)
    with torch.inference_mode():
        made = torch.zeros(1, 2, 4).half(), torch.zeros(1, 2, 4).half()
    with torch.no_grad():
        frozen.step(x, made)
    assert made[0].abs().max() > 0


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "LSTMCell", "RNNCell"])
@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.int8])
def test_a_model_goes_to_another_dtype(kind: str, weights: torch.dtype | None) -> None:
    """``model.half()`` and others change all of it, and it runs: weights of the model's own dtype
    become what freezing the changed model gives, and others stay.
    """
    model = nn.Sequential(nn.Linear(3, 3), build(kind, 3, 4), nn.Identity())
    frozen = rnnkern.freeze(model, weights)
    layer, x = frozen[1], torch.randn(2, 5, 3)[0 if "Cell" in kind else ...]
    expected = first_of(layer(x))
    numbers = layer.thawed().state_dict()
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float32):
        frozen.to(dtype)
        assert {p.dtype for p in frozen.parameters()} == {layer.dtype} == {dtype}
        assert layer.weights == (weights or dtype)
        with torch.no_grad():
            assert first_of(frozen(x.to(dtype))).dtype == dtype
        made = layer(x.to(dtype))
        assert {t.dtype for t in tensors_of(made)} == {dtype}
        torch.testing.assert_close(first_of(made).float(), expected, atol=0.02, rtol=0.02)
        state = made if "Cell" in kind else made[1]
        state = tuple(t.clone() for t in state) if isinstance(state, tuple) else state.clone()
        frame = x.to(dtype) if "Cell" in kind else x[0].to(dtype)
        wanted = layer(frame if "Cell" in kind else frame[None], state)
        y = layer.step(frame, state)
        torch.testing.assert_close(y, first_of(wanted).reshape(y.shape))
        torch.testing.assert_close(tensors_of(state), tensors_of(wanted)[-len(tensors_of(state)) :])
        loaded = rnnkern.freeze(model.float(), weights).to(dtype)
        loaded.load_state_dict(frozen.state_dict())
        for copied in (loaded[1], copy.deepcopy(frozen)[1], pickle.loads(pickle.dumps(frozen))[1]):
            assert torch.equal(first_of(copied(x.to(dtype))), first_of(made))
        if dtype == torch.float16 and weights is None:
            alone = rnnkern.freeze(model[1].to(dtype))
            assert torch.equal(first_of(alone(x.to(dtype))), first_of(made))
            model.float()
        with pytest.raises(ValueError, match=f"computes in {dtype}, got"):
            layer(x.double())
    if weights == torch.int8:
        thawed = layer.float().thawed().state_dict()
        assert all(torch.equal(thawed[name], number) for name, number in numbers.items())


def tensors_of(made: Any) -> list[Tensor]:
    return [made] if isinstance(made, Tensor) else [t for z in made for t in tensors_of(z)]


def first_of(made: Any) -> Tensor:
    return tensors_of(made)[0]


def test_wrong_models_and_weights() -> None:
    hooked = nn.LSTM(3, 4)
    torch.nn.utils.weight_norm(hooked, "weight_hh_l0")
    broken = nn.LSTM(3, 4)
    with torch.no_grad():
        broken.weight_ih_l0[0, 0] = float("nan")
    for call, error, words in (
        (lambda: rnnkern.freeze("model"), TypeError, "must be a torch.nn.Module, got str"),
        (lambda: rnnkern.thaw(None), TypeError, "must be a torch.nn.Module"),
        (lambda: rnnkern.freeze(nn.LSTM(3, 4), torch.float16), ValueError, "got torch.float16"),
        (lambda: rnnkern.freeze(nn.LSTM(3, 4), "int8"), ValueError, "got int8"),
        (
            lambda: rnnkern.freeze(nn.LSTM(3, 4).double(), torch.int8),
            ValueError,
            "got torch.float64",
        ),
        (lambda: rnnkern.freeze(nn.Sequential(nn.LSTM(3, 4, device="meta"))), ValueError, r"\(0\)"),
        (lambda: rnnkern.freeze(nn.LSTM(3, 4, dtype=torch.complex64)), ValueError, "complex64"),
        (lambda: rnnkern.freeze(hooked), ValueError, "a hook computes weight_hh_l0"),
        (lambda: rnnkern.freeze(broken, torch.int8), ValueError, "finite"),
        (lambda: rnnkern.freeze(nn.RNN(132105, 1), torch.int8), ValueError, "at most 132104 col"),
    ):
        with pytest.raises(error, match=words):
            call()


@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kind", LAYERS)
def test_lazily_negated_operands(kind: str, weights: torch.dtype | None) -> None:
    frozen = rnnkern.freeze(build(kind, 4, 6), weights)
    x = torch.complex(torch.zeros(5, 3, 4), torch.randn(5, 3, 4))
    h = torch.randn(1, 3, 6)
    negated = torch._neg_view(-h)
    states = ((negated, h), (h, h)) if kind == "LSTM" else (negated, h)
    for own, same in (states, (None, None)):
        options = {} if own is not None else {"lengths": torch.tensor([4, 0, 2])}
        found, wanted = frozen(x.conj().imag, own, **options), frozen(-x.imag, same, **options)
        assert_bitwise(flatten(found), flatten(wanted))


@pytest.mark.parametrize("weights", [None, torch.int8])
def test_another_default_device(weights: torch.dtype | None) -> None:
    frozen = rnnkern.freeze(build("LSTM", 3, 4), weights)
    wanted = dict(frozen.state_dict())
    with torch.device("meta"):
        assert_bitwise(dict(frozen.state_dict()), wanted)
        assert_bitwise(dict(copy.deepcopy(frozen).state_dict()), wanted)
        assert next(rnnkern.thaw(frozen).parameters()).device.type == "cpu"
        frozen.float()


# One step of a stream


def stepped(module: nn.Module, x: Tensor, state: Any) -> Tensor:
    return torch.stack([module.step(frame, state) for frame in x])


@pytest.mark.kernel
@pytest.mark.parametrize("weights", KEPT, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_steps_are_a_sequence(form: str, weights: torch.dtype | None) -> None:
    for N, layers, batch_first in ((3, 1, False), (3, 3, True), (1, 2, False), (None, 2, False)):
        module = build_form(form, 6, 35, num_layers=layers)
        frozen = rnnkern.freeze(module, weights)
        leaves = leaves_for(module, 5, N)
        wanted = flatten(plain(frozen, leaves))
        frozen = rnnkern.freeze(
            build_form(form, 6, 35, num_layers=layers, batch_first=batch_first), weights
        )
        frozen.load_state_dict(rnnkern.freeze(module, weights).state_dict())
        state = states_of(leaves)
        places = [t.data_ptr() for t in flatten(state).values()]
        torch.set_num_threads(2)
        y = stepped(frozen, leaves["x"], state)
        assert [t.data_ptr() for t in flatten(state).values()] == places
        assert_bitwise(flatten((y, state)), wanted)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", CELLS)
def test_so_are_steps_of_cells(kind: str, dtype: torch.dtype) -> None:
    for N in (3, None):
        module = build(kind, 6, 35, dtype=dtype)
        frozen = rnnkern.freeze(module)
        leaves = {k: v.to(dtype) for k, v in initial_states(module, N).items()}
        state, other = states_of(leaves), states_of({k: v.clone() for k, v in leaves.items()})
        for _ in range(3):
            x = (torch.randn(6) if N is None else torch.randn(N, 6)).to(dtype)
            other = frozen(x, other)
            output = frozen.step(x, state)
            assert_bitwise(flatten(state), flatten(other))
            h = state[0] if isinstance(state, tuple) else state
            assert torch.equal(output, h)
            assert output.data_ptr() != h.data_ptr()


def test_large_steps_on_threads_that_share_the_units() -> None:
    for kind in LAYERS:
        frozen = rnnkern.freeze(build(kind, 256, 512))
        x, found = torch.randn(40, 2, 256), []
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            state = [torch.zeros(1, 2, 512) for _ in range(1 + (kind == "LSTM"))]
            found.append(stepped(frozen, x, tuple(state) if len(state) > 1 else state[0]))
        assert torch.equal(found[0], found[1])
        assert torch.equal(found[0], found[2])


def test_states_of_any_layout_are_written() -> None:
    frozen = rnnkern.freeze(build("LSTM", 4, 5, num_layers=2))
    x = torch.randn(3, 4)
    dense = (torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    wanted = frozen.step(x, dense)
    both = torch.zeros(3, 2, 2, 6)[..., :5]  # [N, layers, h and c, H]
    state = (both[:, :, 0].transpose(0, 1), both[:, :, 1].transpose(0, 1))
    assert torch.equal(frozen.step(x, list(state)), wanted)
    assert_bitwise(flatten(state), flatten(dense))


def test_autograd_notices_that_a_step_edits_its_state() -> None:
    frozen, state = rnnkern.freeze(build("GRU", 4, 5)), torch.zeros(1, 3, 5)
    weight = torch.ones(5, requires_grad=True)
    product = weight * state
    frozen.step(torch.randn(3, 4), state)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        frozen.step(torch.randn(3, 4), torch.zeros(1, 3, 5))


def test_a_step_allocates_its_output_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size whose output torch allocates; a small one is handed to torch with its memory."""
    N, H = 16, 512
    for kind in LAYERS:
        frozen = rnnkern.freeze(build(kind, 64, H, num_layers=2))
        x = torch.randn(N, 64)
        states = tuple(torch.zeros(2, N, H) for _ in range(1 + (kind == "LSTM")))
        state = states if kind == "LSTM" else states[0]
        frozen.step(x, state)
        with torch.profiler.profile(profile_memory=True) as profile:
            monkeypatch.setattr(torch.autograd.profiler, "_is_profiler_enabled", False)
            outputs = [frozen.step(x, state) for _ in range(3)]
            monkeypatch.undo()
        events = profile.profiler.kineto_results.events()
        allocated = [e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0]
        assert allocated == [N * H * 4] * len(outputs)


def test_wrong_steps_name_what_is_wrong() -> None:
    layer, both = (
        rnnkern.freeze(build("LSTM", 3, 4, num_layers=2, bidirectional=b)) for b in (False, True)
    )
    gru, cell = rnnkern.freeze(build("GRU", 3, 4)), rnnkern.freeze(build("LSTMCell", 3, 4))
    x, h, c = torch.randn(5, 3), torch.zeros(2, 5, 4), torch.zeros(2, 5, 4)
    ones = torch.ones(5, 4)
    for call, error, words in (
        (lambda: both.step(x, (h, c)), ValueError, "one direction"),
        (lambda: layer.step(x[None], (h, c)), RuntimeError, "1 or 2 axes, got 3"),
        (lambda: layer.step(x[:, :2], (h, c)), RuntimeError, "2 features, expected 3"),
        (lambda: layer.step(x, (h, c[:1])), RuntimeError, r"c has shape \[1, 5, 4\], expected \[2"),
        (lambda: layer.step(x, (h, c.double())), RuntimeError, "float32, got c of torch.float64"),
        (lambda: layer.step(x.half(), (h, c)), RuntimeError, "float32, got x of torch.float16"),
        (lambda: layer.step(x, (h, h)), RuntimeError, "two tensors"),
        (lambda: layer.step(x, (h, ones.expand(2, 5, 4))), RuntimeError, "overlap"),
        (lambda: layer.step(x, (h, c[:, :1].expand(2, 5, 4))), RuntimeError, "overlap"),
        (lambda: layer.step(x, h), TypeError, r"state must be \(h, c\), got Tensor"),
        (lambda: gru.step(x, (h,)), TypeError, "state must be the tensor h, got tuple"),
        (lambda: gru.step(x, None), TypeError, "state must be a torch.Tensor, got NoneType"),
        (lambda: gru.step("x", h), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: cell.step(x, (h, c)), RuntimeError, "h has shape"),
    ):
        with pytest.raises(error, match=words):
            call()
    assert h.abs().max() == 0
    assert c.abs().max() == 0
    assert ones.min() == 1


@pytest.mark.parametrize("kind", ["GRUCell", "LSTM"])
def test_a_parametrized_module_stays_as_it_is(kind: str) -> None:
    module = getattr(nn, kind)(5, 7)
    name = "weight_hh" if kind == "GRUCell" else "weight_hh_l0"
    nn.utils.parametrizations.weight_norm(module, name)
    x = torch.randn(3, 4, 5) if kind == "LSTM" else torch.randn(4, 5)
    with torch.no_grad():
        frozen = rnnkern.freeze(module)
        wanted = flatten(module(x))
        torch.testing.assert_close(flatten(frozen(x)), wanted)
    for _ in range(2):
        next(iter(flatten(module(x)).values())).sum().backward()
    assert nn.utils.parametrize.is_parametrized(module, name)
    assert torch.equal(next(iter(flatten(module(x)).values())), next(iter(wanted.values())))


def test_a_frozen_module_is_not_frozen_otherwise() -> None:
    frozen = rnnkern.freeze(nn.GRU(3, 4))
    assert rnnkern.freeze(frozen).weights == torch.float32
    with pytest.raises(ValueError, match="thaw it first to freeze it"):
        rnnkern.freeze(nn.Sequential(frozen), weights=torch.int8)
    frozen.flatten_parameters()


def test_a_part_of_a_state_dict_is_loaded() -> None:
    source, frozen = rnnkern.freeze(nn.GRU(3, 4)), rnnkern.freeze(nn.GRU(3, 4))
    state = source.state_dict()
    kept = frozen.state_dict()["frozen_bias_hh_l0"].clone()
    del state["frozen_bias_hh_l0"]
    assert frozen.load_state_dict(state, strict=False).missing_keys == ["frozen_bias_hh_l0"]
    made = frozen.state_dict()
    assert torch.equal(made["frozen_weight_ih_l0"], state["frozen_weight_ih_l0"])
    assert torch.equal(made["frozen_bias_hh_l0"], kept)


def test_states_that_share_memory() -> None:
    frozen, memory = rnnkern.freeze(nn.LSTM(4, 4)), torch.zeros(1, 2, 8)
    x, copy_of = torch.randn(2, 4), (torch.zeros(1, 2, 4), torch.zeros(1, 2, 4))
    output = frozen.step(x, (memory[..., :4], memory[..., 4:]))  # side by side
    assert torch.equal(output, frozen.step(x, copy_of))
    assert torch.equal(memory[..., 4:], copy_of[1])
    with pytest.raises(RuntimeError, match="h and c must be two tensors, which share no memory"):
        frozen.step(x, (memory[..., :4], memory[..., 2:6]))
    with pytest.raises(RuntimeError, match="x must share no memory with c"):
        frozen.step(copy_of[1][0], copy_of)


def test_a_state_dict_of_other_things_names_them() -> None:
    frozen = rnnkern.freeze(nn.GRU(3, 4))
    before = frozen.state_dict()
    wrong = dict.fromkeys(before, 3)
    with pytest.raises(RuntimeError, match=r"frozen_bias_hh_l0 must be a torch\.Tensor, got int"):
        frozen.load_state_dict(wrong)
    assert_bitwise(dict(frozen.state_dict()), dict(before))
