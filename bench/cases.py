# SPDX-License-Identifier: Apache-2.0
"""The workloads that Palmette is measured on; tests take their shapes from here too.

A ``Case`` is plain data. ``Geometry`` derives from it who sees whom, ``make_inputs`` the tensors, and
``attention_cases`` / ``training_cases`` list the suites: ``quick`` (about a minute), ``default`` (about ten)
and ``full`` (everything).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from bench import trees
from bench.trees import TreeShape

SUITES = ("quick", "default", "full")
Queries = str | tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Case:
    """One workload: a tree, the queries on it, and the shape of the tensors.

    Attributes:
        name: Unique among all cases.
        group: Key into ``bench.goals.GOALS``.
        tree: The nodes.
        queries: "leaves", "tokens", or (node, offset) pairs, as ``palmette.plan_tree_attention`` takes them.
        num_q_heads, num_kv_heads, head_dim, dtype: Of q, k and v.
        page_size: 0: token i of the depth-first order lies in slot i. Else the pool consists of pages in
            random order; each node has pages of its own.
    """

    name: str
    group: str
    tree: TreeShape
    queries: Queries = "leaves"
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "float32"
    page_size: int = 0

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @cached_property
    def geometry(self) -> Geometry:
        return Geometry.of(self.tree, self.queries)

    @property
    def flops(self) -> int:
        """Of q k and p v over visible pairs; softmax and merging count nothing."""
        return self.geometry.num_pairs * self.num_q_heads * 4 * self.head_dim

    def num_bytes(self, itemsize: int | None = None) -> int:
        """What must move at least: every visible token's K and V once, q, and the output."""
        size = itemsize or self.torch_dtype.itemsize
        keys = self.geometry.num_visible * self.num_kv_heads
        return 2 * size * self.head_dim * (keys + len(self.geometry.pos) * self.num_q_heads)

    @property
    def rows_per_key(self) -> float:
        """Query rows (queries x query heads per KV head) that meet a visible key, in the mean."""
        return self.geometry.num_pairs * self.group_size / max(1, self.geometry.num_visible)


class Geometry(NamedTuple):
    """Depth-first numbers of a tree's nodes, tokens and queries; siblings come in the order of their ids."""

    order: list[int]  # nodes, depth-first
    level: list[int]  # [nodes] edges above a node
    start: np.ndarray  # [nodes] depth-first number of the node's first token
    end: np.ndarray  # [nodes] one past the last token of its subtree
    depth: np.ndarray  # [nodes] tokens above its first token
    token_end: np.ndarray  # [tokens] one past the last token of each token's subtree
    pos: np.ndarray  # [queries] depth-first number of the token that asks, in the order of the queries
    num_pairs: int  # visible (query, key) pairs
    num_visible: int  # tokens that some query sees

    @classmethod
    def of(cls, tree: TreeShape, queries: Queries) -> Geometry:
        count = len(tree.parent)
        children: list[list[int]] = [[] for _ in range(count)]
        for node, parent in enumerate(tree.parent):
            if parent >= 0:
                children[parent].append(node)
        start, end, depth = (np.zeros(count, dtype=np.int64) for _ in range(3))
        level = [0] * count
        order: list[int] = []
        number = 0
        stack = [node for node in reversed(range(count)) if tree.parent[node] < 0]
        while stack:
            node = stack.pop()
            if node < 0:
                end[~node] = number
                continue
            parent = tree.parent[node]
            order.append(node)
            start[node] = number
            if parent >= 0:
                level[node] = level[parent] + 1
                depth[node] = depth[parent] + tree.num_tokens[parent]
            number += tree.num_tokens[node]
            stack.append(~node)
            stack.extend(reversed(children[node]))
        token_end = np.repeat(end[order], np.array(tree.num_tokens)[order])
        if queries == "leaves":
            asking = [(node, tree.num_tokens[node] - 1) for node in order if not children[node]]
        elif queries == "tokens":
            asking = [(node, offset) for node in order for offset in range(tree.num_tokens[node])]
        else:
            asking = [(node, offset) for node, offset in queries]
        nodes, offsets = np.array(asking, dtype=np.int64).T
        pos = start[nodes] + offsets
        index = np.arange(number)
        # a key is seen when some query lies in its subtree
        ascending = np.sort(pos)
        seen = np.searchsorted(ascending, index) < np.searchsorted(ascending, token_end)
        num_pairs = int((depth[nodes] + offsets + 1).sum())
        return cls(order, level, start, end, depth, token_end, pos, num_pairs, int(seen.sum()))

    def visible(self, rows: Sequence[int] | slice = slice(None)) -> torch.Tensor:
        """bool [rows, tokens]: which keys the given queries see."""
        pos = self.pos[rows][:, None]
        return torch.from_numpy((np.arange(len(self.token_end)) <= pos) & (pos < self.token_end))


