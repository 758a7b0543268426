# SPDX-License-Identifier: Apache-2.0
"""Instructions that the lanes of a warp execute together: shuffles, votes, reductions, matches."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .operands import Frame, Mask, Modifiers, Plain, as_lanes, instruction, operands
from .syntax import Instruction, Operand, Pair, PtxError

FULL = 0xFFFFFFFF


def pack_lanes(values: np.ndarray) -> np.ndarray:
    """A word per warp, of a bit per lane."""
    return np.packbits(values.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32)[:, 0]


class Collective:
    """An instruction that lanes wait at until all lanes that it names are there, at the same line.

    `members` holds a mask for each lane, None for all lanes of the warp that have not exited. `aligned`
    instructions have no result when a lane of the warp has exited.
    """

    def __init__(
        self, frame: Frame, ins: Instruction, members: np.ndarray | None, run: Plain, aligned: bool = False
    ) -> None:
        self.block = frame.block
        self.instruction = ins
        self.members = members
        self.run = run
        self.aligned = aligned

    def complete(self, mask: Mask) -> Mask:
        """Those of the lanes in `mask`, which are here, that have all others they need."""
        if mask is True and (self.members is None or (self.members == FULL).all()):
            return True
        here = as_lanes(mask, self.block.lanes)
        alive = pack_lanes(self.block.alive)
        present = pack_lanes(here)
        if (present[present != 0] == FULL).all() and (
            self.members is None or (self.members[here] == FULL).all()
        ):
            return mask  # whole warps
        if self.aligned and (alive[present != 0] != FULL).any():
            raise PtxError("lanes of the warp have exited")
        if self.members is None:
            return here & np.repeat(alive == present, 32)
        lane = np.arange(self.block.lanes, dtype=np.uint32) & np.uint32(31)
        if (here & (self.members >> lane & 1 == 0)).any():
            raise PtxError("a lane is not in its own member mask")
        needed = self.members & np.repeat(alive, 32)
        ready = here & (needed & ~np.repeat(present, 32) == 0)
        masks = self.members.reshape(-1, 32)
        different = masks[:, :, None] != masks[:, None, :]
        if (different & _bits(needed).reshape(-1, 32, 32) & ready.reshape(-1, 32)[:, :, None]).any():
            raise PtxError("lanes with different member masks")
        return ready


def _bits(words: np.ndarray) -> np.ndarray:
    """32 bools per word."""
    return (words[:, None] >> np.arange(32, dtype=np.uint32) & np.uint32(1)).astype(bool)


def _result(frame: Frame, operand: Operand, kind: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The arrays of d or d|p."""
    if isinstance(operand, Pair):
        return frame.target(operand.first, kind), frame.target(operand.second, "pred")
    return frame.target(operand, kind), None


@instruction("shfl")
def _shfl(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    modifiers.one("sync")
    mode = modifiers.one("up", "down", "bfly", "idx")
    modifiers.type("b32")
    d, a, b, c, members = operands(ins, 5)
    target, predicate = _result(frame, d, "b32")
    source, amount, clamp = frame.source(a, "b32"), frame.source(b, "u32"), frame.source(c, "u32")
    lanes = np.arange(frame.block.lanes)
    lane = lanes & 31

    def find() -> tuple[np.ndarray, np.ndarray]:
        """By lane, the lane of the block to read, and whether it is in range."""
        n = (amount & 31).astype(np.int64)
        segment = (clamp >> np.uint32(8) & np.uint32(31)).astype(np.int64)
        bound = lane & segment | (clamp & 31).astype(np.int64) & ~segment
        if mode == "up":
            j = lane - n
            valid = j >= bound
        else:
            j = {"down": lane + n, "bfly": lane ^ n, "idx": lane & segment | n & ~segment}[mode]
            valid = j <= bound
        return lanes - lane + np.where(valid, j, lane), valid

    known: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}

    def run(mask: Mask) -> None:
        key = amount.tobytes() + clamp.tobytes()
        if key not in known:
            known[key] = find()
        j, valid = known[key]
        value = source[j]
        if mask is not True:
            value[~mask[j]] = FULL  # undefined: the source lane does not take part
        np.copyto(target, value, where=mask)
        if predicate is not None:
            np.copyto(predicate, valid, where=mask)

    return Collective(frame, ins, frame.source(members, "b32"), run)


