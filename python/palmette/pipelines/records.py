# SPDX-License-Identifier: Apache-2.0
"""What a tree decoder takes, keeps and gives back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class Completion:
    """One path of the tree, from below the prompt to a leaf.

    Attributes:
        node: The leaf at its end.
        tokens: Its tokens below the prompt (with the prompt, where asked for), an end token included.
        score: Sum of the log-probabilities of the generated tokens.
        finished: Whether it ended with an end token.
    """

    node: int
    tokens: list[int]
    score: float
    finished: bool


@dataclass(frozen=True)
class Step:
    """What one ``TreeDecoder.step`` chose.

    Attributes:
        nodes: The leaves that were decoded, depth-first.
        tokens: Each leaf's new token.
        logprobs: Its log-probability under the model (temperature 1).
    """

    nodes: list[int]
    tokens: list[int]
    logprobs: list[float]


@dataclass(frozen=True)
class Verified:
    """One leaf's outcome of ``TreeDecoder.verify_step``.

    Attributes:
        node: The leaf.
        tokens: Tokens that were committed: the pending one, then the accepted drafts.
        num_accepted: How many drafts were accepted.
    """

    node: int
    tokens: list[int]
    num_accepted: int


@dataclass
class Node:
    """What the decoder knows of a node of its tree."""

    parent: int
    start: int  # tokens above it on its path
    tokens: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    children: list[int] = field(default_factory=list)
    score: float = 0.0  # of its own tokens
    num_prompt: int = 0  # its first tokens, that are the prompt
    finished: bool = False
    logits: torch.Tensor | None = None  # [vocab] after its last token
    pending: tuple[int, float] | None = None  # next token and its log-probability, chosen but not decoded


@dataclass(frozen=True)
class TreeBatch:
    """The tokens of one forward.

    Attributes:
        tree: The ``palmette.Tree`` that they attend along.
        queries: Which of its tokens they are, as ``palmette.plan_tree_attention`` takes it.
        nodes: The decoder's node of every token; for drafts the leaf that they continue.
        draft_parents: For drafts, the batch index of each token's parent, -1 below the leaf; else None.
        tokens, positions, slots: int64 [n].
        keep: int64 [rows], tokens whose logits are wanted.
    """

    tree: Any
    queries: str | tuple[torch.Tensor, torch.Tensor]
    nodes: list[int]
    draft_parents: list[int] | None
    tokens: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    keep: torch.Tensor
