# SPDX-License-Identifier: Apache-2.0
"""SDPA on every sequence's own K and V, as without tree attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from ..records import Node, TreeBatch
from .peers import State, path_of


class PerSequence:
    """SDPA on every sequence's own K and V, replicated from a pool before the clock runs.

    Sequences of equal length share a call. The candidates of a token tree are sequences of their own, one per
    leaf of the token tree, as without tree attention they would be.

    Args:
        layers: Per layer the pool's keys and values, [slots, Hk, D].
        untimed: Context in which the clock stands still.
    """

    def __init__(self, layers: Sequence[State], untimed: Any = nullcontext) -> None:
        self._layers = layers
        self._untimed = untimed
        self._calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.kv_tokens_read = 0

    def load(
        self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        pass  # the pool has it all

    def prepare(self, batch: TreeBatch, nodes: Mapping[int, Node]) -> None:
        parents = batch.draft_parents or [-1] * len(batch.nodes)
        inner = set(parents)
        new_slots = batch.slots.tolist()
        by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
        for row, node in enumerate(batch.nodes):
            if row in inner:
                continue
            slots = [slot for above in path_of(node, nodes) for slot in nodes[above].slots]
            rows = [row]
            while parents[rows[0]] >= 0:
                rows.insert(0, parents[rows[0]])
            if batch.draft_parents is not None:
                slots = slots + [new_slots[r] for r in rows]
            by_length.setdefault(len(slots), []).append((slots, rows))
        self._calls = []
        for length, sequences in by_length.items():
            queries = torch.tensor([rows for _, rows in sequences])
            count = queries.shape[1]
            mask = None
            if count > 1:
                mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
            self._calls.append((torch.tensor([slots for slots, _ in sequences]), queries, mask))
        self.kv_tokens_read = sum(slots.numel() for slots, _, _ in self._calls)

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        pass  # the pool has them already

    def replicate(self, layer: int) -> list[State]:
        """K and V of every sequence, [sequences, Hk, length, D] contiguous, per call."""
        return [
            (keys[slots].transpose(1, 2).contiguous(), values[slots].transpose(1, 2).contiguous())
            for keys, values in [self._layers[layer]]
            for slots, _, _ in self._calls
        ]

    def attend(
        self, layer: int, query: torch.Tensor, scale: float, replicas: list[State] | None = None
    ) -> torch.Tensor:
        if replicas is None:
            with self._untimed():
                replicas = self.replicate(layer)
        result = torch.empty_like(query)
        for (_, rows, mask), (keys, values) in zip(self._calls, replicas, strict=True):
            heads, (sequences, count) = keys.shape[1], rows.shape
            q = (
                query[rows].unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)
            )  # [sequences, Hk, group, count, D]
            folded = None if mask is None else mask.repeat(q.shape[2], 1)
            out = torch.nn.functional.scaled_dot_product_attention(
                q.flatten(2, 3), keys, values, attn_mask=folded, scale=scale
            )
            result[rows] = (
                out.unflatten(2, (-1, count))
                .permute(0, 3, 1, 2, 4)
                .reshape(sequences, count, *query.shape[1:])
            )
        return result

    def pruned(self, nodes: Sequence[int]) -> None:
        pass

    def compact(self, node: int, source: Sequence[int], target: Sequence[int]) -> None:
        pass
