# SPDX-License-Identifier: Apache-2.0
"""What the demo decodes: sizes, prompts, and a tree of thoughts."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Any

import torch

from ...integrations._extras import require
from ..search import ThoughtNode

# Of DeFT's recorded set-intersection runs: lengths of thoughts are log-normal, about a median that each
# expansion has of its own; how often the expanded thought was the shortest, ..., the longest of its ten.
LOG_LENGTH, LOG_LENGTH_BETWEEN, LOG_LENGTH_WITHIN = 4.13, 0.6, 0.45
EXPANDED_RANK_WEIGHTS = (3, 5, 5, 12, 18, 47, 58, 88, 267, 297)


@dataclass(frozen=True)
class Sizes:
    """How much the demo decodes."""

    prompt: int = 2048
    branches: int = 32
    tokens: int = 64
    thought_prompt: int = 1024
    thoughts: int = 10  # per branching
    levels: int = 4
    thought_scale: float = 0.25
    draft_nodes: int = 63
    draft_tokens: int = 96
    samples: int = 6
    repeats: int = 15


QUICK = Sizes(
    prompt=48,
    branches=4,
    tokens=6,
    thought_prompt=24,
    thoughts=3,
    levels=2,
    thought_scale=0.1,
    draft_nodes=8,
    draft_tokens=12,
    samples=1,
    repeats=2,
)


def recorded_like_schedule(
    levels: int, branching: int, scale: float, generator: random.Random
) -> list[ThoughtNode]:
    """A tree of thoughts like DeFT's recorded set-intersection runs (arXiv 2404.00242, section 4.1).

    There, every expansion makes 10 thoughts; one of them, mostly among the longest, is expanded in turn while
    the others run out. Lengths have a median of 63 and deciles of 18 and 171; about 7 are alive at a time.

    Args:
        levels: Expansions on the way down (the recorded trees have 9).
        branching: Thoughts per expansion.
        scale: Factor on all lengths.
        generator: Source of the draws.

    Returns:
        A schedule for ``tree_of_thought``.
    """
    ends, children = [0], [[*range(1, branching + 1)]]
    parent_end = 0
    for level in range(levels):
        first = len(ends)
        centre = generator.gauss(LOG_LENGTH, LOG_LENGTH_BETWEEN)
        lengths = [
            max(1, round(scale * math.exp(generator.gauss(centre, LOG_LENGTH_WITHIN))))
            for _ in range(branching)
        ]
        ends.extend(parent_end + n for n in lengths)
        children.extend([] for _ in lengths)
        if level + 1 < levels:
            weights = [EXPANDED_RANK_WEIGHTS[rank * 10 // branching] for rank in range(branching)]
            rank = generator.choices(range(branching), weights)[0]
            expanded = first + sorted(range(branching), key=lengths.__getitem__)[rank]
            children[expanded] = [*range(len(ends), len(ends) + branching)]
            parent_end = ends[expanded]
    return [ThoughtNode(end, below) for end, below in zip(ends, children, strict=True)]


def text_tokens(tokenizer: Any, count: int) -> list[int]:
    """Tokens of English prose from the standard library: Python's documentation topics."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokens: list[int] = []
    characters = 8 * count
    while len(tokens) < count:
        if characters > 2 * len(text):
            raise ValueError(f"the prompt must be at most {len(tokens)} tokens, got {count}")
        tokens = list(tokenizer(text[:characters])["input_ids"])
        characters *= 2
    return tokens[:count]


def tiny_model(seed: int) -> tuple[Any, list[int]]:
    """A random Llama of two layers and bytes of prose as its tokens: what ``--quick`` runs on."""
    transformers = require("transformers", "palmette demo")
    from pydoc_data.topics import topics

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval(), list("".join(topics.values())[:4096].encode())
