# SPDX-License-Identifier: Apache-2.0
"""The sixteen barriers of a block.

A barrier instruction waits for the other lanes of its warp that have not exited, and then the warp arrives:
counts are in threads, but it is warps that are counted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .operands import Frame, Modifiers, instruction, operands
from .syntax import Instruction, PtxError
from .warp import Collective


class Barrier(Collective):
    """An instruction at which a warp arrives at a barrier."""

    def __init__(
        self,
        frame: Frame,
        ins: Instruction,
        mode: str,
        number: np.ndarray,
        threads: np.ndarray | None,
        value: Callable[[], np.ndarray] | None,
        target: np.ndarray | None,
    ) -> None:
        super().__init__(frame, ins, None, lambda mask: None)
        self.mode = mode  # sync, arrive, or a reduction
        self.number = number
        self.threads = threads
        self.value = value
        self.target = target


@dataclass
class _State:
    """Of a barrier at which some warps have arrived."""

    threads: int | None  # None: all warps that have not exited
    reduction: str
    arrived: list[int] = field(default_factory=list)
    waiting: list[tuple[Barrier, int, np.ndarray]] = field(default_factory=list)
    values: np.ndarray | None = None
    voters: np.ndarray | None = None


class Barriers:
    def __init__(self, lanes: int, release: Callable[[int, np.ndarray], None]) -> None:
        self.lanes = lanes
        self.release = release  # called with where the lanes go on
        self.states: dict[int, _State] = {}

    def arrive(self, barrier: Barrier, following: int, mask: np.ndarray, alive: np.ndarray) -> None:
        """Whole warps arrive, and go on at `following` once they may."""
        for warp in np.flatnonzero(mask.reshape(-1, 32).any(axis=1)).tolist():
            lanes = np.zeros(self.lanes, bool)
            lanes[warp * 32 : warp * 32 + 32] = mask[warp * 32 : warp * 32 + 32]
            self._arrive(barrier, following, warp, lanes, alive)

    def _arrive(
        self, barrier: Barrier, following: int, warp: int, lanes: np.ndarray, alive: np.ndarray
    ) -> None:
        number = _uniform(barrier.number[lanes], "barriers")
        threads = None if barrier.threads is None else _uniform(barrier.threads[lanes], "counts of threads")
        if number > 15:
            raise PtxError(f"barrier {number} does not exist")
        if threads is not None and (threads == 0 or threads % 32):
            raise PtxError(f"{threads} threads are no number of warps")
        reduction = barrier.mode if barrier.mode not in ("sync", "arrive") else ""
        state = self.states.setdefault(number, _State(threads, reduction))
        if (state.threads, state.reduction) != (threads, reduction):
            raise PtxError(
                f"barrier {number}: {threads or 'all'} threads and {reduction or 'no reduction'}, "
                f"where others arrived with {state.threads or 'all'} and {state.reduction or 'no reduction'}"
            )
        if warp in state.arrived:
            raise PtxError(f"warp {warp} arrives twice at barrier {number} before it completes")
        state.arrived.append(warp)
        if barrier.value is not None:
            if state.values is None or state.voters is None:
                state.values, state.voters = np.zeros(self.lanes, bool), np.zeros(self.lanes, bool)
            state.values |= lanes & barrier.value()
            state.voters |= lanes
        if barrier.mode == "arrive":
            self.release(following, lanes)
        else:
            state.waiting.append((barrier, following, lanes))
        self._complete(number, alive)

    def check(self, alive: np.ndarray) -> None:
        """After threads have exited."""
        for number in list(self.states):
            self._complete(number, alive)

    def _complete(self, number: int, alive: np.ndarray) -> None:
        state = self.states[number]
        needed = (
            int(alive.reshape(-1, 32).any(axis=1).sum()) if state.threads is None else state.threads // 32
        )
        if len(state.arrived) < needed:
            return
        del self.states[number]
        for barrier, following, lanes in state.waiting:
            if barrier.target is not None and state.values is not None and state.voters is not None:
                result: object = {
                    "popc": int(state.values.sum()),
                    "and": bool(state.values[state.voters].all()),
                    "or": bool(state.values.any()),
                }[state.reduction]
                barrier.target[lanes] = result
            self.release(following, lanes)

    def describe(self) -> list[str]:
        lines = []
        for number, state in self.states.items():
            where = {
                f"line {barrier.instruction.line}: {barrier.instruction.text}"
                for barrier, *_ in state.waiting
            }
            lines.append(
                f"barrier {number}: warps {state.arrived} of {state.threads or 'all'} threads have arrived; "
                f"waiting: {'; '.join(sorted(where)) or 'none'}"
            )
        return lines


def _uniform(values: np.ndarray, what: str) -> int:
    if (values != values[0]).any():
        raise PtxError(f"the lanes of a warp name different {what}")
    return int(values[0])


@instruction("bar", "barrier")
def _barrier(frame: Frame, ins: Instruction, modifiers: Modifiers) -> Collective:
    if modifiers.flag("warp"):
        modifiers.one("sync")
        (members,) = operands(ins, 1)
        return Collective(frame, ins, frame.source(members, "b32"), lambda mask: None)
    modifiers.optional("cta")
    mode = modifiers.one("sync", "arrive", "red")
    if ins.name == "barrier":
        modifiers.flag("aligned")
    inputs = list(ins.operands)
    value, target = None, None
    if mode == "red":
        mode = modifiers.one("popc", "and", "or")
        kind = modifiers.type("u32" if mode == "popc" else "pred")
        if len(inputs) not in (3, 4):
            ins.fail("the number of operands")
        target, value = frame.target(inputs.pop(0), kind), frame.predicate(inputs.pop())
    if len(inputs) not in ((2,) if mode == "arrive" else (1, 2)):
        ins.fail("the number of operands")
    threads = frame.source(inputs[1], "u32") if len(inputs) == 2 else None
    return Barrier(frame, ins, mode, frame.source(inputs[0], "u32"), threads, value, target)
