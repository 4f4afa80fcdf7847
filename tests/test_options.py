"""What a call may ask for besides the arguments of torch.nn: reset_to, return_cells, layer
normalisation, recurrent dropout and zoneout, against the loop of `options_oracle`.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from options_cases import (
    CALLS,
    FORMS,
    LENGTHS,
    ON_A_GPU,
    RESET,
    SEED,
    SHAPES,
    Case,
    H,
    I,
    N,
    T,
    change_gains,
    tensors,
)
from support import Leaves, autocast, build, build_form, evaluate, leaves_for, states_of
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.checkpoint import checkpoint

import rnnkern

pytestmark = pytest.mark.filterwarnings(ON_A_GPU)


def forms(call: str) -> list[str]:
    return [form for form in FORMS if form.startswith("LSTM") or not call.startswith("cells")]


@pytest.mark.kernel
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("call", "form"), [(call, form) for call in CALLS for form in forms(call)])
def test_as_the_loop(form: str, shape: str, call: str) -> None:
    Case(form, shape, call).check()


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "call", ["reset_to", "cells", "dropout", "zoneout", "zoneout-eval", "norm", "norm-all", "all"]
)
@pytest.mark.parametrize("form", ["LSTM", "LSTM-proj", "GRU"])
def test_every_dtype(form: str, call: str, dtype: torch.dtype) -> None:
    Case(form, "bidirectional-stack", call, dtype).check()


@pytest.mark.kernel
@pytest.mark.parametrize(
    "call", ["reset_to-lengths", "dropout", "zoneout", "norm", "norm-all", "all"]
)
@pytest.mark.parametrize("form", ["LSTM-proj", "GRU", "RNN"])
def test_teams_of_threads(form: str, call: str) -> None:
    """Two threads share the units of a layer, and get the bits of one."""
    case = Case(form, "plain", call)
    case.module = build_form(
        form,
        40,
        256,
        dtype=torch.float32,
        layer_norm=bool(case.module._gain_names),
        recurrent_dropout=case.noise.dropout,
        zoneout=case.noise.zoneout,
    )
    change_gains(case.module)
    wide = leaves_for(case.module, T, N)
    states = [f"reset_{name}" for name in list(wide)[1:] if "reset_h0" in case.leaves]
    case.leaves = wide | {n: torch.randn_like(wide[n.removeprefix("reset_")]) for n in states}
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(evaluate(case.module, case.leaves, case.call))
    for name, one in found[0].items():
        if name.startswith("out"):
            assert torch.equal(one, found[1][name]), name
        else:
            torch.testing.assert_close(one, found[1][name])


@pytest.mark.kernel
@pytest.mark.parametrize(
    "call",
    ["reset_to-lengths", "cells-lengths", "dropout", "zoneout", "norm", "norm-all", "all"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_has_the_bits_of_training(call: str, dtype: torch.dtype) -> None:
    case = Case("LSTM", "bidirectional-stack", call, dtype)
    trained = evaluate(case.module, case.leaves, case.call)
    for name, made in evaluate(case.module, case.leaves, case.call, backward=False).items():
        assert torch.equal(made, trained[name])


@pytest.mark.kernel
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("form", ["LSTM", "GRU"])
def test_a_packed_sequence_is_a_batch_with_lengths(form: str, batch_first: bool) -> None:
    module = build(
        form, I, H, bidirectional=True, batch_first=batch_first, recurrent_dropout=0.3, zoneout=0.2
    )
    lengths = torch.tensor([3, 5, 1])
    x = torch.randn((N, T, I) if batch_first else (T, N, I), requires_grad=True)
    more = {"return_cells": True} if form == "LSTM" else {}
    found = []
    for packs in (False, True):
        torch.manual_seed(SEED)
        if packs:
            own = pack_padded_sequence(x, lengths, batch_first=batch_first, enforce_sorted=False)
            y, state, *cells = module(own, **more)
            assert all(isinstance(z, PackedSequence) for z in (y, *cells))
            y, *cells = (pad_packed_sequence(z, batch_first=batch_first)[0] for z in (y, *cells))
        else:
            y, state, *cells = module(x, lengths=lengths, **more)
        states = state if isinstance(state, tuple) else (state,)
        (dx,) = torch.autograd.grad(sum((z * z).sum() for z in (y, *states, *cells)), x)
        found.append((y, *states, *cells, dx))
    for padded, packed in zip(*found, strict=True):
        torch.testing.assert_close(padded, packed)


@pytest.mark.kernel
@pytest.mark.parametrize("call", ["reset_to", "cells", "norm", "all"])
def test_an_input_without_a_batch(call: str) -> None:
    case = Case("LSTM", "plain", call)
    one = slice(0, 1)
    batch = {name: z[:, one] for name, z in case.leaves.items()}
    given = dict(case.given)
    if "lengths" in given:
        given["lengths"] = LENGTHS[one]
    if "reset" in given:
        given["reset"] = RESET[:, one]
    case.given = given
    whole = case.call(case.module, batch)
    case.given = {n: z.squeeze(-1) if isinstance(z, Tensor) else z for n, z in given.items()}
    if "lengths" in given:
        case.given["lengths"] = LENGTHS[0]
    alone = case.call(case.module, {name: z.squeeze(1) for name, z in batch.items()})
    for a, b in zip(tensors(whole), tensors(alone), strict=True):
        assert torch.equal(a.squeeze(1), b)


@pytest.mark.kernel
@pytest.mark.parametrize("call", ["all", "norm-all"])
def test_padding_may_be_nan(call: str) -> None:
    case = Case("LSTM", "plain", call)
    clean = evaluate(case.module, case.leaves, case.call)
    for n, length in enumerate(LENGTHS.tolist()):
        case.leaves["x"][length:, n] = torch.nan
    for name, made in evaluate(case.module, case.leaves, case.call).items():
        assert torch.equal(made, clean[name])


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["LSTM", "GRU"])
@pytest.mark.usefixtures("deterministic")
def test_deterministic_blocks(form: str, dtype: torch.dtype) -> None:
    """With the expectation of zoneout, a sequence may be cut anywhere."""
    module = build(form, I, H, dtype=dtype, zoneout=0.3).eval()
    x = torch.randn(T, N, I).to(dtype)
    whole, _ = module(x)
    first, state = module(x[:2])
    second, _ = module(x[2:], state)
    assert torch.equal(torch.cat([first, second]), whole)


@pytest.mark.kernel
def test_results_belong_to_the_caller() -> None:
    """Backward does not read what it may change in place."""
    module = build("LSTM", I, H)
    x = torch.randn(T, N, I)
    found = []
    for changes in (False, True):
        y, (h, c), cells = module(x, return_cells=True)
        if changes:
            y, cells = y.mul_(1), cells.mul_(1)
        module.zero_grad()
        (y.sum() + h.sum() + c.sum() + (cells**2).sum()).backward()
        found.append(module.weight_hh_l0.grad.clone())
    assert torch.equal(*found)


@pytest.mark.kernel
@pytest.mark.parametrize("form", ["LSTM", "GRU", "RNN"])
def test_products_of_bfloat16(form: str) -> None:
    """Under autocast some layers compute in float32, and multiply as bfloat16 from 16 rows on."""
    module = build(form, 40, 24, recurrent_dropout=0.3, zoneout=0.2)
    x = torch.randn(20, 4, 40, requires_grad=True)
    found = []
    for enabled in (False, True):
        torch.manual_seed(SEED)
        with autocast(enabled=enabled):
            y, _ = module(x)
        (dx,) = torch.autograd.grad(y.float().square().sum(), x)
        found.append((y.float(), dx))
    for wide, rounded in zip(*found, strict=True):
        torch.testing.assert_close(rounded, wide, rtol=0.1, atol=0.05)


@pytest.mark.kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", ["LSTM", "LSTM-proj", "GRU"])
def test_autocast_has_the_dtypes_of_a_plain_call(form: str, dtype: torch.dtype) -> None:
    case = Case(form, "plain", "all", torch.float32)
    with autocast(dtype):
        made = case.call(case.module, case.leaves)
        plain = case.module(case.leaves["x"], lengths=LENGTHS, reset=RESET)
    kinds = [z.dtype for z in tensors(made)]
    assert kinds == [z.dtype for z in tensors(plain)] + kinds[-1:] * (form != "GRU")
    wide = case.call(case.module, case.leaves)
    for a, b in zip(tensors(made), tensors(wide), strict=True):
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05)


# Modes, transforms and higher derivatives


@pytest.mark.parametrize(
    "call", ["reset_to-lengths", "cells", "dropout", "zoneout", "norm", "norm-all", "all"]
)
@pytest.mark.parametrize("form", ["LSTM-proj", "GRU", "RNN"])
def test_second_derivatives(form: str, call: str) -> None:
    case = Case(form, "plain", call)
    names = list(case.leaves)
    weights = dict(case.module.named_parameters())
    given = [z.double().requires_grad_() for z in case.leaves.values()]
    given += [w.detach().clone().requires_grad_() for w in weights.values()]

    def function(*operands: Tensor) -> tuple[Tensor, ...]:
        own = dict(zip(names, operands, strict=False))
        parameters = dict(zip(weights, operands[len(names) :], strict=True))
        arguments = case.arguments(own)
        torch.manual_seed(SEED)
        made = functional_call(case.module, parameters, (own["x"], states_of(own)), arguments)
        return tuple(tensors(made))

    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(function, given, **fast)
    assert torch.autograd.gradgradcheck(function, given, **fast)


@pytest.mark.parametrize("call", ["reset_to", "cells", "zoneout-eval", "norm", "all"])
def test_transforms(call: str) -> None:
    case = Case("LSTM", "plain", call)
    weights = {name: p.detach() for name, p in case.module.named_parameters()}

    def loss(parameters: Any, x: Tensor) -> Tensor:
        own = case.leaves | {"x": x}
        torch.manual_seed(SEED)
        arguments = case.arguments(own)
        made = functional_call(case.module, parameters, (x, states_of(own)), arguments)
        return sum((z * z).sum() for z in tensors(made))

    x = case.leaves["x"]
    leaf = x.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(loss(weights, leaf), leaf)
    torch.testing.assert_close(grad(loss, 1)(weights, x), wanted)
    _, moved = jvp(lambda z: loss(weights, z), (x,), (torch.ones_like(x),))
    torch.testing.assert_close(moved, wanted.sum())
    each = vmap(grad(loss, 1), (None, 0), randomness="same")(weights, torch.stack([x, 2 * x]))
    torch.testing.assert_close(each[0], wanted)


@pytest.mark.parametrize("call", ["reset_to-lengths", "cells", "zoneout-eval", "norm-all", "all"])
def test_compiled_without_a_break(call: str) -> None:
    case = Case("LSTM", "bidirectional-stack", call)
    torch._dynamo.reset()
    compiled = torch.compile(case.module, backend="aot_eager", fullgraph=True)
    ours = evaluate(case.module, case.leaves, case.call)

    def call_compiled(module: nn.Module, own: Leaves) -> Any:
        torch.manual_seed(SEED)
        return compiled(own["x"], states_of(own), **case.arguments(own))

    for name, made in evaluate(case.module, case.leaves, call_compiled).items():
        torch.testing.assert_close(made, ours[name])


def test_exported_programs_are_torchs_own() -> None:
    module = build("LSTM", I, H, zoneout=0.2).eval()
    x = torch.randn(T, N, I)
    program = torch.export.export(module, (x,), {"return_cells": True})
    assert "rnnkern" not in program.graph_module.code
    for made, wanted in zip(
        tensors(program.module()(x, return_cells=True)),
        tensors(module(x, return_cells=True)),
        strict=True,
    ):
        torch.testing.assert_close(made, wanted)


@pytest.mark.parametrize(
    ("kind", "options", "arguments"),
    [
        ("LSTM", {"layer_norm": True, "num_layers": 2, "bidirectional": True}, {}),
        ("GRU", {"zoneout": 0.3, "recurrent_dropout": 0.2, "batch_first": True}, {}),
        ("LSTM", {}, {"return_cells": True}),
        ("RNN", {}, {"reset": True}),
        ("LSTMCell", {"layer_norm": True}, {}),
    ],
)
@pytest.mark.cpu_only
def test_decompositions_take_options_apart(
    kind: str, options: dict[str, Any], arguments: dict[str, Any]
) -> None:
    """With the same random numbers; into what one has that is exported without kernels."""
    module = build(kind, I, H, **options)
    x = torch.randn(N, I) if kind == "LSTMCell" else torch.randn(T, N, I)
    if "reset" in arguments:
        arguments = {"reset": torch.rand(T, N) < 0.3, "reset_to": torch.randn(1, N, H)}
    with rnnkern.exporting_kernels():
        program = torch.export.export(module, (x,), arguments)
    assert "rnnkern" in program.graph_module.code
    portable = program.run_decompositions(rnnkern.decompositions())
    assert "rnnkern" not in portable.graph_module.code
    found = []
    for run in (module, portable.module()):
        torch.manual_seed(1)
        found.append(tensors(run(x, **arguments)))
    for wanted, made in zip(*found, strict=True):
        torch.testing.assert_close(made, wanted)


@pytest.mark.cpu_only
def test_decompositions_leave_options_with_any_number_of_steps() -> None:
    module, x = build("LSTM", I, H, layer_norm=True), torch.randn(T, N, I)
    lengths = torch.tensor([T, 1, 0])
    for arguments, dims in (({}, {0: torch.export.Dim("T")}), ({"lengths": lengths}, None)):
        shapes = (dims, *(None for _ in arguments)) if dims else None
        with rnnkern.exporting_kernels():
            program = torch.export.export(module, (x,), arguments, dynamic_shapes=shapes)
        same = program.run_decompositions(rnnkern.decompositions())
        assert "rnnkern.scan_with_options" in same.graph_module.code
        longer = x if arguments else torch.randn(T + 2, N, I)
        made, wanted = (run(longer, **arguments)[0] for run in (same.module(), module))
        torch.testing.assert_close(made, wanted)


def test_traced_programs_have_the_options() -> None:
    module = build("GRU", I, H, zoneout=0.5).eval()
    x = torch.randn(T, N, I)
    traced = torch.jit.trace(module, (x,), check_trace=False)
    torch.testing.assert_close(traced(x)[0], module(x)[0])


def test_recomputed_by_torch_utils_checkpoint() -> None:
    module = build("GRU", I, H, recurrent_dropout=0.3, zoneout=0.3)
    x = torch.randn(T, N, I, requires_grad=True)
    found = []
    for run in (module, functools.partial(checkpoint, module, use_reentrant=False)):
        torch.manual_seed(SEED)
        found.append(torch.autograd.grad(run(x)[0].square().sum(), x)[0])
    assert torch.equal(*found)


def test_shapes_without_data() -> None:
    module = build("LSTM", I, H, bidirectional=True, zoneout=0.3)
    real = tensors(module(torch.randn(T, N, I), return_cells=True))
    made = tensors(module.to("meta")(torch.randn(T, N, I, device="meta"), return_cells=True))
    assert [z.shape for z in made] == [z.shape for z in real]
    sum(z.sum() for z in made).backward()
    assert all(p.grad.is_meta for p in module.parameters())


def test_batches_of_gradients() -> None:
    module = build("LSTM", I, H, dtype=torch.float64)
    x = torch.randn(T, N, I, dtype=torch.float64, requires_grad=True)
    cells = module(x, return_cells=True)[2]
    many = torch.randn(2, *cells.shape, dtype=torch.float64)
    (batch,) = torch.autograd.grad(cells, x, many, is_grads_batched=True, retain_graph=True)
    for own, one in zip(batch, many, strict=True):
        torch.testing.assert_close(own, torch.autograd.grad(cells, x, one, retain_graph=True)[0])
