# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention (NSA, arXiv 2502.11089) as a module."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from palmette._checks import check_at_least, check_indptr
from palmette._varlen import packed_ends, sequence_lengths
from palmette.nn.rotary import RotaryEmbedding
from palmette.nn.sparse_cache import SparseKVCache, packed_positions
from palmette.sparse_attention import (
    FEW_QUERIES,
    attend_branches,
    blocks_of_tokens,
    check_selection_sizes,
    compress,
    compressed_attention,
    select_blocks,
    selected_attention,
    sliding_window_attention,
)

Rope = Callable[[Tensor, Tensor], Tensor]

COMPRESSIONS = ("mean", "weighted", "linear")
GATES = ("head", "token")


@dataclass(frozen=True)
class SparseAttentionReport:
    """What the last call of a ``NativeSparseAttention`` did.

    Attributes:
        queries: tokens that were asked for.
        longest: tokens of the longest sequence.
        selection: ``"blocks"``, or ``"dense"``: no sequence is longer than topk blocks, so queries select all
            that they see, and the selected branch is plain causal attention.
        keys_read: keys that the three branches read at most, by whole blocks, for the last query of the
            longest sequence.
    """

    queries: int
    longest: int
    selection: str
    keys_read: int


class SparseBranches(nn.Module):
    """NSA's three branches and their gates, for modules that have projections of their own.

    What ``NativeSparseAttention`` does between its projections; its arguments, but for ``hidden_size``, which
    here is the width of what the gates see. Parameters: ``compress_key``, ``compress_value``,
    ``intra_block_pe`` and ``gate``.
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        topk: int = 16,
        init_blocks: int = 1,
        local_blocks: int = 2,
        window_size: int = 512,
        *,
        v_head_dim: int | None = None,
        gate: str = "head",
        separate_kv: bool = False,
        compression: str | tuple[nn.Module, nn.Module] = "linear",
        rope: Rope | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        v_dim = head_dim if v_head_dim is None else v_head_dim
        check_at_least(
            1,
            hidden_size=hidden_size,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_dim,
            window_size=window_size,
        )
        check_selection_sizes(kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks)
        if num_q_heads % num_kv_heads:
            raise ValueError(
                f"num_q_heads must be a multiple of num_kv_heads ({num_kv_heads}), got {num_q_heads}"
            )
        if gate not in GATES:
            raise ValueError(f"gate must be one of {', '.join(GATES)}, got {gate!r}")
        pair = isinstance(compression, (tuple, list)) and len(compression) == 2
        if not (
            all(isinstance(part, nn.Module) for part in compression) if pair else compression in COMPRESSIONS
        ):
            raise ValueError(
                f"compression must be one of {', '.join(COMPRESSIONS)} or a pair of modules, got "
                f"{compression!r}"
            )
        self.hidden_size, self.num_q_heads, self.num_kv_heads = hidden_size, num_q_heads, num_kv_heads
        self.head_dim, self.v_head_dim = head_dim, v_dim
        self.kernel_size, self.kernel_stride, self.block_size = kernel_size, kernel_stride, block_size
        self.topk, self.init_blocks, self.local_blocks = topk, init_blocks, local_blocks
        self.window_size, self.gate_kind, self.separate_kv = window_size, gate, separate_kv
        self.compression = compression if isinstance(compression, str) else "module"
        self.scale = scale
        self.report: SparseAttentionReport | None = None

        gates = 3 * num_q_heads if gate == "head" else 3
        self.gate = nn.Sequential(nn.Linear(hidden_size, gates, bias=False), nn.Sigmoid())
        self.compress_key: nn.Parameter | nn.Module | None
        self.compress_value: nn.Parameter | nn.Module | None
        if not isinstance(compression, str):
            self.compress_key, self.compress_value = compression
        elif compression == "linear":
            self.compress_key = nn.Parameter(torch.empty(num_kv_heads, kernel_size * head_dim, head_dim))
            self.compress_value = nn.Parameter(torch.empty(num_kv_heads, kernel_size * v_dim, v_dim))
        elif compression == "weighted":
            self.compress_key = nn.Parameter(torch.empty(num_kv_heads, kernel_size))
            self.compress_value = nn.Parameter(torch.empty(num_kv_heads, kernel_size))
        else:
            self.register_parameter("compress_key", None)
            self.register_parameter("compress_value", None)
        if self.compression == "linear":
            self.intra_block_pe: nn.Parameter | None = nn.Parameter(
                torch.empty(num_kv_heads, kernel_size, head_dim)
            )
        else:
            self.register_parameter("intra_block_pe", None)
        self.rope: Rope = RotaryEmbedding(head_dim) if rope is None else rope
        self.reset_branches()

    def branch_parameters(self) -> list[nn.Parameter]:
        """Those that ``reset_branches`` sets: not a subclass's projections."""
        return [*self.compression_parameters(), *self.gate.parameters()]

    def compression_parameters(self) -> list[nn.Parameter]:
        """Those of phi."""
        names = ("compress_key", "compress_value", "intra_block_pe")
        return [p for name, p in self.named_parameters() if name.partition(".")[0] in names]

    def reset_branches(self) -> None:
        """Compression starts near the mean of a block; the gates as ``nn.Linear`` does."""
        self.gate[0].reset_parameters()  # type: ignore[operator]
        for weight in (self.compress_key, self.compress_value):
            if not isinstance(weight, nn.Parameter):
                continue
            with torch.no_grad():
                if weight.dim() == 2:
                    weight.fill_(1.0 / self.kernel_size)
                else:
                    width = weight.shape[2]
                    eye = torch.eye(width, dtype=weight.dtype, device=weight.device)
                    mean = eye.repeat(self.kernel_size, 1) / self.kernel_size
                    noise = 0.1 / (self.kernel_size * width) ** 0.5
                    weight.copy_(mean + noise * torch.randn_like(weight))
        if self.intra_block_pe is not None:
            nn.init.normal_(self.intra_block_pe, std=0.02)

    def mix(
        self,
        x: Tensor,
        q: Tensor,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        cu_seqlens: Tensor,
        cache: SparseKVCache | None = None,
    ) -> Tensor:
        """The gated sum of the branches.

        Args:
            x: [T, hidden_size], packed sequences: what the gates see.
            q: [T, Hq, D], not turned by rope yet, as keys.
            keys, values: [T, Hk, D] and [T, Hk, Dv]: one each, or with ``separate_kv`` three (compressed,
                selected, window).
            cu_seqlens: [B + 1], on the CPU, where sequences begin.
            cache: what came before; is brought up to date.

        Returns:
            [T, Hq, Dv].

        Raises:
            ValueError: the cache is of other sequences.
        """
        counts = sequence_lengths(cu_seqlens)
        past, past_cmp = [0] * len(counts), [0] * len(counts)
        if cache is not None:
            cache.begin(len(counts))
            past, past_cmp = cache.past, cache.past_compressed
        goes_on = any(past)
        with_grad = torch.is_grad_enabled()
        if goes_on and with_grad:
            kept = (q, *keys, *values, *self.compression_parameters())
            if any(t.requires_grad for t in kept):
                raise ValueError("cache must be empty where gradients are wanted, got one that holds tokens")
        positions = packed_positions(past, counts).to(x.device)
        q = self.rope(q, positions)

        def remember(name: str, rows: Tensor, before: list[int], new: list[int]) -> Tensor:
            """All rows so far; the cache keeps copies, so that the first ones can have gradients."""
            if cache is None:
                return rows
            room = cache.max_length // (self.kernel_stride if name.endswith("_cmp") else 1)
            every = cache.append(name, rows, before, new, room)
            return every if goes_on else rows

        def starts(name: str) -> Tensor | None:
            return cache.starts(name) if cache is not None and goes_on else None

        # compressed keys, which are turned as if they stood where their blocks begin
        k_cmp, made = self._compress("key", keys[0], cu_seqlens, counts, cache)
        v_cmp, _ = self._compress("value", values[0], cu_seqlens, counts, cache)
        if any(made):
            k_cmp = self.rope(k_cmp, self.kernel_stride * packed_positions(past_cmp, made).to(x.device))
        k_cmp, v_cmp = remember("k_cmp", k_cmp, past_cmp, made), remember("v_cmp", v_cmp, past_cmp, made)
        lengths, lengths_cmp = (
            [a + n for a, n in zip(before, new, strict=True)]
            for before, new in ((past, counts), (past_cmp, made))
        )
        tokens, ends_cmp = packed_ends(lengths), packed_ends(lengths_cmp)
        # the two branches that read tokens
        names = ("slc", "win") if self.separate_kv else ("tok",)
        pairs = [
            (
                remember(f"k_{name}", self.rope(k, positions), past, counts),
                remember(f"v_{name}", v, past, counts),
            )
            for name, k, v in zip(names, keys[-len(names) :], values[-len(names) :], strict=True)
        ]
        pairs = [(k_cmp, v_cmp), pairs[0], pairs[-1]]
        begins = starts("k_cmp"), starts(f"k_{names[0]}"), starts(f"k_{names[-1]}")
        longest = max(lengths, default=0)
        dense = longest <= self.topk * self.block_size
        gates = self.gate(x).unflatten(-1, (3, -1))  # [T, 3, Hq or 1]
        needs_grad = with_grad and any(t.requires_grad for t in (q, gates, *itertools.chain(*pairs)))
        few = q.device.type == "cpu" and q.shape[0] <= FEW_QUERIES and gates.dtype == q.dtype
        if few and not needs_grad:
            mixed = attend_branches(
                q,
                pairs[0],
                pairs[1],
                pairs[2],
                gates,
                cu_seqlens,
                ends_cmp,
                tokens,
                kernel_size=self.kernel_size,
                kernel_stride=self.kernel_stride,
                block_size=self.block_size,
                topk=self.topk,
                init_blocks=self.init_blocks,
                local_blocks=self.local_blocks,
                window_size=self.window_size,
                scale=self.scale,
                starts=begins,
            )
        else:
            mixed = self._attend_and_mix(
                q,
                pairs,
                gates,
                cu_seqlens,
                ends_cmp,
                tokens,
                begins,
                dense_window=max(1, longest) if dense else None,
                in_place=gates.dtype == q.dtype and not needs_grad,
            )

        if cache is not None:
            cache.advance(counts, made)
        self.report = SparseAttentionReport(
            queries=x.shape[0],
            longest=longest,
            selection="dense" if dense else "blocks",
            keys_read=max(lengths_cmp, default=0)
            + min(longest, self.topk * self.block_size)
            + min(longest, self.window_size),
        )
        return mixed

    def _attend_and_mix(
        self,
        q: Tensor,
        pairs: Sequence[tuple[Tensor, Tensor]],
        gates: Tensor,
        cu_seqlens: Tensor,
        ends_cmp: Tensor,
        tokens: Tensor,
        begins: Sequence[Tensor | None],
        *,
        dense_window: int | None,
        in_place: bool,
    ) -> Tensor:
        """What ``attend_branches`` does, branch by branch, differentiable; pairs and begins as there.

        dense_window: of the selected branch, where every query selects all blocks.
        in_place: whether results may be added up where they are: new memory for a long sequence would cost
            more than the sum.
        """
        (k_cmp, v_cmp), selected_pair, window_pair = pairs
        sizes: dict[str, Any] = {
            "kernel_size": self.kernel_size,
            "kernel_stride": self.kernel_stride,
            "cu_seqlens_k": tokens,
            "cmp_starts": begins[0],
            "scale": self.scale,
        }
        where: list[dict[str, Any]] = [
            {"cu_seqlens_k": tokens, "k_starts": begin, "scale": self.scale} for begin in begins[1:]
        ]
        compressed, lse = compressed_attention(q, k_cmp, v_cmp, cu_seqlens, ends_cmp, **sizes)
        if dense_window is not None:
            selected = sliding_window_attention(
                q, *selected_pair, cu_seqlens, window=dense_window, **where[0]
            )
        else:
            index = select_blocks(
                q,
                k_cmp,
                lse,
                cu_seqlens,
                ends_cmp,
                block_size=self.block_size,
                topk=self.topk,
                init_blocks=self.init_blocks,
                local_blocks=self.local_blocks,
                **sizes,
            )
            selected = selected_attention(
                q, *selected_pair, index, cu_seqlens, block_size=self.block_size, **where[0]
            )
        assert isinstance(selected, Tensor)
        gates = gates.unsqueeze(-1)
        if in_place:
            mixed = compressed.mul_(gates[:, 0]).addcmul_(gates[:, 1], selected)
        else:
            mixed = torch.addcmul(gates[:, 0] * compressed, gates[:, 1], selected)
        windowed = sliding_window_attention(
            q,
            *window_pair,
            cu_seqlens,
            window=self.window_size,
            out=selected if in_place else None,
            **where[1],
        )
        assert isinstance(windowed, Tensor)
        return mixed.addcmul_(gates[:, 2], windowed) if in_place else mixed.addcmul(gates[:, 2], windowed)

    def _compress(
        self, which: str, x: Tensor, ends: Tensor, counts: list[int], cache: SparseKVCache | None
    ) -> tuple[Tensor, list[int]]:
        """Compressed rows that the tokens complete, packed, and how many each sequence gets."""
        weight = self.compress_key if which == "key" else self.compress_value
        position = self.intra_block_pe if which == "key" else None

        def run(raw: Tensor, raw_ends: Tensor) -> tuple[Tensor, Tensor]:
            sizes = {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}
            if isinstance(weight, nn.Module):
                windows, window_ends = blocks_of_tokens(raw, raw_ends, **sizes)
                return weight(windows), window_ends
            # Under autocast the projections are of 16 bits and parameters are not; compress adds in float32.
            phi, place = (None if p is None else p.to(raw.dtype) for p in (weight, position))
            with torch.autocast(raw.device.type, enabled=False):
                return compress(raw, phi, place, raw_ends, **sizes)

        if cache is not None:
            return cache.compress(which, x, counts, self.kernel_size, self.kernel_stride, run)
        y, y_ends = run(x, ends)
        return y, y_ends.diff().tolist()

    def extra_repr(self) -> str:
        return (
            f"{self.hidden_size}, {self.num_q_heads}, {self.num_kv_heads}, {self.head_dim}, "
            f"kernel_size={self.kernel_size}, kernel_stride={self.kernel_stride}, "
            f"block_size={self.block_size}, topk={self.topk}, window_size={self.window_size}, "
            f"gate={self.gate_kind}, separate_kv={self.separate_kv}, compression={self.compression}"
        )


