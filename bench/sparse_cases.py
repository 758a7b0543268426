# SPDX-License-Identifier: Apache-2.0
"""Workloads of sparse attention: sizes, tensors, selections, FLOPs, and float64 results of a few rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

# NSA's sizes (arXiv 2502.11089, section 4.1)
COMPRESSION = {"kernel_size": 32, "kernel_stride": 16}
SELECTION = {"block_size": 64, "topk": 16, "init_blocks": 1, "local_blocks": 2}
SIZES = {**COMPRESSION, **SELECTION, "window_size": 512}
BLOCK, TOPK = 64, 16

# q k and p v in the forward; q k again, dO v, and three products that sum into dQ, dK and dV in the backward
BACKWARD_FACTOR = 3.5

_CHUNK = 1024  # queries whose selection is drawn at once
_DRIFT = 256  # queries after which a real-like selection has nothing to do with what it was


@dataclass(frozen=True)
class SparseCase:
    """One workload.

    Attributes:
        group: Key into ``bench.goals.SPARSE_GOALS``.
        tokens: Of a sequence.
        num_q_heads, num_kv_heads, head_dim, dtype: Of q, k and v.
        selection: "random" or "real-like", where the case does not choose by itself.
        compression: Of ``SparseBranches``.
        batch: Sequences.
    """

    group: str
    tokens: int
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    dtype: str = "float32"
    selection: str = ""
    compression: str = "mean"
    batch: int = 1

    @property
    def name(self) -> str:
        size = f"{self.tokens // 1024}k" if self.tokens % 1024 == 0 else str(self.tokens)
        parts = [f"sparse {self.group} {size} heads {self.num_q_heads}/{self.num_kv_heads} D{self.head_dim}"]
        parts += [self.selection] if self.selection else []
        parts += [self.compression] if self.compression != "mean" else []
        parts += [f"batch {self.batch}"] if self.batch > 1 else []
        parts += [self.dtype] if self.dtype != "float32" else []
        return " ".join(parts)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, self.tokens], dtype=torch.int32)

    @property
    def flops_per_pair(self) -> int:
        """Of q k and p v, over the heads that share a (query, key) pair of a KV head."""
        return 4 * self.head_dim * self.group_size

    @property
    def dense_flops(self) -> int:
        """Of causal attention."""
        return self.flops_per_pair * self.num_kv_heads * (self.tokens * (self.tokens + 1) // 2)

    @cached_property
    def sparse_flops(self) -> int:
        """Of the three branches of NSA: visible pairs only, and selecting costs nothing."""
        t = torch.arange(self.tokens)
        size, stride = COMPRESSION["kernel_size"], COMPRESSION["kernel_stride"]
        compressed = ((t + 1 - size) // stride + 1).clamp(min=0)
        selected = torch.where(t // BLOCK < TOPK, t + 1, (TOPK - 1) * BLOCK + t % BLOCK + 1)
        window = (t + 1).clamp(max=SIZES["window_size"])
        pairs = int((compressed + selected + window).sum())
        return self.flops_per_pair * self.num_kv_heads * pairs

    def selected_flops(self, index: Tensor) -> int:
        """Of the visible keys of chosen blocks."""
        t = torch.arange(self.tokens)[None, :, None]
        seen = (t + 1 - index * BLOCK).clamp(0, BLOCK).masked_fill(index < 0, 0)
        return self.flops_per_pair * int(seen.sum())


class Inputs(NamedTuple):
    """Token-major tensors of packed sequences."""

    q: Tensor  # [B * N, Hq, D]
    k: Tensor  # [B * N, Hk, D]
    v: Tensor
    gates: Tensor  # [B * N, 3 * Hq], in (0, 1)


def make_inputs(case: SparseCase) -> Inputs:
    draw = torch.Generator().manual_seed(case.tokens)
    rows = case.batch * case.tokens
    dtype = case.torch_dtype

    def normal(heads: int) -> Tensor:
        return torch.randn(rows, heads, case.head_dim, generator=draw).to(dtype)

    q, k, v = normal(case.num_q_heads), normal(case.num_kv_heads), normal(case.num_kv_heads)
    return Inputs(q, k, v, torch.rand(rows, 3 * case.num_q_heads, generator=draw).to(dtype))


# ------------------------------------------------------------------------------------------------ selections


def make_selection(case: SparseCase) -> Tensor:
    """block_index int32 [Hk, N, topk]: init and local blocks, and the best of the visible others.

    "random": independent for every query and head. "real-like": by scores that drift from query to query,
    so that neighbours share most of their blocks (``shared_blocks`` says how many).
    """
    draw = torch.Generator().manual_seed(1)
    blocks = -(-case.tokens // BLOCK)
    knots = torch.randn(case.num_kv_heads, case.tokens // _DRIFT + 2, blocks, generator=draw)
    parts = []
    for begin in range(0, case.tokens, _CHUNK):
        t = torch.arange(begin, min(begin + _CHUNK, case.tokens))
        if case.selection == "random":
            score = torch.rand(case.num_kv_heads, len(t), blocks, generator=draw)
        else:
            part = (t % _DRIFT / _DRIFT)[:, None]
            score = torch.lerp(knots[:, t // _DRIFT], knots[:, t // _DRIFT + 1], part)
            score += 0.05 * torch.randn(score.shape, generator=draw)
        parts.append(_best_blocks(score, t // BLOCK))
    return torch.cat(parts, 1)


def _best_blocks(score: Tensor, own: Tensor) -> Tensor:
    block, own = torch.arange(score.shape[2]), own[:, None]
    forced = (block < SELECTION["init_blocks"]) | (block > own - SELECTION["local_blocks"])
    score = score.masked_fill(forced, torch.inf).masked_fill(block > own, -torch.inf)
    best = score.topk(min(TOPK, score.shape[2]), -1)
    index = best.indices.masked_fill(best.values == -torch.inf, score.shape[2]).sort(-1).values
    index = torch.nn.functional.pad(index, (0, TOPK - index.shape[2]), value=score.shape[2])
    return index.masked_fill(index == score.shape[2], -1).int()


def shared_blocks(index: Tensor) -> float:
    """The part of a query's blocks that the query before it has too, in the mean."""
    a, b = index[:, 1:], index[:, :-1]
    same = (a[..., :, None] == b[..., None, :]) & (a >= 0)[..., None]
    return float(same.any(-1).sum() / (a >= 0).sum())


