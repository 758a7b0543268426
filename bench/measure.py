# SPDX-License-Identifier: Apache-2.0
"""Interleaved timing: every round runs each contender once, so all meet the same moods of the machine."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.peers import Contender

MIN_ROUNDS, MAX_ROUNDS = 7, 25
# A peer that is this many times slower than the best one, after one round and after two, cannot become the
# best: it drops out.
HOPELESS = (8.0, 3.0)
_DEFAULT_CACHE = 32 << 20


def wake_threads(seconds: float = 0.5) -> None:
    """Keeps all threads busy: early calls may find both on one core."""
    x = torch.randn(768, 768)
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop:
        torch.mm(x, x)


class Evictor:
    """Reads a buffer of twice the last-level cache, on all threads: what comes next starts from main memory.

    In a model, the other layers do this between two calls for the same K and V. It also leaves all threads
    awake.
    """

    def __init__(self) -> None:
        size = min(max(64 << 20, 2 * _last_level_cache()), 256 << 20)
        self._rows = torch.ones(size // 4096 // 4, 4096)
        self._ones = torch.ones(4096)

    def __call__(self) -> None:
        torch.mv(self._rows, self._ones)


def _last_level_cache() -> int:
    sizes = [_DEFAULT_CACHE]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:])
        if scale and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * scale)
    return max(sizes)


class Race:
    """Ours and its peers, timed in turn.

    ``run`` does all of it. A benchmark framework that times ours itself calls ``warm_up``, then per round
    ``lap`` before the call, and hands the times to ``finish``.

    Args:
        ours: The contender that all ratios are about.
        peers: The others.
        budget_s: Seconds that the rounds may take, beyond the least number of rounds.
        min_rounds, max_rounds: Bounds of the number of rounds.
        drop_hopeless: Whether peers that are far behind stop after two rounds.
        before: Called before every timed call, untimed.
    """

    def __init__(
        self,
        ours: Contender,
        peers: Sequence[Contender],
        *,
        budget_s: float = 4.0,
        min_rounds: int = MIN_ROUNDS,
        max_rounds: int = MAX_ROUNDS,
        drop_hopeless: bool = True,
        before: Callable[[], None] = lambda: None,
    ) -> None:
        self.ours = ours
        self.peers = list(peers)
        self.budget_s, self.min_rounds, self.max_rounds = budget_s, min_rounds, max_rounds
        self.drop_hopeless, self.before = drop_hopeless, before
        self.times: dict[str, list[float]] = {c.name: [] for c in (ours, *self.peers)}
        self.rounds = min_rounds
        self._running = list(self.peers)
        self._turn = 0

    def warm_up(self) -> None:
        """Runs everyone twice, drops the hopeless, and chooses the number of rounds."""
        gc.collect()
        wake_threads(0.1)
        self.ours.run()
        own = _seconds(self.ours)
        for factor in HOPELESS:
            self.lap()
            best = min((min(self.times[peer.name]) for peer in self._running), default=0.0)
            if self.drop_hopeless:
                self._running = [p for p in self._running if min(self.times[p.name]) <= factor * best]
        lap = own + sum(min(self.times[peer.name]) for peer in self._running)
        self.rounds = int(min(max(self.budget_s / max(lap, 1e-9), self.min_rounds), self.max_rounds))
        for peer in self._running:  # the first calls count for the hopeless only
            self.times[peer.name].clear()

    def lap(self) -> None:
        """Times every peer once, each round in another order."""
        self._turn += 1
        shift = self._turn % max(1, len(self._running))
        for peer in self._running[shift:] + self._running[:shift]:
            self.before()
            self.times[peer.name].append(_seconds(peer))
        self.before()

    def finish(self, own_times: Sequence[float]) -> dict[str, dict[str, Any]]:
        """Statistics of everyone by name: median, least and number of times, in ms."""
        self.times[self.ours.name] = list(own_times)
        return {name: _statistics(times) for name, times in self.times.items()}

    def run(self) -> dict[str, dict[str, Any]]:
        self.warm_up()
        own = []
        for _ in range(self.rounds):
            self.lap()
            own.append(_seconds(self.ours))
        return self.finish(own)


def _seconds(contender: Contender) -> float:
    start = time.perf_counter()
    contender.run()
    return time.perf_counter() - start


def _statistics(times: Sequence[float]) -> dict[str, Any]:
    return {"ms": statistics.median(times) * 1e3, "min_ms": min(times) * 1e3, "rounds": len(times)}
