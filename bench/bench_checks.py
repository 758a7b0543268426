# SPDX-License-Identifier: Apache-2.0
"""What has no peer: time linear in the work, the cost of updating a plan, and extra memory."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.cases import Case, chain_case, irregular_case, make_inputs, medusa_case, star_case
from bench.jobs import Job, Row, Settings, SkipJobError, run_job, run_with
from bench.measure import Race
from bench.peers import Contender, ours

UPDATE_SHARE = 0.02
MEMORY_PER_THREAD = 1 << 20


def jobs(settings: Settings) -> list[Job]:
    found = [
        Job("checks", f"linear: {name}", lambda cases=cases: _linear(*cases, settings))
        for name, cases in {
            "chain 8192 / 4096": (chain_case(4096), chain_case(8192)),
            "star 16 on 8192 / 4096": (star_case(16, 4096), star_case(16, 8192)),
            "star 64 on 8192 / 4096": (star_case(64, 4096), star_case(64, 8192)),
        }.items()
    ]
    found.append(Job("checks", "update: one step of 64 leaves, 8k tokens", lambda: _update(settings)))
    found += [
        Job("checks", f"memory: {case.name}", lambda case=case: _memory(case))
        for case in (chain_case(), star_case(64), irregular_case(), medusa_case(256, 4096))
    ]
    return [job for job in found if settings.wants("checks", job.name)]


def _linear(small: Case, large: Case, settings: Settings) -> tuple[Race, Row]:
    contenders = [replace(ours(case, make_inputs(case)), name=case.name) for case in (large, small)]
    work = {case.name: (case.flops, case.num_bytes()) for case in (small, large)}
    race = Race(contenders[0], contenders[1:], budget_s=settings.budget_s / 2, before=settings.before())
    return race, {"check": {"what": "linear", "work": work}}


def _update(settings: Settings) -> tuple[Race, Row]:
    """A decode step's change of tree and plan, a token per leaf, against one layer's attention."""
    import palmette

    case = star_case(64)
    inputs = make_inputs(case)
    slots = torch.arange(len(case.geometry.token_end))
    tree = palmette.Tree(case.tree.parent, case.tree.num_tokens, slots)
    plan = palmette.plan_tree_attention(tree, num_q_heads=32, num_kv_heads=8, head_dim=128)
    leaves, one = tree.leaves, torch.ones(64, dtype=torch.int32)
    free = len(slots)

    def step() -> None:
        nonlocal free
        tree.append(leaves, one, torch.arange(free, free + 64))
        plan.update()
        free += 64

    attention = replace(ours(case, inputs), name="attention")
    update = Contender("update", step, lambda result: result)
    # caches stay warm: in decoding, the tree and the plan are touched in every step
    race = Race(attention, [update], budget_s=settings.budget_s / 2)
    return race, {"check": {"what": "share", "limit": UPDATE_SHARE}}


def _memory(case: Case) -> tuple[Race, Row]:
    command = [sys.executable, "-m", "bench.memory", case.name, str(torch.get_num_threads())]
    if not Path("/proc/self/clear_refs").exists():
        raise SkipJobError("needs /proc/self/clear_refs")
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:])} failed: {done.stderr.strip().splitlines()[-1]}")
    output = len(case.geometry.pos) * case.num_q_heads * case.head_dim * case.torch_dtype.itemsize
    limit = 2 * output + MEMORY_PER_THREAD * torch.get_num_threads()
    check = {"what": "memory", "extra_bytes": int(done.stdout), "limit_bytes": limit}
    nothing = Contender("nothing", lambda: None, lambda result: result)  # measured already, in that process
    return Race(nothing, [], budget_s=0.0, min_rounds=1, max_rounds=1), {"check": check}


def test_checks(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "checks"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
