# SPDX-License-Identifier: Apache-2.0
"""The path from a root to where the walk is: its keys and values, and attention behind them."""

from __future__ import annotations

import torch
from torch import Tensor

from palmette._attend import attend, state_dtype
from palmette.prefix_attention import PrefixPlan, plan_prefix_attention, prefix_attention
from palmette.tree import Tree


class PrefixStack:
    """Keys, values and their gradients of the tokens on one path from a root, for all layers.

    Row i is the path's i-th token. A path grows and shrinks at its end, so a prefix of any depth is a view.

    Args:
        capacity: tokens of the longest path.
        gradients: keep sums of gradients too, in float32 (float64 for float64 keys).
    """

    def __init__(self, capacity: int, gradients: bool) -> None:
        self.capacity, self.gradients = capacity, gradients
        self._keys: dict[int, tuple[Tensor, Tensor]] = {}
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}
        self._storages: set[int] = set()

    def prefix(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the first ``length`` tokens."""
        k, v = self._keys[layer]
        return k[:length], v[:length]

    def sums(self, layer: int, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Sums of their gradients, views."""
        k, v = self._sums[layer]
        return k[begin:end], v[begin:end]

    def write(self, layer: int, begin: int, k: Tensor, v: Tensor) -> None:
        """Tokens from ``begin`` on, with sums of 0."""
        if layer not in self._keys:
            self._keys[layer] = tuple(x.new_empty((self.capacity, *x.shape[1:])) for x in (k, v))  # type: ignore[assignment]
            if self.gradients:
                self._sums[layer] = tuple(  # type: ignore[assignment]
                    x.new_empty((self.capacity, *x.shape[1:]), dtype=state_dtype(x.dtype)) for x in (k, v)
                )
            pools = (*self._keys[layer], *self._sums.get(layer, ()))
            self._storages |= {t.untyped_storage().data_ptr() for t in pools}
        part = slice(begin, begin + len(k))
        for pool, x in zip(self._keys[layer], (k, v), strict=True):
            # by .data: graphs have saved views of rows before these, which stay as they are
            pool.data[part] = x.detach()
        if self.gradients:
            for pool in self._sums[layer]:
                pool[part] = 0

    def holds(self, storage: int) -> bool:
        """Is this address that of its memory?"""
        return storage in self._storages


class PrefixPass:
    """One forward of tokens that come after ``prefix_len`` tokens of a stack.

    Args:
        rows: the tokens of this forward, a forest or cu_seqlens, as ``plan_prefix_attention`` takes them.
        prefix_len: tokens of the stack that they see.
        stack: of the path.
        keep: keep keys and values, with their graph, in ``kept``.
        write: where they are kept, write them to the stack too, behind the prefix.
        graph: there will be a backward pass.

    Attributes:
        kept: by layer, the keys and values [T, Hk, D] of this forward's tokens, with their graph.
        layers: that have attended.
        finished: the forward is over; a layer that comes now is a checkpointed one, in the backward pass.
    """

    def __init__(
        self,
        rows: Tree | Tensor,
        prefix_len: int,
        stack: PrefixStack,
        *,
        keep: bool,
        write: bool,
        graph: bool,
    ) -> None:
        self.rows, self.prefix_len, self.stack = rows, prefix_len, stack
        self.keep, self.write, self.graph = keep, write, graph
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.layers: set[int] = set()
        self.finished = False
        self._plans: dict[tuple[int, int, int, int | None], PrefixPlan] = {}

    def _plan(self, q: Tensor, k: Tensor, window: int | None) -> PrefixPlan:
        key = (q.shape[1], k.shape[1], q.shape[2], window)
        if key not in self._plans:
            self._plans[key] = plan_prefix_attention(
                self.rows,
                self.prefix_len,
                num_q_heads=q.shape[1],
                num_kv_heads=k.shape[1],
                head_dim=q.shape[2],
                window=window,
                device=q.device,
            )
        return self._plans[key]

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None,
        softcap: float,
        window: int | None,
    ) -> Tensor:
        """Attention of a layer: q [T, Hq, D], k and v [T, Hk, D] of this forward's tokens."""
        if self.graph and not torch.is_grad_enabled():
            raise ValueError(
                "gradient checkpointing must not be the reentrant one, got use_reentrant=True: keys and "
                "values have no graph in it"
            )
        if layer in self.layers and not self.finished:
            raise ValueError(
                f"model must attend once in each layer behind a prefix, got another call of layer {layer}"
            )
        self.layers.add(layer)
        plan = self._plan(q, k, window)
        if self.prefix_len == 0:
            out, _ = attend(q, k, v, plan.own, scale=scale, softcap=softcap, window=window)
        else:
            prefix = self.stack.prefix(layer, self.prefix_len)
            wants = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
            out = prefix_attention(  # type: ignore[assignment]
                q,
                *prefix,
                k,
                v,
                scale=scale,
                softcap=softcap,
                plan=plan,
                prefix_grad=self.stack.sums(layer, 0, self.prefix_len) if wants else None,
            )
        # a checkpointed layer comes here again in the backward pass, when its tokens have been kept
        if self.keep and layer not in self.kept:
            if self.write:
                self.stack.write(layer, self.prefix_len, k, v)
            self.kept[layer] = (k, v)
        return out