@instruction("vote")
def _vote(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    modifiers.one("sync")
    mode = modifiers.one("all", "any", "uni", "ballot")
    kind = modifiers.type("b32" if mode == "ballot" else "pred")
    d, a, members_operand = operands(ins, 3)
    target, members = frame.target(d, kind), frame.source(members_operand, "b32")
    value = frame.predicate(a)

    def run(mask: Mask) -> None:
        executing = as_lanes(mask, frame.block.lanes)
        voters = members & np.repeat(pack_lanes(executing), 32)
        yes = np.repeat(pack_lanes(value() & executing), 32) & voters
        results: dict[str, Callable[[], np.ndarray]] = {
            "ballot": lambda: yes,
            "all": lambda: yes == voters,
            "any": lambda: yes != 0,
            "uni": lambda: (yes == voters) | (yes == 0),
        }
        np.copyto(target, results[mode](), where=mask)

    return Collective(frame, ins, members, run)


@instruction("redux")
def _redux(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    modifiers.one("sync")
    operation = modifiers.one("add", "min", "max", "and", "or", "xor")
    kind = modifiers.type(*(("b32",) if operation in ("and", "or", "xor") else ("u32", "s32")))
    d, a, members_operand = operands(ins, 3)
    target, source, members = (
        frame.target(d, kind),
        frame.source(a, kind),
        frame.source(members_operand, "b32"),
    )
    ufunc: np.ufunc = {
        "add": np.add, "min": np.minimum, "max": np.maximum,
        "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    }[operation]  # fmt: skip

    def run(mask: Mask) -> None:
        if mask is True and (members == FULL).all():
            target.reshape(-1, 32)[:] = ufunc.reduce(source.reshape(-1, 32), axis=1, dtype=source.dtype)[
                :, None
            ]
            return
        left = as_lanes(mask, frame.block.lanes).copy()
        results = source.copy()
        while left.any():
            first = int(left.argmax())
            group = slice(first // 32 * 32, first // 32 * 32 + 32)
            together = np.zeros_like(left)
            together[group] = left[group] & (members[group] == members[first])
            results[together] = ufunc.reduce(source[together], dtype=source.dtype)
            left &= ~together
        np.copyto(target, results, where=mask)

    return Collective(frame, ins, members, run)


@instruction("match")
def _match(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    mode = modifiers.one("any", "all")
    modifiers.one("sync")
    kind = modifiers.type("b32", "b64")
    d, a, members_operand = operands(ins, 3)
    target, predicate = _result(frame, d, "b32")
    source, members = frame.source(a, kind), frame.source(members_operand, "b32")
    if predicate is not None and mode == "any":
        ins.fail("a predicate goes with .all")

    def run(mask: Mask) -> None:
        executing = as_lanes(mask, frame.block.lanes)
        voters = members & np.repeat(pack_lanes(executing), 32)
        values = source.reshape(-1, 32)
        equal = (values[:, :, None] == values[:, None, :]).reshape(-1)
        same = pack_lanes(equal) & voters
        if mode == "all":
            agree = same == voters
            same = np.where(agree, voters, np.uint32(0))
            if predicate is not None:
                np.copyto(predicate, agree, where=mask)
        np.copyto(target, same, where=mask)

    return Collective(frame, ins, members, run)


@instruction("activemask")
def _activemask(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Plain:
    modifiers.type("b32")
    (d,) = operands(ins, 1)
    target = frame.target(d, "b32")

    def run(mask: Mask) -> None:
        executing = as_lanes(mask, frame.block.lanes)
        np.copyto(target, np.repeat(pack_lanes(executing), 32), where=mask)

    return run
