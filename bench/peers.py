# SPDX-License-Identifier: Apache-2.0
"""What Palmette is measured against: each peer as its best user would call it.

Everything that a peer can prepare is prepared outside the timed region: K and V lie head-major and contiguous
([Hk, tokens, D], gathered per group of equal nodes), q comes folded (GQA's query heads are rows of their KV
head), masks are float and ready, views are sliced. Outputs stay in the peer's own layout; ``Contender.read``
brings them into Palmette's [Nq, Hq, D] for the check alone.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bench.cases import Case, Inputs
from bench.machine import available_memory

# Returns (out, lse) and takes a mask: the kernel under torch's own scaled_dot_product_attention.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

MAX_MASK_BYTES = 1 << 29
MAX_REPLICATED_BYTES = 3 << 30  # and at most an eighth of the memory that is free
MAX_CALLS = 600


class NotRunError(Exception):
    """A peer that makes no sense for a case; the message says why."""


@dataclass
class Contender:
    """Something to time.

    Attributes:
        name: Of its row in the table.
        run: The timed call.
        read: Brings what ``run`` returned into [Nq, Hq, Dv].
    """

    name: str
    run: Callable[[], Any]
    read: Callable[[Any], torch.Tensor]


class Prepared(NamedTuple):
    """Inputs as peers like them. Queries are sorted by position, so that each node's are neighbours."""

    case: Case
    q: torch.Tensor  # [Hk, rows, D]; row = (query, query head of the KV head)
    k: torch.Tensor  # [Hk, tokens, D], tokens in depth-first order
    v: torch.Tensor  # [Hk, tokens, Dv]
    pos: np.ndarray  # [Nq] ascending
    order: torch.Tensor  # [Nq] index of each sorted query in the case's order

    def unsort(self, rows: torch.Tensor) -> torch.Tensor:
        """[rows, Hk, Dv] -> [Nq, Hq, Dv] in the case's order."""
        case = self.case
        out = rows.view(len(self.pos), case.group_size, case.num_kv_heads, -1).transpose(1, 2)
        out = out.reshape(len(self.pos), case.num_q_heads, -1)
        return torch.empty_like(out).index_copy_(0, self.order, out)

    def unfold(self, out: torch.Tensor) -> torch.Tensor:
        """[1, Hk, rows, Dv] -> [Nq, Hq, Dv] in the case's order."""
        return self.unsort(out[0].transpose(0, 1).contiguous())


def prepare(case: Case, inputs: Inputs) -> Prepared:
    order = np.argsort(case.geometry.pos, kind="stable")
    index = torch.from_numpy(order).to(inputs.q.device)
    q = inputs.q[index].view(len(order), case.num_kv_heads, case.group_size, case.head_dim)
    q = q.permute(1, 0, 2, 3).reshape(case.num_kv_heads, -1, case.head_dim)
    k, v = (x if inputs.slots is None else x[inputs.slots] for x in (inputs.k, inputs.v))
    heads_first = [x.transpose(0, 1).contiguous() for x in (k, v)]
    return Prepared(case, q.contiguous(), *heads_first, case.geometry.pos[order], index)


def _rows_mask(p: Prepared, begin: int, end: int, keys: np.ndarray) -> torch.Tensor:
    """float [rows of sorted queries begin..end, keys]: 0 where visible, -inf elsewhere."""
    pos = p.pos[begin:end, None]
    hidden = (keys > pos) | (pos >= p.case.geometry.token_end[keys])
    mask = torch.zeros(hidden.shape, dtype=p.q.dtype).masked_fill_(torch.from_numpy(hidden), -torch.inf)
    return mask.repeat_interleave(p.case.group_size, 0).to(p.q.device)


# ------------------------------------------------------------------------ cascade: one call per node or level


class _Call(NamedTuple):
    """One flash call: ``batch`` neighbouring nodes of a level with equal numbers of keys and queries."""

    level: int
    rows: slice  # of q and of the output
    q: torch.Tensor  # [batch, Hk, rows of a node, D]
    k: torch.Tensor  # [batch, Hk, keys, D]
    v: torch.Tensor
    mask: torch.Tensor | None


