# SPDX-License-Identifier: Apache-2.0
"""Other ways to decode a tree, with PyTorch alone, in the same decode loop: what the demo measures against.

Each keeps K and V as suits it best, contiguous and head-major, and folds the query heads of a KV head into
rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from ..records import Node, TreeBatch
from ..tree_decoding import TreeDecoder

ATTENTION_NAME = "palmette_peer"
State = tuple[torch.Tensor, torch.Tensor]


class Peer(Protocol):
    """Attention along a tree, with a KV cache of its own.

    A forward calls ``prepare`` once, then ``write`` and ``attend`` for every layer. K and V come as [tokens,
    Hk, D], queries and outputs as [tokens, Hq, D].
    """

    def load(
        self, layer: int, node: int, slots: Sequence[int], keys: torch.Tensor, values: torch.Tensor
    ) -> None:
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
    """bool [n, n]: whether token k is on the path to token q, q included; parents come before children."""
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
    rows: torch.Tensor = out[0].unflatten(1, (-1, num_queries))
    return rows.movedim(2, 0)


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
        self._nodes = {
            root: Node(-1, 0, list(record.tokens), slots, num_prompt=record.num_prompt, logits=record.logits)
        }
        held = torch.tensor(record.slots)
        for layer, (keys, values) in enumerate(source.cache.pools):
            peer.load(layer, root, slots, keys[held], values[held])

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