# --------------------------------------------------------------------------------------------------- float64

MAX_ROWS = 12
# Largest error against float64: about ten times what is measured.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Scores nearer to each other than this part of themselves may change places by rounding.
_TIE = 2e-5


def sample(tokens: int, last: int = 0) -> list[int]:
    """Queries to check: some from the first to the last, and the ``last`` ones."""
    some = torch.linspace(0, tokens - 1, min(tokens, MAX_ROWS)).long().tolist()
    return sorted({*some, *range(tokens - last, tokens)})


def dense_rows(inputs: Inputs, rows: Sequence[int], head: int | None = None) -> Tensor:
    """float64 [rows, Hq, Dv] of causal attention; arguments as for ``mixed_rows``."""
    offset, kv_heads = inputs.k.shape[0] - inputs.q.shape[0], inputs.k.shape[1]
    result = []
    for t in rows:
        q, k, v = inputs.q[t - offset], inputs.k[: t + 1], inputs.v[: t + 1]
        if head is not None:
            q, k, v = q.chunk(kv_heads)[head], k[:, head : head + 1], v[:, head : head + 1]
        result.append(_attend(q, k, v))
    return torch.stack(result)


def selected_rows(inputs: Inputs, index: Tensor, rows: Sequence[int]) -> Tensor:
    """float64 [rows, Hq, Dv] of attention to chosen blocks."""
    result = []
    for t in rows:
        heads = []
        for h, q in enumerate(inputs.q[t].chunk(inputs.k.shape[1])):
            keys = [k for b in index[h, t].tolist() if b >= 0 for k in range(b * BLOCK, (b + 1) * BLOCK)]
            keys = [k for k in keys if k <= t]
            heads.append(_attend(q, inputs.k[keys, h : h + 1], inputs.v[keys, h : h + 1]))
        result.append(torch.cat(heads))
    return torch.stack(result)


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[Hq, D], [n, Hk, D], [n, Hk, Dv] -> float64 [Hq, Dv]; zero without keys."""
    q, k, v = q.double().unflatten(0, (k.shape[1], -1)), k.double(), v.double()
    p = (torch.einsum("hgd,nhd->hgn", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hgn,nhd->hgd", p, v).flatten(0, 1)


def mixed_rows(
    inputs: Inputs, k_cmp: Tensor, v_cmp: Tensor, rows: Sequence[int], head: int | None = None
) -> tuple[Tensor, Tensor]:
    """float64 [rows, Hq, Dv] of NSA's gated sum, and bool [rows, Hq]: where rounding cannot change a choice.

    Args:
        inputs: Of one sequence; float64 with gradients is fine. Row t of k and v belongs to token t, the last
            row of q and gates to the last token.
        k_cmp, v_cmp: [C, Hk, D].
        rows: Tokens.
        head: Only the query heads of this KV head.
    """
    from palmette.reference import sparse_attention as reference

    kv_heads = inputs.k.shape[1]
    offset = inputs.k.shape[0] - inputs.q.shape[0]
    results, certain = [], []
    for t in rows:
        count = reference.num_compressed(t + 1, **COMPRESSION)
        q, gates = inputs.q[t - offset], inputs.gates[t - offset].view(3, -1)
        out, sure = [], []
        for h in range(kv_heads) if head is None else (head,):
            group = slice(h * (len(q) // kv_heads), (h + 1) * (len(q) // kv_heads))
            mine, k, v = q[None, group].double(), inputs.k[: t + 1, h : h + 1], inputs.v[: t + 1, h : h + 1]
            kc, vc = (x[:count, h : h + 1].double() for x in (k_cmp, v_cmp))
            compressed = _attend(mine[0], kc, vc) if count else torch.zeros_like(mine[0])
            scores = reference.block_scores(
                mine.detach(), kc.detach(), t + 1, **COMPRESSION, block_size=BLOCK
            )
            index = _best_blocks(scores, torch.tensor([t // BLOCK]))[0, 0]
            chosen = index[index >= 0].long()
            keys = (chosen[:, None] * BLOCK + torch.arange(BLOCK)).flatten()
            keys = keys[keys <= t]
            selected = _attend(mine[0], k[keys], v[keys])
            first = max(0, t + 1 - SIZES["window_size"])
            window = _attend(mine[0], k[first:], v[first:])
            g = gates[:, group, None].double()
            out.append(g[0] * compressed + g[1] * selected + g[2] * window)
            sure.append(torch.full((len(mine[0]),), _is_sure(scores[0, 0], chosen, t // BLOCK)))
        results.append(torch.cat(out))
        certain.append(torch.cat(sure))
    return torch.stack(results), torch.stack(certain)


def _is_sure(scores: Tensor, chosen: Tensor, own: int) -> bool:
    """Whether the worst block that was chosen for its score is clearly better than the best that was not."""
    if own < TOPK:
        return True
    free = scores[SELECTION["init_blocks"] : own + 1 - SELECTION["local_blocks"]]
    best = free.sort(descending=True).values
    kept = TOPK - SELECTION["init_blocks"] - SELECTION["local_blocks"]
    return bool(best[kept - 1] - best[kept] > _TIE * best[kept - 1])


def check(name: str, got: Tensor, want: Tensor, dtype: torch.dtype, where: Tensor | None = None) -> float:
    """The largest error, in units of the largest value where that is above 1.

    Raises:
        AssertionError: It is too large: what would be timed is not this attention.
    """
    error = (got.double() - want.double()).abs()
    if where is not None:
        error = error[where]
    worst = float(error.max() / want.abs().max().clamp(min=1.0)) if error.numel() else 0.0
    if not worst <= TOLERANCE[dtype]:
        raise AssertionError(f"{name} is off by {worst:.3g}, at most {TOLERANCE[dtype]} is right")
    return worst


# ---------------------------------------------------------------------------------------------------- suites

ROUNDS = {"quick": 2, "default": 3, "full": 7}


def rounds(suite: str, tokens: int) -> int:
    """Of timing: long contexts take a minute a call."""
    wanted = ROUNDS[suite]
    if tokens >= 65536:
        return min(wanted, 1)
    return min(wanted, 2) if tokens >= 32768 else wanted if tokens >= 16384 else wanted + 2


_HEADS = {1: (8, 8), 2: (8, 4), 4: (8, 2), 8: (8, 1), 16: (16, 1)}


def _heads(group_size: int) -> dict[str, int]:
    return dict(zip(("num_q_heads", "num_kv_heads"), _HEADS[group_size], strict=True))


def _selected(suite: str) -> list[SparseCase]:
    lengths = (8192,) if suite == "quick" else (8192, 16384)
    groups = (1, 2, 4, 8, 16) if suite == "full" else (1, 4)
    cases = [
        SparseCase("selected", tokens, **_heads(group), selection=selection)
        for tokens in lengths
        for group in groups
        for selection in ("random", "real-like")
    ]
    if suite == "full":
        cases += [replace(case, head_dim=128) for case in cases if case.group_size in (1, 4)]
    return cases


def _forward(suite: str) -> list[SparseCase]:
    lengths = {
        "quick": (4096, 8192),
        "default": (2048, 4096, 8192, 16384, 32768, 65536),
        "full": (2048, 4096, 8192, 16384, 32768, 65536),
    }[suite]
    cases = [SparseCase("forward", tokens) for tokens in lengths]
    if suite == "full":
        cases += [SparseCase("forward", tokens, compression="linear") for tokens in lengths]
        cases += [SparseCase("forward", n, **_heads(group)) for group in (1, 16) for n in lengths[:-1]]
    return cases


def _training(suite: str) -> list[SparseCase]:
    lengths = {
        "quick": (2048, 4096),
        "default": (2048, 4096, 8192, 16384, 32768, 65536),
        "full": (2048, 4096, 8192, 16384, 32768, 65536),
    }[suite]
    return [SparseCase("training", tokens) for tokens in lengths]


def _decode(suite: str) -> list[SparseCase]:
    sizes: tuple[dict[str, Any], ...] = ({}, {"num_q_heads": 32, "num_kv_heads": 8, "head_dim": 128})
    return [
        SparseCase("decode", 65536, **size, batch=batch, dtype=dtype)
        for size in sizes[: 1 if suite == "quick" else 2]
        for batch in ((1,) if suite == "quick" else (1, 4))
        for dtype in ("float32", "bfloat16")
    ]


_SUITES: dict[str, Callable[[str], list[SparseCase]]] = {
    "selected": _selected,
    "forward": _forward,
    "training": _training,
    "decode": _decode,
}


def sparse_cases(suite: str = "default") -> list[SparseCase]:
    """Cases of a suite, group by group."""
    return [case for make in _SUITES.values() for case in make(suite)]
