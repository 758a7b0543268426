# SPDX-License-Identifier: Apache-2.0
"""NSA's three branches (arXiv 2502.11089) in plain PyTorch, for one sequence: what the kernels have to equal.

A sequence of N tokens has queries for its last Nq; query i stands at token N - Nq + i.
"""

from __future__ import annotations

import torch
from torch import Tensor

from palmette.reference.attention import masked_attention


def num_compressed(num_tokens: int, kernel_size: int, kernel_stride: int) -> int:
    """Compressed keys of a sequence: windows of ``kernel_size`` tokens, ``kernel_stride`` apart."""
    return 0 if num_tokens < kernel_size else (num_tokens - kernel_size) // kernel_stride + 1


def compress(
    x: Tensor, weight: Tensor | None, position: Tensor | None, *, kernel_size: int, kernel_stride: int
) -> Tensor:
    """``y[i] = phi(x[i * stride : i * stride + size])`` of a sequence (equation 7).

    Args:
        x: [N, Hk, D].
        weight: None for the mean; [Hk, size] for a weighted sum; [Hk, size * D, D'] for a linear map, whose
            rows belong to the first token's channels first.
        position: [Hk, size, D], is added to every window before a linear map. None: nothing is.

    Returns:
        [C, Hk, D] or [C, Hk, D'].
    """
    rows = []
    for i in range(num_compressed(x.shape[0], kernel_size, kernel_stride)):
        window = x[i * kernel_stride : i * kernel_stride + kernel_size].transpose(0, 1)  # [Hk, size, D]
        if position is not None:
            window = window + position
        if weight is None:
            rows.append(window.mean(1))
        elif weight.dim() == 2:
            rows.append((weight[:, :, None] * window).sum(1))
        else:
            rows.append(torch.einsum("hc,hcd->hd", window.flatten(1), weight))
    if rows:
        return torch.stack(rows)
    width = x.shape[2] if weight is None or weight.dim() == 2 else weight.shape[2]
    return x.new_zeros(0, x.shape[1], width)


def sees_compressed(
    num_queries: int, num_tokens: int, num_keys: int, *, kernel_size: int, kernel_stride: int
) -> Tensor:
    """bool [Nq, C]: compressed key i is seen where its last token is (section 3.3.1)."""
    at = torch.arange(num_tokens - num_queries, num_tokens)
    last = torch.arange(num_keys) * kernel_stride + kernel_size - 1
    return last[None, :] <= at[:, None]


def block_scores(
    q: Tensor,
    k_cmp: Tensor,
    num_tokens: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    scale: float | None = None,
) -> Tensor:
    """How much of the compressed attention each block of keys gets (equations 9 and 10), [Hk, Nq, blocks].

    Compressed probabilities count for the block as often as their windows, cut into strides, overlap it, and
    are summed over the heads of a group.
    """
    num_queries, heads = q.shape[:2]
    num_keys, kv_heads = k_cmp.shape[:2]
    scale = q.shape[2] ** -0.5 if scale is None else scale
    seen = sees_compressed(
        num_queries, num_tokens, num_keys, kernel_size=kernel_size, kernel_stride=kernel_stride
    )
    logits = torch.einsum("qhgd,nhd->hgqn", q.unflatten(1, (kv_heads, heads // kv_heads)), k_cmp) * scale
    logits = logits.masked_fill(~seen, -torch.inf)
    p = torch.softmax(logits, -1).nan_to_num(0.0).sum(1)  # [Hk, Nq, C]
    blocks = -(-num_tokens // block_size)
    scores = p.new_zeros(kv_heads, num_queries, blocks)
    for j in range(blocks):
        for m in range(block_size // kernel_stride):
            for n in range(kernel_size // kernel_stride):
                i = j * (block_size // kernel_stride) + m - n
                if 0 <= i < num_keys:
                    scores[:, :, j] += p[:, :, i]
    return scores


def select_blocks(
    scores: Tensor,
    num_tokens: int,
    *,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
) -> Tensor:
    """The blocks of each query (section 3.3.2): int32 [Hk, Nq, topk], ascending, -1 on the right.

    The first ``init_blocks`` and the last ``local_blocks`` up to the query's own are always among them; then
    come the best scores, of equal ones the lower block.
    """
    kv_heads, num_queries, _ = scores.shape
    result = torch.full((kv_heads, num_queries, topk), -1, dtype=torch.int32)
    for h in range(kv_heads):
        for i in range(num_queries):
            own = (num_tokens - num_queries + i) // block_size
            row = scores[h, i, : own + 1].tolist()
            forced = {j for j in range(own + 1) if j < init_blocks or j > own - local_blocks}
            others = sorted((j for j in range(own + 1) if j not in forced), key=lambda j: (-row[j], j))
            chosen = sorted([*forced, *others[: topk - len(forced)]])
            result[h, i, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
    return result


def sees_selected(block_index: Tensor, num_tokens: int, *, block_size: int) -> Tensor:
    """bool [Hk, Nq, N]: the keys of a query's blocks, up to its own token."""
    kv_heads, num_queries, _ = block_index.shape
    blocks = -(-num_tokens // block_size)
    chosen = torch.zeros(kv_heads, num_queries, blocks + 1, dtype=torch.bool)
    chosen.scatter_(2, torch.where(block_index < 0, blocks, block_index).long(), True)
    keys = torch.arange(num_tokens)
    at = torch.arange(num_tokens - num_queries, num_tokens)
    return chosen[:, :, keys // block_size] & (keys[None, :] <= at[:, None])


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the keys of the blocks that each query has chosen: out [Nq, Hq, Dv], lse [Nq, Hq]."""
    group = q.shape[1] // k.shape[1]
    seen = sees_selected(block_index, k.shape[0], block_size=block_size)
    parts = [
        masked_attention(
            q[:, h * group : (h + 1) * group], k[:, h : h + 1], v[:, h : h + 1], seen[h], scale=scale
        )
        for h in range(k.shape[1])
    ]
    return torch.cat([out for out, _ in parts], 1), torch.cat([lse for _, lse in parts], 1)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    num_tokens: int,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to the compressed keys whose last token a query sees: out [Nq, Hq, Dv], lse [Nq, Hq]."""
    seen = sees_compressed(
        q.shape[0], num_tokens, k_cmp.shape[0], kernel_size=kernel_size, kernel_stride=kernel_stride
    )
    return masked_attention(q, k_cmp, v_cmp, seen, scale=scale)


def sliding_window_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Attention to the last ``window`` keys, the query's own included: out [Nq, Hq, Dv], lse [Nq, Hq]."""
    at = torch.arange(k.shape[0] - q.shape[0], k.shape[0])[:, None]
    keys = torch.arange(k.shape[0])[None, :]
    return masked_attention(q, k, v, (keys <= at) & (keys > at - window), scale=scale)
