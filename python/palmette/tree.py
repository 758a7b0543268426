# SPDX-License-Identifier: Apache-2.0
"""Trees of tokens: the structure that tree attention, verification and shared-prefix training work on.

A tree (a forest, in general: several roots are a batch) consists of nodes, each a run of tokens. Its tokens
are numbered depth-first, siblings in the order of their ids; a query at token q sees key k exactly when
``k <= q < subtree_end[k]``. The structure lives in int32 tensors on the CPU and is changed in place by
operators; nothing here is recursive.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from palmette import _library

_ops = torch.ops.palmette

# Rows of Tree.nodes and entries of Tree.counts; csrc/plan/tree.h describes all of them.
PARENT, FIRST_CHILD, LENGTH, ALIVE = 0, 1, 6, 8
NUM_NODES, ARENA_USED, NUM_TOKENS, VERSION, IDENTITY = 0, 4, 5, 6, 7

_MAX_INT32 = 2**31 - 1


class _Layout(NamedTuple):
    version: int
    order: Tensor
    node_start: Tensor
    path_length: Tensor
    leaves: Tensor


class Tree:
    """A forest of token runs that can grow at its leaves, branch and be pruned.

    Args:
        parent: parents of the nodes, [M] integers; -1 marks a root. Nodes may come in any order.
        num_tokens: tokens of each node, [M] integers, 0 allowed.
        slots: the KV slot of every token, [N] integers in depth-first order. Default (None): 0 .. N-1, that
            is, keys and values lie in depth-first order, always; a change to such a tree renumbers them.

    Raises:
        ValueError: a parent is out of range or on a cycle, a length or slot is negative, the tree has no
            nodes, or the sizes do not match. The message names the argument, what was wanted and what came.

    Integers may be sequences or integer tensors, on any device; the tree itself is kept on the CPU. Node ids
    are positions in ``parent``; new nodes count upwards, and the ids of pruned nodes are never used again.

    Source: DeFT (arXiv 2404.00242), section 3; depth-first numbers with subtree ends replace its bit masks.
    """

    nodes: Tensor  # int32 [10, capacity]: parent, children, siblings, arena range, ... by node id
    counts: Tensor  # int32 [8]
    arena: Tensor  # int32 [capacity]: KV slots; every node owns a range

    def __init__(
        self,
        parent: Sequence[int] | Tensor,
        num_tokens: Sequence[int] | Tensor,
        slots: Sequence[int] | Tensor | None = None,
    ) -> None:
        self.nodes, self.counts, self.arena = _library.call(
            _ops.tree_build.default,
            _integers("parent", parent),
            _integers("num_tokens", num_tokens),
            None if slots is None else _integers("slots", slots),
        )
        self._version = self.counts[VERSION]  # a view
        self._layout_cache: _Layout | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:  # a copied or unpickled view is no view
        self.__dict__.update(state)
        self._version = self.counts[VERSION]

    @classmethod
    def from_paths(
        cls,
        paths: Sequence[Sequence[int]],
        prefix_len: int = 1,
        slots: Sequence[int] | Tensor | None = None,
    ) -> Tree:
        """The token tree that Medusa-style paths of child indices describe, one token per path, below a root.

        Args:
            paths: ``[0]`` is the root's first child, ``[0, 2]`` that child's third, and so on. Every prefix
                of a path must be there; the order is free. Path i becomes node i + 1 (siblings are ordered by
                node id, so by their place in this list, not by child index).
            prefix_len: tokens of the root, node 0. Default: 1, the last committed token.
            slots: as in ``Tree``. Default: None.

        Raises:
            ValueError: a path is empty, comes twice, or its prefix is missing.

        Source: Medusa (arXiv 2401.10774), section 2.1.2, "tree attention".
        """
        keys = [tuple(int(child) for child in path) for path in paths]
        node_of: dict[tuple[int, ...], int] = {(): 0}
        for i, key in enumerate(keys):
            if not key:
                raise ValueError(f"paths must be non-empty, got an empty path at entry {i}")
            if key in node_of:
                raise ValueError(
                    f"paths must be distinct, got {list(key)} at entries {node_of[key] - 1} and {i}"
                )
            node_of[key] = i + 1
        for i, key in enumerate(keys):
            if key[:-1] not in node_of:
                raise ValueError(
                    f"paths must be closed under prefixes, got {list(key)} at entry {i} without its parent"
                )
        if prefix_len < 0:
            raise ValueError(f"prefix_len must be non-negative, got {prefix_len}")
        return cls([-1] + [node_of[key[:-1]] for key in keys], [prefix_len] + [1] * len(keys), slots)

    # ---- changes

    def append(
        self,
        nodes: Sequence[int] | Tensor,
        counts: Sequence[int] | Tensor,
        slots: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Appends tokens to leaves: ``counts[i]`` tokens to leaf ``nodes[i]``. O(new tokens), amortised.

        Args:
            nodes: ids of distinct leaves, [n].
            counts: new tokens per leaf, [n], 0 allowed.
            slots: KV slots of the new tokens, leaf after leaf in the order of ``nodes``, [sum(counts)].
                Required exactly when the tree was built with slots; otherwise tokens behind the new ones move
                to higher numbers.

        Raises:
            ValueError: a node is pruned, no leaf or named twice, or slots are missing, superfluous or too
                many or few. The tree is unchanged then.
        """
        node, count = _integers("nodes", nodes), _integers("counts", counts)
        slot = None if slots is None else _integers("slots", slots)
        while needed := int(
            _library.call(_ops.tree_append.default, self.nodes, self.counts, self.arena, node, count, slot)
        ):
            self._grow_arena(needed)

    def branch(self, node: int, num_children: int) -> Tensor:
        """Gives ``node`` new children without tokens, after the ones it has. O(num_children), amortised.

        Returns:
            The ids of the children, int32 [num_children], counting upwards.

        Raises:
            ValueError: the node is pruned or unknown, or num_children is not positive.
        """
        node = int(node)
        if node < 0:
            raise ValueError(f"node must be in [0, {self.num_nodes}), got {node}")
        return self._branch(node, num_children)

    def add_roots(self, count: int) -> Tensor:
        """Adds roots without tokens: new sequences of a batch. Returns their ids, int32 [count]."""
        if int(count) < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        return self._branch(-1, count)

    def prune(self, node: int) -> Tensor:
        """Removes the subtree of ``node``, and every ancestor that is left without leaves.

        O(nodes and tokens removed); for a tree without slots also the nodes before them. The last root may
        go, too: the tree is then empty, and only ``add_roots`` brings it back.

        Returns:
            The KV slots set free, int32, in depth-first order (for a tree without slots: the tokens' numbers
            before the call).

        Raises:
            ValueError: the node is unknown or already pruned.
        """
        freed: Tensor = _library.call(_ops.tree_prune.default, self.nodes, self.counts, self.arena, int(node))
        return freed

    def copy(self) -> Tree:
        """An independent copy with the same ids, slots and version."""
        tree = object.__new__(Tree)
        tree.nodes, tree.counts, tree.arena = self.nodes.clone(), self.counts.clone(), self.arena.clone()
        tree._version = tree.counts[VERSION]
        tree._layout_cache = None
        return tree

    # ---- the tree as numbers

    @property
    def num_nodes(self) -> int:
        """M: node ids given out so far, pruned ones included."""
        return int(self.counts[NUM_NODES])

    @property
    def num_tokens(self) -> int:
        """N: tokens of the live nodes."""
        return int(self.counts[NUM_TOKENS])

    @property
    def version(self) -> int:
        """Changes with every change of the tree (a counter that wraps at 32 bits)."""
        return int(self._version)

    @property
    def has_slots(self) -> bool:
        """Whether the tree was built with slots."""
        return not int(self.counts[IDENTITY])

    @property
    def node_start(self) -> Tensor:
        """Depth-first number of each node's first token, int32 [M]; -1 for pruned ids."""
        return self._layout().node_start

    @property
    def subtree_end(self) -> Tensor:
        """Per token in depth-first order: one past the last token of its subtree, int32 [N]."""
        end: Tensor = _library.call(_ops.tree_subtree_end.default, self.nodes, self.counts)
        return end

    @property
    def leaves(self) -> Tensor:
        """Ids of the live nodes without children, int32, depth-first."""
        return self._layout().leaves

    @property
    def order(self) -> Tensor:
        """Ids of the live nodes, int32, depth-first."""
        return self._layout().order

    @property
    def roots(self) -> Tensor:
        """Ids of the live roots, int32, ascending."""
        return self.children(-1)

    @property
    def path_lengths(self) -> Tensor:
        """Tokens on the path from the root down to each node's last token, int32 [M]; -1 for pruned ids."""
        return self._layout().path_length

    @property
    def redundancy(self) -> float:
        """Sum of the leaves' path lengths / number of tokens: what sharing saves; 1.0 without tokens."""
        tokens = self.num_tokens
        layout = self._layout()
        return int(layout.path_length[layout.leaves].sum(dtype=torch.int64)) / tokens if tokens else 1.0

    @property
    def slots(self) -> Tensor:
        """KV slot of every token, int32 [N], depth-first."""
        slots: Tensor = _library.call(_ops.tree_slots.default, self.nodes, self.counts, self.arena, -1)
        return slots

    def path_slots(self, node: int) -> Tensor:
        """KV slots from the root down to the last token of ``node``, int32 [path_length(node)]."""
        node = self._live(node)
        slots: Tensor = _library.call(_ops.tree_slots.default, self.nodes, self.counts, self.arena, node)
        return slots

    def path_length(self, node: int) -> int:
        """Tokens on the path from the root down to the last token of ``node``."""
        return int(self._layout().path_length[self._live(node)])

    def length(self, node: int) -> int:
        """Tokens of ``node`` itself."""
        return int(self.nodes[LENGTH, self._live(node)])

    def parent(self, node: int) -> int:
        """The parent of ``node``; -1 for a root."""
        return int(self.nodes[PARENT, self._live(node)])

    def children(self, node: int) -> Tensor:
        """Ids of the children of ``node``, int32, ascending; -1 asks for the roots."""
        if node != -1:
            node = self._live(node)
        parent, alive = self.nodes[PARENT, : self.num_nodes], self.nodes[ALIVE, : self.num_nodes]
        return ((parent == node) & (alive != 0)).nonzero().flatten().to(torch.int32)

    def is_leaf(self, node: int) -> bool:
        """Whether ``node`` has no children."""
        return int(self.nodes[FIRST_CHILD, self._live(node)]) < 0

    def is_alive(self, node: int) -> bool:
        """Whether ``node`` is a node that has not been pruned."""
        node = int(node)
        return 0 <= node < self.num_nodes and bool(self.nodes[ALIVE, node])

    def __repr__(self) -> str:
        return (
            f"Tree({self.order.numel()} nodes, {self.leaves.numel()} leaves, {self.num_tokens} tokens, "
            f"redundancy {self.redundancy:.2f})"
        )

    # ---- internals

    def _branch(self, node: int, num_children: int) -> Tensor:
        num_children = int(num_children)
        while needed := int(
            _library.call(_ops.tree_branch.default, self.nodes, self.counts, node, num_children)
        ):
            self._grow_nodes(needed)
        end = self.num_nodes
        return torch.arange(end - num_children, end, dtype=torch.int32)

    def _grow_nodes(self, needed: int) -> None:
        old = self.nodes
        self.nodes = old.new_empty((old.shape[0], _grown(old.shape[1], needed)))
        self.nodes[:, : old.shape[1]] = old

    def _grow_arena(self, needed: int) -> None:
        size = _grown(self.arena.numel(), needed)
        if self.has_slots:
            old = self.arena
            self.arena = old.new_empty(size)
            self.arena[: old.numel()] = old
        else:
            self.arena = torch.arange(size, dtype=torch.int32)

    def _layout(self) -> _Layout:
        version, cache = self.version, self._layout_cache
        if cache is None or cache.version != version:
            cache = _Layout(version, *_library.call(_ops.tree_layout.default, self.nodes, self.counts))
            self._layout_cache = cache
        return cache

    def _live(self, node: int) -> int:
        node = int(node)
        if not 0 <= node < self.num_nodes:
            raise ValueError(f"node must be in [0, {self.num_nodes}), got {node}")
        if not self.nodes[ALIVE, node]:
            raise ValueError(f"node must be alive, got {node}, which was pruned")
        return node


