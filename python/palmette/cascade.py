# SPDX-License-Identifier: Apache-2.0
"""Cascade inference: attention states and their merge.

A *state* is the result of attention over a part of the keys: ``out``, normalised over that part, and ``lse``,
the log of the sum of its exponentials. States over disjoint parts merge into the state over their union.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._attend import PlanTensors, attend, check_inputs, state_dtype
from palmette._checks import (
    FLOATING,
    INDEX,
    check_device,
    check_dim,
    check_dtype,
    check_indptr,
    check_shape,
)
from palmette._varlen import plan_sequences

_ops = torch.ops.palmette


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, lse_base: str = "e"
) -> tuple[Tensor, Tensor]:
    """Merges two attention states of the same queries.

    With ``m = max(lse_a, lse_b)``: ``out = (out_a e^(lse_a-m) + out_b e^(lse_b-m)) / (e^(lse_a-m) +
    e^(lse_b-m))`` and ``lse = m + log(e^(lse_a-m) + e^(lse_b-m))``. Associative and commutative up to
    rounding; ``(0, -inf)`` is the identity.

    Args:
        out_a, out_b: [N, H, Dv], float32, bfloat16 or float16 (float64 on the scalar backend).
        lse_a, lse_b: [N, H], float32 (float64 when the outs are float64). A state with lse -inf is empty: its
            out is never read. lse +inf or NaN is an error of the caller and makes the merged out and lse NaN.
        lse_base: ``"e"`` for natural logarithms (Palmette, vLLM, FlashAttention) or ``"2"`` (FlashInfer).

    Returns:
        out [N, H, Dv] in the dtype of out_a, and lse [N, H]; (0, -inf) where both states are empty.
        Differentiable through both.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or lse_base is unknown.

    Source: FlashInfer (arXiv 2501.01005), the composition of attention states.
    """
    base2 = _is_base2(lse_base)
    check_dtype("out_a", out_a, FLOATING)
    check_dim("out_a", out_a, "[N, H, Dv]")
    check_dtype("out_b", out_b, [out_a.dtype])
    check_shape("out_b", out_b, "[N, H, Dv]", out_a.shape)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(name, lse, [state_dtype(out_a.dtype)])
        check_shape(name, lse, "[N, H]", out_a.shape[:2])
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_device(name, tensor, out_a.device)
    out, lse = _library.call(_ops.merge_state.default, out_a, lse_a, out_b, lse_b, base2)
    return out, lse


def merge_states(
    outs: Tensor, lses: Tensor, indptr: Tensor | None = None, *, lse_base: str = "e"
) -> tuple[Tensor, Tensor]:
    """Merges any number of attention states per query, in the order in which they lie in memory.

    Args:
        outs: dense [N, S, H, Dv], or ragged [nnz, H, Dv] with ``indptr``; float32, bfloat16 or float16
            (float64 on the scalar backend). Strided as it comes.
        lses: [N, S, H] or [nnz, H], float32 (float64 when outs is float64). A state with lse -inf is empty:
            its out is never read. lse +inf or NaN is an error of the caller and makes the merged out and lse
            NaN.
        indptr: [N + 1], int32 or int64, non-decreasing from 0 to nnz: query n owns the states
            ``indptr[n] : indptr[n + 1]``, possibly none. Default: dense.
        lse_base: ``"e"`` for natural logarithms (Palmette, vLLM, FlashAttention) or ``"2"`` (FlashInfer).

    Returns:
        out [N, H, Dv] in the dtype of outs, and lse [N, H]; (0, -inf) where a query has no state that is not
        empty. Differentiable through both. Bit-identical from run to run and for any number of threads.

    Raises:
        ValueError: shapes, dtypes or devices do not match, indptr is not as described, or lse_base is
            unknown.

    Source: FlashInfer (arXiv 2501.01005), the composition of attention states; DeFT (arXiv 2404.00242), the
    second phase.
    """
    base2 = _is_base2(lse_base)
    check_dtype("outs", outs, FLOATING)
    check_dim("outs", outs, "[N, S, H, Dv]" if indptr is None else "[nnz, H, Dv]")
    check_dtype("lses", lses, [state_dtype(outs.dtype)])
    check_shape("lses", lses, "[N, S, H]" if indptr is None else "[nnz, H]", outs.shape[:-1])
    check_device("lses", lses, outs.device)
    if indptr is not None:
        check_dtype("indptr", indptr, INDEX)
        if indptr.dim() != 1 or indptr.shape[0] == 0:
            raise ValueError(f"indptr must be [N + 1], got {list(indptr.shape)}")
        check_device("indptr", indptr, outs.device)
    out, lse = _library.call(_ops.merge_states.default, outs, lses, indptr, base2)
    return out, lse


def cascade_attention(
    q: Tensor,
    levels: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]],
    *,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention to keys that are shared in levels, each level read once for all of its queries.

    A query attends to the keys of its group at every level, as if they were one sequence. The states of the
    levels are merged by log-sum-exp. For example: a prompt that all sequences share, documents that some
    share, and what each sequence holds itself.

    Args:
        q: [Nq, Hq, D], float32, bfloat16 or float16 (float64 on the scalar backend); the rows of all
            sequences, packed.
        levels: ``[(k, v, q_indptr, kv_indptr), ...]``, the most widely shared one first. k is [Nk, Hk, D] and
            v [Nk, Hk, Dv], dtype of q, strided as they come; Hq is a multiple of Hk, and Hk may differ
            between levels. q_indptr and kv_indptr are [B + 1], int32 or int64, on the CPU or with q,
            non-decreasing from 0 to Nq and to Nk: rows ``q_indptr[b] : q_indptr[b + 1]`` of q see keys
            ``kv_indptr[b] : kv_indptr[b + 1]``. All of them on the shared levels; causally on the last one,
            aligned at the bottom right: a sequence's last query sees its last key.
        scale: factor of the logits. Default: D ** -0.5.
        return_lse: also return lse. Default: False.

    Returns:
        out [Nq, Hq, Dv] in the dtype of q; with return_lse also lse [Nq, Hq], float32 (float64 for float64
        inputs), natural logarithm. A query that sees no key at any level has out 0 and lse -inf.
        Differentiable through both. Bit-identical from run to run and for any number of threads. On a GPU,
        levels are planned on the host in every call, so a CUDA graph cannot capture it.

    Raises:
        ValueError: there are no levels; shapes, dtypes, heads or devices do not match; an indptr does not
            begin with 0, decreases, or does not cover the rows of q or k. The message names the level.

    Source: FlashInfer, "Cascade Inference: Memory Bandwidth Efficient Shared Prefix Batch Decoding", for any
    number of levels, with the LSE and a gradient.
    """
    if not levels:
        raise ValueError("levels must hold at least one (k, v, q_indptr, kv_indptr), got none")
    plans = []
    for i, level in enumerate(levels):
        if len(level) != 4:
            raise ValueError(f"levels[{i}] must be (k, v, q_indptr, kv_indptr), got {len(level)} entries")
        try:
            plans.append(_plan_level(q, *level, causal=i == len(levels) - 1))
        except ValueError as error:
            raise ValueError(f"levels[{i}]: {error}") from None
        if level[1].shape[2] != levels[0][1].shape[2]:
            wanted = f"{levels[0][1].shape[2]} like levels[0]'s"
            raise ValueError(f"levels[{i}]: head_dim of v must be {wanted}, got {level[1].shape[2]}")
    states = [attend(q, k, v, plan, scale=scale) for (k, v, _, _), plan in zip(levels, plans, strict=True)]
    if len(states) == 1:
        out, lse = states[0]
    elif len(states) == 2:
        out, lse = merge_state(*states[0], *states[1])
    else:
        out, lse = merge_states(
            torch.stack([s[0] for s in states], 1), torch.stack([s[1] for s in states], 1)
        )
    return (out, lse) if return_lse else out


