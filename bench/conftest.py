# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark's side: options, one test per job, and reports at the end of a session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench import machine
from bench.jobs import KINDS, Row, Settings
from bench.session import Session

_SESSION = pytest.StashKey[Session]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("palmette")
    group.addoption("--suite", default="default", choices=("quick", "default", "full"), help="which cases")
    group.addoption("--kinds", default=",".join(KINDS), help="kinds of jobs, with commas between")
    group.addoption("--only", default=[], action="append", help="part of a job's name; repeatable")
    group.addoption("--flex", action="store_true", help="compile flex_attention as a peer (slow)")
    group.addoption("--peer", default=[], action="append", help="module:function of a further peer")
    group.addoption("--warm", action="store_true", help="do not evict the caches before timed calls")
    group.addoption("--threads", type=int, default=None, help="torch threads")
    group.addoption("--results", default=None, help="name below bench/results for JSON, table and plots")


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    settings = Settings(
        suite=option("suite"),
        kinds=tuple(option("kinds").split(",")),
        only=tuple(option("only")),
        with_flex=option("flex"),
        more_peers=tuple(option("peer")),
        cold=not option("warm"),
    )
    config.stash[_SESSION] = Session(settings, threads=option("threads"), name=option("results"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    jobs = metafunc.module.jobs(metafunc.config.stash[_SESSION].settings)
    metafunc.parametrize("job", jobs, ids=[job.name for job in jobs])


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[[Row], Row]:
    """Records a row, prints its line and returns the row as reported."""
    session = request.config.stash[_SESSION]

    def add(row: Row) -> Row:
        if "skipped" in row:
            session.add(row)
            pytest.skip(row["skipped"])
        return session.add(row)

    return add


def pytest_report_teststatus(report: Any) -> tuple[str, str, str] | None:
    # the row's line says it all: no dot after it
    return ("passed", "", "") if report.when == "call" and report.passed else None


def pytest_sessionfinish(session: pytest.Session) -> None:
    ours = session.config.stash[_SESSION]
    if ours.rows and not session.config.option.collectonly:
        ours.finish()


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info.clear()  # it names the host
    machine_info.update(machine.describe())
