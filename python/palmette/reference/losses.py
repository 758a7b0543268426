# SPDX-License-Identifier: Apache-2.0
"""Reference of losses over a vocabulary; see ``palmette.losses``."""

from __future__ import annotations

import torch
from torch import Tensor


def token_logprobs(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """``palmette.token_logprobs`` in float64, by definition.

    Args:
        hidden: [T, hidden], weight: [vocab, hidden], targets: [T].

    Returns:
        Log-probabilities of the targets and entropies, both [T], float64. Differentiable.
    """
    return gather_logprobs(hidden.double() @ weight.double().T, targets, temperature=temperature)


def gather_logprobs(logits: Tensor, targets: Tensor, *, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """The same from logits [T, vocab]; a token of logit -inf has probability 0 and no part in the entropy."""
    logprobs = torch.log_softmax(logits.double() / temperature, -1)
    finite = torch.where(logprobs.isneginf(), 0.0, logprobs)
    entropies = -(logprobs.exp() * finite).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0], entropies
