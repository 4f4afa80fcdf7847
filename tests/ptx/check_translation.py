"""Single instructions of PTX, against the PTX ISA, and what a translation refuses.

Run by tools/ptx.sh.
"""

from __future__ import annotations

import ctypes
import math
import random
import struct
from collections.abc import Callable
from dataclasses import replace

import pytest
from kernels import compile_library, differing
from ptx import Instruction, UnknownInstruction, parse
from translate import to_cpp

MODULE = """
.version 9.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 memory[];
.visible .entry test(
	.param .align 8 .b8 test_param_0[16]
)
.maxntid 256, 1, 1
{
	.reg .pred %p<9>;
	.reg .b16 %rs<9>;
	.reg .b32 %r<40>;
	.reg .b64 %rd<9>;
	.reg .f32 %f<9>;
	.reg .f64 %fd<9>;
	ld.param.u64 %rd1, [test_param_0];
	ld.param.u64 %rd2, [test_param_0+8];
	mov.u32 %r1, %tid.x;
	mov.u32 %r2, %ctaid.x;
	BODY
	ret;
}
"""


def run(
    name: str,
    body: str,
    data: bytearray,
    *,
    blocks: int = 1,
    threads: int = 32,
    shared_bytes: int = 256,
    seed: int = 1,
) -> None:
    """Runs that PTX, with %rd1 the address of the data, %rd2 their size, %r1 the thread and %r2 the
    block.
    """
    module = parse(MODULE.replace("BODY", body), "test.ptx")
    library = ctypes.CDLL(str(compile_library(f"test-{name}", module, module.kernels)))
    library.run_kernel.restype = ctypes.c_char_p
    memory = (ctypes.c_char * len(data)).from_buffer(data)
    parameters = struct.pack("QQ", ctypes.addressof(memory), len(data))
    problem = library.run_kernel(
        b"test", parameters, ctypes.c_size_t(16), blocks, threads, ctypes.c_size_t(shared_bytes),
        seed,
    )  # fmt: skip
    if problem:
        raise RuntimeError(problem.decode())


def f32(x: float) -> str:
    return "0f" + struct.pack(">f", x).hex()


def f64(x: float) -> str:
    return "0d" + struct.pack(">d", x).hex()


NAN, INF, DENORMAL = math.nan, math.inf, 2.0**-140

