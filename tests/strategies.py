# SPDX-License-Identifier: Apache-2.0
"""Hypothesis strategies shared by the tests."""

from __future__ import annotations

from typing import NamedTuple

import hypothesis.strategies as st


class Forest(NamedTuple):
    """Arguments of palmette.Tree."""

    parent: list[int]
    num_tokens: list[int]
    slots: list[int] | None


@st.composite
def forests(
    draw: st.DrawFn,
    *,
    max_nodes: int = 24,
    max_tokens: int = 12,
    with_slots: bool | None = None,
    min_root_tokens: int = 0,
) -> Forest:
    """Random forests: bushy, chains, stars and anything between, ids in any order, nodes without tokens.

    With slots (drawn unless ``with_slots`` says so), they are distinct numbers in any order. min_root_tokens
    of 1 makes sure that every path holds a token, as "leaves" queries need.
    """
    nodes = draw(st.integers(1, max_nodes))
    shape = draw(st.sampled_from(["any", "chain", "star", "forest"]))
    up = [-1]
    for node in range(1, nodes):
        if shape == "chain":
            up.append(node - 1)
        elif shape == "star":
            up.append(0)
        else:
            up.append(draw(st.integers(-1 if shape == "forest" else 0, node - 1)))
    longest = draw(st.sampled_from([1, 3, max_tokens]))
    length = [draw(st.integers(min_root_tokens if p < 0 else 0, max(longest, min_root_tokens))) for p in up]
    ids = draw(st.permutations(range(nodes))) if draw(st.booleans()) else list(range(nodes))
    parent, num_tokens = [0] * nodes, [0] * nodes
    for node in range(nodes):
        parent[ids[node]] = -1 if up[node] < 0 else ids[up[node]]
        num_tokens[ids[node]] = length[node]
    if not (draw(st.booleans()) if with_slots is None else with_slots):
        return Forest(parent, num_tokens, None)
    total = sum(num_tokens)
    first, stride = draw(st.integers(0, 5)), draw(st.integers(1, 3))
    pool = [first + stride * i for i in range(total)]
    order = draw(st.sampled_from(["ascending", "descending", "shuffled"]))
    if order == "descending":
        pool.reverse()
    elif order == "shuffled":
        draw(st.randoms(use_true_random=False)).shuffle(pool)
    return Forest(parent, num_tokens, pool)


def query_pairs(forest: Forest) -> st.SearchStrategy[tuple[list[int], list[int]]]:
    """Explicit queries (node, offset) of a forest: any tokens, in any order, repeated or not."""
    tokens = [(node, offset) for node, length in enumerate(forest.num_tokens) for offset in range(length)]
    pairs = st.lists(st.sampled_from(tokens), max_size=40) if tokens else st.just([])
    return pairs.map(lambda drawn: ([node for node, _ in drawn], [offset for _, offset in drawn]))
