# SPDX-License-Identifier: Apache-2.0
"""Token trees for the tests of verification."""

from __future__ import annotations

from collections.abc import Sequence

import hypothesis.strategies as st
import torch
from palmette import Tree
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def token_tree(parent: Sequence[int], root_tokens: int = 1) -> Tree:
    return Tree(parent, [root_tokens if up < 0 else 1 for up in parent])


def logits_for(choice: Sequence[int], vocab: int = 20) -> Tensor:
    """Rows whose argmax is choice[node]."""
    logits = torch.randn(len(choice), vocab).clamp(-3, 3)
    logits[torch.arange(len(choice)), torch.tensor(choice)] = 10.0
    return logits


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    for name, g, w in zip(("accepted", "num_accepted", "bonus"), got, want, strict=True):
        assert g.dtype == torch.int64
        assert torch.equal(g, w), f"{name}: {g.tolist()}, wanted {w.tolist()}"


@st.composite
def token_trees(draw: st.DrawFn) -> tuple[list[int], list[int], int]:
    """(parent, tokens, vocab): a forest with ids in any order, and few enough tokens that walks get far."""
    nodes = draw(st.integers(1, 24))
    shape = draw(st.sampled_from(["any", "chain", "star", "forest"]))
    up = [-1]
    for node in range(1, nodes):
        lowest = {"any": 0, "chain": node - 1, "star": 0, "forest": -1}[shape]
        up.append(draw(st.integers(lowest, 0 if shape == "star" else node - 1)))
    ids = draw(st.permutations(range(nodes)))
    parent = [0] * nodes
    for node in range(nodes):
        parent[ids[node]] = -1 if up[node] < 0 else ids[up[node]]
    vocab = draw(st.sampled_from([1, 2, 3, 5, 40]))
    tokens = draw(st.lists(st.integers(0, vocab - 1), min_size=nodes, max_size=nodes))
    return parent, tokens, vocab
