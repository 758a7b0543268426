# SPDX-License-Identifier: Apache-2.0
"""TreeAttentionPlan.update: a kept plan equals a fresh one; stale plans raise; compiled regions follow."""

from __future__ import annotations

import random

import pytest
import torch
from palmette.reference import tree as reference
from palmette.tree import Tree
from palmette.tree_plan import plan_tree_attention
from plan_coverage import HEADS, check, coverage, used
from test_tree import change


@pytest.mark.parametrize("queries", ["leaves", "tokens"])
@pytest.mark.parametrize("identity", [False, True], ids=["slots", "identity"])
def test_one_plan_over_thousands_of_changes(identity, queries):
    """After every change the plan that was kept shows each query what a fresh plan of a fresh tree does."""
    rng = random.Random(identity)
    slots = None if identity else [7, 3, 5, 4]
    tree, want = Tree([-1, 0, 0], [2, 1, 1], slots), reference.Tree([-1, 0, 0], [2, 1, 1], slots)
    plans = [
        plan_tree_attention(tree, queries, split=split, block_len=8, **HEADS) for split in ("auto", "flatten")
    ]
    next_slot = 100
    for step in range(1500 if identity else 600):
        next_slot = change(tree, want, rng, next_slot)
        if queries == "leaves" and not all(want.path_length(leaf) for leaf in want.leaves()):
            continue
        fresh = build_again(want)
        for plan in plans:
            plan.update()
            plan.check_fresh()
            other = plan_tree_attention(fresh, queries, split=plan.split, block_len=8, **HEADS)
            mine, theirs = used(plan), used(other)
            assert (mine["query"] == theirs["query"]).all()
            assert plan.io.kv_tokens_unique == other.io.kv_tokens_unique
            assert plan.io.kv_tokens_per_sequence == other.io.kv_tokens_per_sequence
            if identity:  # slots are depth-first numbers, so that even the tables are the same
                for name, table in mine.items():
                    assert (table == theirs[name]).all(), name
            elif step % 10 == 0:
                check(plan, want, queries)
            elif plan is plans[step % 2]:  # decoding is slow: the splits take turns
                assert (coverage(plan) == coverage(other)).all()


def build_again(want: reference.Tree) -> Tree:
    """A new tree like the reference is now, without its history."""
    order = sorted(want.order())
    rank = {node: i for i, node in enumerate([-1, *order], start=-1)}
    parent = [rank[want.parents[n]] for n in order]
    tree = object.__new__(Tree)
    if order:
        tree.__init__(parent, [len(want.tokens[n]) for n in order], None if want.identity else want.slots())
    else:
        tree.__init__([-1], [0], None if want.identity else [])
        tree.prune(0)
    return tree


def test_stale_plans_raise_until_updated():
    tree = Tree([-1, 0], [3, 2])
    plan = plan_tree_attention(tree, **HEADS)
    plan.check_fresh()
    for mutate in (lambda: tree.append([1], [1]), lambda: tree.branch(0, 1), lambda: tree.prune(1)):
        mutate()
        with pytest.raises(
            ValueError, match=r"plan must be of its tree's version \d+, got one of version \d+"
        ):
            plan.check_fresh()
        plan.update()
        plan.check_fresh()
    assert plan.num_queries == 1


def test_plans_of_the_same_tree_share_slots():
    tree = Tree([-1], [1], [5])
    plan = plan_tree_attention(tree, **HEADS)
    for step in range(200):
        tree.append([0], [1], [step])
        plan.update()
        assert plan.slots.data_ptr() == tree.arena.data_ptr()


def test_tables_grow_seldom():
    """Appending a thousand tokens to each of eight leaves moves the tables a few times only."""
    tree = Tree([-1] + [0] * 8, [100] + [0] * 8, range(100))
    plan = plan_tree_attention(tree, **HEADS)
    moves, before = 0, [t.data_ptr() for t in plan.tensors]
    for step in range(1000):
        tree.append(tree.leaves, [1] * 8, range(8 * step, 8 * step + 8))
        plan.update()
        now = [t.data_ptr() for t in plan.tensors]
        moves += now != before
        before = now
    assert moves <= 16


def test_empty_forests_have_empty_plans():
    tree = Tree([-1], [3])
    plan = plan_tree_attention(tree, **HEADS)
    tree.prune(0)
    plan.update()
    assert plan.counts[:6].tolist() == [0] * 6
    assert plan.io.kv_tokens_read == 0


def test_explicit_queries_cannot_be_updated():
    plan = plan_tree_attention(Tree([-1], [3]), ([0, 0], [2, 1]), **HEADS)
    with pytest.raises(ValueError, match="queries must be 'leaves' or 'tokens' for a plan that is updated"):
        plan.update()


def test_compiled_regions_follow_updates_without_recompiling():
    """Counts and versions are tensors: a step changes no Python number that a compiled region reads."""
    tree = Tree([-1, 0, 0], [5, 0, 0])
    tree.append([1, 2], [1, 1])
    plan = plan_tree_attention(tree, **HEADS)
    compiled = 0

    def count_graphs(graph, inputs):
        nonlocal compiled
        compiled += 1
        return graph.forward

    @torch.compile(fullgraph=True, backend=count_graphs)
    def region(x, plan):
        if not torch.compiler.is_compiling():
            plan.check_fresh()
        return x + sum(t.sum() * 0 for t in plan.tensors) + plan.counts[6]

    for _ in range(5):
        tree.append([1, 2], [1, 1])
        plan.update()
        assert region(torch.zeros(1), plan).item() == tree.version
    assert compiled == 1
