# SPDX-License-Identifier: Apache-2.0
"""Losses of reinforcement learning over a vocabulary, without [tokens, vocab] tensors.

Matrix products are PyTorch's. What lies between them, log-softmax and gather and their gradient, is one
operator each way, which reads a chunk of logits once.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from palmette import _library
from palmette._attend import state_dtype
from palmette._checks import (
    FLOATING,
    INDEX,
    check_at_least,
    check_choice,
    check_device,
    check_dim,
    check_dtype,
    check_indptr,
    check_number,
    check_shape,
)

_ops = torch.ops.palmette

CHUNK_BYTES = 256 << 20  # of logits that are alive at a time, at most, if a row fits


def token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    return_entropy: bool = False,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of chosen tokens under ``softmax(hidden @ weight.T / temperature)``.

    Logits are computed a chunk of tokens at a time, forward and once more backward, so that never more than
    ``chunk_bytes`` of them exist.

    Args:
        hidden: [T, hidden], float32, bfloat16 or float16 (float64 on the scalar backend).
        weight: [vocab, hidden], dtype of hidden: a language model's output embedding.
        targets: [T], int32 or int64, each in [0, vocab). On a GPU nobody looks: one out of range gives NaN.
        temperature: positive; logits are divided by it, as in sampling.
        return_entropy: also return the entropies of the distributions, in nats.
        chunk_bytes: of logits that may be alive. Default: 256 MiB. Results do not depend on it beyond the
            rounding of matrix products.

    Returns:
        logprobs [T], float32 (float64 for float64 inputs); with return_entropy also entropies [T].
        Differentiable to hidden and weight through both. Computed in float32 whatever the inputs' dtype.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, a target is out of range, or temperature is not
            positive.

    Source: AReaL and GRPO divide logits by the temperature of the rollout (arXiv 2505.24298, 2402.03300).
    """
    targets = check_head(hidden, weight, targets, temperature)
    check_at_least(1, chunk_bytes=chunk_bytes)
    logprobs, entropies = _TokenLogprobs.apply(  # type: ignore[no-untyped-call]
        hidden, weight, targets, float(temperature), return_entropy, chunk_bytes
    )
    return (logprobs, entropies) if return_entropy else logprobs


