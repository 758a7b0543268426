# SPDX-License-Identifier: Apache-2.0
"""Reference of the merge of attention states; see ``palmette.cascade``."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def merge_states(
    outs: Tensor, lses: Tensor, indptr: Tensor | None = None, *, lse_base: str = "e"
) -> tuple[Tensor, Tensor]:
    """``palmette.merge_states`` in float64, by definition: weights are a softmax over the states' LSE.

    Args:
        outs: [N, S, H, Dv], or [nnz, H, Dv] with indptr [N + 1]. Any dtype; computed in float64.
        lses: [N, S, H] or [nnz, H]; -inf marks an empty state.

    Returns:
        out [N, H, Dv] and lse [N, H], both float64. Differentiable.
    """
    if indptr is not None:
        rows = [
            merge_states(outs[None, begin:end], lses[None, begin:end], lse_base=lse_base)
            for begin, end in zip(indptr[:-1].tolist(), indptr[1:].tolist(), strict=True)
        ]
        if not rows:
            return outs.new_zeros((0, *outs.shape[1:])).double(), lses.new_zeros((0, lses.shape[1])).double()
        return torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])

    log_base = math.log(2.0) if lse_base == "2" else 1.0
    natural = lses.double() * log_base
    empty = natural == -math.inf
    bad = (natural.isnan() | (natural == math.inf)).any(1)
    nothing = empty.all(1)  # [N, H]; also where there are no states at all

    # Empty states leave the sums: their out is replaced, not multiplied by zero, and -inf never meets -inf.
    values = torch.where(empty[..., None], 0.0, outs.double())
    finite = torch.where(empty | bad[:, None], 0.0, natural)
    if outs.shape[1]:
        top = torch.where(empty, -math.inf, finite).amax(1, keepdim=True).clamp_min(-1e300).detach()
    else:
        top = natural.new_zeros((natural.shape[0], 1, natural.shape[2]))
    weights = torch.where(empty, 0.0, torch.exp(finite - top))  # [N, S, H]
    total = weights.sum(1)
    safe = torch.where(nothing, 1.0, total)
    out = (weights[..., None] * values).sum(1) / safe[..., None]
    lse = (top.squeeze(1) + torch.log(safe)) / log_base

    lse = torch.where(nothing, -math.inf, lse)
    lse = torch.where(bad, math.nan, lse)
    out = torch.where(bad[..., None], math.nan, out)
    return out, lse


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, lse_base: str = "e"
) -> tuple[Tensor, Tensor]:
    """``palmette.merge_state`` in float64; shapes as there."""
    return merge_states(torch.stack((out_a, out_b), 1), torch.stack((lse_a, lse_b), 1), lse_base=lse_base)
