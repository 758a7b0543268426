# SPDX-License-Identifier: Apache-2.0
"""Language modelling on the corpus, and generation with the sparse cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...nn import SparseKVCache
from .data import Corpus, as_text
from .model import LanguageModel

# A logit's rounding may differ between a step and a whole forward; choices closer than this are ties.
NEAR_TIE = 1e-3


class DisagreementError(AssertionError):
    """Decoding with the cache chose another token than recomputation."""


@dataclass
class TextTask:
    """Next-byte prediction, in nats per token.

    Attributes:
        corpus: The text.
        batch, context: Sequences of a step, and their tokens.
        windows: Held-out windows of ``evaluate``.
        seed: Of the places that batches are taken from.
    """

    corpus: Corpus
    batch: int
    context: int
    windows: int
    seed: int

    def loss(self, model: LanguageModel, step: int) -> tuple[Tensor, int]:
        """Mean loss of one step's batch, and its tokens."""
        tokens = self.corpus.batch(step, self.batch, self.context, self.seed)
        return self._nats(model, tokens), self.batch * self.context

    @torch.no_grad()
    def evaluate(self, model: LanguageModel) -> float:
        """Mean loss on held-out windows."""
        windows = self.corpus.held_out_windows(self.windows, self.context)
        parts = [self._nats(model, some) * len(some) for some in windows.split(self.batch)]
        return math.fsum(part.item() for part in parts) / self.windows

    def _nats(self, model: LanguageModel, tokens: Tensor) -> Tensor:
        logits = model(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: Tensor,
    count: int,
    recomputed: int,
    tick: Callable[[int, str], None],
) -> dict[str, Any]:
    """Greedy decoding with one ``SparseKVCache`` per layer, checked against recomputation without caches.

    A forward over the prompt and all that was generated must choose each of its tokens again; that is what
    greedy decoding by recomputation would have chosen, since equal tokens have led there. Some steps are
    recomputed one by one, for their time.

    Args:
        model: Of the kind ``"nsa"``.
        prompt: int64 [N].
        count: Tokens to generate.
        recomputed: So many of them also one by one without caches.
        tick: Called as ``tick(1, note)`` after every step of both.

    Returns:
        Numbers and the text, for JSON.

    Raises:
        DisagreementError: they chose different tokens, and not for a near tie.

    Source: NSA (arXiv 2502.11089), section 3, one query at a time.
    """
    length = prompt.numel()
    caches = [SparseKVCache(max_length=length + count) for _ in model.blocks]
    begin = time.perf_counter()
    logits = model(prompt[None], caches)[0, -1]
    prefill_seconds = time.perf_counter() - begin
    chosen: list[int] = []
    begin = time.perf_counter()
    for _ in range(count):
        chosen.append(int(logits.argmax()))
        logits = model(torch.tensor([[chosen[-1]]]), caches)[0, -1]
        tick(1, "with the cache")
    cached_rate = count / (time.perf_counter() - begin)

    everything = torch.cat([prompt, torch.tensor(chosen)])
    again = model(everything[None, :-1])[0, length - 1 :]
    best = again.max(-1).values
    margins = best - again.gather(1, torch.tensor(chosen)[:, None]).squeeze(1)  # 0 where both agree
    different = (again.argmax(-1) != torch.tensor(chosen)).nonzero().flatten().tolist()
    wrong = (margins > NEAR_TIE).nonzero().flatten().tolist()
    if wrong:
        raise DisagreementError(
            f"decoding with the cache must choose what recomputation does, got another token at step "
            f"{wrong[0]}, whose logit is {float(margins[wrong[0]]):.2g} lower"
        )
    begin = time.perf_counter()
    for step in range(recomputed):
        token = int(model(everything[None, : length + step])[0, -1].argmax())
        if token != chosen[step] and float(margins[step]) > NEAR_TIE:
            raise DisagreementError(f"recomputation of step {step} must choose {chosen[step]}, got {token}")
        tick(1, "recomputed")
    recomputed_rate = recomputed / (time.perf_counter() - begin)
    plain = 2 * (length + count) * model.sizes.layers * model.sizes.num_kv_heads * model.sizes.head_dim
    return {
        "prompt_tokens": length,
        "generated_tokens": count,
        "identical_tokens": count - len(different),
        "near_ties": len(different),
        "recomputed_steps": recomputed,
        "prefill_seconds": prefill_seconds,
        "tokens_per_second": cached_rate,
        "tokens_per_second_recomputed": recomputed_rate,
        "cache_bytes": sum(cache.nbytes for cache in caches),
        "plain_kv_bytes": plain * 4,
        "keys_read": model.keys_read(length + count),
        "prompt_end": as_text(prompt[-300:]),
        "text": as_text(torch.tensor(chosen)),
    }