def check_head(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Raises ValueError unless the arguments of ``token_logprobs`` fit each other; the targets as int64."""
    check_dtype("hidden", hidden, FLOATING)
    check_dim("hidden", hidden, "[T, hidden]")
    check_dtype("weight", weight, [hidden.dtype])
    check_dim("weight", weight, "[vocab, hidden]")
    check_device("weight", weight, hidden.device)
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight must be [vocab, {hidden.shape[1]}] like hidden, got {list(weight.shape)}")
    check_dtype("targets", targets, INDEX)
    check_shape("targets", targets, "[T]", hidden.shape[:1])
    check_device("targets", targets, hidden.device)
    check_number("temperature", temperature, 1e-6, 1e6)
    targets = targets.long().contiguous()
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and len(targets):
        least, most = (int(x) for x in targets.aminmax())
        if least < 0 or most >= weight.shape[0]:
            bad = least if least < 0 else most
            raise ValueError(f"targets must be in [0, {weight.shape[0]}), got {bad}")
    return targets


def chunk_rows(tokens: int, vocab: int, dtype: torch.dtype, chunk_bytes: int) -> int:
    """Tokens whose logits are computed together: products of few rows are slow, so chunks are even."""
    most = max(1, chunk_bytes // (vocab * state_dtype(dtype).itemsize))
    chunks = max(1, -(-tokens // most))
    return max(1, -(-tokens // chunks))


class LogitsBuffer:
    """Memory for a chunk of logits, kept between chunks: fresh pages take longer than the product."""

    def __init__(self) -> None:
        self._memory: Tensor | None = None

    def product(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [t, hidden] @ weight.T, valid until the next call."""
        rows, vocab = hidden.shape[0], weight.shape[0]
        memory = self._memory
        like = (hidden.dtype, hidden.device)
        if (
            memory is None
            or memory.numel() < rows * vocab
            or (memory.dtype, memory.device) != like
            or memory.is_inference() != torch.is_inference_mode_enabled()
        ):
            memory = self._memory = hidden.new_empty(rows * vocab)
        return torch.mm(hidden, weight.T, out=memory[: rows * vocab].view(rows, vocab))


def widened(x: Tensor) -> Tensor:
    """In the dtype of the computation: 16-bit products lose what a difference of logits needs."""
    return x.to(state_dtype(x.dtype))


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        entropy: bool,
        chunk_bytes: int,
    ) -> tuple[Tensor, Tensor]:
        dtype = state_dtype(hidden.dtype)
        rows = len(targets)
        logprobs, lse = (hidden.new_empty(rows, dtype=dtype) for _ in range(2))
        entropies = hidden.new_empty(rows if entropy else 0, dtype=dtype)
        step = chunk_rows(rows, weight.shape[0], hidden.dtype, chunk_bytes)
        wide, buffer = widened(weight), LogitsBuffer()
        for begin in range(0, rows, step):
            part = slice(begin, begin + step)
            logits = buffer.product(widened(hidden[part]), wide)
            found = _library.call(_ops.gather_logprobs.default, logits, targets[part], temperature, entropy)
            logprobs[part], lse[part] = found[:2]
            if entropy:
                entropies[part] = found[2]
        ctx.save_for_backward(hidden, weight, targets, lse, entropies)
        ctx.options = (temperature, entropy, step)
        ctx.set_materialize_grads(False)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlogprobs: Tensor | None, dentropies: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, lse, entropies = ctx.saved_tensors
        temperature, entropy, step = ctx.options
        if not entropy:
            dentropies = None
        if dlogprobs is None and dentropies is None:
            return (None,) * 6
        wide, buffer = widened(weight), LogitsBuffer()
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dhidden = torch.empty_like(hidden) if wants_hidden else None
        dweight = torch.zeros_like(wide) if wants_weight else None
        with torch.autocast(hidden.device.type, enabled=False):
            for begin in range(0, len(targets), step):
                part = slice(begin, begin + step)
                rows = widened(hidden[part])
                logits = buffer.product(rows, wide)
                _ops.gather_logprobs_backward_(
                    None if dlogprobs is None else dlogprobs[part].contiguous(),
                    None if dentropies is None else dentropies[part].contiguous(),
                    logits,
                    targets[part],
                    lse[part],
                    entropies[part] if entropy else None,
                    temperature,
                )
                if dhidden is not None:
                    dhidden[part] = logits @ wide
                if dweight is not None:
                    dweight.addmm_(logits.T, rows)
        return (
            dhidden,
            None if dweight is None else dweight.to(weight.dtype),
            *(None,) * 4,
        )


REDUCTIONS = ("mean", "sequence_mean", "sum", "none")
CORRECTIONS = ("mask", "clamp")
LEVELS = ("token", "sequence")


