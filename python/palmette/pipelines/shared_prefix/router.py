# SPDX-License-Identifier: Apache-2.0
"""The load-balancing loss of a mixture of experts, over a tree of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .forest import Rows


class Router:
    """The load-balancing loss of a mixture of experts, ``E sum_e f_e P_e``.

    f_e is the share of choices that go to expert e, times how many experts a token has, and P_e the mean
    probability, over the tokens of all sequences and layers: a token counts once for each leaf at or below
    it. The counts are those of a pass before, so that the loss is a sum over tokens, as any other.

    Args:
        coefficient: of the loss; 0: there is none.
        decoder, config: of the model.
        graph: there will be a backward pass.

    Source: Switch Transformers (arXiv 2101.03961), as transformers computes it.
    """

    def __init__(self, coefficient: float, decoder: Any, config: Any, *, graph: bool) -> None:
        self.coefficient, self.graph = coefficient, graph
        self.loss = torch.zeros((), dtype=torch.float64, device=next(decoder.parameters()).device)
        self.modules: list[Any] = []
        if not coefficient:
            return
        recorder = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", recorder)
        self.index = getattr(recorder, "index", 0)
        self.modules = [] if kind is None else [m for m in decoder.modules() if isinstance(m, kind)]
        if not self.modules:
            raise ValueError("aux_loss must be 0 for a model without routers, got one that has none")
        self.top_k = config.num_experts_per_tok
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        self.num_experts = next(int(n) for n in (getattr(config, name, None) for name in names) if n)
        self.counts: Tensor | None = None  # choices of all sequences by expert
        self.rows = 0.0  # tokens of all sequences and layers
        self._counting = False

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Within, forwards are counted."""
        self.counts, self.rows, self._counting = None, 0.0, True
        try:
            yield
        finally:
            self._counting = False

    def sum_over(self, group: Any) -> None:
        """Adds what the ranks of a group have counted: the loss is one of all of them."""
        if group is None:
            return
        import torch.distributed as dist

        if self.counts is None:  # no tokens here
            self.counts = torch.zeros(self.num_experts, dtype=torch.float64, device=self.loss.device)
        both = torch.cat([self.counts, self.counts.new_tensor([self.rows])])
        dist.all_reduce(both, group=group)
        self.counts, self.rows = both[:-1], float(both[-1])

    def watch(self, rows: Rows) -> Watch:
        return Watch(self, rows)


class Watch:
    """One forward under the router's eyes; called afterwards, it returns the forward's part of the loss."""

    def __init__(self, router: Router, rows: Rows) -> None:
        self.router, self.rows = router, rows
        self.logits: list[Tensor] = []
        self.handles: list[Any] = []

    def __enter__(self) -> Watch:
        if self.router.modules and (self.router._counting or self.router.counts is not None):
            self.handles = [m.register_forward_hook(self._see) for m in self.router.modules]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:  # layers that run again in the backward pass are not seen twice
            handle.remove()

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        # nothing is computed here: a layer that is checkpointed runs again without this hook
        self.logits.append(output[self.router.index] if isinstance(output, tuple) else output)

    def __call__(self) -> Tensor | None:
        """The part of the loss; None while experts are counted, or where there is none."""
        router = self.router
        parts = []
        for logits in self.logits:
            probabilities = torch.softmax(logits, -1)
            weights = self.rows.leaves.double()
            if router._counting:
                chosen = probabilities.topk(router.top_k, -1).indices
                counts = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
                counts.scatter_add_(0, chosen.flatten(), weights.repeat_interleave(router.top_k))
                router.counts = counts if router.counts is None else router.counts + counts
                router.rows += float(weights.sum())
                continue
            assert router.counts is not None
            factor = router.coefficient * len(router.counts) / router.rows**2
            dtype = torch.promote_types(probabilities.dtype, torch.float32)
            by_expert = (router.counts * factor).to(dtype)
            parts.append(weights.to(dtype) @ (probabilities.to(dtype) @ by_expert))
        if not parts:
            return None
        total = torch.stack(parts).sum()
        if torch.is_grad_enabled() or not router.graph:  # not when a prefix runs that is going to run again
            router.loss += total.detach().double()
        return total