def _cascade_calls(p: Prepared) -> Iterator[_Call]:
    case, geometry = p.case, p.case.geometry
    runs: list[list[tuple[int, int, int]]] = []  # per call (node, first query, past the last)
    waiting: dict[int, list[tuple[int, int, int]]] = {}  # the last call of each level, still open
    for node in geometry.order:
        length = case.tree.num_tokens[node]
        begin, end = np.searchsorted(p.pos, [geometry.start[node], geometry.end[node]]).tolist()
        if not length or begin == end:
            continue
        level = geometry.level[node]
        entry = (node, begin, end)
        last = waiting.get(level)
        fits = (
            last is not None
            and last[-1][2] == begin
            and last[-1][2] - last[-1][1] == end - begin
            and case.tree.num_tokens[last[-1][0]] == length
            and not _sees_part(p, *last[-1])
            and not _sees_part(p, *entry)
        )
        if fits and last is not None:
            last.append(entry)
        else:
            waiting[level] = [entry]
            runs.append(waiting[level])
    group = case.group_size
    for run in runs:
        node, begin, end = run[0]
        rows = slice(begin * group, run[-1][2] * group)
        q = p.q[:, rows].unflatten(1, (len(run), -1)).transpose(0, 1)
        keys = [slice(geometry.start[n], geometry.start[n] + case.tree.num_tokens[n]) for n, _, _ in run]
        if len(run) == 1:
            k, v = p.k[None, :, keys[0]], p.v[None, :, keys[0]]
        else:
            k, v = (torch.stack([x[:, key] for key in keys]) for x in (p.k, p.v))
        mask = None
        if _sees_part(p, *run[0]):
            mask = _rows_mask(p, begin, end, np.arange(keys[0].start, keys[0].stop))
        yield _Call(geometry.level[node], rows, q, k, v, mask)


def _sees_part(p: Prepared, node: int, begin: int, end: int) -> bool:
    """Whether a query in the middle of the node sees only a part of its keys."""
    last = p.case.geometry.start[node] + p.case.tree.num_tokens[node] - 1
    return bool((p.pos[begin:end] < last).any())


def _rows_first(x: torch.Tensor) -> torch.Tensor:
    """Flash's [batch, Hk, rows, ...] -> [batch * rows, Hk, ...]: a view, as this is its memory's order."""
    return x.transpose(1, 2).flatten(0, 1)


def cascade(p: Prepared) -> Contender:
    """A flash call per node, or per run of equal nodes, and a merge by the softmax of the LSEs."""
    calls = list(_cascade_calls(p))
    if len(calls) > MAX_CALLS:
        raise NotRunError(f"{len(calls)} calls")
    return _merged(p, calls, "cascade")


def _merged(p: Prepared, calls: list[_Call], name: str) -> Contender:
    num_rows, heads = p.q.shape[1], p.case.num_kv_heads
    if len(calls) == 1:
        only = calls[0]
        return Contender(name, lambda: _call(only)[0], p.unfold)
    whole = all(call.rows == slice(0, num_rows) for call in calls)
    if len(calls) == 2 and whole:
        first, second = calls

        def merge_two() -> torch.Tensor:
            (out_a, lse_a), (out_b, lse_b) = _call(first), _call(second)
            weight = torch.sigmoid(_rows_first(lse_b).sub_(_rows_first(lse_a))).to(out_a.dtype)
            return _rows_first(out_a).lerp_(_rows_first(out_b), weight[..., None])

        return Contender(name, merge_two, p.unsort)

    num_levels = 1 + max(call.level for call in calls)
    lse = torch.full((num_levels, num_rows, heads), -torch.inf)
    weight = torch.empty_like(lse)
    out = torch.empty(num_rows, heads, p.v.shape[2])
    lse_of = [lse[call.level, call.rows] for call in calls]
    weight_of = [weight[call.level, call.rows, :, None] for call in calls]
    out_of = [out[call.rows] for call in calls]
    covered = calls[0].rows == slice(0, num_rows)

    def merge_many() -> torch.Tensor:
        parts = []
        for call, target in zip(calls, lse_of, strict=True):
            part, part_lse = _call(call)
            target.copy_(_rows_first(part_lse))
            parts.append(_rows_first(part))
        torch.softmax(lse, 0, out=weight)
        if not covered:
            out.zero_()
        for index, (part, share, target) in enumerate(zip(parts, weight_of, out_of, strict=True)):
            if covered and index == 0:
                torch.mul(part, share, out=target)
            else:
                target.addcmul_(part, share)
        return out

    return Contender(name, merge_many, lambda result: p.unsort(result.clone()))