def policy_loss(
    logprobs: Tensor,
    advantages: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    behavior_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    clip: float | tuple[float, float] = 0.2,
    dual_clip: float | None = None,
    kl: float = 0.0,
    correction: str | None = None,
    correction_cap: float = 5.0,
    correction_level: str = "token",
    cu_seqlens: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """The loss of a policy's tokens: GRPO, PPO with dual clip, decoupled PPO.

    With ``u = exp(logprobs - old_logprobs)`` and A the advantages, a token's loss is

        l = max(-A u, -A clamp(u, 1 - clip, 1 + clip))
        l = min(l, dual_clip |A|)                              where dual_clip is given
        l = w l,  w = exp(old_logprobs - behavior_logprobs)    where correction is given; w has no gradient
        l = l + kl (e^d - d - 1),  d = ref_logprobs - logprobs

    Args:
        logprobs: [T], float32 or float64: of the tokens under the policy that is trained.
        advantages: [T], or one number for all of them.
        old_logprobs: [T], under the policy that the step starts from (decoupled PPO: the proximal policy).
            Default: ``logprobs.detach()``, an on-policy step, u = 1.
        behavior_logprobs: [T], under the policy that sampled the tokens; for a correction. Default: None, the
            old policy did.
        ref_logprobs: [T], under a reference policy. Needed where kl is not 0.
        clip: how far u may be from 1 before its gradient stops; (below, above) for two bounds.
        dual_clip: c >= 1, bounds the loss of tokens with A < 0. Default: no bound.
        kl: coefficient of the divergence from ref_logprobs. Default: 0.
        correction: ``"clamp"``: w is at most correction_cap; ``"mask"``: tokens with a larger w lose their
            loss (not their part of the denominator). Default: None, w = 1.
        correction_cap: of w, positive.
        correction_level: ``"token"``, or ``"sequence"``: w of a sequence is the geometric mean over its
            tokens, by cu_seqlens.
        cu_seqlens: [B + 1], int32 or int64: where sequences begin; for ``"sequence"`` and
            ``"sequence_mean"``.
        reduction: ``"mean"`` over all tokens, before any is masked; ``"sequence_mean"``: the mean over
            sequences of their tokens' means; ``"sum"``; ``"none"``: [T].

    Returns:
        A scalar, or [T]. Differentiable to logprobs and to nothing else.

    Raises:
        ValueError: shapes or dtypes do not fit, an option is unknown, or another argument is needed for it.

    Source: GRPO (arXiv 2402.03300); PPO (arXiv 1707.06347); dual clip (arXiv 1912.09729); decoupled PPO
    (arXiv 2110.00641), as AReaL (arXiv 2505.24298) uses it.
    """
    check_dtype("logprobs", logprobs, (torch.float32, torch.float64))
    check_dim("logprobs", logprobs, "[T]")
    for name, other in (
        ("old_logprobs", old_logprobs),
        ("behavior_logprobs", behavior_logprobs),
        ("ref_logprobs", ref_logprobs),
    ):
        if other is not None:
            check_dtype(name, other, FLOATING)
            check_shape(name, other, "[T]", logprobs.shape)
    try:
        advantages = torch.as_tensor(advantages, dtype=logprobs.dtype, device=logprobs.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"advantages must be numbers, got {type(advantages).__name__}") from None
    if advantages.dim() > 0:
        check_shape("advantages", advantages, "[T]", logprobs.shape)
    bounds = tuple(clip) if isinstance(clip, (tuple, list)) else (clip, clip)
    if len(bounds) != 2:
        raise ValueError(f"clip must be a number or (below, above), got {clip!r}")
    below, above = bounds
    check_number("clip", below, 0, math.inf)
    check_number("clip", above, 0, math.inf)
    if dual_clip is not None:
        check_number("dual_clip", dual_clip, 1, 1e6)
    check_number("kl", kl, 0, math.inf)
    check_number("correction_cap", correction_cap, 1e-12, math.inf)
    check_choice("reduction", reduction, REDUCTIONS)
    check_choice("correction_level", correction_level, LEVELS)
    if correction is not None:
        check_choice("correction", correction, CORRECTIONS)
        if behavior_logprobs is None:
            raise ValueError("behavior_logprobs must be given where correction is, got None")
    elif behavior_logprobs is not None:
        raise ValueError(
            f"correction must be one of {', '.join(CORRECTIONS)} where behavior_logprobs is given, got None"
        )
    if kl != 0 and ref_logprobs is None:
        raise ValueError("ref_logprobs must be given where kl is not 0, got None")
    sequence = None
    if reduction == "sequence_mean" or (correction is not None and correction_level == "sequence"):
        if cu_seqlens is None:
            raise ValueError("cu_seqlens must be given for sequences, got None")
        sequence = _sequences(cu_seqlens, logprobs)

    old = (logprobs if old_logprobs is None else old_logprobs.to(logprobs.dtype)).detach()
    with torch.no_grad():
        ratio = torch.exp(logprobs - old)
        weight = torch.ones_like(ratio)
        if correction is not None:
            assert behavior_logprobs is not None
            log_weight = old - behavior_logprobs.to(logprobs.dtype)
            if correction_level == "sequence":
                assert sequence is not None
                log_weight = _mean_of_sequences(log_weight, *sequence)[sequence[0]]
            weight = log_weight.exp()
            if correction == "mask":
                weight = torch.where(weight <= correction_cap, weight, 0.0)
            else:
                weight = weight.clamp(max=correction_cap)
        # where the loss is a constant, a product with the ratio's gradient would be 0 times infinity
        dead = (advantages == 0) | (weight == 0)
        clipped = torch.where(advantages > 0, ratio > 1 + above, ratio < 1 - below)
        constant = torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - below, 1 + above))
        if dual_clip is not None:
            clipped |= (advantages < 0) & (ratio > dual_clip)
            constant = torch.minimum(constant, dual_clip * advantages.abs())
        constant = torch.where(dead, 0.0, weight * constant)
    moving = ~(dead | clipped)
    log_ratio = torch.where(moving, logprobs - old, 0.0)
    loss = torch.where(moving, -weight * advantages * torch.exp(log_ratio), constant)
    if kl != 0:
        assert ref_logprobs is not None
        difference = ref_logprobs.to(logprobs.dtype).detach() - logprobs
        loss = loss + kl * (torch.expm1(difference) - difference)
    if reduction == "none":
        return loss
    if reduction == "sum":
        return loss.sum()
    if reduction == "mean":
        return loss.sum() / max(1, len(loss))
    assert sequence is not None
    lengths = sequence[1]
    return _mean_of_sequences(loss, *sequence).sum() / max(1, int((lengths > 0).sum()))


