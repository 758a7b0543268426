# SPDX-License-Identifier: Apache-2.0
"""Plans for chosen key blocks: by tiles of queries for a CPU, by blocks for a GPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from palmette import _library
from palmette._device import on_device
from palmette._varlen import sequence_lengths

_ops = torch.ops.palmette

# On a CPU: rows of q (queries and heads) that a block of keys should meet at once, and the bytes that q and
# out of a tile of queries may take, a share of the last cache (docs/performance.md, "Sparse attention").
ROWS_PER_BLOCK = 64
TILE_BYTES = 2 << 20
# On a GPU: rows that share one fetch of a block's K and V.
_TASK_ROWS_GPU = 512


def _tile_queries(group: int, width: int) -> tuple[int, int]:
    """How few and how many queries a tile of a CPU's plan for chosen blocks may have."""
    least = max(1, ROWS_PER_BLOCK // group)
    return least, max(least, TILE_BYTES // (4 * width) // group)


def plan_by_tiles(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    queries: Tensor,
    tokens: Tensor,
    starts: Tensor | None,
    block_size: int,
) -> tuple[Tensor, ...]:
    """The nine tables of a plan for chosen blocks, of a CPU: in tiles of queries."""
    heads, num_queries, slots = block_index.shape
    num_keys, sequences = k.shape[0], queries.shape[0] - 1
    least, most = _tile_queries(q.shape[1] // heads, q.shape[2] + v.shape[2])
    blocks = num_keys // block_size + 1
    segments = num_keys // block_size + sequences
    if starts is not None:  # sequences may share rows, and rows be nobody's
        segments = blocks * sequences
        if not torch.compiler.is_compiling():
            sizes = [-(-n // block_size) for n in sequence_lengths(tokens)]
            segments, blocks = sum(sizes), max(sizes, default=0)
    # A tile of a sequence of B blocks is least * B / slots queries, rounded down, within [least, most].
    items = heads * (2 * num_queries * slots // least + num_queries * blocks // most + segments)
    plan: tuple[Tensor, ...] = _library.call(
        _ops.plan_selection.default,
        block_index.detach().cpu().contiguous(),
        queries,
        tokens,
        num_keys,
        block_size,
        least,
        most,
        segments,
        min(block_index.numel(), items),
        (num_queries // least + sequences) * heads,
        starts,
    )
    return plan


def plan_by_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_index: Tensor,
    queries: Tensor,
    tokens: Tensor,
    starts: Tensor | None,
    block_size: int,
) -> tuple[Tensor, ...]:
    """The nine tables of a plan in FSA's order: a task is a key block and queries that chose it.

    Made by a sort on the device of q, and nothing is waited for. Blocks that a sequence does not have count
    as none. csrc/attend/params.h says what is different in such a plan.
    """
    heads, num_queries, choices = block_index.shape
    device, group = q.device, q.shape[1] // heads
    block_index = block_index.detach().to(device)
    entries = num_queries * choices  # of a KV head
    segment, first_block, num_blocks = _blocks_of_sequences(queries, tokens, starts, block_size)
    blocks = max(1, segment.shape[0])
    counts = torch.zeros(16, dtype=torch.int32)  # csrc/attend/params.h, PlanCount
    counts[0], counts[1], counts[7], counts[8] = num_queries, segment.shape[0], block_size, k.shape[0]
    counts[9] = heads * entries
    host = (segment, first_block[:, None], num_blocks[:, None], counts)
    segment, first_block, num_blocks, counts = on_device(host, device)
    exists = (block_index >= 0) & (block_index < num_blocks)
    chosen = torch.where(exists, block_index + first_block, blocks)
    ordered, order = chosen.flatten(1).sort(dim=1, stable=True)
    number = torch.arange(entries, device=device).expand(heads, -1)
    base = torch.arange(heads, device=device)[:, None] * entries
    place = torch.empty_like(order).scatter_(1, order, number + base).view_as(chosen)
    edges = torch.searchsorted(
        ordered, torch.arange(blocks + 1, dtype=torch.int32, device=device).repeat(heads, 1)
    )
    most = max(1, _TASK_ROWS_GPU // group)
    parts = (edges.diff(dim=1) + most - 1) // most
    part_end = parts.flatten().cumsum(0)
    capacity = heads * (entries // most + min(blocks, entries))
    task = torch.arange(capacity, device=device)
    owner = torch.searchsorted(part_end, task, right=True).clamp(max=heads * blocks - 1)
    head, block = owner // blocks, owner % blocks
    edges = edges + base
    begin = edges[:, :-1].flatten()[owner] + (task - part_end[owner] + parts.flatten()[owner]) * most
    end = torch.minimum(begin + most, edges[:, 1:].flatten()[owner])
    counts[2:4] = part_end[-1]
    rows = torch.arange(num_queries, device=device)
    tables = (
        torch.arange(k.shape[0], device=device),
        torch.stack([rows, rows, rows, torch.zeros_like(rows)]),
        segment,
        torch.stack([block, block + 1, begin, end], 1),
        torch.stack([task, task + 1, begin, end, begin, head], 1),
        torch.zeros(1, device=device),
        torch.where(chosen < blocks, place, -1),
        counts,
        (order // choices).flatten(),
    )
    return tuple(table.int() for table in tables)


def _blocks_of_sequences(
    queries: Tensor, tokens: Tensor, starts: Tensor | None, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """int32 segments [blocks, 6]; per query, of its sequence the first block and the number of blocks."""
    asked, have = sequence_lengths(queries), sequence_lengths(tokens)
    row = [0, *itertools.accumulate(asked)]
    key = [0, *itertools.accumulate(have)] if starts is None else starts.tolist()
    segments: list[list[int]] = []
    first: list[int] = []
    for b, (n, m) in enumerate(zip(asked, have, strict=True)):
        first.append(len(segments))
        for j in range(0, m, block_size):
            seen_from = row[b] + j - (m - n)
            segments.append([key[b] + j, min(block_size, m - j), seen_from, 1, row[b] + n, j])
    times = torch.tensor(asked)
    return (
        torch.tensor(segments, dtype=torch.int32).view(-1, 6),
        torch.tensor(first, dtype=torch.int32).repeat_interleave(times),
        torch.tensor([-(-m // block_size) for m in have], dtype=torch.int32).repeat_interleave(times),
    )


@torch.library.register_fake("palmette::plan_selection")
def _plan_selection_fake(
    block_index: Tensor,
    q_indptr: Tensor,
    kv_indptr: Tensor,
    num_keys: int,
    block_size: int,
    min_tile_queries: int,
    max_tile_queries: int,
    segment_capacity: int,
    item_capacity: int,
    task_capacity: int,
    key_start: Tensor | None = None,
) -> tuple[Tensor, ...]:
    def table(*size: int) -> Tensor:
        return block_index.new_empty(size, dtype=torch.int32)

    num_queries = block_index.shape[1]
    return (
        table(num_keys),
        table(4, num_queries),
        table(segment_capacity, 6),
        table(item_capacity, 4),
        table(task_capacity, 6),
        table(num_queries + 1),
        table(0),
        table(16),
        table(block_index.numel()),
    )