def _call(call: _Call) -> tuple[torch.Tensor, torch.Tensor]:
    result: tuple[torch.Tensor, torch.Tensor] = _flash(
        call.q, call.k, call.v, 0.0, False, attn_mask=call.mask
    )
    return result


def prefix_and_mask(p: Prepared) -> Contender:
    """The root by one flash call, all below it by a second one with a mask: token trees by hand."""
    geometry = p.case.geometry
    root = p.case.tree.num_tokens[geometry.order[0]]
    rest = len(geometry.token_end) - root
    if p.case.tree.parent.count(-1) != 1 or not root or not rest or p.pos[0] < root - 1:
        raise NotRunError("no common prefix")
    num_rows = p.q.shape[1]
    _check_mask(num_rows * rest, p)
    rows = slice(0, num_rows)
    mask = _rows_mask(p, 0, len(p.pos), np.arange(root, root + rest))
    if torch.isinf(mask).all(1).any():
        raise NotRunError("a query sees nothing below the prefix")
    calls = [
        _Call(0, rows, p.q[None], p.k[None, :, :root], p.v[None, :, :root], None),
        _Call(1, rows, p.q[None], p.k[None, :, root:], p.v[None, :, root:], mask),
    ]
    return _merged(p, calls, "prefix + mask")


# ------------------------------------------------------------------------------------------- one call for all


def _check_mask(elements: int, p: Prepared) -> None:
    size = elements * p.q.element_size()
    if size > MAX_MASK_BYTES:
        raise NotRunError(f"a mask of {size / 2**30:.1f} GiB")


def union_mask(p: Prepared) -> Contender:
    """One SDPA over all keys of the tree with a float mask."""
    num_tokens = p.k.shape[1]
    _check_mask(p.q.shape[1] * num_tokens, p)
    q, k, v = p.q[None], p.k[None], p.v[None]
    mask = _rows_mask(p, 0, len(p.pos), np.arange(num_tokens))
    some = mask if torch.isinf(mask).any() else None  # a chain needs no mask
    return Contender("union mask", lambda: F.scaled_dot_product_attention(q, k, v, some), p.unfold)


