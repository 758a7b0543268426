# SPDX-License-Identifier: Apache-2.0
"""Plans of tree attention: which queries meet which keys of a tree, as tensors that a kernel follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._device import DeviceTables, resolve
from palmette.tree import ARENA_USED, Tree, _integers

_ops = torch.ops.palmette

TARGETS = ("cpu", "gpu")
SPLITS = ("auto", "flatten", "node", "node_chunk", "sequence")
DEFAULT_BLOCK_LEN = 192

# Entries of TreeAttentionPlan.counts; csrc/plan/partition.h describes all of them.
NUM_QUERIES, NUM_SEGMENTS, NUM_ITEMS, NUM_TASKS, NUM_PARTIALS, TREE_VERSION = 0, 1, 2, 3, 4, 6
NUM_SLOTS = 8  # one past the largest slot


@dataclass(frozen=True)
class TreeAttentionIO:
    """What a plan moves, in KV tokens per KV head, as DeFT (arXiv 2404.00242) counts them.

    Attributes:
        kv_tokens_read: keys summed over the items of all tasks: real passes. A key that two tiles of queries
            read counts twice.
        kv_tokens_unique: keys that at least one query sees, each once.
        kv_tokens_per_sequence: keys that each query sees, summed over queries: what per-sequence attention
            reads.
        partial_states: rows (out, lse) per query head that tasks write for the merge; 0 when every output is
            written directly.
    """

    kv_tokens_read: int
    kv_tokens_unique: int
    kv_tokens_per_sequence: int
    partial_states: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int

    def bytes(self, dtype: torch.dtype, *, v_head_dim: int | None = None) -> int:
        """Bytes of K and V read, plus partial states written and read again (float32 out and lse).

        Args:
            dtype: of K and V.
            v_head_dim: Default: head_dim.
        """
        v_dim = self.head_dim if v_head_dim is None else v_head_dim
        kv = self.kv_tokens_read * self.num_kv_heads * (self.head_dim + v_dim) * dtype.itemsize
        return kv + 2 * self.partial_states * self.num_q_heads * (v_dim + 1) * 4


class TreeAttentionPlan:
    """What ``plan_tree_attention`` returns: int32 tensors with room to grow.

    Planning happens on the CPU, in the attributes below. A plan for another device has a copy there, in one
    block of memory, which ``update`` fills again in place while it has room: by one copy, which the host does
    not wait for, ordered on the stream that is current then. ``tensors`` is what operators take. A captured
    CUDA graph follows updates while the plan keeps its capacity and its number of queries; launched with
    other tables it returns NaN.

    Queries are sorted by position; "query j" is the j-th in that order. docs/design.md, "A plan", describes
    the tables.

    Attributes:
        tree: the tree planned for.
        device: of ``tensors``, and of the q, k and v that the plan is for.
        target: ``"cpu"`` or ``"gpu"``: whose costs the plan minimises.
        counts: [16]; how much of the other tensors is in use.
        query: [4, *]; row of q, position, tokens above on the path, 0.
        segment: [*, 6]; runs of keys: begin in ``slots``, length, lo, step, hi, depth.
        item: [*, 4]; segments [begin, end) meet queries [begin, end).
        task: [*, 6]; items [begin, end), queries [begin, end), first partial state (-1: writes the output),
            KV head (-1: all).
        merge_ptr, merge_row: [*]; partial states of query j are merge_row[merge_ptr[j] : merge_ptr[j + 1]].
        slots: [*]; KV slots, shared with the tree.
    """

    counts: Tensor
    query: Tensor
    segment: Tensor
    item: Tensor
    task: Tensor
    merge_ptr: Tensor
    merge_row: Tensor
    slots: Tensor

    def __init__(
        self,
        tree: Tree,
        queries: str | tuple[Tensor, Tensor],
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        split: str,
        block_len: int,
        device: torch.device,
        target: str,
    ) -> None:
        self.tree = tree
        self.device, self.target = device, target
        self._there: DeviceTables | None = None if device.type == "cpu" else DeviceTables(device)
        self.num_q_heads, self.num_kv_heads, self.head_dim = num_q_heads, num_kv_heads, head_dim
        self.split, self.block_len = split, block_len
        self._queries = queries if isinstance(queries, str) else "explicit"
        self._node: Tensor | None = None if isinstance(queries, str) else queries[0]
        self._offset: Tensor | None = None if isinstance(queries, str) else queries[1]
        self.counts = torch.zeros(16, dtype=torch.int32)
        self.query, self.segment, self.item, self.task = (
            torch.zeros(shape, dtype=torch.int32) for shape in ((4, 0), (0, 6), (0, 4), (0, 6))
        )
        self.merge_ptr, self.merge_row = (torch.zeros(0, dtype=torch.int32) for _ in range(2))
        self._io = torch.zeros(8, dtype=torch.int64)
        self._version = self.counts[TREE_VERSION]  # a view
        self._distinct_at: int | None = None  # version of the tree that check_gradients() has seen
        self._plan()

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copied or unpickled view is no view
        self.__dict__.update(state)
        self._version = self.counts[TREE_VERSION]

    def update(self) -> None:
        """Plans again after the tree has changed, into the same tensors unless they must grow.

        O(live nodes) plus the size of the plan, never O(tokens) (apart from the queries of a "tokens" plan
        themselves). Rows of q then belong to the leaves or tokens that the tree has now. Call ``backward``
        before: it follows the plan's tensors too, and autograd refuses when they have changed.

        Raises:
            ValueError: the plan was made for explicit queries, or a leaf has no token on its path.
        """
        if self._queries == "explicit":
            raise ValueError(
                "queries must be 'leaves' or 'tokens' for a plan that is updated, got a pair (node, offset)"
            )
        self._plan()

    def check_fresh(self) -> None:
        """Raises ValueError when the tree has changed since the last ``update``. Not for compiled regions."""
        if int(self._version) != int(self.tree._version):
            raise ValueError(
                f"plan must be of its tree's version {int(self.tree._version)}, "
                f"got one of version {int(self._version)}: call plan.update() after the tree has changed"
            )

    def check_gradients(self) -> None:
        """Raises ValueError where gradients of k and v would be wrong: on a GPU, if tokens share a slot.

        O(tokens), once after a change of the tree.
        """
        if self.device.type == "cpu" or self._distinct_at == self.tree.version:
            return
        slots = self.tree.slots
        distinct = len(slots.unique()) if self.tree.has_slots else len(slots)
        if distinct < len(slots):
            raise ValueError(
                f"slots of the tree must be distinct where gradients are wanted on a GPU, got {distinct} "
                f"for {len(slots)} tokens"
            )
        self._distinct_at = self.tree.version

    @property
    def num_queries(self) -> int:
        """Rows that q must have."""
        return int(self.counts[NUM_QUERIES])

    @property
    def num_slots(self) -> int:
        """Rows that k and v must have at least."""
        return int(self.counts[NUM_SLOTS])

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The plan in the order in which operators take it."""
        tables = self._host_tables() if self._there is None else self._there.tables
        query, segment, item, task, merge_ptr, merge_row, counts, slots = tables
        return slots, query, segment, item, task, merge_ptr, merge_row, counts

    def _host_tables(self) -> tuple[Tensor, ...]:
        small = self.query, self.segment, self.item, self.task, self.merge_ptr, self.merge_row, self.counts
        return (*small, self.slots)

    @property
    def io(self) -> TreeAttentionIO:
        """What the plan reads and writes; counted when it was made or updated."""
        read, unique, per_sequence = self._io[:3].tolist()
        partials = int(self.counts[NUM_PARTIALS])
        return TreeAttentionIO(
            read, unique, per_sequence, partials, self.num_q_heads, self.num_kv_heads, self.head_dim
        )

    def plot(self, path: str | PathLike[str]) -> None:
        """Draws the tree and the plan's items over the depth-first key axis into ``path`` (.svg or .png).

        Raises:
            ImportError: matplotlib is not installed.
            ValueError: the file name ends otherwise, the plan is stale, or there is nothing to draw.
        """
        from palmette.tree_plot import plot_plan

        plot_plan(self, path)

    def __repr__(self) -> str:
        queries, _, items, tasks, partials = self.counts[:5].tolist()
        return (
            f"TreeAttentionPlan({self.split}: {queries} queries, {items} items, {tasks} tasks, "
            f"{partials} partial states, {int(self._io[0])} KV tokens read)"
        )

    def _plan(self) -> None:
        while not _library.call(_ops.plan_tree.default, *self._arguments()):
            self._grow()
        self.slots = self.tree.arena
        if self._there is None:
            return
        tables = self._host_tables()
        used = [table.numel() for table in tables]
        if self.tree.has_slots:
            used[-1] = int(self.tree.counts[ARENA_USED])
        elif self._there.has_shapes_of(tables):
            used[-1] = 0  # 0, 1, 2, ... for good
        self._there.fill(tables, used)

    def _arguments(self) -> tuple[object, ...]:
        """What the operator takes: the tree, the request, and the tables to fill."""
        return (
            self.tree.nodes,
            self.tree.counts,
            self._queries,
            self._node,
            self._offset,
            self.num_q_heads,
            self.num_kv_heads,
            self.head_dim,
            self.split,
            self.block_len,
            self.target,
            self.counts,
            self.query,
            self.segment,
            self.item,
            self.task,
            self.merge_ptr,
            self.merge_row,
            self._io,
        )

    def _grow(self) -> None:
        queries, segments, items, tasks, partials = self._io[3:].tolist()
        # Partial states come and go with the shape of the tree: their bound is known, so they never grow
        # again for that.
        partials = max(partials, 2 * queries)
        self.query = _room(self.query, 1, queries)
        self.merge_ptr = _room(self.merge_ptr, 0, queries + 1)
        self.segment = _room(self.segment, 0, segments)
        self.item = _room(self.item, 0, items)
        self.task = _room(self.task, 0, tasks)
        self.merge_row = _room(self.merge_row, 0, partials)


