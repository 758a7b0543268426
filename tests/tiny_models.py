# SPDX-License-Identifier: Apache-2.0
"""Tiny random Hugging Face models for the tests of pipelines and integrations."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 97


def tiny_llama(
    *, seed: int = 0, attention: str = "sdpa", eos_token_id: int | None = None, **options: Any
) -> Any:
    """A Llama of two layers with 6 query and 2 KV heads; wide weights, so that logits are far apart."""
    config = transformers.LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.3,
            "bos_token_id": 0,
            "eos_token_id": eos_token_id,
            "pad_token_id": 0,
            **options,
        }
    )
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


def tiny_qwen(
    *, sliding_window: int | None = None, attention: str = "sdpa", attention_dropout: float = 0.0
) -> Any:
    """A Qwen3 of two layers; with ``sliding_window``, the second one slides."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        use_sliding_window=sliding_window is not None,
        sliding_window=sliding_window,
        max_window_layers=1,
        bos_token_id=0,
        eos_token_id=None,
        attention_dropout=attention_dropout,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(config).eval()
    model.set_attn_implementation(attention)
    return model


def random_tokens(count: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCAB, (count,), generator=generator).tolist()


@torch.no_grad()
def logits_after(model: Any, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), vocab] by a plain forward."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]


@torch.no_grad()
def greedy(model: Any, tokens: list[int], count: int) -> list[int]:
    """What Hugging Face's own generate appends."""
    if not count:
        return []
    ids = torch.tensor([tokens])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    return out[0, len(tokens) :].tolist()


def score(model: Any, prompt: list[int], tokens: list[int]) -> float:
    """Log-probability of ``tokens`` after ``prompt`` by a plain forward."""
    logits = logits_after(model, prompt + tokens)[len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None]).sum())
