# SPDX-License-Identifier: Apache-2.0
"""Reference of trees of tokens: ``palmette.Tree``, and what its plans must cover, in plain Python.

Nothing here knows about intervals: a query sees the tokens on its path, and a path is found by asking for
    parents.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Tree:
    """``palmette.Tree`` with lists: ``tokens[node]`` holds the KV slots of the node's tokens.

    For a tree without slots every token has an arbitrary unique number instead, and ``slots`` renumbers.
    """

    def __init__(
        self, parent: Sequence[int], num_tokens: Sequence[int], slots: Sequence[int] | None = None
    ) -> None:
        self.parents = [int(p) for p in parent]
        self.alive = [True] * len(self.parents)
        self.identity = slots is None
        self._unique = 0
        values = list(self._fresh(sum(num_tokens))) if slots is None else [int(s) for s in slots]
        self.tokens: list[list[int]] = [[] for _ in self.parents]
        for node in self.order():
            self.tokens[node] = [values.pop(0) for _ in range(int(num_tokens[node]))]

    def append(self, nodes: Sequence[int], counts: Sequence[int], slots: Sequence[int] | None = None) -> None:
        """``palmette.Tree.append``."""
        values = list(self._fresh(sum(counts))) if slots is None else list(slots)
        for node, count in zip(nodes, counts, strict=True):
            self.tokens[node] += [values.pop(0) for _ in range(count)]

    def branch(self, node: int, num_children: int) -> list[int]:
        """``palmette.Tree.branch``; node -1 adds roots."""
        first = len(self.parents)
        self.parents += [node] * num_children
        self.alive += [True] * num_children
        self.tokens += [[] for _ in range(num_children)]
        return list(range(first, first + num_children))

    def prune(self, node: int) -> list[int]:
        """``palmette.Tree.prune``."""
        while self.parents[node] >= 0 and len(self.children(self.parents[node])) == 1:
            node = self.parents[node]
        freed = [
            slot
            for other, start in zip(self.order(), self.starts(), strict=True)
            if node in self.path(other)
            for slot in self._slots_of(other, start)
        ]
        for other in self.order():
            if node in self.path(other):
                self.alive[other] = False
        return freed

    def children(self, node: int) -> list[int]:
        """Live children in order of ids; of -1, the roots."""
        return [n for n, p in enumerate(self.parents) if p == node and self.alive[n]]

    def path(self, node: int) -> list[int]:
        """Nodes from the root down to ``node``."""
        path = []
        while node >= 0:
            path.append(node)
            node = self.parents[node]
        return path[::-1]

    def order(self) -> list[int]:
        """Live nodes, depth-first."""
        order, stack = [], self.children(-1)[::-1]
        while stack:
            order.append(stack.pop())
            stack += self.children(order[-1])[::-1]
        return order

    def starts(self) -> list[int]:
        """Depth-first number of the first token of each live node, depth-first."""
        starts, token = [], 0
        for node in self.order():
            starts.append(token)
            token += len(self.tokens[node])
        return starts

    def node_start(self) -> list[int]:
        """By id; -1 for pruned nodes."""
        start = [-1] * len(self.parents)
        for node, token in zip(self.order(), self.starts(), strict=True):
            start[node] = token
        return start

    def leaves(self) -> list[int]:
        """Live nodes without children, depth-first."""
        return [n for n in self.order() if not self.children(n)]

    def slots(self) -> list[int]:
        """KV slots of all tokens, depth-first."""
        return [
            s for n, start in zip(self.order(), self.starts(), strict=True) for s in self._slots_of(n, start)
        ]

    def path_slots(self, node: int) -> list[int]:
        """KV slots of the tokens down to the last one of ``node``."""
        start = self.node_start()
        return [slot for n in self.path(node) for slot in self._slots_of(n, start[n])]

    def path_length(self, node: int) -> int:
        """Tokens down to the last one of ``node``."""
        return sum(len(self.tokens[n]) for n in self.path(node))

    def redundancy(self) -> float:
        """Sum of the leaves' path lengths / number of tokens."""
        tokens = sum(len(self.tokens[n]) for n in self.order())
        return sum(self.path_length(leaf) for leaf in self.leaves()) / tokens if tokens else 1.0

    def path_mask(self) -> Tensor:
        """bool [N, N], depth-first: [q, k] tells whether k lies on the path to q, q itself included."""
        total = sum(len(self.tokens[n]) for n in self.order())
        mask = torch.zeros(total, total, dtype=torch.bool)
        last: dict[int, int] = {-1: -1}  # the last token on the path down to a node, -1 when there is none
        for node, start in zip(self.order(), self.starts(), strict=True):
            above = last[self.parents[node]]
            for token in range(start, start + len(self.tokens[node])):
                if above >= 0:
                    mask[token] = mask[above]
                mask[token, token] = True
                above = token
            last[node] = above
        return mask

    def subtree_end(self) -> list[int]:
        """Per token: one past the last token that has it on its path."""
        mask = self.path_mask()
        return [int(mask[:, k].nonzero().max()) + 1 for k in range(mask.shape[1])]

    def query_tokens(self, queries: str | tuple[Sequence[int], Sequence[int]]) -> list[int]:
        """Depth-first token number of every query of ``plan_tree_attention``, in the order of q's rows."""
        start = self.node_start()
        if queries == "tokens":
            return list(range(len(self.slots())))
        if queries == "leaves":
            last = []
            for leaf in self.leaves():
                node = next(n for n in reversed(self.path(leaf)) if self.tokens[n])
                last.append(start[node] + len(self.tokens[node]) - 1)
            return last
        return [start[node] + offset for node, offset in zip(*queries, strict=True)]

    def visible(self, queries: str | tuple[Sequence[int], Sequence[int]]) -> Tensor:
        """bool [Nq, N]: which keys, depth-first, each query sees."""
        return self.path_mask()[torch.tensor(self.query_tokens(queries), dtype=torch.int64)]

    def _slots_of(self, node: int, start: int) -> list[int]:
        return [start + i for i in range(len(self.tokens[node]))] if self.identity else self.tokens[node]

    def _fresh(self, count: int) -> range:
        self._unique += count
        return range(self._unique - count, self._unique)
