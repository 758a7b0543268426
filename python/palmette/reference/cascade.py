# SPDX-License-Identifier: Apache-2.0
"""Reference of cascade attention: the levels' keys side by side under one mask; see ``palmette.cascade``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palmette.reference.attention import masked_attention

Level = tuple[Tensor, Tensor, Tensor, Tensor]


def varlen_mask(q_indptr: Tensor, kv_indptr: Tensor, *, causal: bool) -> Tensor:
    """Which keys the queries of packed sequences see, bool [Nq, Nk].

    Args:
        q_indptr, kv_indptr: [B + 1]; rows of sequence b begin at entry b and end at entry b + 1.
        causal: the last query of a sequence sees its last key, the one before it a key less, and so on.
    """
    visible = torch.zeros(int(q_indptr[-1]), int(kv_indptr[-1]), dtype=torch.bool)
    for b in range(len(q_indptr) - 1):
        q_begin, q_end = q_indptr[b : b + 2].tolist()
        begin, end = kv_indptr[b : b + 2].tolist()
        block = torch.ones(q_end - q_begin, end - begin, dtype=torch.bool)
        visible[q_begin:q_end, begin:end] = block.tril(block.shape[1] - block.shape[0]) if causal else block
    return visible


def cascade_attention(
    q: Tensor, levels: Sequence[Level], *, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """``palmette.cascade_attention`` as attention to the concatenated keys, in the dtype of its inputs.

    Args:
        q: [Nq, Hq, D].
        levels: [(k [Nk, Hk, D], v [Nk, Hk, Dv], q_indptr [B + 1], kv_indptr [B + 1]), ...], the last one
            causal.

    Returns:
        out [Nq, Hq, Dv] and lse [Nq, Hq].
    """
    heads = q.shape[1]
    keys = [k.repeat_interleave(heads // k.shape[1], dim=1) for k, _, _, _ in levels]
    values = [v.repeat_interleave(heads // v.shape[1], dim=1) for _, v, _, _ in levels]
    masks = [
        varlen_mask(q_indptr, kv_indptr, causal=i == len(levels) - 1)
        for i, (_, _, q_indptr, kv_indptr) in enumerate(levels)
    ]
    return masked_attention(q, torch.cat(keys), torch.cat(values), torch.cat(masks, dim=1), scale=scale)
