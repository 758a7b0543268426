# SPDX-License-Identifier: Apache-2.0
"""One run of the benchmarks: ceilings at both ends, rows in between, then JSON, table and plots."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any

import torch

from bench import machine, report, trees
from bench.floors import Ceilings, measure_ceilings
from bench.jobs import Row, Settings
from bench.measure import wake_threads
from bench.pages import replace

RESULTS = Path(__file__).parent / "results"


class Session:
    """Collects rows and reports them.

    Args:
        settings: Of the run.
        threads: torch threads; None: as torch chooses.
        name: Of the results, below bench/results; None: ``local/latest``.
    """

    def __init__(self, settings: Settings, *, threads: int | None = None, name: str | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.settings = settings
        self.path = RESULTS / (name or "local/latest")
        self.rows: list[Row] = []
        self._ceilings: Ceilings | None = None

    @property
    def ceilings(self) -> Ceilings:
        """The machine's rates, measured at first use."""
        if self._ceilings is None:
            wake_threads()
            self._ceilings = measure_ceilings(2.0 if self.settings.suite == "quick" else 4.0)
            print(report.ceilings_line(self._ceilings), flush=True)
        return self._ceilings

    def add(self, row: Row) -> Row:
        """Evaluates a row with the ceilings known so far, prints its line and keeps it.

        It is on disk then: ``python -m bench --report FILE.json`` reports of a run that was cut off.
        """
        row = report.evaluate(row, self.ceilings)
        self.rows.append(row)
        print(report.line(row), flush=True)
        replace(self.path.with_suffix(".json"), json.dumps(self._result(), indent=1) + "\n")
        return row

    def _result(self) -> dict[str, Any]:
        return {
            "machine": machine.describe(),
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
            "suite": self.settings.suite,
            "caches": "cold" if self.settings.cold else "warm",
            "trees": "recorded" if trees.has_traces() else "generated",
            "ceilings": self.ceilings.as_dict(),
            "rows": [report.evaluate(row, self.ceilings) for row in self.rows],
        }

    def finish(self) -> dict[str, Any]:
        """Measures the ceilings again, evaluates all rows with the better rates, and writes the reports."""
        # a busy moment at the start must not make the floors look higher than they are
        self._ceilings = self.ceilings.best(measure_ceilings(2.0))
        result = self._result()
        write(self.path, result)
        print("\n" + report.summary(result))
        print(f"\n{self.path}.json, .md and plots beside them", flush=True)
        return result


def write(path: Path, result: dict[str, Any]) -> None:
    """Writes ``path``.json, ``path``.md and plots, each whole or not at all."""
    replace(path.with_suffix(".json"), json.dumps(result, indent=1) + "\n")
    replace(path.with_suffix(".md"), report.markdown(result, path.name))
    for old in path.parent.glob(f"{path.name}-*.png"):
        old.unlink()
    with contextlib.suppress(ImportError):  # no matplotlib, no plots
        from bench.plot import plot

        plot(result, path)
