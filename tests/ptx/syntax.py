# SPDX-License-Identifier: Apache-2.0
"""What PTX text is made of: types, operands, instructions, variables, functions."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

TYPE_BITS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
TYPE_BITS |= {"f16": 16, "bf16": 16, "f16x2": 32, "bf16x2": 32, "tf32": 32, "f32": 32, "f64": 64, "pred": 1}


class PtxError(Exception):
    """Text that is not understood, or an execution that the manual calls an error or undefined."""


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False


@dataclass(frozen=True)
class Special:
    """A special register, such as tid.x."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """`kind` is int, f32 or f64 (bits, as 0f and 0d give them), or decimal."""

    value: int | float
    kind: str = "int"

    def bits(self, type_name: str) -> int:
        """The immediate as an operand of an instruction of this type."""
        width = TYPE_BITS[type_name]
        if self.kind == "int" and type_name not in ("f32", "f64"):
            return int(self.value) & ((1 << width) - 1)
        if self.kind == "f32" and width == 32:
            return int(self.value)
        if self.kind == "f64" and width == 64:
            return int(self.value)
        if self.kind in ("f64", "decimal") and type_name == "f32":
            value = (
                self.value
                if self.kind == "decimal"
                else struct.unpack("<d", struct.pack("<Q", self.value))[0]
            )
            return struct.unpack("<I", struct.pack("<f", value))[0]
        if self.kind == "decimal" and type_name == "f64":
            return struct.unpack("<Q", struct.pack("<d", self.value))[0]
        raise PtxError(f"an immediate {self.kind} {self.value} as .{type_name}")


@dataclass(frozen=True)
class Symbol:
    """A variable, label or function, with an offset in bytes."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    base: Register | Symbol | None
    offset: int


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """d|p."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Arguments:
    """(a, b) of a call."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Sink:
    """_"""


Operand: TypeAlias = Register | Special | Immediate | Symbol | Address | Vector | Pair | Arguments | Sink


@dataclass(frozen=True)
class Variable:
    name: str
    space: str
    type: str
    align: int
    count: int  # elements; 0 for an extern array
    initial: tuple[Immediate | Symbol, ...] | None = None

    @property
    def size(self) -> int:
        return self.count * TYPE_BITS[self.type] // 8


@dataclass(frozen=True)
class Instruction:
    opcode: str  # with its modifiers
    operands: tuple[Operand, ...]
    guard: Register | None
    line: int
    text: str
    scopes: tuple[int, ...] = ()
    position: int = 0  # of its text

    @property
    def name(self) -> str:
        return self.opcode.split(".")[0]

    def fail(self, why: str) -> NoReturn:
        raise PtxError(f"line {self.line}: {self.text}\n  {why}")


@dataclass
class Function:
    name: str
    entry: bool
    parameters: list[Variable]
    returns: list[Variable]
    directives: dict[str, tuple[int, ...]]
    header: int  # where its text begins
    start: int | None  # of its body's text, behind the {; None where it is only declared
    stop: int = 0  # of its text, at the }
    loaded: bool = False  # bodies are parsed when they are asked for
    body: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to positions in body
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)  # .branchtargets
    registers: dict[str, str] = field(default_factory=dict)  # names to types
    variables: dict[str, Variable] = field(default_factory=dict)
