# SPDX-License-Identifier: Apache-2.0
"""cp.async: a copy's bytes arrive when its group is waited for; until then, its destination is poison."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .data import addresses
from .memory import POISON, Access
from .operands import Frame, Mask, Modifiers, Plain, instruction, lanes_of, operands
from .syntax import Immediate, Instruction, Operand, PtxError, Register

WORD = np.dtype(np.uint32)


@dataclass
class _Copy:
    """What one execution of cp.async has under way."""

    instruction: Instruction
    lanes: np.ndarray
    groups: np.ndarray  # by lane, the number of the group that the copy will be in
    destination: np.ndarray  # rows of the shared memory
    index: np.ndarray
    data: np.ndarray


class Copies:
    """Those of a block that have not been waited for."""

    def __init__(self, lanes: int) -> None:
        self.pending: list[_Copy] = []
        self.committed = np.zeros(lanes, np.int64)  # groups, by lane

    def reset(self) -> None:
        self.pending.clear()
        self.committed.fill(0)

    def commit(self, mask: Mask) -> None:
        self.committed += mask

    def wait(self, in_flight: int, mask: Mask) -> None:
        """Until at most `in_flight` of the lanes' groups are under way."""
        still = []
        for copy in self.pending:
            done = copy.groups < self.committed[copy.lanes] - in_flight
            if mask is not True:
                done &= mask[copy.lanes]
            if done.all():
                copy.destination[copy.index] = copy.data
                continue
            if done.any():
                copy.destination[copy.index[done]] = copy.data[done]
                for name in ("lanes", "groups", "index", "data"):
                    setattr(copy, name, getattr(copy, name)[~done])
            still.append(copy)
        self.pending = still

    def check_exit(self, mask: np.ndarray) -> None:
        for copy in self.pending:
            left = copy.lanes[mask[copy.lanes]]
            if len(left):
                copy.instruction.fail(
                    f"{len(left)} threads, the first is {left[0]}, exit before they have waited for this copy"
                )


@instruction("cp")
def _cp(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.one("async")
    copies = frame.block.copies
    what = modifiers.one("ca", "cg", "commit_group", "wait_group", "wait_all")
    if what == "commit_group":
        operands(ins, 0)
        return copies.commit
    if what == "wait_all":
        operands(ins, 0)

        def wait_all(mask: Mask) -> None:
            copies.commit(mask)
            copies.wait(0, mask)

        return wait_all
    if what == "wait_group":
        (n,) = operands(ins, 1)
        if not isinstance(n, Immediate):
            ins.fail("the number of groups is a constant")
        return lambda mask: copies.wait(int(n.value), mask)
    return _copy(frame, ins, modifiers, (16,) if what == "cg" else (4, 8, 16))


def _copy(frame: Frame, ins: Instruction, modifiers: Modifiers, allowed: tuple[int, ...]) -> Plain:
    modifiers.one("shared", "shared::cta")
    modifiers.one("global")
    modifiers.optional("L2::64B", "L2::128B", "L2::256B")
    d, a, size_operand, *rest = operands(ins, 3, 4)
    if not isinstance(size_operand, Immediate) or size_operand.value not in allowed:
        ins.fail(f"a copy has one of {allowed} bytes")
    size = int(size_operand.value)
    block = frame.block
    to, source = addresses(frame, d), addresses(frame, a)
    target = Access(block.memory, ins, "shared", size, write=True)
    whole = Access(block.memory, ins, "global", size, write=False)
    single = Access(block.memory, ins, "global", 1, write=False)
    counts = _source_sizes(frame, rest[0], size) if rest else None

    def run(mask: Mask) -> None:
        lanes = lanes_of(mask)
        at = np.arange(block.lanes) if lanes is None else lanes
        where = source(lanes)
        if counts is None:
            data = whole.load(where, lanes, WORD, size // 4)
        else:
            data = _read(whole, single, where, at, counts()[at], size)
        there = to(lanes)
        pieces = target.split(there, lanes)
        target.count(pieces, there, lanes, True)
        ((buffer, _, offsets),) = pieces
        index = target.index(offsets)
        destination = buffer.rows(WORD, size // 4).reshape(-1, size // 4)
        destination[index] = POISON * 0x01010101
        groups = block.copies.committed[at]
        block.copies.pending.append(_Copy(ins, at, groups, destination, index, data.reshape(len(at), -1)))

    return run


def _source_sizes(frame: Frame, operand: Operand, size: int) -> Callable[[], np.ndarray]:
    """Reads, by lane, how many bytes to copy: src-size, or none where the predicate ignore-src holds."""
    if isinstance(operand, Register) and frame.bits(operand.name) == 1:
        ignored = frame.predicate(operand)
        return lambda: np.where(ignored(), 0, size)
    sizes = frame.source(operand, "u32")
    return lambda: sizes


def _read(
    whole: Access, single: Access, where: np.ndarray, lanes: np.ndarray, counts: np.ndarray, size: int
) -> np.ndarray:
    """`counts` bytes from each address, then zeros."""
    if (counts > size).any():
        raise PtxError(f"copies {counts.max()} bytes to {size}")
    full = counts == size
    if full.all():
        return whole.load(where, lanes, WORD, size // 4)
    if (where[counts > 0] & (size - 1)).any():
        raise PtxError(f"misaligned: source of a copy of {size} bytes")
    data = np.zeros((len(where), size), np.uint8)
    if full.any():
        data[full] = whole.load(where[full], lanes[full], np.dtype(np.uint8), size)
    for count in np.unique(counts[~full & (counts > 0)]).tolist():
        some = (counts == count).nonzero()[0]
        each = (where[some][:, None] + np.arange(count)).reshape(-1)
        read = single.load(each, np.repeat(lanes[some], count), np.dtype(np.uint8), 1)
        data[some, :count] = read.reshape(-1, count)
    return data.view(WORD)
