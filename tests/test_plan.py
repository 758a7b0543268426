# SPDX-License-Identifier: Apache-2.0
"""plan_tree_attention: every visible pair is met once, whatever the split; tasks; accounting; bad input."""

from __future__ import annotations

import re

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from palmette.reference import tree as reference
from palmette.tree import Tree
from palmette.tree_plan import SPLITS, plan_tree_attention
from plan_coverage import FREE_PARTIAL_BYTES, HEADS, check, used
from plan_oracle import check_plan
from strategies import forests, query_pairs

# ---- coverage


@pytest.mark.parametrize("split", SPLITS)
@hypothesis.given(data=st.data())
def test_covers_every_visible_pair_once(split, data):
    forest = data.draw(forests(min_root_tokens=1))
    queries = data.draw(st.one_of(st.sampled_from(["leaves", "tokens"]), query_pairs(forest)))
    num_kv_heads, group = data.draw(st.sampled_from([(1, 1), (2, 4), (1, 32), (8, 100), (1, 300)]))
    block_len = data.draw(st.sampled_from([1, 2, 3, 7, 16, None]))
    plan = plan_tree_attention(
        Tree(*forest),
        queries,
        num_q_heads=num_kv_heads * group,
        num_kv_heads=num_kv_heads,
        head_dim=data.draw(st.sampled_from([1, 64, 4096])),
        split=split,
        block_len=block_len,
    )
    check(plan, reference.Tree(*forest), queries)


