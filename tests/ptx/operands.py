# SPDX-License-Identifier: Apache-2.0
"""Operands as numpy arrays with one element per thread; modifiers, each to be taken by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np

from .syntax import (
    TYPE_BITS,
    Function,
    Immediate,
    Instruction,
    Operand,
    PtxError,
    Register,
    Sink,
    Special,
    Symbol,
)

if TYPE_CHECKING:
    from .block import Block

# Which threads execute: True for every lane of the block, or a bool per lane. numpy takes both as `where`.
Mask: TypeAlias = "Literal[True] | np.ndarray"
Plain: TypeAlias = Callable[[Mask], None]

_UNSIGNED = {1: np.dtype(bool), 8: np.dtype("u1"), 16: np.dtype("u2"), 32: np.dtype("u4"), 64: np.dtype("u8")}


def dtype_of(type_name: str) -> np.dtype:
    """Of the array that holds operands of a PTX type; .bf16 and packed types are bits."""
    bits = TYPE_BITS[type_name]
    if type_name in ("f16", "f32", "f64"):
        return np.dtype(f"f{bits // 8}")
    if type_name[0] == "s":
        return np.dtype(f"i{bits // 8}")
    return _UNSIGNED[bits]


def _same_kind(register: np.dtype, operand: np.dtype) -> bool:
    """Whether a register can be an operand: of the same size, and both predicates or neither."""
    return register.itemsize == operand.itemsize and (register.kind == "b") == (operand.kind == "b")


def as_lanes(mask: Mask, lanes: int) -> np.ndarray:
    """A bool for each of so many lanes."""
    return np.ones(lanes, bool) if mask is True else mask


def lanes_of(mask: Mask) -> np.ndarray | None:
    """Numbers of the lanes that execute, or None for all."""
    return None if mask is True else mask.nonzero()[0]


class Modifiers:
    """The modifiers of an instruction. Each must be taken, or end() raises."""

    def __init__(self, instruction: Instruction) -> None:
        self.instruction = instruction
        self.left = instruction.opcode.split(".")[1:]

    def optional(self, *names: str) -> str | None:
        """The one of `names` that is there."""
        for name in self.left:
            if name in names:
                self.left.remove(name)
                return name
        return None

    def one(self, *names: str) -> str:
        found = self.optional(*names)
        if found is None:
            self.instruction.fail(f"expected one of .{', .'.join(names)}")
        return found

    def flag(self, name: str) -> bool:
        return self.optional(name) is not None

    def type(self, *allowed: str) -> str:
        """The next type; with `allowed`, one of these."""
        found = self.optional(*TYPE_BITS)
        if found is None or (allowed and found not in allowed):
            self.instruction.fail(
                f"expected a type{' of ' if allowed else ''}{', '.join(allowed)}, not {found}"
            )
        return found

    def end(self) -> None:
        if self.left:
            self.instruction.fail(f"modifiers not known: .{'.'.join(self.left)}")


class Frame:
    """A function as inlined in a kernel: its registers, and the addresses of its variables."""

    def __init__(self, block: Block, function: Function, addresses: dict[str, int]) -> None:
        self.block = block
        self.function = function
        self.addresses = addresses  # of parameters and local variables
        self.registers: dict[str, np.ndarray] = {}

    def bits(self, name: str) -> int:
        return TYPE_BITS[self.function.registers[name]]

    def _register(self, name: str) -> np.ndarray:
        array = self.registers.get(name)
        if array is None:
            array = self.block.array(_UNSIGNED[self.bits(name)])
            self.registers[name] = array
        return array

    def address_of(self, symbol: str) -> int:
        found = self.addresses.get(symbol)
        return self.block.address_of(symbol) if found is None else found

    def source(self, operand: Operand, type_name: str, widest: int = 0) -> np.ndarray:
        """What the operand holds whenever it is read; registers of up to `widest` bits are truncated."""
        dtype = dtype_of(type_name)
        if isinstance(operand, Register):
            array = self._register(operand.name)
            if operand.negated:
                raise PtxError("a negated operand is not understood here")
            if _same_kind(array.dtype, dtype):
                return array.view(dtype)
            if dtype.kind != "b" and dtype.itemsize < array.dtype.itemsize <= widest // 8:
                return array.view(dtype)[:: array.dtype.itemsize // dtype.itemsize]
            raise PtxError(f"{operand.name} is no operand of .{type_name}")
        if isinstance(operand, Immediate):
            return self.block.constant(operand.bits(type_name), dtype)
        if isinstance(operand, Special):
            array = self.block.special(operand.name)
            step = array.dtype.itemsize // dtype.itemsize
            return array.view(dtype)[::step] if step > 1 else array.view(dtype)
        if isinstance(operand, Symbol):
            address = self.address_of(operand.name) + operand.offset
            if address >> (8 * dtype.itemsize):
                raise PtxError(f"the address of {operand.name} does not fit in .{type_name}")
            return self.block.constant(address, dtype)
        raise PtxError(f"{operand} is no operand of .{type_name}")

    def target(self, operand: Operand, type_name: str) -> np.ndarray:
        """The array to write a result to."""
        dtype = dtype_of(type_name)
        if isinstance(operand, Sink):
            return self.block.array(dtype)
        if not isinstance(operand, Register) or operand.negated:
            raise PtxError(f"{operand} cannot be written")
        array = self._register(operand.name)
        if not _same_kind(array.dtype, dtype):
            raise PtxError(f"{operand.name} is no result of .{type_name}")
        return array.view(dtype)

    def extending_target(self, operand: Operand, type_name: str) -> tuple[np.ndarray, np.dtype]:
        """The array to assign a result of `type_name` to, once it is viewed as the returned dtype.

        The assignment extends it to the width of the register, by its sign or by zeros.
        """
        dtype = dtype_of(type_name)
        if isinstance(operand, Sink):
            return self.block.array(dtype), dtype
        if not isinstance(operand, Register) or operand.negated:
            raise PtxError(f"{operand} cannot be written")
        array = self._register(operand.name)
        if array.dtype.kind == "b" or array.dtype.itemsize < dtype.itemsize:
            raise PtxError(f"{operand.name} is no result of .{type_name}")
        if array.dtype.itemsize == dtype.itemsize:
            return array.view(dtype), dtype
        sign = "i" if type_name[0] == "s" else "u"
        return array.view(np.dtype(f"{sign}{array.dtype.itemsize}")), np.dtype(f"{sign}{dtype.itemsize}")

    def predicate(self, operand: Operand) -> Callable[[], np.ndarray]:
        """Reads a predicate, or its complement."""
        if isinstance(operand, Register) and operand.negated:
            positive = self.source(Register(operand.name), "pred")
            return lambda: ~positive
        if isinstance(operand, Immediate) and operand.value in (0, 1):
            constant = self.block.constant(int(operand.value), np.dtype(bool))
            return lambda: constant
        array = self.source(operand, "pred")
        return lambda: array


# Instructions by name. Each function decodes one: it returns what to call when the instruction is executed.
Decoder: TypeAlias = Callable[[Frame, Instruction, Modifiers], Any]
DECODERS: dict[str, Decoder] = {}


def instruction(*names: str) -> Callable[[Decoder], Decoder]:
    def register(function: Decoder) -> Decoder:
        for name in names:
            DECODERS[name] = function
        return function

    return register


def operands(instruction: Instruction, *counts: int) -> tuple[Operand, ...]:
    """The operands, of which there must be one of `counts`."""
    if len(instruction.operands) not in counts:
        instruction.fail(f"{len(instruction.operands)} operands, expected {counts}")
    return instruction.operands


def apply(target: np.ndarray, function: Callable[..., np.ndarray], *sources: np.ndarray) -> Plain:
    """target = function(*sources)."""

    def run(mask: Mask) -> None:
        np.copyto(target, function(*sources), where=mask)

    return run


def apply_ufunc(target: np.ndarray, ufunc: np.ufunc, *sources: np.ndarray) -> Plain:
    """As apply(), without a temporary array."""

    def run(mask: Mask) -> None:
        ufunc(*sources, out=target, where=mask)

    return run