def plan_tree_attention(
    tree: Tree,
    queries: str | tuple[Sequence[int] | Tensor, Sequence[int] | Tensor] = "leaves",
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    split: str = "auto",
    block_len: int | None = None,
    device: torch.device | str | None = None,
    target: str | None = None,
) -> TreeAttentionPlan:
    """Plans attention of queries in a tree to the keys on their paths.

    The query at token q sees key k exactly when ``k <= q < tree.subtree_end[k]``. A plan depends on the tree,
    the heads and the options alone, not on threads or values; it is valid for any layer of a model.

    Args:
        tree: the tree (or forest).
        queries: ``"leaves"``: one per leaf, depth-first, at the last token of its path. ``"tokens"``: every
            token, depth-first. Or a pair (node [Nq], offset [Nq]): token ``offset[i]`` of node ``node[i]``,
            in any order, repeated or not; such a plan cannot be updated. Default: ``"leaves"``.
        num_q_heads, num_kv_heads: heads of q and of k and v; num_q_heads is a multiple of num_kv_heads.
        head_dim: of q and k.
        split: how keys are grouped. ``"node"``: every node by itself; ``"node_chunk"``: nodes cut every
            block_len; ``"flatten"``: the tokens of the tree, depth-first, cut every block_len across nodes;
            ``"sequence"``: every query reads its whole path; ``"auto"``: what a cost model (csrc/plan/cost.h)
            finds cheapest. Results do not depend on it, up to rounding. Default: ``"auto"``.
        block_len: tokens of a block, for ``"flatten"`` and ``"node_chunk"``; the other splits do not use it.
            Default: 192.
        device: of the q, k and v to come; the plan's tensors go there. ``"cuda"`` is the current CUDA device.
            Default: the CPU.
        target: whose costs ``"auto"`` minimises, and how much work a task holds: ``"cpu"`` or ``"gpu"``. Any
            plan is right on any device. Default: what the device is.

    Returns:
        A plan for ``tree_attention``. After a change of the tree, ``plan.update()`` makes it valid again.

    Raises:
        ValueError: an argument is not as described, or a leaf has no token on its path.

    Source: DeFT (arXiv 2404.00242), section 3: KV-guided grouping, flattened tree KV splitting.
    """
    if not isinstance(tree, Tree):
        raise ValueError(f"tree must be a palmette.Tree, got {type(tree).__name__}")
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    sizes = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    sizes["block_len"] = DEFAULT_BLOCK_LEN if block_len is None else block_len
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if num_q_heads % num_kv_heads:
        raise ValueError(
            f"num_q_heads must be a multiple of num_kv_heads ({num_kv_heads}), got {num_q_heads}"
        )
    wanted: str | tuple[Tensor, Tensor]
    if isinstance(queries, str):
        if queries not in ("leaves", "tokens"):
            raise ValueError(f"queries must be 'leaves', 'tokens' or a pair (node, offset), got {queries!r}")
        wanted = queries
    else:
        if not isinstance(queries, (tuple, list)) or len(queries) != 2:
            raise ValueError(
                f"queries must be 'leaves', 'tokens' or a pair (node, offset), got {type(queries).__name__}"
            )
        wanted = (
            _integers("the nodes of queries", queries[0]),
            _integers("the offsets of queries", queries[1]),
        )
    place = resolve(device)
    if target is None:
        target = "cpu" if place.type == "cpu" else "gpu"
    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    return TreeAttentionPlan(
        tree, wanted, num_q_heads, num_kv_heads, head_dim, split, sizes["block_len"], place, target
    )


def _room(table: Tensor, dim: int, needed: int) -> Tensor:
    """The table if it has room for ``needed`` rows, else a new, empty one with half as many again."""
    if table.shape[dim] >= needed:
        return table
    shape = list(table.shape)
    shape[dim] = needed + needed // 2 + 16
    return table.new_zeros(shape)


@torch.library.register_fake("palmette::plan_tree")
def _plan_tree_fake(
    nodes: Tensor,
    tree_counts: Tensor,
    queries: str,
    query_node: Tensor | None,
    query_offset: Tensor | None,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    split: str,
    block_len: int,
    target: str,
    counts: Tensor,
    query: Tensor,
    segment: Tensor,
    item: Tensor,
    task: Tensor,
    merge_ptr: Tensor,
    merge_row: Tensor,
    io: Tensor,
) -> Tensor:
    return counts.new_empty((), dtype=torch.bool)
