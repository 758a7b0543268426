# SPDX-License-Identifier: Apache-2.0
"""Runs the threads of one block: always those at the lowest place in the program, all of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from .barriers import Barrier, Barriers
from .copies import Copies
from .counters import Counters
from .memory import (
    LOCAL,
    PARAM,
    POISON,
    SHARED,
    SHARED_BASE,
    WINDOW_BITS,
    Buffer,
    LocalBuffer,
    Memory,
)
from .operands import Mask, as_lanes
from .parser import Module
from .program import End, Program, Segment, reachable
from .syntax import Function, PtxError, Variable

Schedule: TypeAlias = Literal["block", "forward", "reverse"]
LOCAL_BASE = (LOCAL << WINDOW_BITS) + 4096
PARAM_BASE = (PARAM << WINDOW_BITS) + 4096
LIMIT = 2_000_000  # segments in a block; what takes longer is taken for an endless loop


def align_up(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment


@dataclass
class _Slab:
    """Memory of many registers, to be filled at once."""

    rows: np.ndarray
    used: int = 0

    def take(self, size: int) -> np.ndarray:
        self.used += 1
        return self.rows[self.used - 1, :size]


class Block:
    """A block's registers, shared memory and program; the blocks of a grid use it one after the other."""

    def __init__(
        self,
        memory: Memory,
        module: Module,
        function: Function,
        globals_: dict[str, int],
        shape: tuple[int, int, int],
    ) -> None:
        self.memory = memory
        self.module = module
        self.threads = shape[0] * shape[1] * shape[2]
        self.lanes = align_up(self.threads, 32)
        self.exists = np.arange(self.lanes) < self.threads
        self.alive = self.exists.copy()
        self._pools: tuple[list[_Slab], list[_Slab]] = ([], [])  # of arrays, and of predicates
        self._constants: dict[tuple[int, np.dtype], np.ndarray] = {}
        self._local_size = 0
        self._symbols = dict(globals_)
        self.carry = self.array(np.dtype(bool))
        self.copies = Copies(self.lanes)
        self.barriers = Barriers(self.lanes, self._add)
        self._specials = self._make_specials(shape)
        self._static_bytes = self._place_shared(function)
        self.shared = self._shared_buffer(0)
        self._place_parameters(function)
        self.program = Program(self, module, function)
        self.local = LocalBuffer(
            "local memory", LOCAL_BASE, self.lanes, max(16, align_up(self._local_size, 16))
        )
        self._ready: list[dict[int, Mask]] = []
        self._parked: list[dict[int, np.ndarray]] = []
        self._rank = np.zeros(self.lanes, np.int64)

    # ---- what decoding asks for

    def array(self, dtype: np.dtype) -> np.ndarray:
        pool = self._pools[dtype.kind == "b"]
        if not pool or pool[-1].used == len(pool[-1].rows):
            pool.append(_Slab(np.empty((256, self.lanes * 8), np.uint8)))
        return pool[-1].take(self.lanes * dtype.itemsize).view(dtype)

    def constant(self, bits: int, dtype: np.dtype) -> np.ndarray:
        key = (bits, dtype)
        if key not in self._constants:
            plain = np.dtype(bool) if dtype.kind == "b" else np.dtype(f"u{dtype.itemsize}")
            self._constants[key] = np.full(self.lanes, bits, plain).view(dtype)
        return self._constants[key]

    def special(self, name: str) -> np.ndarray:
        if name not in self._specials:
            raise PtxError(f"%{name} is not supported")
        return self._specials[name]

    def address_of(self, symbol: str) -> int:
        if symbol not in self._symbols:
            raise PtxError(f"{symbol} has no address")
        return self._symbols[symbol]

    def place_variables(self, function: Function) -> dict[str, int]:
        """Addresses in local memory for the variables of a call."""
        addresses = {}
        for variable in function.variables.values():
            if variable.space in ("local", "param"):
                self._local_size = align_up(self._local_size, variable.align)
                addresses[variable.name] = LOCAL_BASE + self._local_size
                self._local_size += variable.size
        return addresses

    # ---- layout

    def _make_specials(self, shape: tuple[int, int, int]) -> dict[str, np.ndarray]:
        thread = np.arange(self.lanes, dtype=np.uint32)
        lane = thread & np.uint32(31)
        one = np.uint32(1)
        x, y = np.uint32(shape[0]), np.uint32(shape[1])
        bit = one << lane
        values = {
            "tid.x": thread % x,
            "tid.y": thread // x % y,
            "tid.z": thread // (x * y),
            "laneid": lane,
            "warpid": thread // np.uint32(32),
            "lanemask_eq": bit,
            "lanemask_lt": bit - one,
            "lanemask_le": (bit - one) | bit,
            "lanemask_gt": ~((bit - one) | bit),
            "lanemask_ge": ~(bit - one),
            "dynamic_smem_size": np.zeros(self.lanes, np.uint32),
        }
        for axis, extent in zip("xyz", shape, strict=True):
            values[f"ntid.{axis}"] = np.full(self.lanes, extent, np.uint32)
            values[f"ctaid.{axis}"] = np.zeros(self.lanes, np.uint32)
            values[f"nctaid.{axis}"] = np.zeros(self.lanes, np.uint32)
        return values

    def _place_shared(self, function: Function) -> int:
        """Variables of known size first, then the extern arrays, which share what a launch adds.

        Returns the bytes before these.
        """
        used = reachable(self.module, function)
        variables: list[Variable] = [v for v in self.module.variables.values() if v.space == "shared"]
        for name in {function.name, *used} & set(self.module.functions):
            variables += [v for v in self.module.function(name).variables.values() if v.space == "shared"]
        variables = [v for v in variables if v.name in used]
        at = SHARED_BASE
        for variable in variables:
            if variable.count:
                at = align_up(at, variable.align)
                self._symbols[variable.name] = at
                at += variable.size
        dynamic = [v for v in variables if not v.count]
        at = align_up(at, max((v.align for v in dynamic), default=1))
        for variable in dynamic:
            self._symbols[variable.name] = at
        return at - SHARED_BASE

    def _shared_buffer(self, dynamic_bytes: int) -> Buffer:
        data = np.full(self._static_bytes + dynamic_bytes, POISON, np.uint8)
        return Buffer("shared memory", (SHARED << WINDOW_BITS) + SHARED_BASE, data, True)

    def _place_parameters(self, function: Function) -> None:
        at = 0
        for parameter in function.parameters:
            at = align_up(at, parameter.align)
            self._symbols[parameter.name] = PARAM_BASE + at
            at += parameter.size
        self.parameters = Buffer("parameters", PARAM_BASE, np.zeros(at, np.uint8), False)

    # ---- running

    def launch(
        self, grid: tuple[int, int, int], shared_bytes: int, parameters: bytes, schedule: Schedule
    ) -> None:
        if len(parameters) != self.parameters.size:
            raise PtxError(f"{len(parameters)} bytes of parameters, the kernel has {self.parameters.size}")
        self.parameters.data[:] = np.frombuffer(parameters, np.uint8)
        if self.shared.size != self._static_bytes + shared_bytes:
            self.shared.mapped = False
            self.shared = self._shared_buffer(shared_bytes)
        self._specials["dynamic_smem_size"].fill(shared_bytes)
        for buffer in (self.shared, self.local, self.parameters):
            self.memory.put(buffer)
        for axis, extent in zip("xyz", grid, strict=True):
            self._specials[f"nctaid.{axis}"].fill(extent)
        warps = np.arange(self.lanes) // 32
        self._rank = {"block": warps * 0, "forward": warps, "reverse": warps.max() - warps}[schedule]
        for z in range(grid[2]):
            for y in range(grid[1]):
                for x in range(grid[0]):
                    try:
                        self._run(x, y, z)
                    except PtxError as error:
                        raise PtxError(f"block ({x}, {y}, {z}): {error}") from None

    def _run(self, x: int, y: int, z: int) -> None:
        for axis, value in zip("xyz", (x, y, z), strict=True):
            self._specials[f"ctaid.{axis}"].fill(value)
        for pool, value in zip(self._pools, (POISON, 0), strict=True):
            for slab in pool:
                slab.rows[: slab.used].fill(value)
        self.shared.data.fill(POISON)
        self.local.data.fill(POISON)
        self.copies.reset()
        self.barriers.states.clear()
        self.alive[:] = self.exists
        ranks = int(self._rank.max()) + 1
        self._ready = [{} for _ in range(ranks)]
        self._parked = [{} for _ in range(ranks)]
        self._steps = 0
        self._add(0, self.exists.copy())
        while True:
            rank = next((r for r, groups in enumerate(self._ready) if groups), None)
            if rank is None:
                break
            groups = self._ready[rank]
            at = min(groups)
            self._advance(rank, at, groups.pop(at))
        if self.alive.any():
            self._deadlock()

    def _add(self, at: int, mask: np.ndarray) -> None:
        """Lanes can go on at a segment."""
        if len(self._ready) == 1:
            self._merge(0, at, mask)
            return
        for rank in np.unique(self._rank[mask]).tolist():
            self._merge(rank, at, mask & (self._rank == rank))

    def _merge(self, rank: int, at: int, mask: Mask) -> None:
        groups = self._ready[rank]
        if at in groups:
            mask = mask | groups[at]
        groups[at] = True if mask is True or mask.all() else mask

    def _advance(self, rank: int, at: int, mask: Mask) -> None:
        """Runs lanes until they wait, part, or are no longer the lowest of their rank."""
        segments, groups, lanes = self.program.segments, self._ready[rank], self.lanes
        warps = lanes // 32 if mask is True else _warps(mask)
        while True:
            self._steps += 1
            if self._steps > LIMIT:
                raise PtxError(f"the block does not end: {self._describe(segments[at], mask)}")
            segment = segments[at]
            if segment.end != End.COLLECTIVE:
                segment.warps += warps
            self._execute(segment, mask)
            if segment.end == End.FALL:
                at += 1
            elif segment.end == End.BRANCH:
                if segment.guard is None:
                    at = segment.targets[0]
                else:
                    taken = segment.guard() & mask
                    count = np.count_nonzero(taken)
                    if count == 0:
                        at += 1
                    elif count == (lanes if mask is True else np.count_nonzero(mask)):
                        at = segment.targets[0]
                    else:
                        self._merge(rank, segment.targets[0], taken.copy())
                        self._merge(rank, at + 1, ~taken & mask)
                        return
            elif segment.end == End.COLLECTIVE:
                done = self._meet(rank, at, segment, mask)
                if done is None:
                    return
                if done is not mask:
                    mask = done
                    warps = lanes // 32 if mask is True else _warps(mask)
                at += 1
            elif segment.end == End.TABLE:
                self._table(rank, segment, mask)
                return
            else:
                leaving = as_lanes(mask, lanes) if segment.guard is None else segment.guard() & mask
                self._exit(leaving)
                mask = as_lanes(mask, lanes) & ~leaving
                if not mask.any():
                    return
                warps = _warps(mask)
                at += 1
            if groups and min(groups) <= at:
                self._merge(rank, at, mask)
                return

    def _execute(self, segment: Segment, mask: Mask) -> None:
        try:
            for operation in segment.operations:
                operation(mask)
        except PtxError as error:
            if str(error).startswith("line "):
                raise
            segment.instructions[segment.operations.index(operation)].fail(str(error))

    def _meet(self, rank: int, at: int, segment: Segment, mask: Mask) -> Mask | None:
        """Lanes come to a collective; returns those that go on."""
        collective = segment.collective
        assert collective is not None
        waiting = self._parked[rank].pop(at, None)
        if waiting is not None:
            mask = waiting | mask
        try:
            done = collective.complete(mask)
            if done is not True:
                left = as_lanes(mask, self.lanes) & ~done
                if left.any():
                    self._parked[rank][at] = left
                    if not done.any():
                        return None
                else:
                    done = mask
            segment.warps += self.lanes // 32 if done is True else _warps(done)
            if isinstance(collective, Barrier):
                self.barriers.arrive(collective, at + 1, as_lanes(done, self.lanes), self.alive)
                return None
            collective.run(done)
        except PtxError as error:
            if str(error).startswith("line "):
                raise
            collective.instruction.fail(str(error))
        return done

    def _table(self, rank: int, segment: Segment, mask: Mask) -> None:
        assert segment.index is not None
        lanes = as_lanes(mask, self.lanes)
        for number in np.unique(segment.index[lanes]).tolist():
            if number >= len(segment.targets):
                segment.instructions[-1].fail(f"index {number} is not in the list")
            self._merge(rank, segment.targets[number], lanes & (segment.index == number))

    def _exit(self, mask: np.ndarray) -> None:
        self.copies.check_exit(mask)
        self.alive &= ~mask
        # what waits for all that have not exited may have them now
        for rank, parked in enumerate(self._parked):
            for at in list(parked):
                self._merge(rank, at, parked.pop(at))
        self.barriers.check(self.alive)

    # ---- deadlocks

    def _describe(self, segment: Segment, mask: Mask) -> str:
        numbers = as_lanes(mask, self.lanes).nonzero()[0]
        shown = f"{len(numbers)} threads from {numbers[0]} to {numbers[-1]}"
        ins = segment.instructions[-1] if segment.instructions else None
        return shown if ins is None else f"{shown} at line {ins.line}: {ins.text}"

    def _deadlock(self) -> None:
        lines = [
            self._describe(self.program.segments[at], mask)
            for parked in self._parked
            for at, mask in sorted(parked.items())
        ]
        raise PtxError("\n  ".join(["deadlock", *lines, *self.barriers.describe()]))

    def collect(self, counters: Counters) -> None:
        """Adds what has been executed since the last call."""
        for segment in self.program.segments:
            if segment.warps:
                for ins in segment.instructions:
                    counters.instructions[ins.opcode] += segment.warps
                    counters.lines[ins.line] += segment.warps
                segment.warps = 0


def _warps(mask: np.ndarray) -> int:
    return int(np.count_nonzero(mask.reshape(-1, 32).any(axis=1)))
