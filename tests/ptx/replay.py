# SPDX-License-Identifier: Apache-2.0
"""Launches that the emulator recorded (palmette.testing.recorded_launches), run once more from PTX."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from palmette import testing
from palmette.testing import LaunchMemory, RecordedLaunch

from .block import Schedule
from .counters import Counters
from .machine import Machine

# The machine with the module that a launch's kernel is in, and the kernel's name or a part of it.
Choice = Callable[[RecordedLaunch], "tuple[Machine, str]"]


def _groups(memory: Sequence[LaunchMemory]) -> list[list[LaunchMemory]]:
    """Those that overlap, as views of one storage do, together."""
    groups: list[list[LaunchMemory]] = []
    end = 0
    for part in sorted(memory, key=lambda m: m.address):
        if groups and part.address < end:
            groups[-1].append(part)
        else:
            groups.append([part])
        end = max(end, part.address + len(part.before))
    return groups


def replay(
    machine: Machine, kernel: str, launch: RecordedLaunch, schedule: Schedule = "block"
) -> dict[str, bytes]:
    """Runs a kernel on what memory held before a recorded launch, at the addresses that its parameters hold.

    Returns what the tensors that it may write hold then.
    """
    machine.forget()
    parts = {}
    for group in _groups(launch.memory):
        begin = group[0].address
        array = np.zeros(max(m.address + len(m.before) for m in group) - begin, np.uint8)
        for m in group:
            part = array[m.address - begin :][: len(m.before)]
            part[:] = np.frombuffer(m.before, np.uint8)
            if m.writable:
                parts[m.name] = part
        name = "+".join(m.name for m in group)
        machine.buffer(array, name, any(m.writable for m in group), address=begin)
    machine.launch(kernel, launch.grid, launch.block, launch.shared_bytes, launch.parameters, schedule)
    return {name: part.tobytes() for name, part in parts.items()}


@dataclass
class Replayed:
    """A launch that has run twice."""

    launch: RecordedLaunch  # with the emulator's results
    written: dict[str, bytes]  # the PTX's
    counters: Counters


@contextlib.contextmanager
def replays(choose: Choice, schedule: Schedule = "block") -> Iterator[list[Replayed]]:
    """Operators in the enclosed code return what the PTX computes.

    They run on the emulator, and each launch is replayed at once; what it wrote takes the place of what the
    emulator wrote, so that the kernels after it, and the caller, find that.
    """
    done: list[Replayed] = []
    errors: list[BaseException] = []

    def run(launch: RecordedLaunch) -> None:
        if errors:
            return
        try:
            machine, kernel = choose(launch)
            written = replay(machine, kernel, launch, schedule)
        except BaseException as error:  # nothing may leave a callback of C
            errors.append(error)
            return
        for m in launch.memory:
            if m.writable:
                ctypes.memmove(m.address, written[m.name], len(written[m.name]))
        done.append(Replayed(launch, written, machine.counters))

    try:
        with testing.backend("emulated"), testing.recorded_launches(run):
            yield done
    finally:
        if errors:
            raise errors[0]
