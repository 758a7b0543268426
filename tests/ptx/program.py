# SPDX-License-Identifier: Apache-2.0
"""A kernel as segments of decoded instructions: straight lines that end where threads may part or must wait.

Calls are inlined, with registers of their own for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np

from .operands import DECODERS, Frame, Mask, Modifiers, Plain, operands
from .parser import Module
from .syntax import Address, Arguments, Function, Instruction, Operand, PtxError, Register, Symbol, Vector
from .warp import Collective

if TYPE_CHECKING:
    from .block import Block


class End(IntEnum):
    """What follows a segment's plain instructions."""

    FALL = 0
    BRANCH = 1
    TABLE = 2
    EXIT = 3
    COLLECTIVE = 4


@dataclass
class Segment:
    operations: list[Plain] = field(default_factory=list)
    instructions: list[Instruction] = field(
        default_factory=list
    )  # those of the operations, and then the last
    end: End = End.FALL
    guard: Callable[[], np.ndarray] | None = None  # of BRANCH and EXIT
    targets: list[int] = field(default_factory=list)  # of BRANCH and TABLE
    index: np.ndarray | None = None  # of TABLE
    collective: Collective | None = None
    warps: int = 0  # that have executed it


@dataclass
class _Flat:
    """An instruction of the kernel or of a function inlined in it, or a jump around one."""

    instruction: Instruction
    frame: Frame
    labels: list[tuple[int, str]] = field(default_factory=list)  # to jump to, by number of the frame
    guard: Register | None = None
    counted: bool = True


def symbols(instructions: list[Instruction]) -> set[str]:
    """Names of variables and functions that they mention."""
    found: set[str] = set()

    def visit(operand: Operand | None) -> None:
        if isinstance(operand, Symbol):
            found.add(operand.name)
        elif isinstance(operand, Address):
            visit(operand.base)
        elif isinstance(operand, Vector | Arguments):
            for part in operand.parts:
                visit(part)

    for ins in instructions:
        for operand in ins.operands:
            visit(operand)
    return found


def reachable(module: Module, function: Function, above: tuple[str, ...] = ()) -> set[str]:
    """Symbols that a function and those that it calls mention."""
    found = symbols(function.body)
    for name in list(found):
        if name in module.functions and name not in above and name != function.name:
            found |= reachable(module, module.function(name), (*above, function.name))
    return found


def _arguments(operands: list[Operand]) -> tuple[Operand, ...]:
    """Takes what is in parentheses off the front."""
    if operands and isinstance(operands[0], Arguments):
        parts = operands[0].parts
        del operands[0]
        return parts
    return ()