# Instructions with destination D, and what it is then, as an integer of 32 or 64 bits, a float or a
# truth. By the descriptions of the ISA.
INSTRUCTIONS: list[tuple[str, str, float]] = [
    ("add.s32 D, 2147483647, 1", "r", -(2**31)),
    ("sub.s64 D, 3, 5", "rd", -2),
    ("mul.lo.s32 D, 65537, 65537", "r", 131073),
    ("mul.wide.s32 D, -65536, 65536", "rd", -(2**32)),
    ("mul.wide.u32 D, -1, -1", "rd", (2**32 - 1) ** 2 - 2**64),
    ("mul.hi.u32 D, -1, -1", "r", -2),
    ("mad.lo.s32 D, 3, -4, 5", "r", -7),
    ("div.s32 D, -7, 2", "r", -3),
    ("rem.s32 D, -7, 2", "r", -1),
    ("div.u32 D, -1, 2", "r", 2**31 - 1),
    ("div.s32 D, 5, 0", "r", -1),
    ("min.s64 D, -1, 1", "rd", -1),
    ("max.u32 D, -1, 1", "r", -1),
    ("and.b32 D, 12, 10", "r", 8),
    ("or.b32 D, 12, 10", "r", 14),
    ("xor.b32 D, 12, 10", "r", 6),
    ("not.b32 D, 0", "r", -1),
    ("neg.s32 D, 5", "r", -5),
    ("shl.b32 D, 1, 31", "r", -(2**31)),
    ("shl.b32 D, 1, 32", "r", 0),
    ("bfi.b32 D, 5, 9, 2, 1", "r", 13),
    ("bfi.b32 D, 0, -1, 30, 8", "r", 2**30 - 1),
    ("bfi.b32 D, -1, 0, 4, 32", "r", -16),
    ("bfi.b32 D, -1, 7, 3, 0", "r", 7),
    ("shr.u32 D, -1, 31", "r", 1),
    ("shr.u32 D, -1, 32", "r", 0),
    ("shr.s32 D, -8, 40", "r", -1),
    ("shr.s64 D, -8, 1", "rd", -4),
    ("cvt.s64.s32 D, -1", "rd", -1),
    ("cvt.u64.u32 D, -1", "rd", 2**32 - 1),
    ("cvt.s32.s8 D, 255", "r", -1),
    ("cvt.rn.f32.s32 D, -3", "f", -3.0),
    (f"add.ftz.f32 D, {f32(1)}, {f32(2)}", "f", 3.0),
    (f"add.f32 D, {f32(DENORMAL)}, {f32(DENORMAL)}", "f", 2 * DENORMAL),
    (f"add.ftz.f32 D, {f32(DENORMAL)}, {f32(DENORMAL)}", "f", 0.0),
    (f"mul.ftz.f32 D, {f32(2.0**-100)}, {f32(2.0**-40)}", "f", 0.0),
    (f"mul.f64 D, {f64(2.0**-600)}, {f64(2.0**-460)}", "fd", 2.0**-1060),
    (f"fma.rn.ftz.f32 D, {f32(1 + 2**-12)}, {f32(1 - 2**-12)}, {f32(-1)}", "f", -(2.0**-24)),
    (f"div.rn.ftz.f32 D, {f32(1)}, {f32(0)}", "f", INF),
    (f"rcp.rn.ftz.f32 D, {f32(4)}", "f", 0.25),
    (f"neg.ftz.f32 D, {f32(1)}", "f", -1.0),
    (f"abs.f64 D, {f64(-2)}", "fd", 2.0),
    (f"min.ftz.f32 D, {f32(NAN)}, {f32(1)}", "f", 1.0),
    (f"max.ftz.f32 D, {f32(1)}, {f32(NAN)}", "f", 1.0),
    (f"max.ftz.NaN.f32 D, {f32(1)}, {f32(NAN)}", "f", NAN),
    ("setp.lt.s32 D, -1, 1", "p", True),
    ("setp.lt.u32 D, -1, 1", "p", False),
    ("setp.hi.u32 D, -1, 1", "p", True),
    (f"setp.lt.ftz.f32 D, {f32(NAN)}, {f32(1)}", "p", False),
    (f"setp.ne.ftz.f32 D, {f32(NAN)}, {f32(1)}", "p", False),
    (f"setp.neu.ftz.f32 D, {f32(NAN)}, {f32(1)}", "p", True),
    (f"setp.geu.ftz.f32 D, {f32(NAN)}, {f32(1)}", "p", True),
    (f"setp.nan.f64 D, {f64(NAN)}, {f64(1)}", "p", True),
    (f"setp.eq.ftz.f32 D, {f32(DENORMAL)}, {f32(0)}", "p", True),
    (f"cvt.rna.tf32.f32 D, {f32(1 + 2**-11)}", "r", 0x3F802000),
    ("mov.b64 D, {1, 2}", "rd", 2**33 + 1),
    (f"cvt.rn.bf16x2.f32 D, {f32(1)}, {f32(1 + 2**-8)}", "r", 0x3F803F80),
    (f"cvt.rn.bf16x2.f32 D, {f32(-INF)}, {f32(1 + 3 * 2**-8)}", "r", 0xFF803F82 - 2**32),
    (f"cvt.rn.f16x2.f32 D, {f32(65519)}, {f32(65520)}", "r", 0x7BFF7C00),
    (f"cvt.rn.f16x2.f32 D, {f32(2.0**-24)}, {f32(-(2.0**-25))}", "r", 0x00018000),
    (f"cvt.rn.f16x2.f32 D, {f32(1 + 2**-11)}, {f32(2 - 2**-12)}", "r", 0x3C004000),
    ("cvt.f32.f16 D, 15360", "f", 1.0),
    ("cvt.f32.f16 D, 32769", "f", -(2.0**-24)),
    ("cvt.f32.f16 D, 31744", "f", INF),
]  # fmt: skip
FORMATS = {"r": "<i4x", "rd": "<q", "f": "<f4x", "fd": "<d", "p": "<q"}
STORES = {
    "r": "st.global.u32 [%rd1+{}], %r3",
    "rd": "st.global.u64 [%rd1+{}], %rd3",
    "f": "st.global.f32 [%rd1+{}], %f3",
    "fd": "st.global.f64 [%rd1+{}], %fd3",
    "p": "selp.u64 %rd3, 1, 0, %p3;\nst.global.u64 [%rd1+{}], %rd3",
}


