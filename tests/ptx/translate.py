"""From PTX to C++ that runs on the fibers of tests/simt.

Each instruction becomes one line, of plain C++ or of a call to what machine.h has for it. A form
of instruction is a function below, found by a pattern that matches its whole name with all of its
modifiers. So an instruction without such a function stops the translation:

    UnknownInstruction: scan.ptx:17: sin.approx.f32 %f2, %f1: no form for it

A new one is a new function, or one more word in a pattern.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache

from ptx import Brace, Instruction, Kernel, Label, Module, Registers, UnknownInstruction

_SPECIAL = {"%tid.x": "tid", "%ntid.x": "ntid()", "%ctaid.x": "ctaid()", "%nctaid.x": "nctaid()"}


def _size(type_: str) -> int:
    return int(type_[1:])


@dataclass
class Context:
    """The registers of a kernel, and how operands are written in C++."""

    kernel: Kernel
    shared: frozenset[str]
    types: dict[str, str] = field(default_factory=dict)  # of registers

    def value(self, operand: str, type_: str) -> str:
        """An operand as a number of that type."""
        if operand in _SPECIAL:
            return f"{type_}(t.{_SPECIAL[operand]})"
        if operand in self.types:
            return _converted(_variable(operand), self.types[operand], type_)
        if re.fullmatch(r"0[fF][0-9A-Fa-f]{8}", operand):
            return _converted(f"bits<f32>(0x{operand[2:]}u)", "f32", type_)
        if re.fullmatch(r"0[dD][0-9A-Fa-f]{16}", operand):
            return _converted(f"bits<f64>(u64(0x{operand[2:]}))", "f64", type_)
        if re.fullmatch(r"-?\d+|-?0x[0-9A-Fa-f]+", operand):
            number = int(operand, 0) % 2**64
            if type_ == "pred":
                return str(bool(number)).lower()
            if type_.startswith("f"):
                return f"bits<{type_}>(b{_size(type_)}({number}u))"
            return f"{type_}({number}u)"
        if operand == f"{self.kernel.name}_param_0":
            return "t.parameters()"
        if operand in self.shared:
            return f"{type_}(0)"  # there is nothing else in shared memory
        raise UnknownInstruction(f"no meaning for the operand {operand}")

    def address(self, operand: str) -> str:
        match = re.fullmatch(r"\[([^\]+]+)(?:\+(-?\d+))?\]", operand)
        if not match:
            raise UnknownInstruction(f"no meaning for the address {operand}")
        base = self.value(match[1], "u64")
        return f"{base} + {int(match[2]) % 2**64}u" if match[2] else base

    def set(self, register: str, expression: str, type_: str) -> str:
        """Assigns a number of that type to a register, which may be wider."""
        return f"{_variable(register)} = {_converted(expression, type_, self.types[register])};"


def _variable(register: str) -> str:
    return f"{register[1:]}_"  # %f32 is no type


def _converted(expression: str, have: str, want: str) -> str:
    """Bits are kept where floating point meets integers; integers are cut or extended, by the sign
    if they have one.
    """
    if have == want:
        return expression
    if "pred" in (have, want):
        raise UnknownInstruction(f"a {have} in place of a {want}")
    if "f" in (have[0], want[0]):
        if _size(have) == _size(want):
            return f"bits<{want}>({expression})"
        whole = "b" + have[1:]
        if have[0] == "f":
            return f"{want}(bits<{whole}>({expression}))"
        return f"bits<{want}>(b{_size(want)}({expression}))"
    return f"{want}({expression})"


def group(operand: str) -> list[str]:
    """`{a, b}` as a list."""
    return [part.strip() for part in operand.strip("{}").split(",")]


Form = Callable[..., str]
_FORMS: list[tuple[re.Pattern[str], Form]] = []


def form(pattern: str) -> Callable[[Form], Form]:
    """Of instructions whose whole name matches: groups of the pattern are keywords of the function,
    which takes the context, the line and the operands and returns a statement.
    """

    def add(function: Form) -> Form:
        _FORMS.append((re.compile(pattern), function))
        return function

    return add


@cache
def _form_of(opcode: str) -> tuple[Form, dict[str, str]] | None:
    for pattern, function in _FORMS:
        if match := pattern.fullmatch(opcode):
            return function, {name: found or "" for name, found in match.groupdict().items()}
    return None


_INTEGER = r"(?P<type>[su](?:16|32|64))"
_FLOAT = r"(?P<ftz>\.ftz)?\.(?P<type>f32|f64)"


def _operator(name: str) -> str:
    names = {"add": "+", "sub": "-", "mul": "*", "mul.lo": "*", "div": "/", "and": "&", "or": "|"}
    return {**names, "xor": "^"}[name]


def _flushed(expression: str, ftz: str) -> str:
    return f"flushed({expression})" if ftz else expression


@form(rf"(?P<name>add|sub|mul\.lo)\.{_INTEGER}")
def integer_arithmetic(
    c: Context, line: int, d: str, a: str, b: str, *, name: str, type: str
) -> str:
    wide = "u64" if type.endswith("64") else "u32"  # it wraps, and 16 bits would become an int
    x, y = (f"{wide}({c.value(operand, type)})" for operand in (a, b))
    return c.set(d, f"{type}({x} {_operator(name)} {y})", type)


@form(rf"mad\.lo\.{_INTEGER}")
def multiply_add(c: Context, line: int, d: str, a: str, b: str, e: str, *, type: str) -> str:
    wide = "u64" if type.endswith("64") else "u32"
    x, y, z = (f"{wide}({c.value(operand, type)})" for operand in (a, b, e))
    return c.set(d, f"{type}({x} * {y} + {z})", type)


@form(r"mul\.wide\.(?P<sign>[su])(?P<size>16|32)")
def multiply_wide(c: Context, line: int, d: str, a: str, b: str, *, sign: str, size: str) -> str:
    narrow, wide = sign + size, f"{sign}{2 * int(size)}"
    x, y = (f"{wide}({c.value(operand, narrow)})" for operand in (a, b))
    return c.set(d, f"{x} * {y}", wide)


@form(r"mul\.hi\.(?P<type>[su]32)")
def multiply_high(c: Context, line: int, d: str, a: str, b: str, *, type: str) -> str:
    x, y = (f"{type[0]}64({c.value(operand, type)})" for operand in (a, b))
    return c.set(d, f"{type}({x} * {y} >> 32)", type)


@form(rf"(?P<name>div|rem|min|max)\.{_INTEGER}")
def integer_function(c: Context, line: int, d: str, a: str, b: str, *, name: str, type: str) -> str:
    names = {"div": "quotient", "rem": "remainder", "min": "least", "max": "greatest"}
    return c.set(d, f"{names[name]}<{type}>({c.value(a, type)}, {c.value(b, type)})", type)


@form(r"(?P<name>and|or|xor)\.(?P<type>pred|b16|b32|b64)")
def logic(c: Context, line: int, d: str, a: str, b: str, *, name: str, type: str) -> str:
    return c.set(d, f"{type}({c.value(a, type)} {_operator(name)} {c.value(b, type)})", type)


@form(r"not\.(?P<type>pred|b16|b32|b64)")
def complement(c: Context, line: int, d: str, a: str, *, type: str) -> str:
    return c.set(d, f"{type}({'!' if type == 'pred' else '~'}{c.value(a, type)})", type)


@form(r"neg\.(?P<type>s16|s32|s64)")
def negative(c: Context, line: int, d: str, a: str, *, type: str) -> str:
    unsigned = "u64" if type == "s64" else "u32"
    return c.set(d, f"{type}(0 - {unsigned}({c.value(a, type)}))", type)


@form(r"(?P<name>shl|shr)\.(?P<type>[bsu](?:16|32|64))")
def shift(c: Context, line: int, d: str, a: str, b: str, *, name: str, type: str) -> str:
    function = "shift_left" if name == "shl" else "shift_right"
    return c.set(d, f"{function}<{type}>({c.value(a, type)}, {c.value(b, 'u32')})", type)


@form(r"bfi\.(?P<type>b32|b64)")
def insert_bits(
    c: Context, line: int, d: str, a: str, b: str, begin: str, count: str, *, type: str
) -> str:
    numbers = [*(c.value(x, type) for x in (a, b)), *(c.value(x, "u32") for x in (begin, count))]
    return c.set(d, f"bits_inserted<{type}>({', '.join(numbers)})", type)


@form(rf"(?P<name>add|sub|mul|div)(?P<rounded>\.rn)?{_FLOAT}")
def float_arithmetic(
    c: Context, line: int, d: str, a: str, b: str, *, name: str, rounded: str, ftz: str, type: str
) -> str:
    if name == "div" and not rounded:
        raise UnknownInstruction("div without .rn")
    x, y = (_flushed(c.value(operand, type), ftz) for operand in (a, b))
    return c.set(d, _flushed(f"{x} {_operator(name)} {y}", ftz), type)


@form(rf"fma\.rn{_FLOAT}")
def fused_multiply_add(
    c: Context, line: int, d: str, a: str, b: str, e: str, *, ftz: str, type: str
) -> str:
    x, y, z = (_flushed(c.value(operand, type), ftz) for operand in (a, b, e))
    return c.set(d, _flushed(f"std::fma({x}, {y}, {z})", ftz), type)


@form(rf"rcp\.(?P<rounding>rn|approx){_FLOAT}")
def reciprocal(c: Context, line: int, d: str, a: str, *, rounding: str, ftz: str, type: str) -> str:
    result = _flushed(f"1 / {_flushed(c.value(a, type), ftz)}", ftz)
    return c.set(d, f"approximate({result})" if rounding == "approx" else result, type)


@form(rf"(?P<name>neg|abs){_FLOAT}")
def sign(c: Context, line: int, d: str, a: str, *, name: str, ftz: str, type: str) -> str:
    x = _flushed(c.value(a, type), ftz)
    return c.set(d, f"-{x}" if name == "neg" else f"std::fabs({x})", type)


@form(r"(?P<name>min|max)(?P<ftz>\.ftz)?(?P<nan>\.NaN)?\.(?P<type>f32|f64)")
def float_extreme(
    c: Context, line: int, d: str, a: str, b: str, *, name: str, ftz: str, nan: str, type: str
) -> str:
    function = ("least" if name == "min" else "greatest") + ("_or_nan" if nan else "")
    x, y = (_flushed(c.value(operand, type), ftz) for operand in (a, b))
    return c.set(d, f"{function}<{type}>({x}, {y})", type)


_RELATIONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_UNSIGNED = {"lo": "<", "ls": "<=", "hi": ">", "hs": ">="}


@form(r"setp\.(?P<relation>eq|ne|lt|le|gt|ge|lo|ls|hi|hs)\.(?P<type>[bsu](?:16|32|64))")
def compare(c: Context, line: int, d: str, a: str, b: str, *, relation: str, type: str) -> str:
    operator = {**_RELATIONS, **_UNSIGNED}[relation]
    return c.set(d, f"({c.value(a, type)} {operator} {c.value(b, type)})", "pred")


@form(rf"setp\.(?P<relation>eq|ne|lt|le|gt|ge|num|nan)(?P<unordered>u)?{_FLOAT}")
def float_compare(
    c: Context, line: int, d: str, a: str, b: str, *,
    relation: str, unordered: str, ftz: str, type: str,
) -> str:  # fmt: skip
    x, y = (_flushed(c.value(operand, type), ftz) for operand in (a, b))
    ordered = f"is_ordered<{type}>({x}, {y})"
    if relation in ("num", "nan"):
        return c.set(d, ordered if relation == "num" else f"!{ordered}", "pred")
    holds = f"{x} {_RELATIONS[relation]} {y}"
    return c.set(d, f"(!{ordered} || {holds})" if unordered else f"({ordered} && {holds})", "pred")


@form(r"selp\.(?P<type>[bsu](?:16|32|64)|f32|f64)")
def select(c: Context, line: int, d: str, a: str, b: str, p: str, *, type: str) -> str:
    return c.set(d, f"({c.value(p, 'pred')} ? {c.value(a, type)} : {c.value(b, type)})", type)


@form(r"mov\.(?P<type>pred|[bsu](?:16|32|64)|f32|f64)")
def move(c: Context, line: int, d: str, a: str, *, type: str) -> str:
    if not (d.startswith("{") or a.startswith("{")):
        return c.set(d, c.value(a, type), type)
    parts = group(d if d.startswith("{") else a)
    size = _size(type) // len(parts)
    if d.startswith("{"):
        whole = c.value(a, type)
        return " ".join(
            c.set(part, f"b{size}({whole} >> {i * size})", f"b{size}")
            for i, part in enumerate(parts)
        )
    shifted = (f"{type}({c.value(p, f'b{size}')}) << {i * size}" for i, p in enumerate(parts))
    return c.set(d, f"{type}({' | '.join(shifted)})", type)


@form(r"cvt\.(?P<to>[su](?:8|16|32|64))\.(?P<of>[su](?:8|16|32|64))")
def convert(c: Context, line: int, d: str, a: str, *, to: str, of: str) -> str:
    return c.set(d, f"{to}({c.value(a, of)})", to)


@form(r"cvt\.rn\.(?P<to>f32|f64)\.(?P<of>[su](?:8|16|32|64))")
def convert_to_float(c: Context, line: int, d: str, a: str, *, to: str, of: str) -> str:
    return c.set(d, f"{to}({c.value(a, of)})", to)


@form(r"cvt\.rn\.(?P<to>bf16|f16)\.f32")
def narrow(c: Context, line: int, d: str, a: str, *, to: str) -> str:
    return c.set(d, f"to_{to}({c.value(a, 'f32')})", "b16")


@form(r"cvt\.rn\.(?P<to>bf16|f16)x2\.f32")
def narrow_two(c: Context, line: int, d: str, upper: str, lower: str, *, to: str) -> str:
    halves = (f"b32(to_{to}({c.value(operand, 'f32')}))" for operand in (lower, upper))
    return c.set(d, " | ".join(halves) + " << 16", "b32")


@form(r"cvt\.f32\.f16")
def widen(c: Context, line: int, d: str, a: str) -> str:
    return c.set(d, f"F16::number({c.value(a, 'b16')}, 0)", "f32")


@form(r"cvt\.rna\.tf32\.f32")
def convert_to_tf32(c: Context, line: int, d: str, a: str) -> str:
    return c.set(d, f"to_tf32({c.value(a, 'f32')})", "b32")


@form(r"cvta(?P<back>\.to)?\.(?P<space>global|shared)\.u64")
def convert_address(c: Context, line: int, d: str, a: str, *, back: str, space: str) -> str:
    address = c.value(a, "u64")
    if space == "shared":
        address = f"t.{'shared' if back else 'generic'}({address})"
    return c.set(d, address, "u64")


_VECTOR = r"(?:\.v(?P<count>[24]))?\.(?P<type>[bsu](?:8|16|32|64)|f32|f64)"


@form(
    rf"ld(?:\.(?P<own>param|shared)|(?:\.(?P<order>relaxed|acquire)\.gpu)?(?:\.global)?){_VECTOR}"
)
def load(
    c: Context, line: int, d: str, a: str, *, own: str, order: str, count: str, type: str
) -> str:
    return _load(c, "_".join(filter(None, ("load", own, order))), d, a, count, type)


@form(rf"ld(?:\.global)?\.cg{_VECTOR}")
def load_from_l2(c: Context, line: int, d: str, a: str, *, count: str, type: str) -> str:
    return _load(c, "load_l2", d, a, count, type)


def _load(c: Context, function: str, d: str, a: str, count: str, type: str) -> str:
    array = f"std::array<{type}, {count or 1}>"
    parts = (c.set(part, f"loaded[{i}]", type) for i, part in enumerate(group(d)))
    return f"{{ const auto loaded = t.{function}<{array}>({c.address(a)}); {' '.join(parts)} }}"


@form(rf"st(?:\.(?P<own>shared)|(?:\.(?P<order>relaxed|release)\.gpu)?(?:\.global)?){_VECTOR}")
def store(
    c: Context, line: int, a: str, b: str, *, own: str, order: str, count: str, type: str
) -> str:
    function = "_".join(filter(None, ("store", own, order)))
    numbers = ", ".join(c.value(part, type) for part in group(b))
    return f"t.{function}({c.address(a)}, std::array<{type}, {count or 1}>{{{numbers}}});"


@form(r"mma\.sync\.aligned\.m16n8k(?P<depth>8|16)\.row\.col\.f32\.(?P<a>\w+)\.(?P<b>\w+)\.f32")
def multiply_tiles(
    c: Context, line: int, d: str, left: str, right: str, sums: str, *, depth: str, a: str, b: str
) -> str:
    operands = {("16", "bf16"): "Bf16", ("16", "f16"): "F16", ("8", "tf32"): "Tf32"}
    if a != b or (depth, a) not in operands:
        raise UnknownInstruction("a product of other operands")
    x, y = (", ".join(c.value(part, "b32") for part in group(g)) for g in (left, right))
    z = ", ".join(c.value(part, "f32") for part in group(sums))
    results = " ".join(c.set(part, f"f.c[{i}]", "f32") for i, part in enumerate(group(d)))
    return (
        f"{{ Fragments f = {{{line}, {{{x}}}, {{{y}}}, {{{z}}}}}; "
        f"t.mma<{operands[depth, a]}>(f); {results} }}"
    )


@form(r"shfl\.sync\.(?P<mode>bfly|idx)\.b32")
def shuffle(
    c: Context, line: int, d: str, a: str, b: str, clamp: str, mask: str, *, mode: str
) -> str:
    register, _, is_there = d.partition("|")
    operands = [c.value(a, "b32"), *(c.value(operand, "u32") for operand in (b, clamp, mask))]
    result = c.set(register, f"t.shfl_{mode}({line}, {', '.join(operands)})", "b32")
    return f"{result} {c.set(is_there, 'true', 'pred')}" if is_there else result


@form(r"vote\.sync\.any\.pred")
def vote(c: Context, line: int, d: str, a: str, mask: str) -> str:
    return c.set(d, f"t.vote_any({line}, {c.value(a, 'pred')}, {c.value(mask, 'u32')})", "pred")


@form(r"fence\.(?P<order>acquire|acq_rel)\.(?:gpu|sys)|membar\.(?:gl|sys)")
def fence(c: Context, line: int, *, order: str) -> str:
    return "t.fence_acquire();" if order == "acquire" else "t.fence_release(); t.fence_acquire();"


@form(r"bar\.sync|barrier\.sync(\.aligned)?")
def barrier(c: Context, line: int, number: str) -> str:
    if number != "0":
        raise UnknownInstruction(f"barrier {number}")
    return "t.bar_sync();"


@form(r"bar\.warp\.sync")
def warp_barrier(c: Context, line: int, mask: str) -> str:
    return f"t.bar_warp_sync({line}, {c.value(mask, 'u32')});"


@form(r"bra(?:\.uni)?")
def branch(c: Context, line: int, label: str) -> str:
    return f"goto {label[1:]};"


@form(r"ret|exit")
def end(c: Context, line: int) -> str:
    return "return;"


@form(r"trap")
def trap(c: Context, line: int) -> str:
    return "t.trap();"


# C++ out of all that.


def _statement(c: Context, instruction: Instruction, file: str) -> str:
    found = _form_of(instruction.opcode)
    try:
        if not found:
            raise UnknownInstruction("no form for it")
        function, words = found
        text = function(c, instruction.line, *instruction.operands, **words)
    except (UnknownInstruction, TypeError) as error:
        what = f"{file}:{instruction.line}: {instruction}: {error}"
        raise UnknownInstruction(what) from error
    if not instruction.guard:
        return text
    negated = "!" if instruction.guard.startswith("!") else ""
    return f"if ({negated}{_variable(instruction.guard.lstrip('!'))}) {{ {text} }}"


def _function(name: str, kernel: Kernel, module: Module) -> Iterator[str]:
    c = Context(kernel, module.shared)
    yield f"// {kernel.name}"
    yield f"static void {name}(const void* parameters, simt::Launch& launch) {{"
    yield "Thread t(parameters, launch);"
    targets = {i.operands[0] for i in kernel.instructions() if i.opcode.startswith("bra")}
    for item in kernel.body[1:-1]:
        if isinstance(item, Registers):
            names = item.names()
            c.types.update(dict.fromkeys(names, item.type))
            if names:
                yield f"{item.type} {', '.join(map(_variable, names))};"
        elif isinstance(item, Brace):
            yield item.character
        elif isinstance(item, Label):
            if item.name in targets:
                yield f"{item.name[1:]}:;"
        else:
            yield _statement(c, item, module.file)
    yield "}"


def to_cpp(module: Module, kernels: Sequence[Kernel] | None = None) -> str:
    """A source for a library of `simt::body_of` (machine.h), of those kernels or of all."""
    chosen = module.kernels if kernels is None else kernels
    lines = ['#include "machine.h"', "using namespace ptx;"]
    table = []
    for i, kernel in enumerate(chosen):
        lines += _function(f"kernel_{i}", kernel, module)
        table.append(f'{{"{kernel.name}", {kernel.parameter_bytes}, kernel_{i}}}')
    lines.append(f"Kernels kernels = {{{', '.join(table)}}};")
    return "\n".join(lines) + "\n"
