# SPDX-License-Identifier: Apache-2.0
"""tree_attention, forward: decoding and verification on the workloads of bench/cases.py."""

from __future__ import annotations

from typing import Any

from bench import check
from bench.cases import Case, attention_cases, make_inputs
from bench.jobs import Job, Row, Settings, SkipJobError, run_job, run_with
from bench.machine import available_memory
from bench.measure import Race
from bench.peers import ours, peers


def jobs(settings: Settings) -> list[Job]:
    return [
        Job("attention", case.name, lambda case=case: _prepare(case, settings))
        for case in attention_cases(settings.suite)
        if settings.wants("attention", case.name)
    ]


def _prepare(case: Case, settings: Settings) -> tuple[Race, Row]:
    needed = 5 * case.num_bytes()  # the pool, the peers' head-major copy, and nodes gathered from that
    if needed > available_memory():
        raise SkipJobError(f"needs {needed / 2**30:.0f} GiB of memory")
    inputs = make_inputs(case)
    mine = ours(case, inputs)
    others, not_run = peers(case, inputs, with_flex=settings.with_flex, more=settings.more_peers)
    queries = check.sample(case)
    want = check.expected(case, inputs, queries)
    errors = {
        contender.name: check.check(contender.name, case, contender.read(contender.run()), want, queries)
        for contender in (mine, *others)
    }
    race = Race(mine, others, budget_s=settings.budget_s, before=settings.before())
    return race, {**describe(case), "not_run": not_run, "max_error": errors}


def describe(case: Case) -> Row:
    """What a report needs to know of a case."""
    return {
        "group": case.group,
        "heads": f"{case.num_q_heads}/{case.num_kv_heads}",
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "queries": len(case.geometry.pos),
        "tokens": len(case.geometry.token_end),
        "rows_per_key": case.rows_per_key,
        "flops": case.flops,
        "bytes": case.num_bytes(),
    }


def test_tree_attention(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "tree_attention"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