def test_arithmetic() -> None:
    lines = []
    for i, (text, kind, _) in enumerate(INSTRUCTIONS):
        lines += [text.replace("D", f"%{kind}3", 1), STORES[kind].format(8 * i)]
    data = bytearray(8 * len(INSTRUCTIONS))
    run("arithmetic", ";\n".join(lines) + ";", data)
    wrong = []
    for i, (text, kind, wanted) in enumerate(INSTRUCTIONS):
        (found,) = struct.unpack_from(FORMATS[kind], data, 8 * i)
        if found != wanted and not (math.isnan(wanted) and math.isnan(found)):
            wrong.append(f"{text}: {found}, wanted {wanted}")
    assert not wrong


def test_an_approximation_is_not_exact() -> None:
    """So that nothing depends on the last bit of it."""
    data = bytearray(8)
    run("rcp", f"rcp.approx.ftz.f32 %f1, {f32(3)};\nst.global.f32 [%rd1], %f1;", data)
    (found,) = struct.unpack_from("f", data)
    (exact,) = struct.unpack("f", struct.pack("f", 1 / 3))
    assert 0 < abs(found - exact) <= 2.0**-25


@pytest.mark.parametrize(("mode", "source"), [("bfly", lambda i: i ^ 5), ("idx", lambda _: 5)])
def test_shuffles(mode: str, source: Callable[[int], int]) -> None:
    data = bytearray(32 * 4)
    lines = [
        f"shfl.sync.{mode}.b32 %r3|%p1, %r1, 5, 31, -1",
        "mul.wide.u32 %rd3, %r1, 4",
        "add.s64 %rd4, %rd1, %rd3",
        "st.global.u32 [%rd4], %r3",
    ]
    run(f"shfl-{mode}", ";\n".join(lines) + ";", data)
    assert list(struct.unpack("32i", data)) == [source(i) for i in range(32)]


@pytest.mark.parametrize("lane", [None, 0, 31])
def test_votes(lane: int | None) -> None:
    """Whether one lane, or none, brings true."""
    data = bytearray(32 * 4)
    lines = [
        f"setp.eq.s32 %p1, %r1, {-1 if lane is None else lane}",
        "vote.sync.any.pred %p2, %p1, -1",
        "selp.u32 %r3, 1, 0, %p2",
        "mul.wide.u32 %rd3, %r1, 4",
        "add.s64 %rd4, %rd1, %rd3",
        "st.global.u32 [%rd4], %r3",
    ]
    run(f"vote-{lane}", ";\n".join(lines) + ";", data)
    assert set(struct.unpack("32i", data)) == {int(lane is not None)}


