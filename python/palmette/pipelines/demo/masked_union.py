# SPDX-License-Identifier: Apache-2.0
"""SDPA with a mask over all tokens of the tree."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..records import Node, TreeBatch
from .peers import draft_ancestors, fold, path_of, unfold


class MaskedUnion:
    """SDPA over all tokens of the tree with a mask, as a unified KV cache does: [Hk, slots, D] per layer."""

    def __init__(self, num_layers: int, group: int) -> None:
        self._group = group  # query heads per KV head
        self._keys: list[torch.Tensor | None] = [None] * num_layers
        self._values: list[torch.Tensor | None] = [None] * num_layers
        self._high = 0  # slots ever used
        self._slots = torch.empty(0, dtype=torch.long)
        self._mask = torch.empty(0)
        self.kv_tokens_read = 0

    def load(
        self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        self._store(layer, torch.tensor(slots), keys, values)

    def prepare(self, batch: TreeBatch, nodes: Mapping[int, Node]) -> None:
        self._slots = batch.slots
        self._high = max(self._high, int(batch.slots.max()) + 1)
        visible = torch.zeros(len(batch.nodes), self._high, dtype=torch.bool)
        held = {n: torch.tensor(nodes[n].slots) for node in set(batch.nodes) for n in path_of(node, nodes)}
        rows: dict[int, list[int]] = {}
        for row, node in enumerate(batch.nodes):
            rows.setdefault(node, []).append(row)
        for node, below in rows.items():
            slots = torch.cat([held[n] for n in path_of(node, nodes)])
            visible[torch.tensor(below)[:, None], slots] = True
        if batch.draft_parents is not None:
            visible[:, batch.slots] = draft_ancestors(batch.draft_parents)
        bias = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        self._mask = bias.repeat(self._group, 1)[None, None]
        self.kv_tokens_read = self._high

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._store(layer, self._slots, keys, values)

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None
        assert values is not None
        out = torch.nn.functional.scaled_dot_product_attention(
            fold(query, keys.shape[0]),
            keys[None, :, : self._high],
            values[None, :, : self._high],
            attn_mask=self._mask,
            scale=scale,
        )
        return unfold(out, query.shape[0]).reshape(query.shape)

    def pruned(self, nodes: Sequence[int]) -> None:
        pass  # their slots are masked until they are used again

    def compact(self, node: int, source: Sequence[int], target: Sequence[int]) -> None:
        if list(source) != list(target):
            src, dst = torch.tensor(source), torch.tensor(target)
            for pool in (*self._keys, *self._values):
                assert pool is not None
                pool[:, dst] = pool[:, src]

    def _store(self, layer: int, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self._high = max(self._high, int(slots.max()) + 1)
        for pools, states in ((self._keys, keys), (self._values, values)):
            pool = pools[layer]
            if pool is None or pool.shape[1] < self._high:
                grown = states.new_zeros(states.shape[1], self._high + self._high // 4 + 256, states.shape[2])
                if pool is not None:
                    grown[:, : pool.shape[1]] = pool
                pools[layer] = pool = grown
            pool[:, slots] = states.transpose(0, 1)
