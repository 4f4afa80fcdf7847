"""Reads PTX, as nvcc writes it, into kernels that are lists of instructions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace


class UnknownInstruction(Exception):  # noqa: N818
    """PTX of which the project does not know what it means."""


@dataclass(frozen=True)
class Instruction:
    line: int
    guard: str  # "%p1" or "!%p1", or nothing: it is carried out where that is true
    opcode: str
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Brace:
    """`{` or `}`: registers within have names of their own."""

    character: str


@dataclass(frozen=True)
class Registers:
    """Of one type: `count` numbered ones, or one of that name."""

    type: str
    prefix: str
    count: int | None

    def names(self) -> list[str]:
        if self.count is None:
            return [f"%{self.prefix}"]
        return [f"%{self.prefix}{i}" for i in range(self.count)]


Statement = Instruction | Label | Brace | Registers


@dataclass(frozen=True)
class Kernel:
    name: str
    parameter_bytes: int
    body: tuple[Statement, ...]

    def instructions(self) -> Iterator[Instruction]:
        return (item for item in self.body if isinstance(item, Instruction))

    def changed(self, change: Callable[[Instruction], Instruction | None]) -> Kernel:
        """With each instruction as `change` returns it, or without it."""
        body = (change(item) if isinstance(item, Instruction) else item for item in self.body)
        return replace(self, body=tuple(item for item in body if item is not None))


@dataclass(frozen=True)
class Module:
    """What is in a file of PTX."""

    file: str
    shared: frozenset[str]  # names for the shared memory that a launch asks for
    kernels: tuple[Kernel, ...]


# Lines outside of kernels that say nothing of what they do.
_DIRECTIVES = re.compile(r"\.(version|target|address_size)\b[^\n]*")
_SHARED = re.compile(r"\.extern \.shared \.align \d+ \.b8 (\w+)\[\];")
_ENTRY = re.compile(
    r"(?:\.visible|\.weak)? ?\.entry (\w+)\(\s*"
    r"\.param \.align \d+ \.b8 \w+_param_0\[(\d+)\]\s*\)"
    r"(?:\s*\.(?:maxntid|minnctapersm|reqntid) [\d, ]+)*\s*"
)
_SPACE = re.compile(r"\s*")
_LABEL = re.compile(r"(\$\w+):")
_REGISTERS = re.compile(r"\.reg \.(\w+)\s+%(\w+)(?:<(\d+)>)?;")
_IGNORED = re.compile(r"\.(?:pragma|loc) [^;\n]*;?")
_INSTRUCTION = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*([^;]*);")


def parse(text: str, file: str = "PTX") -> Module:
    """Reads a file of PTX: kernels with one parameter, and dynamic shared memory."""
    text = re.sub(r"//[^\n]*", "", text)
    shared: set[str] = set()
    kernels: list[Kernel] = []
    at = _SPACE.match(text).end()  # type: ignore[union-attr]
    while at < len(text):
        if match := _DIRECTIVES.match(text, at):
            end = match.end()
        elif match := _SHARED.match(text, at):
            shared.add(match[1])
            end = match.end()
        elif match := _ENTRY.match(text, at):
            body, end = _parse_body(text, match.end(), file)
            kernels.append(Kernel(match[1], int(match[2]), body))
        else:
            raise _unknown(file, text, at)
        at = _SPACE.match(text, end).end()  # type: ignore[union-attr]
    return Module(file, frozenset(shared), tuple(kernels))


def _parse_body(text: str, at: int, file: str) -> tuple[tuple[Statement, ...], int]:
    """The statements between the braces that begin there, and where they end."""
    body: list[Statement] = []
    line, counted = text.count("\n", 0, at) + 1, at
    depth = 0
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] in ("{", "}"):
            depth += 1 if text[at] == "{" else -1
            body.append(Brace(text[at]))
            at += 1
            if depth == 0:
                return tuple(body), at
        elif match := _LABEL.match(text, at):
            body.append(Label(match[1]))
            at = match.end()
        elif match := _REGISTERS.match(text, at):
            body.append(Registers(match[1], match[2], int(match[3]) if match[3] else None))
            at = match.end()
        elif match := _IGNORED.match(text, at):
            at = match.end()
        elif match := _INSTRUCTION.match(text, at):
            operands = tuple(_split(match[3]))
            body.append(Instruction(line, match[1] or "", match[2], operands))
            at = match.end()
        else:
            raise _unknown(file, text, at)


def _unknown(file: str, text: str, at: int) -> UnknownInstruction:
    line = text.count("\n", 0, at) + 1
    return UnknownInstruction(f"{file}:{line}: no meaning for {text[at:].splitlines()[0].strip()}")


def _split(operands: str) -> list[str]:
    """At commas that are in no brackets."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,])+", operands)]
