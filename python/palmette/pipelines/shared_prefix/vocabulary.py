# SPDX-License-Identifier: Apache-2.0
"""Tokens to embeddings, and hidden states to losses.

Tables [vocab, hidden] are the largest parameters of a small model. Their gradients are added up in one buffer
per table and step, which input and output share where the embeddings are tied, and never pass through
autograd, whose embedding would make a dense gradient in every backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from palmette._attend import state_dtype
from palmette.losses import LogitsBuffer, chunk_rows, widened

from .context import autocast_of

_ops = torch.ops.palmette

LossFunction = Callable[[Tensor, Tensor], Tensor]


def is_plain(module: Any) -> bool:
    """Does nothing but the module's weight, and nobody's hook, decide what it computes and its gradient?"""
    weight = module.weight
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return (
        weight.is_leaf
        and not weight._backward_hooks
        and not weight._post_accumulate_grad_hooks
        and not any(getattr(module, name) for name in hooks)
        and "forward" not in vars(module)  # accelerate's hooks replace it
    )


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """That ``grad`` has: PyTorch lets it be another one than the parameter's."""
    return getattr(parameter, "grad_dtype", None) or parameter.dtype


def ensure_gradient(parameter: Tensor) -> Tensor:
    """Its ``grad``, zeros where it had none."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter, dtype=gradient_dtype(parameter))
    return parameter.grad


def softcap_of(config: Any) -> float | None:
    """Of the logits, as models call it."""
    return getattr(config, "final_logit_softcapping", None)


def logits_of(module: Any, softcap: float | None, hidden: Tensor) -> Tensor:
    """What a head of transformers makes of hidden states."""
    logits = widened(module(hidden))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class TableGradients:
    """Sums of gradients of [vocab, hidden], in float32 or float64, each made when it is needed."""

    def __init__(self) -> None:
        self._sums: dict[int, tuple[Tensor, Tensor]] = {}

    def add_product(self, table: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds a.T @ b: a [t, vocab], b [t, hidden]."""
        if id(table) in self._sums:
            self._sums[id(table)][1].addmm_(a.T, b)
        else:
            self._sums[id(table)] = (table, a.T @ b)

    def add_rows(self, table: Tensor, index: Tensor, rows: Tensor) -> None:
        """Adds rows [t, hidden] to those that index [t] names."""
        if id(table) not in self._sums:
            zeros = torch.zeros(table.shape, dtype=state_dtype(table.dtype), device=table.device)
            self._sums[id(table)] = (table, zeros)
        total = self._sums[id(table)][1]
        total.index_add_(0, index, rows.to(total.dtype))

    def finish(self) -> None:
        """Hands the sums to the parameters."""
        for table, total in self._sums.values():
            gradient = total.to(gradient_dtype(table))
            table.grad = gradient if table.grad is None else table.grad.add_(gradient)


