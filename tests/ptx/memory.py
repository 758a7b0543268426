# SPDX-License-Identifier: Apache-2.0
"""State spaces. Every access is checked for its bounds, alignment and permission.

Generic addresses tell their space by bits 40 and up; those of no other space are global, so that arrays may
keep the addresses that they have in this process. Addresses in .shared are offsets, as they must fit in 32
bits; in the other spaces, addresses are generic ones.
"""

from __future__ import annotations

from typing import NoReturn, TypeAlias

import numpy as np

from .counters import Counters
from .syntax import Instruction, PtxError

WINDOW_BITS = 40
GLOBAL, SHARED, LOCAL, PARAM, CONST = 0x7, 0xA, 0xB, 0xC, 0xD
WINDOWS = {"global": GLOBAL, "shared": SHARED, "local": LOCAL, "param": PARAM, "const": CONST}
SHARED_BASE = 1024  # where .shared begins; as on GPUs, lower offsets are not the kernel's
GUARD = 1 << 28  # between buffers
POISON = 0xFF  # what nobody has written: NaN


def in_window(addresses: np.ndarray, window: int) -> np.ndarray:
    """Which of the generic addresses are of a space."""
    bits = addresses >> addresses.dtype.type(WINDOW_BITS)
    if window != GLOBAL:
        return bits == bits.dtype.type(window)
    return ~np.isin(bits, (SHARED, LOCAL, PARAM, CONST))


