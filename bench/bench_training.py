# SPDX-License-Identifier: Apache-2.0
"""tree_attention, forward + backward on packed trees, against masked SDPA and per-branch causal SDPA."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from bench.bench_tree_attention import describe
from bench.cases import Case, make_inputs, training_cases
from bench.jobs import Job, Row, Settings, run_job, run_with
from bench.measure import Race
from bench.peers import Contender

Gradients = tuple[torch.Tensor, ...]  # dq, dk, dv
# Largest error against float64 relative to the largest gradient, about ten times what is measured.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}
# q k and p v in the forward; q k again, dO v, and three products that sum into dQ, dK and dV in the backward
FORWARD_PRODUCTS, BACKWARD_PRODUCTS = 2, 5


def jobs(settings: Settings) -> list[Job]:
    return [
        Job("training", case.name, lambda case=case: _prepare(case, settings), inference=False)
        for case in training_cases(settings.suite)
        if settings.wants("training", case.name)
    ]


def _prepare(case: Case, settings: Settings) -> tuple[Race, Row]:
    inputs = make_inputs(case)
    dout = torch.randn(inputs.q.shape, generator=torch.Generator().manual_seed(1)).to(case.torch_dtype)
    leaves = tuple(x.clone().requires_grad_() for x in inputs[:3])
    heads_first = tuple(x.transpose(0, 1).contiguous()[None].requires_grad_() for x in inputs[:3])
    contenders = [
        _ours(case, leaves, dout),
        _masked(case, heads_first, dout, folded=True),
        _masked(case, heads_first, dout, folded=False),
        _per_branch(case, heads_first, dout),
    ]
    want = _expected(case, inputs[:3], dout)
    errors = {c.name: _check(case, c, want) for c in contenders}
    flops = case.flops // FORWARD_PRODUCTS * (FORWARD_PRODUCTS + BACKWARD_PRODUCTS)
    ours, *others = contenders
    rounds = {"quick": 1, "default": 3, "full": 7}[settings.suite]
    race = Race(ours, others, budget_s=0.0, min_rounds=rounds, before=settings.before())
    # forward reads q, k, v and writes the output; backward reads these and dout and writes three gradients
    return race, {**describe(case), "flops": flops, "bytes": 4 * case.num_bytes(), "max_error": errors}


def _ours(case: Case, leaves: Gradients, dout: torch.Tensor) -> Contender:
    import palmette

    plan = palmette.plan_tree_attention(
        palmette.Tree(case.tree.parent, case.tree.num_tokens),
        "tokens",
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
    )

    def run() -> Gradients:
        return torch.autograd.grad(palmette.tree_attention(*leaves, plan), leaves, dout)

    return Contender("palmette", run, lambda gradients: gradients)


def _heads_last(gradients: Gradients) -> Gradients:
    return tuple(g[0].transpose(0, 1) for g in gradients)


def _masked(case: Case, leaves: Gradients, dout: torch.Tensor, *, folded: bool) -> Contender:
    """SDPA with a float mask: GQA's heads as rows of their KV head, or K and V expanded to all heads."""
    group = case.group_size
    mask = torch.zeros(case.geometry.visible().shape, dtype=case.torch_dtype)
    mask.masked_fill_(~case.geometry.visible(), -torch.inf)
    grad = dout.transpose(0, 1)[None].contiguous()
    if folded:
        mask = mask.repeat(group, 1)  # row = (query head of the KV head, query): q needs no copy
        grad = grad.unflatten(1, (-1, group)).flatten(2, 3)

    def run() -> Gradients:
        q, k, v = leaves
        if folded:
            out = F.scaled_dot_product_attention(q.unflatten(1, (-1, group)).flatten(2, 3), k, v, mask)
        else:
            out = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=group > 1)
        return torch.autograd.grad(out, leaves, grad)

    name = "masked SDPA, folded" if folded else "masked SDPA, expanded"
    return Contender(name, run, _heads_last)


def _per_branch(case: Case, leaves: Gradients, dout: torch.Tensor) -> Contender:
    """Every path from root to leaf as a causal sequence, prefix included; equal lengths share a call."""
    geometry = case.geometry
    index = np.arange(len(geometry.token_end))
    last = index[geometry.token_end == index + 1]  # tokens without anything below
    paths = [index[(index <= pos) & (pos < geometry.token_end)] for pos in last]
    owner = np.full(len(index), -1)
    for branch, path in enumerate(paths):
        owner[path[owner[path] < 0]] = branch
    calls = []
    lengths = np.array([len(path) for path in paths])
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        rows = np.concatenate([paths[i] for i in members])
        first = np.concatenate([owner[paths[i]] == i for i in members])  # a shared token's output counts once
        grad = dout[torch.from_numpy(rows)] * torch.from_numpy(first)[:, None, None]
        shape = (len(members), -1, *grad.shape[1:])
        calls.append((torch.from_numpy(rows), len(members), grad.view(shape).transpose(1, 2).contiguous()))

    def run() -> Gradients:
        outs = []
        for rows, count, _ in calls:
            q, k, v = (x[0].index_select(1, rows).unflatten(1, (count, -1)).transpose(0, 1) for x in leaves)
            outs.append(
                F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=case.group_size > 1)
            )
        return torch.autograd.grad(outs, leaves, [grad for *_, grad in calls])

    return Contender("per branch, causal", run, _heads_last)


def _expected(case: Case, inputs: tuple[torch.Tensor, ...], dout: torch.Tensor) -> Gradients:
    """dq, dk, dv of the first KV head in float64."""
    group = case.group_size
    q, k, v = (
        x[:, : group if i == 0 else 1].double().transpose(0, 1).requires_grad_() for i, x in enumerate(inputs)
    )
    scores = (q @ k.transpose(1, 2)) * case.head_dim**-0.5
    out = scores.masked_fill(~case.geometry.visible(), -torch.inf).softmax(-1) @ v
    gradients = torch.autograd.grad(out, (q, k, v), dout[:, :group].double().transpose(0, 1))
    return tuple(g.transpose(0, 1) for g in gradients)


def _check(case: Case, contender: Contender, want: Gradients) -> float:
    got: Any = contender.read(contender.run())
    worst = 0.0
    for name, g, w in zip(("dq", "dk", "dv"), got, want, strict=True):
        error = ((g[:, : w.shape[1]].double() - w).abs().max() / w.abs().max()).item()
        if not error <= TOLERANCE[case.torch_dtype]:
            raise AssertionError(
                f"{case.name}: {name} of {contender.name} is off by {error:.3g} of its largest value"
            )
        worst = max(worst, error)
    return worst


def test_training(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "training"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