# Products of tensor cores: the fragments of the ISA's figures, as (row, k), (k, column) and (row,
# column) of each number that lane `4 g + q` has.
def fragment_a(lane: int, depth: int) -> list[tuple[int, int]]:
    g, q = divmod(lane, 4)
    if depth == 8:
        return [(g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4)]
    return [(g + 8 * (i // 2 % 2), 2 * q + i % 2 + 8 * (i // 4)) for i in range(8)]


def fragment_b(lane: int, depth: int) -> list[tuple[int, int]]:
    g, q = divmod(lane, 4)
    if depth == 8:
        return [(q, g), (q + 4, g)]
    return [(2 * q + i % 2 + 8 * (i // 2), g) for i in range(4)]


def fragment_c(lane: int) -> list[tuple[int, int]]:
    g, q = divmod(lane, 4)
    return [(g, 2 * q), (g, 2 * q + 1), (g + 8, 2 * q), (g + 8, 2 * q + 1)]


PRODUCTS: dict[str, tuple[int, Callable[[float], bytes]]] = {
    "m16n8k16.row.col.f32.bf16.bf16.f32": (16, lambda x: struct.pack("<f", x)[2:]),
    "m16n8k16.row.col.f32.f16.f16.f32": (16, lambda x: struct.pack("<e", x)),
    "m16n8k8.row.col.f32.tf32.tf32.f32": (8, lambda x: struct.pack("<f", x)),
}


@pytest.mark.parametrize("shape", PRODUCTS)
def test_products_of_tensor_cores(shape: str) -> None:
    depth, packed = PRODUCTS[shape]
    draw = random.Random(1)
    a = [[draw.randint(-9, 9) for _ in range(depth)] for _ in range(16)]
    b = [[draw.randint(-9, 9) for _ in range(8)] for _ in range(depth)]
    c = [[draw.randint(-9, 9) for _ in range(8)] for _ in range(16)]
    data = bytearray()
    for lane in range(32):
        data += b"".join(packed(a[m][k]) for m, k in fragment_a(lane, depth))
        data += b"".join(packed(b[k][n]) for k, n in fragment_b(lane, depth))
        data += struct.pack("4f", *(c[m][n] for m, n in fragment_c(lane)))
    size = len(data) // 32
    loads = [f"ld.global.u32 %r{10 + i}, [%rd4+{4 * i}];" for i in range(6)]
    loads += [f"ld.global.f32 %f{i + 1}, [%rd4+{24 + 4 * i}];" for i in range(4)]
    stores = [f"st.global.f32 [%rd4+{24 + 4 * i}], %f{i + 1};" for i in range(4)]
    sums = "{%f1, %f2, %f3, %f4}"
    mma = f"mma.sync.aligned.{shape} {sums}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {sums};"
    address = [f"mul.wide.u32 %rd3, %r1, {size};", "add.s64 %rd4, %rd1, %rd3;"]
    run(f"mma-{shape}", "\n".join([*address, *loads, mma, *stores]), data)
    for lane in range(32):
        found = struct.unpack_from("4f", data, lane * size + 24)
        for number, (m, n) in zip(found, fragment_c(lane), strict=True):
            assert number == c[m][n] + sum(a[m][k] * b[k][n] for k in range(depth))


# Block 0 reads what is to come from block 1, once and again when the flag is there.
MESSAGE = """
	setp.eq.s32 %p1, %r2, 1;
	@%p1 bra $write;
	LOAD %r3, [%rd1];
$again:
	ld.relaxed.gpu.global.s32 %r4, [%rd1+32];
	setp.lt.s32 %p2, %r4, 1;
	@%p2 bra $again;
	ACQUIRE %r4, [%rd1+32];
	FENCE_1
	LOAD %r3, [%rd1];
	st.global.u32 [%rd1+64], %r3;
	bra.uni $end;
$write:
	st.global.u32 [%rd1], 7;
	FENCE_2
	RELEASE [%rd1+32], 1;
$end:
"""


@pytest.mark.parametrize(
    ("load", "acquires", "releases", "arrives"),
    [
        ("ld.global.u32", True, True, True),
        ("ld.global.cg.u32", False, True, True),
        ("ld.global.u32", False, True, False),
        ("ld.global.u32", True, False, False),
        ("ld.global.cg.u32", True, False, False),
    ],
)
@pytest.mark.parametrize("fences", [False, True], ids=["", "fences"])
def test_messages_in_weak_memory(
    load: str,
    acquires: bool,
    releases: bool,
    arrives: bool,
    fences: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RNNKERN_SIMT_WEAK", "1")
    acquire = "ld.acquire" if acquires and not fences else "ld.relaxed"
    release = "st.release" if releases and not fences else "st.relaxed"
    body = MESSAGE.replace("LOAD", load)
    body = body.replace("ACQUIRE", f"{acquire}.gpu.global.s32")
    body = body.replace("RELEASE", f"{release}.gpu.global.s32")
    body = body.replace("FENCE_1", "fence.acquire.gpu;" if acquires and fences else "")
    body = body.replace("FENCE_2", "fence.acq_rel.gpu;" if releases and fences else "")
    arrived = set()
    for seed in range(20):
        data = bytearray(128)
        run(f"message-{load}-{acquires}-{releases}-{fences}", body, data, blocks=2, seed=seed)
        arrived.add(struct.unpack_from("i", data, 64)[0] == 7)
    assert arrived == {True} if arrives else False in arrived


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("ld.global.u32 %r3, [%rd1+2];", "no multiple"),
        ("mov.u32 %r3, memory;\nst.shared.u32 [%r3+256], 1;", "byte 256 of 256 of shared memory"),
        ("setp.eq.s32 %p1, %r1, 0;\n@%p1 bra $l;\nbar.warp.sync -1;\n$l:\nbar.warp.sync -1;",
         "different instructions"),
        ("setp.eq.s32 %p1, %r1, 0;\n@%p1 bra $l;\nbar.sync 0;\n$l:", "at barriers"),
        ("bar.warp.sync 1;", "part of a warp"),
        ("trap;", "trapped"),
    ],
)  # fmt: skip
def test_what_goes_wrong_in_a_kernel_is_said(body: str, problem: str) -> None:
    with pytest.raises(RuntimeError, match=problem):
        run(f"wrong-{problem.replace(' ', '-')}", body, bytearray(64))


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("sin.approx.f32 %f1, %f2;", r"test.ptx:21: sin\.approx\.f32 %f1, %f2: no form"),
        ("@%p1 add.sat.s32 %r1, %r2, %r3;", r"@%p1 add\.sat\.s32"),
        ("ld.global.nc.u32 %r1, [%rd1];", r"ld\.global\.nc\.u32"),
        ("mov.u32 %r1, %clock;", r"%clock"),
        ("bar.sync 1;", r"bar\.sync 1"),
        ("add.s32 %r1, %r2;", r"add\.s32 %r1, %r2"),
        ("mma.sync.aligned.m16n8k16.row.col.f32.e4m3.e4m3.f32 {%f1}, {%r1}, {%r2}, {%f1};", "e4m3"),
        (".local .align 4 .b8 depot[8];", r"\.local"),
    ],
)
def test_an_unknown_instruction_is_named(body: str, named: str) -> None:
    with pytest.raises(UnknownInstruction, match=named):
        to_cpp(parse(MODULE.replace("BODY", body), "test.ptx"))


def test_kernels_of_another_architecture_are_found() -> None:
    ours, same = (parse(MODULE.replace("BODY", "add.s32 %r1, %r1, 1;")) for _ in range(2))
    other = parse(MODULE.replace("BODY", "sub.s32 %r1, %r1, 1;").replace("sm_90a", "sm_80"))
    assert differing(ours, same) == []
    assert differing(ours, other) == list(other.kernels)


def test_a_kernel_can_be_changed() -> None:
    (kernel,) = parse(MODULE.replace("BODY", "add.s32 %r1, %r1, 1;")).kernels

    def change(i: Instruction) -> Instruction | None:
        return None if i.opcode == "ret" else replace(i, opcode=i.opcode.replace("add", "sub"))

    opcodes = [i.opcode for i in kernel.changed(change).instructions()]
    assert opcodes[-1] == "sub.s32"
    assert len(opcodes) == len(list(kernel.instructions())) - 1
