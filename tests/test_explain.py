"""`rnnkern.explain` and `rnnkern.build_info`."""

from __future__ import annotations

import re

import pytest
import torch
from support import CELLS, LAYERS, Seen, build, pack_rows
from torch import nn

import rnnkern


def test_explain_of_what_will_not_run() -> None:
    module = build("GRU", 3, 4)
    assert "shape (3,)" in str(rnnkern.explain(module, torch.randn(3)))
    assert "input_size is 3" in str(rnnkern.explain(module, torch.randn(5, 2, 7)))


@pytest.mark.cpu_only
def test_explain_counts_the_steps_that_are_taken() -> None:
    module = build("GRU", 3, 4)
    packed = pack_rows([torch.randn(4, 3), torch.randn(1, 3)])
    mflop = 2 * 3 * 4 * (3 + 4) * 5e-6
    assert f"{mflop:.3g} MFLOP" in str(rnnkern.explain(module, packed))


@pytest.mark.cpu_only
def test_explain_tells_backward_from_forward() -> None:
    """Backward has no input product, and twice as much to compute."""
    text = str(rnnkern.explain(build("LSTM", 8, 16), torch.randn(40, 2, 8)))
    forward, backward = text.splitlines()[1:]
    work = [float(line.split("; ")[-1].removesuffix(" MFLOP")) for line in (forward, backward)]
    assert "input product of" in forward
    assert "input product of" not in backward
    assert work[1] == pytest.approx(2 * work[0], rel=0.01)


@pytest.mark.cpu_only
def test_explain_names_the_instruction_set_that_runs() -> None:
    isa = rnnkern.build_info()["isa"]
    for H in (3, 64):
        text = str(rnnkern.explain(build("LSTM", 3, H), torch.randn(4, 1, 3)))
        assert f"forward: {isa}," in text


@pytest.mark.cpu_only
@pytest.mark.parametrize("kind", [*LAYERS, *CELLS])
def test_explain_says_when_w_hh_is_not_read(kind: str) -> None:
    """One step from zeros leaves out the product with h (`docs/design.md`)."""
    module, is_cell = build(kind, 3, 4), kind in CELLS
    words = "W_hh not read, because one step starts from zeros"
    x = torch.randn(3, 2, 3)
    step, state = (
        (x[0] if is_cell else x[:1]),
        torch.zeros(2, 4) if is_cell else x.new_zeros(1, 2, 4),
    )
    hx = (state, state) if "LSTM" in kind else state
    assert str(rnnkern.explain(module, step)).count(words) == 2
    assert words not in str(rnnkern.explain(module, step, hx))
    if not is_cell:
        assert words not in str(rnnkern.explain(module, x))


@pytest.mark.cpu_only
def test_explain_of_a_cell_without_w_hh() -> None:
    text = str(
        rnnkern.explain(rnnkern.Recurrent(rnnkern.cells.ind_rnn, 3, 4), torch.randn(5, 2, 3))
    )
    assert text.count("; no W_hh; ") == 2


def test_explain_where_operators_run() -> None:
    module, x = build("GRU", 4, 6), torch.randn(5, 2, 4)
    with Seen():
        assert "torch.ops.rnnkern" in str(rnnkern.explain(module, x))
    assert "torch.ops.rnnkern" in str(rnnkern.explain(module.to("meta"), x.to("meta")))


@pytest.mark.parametrize("kind", CELLS)
def test_explain_takes_cells(kind: str) -> None:
    explanation = str(rnnkern.explain(build(kind, 4, 6), torch.randn(3, 4)))
    assert "T=1 N=3 I=4 H=6" in explanation
    assert "forward" in explanation
    with pytest.raises(TypeError, match=rf"rnnkern.*torch.nn.{kind}"):
        rnnkern.explain(getattr(nn, kind)(4, 6), torch.randn(3, 4))


@pytest.mark.parametrize("kind", LAYERS)
def test_explain(kind: str) -> None:
    module = build(kind, 4, 6)
    x = torch.randn(5, 3, 4)
    kernel = rnnkern.explain(module, x)
    assert "torch.nn" not in str(kernel)
    if x.device.type == "cpu":
        assert rnnkern.build_info()["isa"] in str(kernel)
    assert repr(kernel) == str(kernel)
    fallback = rnnkern.explain(
        module.to(torch.complex64), torch.randn(5, 3, 4, dtype=torch.complex64)
    )
    assert "torch.nn" in str(fallback)
    assert re.search("dtype|complex64", str(fallback))


@pytest.mark.cpu_only
def test_build_info() -> None:
    info = rnnkern.build_info()
    keys = {"version", "compiler", "cuda", "isa", "isa_compiled", "openmp", "torch", "threads"}
    assert keys <= info.keys()
    assert info["version"] == rnnkern.__version__
    assert info["torch"] == torch.__version__
