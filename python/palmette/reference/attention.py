# SPDX-License-Identifier: Apache-2.0
"""Attention under a visibility mask in plain PyTorch: what every plan and kernel has to equal."""

from __future__ import annotations

import torch
from torch import Tensor


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every query to the keys that ``visible`` shows it, in the dtype of its inputs.

    Args:
        q: [Nq, Hq, D].
        k: [N, Hk, D]; query head h reads KV head h // (Hq / Hk).
        v: [N, Hk, Dv]. A key that a query does not see contributes nothing to it, even if its value is NaN.
        visible: bool [Nq, N].
        scale: Default: D ** -0.5.
        softcap: 0 for none.
        sinks: [Hq], logits without a value.

    Returns:
        out [Nq, Hq, Dv] and lse [Nq, Hq], natural logarithm, sinks included; 0 and -inf where nothing is
        visible and there is no sink.
    """
    num_queries, num_heads, head_dim = q.shape
    groups = num_heads // k.shape[1]
    scale = head_dim**-0.5 if scale is None else scale
    grouped = q.unflatten(1, (k.shape[1], groups))
    logits = torch.einsum("qhgd,nhd->qhgn", grouped, k) * scale
    if softcap > 0:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~visible[:, None, None, :], -torch.inf)
    if sinks is not None:
        sink = sinks.unflatten(0, (k.shape[1], groups))[None, :, :, None].expand(num_queries, -1, -1, 1)
        logits = torch.cat([logits, sink.to(logits.dtype)], dim=-1)
    lse = torch.logsumexp(logits, dim=-1)
    # not exp(logits - lse): far from 0, lse cannot hold the logarithm of the sum beside the maximum
    weights = torch.where(lse[..., None] == -torch.inf, 0.0, torch.softmax(logits, dim=-1))[..., : k.shape[0]]
    if torch.isfinite(v).all():
        out = torch.einsum("qhgn,nhd->qhgd", weights, v)
    else:
        terms = weights[..., None] * v.transpose(0, 1)[None, :, None]
        out = torch.where(visible[:, None, None, :, None], terms, 0.0).sum(dim=3)
    return out.flatten(1, 2), lse.flatten(1, 2)
