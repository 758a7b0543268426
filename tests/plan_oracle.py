# SPDX-License-Identifier: Apache-2.0
"""Attention plans evaluated word by word: the oracle for planners and for the kernel alike.

`check_plan` verifies the structure of a plan, `plan_keys` lists which KV slots each query meets, and
`evaluate_plan` runs tasks, items, segments, partial states and merges in float64 PyTorch, literally in the
plan's own order; autograd passes through it. The layout of the tensors is described in docs/design.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_TASK_ROWS = 256


class PlanTensors(NamedTuple):
    """The tensors of a plan in the order in which `attend` takes them."""

    slots: Tensor
    query: Tensor  # [4, cap]: index into q, pos, depth, 0
    segment: Tensor  # [cap, 6]: begin, length, lo, step, hi, depth
    item: Tensor  # [cap, 4]: segment_begin, segment_end, query_begin, query_end
    task: Tensor  # [cap, 6]: item_begin, item_end, query_begin, query_end, partial_begin, kv_head
    merge_ptr: Tensor
    merge_row: Tensor
    counts: Tensor


class _Plan(NamedTuple):
    """The live part of the tensors, as Python lists but for the slots."""

    slots: Tensor
    index: list[int]
    pos: list[int]
    depth: list[int]
    segment: list[list[int]]
    item: list[list[int]]
    task: list[list[int]]
    merge_ptr: list[int]
    merge_row: list[int]
    num_partials: int


def _unpack(plan: Sequence[Tensor]) -> _Plan:
    p = PlanTensors(*plan)
    counts = p.counts.tolist()
    num_queries, num_segments, num_items, num_tasks, num_partials = counts[:5]
    query = p.query[:, :num_queries].tolist()
    return _Plan(
        slots=p.slots.long(),
        index=query[0],
        pos=query[1],
        depth=query[2],
        segment=p.segment[:num_segments].tolist(),
        item=p.item[:num_items].tolist(),
        task=p.task[:num_tasks].tolist(),
        merge_ptr=p.merge_ptr[: num_queries + 1].tolist(),
        merge_row=p.merge_row[:num_partials].tolist(),
        num_partials=num_partials,
    )


def _heads(kv_head: int, num_kv_heads: int) -> range:
    return range(num_kv_heads) if kv_head < 0 else range(kv_head, kv_head + 1)


def check_plan(plan: Sequence[Tensor], *, num_q_heads: int = 1, num_kv_heads: int = 1) -> None:
    """Asserts every structural promise of a plan, but not which keys it covers (see `plan_keys`)."""
    names = PlanTensors._fields
    for name, tensor in zip(names, plan, strict=True):
        assert tensor.dtype == torch.int32, f"{name} has dtype {tensor.dtype}"
        assert tensor.device.type == "cpu", f"{name} is on {tensor.device}"
        assert tensor.is_contiguous(), f"{name} is not contiguous"
    tensors = PlanTensors(*plan)
    assert tensors.counts.shape == (16,)
    counts = tensors.counts.tolist()
    num_queries, num_segments, num_items, num_tasks, num_partials = counts[:5]
    assert min(counts[:5]) >= 0
    assert tensors.query.shape[0] == 4
    assert tensors.query.shape[1] >= num_queries
    for name, count, width in (("segment", num_segments, 6), ("item", num_items, 4), ("task", num_tasks, 6)):
        tensor = getattr(tensors, name)
        assert tensor.dim() == 2, f"{name} has shape {tuple(tensor.shape)}"
        assert tensor.shape[1] == width, f"{name} has shape {tuple(tensor.shape)}"
        assert tensor.shape[0] >= count, f"{name} holds {tensor.shape[0]} rows, counts say {count}"
    assert tensors.merge_ptr.numel() >= num_queries + 1
    assert tensors.merge_row.numel() >= num_partials

    p = _unpack(plan)
    assert sorted(set(p.index)) == sorted(p.index), "a row of q belongs to two queries"
    assert all(i >= 0 for i in p.index)
    assert all(a <= b for a, b in zip(p.pos, p.pos[1:], strict=False)), "queries are not sorted by position"
    assert all(d >= 0 for d in p.depth)
    for s, (begin, length, _lo, step, _hi, _depth) in enumerate(p.segment):
        assert length > 0, f"segment {s} has length {length}"
        assert 0 <= begin <= len(p.slots) - length, f"segment {s} leaves the arena"
        assert step >= 0, f"segment {s} has step {step}"

    group = num_q_heads // num_kv_heads
    max_queries = max(1, MAX_TASK_ROWS // group)
    seen_items = [0] * num_items
    direct: dict[tuple[int, int], int] = {}
    partial: dict[tuple[int, int], list[int]] = {}
    written: set[tuple[int, int]] = set()
    largest_tile, largest_item = 0, 0
    for t, (item_begin, item_end, query_begin, query_end, partial_begin, kv_head) in enumerate(p.task):
        assert 0 <= item_begin <= item_end <= num_items, f"task {t} has items {item_begin}:{item_end}"
        assert 0 <= query_begin < query_end <= num_queries, f"task {t} has queries {query_begin}:{query_end}"
        assert -1 <= kv_head < num_kv_heads, f"task {t} has KV head {kv_head}"
        assert query_end - query_begin <= max_queries, f"task {t} has {query_end - query_begin} queries"
        assert partial_begin < 0 or item_begin < item_end, f"task {t} writes empty partial states"
        largest_tile = max(largest_tile, query_end - query_begin)
        for i in range(item_begin, item_end):
            seen_items[i] += 1
            segment_begin, segment_end, first, last = p.item[i]
            assert 0 <= segment_begin < segment_end <= num_segments, f"item {i} has no valid segments"
            assert query_begin <= first < last <= query_end, f"item {i} has queries outside its task's"
            largest_item = max(largest_item, sum(p.segment[s][1] for s in range(segment_begin, segment_end)))
        for h in _heads(kv_head, num_kv_heads):
            for j in range(query_begin, query_end):
                if partial_begin < 0:
                    direct[j, h] = direct.get((j, h), 0) + 1
                else:
                    row = partial_begin + j - query_begin
                    assert 0 <= row < num_partials, f"task {t} writes partial row {row} of {num_partials}"
                    assert (row, h) not in written, f"partial row {row} is written twice"
                    written.add((row, h))
                    partial.setdefault((j, h), []).append(row)
    assert all(count == 1 for count in seen_items), "an item belongs to no task or to several"
    assert counts[5] == largest_tile, f"max_task_queries is {largest_tile}, counts say {counts[5]}"
    assert counts[7] == largest_item, f"max_item_keys is {largest_item}, counts say {counts[7]}"
    assert p.merge_ptr[0] == 0
    assert p.merge_ptr[-1] == num_partials
    for j in range(num_queries):
        assert p.merge_ptr[j] <= p.merge_ptr[j + 1], f"merge_ptr decreases at query {j}"
        rows = sorted(p.merge_row[p.merge_ptr[j] : p.merge_ptr[j + 1]])
        for h in range(num_kv_heads):
            if rows:
                assert (j, h) not in direct, f"query {j} is in a direct task and in partial ones"
                assert sorted(partial.get((j, h), [])) == rows, f"query {j} merges rows that it does not own"
            else:
                assert direct.get((j, h)) == 1, f"query {j} is in {direct.get((j, h), 0)} direct tasks"
                assert (j, h) not in partial, f"query {j} has partial states that are never merged"


def _item_keys(p: _Plan, item: Sequence[int]) -> Tensor:
    """[4, keys]: slot, lo, hi and depth of an item's keys, one after the other."""
    keys = []
    for begin, length, lo, step, hi, depth in p.segment[item[0] : item[1]]:
        i = torch.arange(length)
        keys.append(torch.stack([p.slots[begin + i], lo + i * step, torch.full_like(i, hi), depth + i]))
    return torch.cat(keys, dim=1)


