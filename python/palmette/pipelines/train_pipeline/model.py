# SPDX-License-Identifier: Apache-2.0
"""SmolLM2 in two stages, and the text that it is fine-tuned on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...integrations._extras import require
from ..models import packaged_checkpoint


class Stage(nn.Module):
    """The first or the second half of a Llama's layers, with the embedding or the head.

    The head of SmolLM2 is its embedding once more. Here the two are trained apart, since they live in
    different processes.

    Args:
        model: a Hugging Face ``LlamaForCausalLM``.
        index: 0 or 1.
        layers: of both stages together, the first and the last ones of the model; None: all.
    """

    def __init__(self, model: Any, index: int, layers: int | None) -> None:
        super().__init__()
        all_layers = list(model.model.layers)
        count = len(all_layers) if layers is None else layers
        if count % 2 or not 2 <= count <= len(all_layers):
            raise ValueError(f"layers must be even and in [2, {len(all_layers)}], got {layers}")
        half = count // 2
        self.layers = nn.ModuleList(all_layers[:half] if index == 0 else all_layers[-half:])
        self.rotary = model.model.rotary_emb
        self.embedding = model.model.embed_tokens if index == 0 else None
        self.norm = model.model.norm if index == 1 else None
        self.head = model.lm_head if index == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Tokens [B, T] to activations [B, T, C], or these to logits [B, T, vocab]."""
        hidden = x if self.embedding is None else self.embedding(x)
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        rotations = self.rotary(hidden, positions)
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=rotations)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if self.norm is None or self.head is None:
            return hidden
        logits: Tensor = self.head(self.norm(hidden))
        return logits


def load_stage(path: str | os.PathLike[str] | None, index: int, layers: int | None) -> tuple[Stage, int]:
    """A stage of the checkpoint (default: SmolLM2-135M-Instruct), in float32, and its number of channels."""
    transformers = require("transformers", "loading a model")
    directory = packaged_checkpoint() if path is None else Path(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
    )
    stage = Stage(model, index, layers)
    return stage.train(), int(model.config.hidden_size)


def next_token_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Mean nats per token of [B, T, vocab] for tokens [B, T + 1], of which the first is only seen."""
    return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def load_windows(path: str | os.PathLike[str] | None, context: int, count: int) -> Tensor:
    """``count`` windows of text, [count, context + 1] token ids, spread over Python's documentation topics.

    Raises:
        ValueError: there is less text than that.
    """
    transformers = require("transformers", "loading a tokenizer")
    directory = packaged_checkpoint() if path is None else Path(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True)
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    tokens = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    room = tokens.numel() // (context + 1)
    if count > room:
        raise ValueError(f"samples and held-out ones must be at most {room} of {context} tokens, got {count}")
    starts = torch.linspace(0, tokens.numel() - context - 1, count, dtype=torch.float64).long()
    return tokens[starts[:, None] + torch.arange(context + 1)]
