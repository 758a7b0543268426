# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention (NSA, arXiv 2502.11089) and its parts: compressed, selected and windowed attention.

Sequences are packed one behind the other: ``cu_seqlens`` [B + 1], int32 or int64, says where each one's rows
of q begin and where the last one ends. Where the queries are the last ones of longer sequences (decoding,
prefill in chunks), ``cu_seqlens_k`` says the same of k. All functions also run on the GPU kernels' emulator.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from palmette import _library
from palmette._attend import MAX_SCALE, attend, check_inputs, plan_tensors, state_dtype
from palmette._checks import (
    FLOATING,
    check_at_least,
    check_device,
    check_dim,
    check_dtype,
    check_indptr,
    check_number,
    check_shape,
)
from palmette._selection import ROWS_PER_BLOCK, TILE_BYTES, plan_by_blocks, plan_by_tiles
from palmette._varlen import (
    key_starts,
    packed_ends,
    plan_sequences,
    sequence_lengths,
    sequence_starts,
    sequences,
)

_ops = torch.ops.palmette

# On a CPU: K and V are laid out head by head first where every key is read so often at least.
_READS_OF_A_COPY = 8


def compress(
    x: Tensor,
    weight: Tensor | None,
    position: Tensor | None,
    cu_seqlens: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
) -> tuple[Tensor, Tensor]:
    """Keys or values of overlapping blocks of tokens: ``y[i] = phi(x[i * stride : i * stride + size])``.

    A sequence of N tokens gives ``(N - kernel_size) // kernel_stride + 1`` of them, none where
    N < kernel_size.

    Args:
        x: [T, Hk, D], any floating dtype.
        weight: phi: None for the mean; [Hk, kernel_size] for a weighted sum; [Hk, kernel_size * D, D'] for a
            linear map, whose rows belong to the first token's channels first.
        position: [Hk, kernel_size, D], is added to the tokens of every block; None for nothing.
        cu_seqlens: [B + 1], from 0 to T.
        kernel_size: tokens of a block.
        kernel_stride: tokens from the begin of a block to that of the next.

    Returns:
        y [C, Hk, D] (D' for a linear map) in the dtype of x, and cu_seqlens_cmp [B + 1], int32, on the CPU:
        where each sequence's blocks begin in y. Differentiable in x, weight and position, and deterministic.

    Raises:
        ValueError: shapes or dtypes do not fit each other, or cu_seqlens is not as described.

    Source: NSA (arXiv 2502.11089), section 3.3.1, equation 7.
    """
    check_dtype("x", x, FLOATING)
    check_dim("x", x, "[T, Hk, D]")
    check_at_least(1, kernel_size=kernel_size, kernel_stride=kernel_stride)
    heads, dim = x.shape[1:]
    if position is not None:
        check_dtype("position", position, [x.dtype])
        check_shape("position", position, "[Hk, kernel_size, D]", [heads, kernel_size, dim])
    if weight is not None:
        check_dtype("weight", weight, [x.dtype])
        if weight.dim() == 2:
            check_shape("weight", weight, "[Hk, kernel_size]", [heads, kernel_size])
        elif weight.dim() != 3 or weight.shape[:2] != (heads, kernel_size * dim):
            raise ValueError(
                f"weight must be [Hk, kernel_size] or [Hk, kernel_size * D, D'] = [{heads}, "
                f"{kernel_size * dim}, D'], got {list(weight.shape)}"
            )
    starts = sequence_starts("cu_seqlens", cu_seqlens, x.shape[0], "rows of x")
    counts = _compressed_lengths(starts, kernel_size, kernel_stride)
    dtype, wide = x.dtype, state_dtype(x.dtype)  # 16-bit sums would overflow and lose digits
    x = x.to(wide)
    weight = None if weight is None else weight.to(wide)
    position = None if position is None else position.to(wide)
    parts = [
        _compress_one(
            x[begin : begin + (n - 1) * kernel_stride + kernel_size], weight, kernel_size, kernel_stride
        )
        for begin, n in zip(starts, counts, strict=False)
        if n > 0
    ]
    width = dim if weight is None or weight.dim() == 2 else weight.shape[2]
    y = torch.cat(parts) if parts else x.new_zeros(0, heads, width)
    if position is not None:
        y = y + _compress_one(position.transpose(0, 1), weight, kernel_size, kernel_size)
    return y.to(dtype), packed_ends(counts)


