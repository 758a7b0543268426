# SPDX-License-Identifier: Apache-2.0
"""Attention of queries in a tree of tokens to the keys on their paths."""

from __future__ import annotations

import torch
from torch import Tensor

from palmette._attend import attend, check_inputs
from palmette._checks import check_plan_heads
from palmette.tree_plan import TreeAttentionIO, TreeAttentionPlan, plan_tree_attention

__all__ = ["TreeAttentionIO", "TreeAttentionPlan", "plan_tree_attention", "tree_attention"]


def tree_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TreeAttentionPlan,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    return_lse: bool = False,
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Softmax attention of every query to the keys on its path, each key read once for all that share it.

    For the query at token i of the tree and the keys k on the path to it, itself included:
    ``s_k = softcap * tanh(scale * q_i . k / softcap)`` (without softcap ``scale * q_i . k``),
    ``out_i = sum_k exp(s_k) v_k / (exp(sink) + sum_k exp(s_k))`` and
    ``lse_i = log(exp(sink) + sum_k exp(s_k))``.

    Args:
        q: [Nq, Hq, D]; row i belongs to query i of the plan (its leaves or tokens depth-first, or the pairs
            it was given).
        k: [slots, Hk, D], the KV pool; the tree's slots say where each token's key lies. Strided as it comes,
            contiguous in the last dimension: token-major pools and transposed head-major ones both serve.
        v: [slots, Hk, Dv]; Dv may differ from D.
        plan: of ``plan_tree_attention``, up to date with its tree, on the device of q.
        scale: factor of the logits. Default: D ** -0.5.
        softcap: bound of the logits, 0 for none. Default: 0.
        window: a query sees the last ``window`` keys of its path, its own included. Default: all of them.
        sinks: float32 [Hq]: one more logit per head that has no value. Default: none.
        return_lse: also return lse. Default: False.
        out: [Nq, Hq, Dv], dtype of q: receives the result, which saves an allocation. Not where gradients are
            wanted.

    float32, bfloat16 or float16, the same for q, k and v; arithmetic and state are float32 (float64 inputs
    run on the scalar backend, for gradient checks). Hq is a multiple of Hk.

    Returns:
        out [Nq, Hq, Dv] in the dtype of q; with return_lse also lse [Nq, Hq], float32, natural logarithm. A
        query that sees no key has out 0 and lse -inf (its sink, if there are sinks). Differentiable through
        both, in q, k, v and sinks. Bit-identical from run to run and for any number of threads.

    Raises:
        ValueError: shapes, dtypes, heads or head_dim do not fit each other or the plan, the plan is stale
            (compiled code does not look), a slot of the tree is not a row of k, tokens share a slot where
            gradients of k or v are wanted on a GPU, or an option is out of range.

    Source: DeFT (arXiv 2404.00242), sections 3.2 and 3.3, with intervals of depth-first numbers in place of
        bit masks.
    """
    check_inputs(q, k, v)
    if not isinstance(plan, TreeAttentionPlan):
        raise ValueError(f"plan must be a TreeAttentionPlan, got {type(plan).__name__}")
    if q.device.type != plan.device.type or plan.device.index not in (None, q.device.index):
        raise ValueError(f"q must be on the plan's device {plan.device}, got {q.device}")
    if not torch.compiler.is_compiling():
        plan.check_fresh()
        if plan.device.type != "cpu" and k.shape[0] < plan.num_slots:
            raise ValueError(
                f"k must have at least {plan.num_slots} slots, those of the tree, got {k.shape[0]}"
            )
        if q.shape[0] != plan.num_queries:
            raise ValueError(
                f"q must be [{plan.num_queries}, Hq, D], one row per query of the plan, got {list(q.shape)}"
            )
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            plan.check_gradients()
    check_plan_heads(plan, q, k)
    result, lse = attend(
        q, k, v, plan.tensors, scale=scale, softcap=softcap, window=window, sinks=sinks, out=out
    )
    return (result, lse) if return_lse else result