def group_advantages(rewards: Tensor, *, normalize: bool = True, eps: float = 1e-4) -> Tensor:
    """GRPO's advantages: rewards of a group's rollouts, less their mean, over their standard deviation.

    Args:
        rewards: [..., G]: G rollouts of the same prompt. Floating-point.
        normalize: divide by the standard deviation (of a sample, as TRL and verl do) plus eps; False: Dr.
            GRPO's unnormalised variant.
        eps: so that equal rewards give 0, not NaN.

    Returns:
        [..., G]; 0 where a group's rewards are equal.

    Raises:
        ValueError: rewards is not floating-point, or has no rollouts.

    Source: GRPO (arXiv 2402.03300), section 4.1.2; Dr. GRPO (arXiv 2503.20783).
    """
    check_dtype("rewards", rewards, FLOATING)
    check_number("eps", eps, 1e-12, 1e6)
    if rewards.dim() == 0 or rewards.shape[-1] == 0:
        got = "a scalar" if rewards.dim() == 0 else list(rewards.shape)
        raise ValueError(f"rewards must be [..., G] with G of at least 1, got {got}")
    equal = rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True)  # their mean may be rounded
    centred = torch.where(equal, 0.0, rewards - rewards.mean(-1, keepdim=True))
    if rewards.shape[-1] < 2 or not normalize:
        return centred
    return centred / (rewards.std(-1, keepdim=True) + eps)


def _sequences(cu_seqlens: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token the sequence's number, and of each sequence the length."""
    ends = check_indptr("cu_seqlens", cu_seqlens, like.device).long()
    lengths = ends.diff()
    if ends[0] != 0 or ends[-1] != len(like) or bool((lengths < 0).any()):
        raise ValueError(
            f"cu_seqlens must be non-decreasing from 0 to {len(like)} (tokens), got {cu_seqlens.tolist()}"
        )
    number = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    return number.to(like.device), lengths.to(like.device)


def _mean_of_sequences(values: Tensor, number: Tensor, lengths: Tensor) -> Tensor:
    sums = values.new_zeros(len(lengths)).index_add(0, number, values)
    return sums / lengths.clamp(min=1)


@torch.library.register_fake("palmette::gather_logprobs")
def _gather_logprobs_fake(
    logits: Tensor, targets: Tensor, temperature: float, entropy: bool
) -> tuple[Tensor, Tensor, Tensor]:
    rows = logits.shape[0]
    logprobs, lse = (logits.new_empty(rows, dtype=state_dtype(logits.dtype)) for _ in range(2))
    return logprobs, lse, logits.new_empty(rows if entropy else 0, dtype=state_dtype(logits.dtype))


@torch.library.register_fake("palmette::gather_logprobs_backward_")
def _gather_logprobs_backward_fake(*_: Any) -> None:
    return None
