"""Threads: torch's own number of them, several Python threads at once, and forked processes."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import subprocesses
import torch
from support import (
    DTYPES,
    FORMS,
    LAYERS,
    assert_bitwise,
    build,
    build_form,
    evaluate,
    flatten,
    in_a_process,
    leaves_for,
    on_threads,
    plain,
    states_of,
)
from test_plan import V3, V4, V4_BF16, plan

import rnnkern

SIZES = {
    "tiny": (4, 1, 3, 5),
    "one-row": (3, 1, 64, 300),
    "rows": (4, 70, 40, 150),
    "odd": (5, 13, 7, 129),
    "as-they-lie": (1, 5, 64, 256),  # an odd row by itself, on one thread or on two
    "broadcast": (2, 31, 64, 256),  # a vector that is not full
    "apart": (1, 33, 64, 256),  # with 16 registers, the last row in dot products
    "apart-on-threads": (1, 33, 512, 40),  # and rows split among many threads
}


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("form", FORMS)
def test_outputs_do_not_depend_on_threads(form: str, sizes: str, dtype: torch.dtype) -> None:
    T, N, inputs, H = SIZES[sizes]
    module = build_form(form, inputs, H, dtype=dtype, bidirectional=True, num_layers=2)
    leaves = leaves_for(module, T, N)
    one = evaluate(module, leaves, on_threads(plain, 1), backward=False)
    for threads in (2, 3, 8):
        assert_bitwise(evaluate(module, leaves, on_threads(plain, threads), backward=False), one)
        trained = evaluate(module, leaves, on_threads(plain, threads))
        alone = evaluate(module, leaves, on_threads(plain, 1))
        assert_bitwise(*({k: v for k, v in r.items() if "out" in k} for r in (trained, alone)))


@pytest.mark.cpu_only
@pytest.mark.parametrize("l2_bytes", [2**19, 2**20, 2**21, 2**25])
@pytest.mark.parametrize("cpu", [V4, V3, V4_BF16], ids=["v4", "v3", "v4-bf16"])
def test_weights_lie_where_the_table_says_so(cpu: dict[str, int], l2_bytes: int) -> None:
    """On any machine."""
    for threads in (1, 2, 64):
        for sizes, wanted in (("as-they-lie", "dots"), ("broadcast", "broadcast")):
            found, text = plan("LSTM", SIZES[sizes], threads, cpu | {"l2_bytes": l2_bytes})
            assert found["reads"][1] == wanted, text
    if cpu == V3:
        for name, row_blocks in (("apart", 1), ("apart-on-threads", 3)):
            found, text = plan("RNN_TANH", SIZES[name], 3, cpu | {"l2_bytes": l2_bytes})
            assert found["by_dots"][1] == 1, text
            assert found["row_blocks"] == row_blocks, text


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize(("steps", "batch"), [(3, 8), (1, 64), (2, 70)])
@pytest.mark.parametrize("form", FORMS)
def test_dx_does_not_depend_on_threads(form: str, steps: int, batch: int) -> None:
    """Threads own rows of dx, or columns, and no sum is shared."""
    module = build_form(form, 300, 150, bidirectional=True)
    x = torch.randn(steps, batch, 300, requires_grad=True)
    lengths = torch.randint(0, steps + 1, (batch,))
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        y = module(x, lengths=lengths)[0]
        found.append(torch.autograd.grad(y, x, torch.ones_like(y))[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    past_the_end = torch.arange(steps)[:, None] >= lengths
    assert not found[0][past_the_end].any()


@pytest.mark.cpu_only
@pytest.mark.kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_lengths_and_reset_do_not_depend_on_threads(form: str, dtype: torch.dtype) -> None:
    module = build_form(form, 7, 129, dtype=dtype, bidirectional=True)
    leaves = {name: leaf.to(dtype) for name, leaf in leaves_for(module, 5, 40).items()}
    lengths = torch.randint(0, 6, (40,))
    reset = torch.rand(5, 40) < 0.3
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        with torch.no_grad():
            y = module(leaves["x"], states_of(leaves), lengths=lengths, reset=reset)
        results.append(flatten(y))
    assert_bitwise(*results)


@pytest.mark.cpu_only
def test_more_threads_than_rows_or_cores() -> None:
    module = build("GRU", 3, 5)
    leaves = leaves_for(module, 4, 2)
    one = evaluate(module, leaves, backward=False)
    many = evaluate(module, leaves, on_threads(plain, 16), backward=False)
    assert_bitwise(many, one)


@pytest.mark.cpu_only
def test_the_number_of_threads_is_torchs() -> None:
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert rnnkern.build_info()["threads"] == threads
        build("LSTM", 40, 150)(torch.randn(3, 70, 40))
        assert torch.get_num_threads() == threads


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_called_from_several_python_threads(kind: str, threads: int) -> None:
    """One module used by four threads at once, forward and backward, gives each what it would get
    alone.
    """
    torch.set_num_threads(threads)
    module = build(kind, 11, 65, num_layers=2, bidirectional=True)
    inputs = [torch.randn(6, n, 11) for n in (1, 9, 2, 24) * 3]

    def work(x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = x.clone().requires_grad_()
        y, _ = module(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x)
        return {"y": y.detach(), "dx": dx}

    alone = [work(x) for x in inputs]
    ready = threading.Barrier(4)

    def start() -> None:
        torch.set_num_threads(threads)
        ready.wait(30)

    with ThreadPoolExecutor(4, initializer=start) as pool:
        together = list(pool.map(work, inputs))
    for mine, expected in zip(together, alone, strict=True):
        assert torch.equal(mine["y"], expected["y"])
        torch.testing.assert_close(mine["dx"], expected["dx"])


@pytest.mark.cpu_only
@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", LAYERS)
def test_after_a_fork(kind: str, threads: int) -> None:
    """A child forked after the parent used its threads computes the same, and so does the parent
    afterwards.
    """
    assert in_a_process(subprocesses.forks, kind, threads) == ("same", 0, True)
