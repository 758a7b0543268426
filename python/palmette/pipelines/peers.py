# SPDX-License-Identifier: Apache-2.0
"""The other ways to decode a tree with PyTorch alone, in the same decode loop: what the demo measures against.

Each keeps K and V as suits it best, contiguous and head-major, and folds the query heads of a KV head into rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from .tree_decoding import Node, TreeBatch, TreeDecoder

ATTENTION_NAME = "palmette_peer"
State = tuple[torch.Tensor, torch.Tensor]


class Peer(Protocol):
    """Attention along a tree, with a KV cache of its own.

    A forward calls ``prepare`` once, then ``write`` and ``attend`` for every layer. K and V come as [tokens, Hk, D],
    queries and outputs as [tokens, Hq, D].
    """

    def load(self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over tokens that were computed elsewhere; they lie in ``slots``."""

    def prepare(self, batch: TreeBatch, nodes: Mapping[int, Node]) -> None:
        """Get ready for the tokens of a forward, which ``nodes`` hold already (drafts excepted)."""

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store the K and V of the forward's tokens."""

    def attend(self, layer: int, query: torch.Tensor, scale: float) -> torch.Tensor:
        """Attention of the forward's tokens."""

    def pruned(self, nodes: Sequence[int]) -> None:
        """Nodes are gone."""

    def compact(self, node: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Drafts in the slots ``source`` become tokens of ``node``, in the slots ``target``."""


def path_of(node: int, nodes: Mapping[int, Node]) -> list[int]:
    """Ids from the root to ``node``."""
    path = []
    while node >= 0:
        path.append(node)
        node = nodes[node].parent
    return path[::-1]


def draft_ancestors(parents: Sequence[int]) -> torch.Tensor:
    """bool [n, n]: whether token k is on the path to token q, itself included; parents come before children."""
    visible = torch.eye(len(parents), dtype=torch.bool)
    for index, parent in enumerate(parents):
        if parent >= 0:
            visible[index] |= visible[parent]
    return visible


def fold(query: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """[n, Hq, D] -> [1, Hk, group * n, D]."""
    n, heads, dim = query.shape
    grouped = query.view(n, num_kv_heads, heads // num_kv_heads, dim)
    return grouped.permute(1, 2, 0, 3).reshape(1, num_kv_heads, -1, dim)


def unfold(out: torch.Tensor, num_queries: int) -> torch.Tensor:
    """[1, Hk, group * n, ...] -> [n, Hk, group, ...], a view."""
    return out[0].unflatten(1, (-1, num_queries)).movedim(2, 0)


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

    def load(self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
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
        assert keys is not None and values is not None
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


class _Group:
    """Sibling nodes of equal length with one query each, or one node: K and V [rows, Hk, capacity, D] per layer."""

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

    Siblings of equal length go in one batched call: on a star that makes the cascade of two calls and one merge.
    """

    def __init__(self, num_layers: int, group: int) -> None:
        self._num_layers = num_layers
        self._query_group = group  # query heads per KV head
        self._group: dict[int, _Group] = {}
        self._batch: TreeBatch | None = None
        self._calls: list[tuple[_Group, torch.Tensor | None]] = []  # with the queries below; None: all, in order
        self._mask: torch.Tensor | None = None
        self._drafts: list[State | None] = [None] * num_layers
        self.kv_tokens_read = 0

    def load(self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
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
        self._calls.sort(key=lambda call: call[1] is not None)  # a state of all queries is what the others join
        self._mask = None
        if batch.draft_parents is not None:
            visible = draft_ancestors(batch.draft_parents).repeat(self._query_group, 1)
            self._mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        drafts = 0 if batch.draft_parents is None else len(batch.nodes)
        self.kv_tokens_read = sum(group.length * len(group.nodes) for group, _ in self._calls) + drafts

    def write(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
        assert self._batch is not None
        if self._batch.draft_parents is not None:
            self._drafts[layer] = (keys.transpose(0, 1).contiguous()[None], values.transpose(0, 1).contiguous()[None])
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
            assert keys is not None and values is not None
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
    """(out [n, Hk, group, D], lse [n, Hk, group]): all queries over one row of keys, or query i over row i."""
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
    return torch.lerp(a[0], b[0], torch.sigmoid(b[1] - a[1]).to(a[0].dtype).unsqueeze(-1)), torch.logaddexp(a[1], b[1])


class PerSequence:
    """SDPA on every sequence's own K and V, replicated from a pool before the clock runs.

    Sequences of equal length share a call. The candidates of a token tree are sequences of their own, one per leaf of
    the token tree, as without tree attention they would be.

    Args:
        layers: Per layer the pool's keys and values, [slots, Hk, D].
        untimed: Context in which the clock stands still.
    """

    def __init__(self, layers: Sequence[State], untimed: Any = nullcontext) -> None:
        self._layers = layers
        self._untimed = untimed
        self._calls: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.kv_tokens_read = 0

    def load(self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor) -> None:
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
            rows = torch.tensor([rows for _, rows in sequences])
            mask = None
            if rows.shape[1] > 1:
                mask = torch.ones(rows.shape[1], length, dtype=torch.bool).tril(length - rows.shape[1])
            self._calls.append((torch.tensor([slots for slots, _ in sequences]), rows, mask))
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
            q = query[rows].unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4)  # [sequences, Hk, group, count, D]
            folded = None if mask is None else mask.repeat(q.shape[2], 1)
            out = torch.nn.functional.scaled_dot_product_attention(
                q.flatten(2, 3), keys, values, attn_mask=folded, scale=scale
            )
            result[rows] = out.unflatten(2, (-1, count)).permute(0, 3, 1, 2, 4).reshape(sequences, count, *query.shape[1:])
        return result

    def pruned(self, nodes: Sequence[int]) -> None:
        pass

    def compact(self, node: int, source: Sequence[int], target: Sequence[int]) -> None:
        pass


def register_peers() -> None:
    """Register the attention that hands a forward's q, k, v to its ``peer=`` keyword."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, peer_attention)


def peer_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    *,
    peer: Peer,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of every layer of a peer's forward."""
    peer.write(module.layer_idx, key[0].transpose(0, 1), value[0].transpose(0, 1))
    q = query[0].transpose(0, 1).contiguous()
    return peer.attend(module.layer_idx, q, scaling).unsqueeze(0), None


class PeerDecoder(TreeDecoder):
    """A ``TreeDecoder`` whose attention and KV cache are a peer's.

    Args:
        peer: The peer.
        source: A decoder that has just read its prompt; prompt, logits, K and V are taken over.
        options: See ``TreeDecoder``.
    """

    def __init__(self, peer: Peer, source: TreeDecoder, **options: Any) -> None:
        from palmette import Tree

        super().__init__(source.model, **options)
        register_peers()
        self.model.set_attn_implementation(ATTENTION_NAME)
        self.peer = peer
        (root,) = source.leaves
        record = source.node(root)
        (slots,) = self._allocate([([], len(record.slots))])
        self._tree = Tree([-1], [len(slots)], torch.tensor(slots))
        self._nodes = {root: Node(-1, 0, list(record.tokens), slots, num_prompt=record.num_prompt, logits=record.logits)}
        held = torch.tensor(record.slots)
        for index, layer in enumerate(source.cache.layers):
            peer.load(index, root, slots, layer.keys[held], layer.values[held])

    def _grow_cache(self, num_slots: int) -> None:
        pass  # the peer has its own

    @torch.inference_mode()
    def _forward(self, batch: TreeBatch) -> torch.Tensor:
        return peer_forward(self.model, self.peer, batch, self._nodes)

    def prune(self, node: int) -> list[int]:
        removed = super().prune(node)
        self.peer.pruned(removed)
        return removed

    def _compact(self, node: int, source: Sequence[int], target: Sequence[int]) -> None:
        self.peer.compact(node, source, target)


@torch.inference_mode()
def peer_forward(model: Any, peer: Peer, batch: TreeBatch, nodes: Mapping[int, Node]) -> torch.Tensor:
    """Logits [rows, vocab] of a forward with a peer's attention, which the model must be set to."""
    peer.prepare(batch, nodes)
    output = model(
        input_ids=batch.tokens[None],
        position_ids=batch.positions[None],
        use_cache=False,
        logits_to_keep=batch.keep,
        peer=peer,
    )
    logits: torch.Tensor = output.logits[0]
    return logits
