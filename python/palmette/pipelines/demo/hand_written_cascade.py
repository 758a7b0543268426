# SPDX-License-Identifier: Apache-2.0
"""The strongest thing that PyTorch alone can do: its own flash kernel per node of the tree, and a merge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..records import Node, TreeBatch
from .peers import State, draft_ancestors, fold, path_of, unfold


class _Group:
    """Siblings of equal length, one query each, or one node: K and V [rows, Hk, capacity, D] per layer."""

    def __init__(self, nodes: list[int], num_layers: int) -> None:
        self.nodes = nodes
        self.length = 0
        self.keys: list[torch.Tensor | None] = [None] * num_layers
        self.values: list[torch.Tensor | None] = [None] * num_layers

    def append(self, layer: int, keys: torch.Tensor, values: torch.Tensor, length: int) -> None:
        """Store [rows, Hk, tokens, D] as the last tokens of the ``length`` that there are now."""
        for pools, states in ((self.keys, keys), (self.values, values)):
            pool = pools[layer]
            if pool is None or pool.shape[2] < length:
                rows, heads, _, dim = states.shape
                grown = states.new_empty(rows, heads, length + length // 4 + 32, dim)
                if pool is not None:
                    grown[:, :, : pool.shape[2]] = pool
                pools[layer] = pool = grown
            pool[:, :, length - states.shape[2] : length] = states

    def take(self, rows: Sequence[int]) -> _Group:
        """A group of some of the rows."""
        other = _Group([self.nodes[row] for row in rows], len(self.keys))
        other.length = self.length
        other.keys = [None if pool is None else pool[list(rows)] for pool in self.keys]
        other.values = [None if pool is None else pool[list(rows)] for pool in self.values]
        return other


class HandWrittenCascade:
    """One call of PyTorch's own CPU flash kernel, which returns the LSE, per node, and a merge.

    Siblings of equal length go in one batched call: on a star that makes the cascade of two calls and one
    merge.
    """

    def __init__(self, num_layers: int, group: int) -> None:
        self._num_layers = num_layers
        self._query_group = group  # query heads per KV head
        self._group: dict[int, _Group] = {}
        self._batch: TreeBatch | None = None
        self._calls: list[
            tuple[_Group, torch.Tensor | None]
        ] = []  # with the queries below; None: all, in order
        self._mask: torch.Tensor | None = None
        self._drafts: list[State | None] = [None] * num_layers
        self.kv_tokens_read = 0

    def load(
        self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
        group = self._group.setdefault(node, _Group([node], self._num_layers))
        group.length = len(slots)
        group.append(layer, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], group.length)

    def prepare(self, batch: TreeBatch, nodes: Mapping[int, Node]) -> None:
        self._batch = batch
        below: dict[int, list[int]] = {}
        for row, node in enumerate(batch.nodes):
            for above in path_of(node, nodes):
                below.setdefault(above, []).append(row)
        if batch.draft_parents is None:
            self._grow(batch.nodes, nodes)
        grown = set(batch.nodes)
        self._calls, done = [], set()
        for node, rows in below.items():
            if node not in self._group or node in done:
                continue  # no tokens yet, or a sibling's call serves it
            group = self._group[node]
            if len(group.nodes) > 1 and not all(n in grown and len(below[n]) == 1 for n in group.nodes):
                self._split(group)
                group = self._group[node]
            done.update(group.nodes)
            if len(group.nodes) > 1:
                rows = [below[n][0] for n in group.nodes]
            everyone = rows == list(range(len(batch.nodes)))
            self._calls.append((group, None if everyone else torch.tensor(rows)))
        self._calls.sort(
            key=lambda call: call[1] is not None
        )  # a state of all queries is what the others join
        self._mask = None
        if batch.draft_parents is not None:
            visible = draft_ancestors(batch.draft_parents).repeat(self._query_group, 1)
            self._mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        drafts = 0 if batch.draft_parents is None else len(batch.nodes)
        self.kv_tokens_read = sum(group.length * len(group.nodes) for group, _ in self._calls) + drafts

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self._batch is not None
        if self._batch.draft_parents is not None:
            self._drafts[layer] = (
                keys.transpose(0, 1).contiguous()[None],
                values.transpose(0, 1).contiguous()[None],
            )
            return
        row = {node: index for index, node in enumerate(self._batch.nodes)}
        for group in {id(self._group[node]): self._group[node] for node in row}.values():
            rows = [row[node] for node in group.nodes]
            group.append(layer, keys[rows].unsqueeze(2), values[rows].unsqueeze(2), group.length)

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        state: State | None = None
        drafts = self._drafts[layer] if self._mask is not None else None
        if drafts is not None and self._mask is not None:
            state = _flash(query, *drafts, scale, self._mask)
        for group, rows in self._calls:
            keys, values = group.keys[layer], group.values[layer]
            assert keys is not None
            assert values is not None
            part = query if rows is None else query[rows]
            new = _flash(part, keys[:, :, : group.length], values[:, :, : group.length], scale, None)
            if rows is None:
                state = new if state is None else _merge(state, new)
                continue
            if state is None:  # several trees: nothing is above all queries
                out = query.new_zeros(query.shape[0], *new[0].shape[1:])
                state = (out, out.new_full(out.shape[:3], float("-inf"), dtype=torch.float32))
            merged = _merge((state[0][rows], state[1][rows]), new)
            state = (state[0].index_copy(0, rows, merged[0]), state[1].index_copy(0, rows, merged[1]))
        assert state is not None
        return state[0].reshape(query.shape)

    def pruned(self, nodes: Sequence[int]) -> None:
        for node in nodes:
            group = self._group.pop(node, None)
            if group is not None and len(group.nodes) > 1:
                self._replace(group.take([row for row, other in enumerate(group.nodes) if other != node]))

    def compact(self, node: int, source: Sequence[int], target: Sequence[int]) -> None:
        assert self._batch is not None
        place = {slot: index for index, slot in enumerate(self._batch.slots.tolist())}
        rows = [place[slot] for slot in source]
        group = self._group[node]
        group.length += len(rows)
        for layer, drafts in enumerate(self._drafts):
            assert drafts is not None
            group.append(layer, drafts[0][:, :, rows], drafts[1][:, :, rows], group.length)

    def regroup(self, leaves: Sequence[int]) -> None:
        """Put loaded leaves of equal length together, as decoding would have."""
        by_length: dict[int, list[_Group]] = {}
        for node in leaves:
            if (group := self._group.get(node)) is not None:
                by_length.setdefault(group.length, []).append(group)
        for length, groups in by_length.items():
            if len(groups) == 1:
                continue
            joined = _Group([group.nodes[0] for group in groups], self._num_layers)
            joined.length = length
            for layer in range(self._num_layers):
                states = [(g.keys[layer], g.values[layer]) for g in groups]
                keys = torch.cat([k[:, :, :length] for k, _ in states if k is not None])
                values = torch.cat([v[:, :, :length] for _, v in states if v is not None])
                joined.append(layer, keys, values, length)
            self._replace(joined)

    def _grow(self, grown: Sequence[int], nodes: Mapping[int, Node]) -> None:
        """Make room for one more token of every node in ``grown``."""
        families: dict[int, list[int]] = {}
        for node in grown:
            if node not in self._group:
                families.setdefault(nodes[node].parent, []).append(node)
        for family in families.values():
            self._replace(_Group(family, self._num_layers))
        growing = set(grown)
        for group in {id(self._group[node]): self._group[node] for node in grown}.values():
            if not growing.issuperset(group.nodes):  # some siblings ended
                rows = [row for row, node in enumerate(group.nodes) if node in growing]
                for row, node in enumerate(group.nodes):
                    if node not in growing:
                        self._replace(group.take([row]))
                self._replace(group.take(rows))
        for group in {id(self._group[node]): self._group[node] for node in grown}.values():
            group.length += 1

    def _split(self, group: _Group) -> None:
        for row in range(len(group.nodes)):
            self._replace(group.take([row]))

    def _replace(self, group: _Group) -> None:
        for node in group.nodes:
            self._group[node] = group


def _flash(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, mask: Any) -> State:
    """(out [n, Hk, group, D], lse [n, Hk, group]): all queries over one row of keys, or i over row i."""
    rows, heads = keys.shape[:2]
    if rows == 1:
        q = fold(query, heads)
    else:
        q = query.unflatten(1, (heads, -1))
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, keys, values, 0.0, False, attn_mask=None if mask is None else mask[None, None], scale=scale
    )
    return (out, lse) if rows > 1 else (unfold(out, query.shape[0]), unfold(lse, query.shape[0]))


def _merge(a: State, b: State) -> State:
    # the weight of b is e^lse_b / (e^lse_a + e^lse_b); a state without keys has lse -inf and weight 0
    return torch.lerp(a[0], b[0], torch.sigmoid(b[1] - a[1]).to(a[0].dtype).unsqueeze(-1)), torch.logaddexp(
        a[1], b[1]
    )
