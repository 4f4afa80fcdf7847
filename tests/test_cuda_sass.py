"""The lint of the CUDA kernels' machine code, on a short listing that has all it looks for."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

tools = Path(__file__).parents[1] / "tools"
pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(not tools.exists(), reason="not in a checkout"),
    pytest.mark.skipif(not shutil.which("c++filt"), reason="needs c++filt"),
]

NAME = (
    "_ZN7rnnkern3gpu10run_kernelINS0_15ResidentForwardINS_4Bf16ES3_NS0_4LstmEXtlNS_4cuda9TileShape"
    "ELi2ELi2ELi3EEEEEEEvNT_9ArgumentsE"
)
# A loop over steps: look at flags, load and multiply, sums, cell, flag.
LOOP = """
.L_step:
@look
.L_look:
 LDG.E.STRONG.GPU R0, desc[UR4][R2.64]
 ISETP.GE.AND P0, PT, R0, R1, PT
 @!P0 BRA `(.L_look)
 CCTL.IVALL
@load
 LDG.E.128.STRONG.GPU R4, desc[UR4][R2.64]
 LDG.E.128.STRONG.GPU R8, desc[UR4][R2.64+0x40]
 LDG.E.128.STRONG.GPU R12, desc[UR4][R2.64+0x80]
 HMMA.16816.F32.BF16 R20, R24, R4, RZ
 STS.64 [R30], R20
 BAR.SYNC.DEFER_BLOCKING 0x0
@sums
 LDS R0, [R31]
@cell
 BAR.SYNC.DEFER_BLOCKING 0x0
 @P1 MEMBAR.ALL.GPU
 @P1 STG.E.STRONG.GPU desc[UR4][R2.64], R9
@end
 @P2 BRA `(.L_step)
 EXIT
"""
PACK = " LDG.E.U16 R0, desc[UR4][R2.64]\n" * 20 + " STS.128 [R3], R0\n"


def listing(pack: str = PACK, **more: str) -> str:
    """As nvdisasm prints a kernel, with more instructions at the places of LOOP."""
    text = pack + LOOP
    for place in ("look", "load", "sums", "cell", "end"):
        text = text.replace(f"@{place}\n", more.get(place, "") and more[place] + "\n")
    lines = [
        line if line.startswith(".") else f"        /*{16 * i:04x}*/  {line.strip()} ;"
        for i, line in enumerate(text.splitlines())
        if line.strip()
    ]
    head = ["\t.target\tsm_90a", f'\t.section\t.text.{NAME},"ax",@progbits']
    return "\n".join(head + lines)


@pytest.fixture
def lint(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    monkeypatch.syspath_prepend(str(tools))
    import cuda_sass

    return cuda_sass


def excesses(lint, text: str) -> list[str]:  # type: ignore[no-untyped-def]
    (kernel,) = lint.kernels(text)
    where = f"{kernel.architecture} {kernel.name}"
    found: list[str] = lint.figures(kernel).excesses(lint.limits_of(where))
    return found


def test_what_is_counted(lint) -> None:  # type: ignore[no-untyped-def]
    (kernel,) = lint.kernels(listing(load=" IADD3 R1, R1, R1, RZ\n" * 3, cell=" FADD R1, R1, R1"))
    assert kernel.name.startswith("ResidentForward<Bf16, Bf16, Lstm")
    assert kernel.architecture == "sm_90a"
    seen = lint.figures(kernel)
    assert seen.load == 7  # two of the look, the invalidation, three more, and the load itself
    assert (seen.sums, seen.cell, seen.ahead) == (1, 2, 3)
    assert (seen.calls, seen.fences, seen.invalidations, seen.local) == (0, 1, 1, 0)
    assert seen.pack == pytest.approx(21 / 20)


TOO_MUCH = {
    "load": {"load": " IADD3 R1, R1, R1, RZ\n" * 30},
    "sums": {"sums": " IADD3 R1, R1, R1, RZ\n" * 30},
    "cell": {"cell": " FADD R1, R1, R1\n" * 400},
    "pack": {"pack": (" LDG.E.U16 R0, desc[UR4][R2.64]\n" + " PRMT R1, R1, R1, R1\n" * 30) * 20},
    "calls": {"cell": " CALL.REL.NOINC `($__internal_2_$__cuda_sm3x_div_rn_ftz_f32_slowpath)"},
    "fences": {"end": " MEMBAR.ALL.GPU"},
    "invalidations": {"load": " CCTL.IVALL"},
    "local": {"end": " STL [R1], R2"},
}


@pytest.mark.parametrize("figure", TOO_MUCH)
def test_each_figure_has_a_limit(figure: str, lint) -> None:  # type: ignore[no-untyped-def]
    assert excesses(lint, listing()) == []
    (excess,) = excesses(lint, listing(**TOO_MUCH[figure]))
    assert excess.startswith(f"{figure} is ")


def test_too_few_loads_ahead(lint) -> None:  # type: ignore[no-untyped-def]
    text = listing().replace("LDG.E.128.STRONG.GPU R12", "MOV R12")
    assert excesses(lint, text) == ["ahead is 2, at least 3"]


def test_meeting_a_warp_that_diverged_is_no_call(lint) -> None:  # type: ignore[no-untyped-def]
    assert (
        excesses(lint, listing(end=" CALL.REL.NOINC `($__internal_1_$__cuda_sm70_warpsync)")) == []
    )


def test_a_kernel_without_the_loop_is_an_error(lint) -> None:  # type: ignore[no-untyped-def]
    (kernel,) = lint.kernels(listing().replace("LDG.E.STRONG.GPU", "LDG.E"))
    with pytest.raises(ValueError, match="no loop waits for flags"):
        lint.figures(kernel)
