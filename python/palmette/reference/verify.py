# SPDX-License-Identifier: Apache-2.0
"""References of token-tree verification and KV compaction; see ``palmette.verify``.

They take a token tree as a list of parents, -1 for roots, whose nodes below the roots hold one token each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def _walk(
    parent: Sequence[int], draft_tokens: Tensor, pick: Callable[[int, int, int], int]
) -> tuple[Tensor, Tensor, Tensor]:
    """``pick(row, level, node)`` is the target's token at a node; walks go on while a child holds it."""
    roots = [node for node, up in enumerate(parent) if up < 0]
    children: dict[int, list[int]] = {node: [] for node in range(len(parent))}
    for node, up in enumerate(parent):  # ascending ids: the lowest of equal siblings comes first
        if up >= 0:
            children[up].append(node)
    paths: list[list[int]] = []
    bonus = []
    for row, root in enumerate(roots):
        path: list[int] = []
        node = root
        while True:
            token = pick(row, len(path), node)
            matching = [child for child in children[node] if int(draft_tokens[child]) == token]
            if not matching:
                break
            node = matching[0]
            path.append(node)
        paths.append(path)
        bonus.append(token)
    depth = 0
    for node in range(len(parent)):
        levels, up = 0, node
        while parent[up] >= 0:
            levels, up = levels + 1, parent[up]
        depth = max(depth, levels)
    accepted = torch.full((len(roots), depth), -1)
    for row, path in enumerate(paths):
        accepted[row, : len(path)] = torch.tensor(path, dtype=torch.int64)
    return accepted, torch.tensor([len(path) for path in paths], dtype=torch.int64), torch.tensor(bonus)


def verify_greedy(
    parent: Sequence[int], draft_tokens: Tensor, target_logits: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``palmette.verify_greedy`` by definition.

    Args:
        parent: parents of the M nodes.
        draft_tokens: [M], integers.
        target_logits: [M, vocab].

    Returns:
        accepted [B, L], num_accepted [B], bonus [B], int64.
    """
    best = [int((row == row.max()).nonzero()[0]) for row in target_logits]  # ties: the lower token
    return _walk(parent, draft_tokens, lambda row, level, node: best[node])


def verify_sample(
    parent: Sequence[int], draft_tokens: Tensor, target_probs: Tensor, uniforms: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``palmette.verify_sample`` with given uniform numbers, by inversion of the cumulated probabilities in
    float64.

    Args:
        parent: parents of the M nodes.
        draft_tokens: [M], integers.
        target_probs: [M, vocab].
        uniforms: [B, L + 1] in [0, 1), one per root and level.

    Returns:
        accepted [B, L], num_accepted [B], bonus [B], int64.
    """
    cumulated = target_probs.double().cumsum(dim=-1)
    cumulated = cumulated / cumulated[:, -1:]

    def pick(row: int, level: int, node: int) -> int:
        return int((uniforms[row, level] < cumulated[node]).nonzero()[0])

    return _walk(parent, draft_tokens, pick)


def compact_kv_(k_cache: Tensor, v_cache: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """``palmette.compact_kv_`` by a copy of all sources.

    Args:
        k_cache: [slots, Hk, D], v_cache: [slots, Hk, Dv]: changed in place.
        src_slots, dst_slots: [n], integers; the destinations are distinct.
    """
    for cache in (k_cache, v_cache):
        cache[dst_slots.long()] = cache[src_slots.long()].clone()