class Inputs(NamedTuple):
    """q [Nq, Hq, D] and a pool k, v [slots, Hk, D], as ``palmette.tree_attention`` takes them."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor | None  # int64 [tokens]: the slot of every token, depth-first; None: its own number


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    """Standard normal tensors of a case."""
    draw = torch.Generator().manual_seed(seed)
    slots = _paged_slots(case, draw) if case.page_size else None
    num_slots = len(case.geometry.token_end) if slots is None else int(slots.max()) + 1

    def tensor(count: int, heads: int) -> torch.Tensor:
        return torch.randn(count, heads, case.head_dim, generator=draw).to(case.torch_dtype)

    return Inputs(
        tensor(len(case.geometry.pos), case.num_q_heads),
        tensor(num_slots, case.num_kv_heads),
        tensor(num_slots, case.num_kv_heads),
        slots,
    )


def _paged_slots(case: Case, draw: torch.Generator) -> torch.Tensor:
    size = case.page_size
    lengths = [case.tree.num_tokens[node] for node in case.geometry.order]
    pages = torch.randperm(sum(-(-length // size) for length in lengths), generator=draw)
    parts, used = [], 0
    for length in lengths:
        count = -(-length // size)
        own = pages[used : used + count, None] * size + torch.arange(size)
        parts.append(own.flatten()[:length])
        used += count
    return torch.cat(parts)


# ----------------------------------------------------------------------------------------------------- suites


def star_case(num_leaves: int, prompt: int = 4096, private: int = 64, **options: object) -> Case:
    """A few-shot star, in the group that its number of leaves belongs to."""
    group = "star_large" if num_leaves >= 20 else "star_small"
    tree = trees.star(num_leaves, prompt, private)
    return _named(Case(f"star {num_leaves} x {private} on {prompt}", group, tree, **options))


def medusa_case(size: int, prompt: int, **options: object) -> Case:
    """A Medusa token tree below a prompt; every token of the token tree asks."""
    tree = trees.token_tree(prompt, trees.draft_paths(size))
    queries = tuple((node, 0) for node in range(1, len(tree.parent)))
    return _named(Case(f"medusa {size} on {prompt}", "medusa", tree, queries, **options))


def reasoning_case(task: str, index: int, progress: float = 0.5, **options: object) -> Case:
    """A recorded tree-of-thought in mid-run."""
    name = f"thought {task} {index} at {progress:.0%}"
    return _named(Case(name, "irregular", trees.reasoning(task, index, progress), **options))


def irregular_case(**options: object) -> Case:
    return _named(Case("irregular 79 nodes", "irregular", trees.irregular(), **options))


def chain_case(num_tokens: int = 4160, **options: object) -> Case:
    return _named(Case(f"chain {num_tokens}", "chain", trees.chain(num_tokens), **options))


def fasttree_case(nodes: Sequence[int], tokens: Sequence[int], num_q_heads: int, num_kv_heads: int) -> Case:
    name = f"levels {','.join(map(str, nodes))} | {','.join(map(str, tokens))}"
    case = Case(name, "fasttree", trees.levels(nodes, tokens), "leaves", num_q_heads, num_kv_heads)
    return replace(_named(case), name=f"{name} {num_q_heads}/{num_kv_heads}")


def _named(case: Case) -> Case:
    """Adds what differs from 32/8 heads of 128 in fp32 to the name."""
    name = case.name
    if (case.num_q_heads, case.num_kv_heads) != (32, 8):
        name += f" {case.num_q_heads}/{case.num_kv_heads}"
    if case.head_dim != 128:
        name += f" D{case.head_dim}"
    if case.page_size:
        name += f" pages of {case.page_size}"
    if case.dtype != "float32":
        name += " bf16" if case.dtype == "bfloat16" else f" {case.dtype}"
    return replace(case, name=name)


# Trees of the FastTree artifact's kernel benchmark: nodes per level | tokens per node of each level.
FASTTREE_GRID = (
    ((1, 2, 64), (8, 256, 32)),
    ((1, 4, 256), (8, 256, 32)),
    ((1, 4, 8, 256), (8, 256, 256, 32)),
    ((1, 256), (256, 32)),
    ((1, 1024), (2048, 32)),
    ((1, 16, 64), (1024, 256, 32)),
    ((1, 4, 16, 512), (1024, 256, 128, 32)),
    ((1, 4, 16, 64, 256, 1024), (256, 8, 256, 64, 32, 256)),
    ((1, 10), (4000, 400)),
    ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (16,) * 9),
    ((1, 2, 4, 8, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16, 16, 16, 16)),
    ((1, 8, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16, 16)),
    ((1, 8, 16, 32, 64, 256, 1024), (256, 128, 64, 16, 16, 16, 16)),
    ((1, 16, 32, 64, 128, 1024), (256, 128, 64, 16, 16, 16)),
    ((1, 16, 32, 64, 256, 1024), (256, 128, 64, 16, 16, 16)),
)
FASTTREE_HEADS = ((16, 1), (32, 8), (32, 32))
LEAVES = (1, 2, 4, 8, 16, 20, 32, 50, 64, 128, 256)
DRAFT_SIZES = (32, 64, 96, 128, 256)
PROMPTS = (1024, 4096)
BF16 = {"dtype": "bfloat16"}


def smollm2_case() -> Case:
    """24 branches of 200 tokens on 1500, in SmolLM2-135M's shape."""
    return star_case(24, 1500, 200, num_q_heads=9, num_kv_heads=3, head_dim=64)


