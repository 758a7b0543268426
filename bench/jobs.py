# SPDX-License-Identifier: Apache-2.0
"""A job is one row of a report: what to prepare, and whom to time. Both runners run jobs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from bench.measure import Evictor, Race

Row = dict[str, Any]
KINDS = ("attention", "training", "merge", "checks", "model", "sparse", "codec", "prefix")


@dataclass
class Settings:
    """What the command line says.

    Attributes:
        suite: Which cases, see ``bench.cases.SUITES``.
        kinds: Which kinds of jobs.
        only: Substrings of which a job's name must contain one; empty: all jobs.
        with_flex: Whether to compile flex_attention as a peer.
        more_peers: Further peers, "module:function" each, see ``bench.peers.peers``.
        cold: Whether to evict the caches before every timed call.
    """

    suite: str = "default"
    kinds: tuple[str, ...] = KINDS
    only: tuple[str, ...] = ()
    with_flex: bool = False
    more_peers: tuple[str, ...] = ()
    cold: bool = True
    _evictor: Evictor | None = field(default=None, repr=False)

    @property
    def budget_s(self) -> float:
        """Seconds of timing per attention case."""
        return {"quick": 1.0, "default": 1.5, "full": 4.0}[self.suite]

    def before(self) -> Callable[[], None]:
        """What runs before every timed call."""
        if not self.cold:
            return lambda: None
        if self._evictor is None:
            self._evictor = Evictor()
        return self._evictor

    def wants(self, kind: str, name: str) -> bool:
        return kind in self.kinds and (not self.only or any(part in name for part in self.only))


@dataclass
class Job:
    """One row.

    Attributes:
        kind: One of KINDS.
        name: Unique within its kind.
        prepare: Builds tensors and contenders, checks their results, and returns them with the row as known
            so far.
        inference: Whether it all runs under ``torch.inference_mode``.
    """

    kind: str
    name: str
    prepare: Callable[[], tuple[Race, Row]]
    inference: bool = True


class SkipJobError(Exception):
    """A job that this machine cannot do; the message says why."""


def run_job(job: Job, measure: Callable[[Race], dict[str, Any]] = Race.run) -> Row:
    """Runs a job; the row gets ``kind``, ``name`` and ``times``, or ``skipped``."""
    base: Row = {"kind": job.kind, "name": job.name}
    with torch.inference_mode(job.inference):
        try:
            race, row = job.prepare()
        except SkipJobError as reason:
            return {**base, "skipped": str(reason)}
        # a row may learn more while it is timed, so it is read afterwards
        times = measure(race)
        return {**base, **row, "times": times, "ours": race.ours.name}


def run_with(benchmark: Any) -> Callable[[Race], dict[str, Any]]:
    """Lets the fixture of pytest-benchmark time ours, and the peers run in its setup of every round."""

    def measure(race: Race) -> dict[str, Any]:
        race.warm_up()
        benchmark.pedantic(race.ours.run, setup=race.lap, rounds=race.rounds, iterations=1)
        return race.finish(benchmark.stats.stats.data)

    return measure
