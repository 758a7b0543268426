# SPDX-License-Identifier: Apache-2.0
"""Plans for packed sequences, the special case of a plan that needs no tree."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._attend import PlanTensors, plan_tensors
from palmette._checks import INDEX, check_device, check_dtype, check_indptr, check_shape
from palmette._device import on_device

_ops = torch.ops.palmette

# What the planner may ask for at most (csrc/plan/cost.h, partition.h), by target: rows of q per task, keys
# per step at which queries drop out, tasks beyond one per tile; and bytes of partial states that are always
# allowed.
_MAX_TASK_ROWS = {"cpu": 256, "gpu": 64}
_KEY_STEP = {"cpu": 48, "gpu": 64}
_EXTRA_TASKS = {"cpu": 64, "gpu": 1024}
_FREE_PARTIAL_BYTES = 640 << 10


def packed_ends(lengths: list[int]) -> Tensor:
    """Where sequences of these lengths begin, and where the last one ends: int32 [B + 1]."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def sequence_lengths(indptr: Tensor) -> list[int]:
    return _differences(indptr.tolist())  # a step of decoding has no time for tensors of a few elements


def _differences(starts: list[int]) -> list[int]:
    return [end - begin for begin, end in itertools.pairwise(starts)]


def sequence_starts(name: str, indptr: Tensor, total: int | None, of_what: str) -> list[int]:
    """Checks where sequences begin; total: the last one's end, None: anywhere."""
    check_dtype(name, indptr, INDEX)
    starts: list[int] = check_indptr(name, indptr, indptr.device).tolist()
    if total is None and starts[0] != 0:
        raise ValueError(f"{name} must begin with 0, got {starts[0]}")
    if total is not None and (starts[0] != 0 or starts[-1] != total):
        raise ValueError(f"{name} must be from 0 to {total} ({of_what}), got {starts[0]} to {starts[-1]}")
    if any(a > b for a, b in itertools.pairwise(starts)):
        raise ValueError(f"{name} must be non-decreasing, got {starts}")
    return starts


