# SPDX-License-Identifier: Apache-2.0
"""What sparse attention is measured against, each at its best setting.

What a peer can prepare is prepared outside the timing: head-major contiguous inputs, expanded K and V, folded
heads, plans.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.peers import Contender
from bench.sparse_cases import BLOCK, TOPK, Inputs, SparseCase, make_inputs

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fastest(contenders: Sequence[Contender], calls: int = 2) -> tuple[Contender, dict[str, float]]:
    """The contender with the least time of some calls, and the times of all in ms."""
    times = {c.name: float("inf") for c in contenders}
    for _ in range(calls):
        for contender in contenders:
            start = time.perf_counter()
            contender.run()
            times[contender.name] = min(times[contender.name], (time.perf_counter() - start) * 1e3)
    return min(contenders, key=lambda c: times[c.name]), times


# ----------------------------------------------------------------------------------------- query-outer order


def query_outer(case: SparseCase, inputs: Inputs, index: Tensor) -> list[Contender]:
    """NSA's order in our own kernel: each query, with its group's heads as rows, walks its own blocks.

    The plan has a task with one item per (KV head, query), and a query's blocks are the segments of its item:
    its rows are packed once, and the softmax runs on over all of its blocks. Planning is not timed: NSA's
    kernel reads block_index as it is. (``plan_selection`` with tiles of one query would make an item per
    block, pack and merge for each, and take 1.1 to 1.7 times as long.)

    With K and V as they lie token-major, and head-major, where a block is one contiguous piece.
    """
    from palmette._attend import attend

    plan = query_outer_plan(index, case.tokens)
    q, k, v, _ = inputs
    token_major = (k, v)
    head_major = tuple(x.transpose(0, 1).contiguous().transpose(0, 1) for x in (k, v))
    layouts = {"token-major": token_major, "head-major": head_major}
    return [
        Contender(
            f"query-outer, {layout}", lambda pair=pair: attend(q, *pair, plan), lambda result: result[0]
        )
        for layout, pair in layouts.items()
    ]


def query_outer_plan(index: Tensor, tokens: int) -> Any:
    """See ``query_outer``; docs/design.md, "A plan", has the tables."""
    from palmette._attend import plan_tensors

    heads, queries, slots = index.shape
    chosen = index.reshape(-1, slots) >= 0
    ends = chosen.sum(1).cumsum(0)
    begin = index.reshape(-1, slots)[chosen].long() * BLOCK
    number = torch.arange(heads * queries)
    query = torch.arange(queries).repeat(heads)
    every = torch.ones_like(begin)
    segment = [begin, (tokens - begin).clamp(max=BLOCK), begin, every, every * tokens, begin]
    item = [ends - chosen.sum(1), ends, query, query + 1]
    head = torch.arange(heads).repeat_interleave(queries)
    task = [number, number + 1, query, query + 1, torch.full_like(number, -1), head]
    position = torch.arange(queries)
    counts = torch.zeros(16, dtype=torch.int32)
    counts[:4] = torch.tensor([queries, len(begin), len(number), len(number)])
    counts[5], counts[7], counts[8] = (
        1,
        slots * BLOCK,
        tokens,
    )  # most queries of a task, keys of an item; slots
    tables = (
        torch.arange(tokens),
        torch.stack([position, position, position, torch.zeros_like(position)]),
        torch.stack(segment, 1),
        torch.stack(item, 1),
        torch.stack(task, 1),
        torch.zeros(queries + 1),
        torch.zeros(0),
        counts,
    )
    return plan_tensors([table.int().contiguous() for table in tables])


# --------------------------------------------------------------------------------------------- dense, causal


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(0, 1).contiguous()[None]


def dense_causal(case: SparseCase, inputs: Inputs) -> Contender:
    """Causal SDPA, with enable_gqa or K and V expanded: whichever is faster (tried on 4k tokens)."""
    return _dense(case, inputs, expanded=_expanding_pays(case.num_q_heads, case.num_kv_heads, case.head_dim))


def _dense(case: SparseCase, inputs: Inputs, *, expanded: bool) -> Contender:
    q, k, v = (_heads_first(x) for x in inputs[:3])
    if expanded:
        k, v = (x.repeat_interleave(case.group_size, 1) for x in (k, v))
    gqa = k.shape[1] < q.shape[1]
    name = "dense SDPA, expanded" if expanded and case.group_size > 1 else "dense SDPA"
    return Contender(
        name,
        lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa),
        lambda out: out[0].transpose(0, 1),
    )


@cache
def _expanding_pays(num_q_heads: int, num_kv_heads: int, head_dim: int) -> bool:
    if num_q_heads == num_kv_heads:
        return False
    case = SparseCase("forward", 4096, num_q_heads, num_kv_heads, head_dim)
    inputs = make_inputs(case)
    both = [_dense(case, inputs, expanded=expanded) for expanded in (False, True)]
    return fastest(both)[0] is both[1]


def dense_training(case: SparseCase, inputs: Inputs, dout: Tensor, *, expanded: bool) -> Contender:
    """Forward and backward; expanding K and V is timed here, for their gradients have to be added up."""
    leaves = tuple(_heads_first(x).requires_grad_() for x in inputs[:3])
    grad = _heads_first(dout)

    def run() -> tuple[Tensor, ...]:
        q, k, v = leaves
        if expanded:
            k, v = (x.repeat_interleave(case.group_size, 1) for x in (k, v))
        gqa = k.shape[1] < q.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return torch.autograd.grad(out, leaves, grad)

    def read(gradients: tuple[Tensor, ...]) -> Any:
        return tuple(g[0].transpose(0, 1) for g in gradients)

    name = "dense SDPA, expanded" if expanded and case.group_size > 1 else "dense SDPA"
    return Contender(name, run, read)


# --------------------------------------------------------------------------------------------- dense, a step


def dense_decode(case: SparseCase, q: Tensor, k: Tensor, v: Tensor) -> list[Contender]:
    """A query per sequence: q [B, Hq, D], k and v [B, Hk, N, D], GQA's heads as rows of their KV head."""
    rows = q.unflatten(1, (case.num_kv_heads, case.group_size))

    def by_hand() -> Tensor:
        scores = torch.matmul(rows * case.head_dim**-0.5, k.transpose(2, 3))
        return torch.matmul(scores.softmax(-1), v)

    found = [
        Contender(
            "dense SDPA", lambda: F.scaled_dot_product_attention(rows, k, v), lambda out: out.flatten(1, 2)
        ),
        Contender("dense flash", lambda: _flash(rows, k, v)[0], lambda out: out.flatten(1, 2)),
    ]
    if case.torch_dtype == torch.float32:  # a bf16 product takes seconds on some machines
        found.append(Contender("dense matmul + softmax", by_hand, lambda out: out.flatten(1, 2)))
    return found


# --------------------------------------------------------------------------- native-sparse-attention-pytorch


def public_module(hidden: int, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """``SparseAttention`` of native-sparse-attention-pytorch with NSA's sizes, and a linear map as phi.

    It adds a query's own block to those that it selects, and knows no others that are always chosen.

    Raises:
        ImportError: It is not installed.
    """
    from native_sparse_attention_pytorch import SparseAttention

    return SparseAttention(
        dim=hidden,
        dim_head=head_dim,
        heads=num_q_heads,
        kv_heads=num_kv_heads,
        sliding_window_size=512,
        compress_block_size=32,
        compress_block_sliding_stride=16,
        selection_block_size=BLOCK,
        num_selected_blocks=TOPK - 1,
        causal=True,
        # its default, two layers of which the hidden one is as wide as a block, would be more work than ours
        compress_mlp=nn.Sequential(nn.Flatten(-2), nn.Linear(32 * head_dim, head_dim)),
    )
