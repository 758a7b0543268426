# SPDX-License-Identifier: Apache-2.0
"""From logits to tokens."""

from __future__ import annotations

import torch


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raise ValueError where a sampling option is out of range."""
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or positive, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be None or positive, got {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be None or in (0, 1], got {top_p}")


def probabilities(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> torch.Tensor:
    """The distribution to sample from.

    Args:
        logits: [rows, vocab].
        temperature: Divides the logits; positive.
        top_k: Keep the ``top_k`` likeliest tokens (default: all).
        top_p: Keep the fewest likeliest tokens whose probabilities sum to at least ``top_p`` (default: all).

    Returns:
        float32 [rows, vocab], each row sums to 1.
    """
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        last = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < last, float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        dropped = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(dropped, float("-inf"))
    return logits.softmax(-1)


def choose_tokens(
    logits: torch.Tensor,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """One token per row: the likeliest with ``temperature`` 0 (ties to the lowest index), else a draw.

    Args:
        logits: [rows, vocab].
        temperature, top_k, top_p: See ``probabilities``.
        generator: Source of the draws (default: PyTorch's global one).

    Returns:
        int64 [rows].
    """
    if temperature == 0:
        return logits.argmax(-1)
    drawn = torch.multinomial(probabilities(logits, temperature, top_k, top_p), 1, generator=generator)
    return drawn[:, 0]


def logprobs_of(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probability float32 [rows] of ``tokens`` [rows] under ``logits`` [rows, vocab]."""
    logits = logits.float()
    return logits.gather(-1, tokens[:, None])[:, 0] - logits.logsumexp(-1)
