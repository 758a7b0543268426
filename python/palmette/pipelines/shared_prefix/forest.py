# SPDX-License-Identifier: Apache-2.0
"""Which tokens run together, and in which order."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from palmette.tree import Tree

# ("push", [node], parent), ("visit", nodes of a microbatch, their parent), ("pop", [node], parent)
Action = tuple[str, list[int], int]


@dataclass
class Forest:
    """A tree's nodes that hold tokens, in depth-first order; -1 is what the roots hang from.

    Attributes:
        start, length: of each node's tokens, depth-first.
        parent: place in these lists.
        children: of each place, and of -1.
        size: tokens of the subtree.
        leaves: leaves of the tree at or below, those without tokens too: a token counts for each.
    """

    start: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    children: dict[int, list[int]] = field(default_factory=lambda: {-1: []})
    size: list[int] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, tree: Tree) -> Forest:
        forest = cls()
        starts, place = tree.node_start.tolist(), {-1: -1}
        order = tree.order.tolist()
        paths = dict.fromkeys((-1, *order), 0)
        for node in reversed(order):
            paths[node] = paths[node] or 1
            paths[tree.parent(node)] += paths[node]
        for node in order:
            above, length = place[tree.parent(node)], tree.length(node)
            if length == 0:  # its children hang from its parent
                if above < 0 and not tree.is_leaf(node):
                    raise ValueError(f"tree must have tokens in a root with children, got none in {node}")
                place[node] = above
                continue
            here = place[node] = len(forest.start)
            forest.start.append(starts[node])
            forest.length.append(length)
            forest.parent.append(above)
            forest.children[above].append(here)
            forest.children[here] = []
            forest.leaves.append(paths[node])
        forest.size = list(forest.length)
        for here in reversed(range(len(forest.start))):
            if (above := forest.parent[here]) >= 0:
                forest.size[above] += forest.size[here]
        return forest

    def subtree(self, place: int) -> list[int]:
        """A node and all below it, in depth-first order: neighbours in the lists."""
        end = place + 1
        while end < len(self.parent) and self.parent[end] >= place:
            end += 1
        return list(range(place, end))

    def walk(self, budget: int) -> Iterator[Action]:
        """What a step does, in order."""
        waiting: list[Action] = list(reversed(self._below(-1, budget)))
        while waiting:
            do, places, parent = waiting.pop()
            yield do, places, parent
            if do == "push":
                waiting.append(("pop", places, parent))
                waiting += reversed(self._below(places[0], budget))

    def _below(self, parent: int, budget: int) -> list[Action]:
        small: list[int] = []
        large: list[int] = []
        for child in self.children[parent]:
            fits = self.size[child] <= budget or not self.children[child]
            (small if fits else large).append(child)
        actions: list[Action] = []
        batch: list[int] = []
        tokens = 0
        for child in small:
            if batch and tokens + self.size[child] > budget:
                actions.append(("visit", batch, parent))
                batch, tokens = [], 0
            batch += self.subtree(child)
            tokens += self.size[child]
        if batch:
            actions.append(("visit", batch, parent))
        return actions + [("push", [child], parent) for child in large]

    def path_length(self, place: int) -> int:
        """Tokens from the root down to the node's last."""
        total = 0
        while place >= 0:
            total += self.length[place]
            place = self.parent[place]
        return total


@dataclass
class Rows:
    """The tokens of one forward.

    Attributes:
        tokens: their depth-first numbers [t].
        positions: along their paths [t].
        before: row of the token before each on its path; -1: the last one of the prefix [t].
        shape: for the plan.
        leaves: leaves at or below each [t].
        below: is it below a root? [t]
    """

    tokens: Tensor
    positions: Tensor
    before: Tensor
    shape: Tree | Tensor
    leaves: Tensor
    below: Tensor

    @classmethod
    def of(cls, forest: Forest, places: list[int], prefix_len: int, device: torch.device) -> Rows:
        tokens, positions, before, leaves, below = [], [], [], [], []
        local: dict[int, int] = {}  # place -> number here
        last: dict[int, int] = {}  # place -> row of its last token
        depth: dict[int, int] = {}
        parents, lengths, row = [], [], 0
        for place in places:
            above, length = forest.parent[place], forest.length[place]
            inside = above in local
            begin = depth[above] if inside else prefix_len
            parents.append(local[above] if inside else -1)
            lengths.append(length)
            local[place] = len(local)
            depth[place] = begin + length
            tokens.append(torch.arange(forest.start[place], forest.start[place] + length))
            positions.append(torch.arange(begin, begin + length))
            previous = torch.arange(row - 1, row + length - 1)
            previous[0] = last[above] if inside else -1
            before.append(previous)
            leaves.append(torch.full((length,), forest.leaves[place]))
            below.append(torch.full((length,), above >= 0))
            row += length
            last[place] = row - 1
        flat = all(parent < 0 for parent in parents)
        shape: Tree | Tensor
        if flat:
            shape = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        else:
            shape = Tree(torch.tensor(parents), torch.tensor(lengths))
        return cls(
            torch.cat(tokens).to(device),
            torch.cat(positions).to(device),
            torch.cat(before).to(device),
            shape,
            torch.cat(leaves).to(device),
            torch.cat(below).to(device),
        )
