# SPDX-License-Identifier: Apache-2.0
"""PTX text to functions, variables and instructions. What is not understood raises, with its line."""

from __future__ import annotations

import bisect
import re
from collections.abc import Callable, Container
from typing import NoReturn

from .syntax import (
    TYPE_BITS,
    Address,
    Arguments,
    Function,
    Immediate,
    Instruction,
    Operand,
    Pair,
    PtxError,
    Register,
    Sink,
    Special,
    Symbol,
    Variable,
    Vector,
)

_NAME = r"[A-Za-z_$%][\w$]*"
_LINKAGE = r"(?:\.(?:visible|extern|weak|common)\s+)*"
_HEADER = re.compile(rf"{_LINKAGE}\.(entry|func)\b")
_VARIABLE = re.compile(
    rf"{_LINKAGE}\.(global|const|shared|local|param)((?:\s+\.align\s+\d+|\s+\.(?!align)[\w:]+)*)"
    rf"\s+({_NAME})\s*(\[\s*\d*\s*\])?\s*(?:=\s*(.*))?$",
    re.S,
)
_SPACE = re.compile(r"(?:\s+|\.(?:version|target|address_size|file|loc)\b[^\n]*)*")  # and lines without a ;
_LABEL = re.compile(rf"({_NAME})\s*:(?!:)")
_BRACKET = re.compile(r"[()\[\]{};]")
_INSTRUCTION = re.compile(r"(?:@(!?)(%?[\w$]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.S)
_SPECIAL = re.compile(
    r"%(tid|ntid|ctaid|nctaid)\.[xyz]|%(laneid|warpid|nwarpid|smid|nsmid|gridid|lanemask_(?:eq|le|lt|ge|gt)"
    r"|clock|clock64|clock_hi|globaltimer|dynamic_smem_size|total_smem_size)"
)
_PLAIN = re.compile(r"%[A-Za-z_]\w*")  # a register, mostly
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|0[bB][01]+|\d+)U?$")


