"""generate: a layer that is fed its own output."""

from __future__ import annotations

import copy
from typing import Any

import oracle
import pytest
import torch
from support import DTYPES, FORMS, LAYERS, assert_agree, build, build_form, flatten
from torch import Tensor, nn

import rnnkern
from rnnkern import closed_loop, kernels, tolerance


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


SIZES = {
    "tiny": (3, 2, 3, 6),
    "odd": (7, 5, 65, 33),
    "units": (20, 1, 70, 300),
    "rows": (4, 60, 3, 40),
}


def on_the_cpu(test: Any) -> Any:
    return pytest.mark.cpu_only(
        pytest.mark.skipif(kernels.IS_STAND_IN, reason="a stand-in for GPUs")(test)
    )


@pytest.fixture
def one_call(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of `generate` was one call of the kernels."""
    made: list[bool] = []
    run = closed_loop._in_one_call

    def watched(*given: Any) -> Any:
        found = run(*given)
        made.append(found is not None)
        return found

    monkeypatch.setattr(closed_loop, "_in_one_call", watched)
    return made


@on_the_cpu
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_one_call_of_the_kernels_for_all_steps(
    form: str, sizes: str, dtype: torch.dtype, one_call: list[bool]
) -> None:
    """As near to torch.nn in float64 as torch.nn is that takes the steps one by one."""
    steps, N, inputs, H = SIZES[sizes]
    module = build_form(form, inputs, H, dtype=dtype, proj_size=2 * H // 3)
    readout = nn.Linear(module.proj_size or H, inputs, bias=sizes != "odd", dtype=dtype)
    x = torch.randn(N, inputs, dtype=dtype)
    _, state = module(x[None])
    torch.set_num_threads(3)
    ours = rnnkern.generate(module, readout, x, steps, state)
    assert one_call == [True]
    theirs, exact = (
        rnnkern.generate(
            oracle.twin(module, own),
            copy.deepcopy(readout).to(own),
            x.to(own),
            steps,
            cast(state, own),
        )
        for own in (tolerance.yardstick_dtype(dtype), torch.float64)
    )
    assert one_call == [True, False, False]
    assert_agree(flatten(ours), flatten(theirs), flatten(exact))


def cast(state: Any, dtype: torch.dtype) -> Any:
    return tuple(s.to(dtype) for s in state) if isinstance(state, tuple) else state.to(dtype)


@on_the_cpu
def test_who_looks_on_sees_every_step(one_call: list[bool]) -> None:
    module, readout, x = setup("LSTM")
    expected, _ = rnnkern.generate(module, readout, x, 3)
    seen: list[str] = []
    for part, name in ((module, "module"), (readout, "readout")):
        hook = part.register_forward_hook(lambda *_, n=name: seen.append(n))
        made, _ = rnnkern.generate(module, readout, x, 3)
        hook.remove()
        torch.testing.assert_close(made, expected)
    for part, name in ((module, "module"), (readout, "readout")):
        run = part.forward
        part.forward = lambda *given, n=name, f=run: seen.append(n) or f(*given)
        made, _ = rnnkern.generate(module, readout, x, 3)
        del part.forward
        torch.testing.assert_close(made, expected)
    own = Own(3, 6)
    own.load_state_dict(module.state_dict())
    made, _ = rnnkern.generate(own, readout, x, 3)
    doubled, _ = rnnkern.generate(module, lambda h: readout(2 * h), x, 3)
    torch.testing.assert_close(made, doubled)
    made, _ = rnnkern.generate(module, lambda h: readout(h), x, 3)
    torch.testing.assert_close(made, expected)
    with torch.autocast("cpu"):
        rnnkern.generate(module, readout, x, 3)
    assert seen == 2 * (3 * ["module"] + 3 * ["readout"])
    assert one_call == [True] + 8 * [False]


class Own(rnnkern.LSTM):
    """With a forward of its own."""

    def forward(self, *given: Any) -> Any:
        y, state = super().forward(*given)
        return 2 * y, state


@on_the_cpu
def test_operands_that_do_not_fit_end_in_the_usual_errors() -> None:
    module, readout, x = setup("GRU")
    with pytest.raises(RuntimeError, match="hidden size"):
        rnnkern.generate(module, readout, x, 2, torch.zeros(1, 3, 6))
    with pytest.raises(RuntimeError, match=r"shapes cannot be multiplied"):
        rnnkern.generate(module, nn.Linear(5, 3), x, 2)
    with pytest.raises(ValueError, match=r"feedback must give \[4, 3\]"):
        rnnkern.generate(module, nn.Linear(6, 2), x, 2)
    with pytest.raises(ValueError, match=r"feedback must give \[4, 3\].* None"):
        rnnkern.generate(module, lambda h: None, x, 2)
    with pytest.raises(TypeError, match=r"input must be a torch\.Tensor, got list"):
        rnnkern.generate(module, readout, [1.0], 2)
    kernel = kernels.kernel("GRU", directions=2, hidden=6, proj=0, bias=True, batch_first=False)
    with pytest.raises(kernels.RefusedError, match="one direction"):
        kernel.closed_loop(torch.zeros(3, 4, 3), None, None, [], readout.weight, None)


def test_a_module_of_torch_nn_gives_the_same() -> None:
    module, readout, x = setup("GRU")
    theirs = nn.GRU(3, 6)
    theirs.load_state_dict(module.state_dict())
    ours, _ = rnnkern.generate(module, readout, x, 4)
    other, _ = rnnkern.generate(theirs.to(x.device), readout, x, 4)
    torch.testing.assert_close(ours, other)


def test_feedback_may_write_into_the_same_tensor_each_time() -> None:
    module, readout, x = setup("GRU")
    same = torch.zeros_like(x)
    made, _ = rnnkern.generate(module, lambda h: same.copy_(readout(h)), x, 4)
    expected, _ = rnnkern.generate(module, lambda h: readout(h), x, 4)
    assert torch.equal(made, expected)


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