def _plan_level(
    q: Tensor, k: Tensor, v: Tensor, q_indptr: Tensor, kv_indptr: Tensor, *, causal: bool
) -> PlanTensors:
    check_inputs(q, k, v)
    q_indptr = check_indptr("q_indptr", q_indptr, q.device)
    kv_indptr = check_indptr("kv_indptr", kv_indptr, q.device)
    check_shape("kv_indptr", kv_indptr, "[B + 1] like q_indptr", q_indptr.shape)
    return plan_sequences(q, k, q_indptr, kv_indptr, causal=causal)


def _is_base2(lse_base: str) -> bool:
    if lse_base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', got {lse_base!r}")
    return lse_base == "2"


@torch.library.register_fake("palmette::merge_state")
def _merge_state_fake(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, base2: bool
) -> tuple[Tensor, Tensor]:
    return out_a.new_empty(out_a.shape), lse_a.new_empty(lse_a.shape)


@torch.library.register_fake("palmette::merge_state_backward")
def _merge_state_backward_fake(
    dout: Tensor,
    dlse: Tensor,
    out_a: Tensor,
    lse_a: Tensor,
    out_b: Tensor,
    lse_b: Tensor,
    out: Tensor,
    lse: Tensor,
    base2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    shape, lse_shape = out_a.shape, lse_a.shape
    return dout.new_empty(shape), dlse.new_empty(lse_shape), dout.new_empty(shape), dlse.new_empty(lse_shape)


@torch.library.register_fake("palmette::merge_states")
def _merge_states_fake(
    outs: Tensor, lses: Tensor, indptr: Tensor | None, base2: bool
) -> tuple[Tensor, Tensor]:
    num_queries = outs.shape[0] if indptr is None else indptr.shape[0] - 1
    num_heads, head_dim = outs.shape[-2:]
    return outs.new_empty((num_queries, num_heads, head_dim)), lses.new_empty((num_queries, num_heads))


@torch.library.register_fake("palmette::merge_states_backward")
def _merge_states_backward_fake(
    dout: Tensor,
    dlse: Tensor,
    outs: Tensor,
    lses: Tensor,
    indptr: Tensor | None,
    out: Tensor,
    lse: Tensor,
    base2: bool,
) -> tuple[Tensor, Tensor]:
    return outs.new_empty(outs.shape), lses.new_empty(lses.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.base2 = inputs
    ctx.save_for_backward(*tensors, *output)


def _merge_state_backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_ops.merge_state_backward(dout, dlse, *ctx.saved_tensors, ctx.base2), None)


def _merge_states_backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return (*_ops.merge_states_backward(dout, dlse, *ctx.saved_tensors, ctx.base2), None, None)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("merging has no second derivative: call backward without create_graph")


torch.library.register_autograd("palmette::merge_state", _merge_state_backward, setup_context=_save)
torch.library.register_autograd("palmette::merge_states", _merge_states_backward, setup_context=_save)
torch.library.register_autograd("palmette::merge_state_backward", _no_second_derivative)
torch.library.register_autograd("palmette::merge_states_backward", _no_second_derivative)