def split_commas(text: str) -> list[str]:
    """Splits at the commas outside of any bracket."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        if c in "([{":
            depth += 1
        elif c in ")]}":
            depth -= 1
        elif c == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    last = text[start:].strip()
    return [*parts, last] if last or parts else []


def integer(text: str) -> int:
    if not _NUMBER.match(text):
        raise PtxError(f"not an integer: {text}")
    sign, digits = (-1, text[1:]) if text[0] == "-" else (1, text)
    digits = digits.rstrip("U")
    octal = len(digits) > 1 and digits[0] == "0" and digits.isdigit()
    return sign * int(digits, 8 if octal else 0)


class _Scopes:
    """Names of nested { } blocks are made unique: NAME@BLOCK."""

    def __init__(self) -> None:
        self.stack = [0]
        self.blocks = 0

    def enter(self) -> None:
        self.blocks += 1
        self.stack.append(self.blocks)

    def leave(self) -> None:
        self.stack.pop()

    def declare(self, name: str) -> str:
        return f"{name}@{self.stack[-1]}" if self.stack[-1] else name

    @staticmethod
    def find(name: str, known: Container[str], scopes: tuple[int, ...]) -> str | None:
        for block in reversed(scopes):
            unique = f"{name}@{block}" if block else name
            if unique in known:
                return unique
        return None


class Module:
    """A parsed PTX file: `functions` and module-level `variables` by name."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.functions: dict[str, Function] = {}
        self.variables: dict[str, Variable] = {}
        # comments become spaces, so that positions still tell lines
        blank = lambda match: re.sub(r"[^\n]", " ", match.group())  # noqa: E731
        self._source = re.sub(r"//[^\n]*|/\*.*?\*/", blank, text, flags=re.S)
        self._at = 0
        self._lines = [match.start() for match in re.finditer("\n", self._source)]
        self._ranges: dict[str, tuple[str, int]] = {}
        self._seen: dict[str, Register] = {}  # of the function that is parsed, outside of nested blocks
        self._parse()

    def function(self, name: str) -> Function:
        """The function of this name, with its body."""
        function = self.functions[name]
        if function.start is not None and not function.loaded:
            function.loaded = True
            self._at = function.start
            self._body(function)
        return function

    def entry(self, name: str) -> Function:
        """The kernel of this name, or the one whose mangled name contains it."""
        entries = {f.name: f for f in self.functions.values() if f.entry}
        if name in entries:
            return self.function(name)
        found = [f for key, f in entries.items() if name in key]
        if len(found) != 1:
            raise PtxError(
                f"{len(found)} kernels have {name!r} in their names; kernels: {', '.join(entries)}"
            )
        return self.function(found[0].name)

    def alone(self, name: str) -> str:
        """The text without the other kernels."""
        kept, at, pieces = self.entry(name), 0, []
        for function in sorted(self.functions.values(), key=lambda f: f.header):
            if function.entry and function is not kept:
                pieces.append(self.text[at : function.header])
                at = function.stop + 1
        return "".join([*pieces, self.text[at:]])

    def _line(self) -> int:
        return bisect.bisect_left(self._lines, self._at) + 1

    def _fail(self, text: str) -> NoReturn:
        raise PtxError(f"line {self._line()}: not understood: {' '.join(text.split())}")

    def _skip_space(self) -> bool:
        if space := _SPACE.match(self._source, self._at):
            self._at = space.end()
        return self._at < len(self._source)

    def _until(self, stops: str) -> str:
        """The text up to one of `stops` outside of brackets; what stopped it is left in place."""
        depth, start = 0, self._at
        for match in _BRACKET.finditer(self._source, start):
            c = match.group()
            if depth == 0 and c in stops:
                self._at = match.start()
                return self._source[start : self._at].strip()
            depth += (c in "([{") - (c in ")]}")
        self._fail(self._source[start : start + 80])

    def _parse(self) -> None:
        while self._skip_space():
            if _HEADER.match(self._source, self._at):
                self._function()
                continue
            text = self._until(";")
            if variable := self._variable(text):
                self.variables[variable.name] = variable
            elif not text.startswith(".pragma"):
                self._fail(text)
            self._at += 1

    def _variable(self, text: str, rename: Callable[[str], str] = str) -> Variable | None:
        match = _VARIABLE.match(text)
        if not match:
            return None
        space, attributes, name, array, initial = match.groups()
        align = re.search(r"\.align\s+(\d+)", attributes)
        words = re.findall(r"\.([\w:]+)", re.sub(r"\.align\s+\d+", "", attributes))
        types = [w for w in words if w in TYPE_BITS]
        # .ptr .global says what a parameter points to
        unknown = [
            w for w in words if w not in TYPE_BITS and w not in ("ptr", "global", "const", "shared", "local")
        ]
        if len(types) != 1 or unknown or (set(words) - set(types) and "ptr" not in words):
            self._fail(text)
        size = array.strip("[] ") if array else "1"
        values = None
        if initial is not None:
            values = tuple(self._initial(v) for v in split_commas(initial.strip().strip("{}")))
        count = int(size) if size else len(values or ())
        natural = max(1, TYPE_BITS[types[0]] // 8)
        alignment = natural if align is None or "ptr" in words else int(align[1])
        return Variable(rename(name), space, types[0], alignment, count, values)

    def _initial(self, text: str) -> Immediate | Symbol:
        if match := re.fullmatch(r"generic\((.*)\)", text):
            text = match[1]
        operand = parse_operand(text, lambda name: Symbol(name))
        if not isinstance(operand, Immediate | Symbol):
            self._fail(text)
        return operand

    def _function(self) -> None:
        begin = self._at
        header = self._until("{;")
        match = re.match(
            rf"{_LINKAGE}\.(entry|func)\s*(?:\.noreturn\s*)?(\(.*?\))?\s*({_NAME})\s*(\(.*?\))?(.*)$",
            header,
            re.S,
        )
        if not match:
            self._fail(header)
        kind, returns, name, parameters, rest = match.groups()

        def variables(text: str | None) -> list[Variable]:
            parts = split_commas((text or "").strip().strip("()"))
            found = [variable for part in parts if (variable := self._variable(part))]
            if len(found) != len(parts):
                self._fail(header)
            return found

        directives = {}
        for directive, values in re.findall(r"\.(\w+)\s*([\d\s,]*)", rest):
            if directive not in ("maxntid", "reqntid", "minnctapersm", "maxnreg", "noreturn"):
                self._fail(header)
            directives[directive] = tuple(int(v) for v in values.split(",") if v.strip())
        defined = self._source[self._at] == "{"
        self._at += 1
        function = Function(
            name,
            kind == "entry",
            variables(parameters),
            variables(returns),
            directives,
            begin,
            self._at if defined else None,
        )
        if defined:
            self._until("}")
            function.stop = self._at
            self._at += 1
        if defined or name not in self.functions:
            self.functions[name] = function

    def _body(self, function: Function) -> None:
        scopes = _Scopes()
        self._ranges = {}
        self._seen = {}
        raw: list[tuple[str, int, tuple[int, ...], int]] = []
        while self._skip_space():
            c = self._source[self._at]
            if c in "{}":
                self._at += 1
                if c == "{":
                    scopes.enter()
                elif len(scopes.stack) == 1:
                    break
                else:
                    scopes.leave()
                continue
            if label := _LABEL.match(self._source, self._at):
                self._at = label.end()
                self._skip_space()
                name = scopes.declare(label[1])
                if self._source.startswith(".branchtargets", self._at):
                    text = self._until(";").removeprefix(".branchtargets")
                    function.targets[name] = tuple(split_commas(text))
                    self._at += 1
                else:
                    function.labels[name] = len(raw)
                continue
            line, position = self._line(), self._at
            text = self._until(";")
            self._at += 1
            if text.startswith(".reg"):
                self._registers(function, text, scopes)
            elif text.startswith((".shared", ".local", ".param")):
                variable = self._variable(text, scopes.declare)
                if variable is None:
                    self._fail(text)
                function.variables[variable.name] = variable
            elif text.startswith("."):
                if not text.startswith(".pragma"):
                    self._fail(text)
            else:
                raw.append((text, line, tuple(scopes.stack), position))
        for text, line, where, position in raw:  # labels are known now
            function.body.append(self._instruction(function, text, line, where, position))

    def _registers(self, function: Function, text: str, scopes: _Scopes) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
        if not match or match[1] not in TYPE_BITS:
            self._fail(text)
        for name in split_commas(match[2]):
            if many := re.fullmatch(rf"({_NAME})<(\d+)>", name):
                self._ranges[scopes.declare(many[1])] = (match[1], int(many[2]))
            elif re.fullmatch(_NAME, name):
                function.registers[scopes.declare(name)] = match[1]
            else:
                self._fail(text)

    def _register(self, function: Function, name: str, scopes: tuple[int, ...]) -> str | None:
        numbered = re.fullmatch(r"(.*?)(0|[1-9]\d*)", name)
        for block in reversed(scopes):
            suffix = f"@{block}" if block else ""
            if name + suffix in function.registers:
                return name + suffix
            if numbered and numbered[1] + suffix in self._ranges:
                type_name, count = self._ranges[numbered[1] + suffix]
                if int(numbered[2]) < count:
                    function.registers[name + suffix] = type_name
                    return name + suffix
        return None

    def _instruction(
        self, function: Function, text: str, line: int, scopes: tuple[int, ...], position: int
    ) -> Instruction:
        shown = " ".join(text.split())
        match = _INSTRUCTION.match(text)
        if not match:
            raise PtxError(f"line {line}: not understood: {shown}")
        negated, guard_name, opcode, rest = match.groups()

        def resolve(name: str) -> Operand:
            if len(scopes) == 1 and name in self._seen:
                return self._seen[name]
            if register := self._register(function, name, scopes):
                if len(scopes) == 1:
                    self._seen[name] = Register(register)
                return Register(register)
            for known in (function.variables, function.labels, function.targets):
                if unique := _Scopes.find(name, known, scopes):
                    return Symbol(unique)
            parameters = (p.name for p in [*function.parameters, *function.returns])
            if (
                name in self.variables
                or name in self.functions
                or name in parameters
                or name == function.name
            ):
                return Symbol(name)
            raise PtxError("undeclared: " + name)

        try:
            operands = tuple(parse_operand(part, resolve) for part in split_commas(rest))
            guard = None
            if guard_name:
                resolved = resolve(guard_name)
                if not isinstance(resolved, Register):
                    raise PtxError("a guard that is no register")
                guard = Register(resolved.name, bool(negated))
        except PtxError as error:
            raise PtxError(f"line {line}: {shown}\n  {error}") from None
        return Instruction(opcode, operands, guard, line, shown, scopes, position)


def parse_operand(text: str, resolve: Callable[[str], Operand]) -> Operand:
    """`resolve` turns a name into a register or symbol."""
    text = text.strip()
    if _PLAIN.fullmatch(text) and not _SPECIAL.fullmatch(text):
        return resolve(text)
    if text == "_":
        return Sink()
    if text[:1] == "[" and text[-1] == "]":
        return _address(text[1:-1].strip(), resolve)
    for opening, closing, kind in (("{", "}", Vector), ("(", ")", Arguments)):
        if text[:1] == opening and text[-1] == closing:
            return kind(tuple(parse_operand(part, resolve) for part in split_commas(text[1:-1])))
    if "|" in text:
        first, second = text.split("|")
        return Pair(parse_operand(first, resolve), parse_operand(second, resolve))
    if text[:1] == "!":
        operand = parse_operand(text[1:], resolve)
        if isinstance(operand, Register):
            return Register(operand.name, True)
    if _NUMBER.match(text):
        return Immediate(integer(text))
    if match := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
        return Immediate(int(match[2], 16), "f32" if match[1] in "fF" else "f64")
    if re.fullmatch(r"-?\d+\.\d*(?:[eE][+-]?\d+)?", text):
        return Immediate(float(text), "decimal")
    if text == "WARP_SZ":
        return Immediate(32)
    if _SPECIAL.fullmatch(text):
        return Special(text[1:])
    if match := re.fullmatch(rf"({_NAME})\s*(?:\+\s*(-?\w+))?", text):
        operand = resolve(match[1])
        if match[2] is None:
            return operand
        if isinstance(operand, Symbol):
            return Symbol(operand.name, integer(match[2]))
    raise PtxError(f"operand not understood: {text}")


def _address(text: str, resolve: Callable[[str], Operand]) -> Address:
    if _NUMBER.match(text):
        return Address(None, integer(text))
    match = re.fullmatch(rf"({_NAME})\s*(?:([+-])\s*(-?\w+))?", text)
    if not match:
        raise PtxError(f"address not understood: {text}")
    base = resolve(match[1])
    if not isinstance(base, Register | Symbol):
        raise PtxError(f"address not understood: {text}")
    offset = 0 if match[3] is None else integer(match[3]) * (-1 if match[2] == "-" else 1)
    return Address(base, offset)