class Program:
    """The segments of a kernel, decoded for one shape of blocks."""

    def __init__(self, block: Block, module: Module, function: Function) -> None:
        self.block = block
        self.module = module
        self._code: list[_Flat] = []
        self._places: dict[tuple[int, str], int] = {}
        self._frames = 0
        self._inline(function, Frame(block, function, block.place_variables(function)), ())
        self.segments = self._cut()

    def _inline(self, function: Function, frame: Frame, callers: tuple[str, ...]) -> None:
        number = self._frames
        self._frames += 1
        at: dict[int, list[str]] = {}
        for label, position in function.labels.items():
            at.setdefault(position, []).append(label)
        for position, ins in enumerate(function.body):
            for label in at.get(position, ()):
                self._places[number, label] = len(self._code)
            if ins.name == "call":
                self._call(ins, frame, (*callers, function.name))
                continue
            flat = _Flat(ins, frame, guard=ins.guard)
            if ins.name in ("bra", "brx"):
                flat.labels = [(number, label) for label in self._labels(ins, function)]
            elif ins.name == "ret" and callers:
                flat.labels = [(number, "return")]
            self._code.append(flat)
        for label in at.get(len(function.body), ()):
            self._places[number, label] = len(self._code)
        self._places[number, "return"] = len(self._code)

    @staticmethod
    def _labels(ins: Instruction, function: Function) -> list[str]:
        last = ins.operands[-1]
        if not isinstance(last, Symbol):
            ins.fail("no label")
        if ins.name == "brx":
            return list(function.targets[last.name])
        return [last.name]

    def _call(self, ins: Instruction, frame: Frame, callers: tuple[str, ...]) -> None:
        modifiers = Modifiers(ins)
        modifiers.flag("uni")
        modifiers.end()
        parts = list(ins.operands)
        returns = _arguments(parts)
        name = parts.pop(0)
        arguments = _arguments(parts)
        if not isinstance(name, Symbol) or name.name not in self.module.functions or parts:
            ins.fail("only calls of functions by name are supported")
        if name.name in callers:
            ins.fail("recursion is not supported")
        around = (self._frames, f"call at line {ins.line}")
        if ins.guard is not None:
            skip = Register(ins.guard.name, not ins.guard.negated)
            self._code.append(_Flat(ins, frame, [around], skip, counted=False))
        self._code.append(_Flat(ins, frame))
        function = self.module.function(name.name)
        if function.start is not None:
            formal = [*function.returns, *function.parameters]
            actual = [*returns, *arguments]
            if len(formal) != len(actual):
                ins.fail("the number of arguments")
            addresses = self.block.place_variables(function)
            for parameter, argument in zip(formal, actual, strict=True):
                if not isinstance(argument, Symbol):
                    ins.fail("arguments are .param variables")
                addresses[parameter.name] = frame.address_of(argument.name)
            self._inline(function, Frame(self.block, function, addresses), callers)
        self._places[around] = len(self._code)

    # ---- segments

    def _cut(self) -> list[Segment]:
        """Decodes, and cuts where jumps go to, behind jumps, and around what threads wait at."""
        pieces: list[Segment] = []
        starts: dict[int, int] = {}  # segments by the position of their first instruction
        leaders = set(self._places.values())
        pending: list[tuple[Segment, list[tuple[int, str]]]] = []
        current = Segment()

        def close() -> None:
            nonlocal current
            pieces.append(current)
            current = Segment()

        for position, flat in enumerate(self._code):
            if position in leaders and current.instructions:
                close()
            if not current.instructions:
                starts.setdefault(position, len(pieces))
            ins = flat.instruction
            try:
                decoded = self._decode(flat)
            except PtxError as error:
                if str(error).startswith("line "):
                    raise
                ins.fail(str(error))
            except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
                ins.fail(f"not understood: {error!r}")
            if isinstance(decoded, Segment):
                current.end, current.guard, current.index = decoded.end, decoded.guard, decoded.index
                if flat.counted:
                    current.instructions.append(ins)
                pending.append((current, flat.labels))
                close()
            elif isinstance(decoded, Collective):
                if current.instructions:
                    close()
                if flat.guard is not None:  # lanes for which it is off go around
                    skip = Register(flat.guard.name, not flat.guard.negated)
                    current.end, current.guard = End.BRANCH, flat.frame.predicate(skip)
                    current.targets = [len(pieces) + 2]
                    close()
                starts.setdefault(position, len(pieces))
                current.end, current.collective = End.COLLECTIVE, decoded
                current.instructions.append(ins)
                close()
            else:
                current.operations.append(decoded)
                current.instructions.append(ins)
        if current.instructions:
            close()
        pieces.append(Segment(end=End.EXIT))  # for labels at the end
        for segment, labels in pending:
            for label in labels:
                place = self._places.get(label)
                if place is None:
                    raise PtxError(f"label {label[1]} is not there")
                segment.targets.append(starts.get(place, len(pieces) - 1))
        return pieces

    def _decode(self, flat: _Flat) -> Segment | Collective | Plain:
        ins, frame = flat.instruction, flat.frame
        guard = None if flat.guard is None else frame.predicate(flat.guard)
        if ins.name in ("bra", "brx", "ret", "exit"):
            return self._jump(flat, guard)
        if ins.name == "call":
            if flat.labels:
                return Segment(end=End.BRANCH, guard=guard)
            return self._external(ins)
        if ins.name in ("trap", "brkpt"):
            operation: Plain = lambda mask: ins.fail("executed")  # noqa: E731
        else:
            decoder = DECODERS.get(ins.name)
            if decoder is None:
                ins.fail("this instruction is not known")
            modifiers = Modifiers(ins)
            decoded = decoder(frame, ins, modifiers)
            modifiers.end()
            if isinstance(decoded, Collective):
                return decoded
            operation = decoded
        return operation if guard is None else _guarded(operation, guard, self.block.lanes)

    def _external(self, ins: Instruction) -> Plain:
        names = [o.name for o in ins.operands if isinstance(o, Symbol)]
        if self.module.functions[names[0]].start is not None:
            return lambda mask: None  # what is inlined follows
        return lambda mask: ins.fail("a function without a body is called")

    def _jump(self, flat: _Flat, guard: Callable[[], np.ndarray] | None) -> Segment:
        ins = flat.instruction
        modifiers = Modifiers(ins)
        modifiers.flag("uni")
        if ins.name == "brx":
            modifiers.one("idx")
            index, _ = operands(ins, 2)
            if guard is not None:
                ins.fail("a guard is not supported")
            modifiers.end()
            return Segment(end=End.TABLE, index=flat.frame.source(index, "u32"))
        modifiers.end()
        operands(ins, 1 if ins.name == "bra" else 0)
        return Segment(end=End.BRANCH if flat.labels else End.EXIT, guard=guard)


def _guarded(operation: Plain, guard: Callable[[], np.ndarray], lanes: int) -> Plain:
    def run(mask: Mask) -> None:
        on = guard() & mask
        count = np.count_nonzero(on)
        if count == lanes:
            operation(True)
        elif count:
            operation(on)

    return run
