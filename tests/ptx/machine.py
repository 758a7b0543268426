# SPDX-License-Identifier: Apache-2.0
"""The machine that a test sees: buffers, launches, counters."""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from .block import Block, Schedule, align_up
from .counters import Counters
from .memory import CONST, GLOBAL, Buffer, Memory
from .parser import Module
from .syntax import TYPE_BITS, Function, Immediate, PtxError, Symbol, Variable

_recorders: list[tuple[str, set[int]]] = []


@contextlib.contextmanager
def executed_lines(text: str) -> Iterator[set[int]]:
    """The lines that launches execute of modules with this text."""
    recorder: tuple[str, set[int]] = (text, set())
    _recorders.append(recorder)
    try:
        yield recorder[1]
    finally:
        _recorders.remove(recorder)


class Machine:
    """Runs kernels of a module on numpy arrays.

    Kernels read and write the arrays themselves. Module variables keep their values between launches.
    """

    def __init__(self, module: Module) -> None:
        self.module = module
        self.counters = Counters()
        self.memory = Memory(self.counters)
        self._blocks: dict[tuple[str, tuple[int, int, int]], Block] = {}
        self._symbols: dict[str, int] = {}
        self._arrays: list[Buffer] = []
        self.variables: dict[str, np.ndarray] = {}
        self._place_variables()

    def buffer(
        self,
        array: np.ndarray,
        name: str,
        writable: bool = False,
        align: int = 256,
        address: int | None = None,
    ) -> int:
        """Maps an array, which kernels cannot leave; its address has exactly this alignment, or is given.

        Arrays at given addresses have no guards: what is behind one of them may be another.
        """
        if not array.flags.c_contiguous or (writable and not array.flags.writeable):
            raise ValueError(f"{name} is not contiguous, or not writable")
        if any(buffer.name == name for buffer in self.memory.buffers):
            raise ValueError(f"there is a buffer {name}")
        data = array.reshape(-1).view(np.uint8)
        if address is None:
            self._arrays.append(self.memory.add(name, data, writable, GLOBAL, align))
            return self._arrays[-1].base
        for other in self.memory.buffers:
            if address < other.base + other.size and other.base < address + data.size:
                raise ValueError(f"{name} overlaps {other.name}")
        buffer = Buffer(name, address, data, writable)
        if buffer.window != GLOBAL or address == 0:
            raise ValueError(f"{name} is at {address:#x}, which is no address of global memory")
        self._arrays.append(self.memory.put(buffer))
        return address

    def forget(self) -> None:
        """Unmaps the arrays and starts the counters again. What has been decoded of kernels is kept."""
        for buffer in self._arrays:
            self.memory.remove(buffer)
        self._arrays.clear()
        self.counters = self.memory.counters = Counters(_known=self.counters._known)

    def pack(self, kernel: str, *arguments: Any) -> bytes:
        """The bytes of a kernel's parameters from addresses, numbers, bytes and ctypes structures."""
        function = self.module.entry(kernel)
        if len(arguments) != len(function.parameters):
            raise ValueError(f"{kernel} has {len(function.parameters)} parameters, not {len(arguments)}")
        packed = b""
        for parameter, argument in zip(function.parameters, arguments, strict=True):
            packed = packed.ljust(align_up(len(packed), parameter.align), b"\0")
            packed += _bytes_of(parameter, argument)
        return packed

    def launch(
        self,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        shared_bytes: int = 0,
        params: bytes = b"",
        schedule: Schedule = "block",
    ) -> None:
        """Runs a kernel, which is given by its name or a part of it that no other kernel has.

        Blocks run one after the other. In a block, all threads go together, or (schedule "forward" and
        "reverse") one warp runs until it has to wait, and then the next does.
        """
        function = self.module.entry(kernel)
        shape, blocks = _three(block), _three(grid)
        self._check(function, shape)
        key = (function.name, shape)
        if key not in self._blocks:
            self._blocks[key] = Block(self.memory, self.module, function, self._symbols, shape)
        runner = self._blocks[key]
        try:
            with np.errstate(all="ignore"):
                runner.launch(blocks, shared_bytes, params, schedule)
        finally:
            runner.collect(self.counters)
            for module, lines in _recorders:
                if module == self.module.text:
                    lines.update(self.counters.lines)

    @staticmethod
    def _check(function: Function, shape: tuple[int, int, int]) -> None:
        threads = shape[0] * shape[1] * shape[2]
        limit = function.directives.get("maxntid") or function.directives.get("reqntid") or (1024,)
        if not 0 < threads <= int(np.prod(limit)):
            raise PtxError(f"{threads} threads, where {function.name} has at most {int(np.prod(limit))}")

    def _place_variables(self) -> None:
        placed = []
        for variable in self.module.variables.values():
            if variable.space in ("global", "const"):
                data = np.zeros(max(variable.size, 1), np.uint8)
                window = GLOBAL if variable.space == "global" else CONST
                buffer = self.memory.add(
                    f"variable {variable.name}",
                    data,
                    variable.space == "global",
                    window,
                    max(16, variable.align),
                )
                self._symbols[variable.name] = buffer.base
                self.variables[variable.name] = data
                placed.append((variable, data))
        for variable, data in placed:
            for i, value in enumerate(variable.initial or ()):
                data.view(f"u{TYPE_BITS[variable.type] // 8}")[i] = self._initial(value, variable)

    def _initial(self, value: Immediate | Symbol, variable: Variable) -> int:
        if isinstance(value, Immediate):
            return value.bits(variable.type)
        if value.name not in self._symbols or TYPE_BITS[variable.type] != 64:
            raise PtxError(f"an initial value of {variable.name} is not supported")
        return self._symbols[value.name] + value.offset


def _three(extents: int | tuple[int, ...]) -> tuple[int, int, int]:
    given = (extents,) if isinstance(extents, int) else tuple(extents)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


def _bytes_of(parameter: Variable, argument: Any) -> bytes:
    if isinstance(argument, ctypes.Structure | ctypes.Array | bytes | bytearray):
        packed = bytes(argument)
    elif isinstance(argument, np.generic):
        packed = argument.tobytes()
    elif parameter.type in ("f32", "f64"):
        packed = struct.pack("<f" if parameter.type == "f32" else "<d", argument)
    else:
        packed = (int(argument) & ((1 << 8 * parameter.size) - 1)).to_bytes(parameter.size, "little")
    if len(packed) != parameter.size:
        raise ValueError(f"{parameter.name} has {parameter.size} bytes, not {len(packed)}")
    return packed
