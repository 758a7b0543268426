# SPDX-License-Identifier: Apache-2.0
"""The sequences of a tree decoder: tokens, scores, and which slots of the KV pool hold them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .records import Completion, Node
from .sampling import logprobs_of
from .slots import SlotPool


class DecodedTree:
    """A forest of token sequences that share what they have in common: ``TreeDecoder`` without its model.

    Args:
        page_size: Slots per page of the KV pool; a page belongs to one node.
        max_slots: Tokens that the KV pool may hold (None: it grows as needed).
        max_length: Tokens that a sequence may have (None: any number).
        eos_token_ids: Tokens that end a sequence.
    """

    def __init__(
        self,
        *,
        page_size: int,
        max_slots: int | None,
        max_length: int | None,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.max_length = max_length
        self.eos_token_ids = eos_token_ids
        self._pool = SlotPool(page_size, 1024, max_slots)
        self._nodes: dict[int, Node] = {}
        self._tree: Any = None
        self._last: tuple[list[int], torch.Tensor] = (
            [],
            torch.empty(0),
        )  # leaves of the last step, their logits

    # ---- reading the tree

    @property
    def tree(self) -> Any:
        """The ``palmette.Tree`` of all tokens in the KV pool. Change it through the decoder only."""
        if self._tree is None:
            raise ValueError("prefill must come first, got a decoder without a prompt")
        return self._tree

    @property
    def leaves(self) -> list[int]:
        """Ids of all leaves, depth-first; none without a prompt, or when all were pruned."""
        if self._tree is None:
            return []
        leaves: list[int] = torch.as_tensor(self.tree.leaves).tolist()
        return leaves

    @property
    def active(self) -> list[int]:
        """Ids of the leaves that no end token has finished, depth-first."""
        return [node for node in self.leaves if not self._nodes[node].finished]

    def node(self, node: int) -> Node:
        """The record of a live node, for reading.

        Raises:
            ValueError: There is no such node, or it was pruned.
        """
        if node not in self._nodes:
            raise ValueError(f"node must be a live node of the tree, got {node}")
        return self._nodes[node]

    def path(self, node: int) -> list[int]:
        """Ids from the root to ``node``."""
        self.node(node)
        path = []
        while node >= 0:
            path.append(node)
            node = self._nodes[node].parent
        return path[::-1]

    def score(self, node: int) -> float:
        """Sum of the log-probabilities of the generated tokens on the path to ``node``."""
        return sum(self._nodes[n].score for n in self.path(node))

    def sequence(self, node: int, *, include_prompt: bool = False) -> Completion:
        """The tokens from the root to the end of ``node``, without the prompt unless asked for."""
        path = [self._nodes[n] for n in self.path(node)]
        tokens = [token for n in path for token in n.tokens[0 if include_prompt else n.num_prompt :]]
        return Completion(node, tokens, self.score(node), path[-1].finished)

    def sequences(self, *, include_prompt: bool = False) -> list[Completion]:
        """The sequences of all leaves, depth-first."""
        return [self.sequence(node, include_prompt=include_prompt) for node in self.leaves]

    def logits(self, nodes: Sequence[int]) -> torch.Tensor:
        """Logits [nodes, vocab] of the token that follows each node.

        Raises:
            ValueError: A node has none: it is finished or waits for its first token.
        """
        last_nodes, last = self._last
        if list(nodes) == last_nodes:
            return last
        rows = []
        for node in nodes:
            logits = self.node(node).logits
            if logits is None:
                raise ValueError(f"node must be one whose last token was decoded, got {node}")
            rows.append(logits)
        return torch.stack(rows)

    def likeliest(self, node: int, count: int) -> list[int]:
        """The ``count`` likeliest tokens after ``node``, best first."""
        tokens: list[int] = self.logits([node])[0].topk(count).indices.tolist()
        return tokens

    # ---- growing and cutting the tree

    def reset(self) -> None:
        """Forget every sequence; the KV pool keeps its memory."""
        for node in self._nodes.values():
            self._pool.release(node.slots)
        self._nodes.clear()
        self._tree = None
        self._last = ([], torch.empty(0))

    def fork(self, node: int, branches: int | Sequence[int]) -> list[int]:
        """Branch a node into children that share its path.

        Args:
            node: A node whose next token's logits are known: a leaf, or an inner node.
            branches: How many children; or the first token of each, decoded by the next step.

        Returns:
            The children's ids.

        Raises:
            ValueError: The node is finished, waits for its first token, or ``branches`` is empty.
        """
        parent = self.node(node)
        tokens = None if isinstance(branches, int) else [int(t) for t in branches]
        count = branches if isinstance(branches, int) else len(branches)
        if count < 1:
            raise ValueError(f"branches must be at least 1, got {count}")
        if parent.finished or parent.pending is not None or parent.logits is None:
            raise ValueError(f"node must be unfinished and decoded to its end to be forked, got {node}")
        children = [int(child) for child in self.tree.branch(node, count)]
        parent.logits = (
            parent.logits.clone()
        )  # a row of its own: a view would keep the whole step's logits alive
        logprobs = [0.0] * count
        if tokens is not None:
            logprobs = logprobs_of(parent.logits.expand(count, -1), torch.tensor(tokens)).tolist()
        for index, child in enumerate(children):
            self._nodes[child] = record = Node(node, parent.start + len(parent.tokens), logits=parent.logits)
            if tokens is not None:
                record.pending, record.logits = (tokens[index], logprobs[index]), None
        parent.children.extend(children)
        return children

    def prune(self, node: int) -> list[int]:
        """Remove a node, all below it, and every ancestor left without leaves; their slots are used again.

        Returns:
            Ids of the removed nodes.
        """
        top = self.path(node)
        while len(top) > 1 and len(self._nodes[top[-2]].children) == 1:
            top.pop()
        removed, stack = [], [top[-1]]
        while stack:
            removed.append(stack.pop())
            stack.extend(self._nodes[removed[-1]].children)
        self.tree.prune(node)
        if len(top) > 1:
            self._nodes[top[-2]].children.remove(top[-1])
        for gone in removed:
            self._pool.release(self._nodes.pop(gone).slots)
        return removed

    def force(self, tokens: Mapping[int, int]) -> None:
        """Give leaves their next token, as if it had been chosen: it counts in their scores.

        Raises:
            ValueError: A node is no leaf, is finished, or has a pending token.
        """
        for node, token in tokens.items():
            self._check_leaf(node)
            if self._nodes[node].pending is not None:
                raise ValueError(f"node must have no pending token, got {node}: call step() first")
            logprob = logprobs_of(self.logits([node]), torch.tensor([token]))
            self._nodes[node].pending = (token, float(logprob))

    # ---- for the decoder

    def _check_leaf(self, node: int) -> None:
        record = self.node(node)
        if record.children or record.finished:
            raise ValueError(
                f"node must be an unfinished leaf, got {node}, "
                f"which {'has children' if record.children else 'is finished'}"
            )

    def _is_at_end(self, node: int) -> bool:
        """Whether the node's pending token ends its sequence."""
        pending = self._nodes[node].pending
        return pending is not None and pending[0] in self.eos_token_ids

    def _reserve(self, counts: Mapping[int, int], ahead: int = 0) -> dict[int, list[int]]:
        """Slots for ``counts[node]`` more tokens of each node, of which the last ``ahead`` lie side by side.

        Raises:
            ValueError: A sequence would be longer than the model can take.
            RuntimeError: The pool is full. Nothing is reserved then.
        """
        for node, count in counts.items():
            record = self._nodes[node]
            self._check_length(record.start + len(record.tokens) + count - ahead)
        parts = self._allocate([(self._nodes[node].slots, count) for node, count in counts.items()])
        return dict(zip(counts, parts, strict=True))

    def _allocate(self, wanted: Sequence[tuple[Sequence[int], int]]) -> list[list[int]]:
        """Slots for (held slots, count) each, or for none of them; the KV pool grows with them."""
        slots = self._pool.allocate(wanted)
        self._grow_cache(self._pool.num_slots)
        return slots

    def _grow_cache(self, num_slots: int) -> None:
        """Make room for so many slots, wherever K and V are."""

    def _check_length(self, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"sequences must be at most {self.max_length} tokens (max_position_embeddings), got {length}"
            )

    def _take_pending(self, nodes: Sequence[int]) -> tuple[list[int], list[float]]:
        """Record the pending tokens of ``nodes``: their scores, and an end token, which ends its sequence."""
        tokens, logprobs = [], []
        for node in nodes:
            record = self._nodes[node]
            assert record.pending is not None  # choose() saw to it
            token, logprob = record.pending
            record.pending = None
            record.score += logprob
            if token in self.eos_token_ids:
                record.tokens.append(token)
                record.finished, record.logits = True, None
            tokens.append(token)
            logprobs.append(logprob)
        return tokens, logprobs

    def _append(self, tokens: Mapping[int, Sequence[int]], slots: Mapping[int, Sequence[int]]) -> None:
        """Make new tokens and their slots part of the tree."""
        self.tree.append(
            torch.tensor(list(tokens)),
            torch.tensor([len(given) for given in tokens.values()]),
            torch.tensor([slot for node in tokens for slot in slots[node]]),
        )
        for node, given in tokens.items():
            self._nodes[node].tokens.extend(given)
            self._nodes[node].slots.extend(slots[node])
