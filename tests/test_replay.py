# SPDX-License-Identifier: Apache-2.0
"""Replays recorded and generated reasoning trees step by step and compares the KV tokens that plans count.

A trace lists nodes as [start step, end step, children]. At every decode step each leaf appends one token,
then the step's KV reads are counted; a leaf at its end step is branched if it has children, else pruned. The
recorded totals are those of the authors of DeFT (arXiv 2404.00242); they are read where the project's shared
data lies beside the repository.
"""

from __future__ import annotations

import functools
import json
import random
from pathlib import Path

import numpy as np
import pytest
from palmette.tree import Tree
from palmette.tree_plan import plan_tree_attention

TRACES = Path(__file__).parents[2] / "shared" / "data" / "tree_traces"
TILED = ("flatten", "node", "node_chunk")


def replay(trace, prompt_len: int, max_seq_len: int, splits=TILED) -> dict[str, int]:
    """KV tokens read in all steps, per split, and "seq" for per-sequence attention. One head: one tile."""
    tree = Tree([-1], [prompt_len])
    tree.branch(0, len(trace[0][2]))
    plans = {
        s: plan_tree_attention(tree, num_q_heads=1, num_kv_heads=1, head_dim=64, split=s) for s in splits
    }
    totals = dict.fromkeys([*splits, "seq"], 0)
    for step in range(1, max_seq_len - prompt_len):
        leaves = tree.leaves
        if leaves.numel() == 0:
            break
        tree.append(leaves, [1] * leaves.numel())
        for split, plan in plans.items():
            plan.update()
            totals[split] += plan.io.kv_tokens_read
        totals["seq"] += plan.io.kv_tokens_per_sequence
        for leaf in sorted(leaves.tolist()):
            _, end, children = trace[leaf]  # nodes are numbered in the order in which they are created
            if end == step and children:
                tree.branch(leaf, len(children))
            elif end == step:
                tree.prune(leaf)
    return totals


def plain_replay(trace, prompt_len: int, max_seq_len: int) -> dict[str, int]:
    """The same rule with arrays of births and deaths, and no tree that changes."""
    n = len(trace)
    parent = np.full(n, -1)
    for node, (_, _, children) in enumerate(trace):
        parent[children] = node
    start = np.array([1 if p == 0 else trace[p][1] + 1 if p > 0 else 0 for p in parent])
    end = np.array([t[1] for t in trace])
    death = end.copy()  # the last step at which a node counts: that of its last leaf
    for node in range(n - 1, 0, -1):
        death[parent[node]] = max(death[parent[node]], death[node])
    flat = seq = 0
    for step in range(1, max_seq_len - prompt_len):
        born = start <= step
        born[0] = True
        live = born & (death >= step)
        if not live.any():
            break
        length = np.where(live, np.minimum(step, end) - start + 1, 0)
        length[0] = prompt_len
        flat += int(length.sum())
        for leaf in np.flatnonzero(live & (end >= step)):
            node = leaf
            while node >= 0:
                seq += int(length[node])
                node = parent[node]
    return dict.fromkeys(TILED, flat) | {"seq": seq}


def generated_trace(seed: int) -> list[list]:
    """A random trace whose nodes are numbered in the order in which they are created."""
    rng = random.Random(seed)
    trace = [[-1, 0, []]]
    ends = {0: [0]}  # step -> nodes that end there
    for step in range(60):
        for node in sorted(ends.get(step, [])):
            wanted = rng.choice([0, 0, 1, 2, 5]) if node else 4
            if len(trace) + wanted > 60:
                continue
            for _ in range(wanted):
                trace[node][2].append(len(trace))
                end = step + rng.randint(1, 20)
                ends.setdefault(end, []).append(len(trace))
                trace.append([step + 1, end, []])
    return trace


@pytest.mark.parametrize("seed", range(6))
def test_generated_traces(seed):
    trace = generated_trace(seed)
    for prompt_len, max_seq_len in [(1, 90), (100, 190), (1000, 1030)]:
        assert replay(trace, prompt_len, max_seq_len) == plain_replay(trace, prompt_len, max_seq_len)


@pytest.mark.parametrize(
    ("prompt_len", "branches", "max_seq_len"), [(10, 1, 40), (100, 7, 130), (4000, 50, 4040), (1, 300, 12)]
)
def test_few_shot_in_closed_form(prompt_len, branches, max_seq_len):
    n = max_seq_len - prompt_len - 1
    trace = [[-1, 0, list(range(1, branches + 1))]] + [[1, 10_000, []]] * branches
    totals = replay(trace, prompt_len, max_seq_len)
    flat = n * prompt_len + branches * n * (n + 1) // 2
    tiles = -(-branches // 256)  # more queries than a tile holds read the prompt once per tile: real passes
    for split in TILED:
        assert totals[split] == flat + (tiles - 1) * n * prompt_len
    assert totals["seq"] == branches * (n * prompt_len + n * (n + 1) // 2)


@functools.cache
def recorded(name: str) -> dict:
    return json.loads((TRACES / f"{name}.json").read_text())


@functools.cache
def replayed(name: str, tree: int, prompt_len: int, max_seq_len: int) -> dict[str, int]:
    return replay(recorded(name)["trees"][tree], prompt_len, max_seq_len)


@pytest.mark.parametrize("name", ["set128ToT", "sorting128ToT"])
def test_recorded_totals(name):
    if not TRACES.is_dir():
        pytest.skip(
            "the recorded traces are not part of the project; they are read from ../shared/data/tree_traces"
        )
    totals = recorded(name)["recorded_kv_tokens"]
    assert len(totals) == 30
    for total in totals:
        key = (name, total["tree"], total["prompt_len"], total["max_seq_len"])
        assert replayed(*key)[total["method"]] == total["kv_tokens"], total