class Buffer:
    """Bytes at an address."""

    def __init__(self, name: str, base: int, data: np.ndarray, writable: bool) -> None:
        self.name = name
        self.base = base
        window = base >> WINDOW_BITS
        self.window = window if window in WINDOWS.values() else GLOBAL
        self.data = data
        self.size = data.size
        self.writable = writable
        self.mapped = True
        self._rows: dict[tuple[np.dtype, int], np.ndarray] = {}

    def rows(self, dtype: np.dtype, count: int) -> np.ndarray:
        """The bytes as rows of `count` elements: those at multiples of their size."""
        rows = self._rows.get((dtype, count))
        if rows is None:
            size = dtype.itemsize * count
            first = -self.base % size
            rows = self.data[first : first + (self.data.size - first) // size * size].view(dtype)
            rows = rows.reshape(-1, count) if count > 1 else rows
            self._rows[dtype, count] = rows
        return rows

    def place(self, offsets: np.ndarray, lanes: np.ndarray | None) -> np.ndarray:
        """Offsets in `data` from offsets at addresses."""
        return offsets


class LocalBuffer(Buffer):
    """The same addresses are other bytes for every lane."""

    def __init__(self, name: str, base: int, lanes: int, size: int) -> None:
        super().__init__(name, base, np.full(lanes * size, POISON, np.uint8), True)
        self.size = size
        self._starts = np.arange(lanes) * size

    def place(self, offsets: np.ndarray, lanes: np.ndarray | None) -> np.ndarray:
        return offsets + (self._starts if lanes is None else self._starts[lanes])


# a buffer, which of the addresses are in it, and their offsets in its data
Piece: TypeAlias = "tuple[Buffer, np.ndarray | slice, np.ndarray]"


class Memory:
    """All buffers of a machine; those of the block that runs are replaced by the next block's."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self.buffers: list[Buffer] = []
        self._next = {GLOBAL: 1, CONST: 1}

    def add(
        self, name: str, data: np.ndarray, writable: bool, window: int = GLOBAL, align: int = 256
    ) -> Buffer:
        """Maps bytes at an address of exactly this alignment."""
        base = (window << WINDOW_BITS) + self._next[window] * GUARD + align
        self._next[window] += 1 + (data.size + align) // GUARD
        return self.put(Buffer(name, base, data, writable))

    def put(self, buffer: Buffer) -> Buffer:
        """Maps a buffer, in place of the one at its address."""
        self.buffers = [b for b in self.buffers if b.base != buffer.base] + [buffer]
        return buffer

    def remove(self, buffer: Buffer) -> None:
        self.buffers.remove(buffer)
        buffer.mapped = False

    def nearest(self, address: int) -> Buffer | None:
        """The buffer whose bytes or whose guard this is."""

        def distance(buffer: Buffer) -> int:
            return max(buffer.base - address, address - (buffer.base + buffer.size) + 1, 0)

        near = [buffer for buffer in self.buffers if distance(buffer) < GUARD // 2]
        return min(near, key=distance, default=None)


class Access:
    """The accesses of one instruction to one space (or to any, by generic addresses)."""

    def __init__(self, memory: Memory, ins: Instruction, space: str | None, size: int, write: bool) -> None:
        self.memory = memory
        self.instruction = ins
        self.size = size
        self.write = write
        self._shift = size.bit_length() - 1
        self._origin = SHARED << WINDOW_BITS if space == "shared" else 0
        # a function's parameters are in local memory
        allowed = {None: tuple(WINDOWS.values()), "param": (PARAM, LOCAL)}
        self._windows = allowed[space] if space is None or space == "param" else (WINDOWS[space],)
        self._last: Buffer | None = None

    def split(self, addresses: np.ndarray, lanes: np.ndarray | None) -> list[Piece]:
        """Checks int64 addresses, and finds their buffers."""
        if int(np.bitwise_or.reduce(addresses)) & (self.size - 1):
            worst = addresses[(addresses & (self.size - 1)) != 0][0]
            self._fail("misaligned", int(worst) + self._origin)
        if self._last is not None and self._last.mapped:
            offsets = addresses - (self._last.base - self._origin)
            if np.maximum.reduce(offsets.view(np.uint64)) <= self._last.size - self.size:
                return [(self._last, slice(None), self._last.place(offsets, lanes))]
        generic = addresses + self._origin
        pieces: list[Piece] = []
        left = np.ones(len(addresses), bool)
        while left.any():
            buffer = self._find(int(generic[left][0]))
            inside = left & (generic >= buffer.base) & (generic <= buffer.base + buffer.size - self.size)
            at = inside.nonzero()[0]
            its_lanes = at if lanes is None else lanes[at]
            pieces.append((buffer, at, buffer.place(generic[at] - buffer.base, its_lanes)))
            left &= ~inside
        if len(pieces) == 1:
            self._last = pieces[0][0]
        return pieces

    def _fail(self, why: str, address: int) -> NoReturn:
        what = f"{why}: {'write' if self.write else 'read'} of {self.size} bytes at"
        buffer = self.memory.nearest(address)
        if buffer is None:
            raise PtxError(f"{what} address {address:#x}, which is near no buffer")
        raise PtxError(
            f"{what} offset {address - buffer.base} of {buffer.name}, which has {buffer.size} bytes"
        )

    def _find(self, address: int) -> Buffer:
        buffer = self.memory.nearest(address)
        if buffer is None or not 0 <= address - buffer.base <= buffer.size - self.size:
            self._fail("out of bounds", address)
        if buffer.window not in self._windows:
            self._fail("wrong state space", address)
        if self.write and not buffer.writable:
            self._fail("read-only", address)
        return buffer

    def load(
        self, addresses: np.ndarray, lanes: np.ndarray | None, dtype: np.dtype, count: int
    ) -> np.ndarray:
        """One row of `count` elements (or an element) per address."""
        pieces = self.split(addresses, lanes)
        if len(pieces) == 1:
            buffer, _, offsets = pieces[0]
            result = buffer.rows(dtype, count).take(offsets >> self._shift, axis=0)
        else:
            result = np.empty((len(addresses), count) if count > 1 else len(addresses), dtype)
            for buffer, at, offsets in pieces:
                result[at] = buffer.rows(dtype, count)[offsets >> self._shift]
        self.count(pieces, addresses, lanes, False)
        return result

    def store(self, addresses: np.ndarray, lanes: np.ndarray | None, values: np.ndarray) -> None:
        """Writes the rows of load(). Where addresses are equal, the highest lane's value stays."""
        pieces = self.split(addresses, lanes)
        count = values.shape[1] if values.ndim > 1 else 1
        for buffer, at, offsets in pieces:
            buffer.rows(values.dtype, count)[offsets >> self._shift] = values[at]
        self.count(pieces, addresses, lanes, True)

    def index(self, offsets: np.ndarray) -> np.ndarray:
        """Rows of offsets, where a row is what is accessed at once."""
        return offsets >> self._shift

    def count(
        self, pieces: list[Piece], addresses: np.ndarray, lanes: np.ndarray | None, write: bool
    ) -> None:
        for buffer, at, _ in pieces:
            if buffer.window in (GLOBAL, SHARED):
                its_lanes = lanes if isinstance(at, slice) else at if lanes is None else lanes[at]
                ins, counters = self.instruction, self.memory.counters
                if buffer.window == GLOBAL:
                    counters.on_global(buffer.name, addresses[at], its_lanes, self.size, write)
                else:
                    counters.on_shared(
                        ins.opcode, f"line {ins.line}: {ins.text}", addresses[at], its_lanes, self.size
                    )