def _compress_one(x: Tensor, weight: Tensor | None, size: int, stride: int) -> Tensor:
    """Of one sequence x [(C - 1) * stride + size, Hk, D], which ends with its last block: [C, Hk, D'].

    Blocks that overlap share their strides: each stride is summed, or mapped, once per place that it can have
    in a block, and tokens are not copied block by block.
    """
    unit = math.gcd(size, stride)
    heads, dim = x.shape[1:]
    if weight is None:
        rows = x.unflatten(0, (-1, unit)).sum(1)  # [units, Hk, D]
    elif weight.dim() == 2:
        rows = x.unflatten(0, (-1, unit))  # [units, unit, Hk, D]
        weight = weight.unflatten(1, (-1, unit))
    else:
        rows = x.transpose(0, 1).reshape(heads, -1, unit * dim)  # [Hk, units, unit * D]
        weight = weight.unflatten(1, (-1, unit * dim))
    step, last = stride // unit, (x.shape[0] - size) // unit + 1
    y: Tensor | None = None
    for place in range(size // unit):
        taken = slice(place, place + last, step)
        if weight is None:
            part = rows[taken]
        elif weight.dim() == 3:
            part = torch.einsum("cthd,ht->chd", rows[taken], weight[:, place])
        else:
            part = torch.bmm(rows[:, taken], weight[:, place])
        y = part if y is None else y + part
    assert y is not None  # size >= unit
    if weight is None:
        return y / size
    return y if weight.dim() == 3 else y.transpose(0, 1)


def blocks_of_tokens(
    x: Tensor, cu_seqlens: Tensor, *, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor]:
    """The overlapping blocks that ``compress`` maps, for maps of one's own.

    Args:
        x, cu_seqlens, kernel_size, kernel_stride: as for ``compress``.

    Returns:
        [C, Hk, kernel_size, D], a view or a copy of x, and cu_seqlens_cmp [B + 1].

    Raises:
        ValueError: as ``compress``.
    """
    check_dtype("x", x, FLOATING)
    check_dim("x", x, "[T, Hk, D]")
    check_at_least(1, kernel_size=kernel_size, kernel_stride=kernel_stride)
    windows, ends = _windows(x, cu_seqlens, kernel_size, kernel_stride)
    return windows.transpose(2, 3), ends


def _windows(x: Tensor, cu_seqlens: Tensor, kernel_size: int, kernel_stride: int) -> tuple[Tensor, Tensor]:
    """[C, Hk, D, kernel_size], and where each sequence's begin."""
    starts = sequence_starts("cu_seqlens", cu_seqlens, x.shape[0], "rows of x")
    blocks = [
        x[begin:end].unfold(0, kernel_size, kernel_stride)
        for begin, end in itertools.pairwise(starts)
        if end - begin >= kernel_size
    ]
    ends = packed_ends(_compressed_lengths(starts, kernel_size, kernel_stride))
    return torch.cat(blocks) if blocks else x.new_zeros(0, *x.shape[1:], kernel_size), ends


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cmp: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    cmp_starts: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention to compressed keys: the query at token t sees key i when it sees all its tokens.

    That is, ``i * kernel_stride + kernel_size - 1 <= t``.

    Args:
        q: [Nq, Hq, D], float32, bfloat16 or float16.
        k_cmp, v_cmp: [C, Hk, D] and [C, Hk, Dv] as ``compress`` makes them; Hq is a multiple of Hk.
        cu_seqlens: [B + 1], from 0 to Nq.
        cu_seqlens_cmp: [B + 1], from 0 to C, as ``compress`` returns it.
        kernel_size, kernel_stride: of ``compress``.
        scale: factor of the logits. Default: D ** -0.5.
        cu_seqlens_k: [B + 1], tokens of the sequences; the queries are the last ones. Default: cu_seqlens.
        cmp_starts: [B], where each sequence's rows begin in k_cmp and v_cmp, if not one behind the other;
            only the lengths in cu_seqlens_cmp count then.
        out: where to put the result, [Nq, Hq, Dv]; only where no gradients are wanted. Default: new memory.

    Returns:
        out [Nq, Hq, Dv] and lse [Nq, Hq]; 0 and -inf for a query that sees no key. Differentiable through
        both.

    Raises:
        ValueError: shapes, dtypes or heads do not fit each other, or sequences are not as described.

    Source: NSA (arXiv 2502.11089), section 3.3.1.
    """
    check_inputs(q, k_cmp, v_cmp)
    _check_sizes(kernel_size=kernel_size, kernel_stride=kernel_stride)
    queries, tokens = sequences(q, cu_seqlens, cu_seqlens_k, None)
    keys = check_indptr("cu_seqlens_cmp", cu_seqlens_cmp, q.device)
    if not torch.compiler.is_compiling():
        rows = k_cmp.shape[0] if cmp_starts is None else None
        sequence_starts("cu_seqlens_cmp", keys, rows, "rows of k_cmp")
    _check_compressed(tokens, keys, kernel_size, kernel_stride)
    plan = plan_sequences(
        q,
        k_cmp,
        queries,
        keys,
        token_indptr=tokens,
        key_size=kernel_size,
        key_stride=kernel_stride,
        key_start=key_starts("cmp_starts", cmp_starts, q, queries),
    )
    return attend(q, k_cmp, v_cmp, plan, scale=scale, out=out)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cmp: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    scale: float | None = None,
    cu_seqlens_k: Tensor | None = None,
    cmp_starts: Tensor | None = None,
) -> Tensor:
    """The blocks of keys that each query's group of heads attends to most, judged by compressed attention.

    A block's score is the compressed attention that its tokens get: compressed key i counts for the block as
    often as its windows, cut into strides, overlap it, and the heads of a group are added up. Scores are
    never stored; of equal ones the lower block wins.

    Args:
        q: [Nq, Hq, D], float32, bfloat16 or float16.
        k_cmp: [C, Hk, D], as for ``compressed_attention``.
        lse: [Nq, Hq], what ``compressed_attention`` returned.
        cu_seqlens, cu_seqlens_cmp, kernel_size, kernel_stride, scale, cu_seqlens_k, cmp_starts: as there.
        block_size: keys of a block; blocks are counted from the begin of each sequence. A multiple of
            kernel_stride, as is kernel_size.
        topk: blocks of a query, at most; at least init_blocks + local_blocks.
        init_blocks: so many blocks at the begin of the sequence are always among them. Default: 1.
        local_blocks: and so many up to the query's own. Default: 2.

    Returns:
        block_index, int32 [Hk, Nq, topk]: ascending, -1 on the right where a query sees fewer blocks. No
        gradient.

    Raises:
        ValueError: sizes do not divide, topk is too small, or inputs do not fit each other.

    Source: NSA (arXiv 2502.11089), section 3.3.2, equations 8 to 12.
    """
    check_dtype("q", q, FLOATING)
    check_dim("q", q, "[Nq, Hq, D]")
    check_dtype("k_cmp", k_cmp, [q.dtype])
    check_dim("k_cmp", k_cmp, "[C, Hk, D]")
    check_device("k_cmp", k_cmp, q.device)
    if k_cmp.shape[2] != q.shape[2]:
        raise ValueError(f"head_dim of k_cmp must be q's {q.shape[2]}, got {k_cmp.shape[2]}")
    if q.shape[2] == 0:
        raise ValueError("head_dim of q must be positive, got 0")
    if k_cmp.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k_cmp.shape[1]:
        raise ValueError(
            f"heads of q must be a positive multiple of k_cmp's {k_cmp.shape[1]}, got {q.shape[1]}"
        )
    check_dtype("lse", lse, [state_dtype(q.dtype)])
    check_shape("lse", lse, "[Nq, Hq]", q.shape[:2])
    check_device("lse", lse, q.device)
    check_selection_sizes(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
    queries, tokens = sequences(q, cu_seqlens, cu_seqlens_k, None)
    keys = check_indptr("cu_seqlens_cmp", cu_seqlens_cmp, q.device)
    if scale is not None:
        check_number("scale", scale, -MAX_SCALE, MAX_SCALE)
    q, k_cmp = (x.detach() if x.stride(-1) == 1 else x.detach().contiguous() for x in (q, k_cmp))
    index: Tensor = _library.call(
        _ops.select_blocks.default,
        q,
        k_cmp,
        lse.detach().contiguous(),
        queries,
        keys,
        tokens,
        kernel_size,
        kernel_stride,
        block_size,
        topk,
        init_blocks,
        local_blocks,
        q.shape[2] ** -0.5 if scale is None else float(scale),
        key_starts("cmp_starts", cmp_starts, q, queries),
    )
    return index


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    cu_seqlens: Tensor,
    *,
    block_size: int,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_k: Tensor | None = None,
    k_starts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal attention to the blocks of keys that each query has chosen, per KV head.

    Args:
        q: [Nq, Hq, D], float32, bfloat16 or float16.
        k, v: [Nk, Hk, D] and [Nk, Hk, Dv]; Hq is a multiple of Hk, and the heads of a group read the same
            blocks.
        block_index: int32 [Hk, Nq, n], ascending in every row, -1 where there is none, as ``select_blocks``
            returns it. Block j of a sequence is its keys from j * block_size on.
        cu_seqlens: [B + 1], from 0 to Nq.
        block_size: keys of a block.
        scale: factor of the logits. Default: D ** -0.5.
        return_lse: also return lse. Default: False.
        cu_seqlens_k: [B + 1], from 0 to Nk; the queries are the last tokens of their sequences. Default:
            cu_seqlens.
        k_starts: [B], where each sequence's rows begin in k and v, if not one behind the other (a cache with
            room to grow); only the lengths in cu_seqlens_k count then.
        out: where to put the result, [Nq, Hq, Dv]; only where no gradients are wanted. Default: new memory.

    Returns:
        out [Nq, Hq, Dv] in the dtype of q; with return_lse also lse [Nq, Hq]. 0 and -inf for a query without
        blocks. Differentiable through both, in q, k and v. Bit-identical for any number of threads.

    Raises:
        ValueError: inputs do not fit each other, or block_index is not as described.

    Source: NSA (arXiv 2502.11089), section 3.3.2; FSA (arXiv 2508.18224), section 3, for the order of the
        loops, here within tiles of queries on a CPU.
    """
    check_inputs(q, k, v)
    _check_sizes(block_size=block_size)
    check_dtype("block_index", block_index, [torch.int32])
    check_dim("block_index", block_index, "[Hk, Nq, n]")
    if block_index.shape[:2] != (k.shape[1], q.shape[0]):
        raise ValueError(
            f"block_index must be [Hk, Nq, n] = [{k.shape[1]}, {q.shape[0]}, n], got "
            f"{list(block_index.shape)}"
        )
    queries, tokens = sequences(q, cu_seqlens, cu_seqlens_k, k if k_starts is None else None)
    starts = key_starts("k_starts", k_starts, q, queries)
    make_plan = plan_by_blocks if q.device.type == "cuda" else plan_by_tiles
    plan = make_plan(q, k, v, block_index, queries, tokens, starts, block_size)
    if q.device.type == "cpu" and block_index.numel() * block_size >= _READS_OF_A_COPY * k.shape[:2].numel():
        k, v = _heads_first(k), _heads_first(v)
    out, lse = attend(q, k, v, plan_tensors(plan), scale=scale, out=out, item_query=plan[8])
    return (out, lse) if return_lse else out


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    window: int,
    scale: float | None = None,
    return_lse: bool = False,
    cu_seqlens_k: Tensor | None = None,
    k_starts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to the last ``window`` keys, the query's own included.

    Args:
        q, k, v, cu_seqlens, scale, return_lse, cu_seqlens_k, k_starts, out: as for ``selected_attention``.
        window: keys that a query sees at most. FlashAttention's ``window_size=(w, 0)`` is ``window=w + 1``.

    Returns:
        out, or (out, lse), as for ``selected_attention``.

    Raises:
        ValueError: inputs do not fit each other, or window is not positive.

    Source: NSA (arXiv 2502.11089), section 3.3.3.
    """
    check_inputs(q, k, v)
    check_at_least(1, window=window)
    queries, tokens = sequences(q, cu_seqlens, cu_seqlens_k, k if k_starts is None else None)
    starts = key_starts("k_starts", k_starts, q, queries)
    plan = plan_sequences(q, k, queries, tokens, window=window, key_start=starts)
    out, lse = attend(q, k, v, plan, scale=scale, window=window, out=out)
    return (out, lse) if return_lse else out


# One call instead of six up to so many queries: how decoding asks. With more, calling no longer counts.
FEW_QUERIES = 64


def attend_branches(
    q: Tensor,
    compressed: tuple[Tensor, Tensor],
    selected: tuple[Tensor, Tensor],
    window: tuple[Tensor, Tensor],
    gates: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_cmp: Tensor,
    cu_seqlens_k: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
    scale: float | None,
    starts: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    """The gated sum of all three branches in one operator: for few queries, without gradients, on a CPU.

    Args:
        q: [Nq, Hq, D].
        compressed, selected, window: k and v of each branch, as the functions of the branches take them.
        gates: [Nq, 3, Hq or 1], in the dtype of q.
        cu_seqlens, cu_seqlens_cmp, cu_seqlens_k, others: as there; on the CPU.
        starts: of each branch, ``cmp_starts`` and ``k_starts``.

    Returns:
        [Nq, Hq, Dv]; what the branches' functions give, gated in float32 and rounded once.

    Raises:
        ValueError: inputs do not fit each other, or sequences are not as described.
    """
    if scale is not None:
        check_number("scale", scale, -MAX_SCALE, MAX_SCALE)
    tensors = (q, *compressed, *selected, *window, gates)
    if torch.is_grad_enabled():
        names = ("q", "k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates")
        for name, x in zip(names, tensors, strict=True):
            if x.requires_grad:
                raise ValueError(f"{name} must not need a gradient, got one that does")
    rows = (x if x.dim() == 0 or x.stride(-1) == 1 else x.contiguous() for x in tensors[:-1])
    out: Tensor = _library.call(
        _ops.sparse_branches.default,
        *rows,
        gates.contiguous(),
        cu_seqlens,
        cu_seqlens_cmp,
        cu_seqlens_k,
        kernel_size,
        kernel_stride,
        block_size,
        topk,
        init_blocks,
        local_blocks,
        window_size,
        scale,
        ROWS_PER_BLOCK,
        TILE_BYTES,
        *starts,
    )
    return out


def _heads_first(x: Tensor) -> Tensor:
    """x [T, heads, D], equal, with the rows of a head behind each other in memory."""
    return x if x.stride(0) < x.stride(1) else x.transpose(0, 1).contiguous().transpose(0, 1)


# ---- checks


def _check_sizes(**sizes: int) -> None:
    check_at_least(1, **sizes)
    for name, size in sizes.items():
        if size >= 2**31:
            raise ValueError(f"{name} must be below 2^31, got {size}")


def check_selection_sizes(
    kernel_size: int, kernel_stride: int, block_size: int, topk: int, init_blocks: int, local_blocks: int
) -> None:
    """Raises ValueError unless they are what ``select_blocks`` says of them."""
    check_at_least(1, kernel_size=kernel_size, kernel_stride=kernel_stride, block_size=block_size, topk=topk)
    for name, size in (("kernel_size", kernel_size), ("block_size", block_size)):
        if size % kernel_stride:
            raise ValueError(f"{name} must be a multiple of kernel_stride {kernel_stride}, got {size}")
    check_at_least(0, init_blocks=init_blocks, local_blocks=local_blocks)
    if topk < init_blocks + local_blocks:
        raise ValueError(
            f"topk must be at least init_blocks + local_blocks = {init_blocks + local_blocks}, got {topk}"
        )


def _compressed_lengths(starts: list[int], kernel_size: int, kernel_stride: int) -> list[int]:
    return [
        0 if end - begin < kernel_size else (end - begin - kernel_size) // kernel_stride + 1
        for begin, end in itertools.pairwise(starts)
    ]


def _check_compressed(tokens: Tensor, keys: Tensor, kernel_size: int, kernel_stride: int) -> None:
    if torch.compiler.is_compiling():
        return
    check_shape("cu_seqlens_cmp", keys, "[B + 1] like cu_seqlens", tokens.shape)
    wanted = _compressed_lengths(tokens.tolist(), kernel_size, kernel_stride)
    got = sequence_lengths(keys)
    if got != wanted:
        b = next(i for i, (a, c) in enumerate(zip(got, wanted, strict=True)) if a != c)
        raise ValueError(
            f"cu_seqlens_cmp must give sequence {b} its {wanted[b]} compressed keys, got {got[b]}"
        )


# ---- fakes


@torch.library.register_fake("palmette::select_blocks")
def _select_blocks_fake(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    q_indptr: Tensor,
    cmp_indptr: Tensor,
    token_indptr: Tensor,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    *options: object,
) -> Tensor:
    return q.new_empty((k_cmp.shape[1], q.shape[0], topk), dtype=torch.int32)


@torch.library.register_fake("palmette::sparse_branches")
def _sparse_branches_fake(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, *_: object) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], v_cmp.shape[2]))
