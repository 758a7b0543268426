# SPDX-License-Identifier: Apache-2.0
"""plan_tree_attention: every visible (query, key) pair is met exactly once, whatever the split; updates; accounting."""

from __future__ import annotations

import random
import re
import sys

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from plan_oracle import check_plan
from strategies import forests, query_pairs
from test_tree import change

from palmette.reference import tree as reference
from palmette.tree import Tree
from palmette.tree_plan import SPLITS, TreeAttentionPlan, plan_tree_attention

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
FREE_PARTIAL_BYTES = 1 << 20


def used(plan: TreeAttentionPlan) -> dict[str, np.ndarray]:
    """The tables without their spare capacity."""
    queries, segments, items, tasks, partials = plan.counts[:5].tolist()
    return {
        "query": plan.query[:, :queries].numpy(),
        "segment": plan.segment[:segments].numpy(),
        "item": plan.item[:items].numpy(),
        "task": plan.task[:tasks].numpy(),
        "merge_ptr": plan.merge_ptr[: queries + 1].numpy(),
        "merge_row": plan.merge_row[:partials].numpy(),
    }


def ranges(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All of begin[0] .. end[0] - 1, begin[1] .. end[1] - 1, ..., and for each number the range it is of."""
    owner = np.repeat(np.arange(len(begin)), end - begin)
    first = np.cumsum(end - begin) - (end - begin)
    return np.arange(len(owner)) - first[owner] + begin[owner], owner


def coverage(plan: TreeAttentionPlan) -> np.ndarray:
    """[Nq, N]: how often each query meets each key where it sees it, by the visibility rule of the segments.

    Rows are those of q, keys are numbered depth-first (a tree's `lo` is that number). Slots, subtree ends and depths of the
    segments are checked against the tree on the way.
    """
    tree, p = plan.tree, used(plan)
    index, pos, depth, _ = p["query"]
    row, item = ranges(p["item"][:, 0], p["item"][:, 1])  # every segment of every item
    begin, length, lo, step, hi, first_depth = p["segment"][row].T
    assert (length > 0).all()
    assert (step == 1).all()

    key, segment = ranges(lo, lo + length)  # every key of every segment
    path_lengths, lengths = tree.path_lengths.numpy(), tree.nodes[6].numpy()
    order = tree.order.numpy()
    token_depth, _ = ranges(path_lengths[order] - lengths[order], path_lengths[order])
    assert (plan.slots.numpy()[key - lo[segment] + begin[segment]] == tree.slots.numpy()[key]).all()
    assert (tree.subtree_end.numpy()[key] == hi[segment]).all()
    assert (token_depth[key] == key - lo[segment] + first_depth[segment]).all()
    assert (token_depth[pos] == depth).all()

    query_begin, query_end = p["item"][item[segment], 2:].T
    query, pair = ranges(query_begin, query_end)  # every (key, query) that meet
    seen = (key[pair] <= pos[query]) & (pos[query] < hi[segment[pair]])
    assert (np.bincount(pair, seen, len(key)) > 0).all(), "a key that no query of its item sees"
    met = np.bincount(
        index[query].astype(np.int64) * tree.num_tokens + key[pair], seen, len(index) * tree.num_tokens
    )
    return met.reshape(len(index), tree.num_tokens)


def check(plan: TreeAttentionPlan, want: reference.Tree, queries) -> None:
    """The plan covers what the reference says, once; its accounting is right; its structure is sound."""
    mask = want.visible(queries).numpy()
    assert (coverage(plan) == mask).all()
    check_plan(plan.tensors, num_q_heads=plan.num_q_heads, num_kv_heads=plan.num_kv_heads)
    p = used(plan)
    tokens = np.array(want.query_tokens(queries), dtype=np.int64)
    assert (p["query"][1] == tokens[p["query"][0]]).all()
    io = plan.io
    keys = sum(p["segment"][first:last, 1].sum() for first, last, _, _ in p["item"])
    assert io.kv_tokens_read == keys
    assert io.kv_tokens_unique == mask.any(0).sum()
    assert io.kv_tokens_per_sequence == mask.sum()
    group = plan.num_q_heads // plan.num_kv_heads
    if len(mask) <= max(1, 256 // group) and plan.split not in ("sequence", "auto"):
        assert io.kv_tokens_read == io.kv_tokens_unique  # one tile: every key is read once
    if plan.split == "sequence":
        assert io.kv_tokens_read == io.kv_tokens_per_sequence
    assert io.partial_states == len(p["merge_row"])
    row_bytes = plan.num_q_heads * (plan.head_dim + 1) * 4
    assert io.partial_states <= max(2 * len(mask), FREE_PARTIAL_BYTES // row_bytes)
    slots = want.slots()
    assert plan.counts[8] == max((s for s in slots), default=-1) + 1


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
        limit = max(2 * leaves, FREE_PARTIAL_BYTES // (num_q_heads * (head_dim + 1) * 4))
        assert plan.io.partial_states <= limit


def test_io_bytes():
    io = plan_tree_attention(Tree([-1], [16384]), num_q_heads=32, num_kv_heads=8, head_dim=128).io
    partials = 2 * io.partial_states * 32 * 129 * 4
    assert io.partial_states > 0
    assert io.bytes(torch.bfloat16) == 16384 * 8 * 256 * 2 + partials
    assert io.bytes(torch.float32, v_head_dim=64) == 16384 * 8 * 192 * 4 + 2 * io.partial_states * 32 * 65 * 4


# ---- updates


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
    for step in range(1000):
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
            else:
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


# ---- pictures


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plot(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    tree = Tree([-1, 0, 0, 1, 1, -1, 5], [50, 10, 20, 5, 0, 30, 4])
    plan = plan_tree_attention(tree, **HEADS)
    plan.plot(tmp_path / f"tree.{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"tree.{suffix}"]
    head = (tmp_path / f"tree.{suffix}").read_bytes()[:200]
    assert (b"<?xml" in head) if suffix == "svg" else head.startswith(b"\x89PNG")
    tree.append([3], [1])
    with pytest.raises(ValueError, match="plan must be of its tree's version"):
        plan.plot(tmp_path / "stale.svg")


def test_plot_needs_matplotlib_and_a_known_suffix(tmp_path, monkeypatch):
    plan = plan_tree_attention(Tree([-1], [3]), **HEADS)
    with pytest.raises(
        ValueError, match=re.escape("path must be a name that ends in .svg or .png, got 'tree.gif'")
    ):
        plan.plot(tmp_path / "tree.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plan.plot needs matplotlib"):
        plan.plot(tmp_path / "tree.svg")


# ---- operators


def _plan_cases():
    cases = []
    for queries in ("leaves", ([1, 0], [0, 1])):
        plan = plan_tree_attention(Tree([-1, 0, 0], [2, 1, 1], [3, 4, 5, 6]), queries, **HEADS)
        cases.append(plan._arguments())
    return cases


OPCHECK_CASES = {"plan_tree": _plan_cases}