class Embedding:
    """What a decoder is given for its tokens.

    Args:
        module: the model's input embeddings.
        gradients: where a plain one's go.
    """

    def __init__(self, module: Any, gradients: TableGradients) -> None:
        self.module, self.gradients = module, gradients
        self.is_plain = (
            type(module) is torch.nn.Embedding
            and is_plain(module)
            and module.max_norm is None
            and not module.scale_grad_by_freq
            and not module.sparse
        )

    def __call__(self, ids: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Keyword arguments of the decoder for ids [t], and a leaf that ``add`` takes after the backward."""
        if not self.is_plain:
            return {"input_ids": ids[None]}, None
        with torch.no_grad():
            leaf = self.module(ids[None])
        leaf.requires_grad_(torch.is_grad_enabled() and self.module.weight.requires_grad)
        return {"inputs_embeds": leaf}, leaf

    def add(self, ids: Tensor, leaf: Tensor | None) -> None:
        if leaf is None or leaf.grad is None:
            return
        rows = leaf.grad[0]
        if self.module.padding_idx is not None:  # it has no gradient
            kept = ids != self.module.padding_idx
            ids, rows = ids[kept], rows[kept]
        self.gradients.add_rows(self.module.weight, ids, rows)
        leaf.grad = None


class Head:
    """Hidden states to losses and back, a chunk of logits at a time.

    A chunk's gradients are taken while its logits are there: three products of a forward and backward pass,
    not the four of computing logits again.

    Args:
        module: the model's output embeddings.
        config: of the model.
        loss_fn: of tokens.
        denominator: of the loss.
        temperature: of the logits.
        chunk_bytes: of logits that may be alive.
        buffer: for them.
        gradients: where a plain table's go; None: there is no backward pass.

    Attributes:
        loss: so far.
        dtype: of log-probabilities.
        entropies: if they are wanted, a list to which (entropies [t], tokens [t]) are appended.
    """

    def __init__(
        self,
        module: Any,
        config: Any,
        loss_fn: LossFunction,
        denominator: float,
        temperature: float,
        chunk_bytes: int,
        buffer: LogitsBuffer,
        gradients: TableGradients | None,
    ) -> None:
        self.module, self.loss_fn, self.gradients = module, loss_fn, gradients
        self.denominator, self.temperature, self.buffer = denominator, temperature, buffer
        self.softcap = softcap_of(config)
        first = next(module.parameters())
        self.autocast = autocast_of(first.device)
        self.dtype = state_dtype(first.dtype)
        by_weight = type(module) is torch.nn.Linear and module.bias is None and not self.softcap
        self.wide = widened(module.weight.detach()) if by_weight and is_plain(module) else None
        self.vocab_size, self.chunk_bytes = config.vocab_size, chunk_bytes
        self.loss = torch.zeros((), dtype=torch.float64, device=first.device)
        self.entropies: list[tuple[Tensor, Tensor]] | None = None
        self._used = False

    def finish(self) -> None:
        """A head that was used has a gradient, 0 where no loss had one: optimizers tell it from None."""
        if self._used and self.gradients is not None:
            for p in self.module.parameters():
                if p.requires_grad:
                    ensure_gradient(p)

    def losses(self, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
        """Adds the tokens' losses; returns the gradients of hidden [t, hidden], which predicts targets
        [t]."""
        wide = widened(hidden)
        dhidden = torch.zeros_like(wide)
        self._used = self._used or len(tokens) > 0
        one = self._by_module
        context: AbstractContextManager[Any] = nullcontext()
        if self.wide is not None:  # products in float32
            one, context = self._by_weight, torch.autocast(hidden.device.type, enabled=False)
        rows = chunk_rows(len(tokens), self.vocab_size, wide.dtype, self.chunk_bytes)
        with context:
            for begin in range(0, len(tokens), rows):
                part = slice(begin, begin + rows)
                found = one(wide[part], targets[part], tokens[part])
                if found is not None:
                    dhidden[part] = found
        return dhidden

    def _gradient(self, logprobs: Tensor, tokens: Tensor) -> Tensor | None:
        """Adds the loss; returns its gradient to the log-probabilities, None where it is 0."""
        # the products are in float32, but what loss_fn computes is under the caller's autocast
        with torch.set_grad_enabled(self.gradients is not None), self.autocast:
            leaf = logprobs.detach().requires_grad_(self.gradients is not None)
            loss = self.loss_fn(leaf, tokens)
            if not isinstance(loss, Tensor) or loss.dim() != 0 or loss.is_complex():
                got = f"{loss.dtype} {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
                raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
            loss = loss / self.denominator
        self.loss += loss.detach().double()
        if not loss.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return gradient if gradient is not None and bool((gradient != 0).any()) else None

    @torch.no_grad()
    def _by_weight(self, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor | None:
        assert self.wide is not None
        logits = self.buffer.product(hidden, self.wide)
        wanted = self.entropies is not None
        logprobs, lse, entropies = _ops.gather_logprobs(logits, targets, self.temperature, wanted)
        if self.entropies is not None:
            self.entropies.append((entropies, tokens))
        gradient = self._gradient(logprobs, tokens)
        if gradient is None or self.gradients is None:
            return None
        _ops.gather_logprobs_backward_(
            gradient.contiguous(), None, logits, targets, lse, None, self.temperature
        )
        if self.module.weight.requires_grad:
            self.gradients.add_product(self.module.weight, logits, hidden)
        return logits @ self.wide

    def _by_module(self, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor | None:
        """Of a head that is more than a matrix: LoRA, a bias, capped logits."""
        with torch.set_grad_enabled(self.gradients is not None):
            leaf = hidden.to(next(self.module.parameters()).dtype)
            leaf.requires_grad_(self.gradients is not None)
            logits = logits_of(self.module, self.softcap, leaf)
            logprobs = torch.log_softmax(logits / self.temperature, -1)
            chosen = logprobs.gather(-1, targets[:, None])[:, 0]
        if self.entropies is not None:
            self.entropies.append((torch.special.entr(logprobs.detach().exp()).sum(-1), tokens))
        gradient = self._gradient(chosen, tokens)
        if gradient is None:
            return None
        chosen.backward(gradient)
        assert leaf.grad is not None
        return leaf.grad.to(hidden.dtype)
