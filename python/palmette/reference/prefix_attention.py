# SPDX-License-Identifier: Apache-2.0
"""Reference of attention behind a shared prefix; see ``palmette.prefix_attention``."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor


def prefix_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """``palmette.prefix_attention`` in float64: every suffix with a prefix of its own in front of it.

    Returns:
        out [T, Hq, Dv] and lse [T, Hq], float64. Differentiable.
    """
    q, k_prefix, v_prefix, k, v = (x.double() for x in (q, k_prefix, v_prefix, k, v))
    scale = q.shape[2] ** -0.5 if scale is None else scale
    group = q.shape[1] // k.shape[1]
    prefix_len = k_prefix.shape[0]
    outs, lses = [q.new_zeros((0, q.shape[1], v.shape[2]))], [q.new_zeros((0, q.shape[1]))]
    for begin, end in itertools.pairwise(cu_seqlens.tolist()):
        keys = torch.cat([k_prefix, k[begin:end]]).repeat_interleave(group, 1)
        values = torch.cat([v_prefix, v[begin:end]]).repeat_interleave(group, 1)
        logits = torch.einsum("qhd,khd->hqk", q[begin:end], keys) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        sees = torch.ones(end - begin, keys.shape[0], dtype=torch.bool).tril(prefix_len)
        if window is not None:
            sees &= ~torch.ones_like(sees).tril(prefix_len - window)
        logits = logits.masked_fill(~sees.to(q.device), -math.inf)
        outs.append(torch.einsum("hqk,khd->qhd", logits.softmax(-1), values))
        lses.append(logits.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)
