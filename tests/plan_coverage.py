# SPDX-License-Identifier: Apache-2.0
"""What a plan of a tree covers, decoded with numpy and compared with the reference."""

from __future__ import annotations

import numpy as np
from palmette.reference import tree as reference
from palmette.tree_plan import TreeAttentionPlan
from plan_oracle import check_plan

HEADS = {"num_q_heads": 4, "num_kv_heads": 2, "head_dim": 64}
FREE_PARTIAL_BYTES = 640 << 10


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

    Rows are those of q, keys are numbered depth-first (a tree's `lo` is that number). Slots, subtree ends and
    depths of the segments are checked against the tree on the way.
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
    assert io.partial_states <= 2 * len(mask) + FREE_PARTIAL_BYTES // row_bytes
    slots = want.slots()
    assert plan.counts[8] == max((s for s in slots), default=-1) + 1