def _quick() -> list[Case]:
    return [
        chain_case(),
        *(star_case(leaves) for leaves in (1, 4, 16, 64)),
        star_case(64, **BF16),
        smollm2_case(),
        irregular_case(),
        reasoning_case("sorting", 0),
        medusa_case(64, 4096),
        fasttree_case(*FASTTREE_GRID[5], 32, 8),
    ]


def _default() -> list[Case]:
    half = {"head_dim": 64}
    cases = [chain_case(), chain_case(**BF16), chain_case(**half)]
    cases += [star_case(leaves, prompt) for prompt in PROMPTS for leaves in LEAVES]
    cases += [star_case(leaves, **BF16) for leaves in (2, 8, 32, 64)]
    cases += [star_case(leaves, **half) for leaves in (4, 16, 64)]
    cases += [star_case(64, page_size=size) for size in (1, 64)]
    cases += [smollm2_case()]
    cases += [irregular_case(), irregular_case(**BF16), irregular_case(**half), irregular_case(page_size=16)]
    cases += [reasoning_case("sorting", index) for index in (0, 12, 36)]
    cases += [reasoning_case("set", index) for index in (5, 24)]
    cases += [reasoning_case("sorting", 5, 0.8), reasoning_case("sorting", 12, **BF16)]
    cases += [medusa_case(size, prompt) for prompt in PROMPTS for size in DRAFT_SIZES]
    cases += [medusa_case(64, 4096, **BF16), medusa_case(64, 4096, **half)]
    cases += [fasttree_case(*FASTTREE_GRID[i], 32, 8) for i in (0, 3, 5, 8, 11)]
    cases += [fasttree_case(*FASTTREE_GRID[i], 16, 1) for i in (5, 8)]
    cases += [fasttree_case(*FASTTREE_GRID[i], 32, 32) for i in (0, 5)]
    return cases


def _full() -> list[Case]:
    cases = _default()
    for options in ({"head_dim": 64}, {"dtype": "bfloat16"}, {"head_dim": 64, "dtype": "bfloat16"}):
        cases += [star_case(leaves, prompt, **options) for prompt in PROMPTS for leaves in LEAVES]
        cases += [medusa_case(size, prompt, **options) for prompt in PROMPTS for size in DRAFT_SIZES]
        cases += [reasoning_case(task, 12, **options) for task in ("sorting", "set")]
        cases += [chain_case(**options), irregular_case(**options)]
    for task in ("sorting", "set"):
        cases += [reasoning_case(task, index, at) for index in range(0, 60, 12) for at in (0.2, 0.5, 0.8)]
    cases += [fasttree_case(*tree, *heads) for tree in FASTTREE_GRID for heads in FASTTREE_HEADS]
    return cases


def _training(suite: str) -> list[Case]:
    cases = [
        Case("train star 6 x 256 on 512", "training", trees.star(6, 512, 256), "tokens"),
        Case("train 3 levels", "training", trees.packed(2048, 256, 3, seed=1), "tokens"),
    ]
    if suite != "quick":
        cases.append(Case("train 4 levels", "training", trees.packed(2048, 384, 4, seed=0), "tokens"))
    if suite == "full":
        cases.append(_named(replace(cases[0], dtype="bfloat16")))
        cases.append(_named(replace(cases[1], num_q_heads=9, num_kv_heads=3, head_dim=64)))
    return cases


_ATTENTION: dict[str, Callable[[], list[Case]]] = {"quick": _quick, "default": _default, "full": _full}


def attention_cases(suite: str = "default") -> list[Case]:
    """Forward cases of a suite, each name once."""
    return list({case.name: case for case in _ATTENTION[suite]()}.values())


def training_cases(suite: str = "default") -> list[Case]:
    """Packed trees of 2048 tokens with about a quarter of the pairs visible; every token asks."""
    return _training(suite)
