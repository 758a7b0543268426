# SPDX-License-Identifier: Apache-2.0
"""Token trees for speculative decoding: which candidates to verify, and a draft without a second model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import torch

Paths = Sequence[Sequence[int]]


def medusa_paths(num_nodes: int = 63, *, branching: int = 10, depth_decay: float = 0.6) -> list[list[int]]:
    """A token tree of the likeliest candidates, as Medusa (arXiv 2401.10774, section 2.1.2) picks its own.

    The chance that a node is right is taken as the product along its path of ``depth_decay ** depth * 0.5 **
    (rank + 1)`` (rank among its siblings, depth of its parent); the ``num_nodes`` likeliest nodes form the
    tree.

    Args:
        num_nodes: Nodes below the root.
        branching: Children per node at most.
        depth_decay: How much surer a draft is of its next token than of the one after.

    Returns:
        Paths of child indices, parents before their children.
    """
    if num_nodes < 1 or branching < 1:
        raise ValueError(f"num_nodes and branching must be positive, got {num_nodes} and {branching}")
    if not 0 < depth_decay <= 1:
        raise ValueError(f"depth_decay must be in (0, 1], got {depth_decay}")
    paths: list[list[int]] = []
    heap: list[tuple[float, tuple[int, ...]]] = [(-0.5, (0,))]
    while heap and len(paths) < num_nodes:
        chance, path = heapq.heappop(heap)
        paths.append(list(path))
        depth, rank = len(path), path[-1]
        heapq.heappush(heap, (chance * 0.5 * depth_decay**depth, (*path, 0)))
        if rank + 1 < branching:
            heapq.heappush(heap, (chance * 0.5, (*path[:-1], rank + 1)))
    return paths


class TokenTree:
    """A token tree in depth-first order, below a root that stands for the last committed token.

    Args:
        paths: Medusa-style paths of child indices, in any order; every prefix of a path must be a path.

    Attributes:
        order: Index into ``paths`` of each node, depth-first.
        parent: Parent of each node, -1 for children of the root, in depth-first numbers.
        depth: Tokens on each node's path below the root, its own included.
        rank: Child index of each node.
    """

    def __init__(self, paths: Paths) -> None:
        listed = [tuple(int(i) for i in path) for path in paths]
        if not listed:
            raise ValueError("paths must hold at least one path, got none")
        self.order = sorted(range(len(listed)), key=listed.__getitem__)
        number = {listed[index]: node for node, index in enumerate(self.order)}
        if len(number) != len(listed):
            raise ValueError(f"paths must be distinct, got {len(listed) - len(number)} twice")
        self.parent: list[int] = []
        self.depth: list[int] = []
        self.rank: list[int] = []
        for path in number:
            if not path or min(path) < 0:
                raise ValueError(f"a path must be a non-empty list of indices from 0, got {list(path)}")
            if len(path) > 1 and path[:-1] not in number:
                raise ValueError(f"paths must hold the path {list(path[:-1])} above {list(path)}, got none")
            self.parent.append(number[path[:-1]] if len(path) > 1 else -1)
            self.depth.append(len(path))
            self.rank.append(path[-1])

    def __len__(self) -> int:
        return len(self.order)


class TokenRecycling:
    """A draft without a model: the likeliest successors of every token, last seen in the target's own logits.

    Token Recycling (arXiv 2408.08696): verification computes logits for all candidates, the rejected ones
    too; the top candidates after each token are kept in a table and drafted from the next time that token
    comes up.

    Args:
        vocab_size: Rows of the table.
        num_candidates: Successors kept per token.
    """

    def __init__(self, vocab_size: int, num_candidates: int = 10) -> None:
        self.table = torch.zeros(vocab_size, num_candidates, dtype=torch.long)

    def copy(self) -> TokenRecycling:
        """A copy that learns on its own."""
        other = TokenRecycling(*self.table.shape)
        other.table.copy_(self.table)
        return other

    def update(self, tokens: torch.Tensor, logits: torch.Tensor) -> None:
        """Learn from the model's ``logits`` [n, vocab] after ``tokens`` [n]; the last of equals counts."""
        last = {token: row for row, token in enumerate(tokens.tolist())}
        rows = torch.tensor(list(last.values()), dtype=torch.long)
        self.table[tokens[rows]] = logits[rows].topk(self.table.shape[1], dim=-1).indices

    def draft(self, root_token: int, tree: TokenTree) -> torch.Tensor:
        """Tokens int64 [len(tree)] below ``root_token``, in the order of the paths of ``tree``."""
        tokens = torch.zeros(len(tree) + 1, dtype=torch.long)
        tokens[-1] = root_token  # parent -1
        parent, depth, rank = (torch.tensor(x) for x in (tree.parent, tree.depth, tree.rank))
        for level in range(1, max(tree.depth) + 1):
            nodes = (depth == level).nonzero()[:, 0]
            tokens[nodes] = self.table[tokens[parent[nodes]], rank[nodes].clamp(max=self.table.shape[1] - 1)]
        drafted = torch.empty(len(tree), dtype=torch.long)
        drafted[torch.tensor(tree.order)] = tokens[:-1]
        return drafted