def _visible(p: _Plan, first: int, last: int, keys: Tensor, window: int) -> Tensor:
    """[queries first:last, keys]: lo <= pos < hi, and the distance along the path is below the window."""
    _, lo, hi, depth = keys
    pos = torch.tensor(p.pos[first:last])[:, None]
    visible = (lo <= pos) & (pos < hi)
    if window > 0:
        visible &= torch.tensor(p.depth[first:last])[:, None] - depth < window
    return visible


def plan_keys(plan: Sequence[Tensor], *, kv_head: int = 0, window: int = 0) -> dict[int, list[int]]:
    """For each row of q, the sorted KV slots that its tasks show it; a slot met twice is listed twice."""
    p = _unpack(plan)
    keys: dict[int, list[int]] = {i: [] for i in p.index}
    for item_begin, item_end, _, _, _, task_head in p.task:
        if task_head not in (-1, kv_head):
            continue
        for item in p.item[item_begin:item_end]:
            item_keys = _item_keys(p, item)
            for j, row in enumerate(_visible(p, item[2], item[3], item_keys, window), start=item[2]):
                keys[p.index[j]] += item_keys[0, row].tolist()
    return {i: sorted(slots) for i, slots in keys.items()}


def _normalize(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """scores [rows, keys] with -inf for what is hidden, v [keys, Dv] -> out [rows, Dv], lse [rows]."""
    hidden = scores == -torch.inf
    floor = scores.new_full((len(scores), 1), -torch.inf)  # so that no keys at all have a maximum too
    m = torch.cat([scores.detach(), floor], dim=1).amax(dim=1, keepdim=True)
    m = torch.where(m == -torch.inf, 0.0, m)
    weights = torch.exp(scores - m)
    total = weights.sum(dim=-1)
    empty = hidden.all(dim=-1)
    total = torch.where(empty, 1.0, total)
    if torch.isfinite(v).all():
        out = weights @ v
    else:  # 0 * NaN: a hidden key contributes nothing, whatever it holds
        out = torch.where(hidden[:, :, None], 0.0, weights[:, :, None] * v[None]).sum(dim=1)
    return out / total[:, None], torch.where(empty, -torch.inf, m[:, 0] + torch.log(total))


def _merge(outs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """outs [S, Dv], lses [S] of one query -> out [Dv], lse []; lse -inf is empty, whatever its out holds."""
    outs = torch.where((lses == -torch.inf)[:, None], 0.0, outs)
    out, lse = _normalize(lses[None], outs)
    return out[0], lse[0]


def evaluate_plan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: Sequence[Tensor],
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """q [Nq, Hq, D], k [slots, Hk, D], v [slots, Hk, Dv] -> out [Nq, Hq, Dv], lse [Nq, Hq], both float64.

    Rows of q that the plan does not name, and rows that see no key, get out 0 and lse -inf (with sinks [Hq],
    which join each query once: the sink).
    """
    p = _unpack(plan)
    q, k, v = q.double(), k.double(), v.double()
    num_kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    parts: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (partial row, query head) -> state
    states: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}  # (query, query head) -> state
    for item_begin, item_end, query_begin, query_end, partial_begin, kv_head in p.task:
        rows = q[p.index[query_begin:query_end]]
        keys = [torch.zeros(4, 0, dtype=torch.int64)]
        masks = [torch.zeros(query_end - query_begin, 0, dtype=torch.bool)]
        for item in p.item[item_begin:item_end]:
            keys.append(_item_keys(p, item))
            met = torch.zeros(query_end - query_begin, keys[-1].shape[1], dtype=torch.bool)
            met[item[2] - query_begin : item[3] - query_begin] = _visible(
                p, item[2], item[3], keys[-1], window
            )
            masks.append(met)
        slots, mask = torch.cat(keys, dim=1)[0], torch.cat(masks, dim=1)
        unseen = ~mask.any(dim=0)
        for h in _heads(kv_head, num_kv_heads):
            # Keys that no query of the task sees may hold anything; zeros keep NaN out of the gradients.
            k_task = torch.where(unseen[:, None], 0.0, k[slots, h])
            v_task = torch.where(unseen[:, None], 0.0, v[slots, h])
            for head in range(h * group, (h + 1) * group):
                scores = rows[:, head] @ k_task.T * scale
                if softcap > 0.0:
                    scores = softcap * torch.tanh(scores / softcap)
                out, lse = _normalize(torch.where(mask, scores, -torch.inf), v_task)
                for row, j in enumerate(range(query_begin, query_end)):
                    if partial_begin < 0:
                        states[j, head] = out[row], lse[row]
                    else:
                        parts[partial_begin + row, head] = out[row], lse[row]
    out = q.new_zeros(q.shape[0], q.shape[1], v.shape[2])
    lse = q.new_full(q.shape[:2], -torch.inf)
    for j, index in enumerate(p.index):
        partial_rows = p.merge_row[p.merge_ptr[j] : p.merge_ptr[j + 1]]
        for head in range(q.shape[1]):
            if partial_rows:
                merging = [parts[row, head] for row in partial_rows]
                state = _merge(torch.stack([s[0] for s in merging]), torch.stack([s[1] for s in merging]))
            else:
                state = states[j, head]
            if sinks is not None:
                sink = sinks[head].double()
                state = _merge(
                    torch.stack([state[0], torch.zeros_like(state[0])]), torch.stack([state[1], sink])
                )
            out = out.index_put((torch.tensor(index), torch.tensor(head)), state[0])
            lse = lse.index_put((torch.tensor(index), torch.tensor(head)), state[1])
    return out, lse
