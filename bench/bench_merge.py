# SPDX-License-Identifier: Apache-2.0
"""merge_states against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.jobs import Job, Row, Settings, run_job, run_with
from bench.measure import Race
from bench.peers import Contender

# queries, states per query (None: ragged, 1 to 8), query heads, head_dim, dtype
SHAPES = (
    (64, 2, 32, 128, torch.float32),
    (256, 2, 32, 128, torch.float32),
    (48, 4, 32, 128, torch.float32),
    (256, 9, 32, 128, torch.float32),
    (256, 9, 32, 128, torch.bfloat16),
    (256, None, 32, 128, torch.float32),
)


def jobs(settings: Settings) -> list[Job]:
    found = []
    for shape in SHAPES[:2] if settings.suite == "quick" else SHAPES:
        queries, states, heads, dim, dtype = shape
        name = f"merge {queries} x {states or 'ragged'} states {heads} heads D{dim} {str(dtype)[6:]}"
        if settings.wants("merge", name):
            found.append(Job("merge", name, lambda shape=shape: _prepare(*shape, settings)))
    return found


def _prepare(
    queries: int, states: int | None, heads: int, dim: int, dtype: torch.dtype, settings: Settings
) -> tuple[Race, Row]:
    import palmette

    draw = torch.Generator().manual_seed(0)
    indptr = None
    if states is None:
        counts = torch.randint(1, 9, (queries,), generator=draw)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        shape: tuple[int, ...] = (int(counts.sum()), heads)
    else:
        shape = (queries, states, heads)
    outs = torch.randn(*shape, dim, generator=draw).to(dtype)
    lses = torch.randn(*shape, generator=draw)

    peer = _dense(outs, lses) if indptr is None else _ragged(outs, lses, indptr.long(), queries)
    ours = Contender("palmette", lambda: palmette.merge_states(outs, lses, indptr), lambda result: result[0])
    torch.testing.assert_close(
        ours.read(ours.run()), peer.read(peer.run()), atol=3e-2 if dtype != torch.float32 else 1e-5, rtol=1e-3
    )
    others = [peer]
    if settings.with_flex:
        compiled = torch.compile(peer.run)
        others.append(Contender("torch.compile", compiled, peer.read))
    written = queries * heads * dim
    row = {
        "group": "merge",
        "flops": 2 * outs.numel(),
        "bytes": (outs.numel() + written) * outs.element_size(),
    }
    return Race(ours, others, budget_s=settings.budget_s / 4, before=settings.before()), row


def _dense(outs: torch.Tensor, lses: torch.Tensor) -> Contender:
    def run() -> tuple[torch.Tensor, torch.Tensor]:
        weight = torch.softmax(lses, 1).to(outs.dtype)
        return torch.einsum("nshd,nsh->nhd", outs, weight), torch.logsumexp(lses, 1)

    def two() -> tuple[torch.Tensor, torch.Tensor]:
        lse = torch.logaddexp(lses[:, 0], lses[:, 1])
        weight = torch.exp(lses[:, 1] - lse).to(outs.dtype)
        return torch.lerp(outs[:, 0], outs[:, 1], weight[..., None]), lse

    call: Callable[[], Any] = two if outs.shape[1] == 2 else run
    return Contender("torch", call, lambda result: result[0])


def _ragged(outs: torch.Tensor, lses: torch.Tensor, indptr: torch.Tensor, queries: int) -> Contender:
    owner = torch.repeat_interleave(torch.arange(queries), indptr.diff())

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        highest = torch.segment_reduce(lses, "max", offsets=indptr)
        weight = torch.exp(lses - highest[owner])
        total = torch.segment_reduce(weight, "sum", offsets=indptr)
        out = torch.zeros(queries, *outs.shape[1:]).index_add_(0, owner, outs * weight[..., None])
        return out / total[..., None], highest + torch.log(total)

    return Contender("torch", run, lambda result: result[0])


def test_merge_states(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "merge_states"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
