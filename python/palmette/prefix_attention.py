# SPDX-License-Identifier: Apache-2.0
"""Suffixes that share a prefix: the prefix is read once for all of them, forward and backward.

Rows of a microbatch see the prefix's keys, all of them, and their own sequence's causally. That is two plans
of the same operator, whose states are merged. Backward needs no gradient of the merge: with the merged
``out`` and ``lse``, the probabilities ``exp(s - lse)`` and ``D = sum(dout * out) - dlse`` are those of the
whole row, so each plan's backward gives its own part of the gradients.

Source: "Schedule-Level Shared-Prefix Reuse for LLM RL Training" (arXiv 2606.01143).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from palmette import _library
from palmette._attend import MAX_SCALE, PlanTensors, check_inputs, plan_tensors, state_dtype
from palmette._checks import (
    check_at_least,
    check_device,
    check_dim,
    check_dtype,
    check_indptr,
    check_number,
    check_plan_heads,
    check_shape,
)
from palmette._device import on_device
from palmette._varlen import plan_varlen, sequence_starts
from palmette.tree import Tree
from palmette.tree_plan import plan_tree_attention

_ops = torch.ops.palmette


@dataclass(frozen=True)
class PrefixPlan:
    """Which keys the rows of a microbatch meet: made once, used by all layers.

    Attributes:
        prefix, own: the plans over the prefix's keys and over the microbatch's own.
        prefix_len, num_rows: what they were made for.
        window: keys that a row sees at most, 0: all.
        num_q_heads, num_kv_heads, head_dim: of the attention.
    """

    prefix: PlanTensors
    own: PlanTensors
    prefix_len: int
    num_rows: int
    window: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int


def plan_prefix_attention(
    suffixes: Tensor | Tree,
    prefix_len: int,
    *,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    window: int | None = None,
    device: torch.device | str | None = None,
) -> PrefixPlan:
    """The plan of a microbatch: rows that come after a prefix of ``prefix_len`` tokens.

    Args:
        suffixes: cu_seqlens [B + 1], int32 or int64, non-decreasing from 0: packed sequences; or a ``Tree``,
            whose roots all follow the prefix, and whose tokens are the rows in depth-first order.
        prefix_len: P, at least 0.
        num_q_heads, num_kv_heads, head_dim: of the attention.
        window: keys that a row sees at most on its path, its own included. Default: all.
        device: where it will be used. Default: the CPU.

    Raises:
        ValueError: an argument is out of range.
    """
    check_at_least(0, prefix_len=prefix_len)
    check_at_least(1, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    if window is not None:
        check_at_least(1, window=window)
    device = None if device is None else torch.device(device)
    heads: dict[str, Any] = {"num_q_heads": num_q_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    target = "cpu" if device is None or device.type == "cpu" else "gpu"
    keys = 0 if window is None or window >= 2**31 else window
    if isinstance(suffixes, Tree):
        plan = plan_tree_attention(suffixes, "tokens", **heads, target=target)
        own = plan_tensors(plan.tensors)
        rows = suffixes.num_tokens
    else:
        ends = check_indptr("cu_seqlens", suffixes, suffixes.device)
        rows = sequence_starts("cu_seqlens", ends, None, "rows")[-1]
        own = plan_varlen(
            ends, ends, causal=True, num_queries=rows, num_keys=rows, window=keys, target=target, **heads
        )
    prefix = plan_varlen(
        torch.tensor([0, rows], dtype=torch.int32),
        torch.tensor([0, prefix_len], dtype=torch.int32),
        causal=False,
        num_queries=rows,
        num_keys=prefix_len,
        target=target,
        **heads,
    )
    if keys:
        # row i of a query table is the same row of q in both, and its depth is what a window counts from
        prefix[1][2, :rows] = own[1][2, :rows] + prefix_len
    prefix, own = (plan_tensors(on_device(tables, device)) for tables in (prefix, own))
    return PrefixPlan(prefix, own, prefix_len, rows, keys, **heads)


def prefix_attention(
    q: Tensor,
    k_prefix: Tensor,
    v_prefix: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    prefix_grad: tuple[Tensor, Tensor] | None = None,
    return_lse: bool = False,
    plan: PrefixPlan | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed suffixes, each of which sees one shared prefix and, causally, itself.

    Row t of sequence b is ``softmax(scale q_t [K_prefix; K_b]^T) [V_prefix; V_b]`` over all keys of the
    prefix and its sequence's keys up to its own.

    Args:
        q: [T, Hq, D], float32, bfloat16 or float16 (float64 on the scalar backend); the suffixes' rows.
        k_prefix, v_prefix: [P, Hk, D] and [P, Hk, Dv], dtype of q; Hq is a multiple of Hk. Keys are as they
            were cached: after rotary embeddings, at positions 0 .. P - 1, where the suffixes' begin with P.
        k, v: [T, Hk, D] and [T, Hk, Dv], of the suffixes.
        cu_seqlens: [B + 1], int32 or int64, on the CPU or with q, non-decreasing from 0 to T: where suffixes
            begin. None where ``plan`` is given.
        scale: factor of the logits. Default: D ** -0.5.
        softcap: logits become ``softcap * tanh(logits / softcap)``. Default (0): they stay.
        window: keys that a row sees at most, its own included, counted along prefix and suffix. Default: all.
        prefix_grad: (gk [P, Hk, D], gv [P, Hk, Dv]), contiguous, float32 (float64 for float64 inputs):
            backward adds the gradients of the prefix's keys and values to them, instead of returning any;
            k_prefix and v_prefix must not require gradients then. They are no part of the graph: any number
            of forwards may come before the backwards. Default: k_prefix and v_prefix get gradients as other
            inputs do.
        return_lse: also return lse. Default: False.
        plan: of ``plan_prefix_attention`` for these lengths and heads, made once for all layers; with it,
            window is the plan's. Default: made here.

    Returns:
        out [T, Hq, Dv] in the dtype of q; with return_lse also lse [T, Hq], float32 (float64 for float64
        inputs), natural logarithm. Bit-identical from run to run and for any number of threads; so are the
        gradients, and what prefix_grad holds after backwards in the same order.

    Raises:
        ValueError: shapes, dtypes, heads or devices do not fit, cu_seqlens does not cover q, or prefix_grad
            cannot be added to.

    Source: "Schedule-Level Shared-Prefix Reuse for LLM RL Training" (arXiv 2606.01143); accumulating in
    float32, because in bfloat16 sums over a group of 128 are off by 1.4%.
    """
    check_inputs(q, k, v)
    for name, tensor, own, symbols in (
        ("k_prefix", k_prefix, k, "[P, Hk, D]"),
        ("v_prefix", v_prefix, v, "[P, Hk, Dv]"),
    ):
        check_dtype(name, tensor, [q.dtype])
        check_dim(name, tensor, symbols)
        check_device(name, tensor, q.device)
        rows = k_prefix.shape[0] if name == "v_prefix" else tensor.shape[0]
        check_shape(name, tensor, symbols, [rows, *own.shape[1:]])
    if k.shape[0] != q.shape[0]:
        raise ValueError(f"k must have q's {q.shape[0]} rows, got {k.shape[0]}")
    if scale is None:
        scale = q.shape[2] ** -0.5
    check_number("scale", scale, -MAX_SCALE, MAX_SCALE)
    check_number("softcap", softcap, 0, MAX_SCALE)
    if (plan is None) == (cu_seqlens is None):
        given = "neither" if plan is None else "both"
        raise ValueError(f"cu_seqlens or plan must be given, one of them, got {given}")
    if plan is None:
        assert cu_seqlens is not None
        ends = check_indptr("cu_seqlens", cu_seqlens, q.device)
        sequence_starts("cu_seqlens", ends, q.shape[0], "rows of q")
        plan = plan_prefix_attention(
            ends,
            k_prefix.shape[0],
            num_q_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[2],
            window=window,
            device=q.device,
        )
    elif not isinstance(plan, PrefixPlan):
        raise ValueError(f"plan must be a PrefixPlan, got {type(plan).__name__}")
    elif window is not None:
        raise ValueError(f"window must be None where plan is given, which has its own, got {window}")
    if (plan.num_rows, plan.prefix_len) != (q.shape[0], k_prefix.shape[0]):
        raise ValueError(
            f"plan must be of {q.shape[0]} rows behind a prefix of {k_prefix.shape[0]}, got one of "
            f"{plan.num_rows} behind {plan.prefix_len}"
        )
    check_plan_heads(plan, q, k)
    gk, gv = (None, None) if prefix_grad is None else _check_prefix_grad(prefix_grad, k_prefix, v_prefix)
    q, k_prefix, v_prefix, k, v = (
        x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k_prefix, v_prefix, k, v)
    )
    out, lse = _PrefixAttention.apply(  # type: ignore[no-untyped-call]
        q,
        k_prefix,
        v_prefix,
        k,
        v,
        gk,
        gv,
        float(scale),
        float(softcap),
        plan.window,
        *plan.prefix,
        *plan.own,
    )
    return (out, lse) if return_lse else out