def _grown(size: int, needed: int) -> int:
    return max(needed, min(2 * size, _MAX_INT32))


def _integers(name: str, values: Any) -> Tensor:
    """``values`` as a contiguous int32 or int64 vector on the CPU."""
    if not isinstance(values, Tensor):
        try:
            values = torch.as_tensor(values if hasattr(values, "__array_interface__") else list(values))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{name} must be a list or tensor of integers, got {values!r:.80}") from error
        if values.numel() == 0:
            values = values.to(torch.int64)  # an empty list has no type
    if values.dtype.is_floating_point or values.dtype.is_complex or values.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {str(values.dtype).removeprefix('torch.')}")
    if values.dim() != 1:
        raise ValueError(f"{name} must be one-dimensional, got {list(values.shape)}")
    if values.dtype not in (torch.int32, torch.int64):
        values = values.to(torch.int64)
    vector: Tensor = values.cpu().contiguous()
    return vector


# ---- fakes. Sizes that depend on the tree's content are unknown while tracing.


@torch.library.register_fake("palmette::tree_build")
def _tree_build_fake(
    parent: Tensor, num_tokens: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    nodes = parent.shape[0]
    arena = torch.library.get_ctx().new_dynamic_size()
    sizes = ((10, nodes + nodes // 2 + 16), (8,), (arena,))
    table, counts, slots = (parent.new_empty(size, dtype=torch.int32) for size in sizes)
    return table, counts, slots


@torch.library.register_fake("palmette::tree_append")
def _tree_append_fake(
    nodes: Tensor, counts: Tensor, arena: Tensor, node: Tensor, count: Tensor, slots: Tensor | None
) -> Tensor:
    return counts.new_empty((), dtype=torch.int64)


@torch.library.register_fake("palmette::tree_branch")
def _tree_branch_fake(nodes: Tensor, counts: Tensor, node: int, num_children: int) -> Tensor:
    return counts.new_empty((), dtype=torch.int64)


def _unknown(like: Tensor) -> Tensor:
    return like.new_empty((torch.library.get_ctx().new_dynamic_size(),), dtype=torch.int32)


@torch.library.register_fake("palmette::tree_prune")
def _tree_prune_fake(nodes: Tensor, counts: Tensor, arena: Tensor, node: int) -> Tensor:
    return _unknown(counts)


@torch.library.register_fake("palmette::tree_layout")
def _tree_layout_fake(nodes: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    start = _unknown(counts)
    return _unknown(counts), start, start.new_empty(start.shape), _unknown(counts)


@torch.library.register_fake("palmette::tree_subtree_end")
def _tree_subtree_end_fake(nodes: Tensor, counts: Tensor) -> Tensor:
    return _unknown(counts)


@torch.library.register_fake("palmette::tree_slots")
def _tree_slots_fake(nodes: Tensor, counts: Tensor, arena: Tensor, node: int) -> Tensor:
    return _unknown(counts)
