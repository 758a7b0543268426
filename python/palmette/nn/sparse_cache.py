# SPDX-License-Identifier: Apache-2.0
"""What a sparse attention layer remembers of the tokens before."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from palmette._checks import INDEX, check_at_least, check_dim, check_dtype
from palmette._varlen import packed_ends

# A step of decoding: fewer calls of torch take less time than anything that they do.
_FEW_ROWS = 64

Compress = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def packed_positions(past: list[int], counts: list[int]) -> Tensor:
    """Of the rows of packed sequences, each of which goes on behind ``past`` others."""
    if sum(counts) <= _FEW_ROWS:
        return torch.tensor(
            [i for a, n in zip(past, counts, strict=True) for i in range(a, a + n)], dtype=torch.int64
        )
    return torch.cat([torch.arange(a, a + n) for a, n in zip(past, counts, strict=True)])


class SparseKVCache:
    """K, V, compressed K and V, and the raw tokens of the window that is not full yet, of B sequences.

    For one layer. Sequences may be of different lengths and grow by different amounts: prefill in chunks of
    any size, or a step at a time. Memory grows geometrically.

    Args:
        max_length: tokens per sequence to make room for at once. Default: 0, as they come.

    Attributes:
        past, past_compressed: tokens, and compressed rows, of each sequence; empty before the first use.
    """

    def __init__(self, max_length: int = 0) -> None:
        check_at_least(0, max_length=max_length)
        self.max_length = max_length
        self.past: list[int] = []
        self.past_compressed: list[int] = []
        self._coming: dict[str, list[Tensor]] = {}  # tails as they are once the call that makes them ends
        self._rows: dict[str, Tensor] = {}  # [B, capacity, Hk, width] by name
        self._tails: dict[str, list[Tensor]] = {}  # raw tokens from the begin of the next window on
        self._empty: dict[str, Tensor] = {}  # no compressed rows, in their shape
        # K and V go to the same places: the last ones asked for, and what for
        self._places: tuple[object, Tensor] | None = None
        self._starts: dict[int, Tensor] = {}  # by capacity

    def __len__(self) -> int:
        """Sequences."""
        return len(self.past)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, int32 [B], on the CPU."""
        return torch.tensor(self.past, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes that are reserved."""
        tails = sum(t.nbytes for parts in self._tails.values() for t in parts)
        return sum(rows.nbytes for rows in self._rows.values()) + tails

    def begin(self, num_sequences: int) -> None:
        """Makes room for that many sequences, or says that there are others.

        Raises:
            ValueError: the cache holds another number of sequences.
        """
        self._coming = {}
        if not any(self.past) and len(self) != num_sequences:
            self.past, self.past_compressed = [0] * num_sequences, [0] * num_sequences
            self._rows, self._tails = {}, {}
        elif len(self) != num_sequences:
            raise ValueError(f"cache must be of {num_sequences} sequences, got one of {len(self)}")

    def starts(self, name: str) -> Tensor:
        """Where each sequence's rows begin in what ``append`` returned, int64 [B]."""
        capacity = self._rows[name].shape[1]
        known = self._starts.get(capacity)
        if known is None or len(known) != len(self):
            known = self._starts[capacity] = torch.arange(len(self)) * capacity
        return known

    def append(self, name: str, x: Tensor, before: list[int], counts: list[int], room: int = 0) -> Tensor:
        """Puts the rows of packed sequences behind the ``before`` rows that each has; returns all rows.

        room: rows of a sequence to make room for at once.

        Returns:
            [B * capacity, Hk, width], the memory of the cache itself.
        """
        needed = max((a + n for a, n in zip(before, counts, strict=True)), default=0)
        rows = self._rows.get(name)
        if rows is not None and any(self.past):
            self._check_rows(rows, x)
        elif rows is not None and (rows.shape[2:] != x.shape[1:] or rows.dtype != x.dtype):
            rows = None  # of a call that failed
        if rows is None or rows.shape[1] < needed:
            capacity = max(needed + needed // 2, 16)
            if rows is None:
                capacity = max(needed, room, 16)
            grown = x.new_zeros(len(self), capacity, *x.shape[1:])
            if rows is not None:
                grown[:, : rows.shape[1]] = rows
            rows = self._rows[name] = grown
        every = rows.flatten(0, 1)
        if not any(counts):
            return every
        wanted = (rows.shape[1], tuple(before), tuple(counts), x.device)
        if self._places is None or self._places[0] != wanted:
            begins = [b * rows.shape[1] + a for b, a in enumerate(before)]
            self._places = wanted, packed_positions(begins, counts).to(x.device)
        return every.index_copy_(0, self._places[1], x.detach())

    def advance(self, counts: list[int], compressed: list[int]) -> None:
        """Says that so many tokens, and compressed rows, of each sequence have come.

        Until then a call may fail: the cache is as it was.
        """
        self._tails |= self._coming
        self._coming = {}
        self.past = [a + n for a, n in zip(self.past, counts, strict=True)]
        self.past_compressed = [a + n for a, n in zip(self.past_compressed, compressed, strict=True)]

    def compress(
        self, name: str, x: Tensor, counts: list[int], size: int, stride: int, function: Compress
    ) -> tuple[Tensor, list[int]]:
        """Compressed rows that the raw tokens ``x`` complete, packed, and how many of each sequence.

        Args:
            name: whose tail of raw tokens it is.
            x: [sum(counts), Hk, width].
            counts: tokens of each sequence.
            size, stride: of the windows.
            function: raw tokens and cu_seqlens -> compressed rows and where each sequence's begin.
        """
        old = (self._tails.get(name) if any(self.past) else None) or [x[:0]] * len(counts)
        if old:
            self._check_rows(old[0], x)
        raw = [torch.cat([a, b]) for a, b in zip(old, x.split(counts), strict=True)]
        if any(self.past) and all(len(r) < size for r in raw):  # most steps of decoding
            self._coming[name] = [r.detach() for r in raw]
            return self._empty[name], [0] * len(counts)
        y, y_ends = function(torch.cat(raw) if raw else x, packed_ends([len(r) for r in raw]))
        self._empty[name] = y[:0].detach()
        made: list[int] = y_ends.diff().tolist()
        self._coming[name] = [r[n * stride :].detach().clone() for r, n in zip(raw, made, strict=True)]
        return y, made

    def _check_rows(self, have: Tensor, x: Tensor) -> None:
        """Raises ValueError unless x may stand behind what the cache has."""
        if have.shape[-2:] != x.shape[-2:] or have.dtype != x.dtype:
            raise ValueError(
                f"cache must be of rows {list(x.shape[-2:])} of {x.dtype} as the tokens are, got one of "
                f"{list(have.shape[-2:])} of {have.dtype}"
            )

    def reorder(self, index: Tensor) -> None:
        """Sequence i becomes what sequence ``index[i]`` was, as beam search asks.

        Args:
            index: [B'], integers in [0, B).

        Raises:
            ValueError: index is of other sequences than the cache has.
        """
        check_dtype("index", index, INDEX)
        check_dim("index", index, "[B]")
        order: list[int] = index.tolist()
        for i in order:
            if not 0 <= i < len(self):
                raise ValueError(
                    f"index must be within [0, {len(self)}), the sequences of the cache, got {i}"
                )
        self.past = [self.past[i] for i in order]
        self.past_compressed = [self.past_compressed[i] for i in order]
        for name, rows in self._rows.items():
            self._rows[name] = rows[index.to(rows.device)]
        for name, parts in self._tails.items():
            self._tails[name] = [parts[i].clone() for i in order]
