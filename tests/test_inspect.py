"""`rnnkern.inspect`: gates and states against a loop over steps, and how far gradients reach."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from layer_options import LENGTHS, RESET, SETTINGS
from support import FORMS, LAYERS, build, build_form, flatten, states_of
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

import rnnkern
from rnnkern import inspect
from rnnkern.derivatives import cells as derivatives


def stepped(
    module: Any,
    x: Tensor,
    h: Tensor,
    c: Tensor,
    i: int,
    d: int,
    seen: Callable[[str, Tensor], Tensor] = lambda name, state: state,
) -> dict[str, Tensor]:
    """One layer and direction in a loop over the steps of ``[T, N, I]``: all gates and states, the
    latter as ``seen`` hands them on.
    """
    suffix = f"_l{i}" + ("_reverse" if d else "")
    w = {
        name: getattr(module, f"{name}{suffix}", None)
        for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
    }
    found: dict[str, list[Tensor]] = {}
    for step in x.flip(0) if d else x:
        a = nn.functional.linear(step, w["weight_ih"], w["bias_ih"])
        b = nn.functional.linear(h, w["weight_hh"], w["bias_hh"])
        now: dict[str, Tensor] = {}
        if module.mode == "LSTM":
            i_, f_, g_, o_ = (a + b).chunk(4, -1)
            now = {"i": i_.sigmoid(), "f": f_.sigmoid(), "g": g_.tanh(), "o": o_.sigmoid()}
            c = seen("c", now["f"] * c + now["i"] * now["g"])
            h = now["o"] * c.tanh()
            h = h if w["weight_hr"] is None else h @ w["weight_hr"].t()
            now["c"] = c
        elif module.mode == "GRU":
            (ar, az, an), (br, bz, bn) = a.chunk(3, -1), b.chunk(3, -1)
            now = {"r": (ar + br).sigmoid(), "z": (az + bz).sigmoid()}
            now["n"] = (an + now["r"] * bn).tanh()
            h = (1 - now["z"]) * now["n"] + now["z"] * h
        else:
            h = torch.relu(a + b) if module.mode == "RNN_RELU" else torch.tanh(a + b)
        now["h"] = h = seen("h", h)
        for name, value in now.items():
            found.setdefault(name, []).append(value)
    return {name: torch.stack(values[::-1] if d else values) for name, values in found.items()}


def named(part: inspect.DirectionTrace) -> dict[str, Tensor]:
    own = part.gates | {"h": part.h}
    return own if part.c is None else own | {"c": part.c}


def total(values: dict[str, Tensor]) -> Tensor:
    """A sum in which every element counts differently."""
    return sum(
        (value * torch.linspace(1, 2, value.numel(), dtype=value.dtype).view(value.shape)).sum()
        for _, value in sorted(values.items())
    )  # type: ignore[return-value]


@pytest.mark.parametrize("of", ["rnnkern", "torch.nn"])
@pytest.mark.parametrize("setting", ["hx", "bidirectional", "no-bias", "batch-first"])
@pytest.mark.parametrize("form", FORMS)
def test_trace_of_a_layer(form: str, setting: str, of: str) -> None:
    """Values, first and second derivatives."""
    module, leaves = SETTINGS[setting].make(form)
    if of == "torch.nn":
        rnnkern.revert(module)
    leaves = {name: leaf.double().requires_grad_() for name, leaf in leaves.items()}
    x = leaves["x"]
    seen = inspect.trace(module, x, states_of(leaves))
    torch.testing.assert_close(
        flatten((seen.output, seen.state)), flatten(module(x, states_of(leaves)))
    )
    sources = [*leaves.values(), *module.parameters()]
    N = x.shape[0] if module.batch_first else x.shape[1]
    for d, part in enumerate(seen.layers[0]):
        zeros = x.new_zeros(2, N, module.proj_size or module.hidden_size), x.new_zeros(2, N, 2)
        h, c = (leaves.get(name, z)[d] for name, z in zip(("h0", "c0"), zeros, strict=True))
        frames = x.transpose(0, 1) if module.batch_first else x
        wanted = stepped(module, frames, h, c, 0, d)
        ours = named(part)
        if module.batch_first:
            ours = {name: value.transpose(0, 1) for name, value in ours.items()}
        assert ours.keys() == wanted.keys()
        torch.testing.assert_close(ours, wanted)
        first = [
            torch.autograd.grad(total(v), sources, create_graph=True, allow_unused=True)
            for v in (ours, wanted)
        ]
        second = []
        for gradients in first:
            loss = sum(g.square().sum() for g in gradients if g is not None)
            second.append(torch.autograd.grad(loss, sources, retain_graph=True, allow_unused=True))
        for mine, theirs in (first, second):
            for a, b in zip(mine, theirs, strict=True):
                zero = torch.zeros(())
                torch.testing.assert_close(
                    a if a is not None else zero.expand_as(b if b is not None else zero).double(),
                    b if b is not None else zero.expand_as(a if a is not None else zero).double(),
                )


@pytest.mark.parametrize("kind", LAYERS)
def test_trace_of_several_layers(kind: str) -> None:
    module = build(kind, 2, 3, num_layers=3, bidirectional=True, dtype=torch.float64)
    x = torch.randn(4, 2, 2, dtype=torch.float64)
    with torch.no_grad():
        seen = inspect.trace(module, x)
        assert [len(layer) for layer in seen.layers] == [2, 2, 2]
        for i, layer in enumerate(seen.layers):
            zero = x.new_zeros(2, 3)
            for d, part in enumerate(layer):
                torch.testing.assert_close(named(part), stepped(module, x, zero, zero, i, d))
            x = torch.cat([part.h for part in layer], -1)
    assert torch.equal(x, seen.output)


@pytest.mark.parametrize("which", ["lengths", "reset", "packed"])
@pytest.mark.parametrize("form", FORMS)
def test_trace_of_rows_that_end_and_begin(form: str, which: str) -> None:
    """As each piece alone: values, and gradients of the whole."""
    module = build_form(form, 2, 3, bidirectional=True, dtype=torch.float64, proj_size=2)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    if which == "packed":
        packed = pack_padded_sequence(x, LENGTHS.cpu(), enforce_sorted=False)
        seen = inspect.trace(module, packed)
        padded = lambda z: nn.utils.rnn.pad_packed_sequence(packed._replace(data=z))[0]  # noqa: E731
    else:
        options = {"lengths": LENGTHS} if which == "lengths" else {"reset": RESET}
        seen = inspect.trace(module, x, **options)
        padded = lambda z: z  # noqa: E731
    sources = [x, *module.parameters()]
    for d in range(2):
        ours = {name: padded(value) for name, value in named(seen.layers[0][d]).items()}
        wanted = {name: torch.zeros_like(value) for name, value in ours.items()}
        for n in range(2):
            length = 3 if which == "reset" else int(LENGTHS[n])
            cuts = [0, length]
            if which == "reset":
                cuts = sorted({0, 3, *(t for t in range(3) if RESET[t, n])})
            for begin, end in itertools.pairwise(cuts):
                alone = inspect.trace(module, x[begin:end, n : n + 1]).layers[0][d]
                for name, value in named(alone).items():
                    wanted[name] = wanted[name].clone()
                    wanted[name][begin:end, n : n + 1] = value
        torch.testing.assert_close(ours, wanted)
        torch.testing.assert_close(
            torch.autograd.grad(total(ours), sources, retain_graph=True, allow_unused=True),
            torch.autograd.grad(total(wanted), sources, retain_graph=True, allow_unused=True),
        )


@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_gradient_flow(form: str, options: dict[str, Any]) -> None:
    module = build_form(form, 2, 4, dtype=torch.float64, **options)
    x = torch.randn(7, 3, 2, dtype=torch.float64)
    flow = inspect.gradient_flow(module, x)
    width = getattr(module, "proj_size", 0) or 4
    layers = module.num_layers
    D = 2 if module.bidirectional else 1
    assert flow.h.shape == (layers * D, 7, 3)
    assert (flow.c is None) == (module.mode != "LSTM")
    expected: dict[str, list[Tensor]] = {"h": [], "c": []}
    for i in range(layers):
        outputs = []
        for d in range(D):
            # A leaf of zeros more in every state: its gradient is the state's.
            leaves: dict[str, list[Tensor]] = {"h": [], "c": []}

            def with_leaf(name: str, state: Tensor, leaves: Any = leaves) -> Tensor:
                leaf = torch.zeros_like(state).requires_grad_()
                leaves[name].append(leaf)
                return state + leaf

            h = stepped(module, x, x.new_zeros(3, width), x.new_zeros(3, 4), i, d, with_leaf)["h"]
            outputs.append(h.detach())
            for name, own in leaves.items():
                if own:
                    found = torch.autograd.grad(h[0 if d else -1].sum(), own, retain_graph=True)
                    norms = torch.stack([g.norm(dim=-1) for g in found])
                    expected[name].append(norms.flip(0) if d else norms)
        x = torch.cat(outputs, -1)
    torch.testing.assert_close(flow.h, torch.stack(expected["h"]))
    if flow.c is not None:
        torch.testing.assert_close(flow.c, torch.stack(expected["c"]))


@rnnkern.cell(gates=("f", "g"), states=("h", "c"))
def late(x: Any, h: Any, prev: Any) -> Any:
    """h is made from the c before the step."""
    return rnnkern.sigmoid(x.g + h.g) * prev.c, 0.5 * prev.c + rnnkern.tanh(x.f + h.f)


@pytest.mark.cpu_only
@pytest.mark.parametrize("given", [{}, {"lengths": LENGTHS}, {"reset": RESET}], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"bidirectional": True, "num_layers": 2}, {"proj_size": 2}], ids=str
)
def test_gradient_flow_of_an_lstm_in_python(options: dict[str, Any], given: dict[str, Any]) -> None:
    """As of the hand-written one: c has its gradients through h of the same step, too."""
    theirs = build("LSTM", 2, 4, dtype=torch.float64, **options)
    ours = rnnkern.Recurrent(rnnkern.cells.lstm, 2, 4, dtype=torch.float64, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    flows = [inspect.gradient_flow(module, x, **given) for module in (ours, theirs)]
    torch.testing.assert_close(*flows)
    slopes = [torch.autograd.grad(flow.c.sum(), x)[0] for flow in flows if flow.c is not None]
    torch.testing.assert_close(*slopes)
    with torch.no_grad():
        torch.testing.assert_close(inspect.gradient_flow(ours, x, **given), flows[0])


@pytest.mark.cpu_only
def test_gradient_flow_where_h_is_not_made_from_the_new_c() -> None:
    """The last c has no gradient, and the one before it that of the gate."""
    module = rnnkern.Recurrent(late, 2, 4, dtype=torch.float64)
    x = torch.randn(2, 3, 2, dtype=torch.float64)
    flow = inspect.gradient_flow(module, x)
    assert flow.c is not None
    assert not flow.c[0, 1].any()
    with torch.no_grad():
        h = module(x[:1])[0][0]
        gate = x[1] @ module.weight_ih_l0[4:].T + module.bias_ih_l0[4:]
        gate = gate + h @ module.weight_hh_l0[4:].T + module.bias_hh_l0[4:]
    torch.testing.assert_close(flow.c[0, 0], gate.sigmoid().norm(dim=-1))


def test_a_gradient_that_vanishes_in_float32() -> None:
    """Its norm is as small as float32 can say."""
    module, x = build("RNN", 1, 20), torch.randn(100, 1, 1)
    ours = inspect.gradient_flow(module, x).h
    exact = inspect.gradient_flow(oracle.twin(module, torch.float64), x.double()).h
    assert exact.min() < 1e-22
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-37)


@pytest.mark.parametrize("kind", LAYERS)
def test_gradient_flow_is_differentiable_and_follows_lengths(kind: str) -> None:
    module = build(kind, 2, 4, dtype=torch.float64)
    x = torch.randn(5, 2, 2, dtype=torch.float64, requires_grad=True)
    flow = inspect.gradient_flow(module, x, lengths=torch.tensor([5, 3]))
    assert (flow.h[0, 3:, 1] == 0).all()
    alone = inspect.gradient_flow(module, x[:3, 1:])
    torch.testing.assert_close(flow.h[:, :3, 1:], alone.h)
    (gradient,) = torch.autograd.grad(flow.h.sum(), x)
    assert gradient.abs().sum() > 0

    def flowing(x: Tensor) -> Tensor:
        return inspect.gradient_flow(module, x).h

    assert torch.autograd.gradcheck(flowing, x)


@pytest.mark.parametrize(
    ("module", "operands", "message"),
    [
        (nn.Linear(2, 3), (torch.zeros(3, 2, 2),), "module must be an RNN, LSTM or GRU"),
        (nn.GRU(2, 3), (torch.zeros(3, 2),), "three axes"),
        (nn.GRU(2, 3), (torch.zeros(3, 2, 4),), "2 features, got 4"),
        (nn.GRU(2, 3), (torch.zeros(0, 2, 2),), "no steps"),
        (
            nn.GRU(2, 3),
            (torch.zeros(3, 2, 2), torch.zeros(1, 3, 3)),
            "h_0 must be a tensor of shape",
        ),
        (nn.GRU(2, 3), ([1.0],), "three axes"),
    ],
    ids=["module", "axes", "features", "steps", "hx", "type"],
)
@pytest.mark.cpu_only
def test_wrong_operands_raise_errors(module: Any, operands: tuple[Any, ...], message: str) -> None:
    for function in (inspect.trace, inspect.gradient_flow):
        with pytest.raises((TypeError, ValueError), match=message):
            function(module, *operands)


@pytest.mark.cpu_only
def test_a_wrong_dtype() -> None:
    for function in (inspect.trace, inspect.gradient_flow):
        with pytest.raises(ValueError, match="weight_ih has another dtype"):
            function(nn.GRU(2, 3), torch.zeros(3, 2, 2, dtype=torch.float64))


@pytest.mark.cpu_only
def test_no_transform_is_known() -> None:
    module = build("GRU", 2, 3)
    with pytest.raises(NotImplementedError, match=r"no transform of torch\.func"):
        torch.func.grad(lambda x: inspect.trace(module, x).output.sum())(torch.zeros(3, 2, 2))


class _Coupled(derivatives.Lstm):
    """Says that c(t) = f(t) c(t-1) + (1 - f(t)) g(t), which is not so of the kernel."""

    @staticmethod
    def cell_updates(*gates: Tensor) -> tuple[Tensor, Tensor]:
        _, f, g, _ = gates
        return f, (1 - f) * g


class _WithoutUpdates(derivatives.Elman):
    activated = derivatives.Lstm.activated


def test_the_class_of_a_cell_says_how_c_depends_on_the_gates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, x = build("LSTM", 2, 3), torch.randn(1, 2, 2)  # one step: gates depend on x alone

    def gradient_of_i() -> Tensor:
        c = inspect.trace(module, x).layers[0][0].c
        (gradient,) = torch.autograd.grad(c.sum(), module.weight_ih_l0)
        return gradient[:3]

    assert gradient_of_i().abs().sum() > 0
    monkeypatch.setitem(derivatives.DERIVATIVES, "LSTM", _Coupled)
    assert gradient_of_i().abs().sum() == 0
    monkeypatch.setitem(derivatives.DERIVATIVES, "LSTM", _WithoutUpdates)
    with pytest.raises(NotImplementedError, match=r"how c depends on the gates.*torch\.no_grad"):
        inspect.trace(module, x)
    with torch.no_grad():
        assert inspect.trace(module, x).layers[0][0].c is not None


@pytest.mark.cpu_only
def test_a_cell_without_derivatives_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(derivatives.DERIVATIVES, "GRU")
    module, x = build("GRU", 2, 3), torch.randn(4, 2, 2)
    with pytest.raises(NotImplementedError, match="how the gates depend on their sums"):
        inspect.trace(module, x)
    with torch.no_grad():
        assert inspect.trace(module, x).layers[0][0].gates.keys() == {"r", "z", "n"}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_under_autocast(form: str, packed: bool) -> None:
    """Output and state are the module's own, dtypes included."""
    module, x = build_form(form, 3, 6, num_layers=2), torch.randn(5, 2, 3)
    given = pack_padded_sequence(x, torch.tensor([5, 3])) if packed else x
    with torch.autocast(x.device.type, dtype=torch.bfloat16):
        expected, state = module(given)
        seen = inspect.trace(module, given)
    ours, theirs = flatten((seen.output, seen.state)), flatten((expected, state))
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        torch.testing.assert_close(ours[name], value)