TREES = {
    "single token": ([-1], [1]),
    "single node": ([-1], [1000]),
    **{f"star of {n}": ([-1] + [0] * n, [40] + [3] * n) for n in (1, 31, 32, 33, 63, 64, 65, 257)},
    "chain of 1000": (list(range(-1, 999)), [1] * 1000),
    "chain with empty nodes": (list(range(-1, 99)), [1, 0, 0, 5] * 25),
    "empty leaves": ([-1, 0, 0, 0, 3, 3], [7, 0, 2, 3, 0, 0]),
    "reversed ids": ([3, 3, 1, -1, 1], [2, 3, 4, 5, 6]),
    "forest of unequal depth": ([-1, -1, 1, 2, 3, -1, 5, 5], [300, 1, 2, 3, 4, 0, 50, 60]),
    "independent sequences": ([-1] * 70, [5 + i % 3 for i in range(70)]),
    "binary": ([-1] + [(i - 1) // 2 for i in range(1, 127)], [3] * 127),
    "long prefix": ([-1] + [0] * 8, [6000] + [20] * 8),
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tree", TREES.values(), ids=TREES.keys())
def test_edge_trees(tree, split):
    forest = (*tree, [(7 * i) % 8009 for i in range(sum(tree[1]))])
    plan = plan_tree_attention(Tree(*forest), split=split, **HEADS)
    check(plan, reference.Tree(*forest), "leaves")
    if sum(tree[1]) <= 400:
        check(
            plan_tree_attention(Tree(*forest), "tokens", split=split, **HEADS),
            reference.Tree(*forest),
            "tokens",
        )


@pytest.mark.parametrize("split", ["flatten", "node_chunk"])
@pytest.mark.parametrize("total", [15, 16, 17, 31, 32, 33])
@pytest.mark.parametrize("cut", [0, 1, 16], ids=lambda c: f"first node {c}")
def test_blocks_around_node_ends(split, total, cut):
    cut = min(cut, total - 1)
    forest = ([-1, 0], [cut, total - cut])
    plan = plan_tree_attention(Tree(*forest), split=split, block_len=16, **HEADS)
    check(plan, reference.Tree(*forest), "leaves")
    p = used(plan)
    lengths = [p["segment"][first:last, 1].sum() for first, last, _, _ in p["item"]]
    if split == "flatten":
        assert lengths == [16] * (total // 16) + [total % 16] * (total % 16 > 0)
    else:
        want = [[16] * (n // 16) + [n % 16] * (n % 16 > 0) for n in (cut, total - cut)]
        assert lengths == want[0] + want[1]


def test_deep_chains_are_planned_without_recursion():
    depth = 100_000
    for slots in (None, torch.arange(depth).flip(0)):
        tree = Tree(range(-1, depth - 1), [1] * depth, slots)
        for split in SPLITS:
            plan = plan_tree_attention(tree, split=split, **HEADS)
            assert plan.io.kv_tokens_read == depth


@pytest.mark.parametrize("split", SPLITS)
def test_tokens_of_a_long_chain(split):
    """Causal attention: a tile of queries reads the keys before it, and little more."""
    forest = ([-1], [700])
    plan = plan_tree_attention(Tree(*forest), "tokens", split=split, **HEADS)
    check(plan, reference.Tree(*forest), "tokens")


# ---- splits


def test_node_split_reads_each_node_as_one_item():
    tree = Tree([-1, 0, 0, 1, 1, 2], [9, 300, 0, 4, 5, 6])
    plan = plan_tree_attention(tree, split="node", num_q_heads=64, num_kv_heads=64, head_dim=8)
    p = used(plan)
    assert [(p["segment"][i[0], 2], i[2], i[3]) for i in p["item"]] == [
        (0, 0, 3),
        (9, 0, 2),
        (309, 0, 1),
        (313, 1, 2),
        (318, 2, 3),
    ]


def test_sequence_split_gives_every_query_its_path():
    tree = Tree([-1] + [0] * 3, [9, 3, 4, 5], range(100, 121))
    p = used(plan_tree_attention(tree, split="sequence", **HEADS))
    assert p["item"][:, 2:].tolist() == [[0, 1], [1, 2], [2, 3]]
    assert [p["segment"][i[0] : i[1], 1].sum() for i in p["item"]] == [12, 13, 14]


@pytest.mark.parametrize("prefix", [8, 64, 1024, 8192])
@pytest.mark.parametrize("leaves", [2, 8, 64])
def test_auto_is_never_dearer_than_a_pure_split(prefix, leaves):
    """In the units that a plan is judged by: what auto reads is bounded by what per-sequence reading does."""
    tree = Tree([-1] + [0] * leaves, [prefix] + [32] * leaves)
    auto = plan_tree_attention(tree, num_q_heads=32, num_kv_heads=8, head_dim=128).io
    assert auto.kv_tokens_unique <= auto.kv_tokens_read <= auto.kv_tokens_per_sequence
    if prefix >= 1024:
        assert auto.kv_tokens_read == auto.kv_tokens_unique


def test_auto_groups_the_nodes_of_a_token_tree():
    parent = [-1] + [(i - 1) // 3 for i in range(1, 64)]
    queries = (range(64), [4095] + [0] * 63)
    tree = Tree(parent, [4096] + [1] * 63)
    plan = plan_tree_attention(tree, queries, num_q_heads=32, num_kv_heads=8, head_dim=128)
    lengths = [plan.segment[i[0] : i[1], 1].sum().item() for i in used(plan)["item"]]
    drafts = [n for n in lengths if n <= 64]
    assert sum(drafts) == 63
    assert len(drafts) < 16  # of 63 nodes
    assert plan.io.kv_tokens_read == plan.io.kv_tokens_unique


def test_causal_queries_drop_out_of_items():
    """Queries in the middle of a node do not pay for the keys behind them."""
    plan = plan_tree_attention(Tree([-1], [256]), "tokens", num_q_heads=1, num_kv_heads=1, head_dim=128)
    pairs = sum(
        int(plan.segment[first:last, 1].sum()) * (query_end - query_begin)
        for first, last, query_begin, query_end in used(plan)["item"]
    )
    assert pairs < 0.62 * 256 * 256  # half of it is visible


# ---- tasks


def test_tasks_balance_a_long_chain():
    plan = plan_tree_attention(Tree([-1], [16384]), num_q_heads=32, num_kv_heads=8, head_dim=128)
    p = used(plan)
    keys = [sum(plan.segment[i[0] : i[1], 1].sum().item() for i in p["item"][t[0] : t[1]]) for t in p["task"]]
    assert 12 <= len(keys) <= 17
    assert max(keys) <= 1.2 * min(keys)
    assert all(k % 48 == 0 for k in keys[:-1])


def test_small_work_is_one_task():
    plan = plan_tree_attention(Tree([-1, 0, 0], [20, 4, 4]), num_q_heads=8, num_kv_heads=2, head_dim=64)
    assert plan.counts[:5].tolist()[3:] == [1, 0]
    assert used(plan)["task"].tolist() == [[0, int(plan.counts[2]), 0, 2, -1, -1]]


def test_independent_sequences_are_never_merged():
    plan = plan_tree_attention(Tree([-1] * 64, [2048] * 64), num_q_heads=32, num_kv_heads=8, head_dim=128)
    assert plan.io.partial_states == 0
    queries = used(plan)["task"][:, 3] - used(plan)["task"][:, 2]
    assert queries.max() * 4 <= 32  # few rows: the kernel takes several KV heads at a time
    assert plan.counts[3] >= 8


def test_tiles_prefer_cuts_between_trees():
    """Three trees of 40 leaves, 64 queries to a tile: no tree is read twice."""
    parent = [p for t in range(3) for p in [-1] + [41 * t] * 40]
    plan = plan_tree_attention(
        Tree(parent, ([500] + [2] * 40) * 3), num_q_heads=32, num_kv_heads=8, head_dim=128
    )
    assert plan.io.kv_tokens_read == plan.io.kv_tokens_unique


def test_plans_do_not_depend_on_threads(num_threads):
    tables = []
    for threads in (1, 2):
        num_threads(threads)
        tables.append(used(plan_tree_attention(Tree([-1] + [0] * 70, [5000] + [9] * 70), **HEADS)))
    for name, table in tables[0].items():
        assert (table == tables[1][name]).all()


@pytest.mark.parametrize("heads", [(32, 8, 128), (9, 3, 64), (16, 1, 128), (32, 32, 64)], ids=str)
@pytest.mark.parametrize("leaves", [1, 4, 30, 200])
def test_partial_states_stay_within_bounds(heads, leaves):
    num_q_heads, num_kv_heads, head_dim = heads
    tree = Tree([-1] + [0] * leaves, [20000] + [300] * leaves)
    for split in SPLITS:
        plan = plan_tree_attention(
            tree, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, split=split
        )
        check_plan(plan.tensors, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads)
        limit = 2 * leaves + FREE_PARTIAL_BYTES // (num_q_heads * (head_dim + 1) * 4)
        assert plan.io.partial_states <= limit


def test_io_bytes():
    io = plan_tree_attention(Tree([-1], [16384]), num_q_heads=32, num_kv_heads=8, head_dim=128).io
    partials = 2 * io.partial_states * 32 * 129 * 4
    assert io.partial_states > 0
    assert io.bytes(torch.bfloat16) == 16384 * 8 * 256 * 2 + partials
    assert io.bytes(torch.float32, v_head_dim=64) == 16384 * 8 * 192 * 4 + 2 * io.partial_states * 32 * 65 * 4


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"split": "best"}, "split must be one of auto, flatten, node, node_chunk, sequence, got 'best'"),
        ({"num_q_heads": 6, "num_kv_heads": 4}, "num_q_heads must be a multiple of num_kv_heads (4), got 6"),
        ({"num_kv_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
        ({"head_dim": 64.0}, "head_dim must be a positive integer, got 64.0"),
        ({"block_len": 0}, "block_len must be a positive integer, got 0"),
        ({"queries": "leafs"}, "queries must be 'leaves', 'tokens' or a pair (node, offset), got 'leafs'"),
        ({"queries": 3}, "queries must be 'leaves', 'tokens' or a pair (node, offset), got int"),
        (
            {"queries": ([0], [1, 2])},
            "queries must be a pair of equally long lists (node, offset), got 1 nodes and 2 offsets",
        ),
        ({"queries": ([9], [0])}, "the nodes of queries must be in [0, 3), got 9"),
        ({"queries": ([2], [0])}, "the nodes of queries must be alive, got 2, which was pruned"),
        ({"queries": ([0], [4])}, "the offsets of queries must be in [0, 4) for node 0, got 4"),
        ({"queries": ([0], [-1])}, "the offsets of queries must be in [0, 4) for node 0, got -1"),
        ({"queries": ([0], [0.5])}, "the offsets of queries must be integers, got float32"),
        ({"tree": 7}, "tree must be a palmette.Tree, got int"),
    ],
)
def test_bad_arguments(arguments, message):
    tree = Tree([-1, 0, 0], [4, 2, 2])
    tree.prune(2)
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_tree_attention(**({"tree": tree} | HEADS | arguments))


def test_leaves_need_a_token():
    tree = Tree([-1, -1], [1, 0])
    with pytest.raises(
        ValueError, match="the path of a leaf must be at least one token long, got 0 for leaf 1"
    ):
        plan_tree_attention(tree, **HEADS)
    tree.append([1], [1])
    plan = plan_tree_attention(tree, **HEADS)
    tree.add_roots(1)
    with pytest.raises(ValueError, match="got 0 for leaf 2"):
        plan.update()


# ---- operators


def _plan_cases():
    cases = []
    for queries in ("leaves", ([1, 0], [0, 1])):
        plan = plan_tree_attention(Tree([-1, 0, 0], [2, 1, 1], [3, 4, 5, 6]), queries, **HEADS)
        cases.append(plan._arguments())
    return cases


OPCHECK_CASES = {"plan_tree": _plan_cases}
