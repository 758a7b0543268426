# SPDX-License-Identifier: Apache-2.0
"""What a launch executed and moved: instructions, bytes and sectors per buffer, shared-memory wavefronts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np

BANKS = 32
SECTOR = 32


@dataclass
class Traffic:
    """Of one buffer. A request is what one warp asks for by one instruction."""

    bytes_read: int = 0
    bytes_written: int = 0
    read_requests: int = 0
    read_sectors: int = 0
    write_requests: int = 0
    write_sectors: int = 0


@dataclass
class Banks:
    """Wavefronts that shared memory took, and what the same bytes take when no two words share a bank."""

    requests: int = 0
    wavefronts: int = 0
    minimum: int = 0

    @property
    def conflicts(self) -> int:
        return self.wavefronts - self.minimum


@dataclass
class Counters:
    """Sums over launches; `instructions` counts warps, as profilers do."""

    instructions: Counter[str] = field(default_factory=Counter)  # by opcode with modifiers
    buffers: dict[str, Traffic] = field(default_factory=dict)
    shared: dict[str, Banks] = field(default_factory=dict)  # by opcode with modifiers
    conflicts: Counter[str] = field(default_factory=Counter)  # wavefronts above the minimum, by line
    lines: Counter[int] = field(default_factory=Counter)  # warps that have executed a line of the PTX
    _known: dict[tuple[object, ...], tuple[int, ...]] = field(default_factory=dict, repr=False)

    def executed(self, name: str) -> int:
        """Warps that executed opcodes that are `name` or begin with `name` and a dot."""
        return sum(n for opcode, n in self.instructions.items() if f"{opcode}.".startswith(f"{name}."))

    def on_global(
        self, buffer: str, addresses: np.ndarray, lanes: np.ndarray | None, size: int, write: bool
    ) -> None:
        """`addresses` of what the lanes access; `size` bytes each."""
        first = addresses[0] // SECTOR * SECTOR
        key: tuple[object, ...] = ((addresses - first).tobytes(), None if lanes is None else lanes.tobytes())
        if key not in self._known:
            warps = (np.arange(len(addresses)) if lanes is None else lanes) // 32
            touched = np.unique(warps << 44 | (addresses // SECTOR - addresses.min() // SECTOR))
            self._known[key] = (len(np.unique(warps)), len(touched))
        requests, sectors = self._known[key]
        traffic = self.buffers.setdefault(buffer, Traffic())
        if write:
            traffic.bytes_written += size * len(addresses)
            traffic.write_requests += requests
            traffic.write_sectors += sectors
        else:
            traffic.bytes_read += size * len(addresses)
            traffic.read_requests += requests
            traffic.read_sectors += sectors

    def on_shared(
        self, opcode: str, line: str, addresses: np.ndarray, lanes: np.ndarray | None, size: int
    ) -> None:
        first = addresses[0] // 128 * 128
        key = ((addresses - first).tobytes(), None if lanes is None else lanes.tobytes(), size)
        if key not in self._known:
            self._known[key] = _wavefronts(
                addresses, np.arange(len(addresses)) if lanes is None else lanes, size
            )
        requests, wavefronts, minimum = self._known[key]
        banks = self.shared.setdefault(opcode, Banks())
        banks.requests += requests
        banks.wavefronts += wavefronts
        banks.minimum += minimum
        if wavefronts != minimum:
            self.conflicts[line] += wavefronts - minimum


def _wavefronts(addresses: np.ndarray, lanes: np.ndarray, size: int) -> tuple[int, int, int]:
    """Requests, wavefronts and their minimum.

    A wavefront gives each bank one word, to all lanes that want this word. Accesses of 8 bytes are made by
    16 lanes at a time, those of 16 bytes by 8 lanes.
    """
    groups = lanes // (32 if size <= 4 else 128 // size)
    words = (addresses >> 2)[:, None] + np.arange(max(1, size // 4))
    distinct = np.unique(groups[:, None] << 40 | words)
    group, word = distinct >> 40, distinct & ((1 << 40) - 1)
    per_bank = np.bincount(group * BANKS + word % BANKS, minlength=(group.max() + 1) * BANKS)
    per_group = np.bincount(group)
    wavefronts = per_bank.reshape(-1, BANKS).max(axis=1).sum()
    return len(np.unique(lanes // 32)), int(wavefronts), int((-(-per_group // BANKS)).sum())