def sequences(
    q: Tensor, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Where the queries and the tokens of sequences begin."""
    compiling = torch.compiler.is_compiling()
    queries = check_indptr("cu_seqlens", cu_seqlens, q.device)
    begins = [] if compiling else sequence_starts("cu_seqlens", queries, q.shape[0], "rows of q")
    if cu_seqlens_k is None:
        if k is not None and k.shape[0] != q.shape[0]:
            raise ValueError(
                f"k must have q's {q.shape[0]} rows where cu_seqlens_k is not given, got {k.shape[0]}"
            )
        return queries, queries
    tokens = check_indptr("cu_seqlens_k", cu_seqlens_k, q.device)
    check_shape("cu_seqlens_k", tokens, "[B + 1] like cu_seqlens", queries.shape)
    if not compiling:
        have = sequence_starts("cu_seqlens_k", tokens, None if k is None else k.shape[0], "rows of k")
        for b, (n, m) in enumerate(zip(_differences(begins), _differences(have), strict=True)):
            if m < n:
                raise ValueError(
                    f"cu_seqlens_k must give a sequence at least its queries, got {m} tokens for {n} queries "
                    f"of sequence {b}"
                )
    return queries, tokens


def key_starts(name: str, starts: Tensor | None, q: Tensor, indptr: Tensor) -> Tensor | None:
    if starts is None:
        return None
    check_dtype(name, starts, INDEX)
    check_shape(name, starts, "[B]", [indptr.shape[0] - 1])
    if starts.device.type != "cpu":
        check_device(name, starts, q.device)
    return starts.detach().cpu().contiguous()


def plan_varlen(
    q_indptr: Tensor,
    kv_indptr: Tensor,
    *,
    causal: bool,
    num_queries: int,
    num_keys: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device | None = None,
    target: str | None = None,
    token_indptr: Tensor | None = None,
    key_size: int = 1,
    key_stride: int = 1,
    window: int = 0,
    key_start: Tensor | None = None,
) -> PlanTensors:
    """The plan of B packed sequences.

    Queries q_indptr[b] : q_indptr[b + 1] meet keys kv_indptr[b] : kv_indptr[b + 1].

    Args:
        q_indptr, kv_indptr: [B + 1], int32 or int64, on the CPU; non-decreasing from 0 to num_queries and to
            num_keys.
        causal: the last query of a sequence sees all of its keys, each one before it a key less (aligned at
            the bottom right); otherwise every query sees all keys of its sequence.
        device: of the result. Default: the CPU.
        target: ``"cpu"`` or ``"gpu"``: whose costs the plan minimises. Default: what the device is.
        token_indptr: [B + 1], tokens of the sequences, where keys are not tokens. Default: kv_indptr.
        key_size, key_stride: key i stands for ``key_size`` tokens from ``i * key_stride`` on, and a causal
            query sees it when it sees the last of them. Default: 1, a key is a token.
        window: keys that a causal query sees at most, if the operator is told so too. Default (0): all.
        key_start: [B], where the keys of sequences begin. Default: kv_indptr[:-1].

    Returns:
        slots, query, segment, item, task, merge_ptr, merge_row and counts, as operators take them; int32. Key
        i lies in slot i, and position and row of a query are the same number. The tables have room to spare:
        their sizes depend on the arguments' shapes only, so that this traces.

    Raises:
        ValueError: an indptr does not begin with 0, decreases, or does not end with the number of rows.
    """
    if target is None:
        target = "cpu" if device is None or device.type == "cpu" else "gpu"
    max_queries = max(1, _MAX_TASK_ROWS[target] // (num_q_heads // num_kv_heads))
    tiles = num_queries // max_queries + q_indptr.shape[0]
    item_capacity = tiles * (4 + max_queries // _KEY_STEP[target]) + _EXTRA_TASKS[target]
    partial_capacity = 2 * num_queries + _FREE_PARTIAL_BYTES // (num_q_heads * (head_dim + 1) * 4)
    plan: PlanTensors = _library.call(
        _ops.plan_varlen.default,
        q_indptr,
        kv_indptr,
        causal,
        num_queries,
        num_keys,
        num_q_heads,
        num_kv_heads,
        head_dim,
        target,
        item_capacity,
        partial_capacity,
        token_indptr,
        key_size,
        key_stride,
        window,
        key_start,
    )
    return plan_tensors(on_device(plan, device))


def plan_sequences(
    q: Tensor, k: Tensor, q_indptr: Tensor, kv_indptr: Tensor, *, causal: bool = True, **options: Any
) -> PlanTensors:
    """``plan_varlen`` for q [Nq, Hq, D] and k [Nk, Hk, D], on their device; ``options`` are its others."""
    return plan_varlen(
        q_indptr,
        kv_indptr,
        causal=causal,
        num_queries=q.shape[0],
        num_keys=k.shape[0],
        num_q_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[2],
        device=q.device,
        **options,
    )


@torch.library.register_fake("palmette::plan_varlen")
def _plan_varlen_fake(
    q_indptr: Tensor,
    kv_indptr: Tensor,
    causal: bool,
    num_queries: int,
    num_keys: int,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    target: str,
    item_capacity: int,
    partial_capacity: int,
    token_indptr: Tensor | None = None,
    key_size: int = 1,
    key_stride: int = 1,
    window: int = 0,
    key_start: Tensor | None = None,
) -> PlanTensors:
    def table(*size: int) -> Tensor:
        return q_indptr.new_empty(size, dtype=torch.int32)

    return (
        table(num_keys),
        table(4, num_queries),
        table(2 * item_capacity, 6),
        table(item_capacity, 4),
        table(item_capacity, 6),
        table(num_queries + 1),
        table(partial_capacity),
        table(16),
    )