def flex(p: Prepared) -> Contender:
    """flex_attention with a block mask, compiled for this shape (half a minute, outside the timing)."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    group = p.case.group_size
    device = p.q.device
    pos = torch.from_numpy(p.pos.astype(np.int32)).repeat_interleave(group).to(device)
    end = torch.from_numpy(p.case.geometry.token_end.astype(np.int32)).to(device)

    def visible(_b: Any, _h: Any, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return (key <= pos[row]) & (pos[row] < end[key])

    q, k, v = p.q[None], p.k[None], p.v[None]
    block_mask = create_block_mask(visible, None, None, q.shape[2], k.shape[2], device=str(device))
    compiled = torch.compile(flex_attention, dynamic=False)
    try:
        compiled(q, k, v, block_mask=block_mask)
    except (
        Exception
    ) as error:  # a compiler is missing, or the shape is not supported: no peer, but no failure of ours
        raise NotRunError(f"flex_attention did not compile: {str(error).splitlines()[0][:80]}") from error
    return Contender("flex", lambda: compiled(q, k, v, block_mask=block_mask), p.unfold)


# ---------------------------------------------------------------------------------------------- per sequence


def per_sequence(p: Prepared) -> Contender:
    """Every query reads its own path, replicated beforehand; paths of equal length share a call."""
    case, geometry = p.case, p.case.geometry
    index = np.arange(len(geometry.token_end))
    paths = [index[(index <= pos) & (pos < geometry.token_end)] for pos in p.pos]
    lengths = np.array([len(path) for path in paths])
    size = 2 * int(lengths.sum()) * case.num_kv_heads * case.head_dim * p.k.element_size()
    if size > min(MAX_REPLICATED_BYTES, available_memory() // 8):
        raise NotRunError(f"{size / 2**30:.1f} GiB of replicated K and V")
    q = p.q.view(case.num_kv_heads, len(paths), case.group_size, -1).transpose(0, 1)
    calls = []
    for length in np.unique(lengths):
        members = np.flatnonzero(lengths == length)
        keys = torch.from_numpy(np.concatenate([paths[i] for i in members]))
        k, v = (x[:, keys].unflatten(1, (len(members), -1)).transpose(0, 1).contiguous() for x in (p.k, p.v))
        calls.append((torch.from_numpy(members), q[members].contiguous(), k, v))

    def run() -> list[torch.Tensor]:
        return [F.scaled_dot_product_attention(q, k, v) for _, q, k, v in calls]

    def read(parts: list[torch.Tensor]) -> torch.Tensor:
        out = torch.empty(len(paths), case.group_size, case.num_kv_heads, p.v.shape[2], dtype=p.v.dtype)
        for (members, *_), part in zip(calls, parts, strict=True):
            out[members] = part.transpose(1, 2)
        return p.unsort(out.flatten(0, 1))

    return Contender("per sequence", run, read)


# ------------------------------------------------------------------------------------------------ all of them


def upcast(peer: Callable[[Prepared], Contender], p: Prepared) -> Contender:
    """A bf16 peer that computes in fp32; K and V are stored in bf16, so converting them is timed."""
    wide = p._replace(q=p.q.float(), k=p.k.float(), v=p.v.float())
    inner = peer(wide)

    def run() -> Any:
        wide.k.copy_(p.k)
        wide.v.copy_(p.v)
        return inner.run()

    return Contender(f"{inner.name} fp32", run, inner.read)


def ours(case: Case, inputs: Inputs) -> Contender:
    """palmette.tree_attention on the token-major pool."""
    import palmette

    tree = palmette.Tree(case.tree.parent, case.tree.num_tokens, inputs.slots)
    queries: Any = case.queries
    if not isinstance(queries, str):
        queries = tuple(torch.tensor(part) for part in zip(*queries, strict=True))
    plan = palmette.plan_tree_attention(
        tree,
        queries,
        num_q_heads=case.num_q_heads,
        num_kv_heads=case.num_kv_heads,
        head_dim=case.head_dim,
        device=inputs.q.device,
    )
    q, k, v, _ = inputs
    return Contender("palmette", lambda: palmette.tree_attention(q, k, v, plan), lambda out: out)


def peers(
    case: Case, inputs: Inputs, *, with_flex: bool = False, more: Sequence[str] = ()
) -> tuple[list[Contender], dict[str, str]]:
    """All peers of a case, and for those that are not run the reason, by name.

    Args:
        case, inputs: The workload.
        with_flex: Whether to compile flex_attention.
        more: Further peers, "module:function" each: a function from ``Prepared`` to ``Contender`` that raises
            ``NotRunError`` where it cannot take part.
    """
    p = prepare(case, inputs)
    makers: dict[str, Callable[[Prepared], Contender]] = {
        "cascade": cascade,
        "prefix + mask": prefix_and_mask,
        "union mask": union_mask,
        "per sequence": per_sequence,
    }
    if case.torch_dtype != torch.float32:
        for name in ("cascade", "prefix + mask", "union mask"):
            makers[f"{name} fp32"] = functools.partial(upcast, makers[name])
    if with_flex:
        makers["flex"] = flex
    for name in more:
        module, _, function = name.partition(":")
        makers[name] = getattr(importlib.import_module(module), function)
    found, missing = [], {}
    for name, maker in makers.items():
        try:
            found.append(maker(p))
        except NotRunError as reason:
            missing[name] = str(reason)
    return found, missing
