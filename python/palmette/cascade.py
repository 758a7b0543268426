# SPDX-License-Identifier: Apache-2.0
"""Cascade inference: attention states and their merge.

A *state* is the result of attention over a part of the keys: ``out``, normalised over that part, and ``lse``, the log of
the sum of its exponentials. States over disjoint parts merge into the state over their union.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._checks import FLOATING, INDEX, check_device, check_dim, check_dtype, check_shape

_ops = torch.ops.palmette


def merge_state(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor, *, lse_base: str = "e"
) -> tuple[Tensor, Tensor]:
    """Merges two attention states of the same queries.

    With ``m = max(lse_a, lse_b)``: ``out = (out_a e^(lse_a-m) + out_b e^(lse_b-m)) / (e^(lse_a-m) + e^(lse_b-m))`` and
    ``lse = m + log(e^(lse_a-m) + e^(lse_b-m))``. Associative and commutative up to rounding; ``(0, -inf)`` is the identity.

    Args:
        out_a, out_b: [N, H, Dv], float32, bfloat16 or float16 (float64 on the scalar backend).
        lse_a, lse_b: [N, H], float32 (float64 when the outs are float64). A state with lse -inf is empty: its out is never
            read. lse +inf or NaN is an error of the caller and makes the merged out and lse NaN.
        lse_base: ``"e"`` for natural logarithms (Palmette, vLLM, FlashAttention) or ``"2"`` (FlashInfer).

    Returns:
        out [N, H, Dv] in the dtype of out_a, and lse [N, H]; (0, -inf) where both states are empty. Differentiable through
        both.

    Raises:
        ValueError: shapes, dtypes or devices do not match, or lse_base is unknown.

    Source: FlashInfer, "Cascade Inference", section on the merge of attention states; the same rule as FlashDecoding's
    reduction.
    """
    base2 = _is_base2(lse_base)
    check_dtype("out_a", out_a, FLOATING)
    check_dim("out_a", out_a, "[N, H, Dv]")
    check_dtype("out_b", out_b, [out_a.dtype])
    check_shape("out_b", out_b, "[N, H, Dv]", out_a.shape)
    for name, lse in (("lse_a", lse_a), ("lse_b", lse_b)):
        check_dtype(name, lse, [_lse_dtype(out_a)])
        check_shape(name, lse, "[N, H]", out_a.shape[:2])
    for name, tensor in (("lse_a", lse_a), ("out_b", out_b), ("lse_b", lse_b)):
        check_device(name, tensor, out_a.device)
    out, lse = _library.call(_ops.merge_state, out_a, lse_a, out_b, lse_b, base2)
    return out, lse


def merge_states(
    outs: Tensor, lses: Tensor, indptr: Tensor | None = None, *, lse_base: str = "e"
) -> tuple[Tensor, Tensor]:
    """Merges any number of attention states per query, in the order in which they lie in memory.

    Args:
        outs: dense [N, S, H, Dv], or ragged [nnz, H, Dv] with ``indptr``; float32, bfloat16 or float16 (float64 on the
            scalar backend). Strided as it comes.
        lses: [N, S, H] or [nnz, H], float32 (float64 when outs is float64). A state with lse -inf is empty: its out is
            never read. lse +inf or NaN is an error of the caller and makes the merged out and lse NaN.
        indptr: [N + 1], int32 or int64, non-decreasing from 0 to nnz: query n owns the states
            ``indptr[n] : indptr[n + 1]``, possibly none. Default: dense.
        lse_base: ``"e"`` for natural logarithms (Palmette, vLLM, FlashAttention) or ``"2"`` (FlashInfer).

    Returns:
        out [N, H, Dv] in the dtype of outs, and lse [N, H]; (0, -inf) where a query has no state that is not empty.
        Differentiable through both. Bit-identical from run to run and for any number of threads.

    Raises:
        ValueError: shapes, dtypes or devices do not match, indptr is not as described, or lse_base is unknown.

    Source: FlashInfer, "Cascade Inference"; DeFT (arXiv 2404.00242), section 3.2, the reduction of partial results.
    """
    base2 = _is_base2(lse_base)
    check_dtype("outs", outs, FLOATING)
    check_dim("outs", outs, "[N, S, H, Dv]" if indptr is None else "[nnz, H, Dv]")
    check_dtype("lses", lses, [_lse_dtype(outs)])
    check_shape("lses", lses, "[N, S, H]" if indptr is None else "[nnz, H]", outs.shape[:-1])
    check_device("lses", lses, outs.device)
    if indptr is not None:
        check_dtype("indptr", indptr, INDEX)
        if indptr.dim() != 1 or indptr.shape[0] == 0:
            raise ValueError(f"indptr must be [N + 1], got {list(indptr.shape)}")
        check_device("indptr", indptr, outs.device)
    out, lse = _library.call(_ops.merge_states, outs, lses, indptr, base2)
    return out, lse


def _is_base2(lse_base: str) -> bool:
    if lse_base not in ("e", "2"):
        raise ValueError(f"lse_base must be 'e' or '2', got {lse_base!r}")
    return lse_base == "2"


def _lse_dtype(outs: Tensor) -> torch.dtype:
    return torch.float64 if outs.dtype == torch.float64 else torch.float32


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


torch.library.register_autograd("palmette::merge_state", _merge_state_backward, setup_context=_save)
torch.library.register_autograd("palmette::merge_states", _merge_states_backward, setup_context=_save)