class NativeSparseAttention(SparseBranches):
    """Causal attention that reads compressed keys, the blocks that these point at, and a window.

    ``out = proj_o(g_cmp * compressed + g_slc * selected + g_win * window)`` with ``g = sigmoid(gate(x))``.

    Args:
        hidden_size: width of x.
        num_q_heads, num_kv_heads, head_dim: of q and k; num_q_heads is a multiple of num_kv_heads.
        kernel_size, kernel_stride: tokens of a compressed key, and from one to the next.
        block_size: keys of a block of the selection. kernel_stride divides kernel_size and block_size.
        topk: blocks that a query reads at most, init_blocks + local_blocks of them always.
        init_blocks, local_blocks: blocks at the begin of the sequence, and up to the query's own.
        window_size: keys of the sliding window, the query's own included.
        v_head_dim: of v. Default: head_dim.
        gate: ``"head"``: three gates per query head, as in NSA; ``"token"``: three per token, as in FSA's
            module. Default: ``"head"``.
        separate_kv: K and V of their own for each branch, as in NSA; otherwise all branches share one pair,
            as in FSA's module. Default: False.
        compression: ``"mean"``, ``"weighted"`` or ``"linear"`` (a learnt map of a whole block, with an
            embedding of the place within it added to K), or a pair of modules for K and V that map blocks
            [C, Hk, kernel_size, D] to [C, Hk, D]. Default: ``"linear"``.
        rope: ``rope(x [T, heads, D], positions [T]) -> x``, for q, k, and compressed k, which is rotated as
            at the first token of its block; ``nn.Identity``-like functions are fine. Default:
            ``RotaryEmbedding(head_dim)``.
        scale: factor of the logits, of all branches. Default: head_dim ** -0.5.

    Attributes:
        report: what the last call did (``SparseAttentionReport``), None before the first.

    The names and shapes of parameters are those of FSA's module: a state dict of FSA or of XunhaoLai's code
    loads with ``gate="token"``.

    Raises:
        ValueError: sizes do not divide each other, or an option is unknown.

    Source: NSA (arXiv 2502.11089), section 3; FSA (arXiv 2508.18224).
    """

    def __init__(
        self,
        hidden_size: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        kernel_size: int = 32,
        kernel_stride: int = 16,
        block_size: int = 64,
        topk: int = 16,
        init_blocks: int = 1,
        local_blocks: int = 2,
        window_size: int = 512,
        *,
        v_head_dim: int | None = None,
        gate: str = "head",
        separate_kv: bool = False,
        compression: str | tuple[nn.Module, nn.Module] = "linear",
        rope: Rope | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__(
            hidden_size,
            num_q_heads,
            num_kv_heads,
            head_dim,
            kernel_size,
            kernel_stride,
            block_size,
            topk,
            init_blocks,
            local_blocks,
            window_size,
            v_head_dim=v_head_dim,
            gate=gate,
            separate_kv=separate_kv,
            compression=compression,
            rope=rope,
            scale=scale,
        )
        branches = 3 if separate_kv else 1
        self.proj_q = nn.Linear(hidden_size, num_q_heads * head_dim, bias=False)
        self.proj_k = nn.Linear(hidden_size, branches * num_kv_heads * head_dim, bias=False)
        self.proj_v = nn.Linear(hidden_size, branches * num_kv_heads * self.v_head_dim, bias=False)
        self.proj_o = nn.Linear(num_q_heads * self.v_head_dim, hidden_size, bias=False)

    def reset_parameters(self) -> None:
        """Compression starts near the mean of a block; projections and gates as ``nn.Linear`` does."""
        for linear in (self.proj_q, self.proj_k, self.proj_v, self.proj_o):
            linear.reset_parameters()
        self.reset_branches()

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, cache: SparseKVCache | None = None
    ) -> Tensor:
        """Attention of every token to those before it.

        Args:
            x: [T, hidden_size], packed sequences; or [B, N, hidden_size].
            cu_seqlens: [B + 1], where packed sequences begin. Default: one sequence, or those of a batch.
            cache: what came before, to go on from; is brought up to date. Gradients only while it is empty,
                and not to what it keeps. Default: none.

        Returns:
            As x.

        Raises:
            ValueError: x or cu_seqlens have another shape, or the cache holds other sequences.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.hidden_size:
            raise ValueError(
                f"x must be [T, {self.hidden_size}] or [B, N, {self.hidden_size}], got {list(x.shape)}"
            )
        if x.dim() == 3:
            if cu_seqlens is not None:
                raise ValueError("cu_seqlens must be None for x [B, N, hidden], got a tensor")
            batch, length = x.shape[:2]
            ends = torch.arange(batch + 1, dtype=torch.int32) * length
            return self._forward(x.flatten(0, 1), ends, cache).view(batch, length, self.hidden_size)
        if cu_seqlens is None:
            cu_seqlens = torch.tensor([0, x.shape[0]], dtype=torch.int32)
        ends = check_indptr("cu_seqlens", cu_seqlens, x.device)
        starts = ends.tolist()
        if starts[0] != 0 or starts[-1] != x.shape[0] or starts != sorted(starts):
            raise ValueError(
                f"cu_seqlens must be non-decreasing from 0 to {x.shape[0]} (rows of x), got {starts}"
            )
        return self._forward(x, ends, cache)

    def _forward(self, x: Tensor, ends: Tensor, cache: SparseKVCache | None) -> Tensor:
        q = self.proj_q(x).unflatten(-1, (self.num_q_heads, self.head_dim))
        keys = self.proj_k(x).unflatten(-1, (-1, self.num_kv_heads, self.head_dim)).unbind(1)
        values = self.proj_v(x).unflatten(-1, (-1, self.num_kv_heads, self.v_head_dim)).unbind(1)
        return self.proj_o(self.mix(x, q, keys, values, ends, cache).flatten(1))  # type: ignore[no-any-return]