def _check_prefix_grad(
    prefix_grad: tuple[Tensor, Tensor], k_prefix: Tensor, v_prefix: Tensor
) -> tuple[Tensor, Tensor]:
    if not isinstance(prefix_grad, (tuple, list)) or len(prefix_grad) != 2:
        raise ValueError(f"prefix_grad must be (gk, gv), got {type(prefix_grad).__name__}")
    for name, grad, of in (("gk", prefix_grad[0], k_prefix), ("gv", prefix_grad[1], v_prefix)):
        check_dtype(f"prefix_grad's {name}", grad, [state_dtype(of.dtype)])
        check_shape(f"prefix_grad's {name}", grad, "[P, Hk, D]", of.shape)
        check_device(f"prefix_grad's {name}", grad, of.device)
        if not grad.is_contiguous():
            raise ValueError(f"prefix_grad's {name} must be contiguous, got strides {grad.stride()}")
        if grad.requires_grad:
            raise ValueError(f"prefix_grad's {name} must be a buffer, got a tensor that requires gradients")
        if of.requires_grad:
            raise ValueError(
                "k_prefix and v_prefix must be detached where prefix_grad is given, got tensors that require "
                "gradients"
            )
    gk, gv = prefix_grad
    if gk is gv:
        raise ValueError("prefix_grad must be two buffers, got the same one twice")
    return gk, gv


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k_prefix: Tensor,
        v_prefix: Tensor,
        k: Tensor,
        v: Tensor,
        gk: Tensor | None,
        gv: Tensor | None,
        scale: float,
        softcap: float,
        window: int,
        *plans: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options = (None, scale, softcap, window)
        shared = _library.call(_ops.attend.default, q, k_prefix, v_prefix, *plans[:8], *options)
        own = _library.call(_ops.attend.default, q, k, v, *plans[8:], *options)
        out, lse = _library.call(_ops.merge_state.default, *shared, *own, False)
        ctx.save_for_backward(q, k_prefix, v_prefix, k, v, out, lse, *plans)
        # not saved: each backward adds to them, which is nobody's error
        ctx.prefix_grad = None if gk is None else (gk, gv)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k_prefix, v_prefix, k, v, out, lse, *plans = ctx.saved_tensors
        nothing = (None,) * (10 + len(plans))
        if dout is None and dlse is None:
            return nothing
        if dout is None:
            dout = torch.zeros_like(out)
        given = (dout, dlse, q)
        dq, dk, dv, _ = _ops.attend_backward(*given, k, v, out, lse, *plans[8:], *ctx.options)
        arguments = (*given, k_prefix, v_prefix, out, lse, *plans[:8], *ctx.options)
        if ctx.prefix_grad is not None:
            dq_prefix, _ = _ops.attend_backward_accumulate_(*arguments, *ctx.prefix_grad)
            return (dq.add_(dq_prefix), None, None, dk, dv, *nothing[5:])
        dq_prefix, dk_prefix, dv_prefix, _ = _ops.attend_backward(*arguments)
        return (dq.add_(dq_prefix), dk_prefix, dv_prefix, dk, dv, *nothing[5:])


@torch.library.register_fake("palmette::attend_backward_accumulate_")
def _attend_backward_accumulate_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, *others: Any
) -> tuple[Tensor, Tensor]:
    sinks = others[12]
    return q.new_empty(q.shape), q.new_empty(
        (0 if sinks is None else q.shape[1],), dtype=state_dtype(q.dtype)
    )
