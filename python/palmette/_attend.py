# SPDX-License-Identifier: Apache-2.0
"""The `attend` operator: queries meet the keys that a plan shows them. Every attention ends here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._checks import (
    FLOATING,
    check_device,
    check_dim,
    check_dtype,
    check_number,
    check_shape,
    is_expanded,
)

_ops = torch.ops.palmette

# slots, query, segment, item, task, merge_ptr, merge_row, counts (docs/design.md, "A plan")
PlanTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def plan_tensors(tables: Sequence[Tensor]) -> PlanTensors:
    """The first eight of some tables, which an operator has made."""
    slots, query, segment, item, task, merge_ptr, merge_row, counts = tables[:8]
    return slots, query, segment, item, task, merge_ptr, merge_row, counts


_MAX_WINDOW = 2**31 - 1  # no path is longer
MAX_SCALE = 1e30  # beyond it float32 overflows


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of LSE, sinks and partial states for inputs of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_inputs(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q [Nq, Hq, D], k [slots, Hk, D] and v [slots, Hk, Dv] fit each other."""
    check_dtype("q", q, FLOATING)
    check_dim("q", q, "[Nq, Hq, D]")
    for name, tensor, symbols in (("k", k, "[slots, Hk, D]"), ("v", v, "[slots, Hk, Dv]")):
        check_dtype(name, tensor, [q.dtype])
        check_dim(name, tensor, symbols)
        check_device(name, tensor, q.device)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"head_dim of k must be q's {q.shape[2]}, got {k.shape[2]}")
    if v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v must be [slots, Hk, Dv] = [{k.shape[0]}, {k.shape[1]}, Dv] like k, got {list(v.shape)}"
        )
    for name, tensor in (("q", q), ("v", v)):
        if tensor.shape[2] == 0:
            raise ValueError(f"head_dim of {name} must be positive, got 0")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"heads of q must be a positive multiple of k's {k.shape[1]}, got {q.shape[1]}")


def _check_overlap(out: Tensor, inputs: Sequence[Tensor]) -> None:
    """Raises ValueError where two elements of out, or one of out and one of an input, share memory."""
    reach = 1
    for step, size in sorted(zip(out.stride(), out.shape, strict=True)):
        if size > 1 and step < reach:
            raise ValueError(
                f"out must have memory of its own for every element, got strides {out.stride()} of "
                f"{list(out.shape)}"
            )
        reach += (size - 1) * step if size > 0 else 0

    def extent(x: Tensor, dims: slice = slice(None)) -> int:
        sizes = zip(x.stride()[dims], x.shape[dims], strict=True)
        return 1 + sum((size - 1) * step for step, size in sizes)

    for x in inputs:
        if out.numel() == 0 or x.numel() == 0:
            continue
        if out.untyped_storage().data_ptr() != x.untyped_storage().data_ptr():
            continue
        begins = out.storage_offset(), x.storage_offset()
        if begins[0] >= begins[1] + extent(x) or begins[1] >= begins[0] + extent(out):
            continue
        # parts of the tokens of one tensor, as of [N, heads, D], side by side
        if x.dim() == 3 and x.stride(0) == out.stride(0) > 0 and x.dtype == out.dtype:
            places = [begin % out.stride(0) for begin in begins]
            ends = [a + extent(t, slice(1, None)) for a, t in zip(places, (out, x), strict=True)]
            if max(ends) <= out.stride(0) and (ends[0] <= places[1] or ends[1] <= places[0]):
                continue
        raise ValueError("out must have memory of its own, got one that shares memory with an input")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: PlanTensors,
    *,
    scale: float | None = None,
    softcap: float = 0.0,
    window: int | None = None,
    sinks: Tensor | None = None,
    out: Tensor | None = None,
    item_query: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Checks the options that all attentions share, runs the operator: out [Nq, Hq, Dv], lse [Nq, Hq].

    item_query: the plan's, where its items name their queries one by one.
    """
    if scale is None:
        scale = q.shape[2] ** -0.5
    check_number("scale", scale, -MAX_SCALE, MAX_SCALE)
    check_number("softcap", softcap, 0, MAX_SCALE)
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 1):
        raise ValueError(f"window must be an integer of at least 1, got {window!r}")
    keys = 0 if window is None or window > _MAX_WINDOW else window
    q, k, v = (x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous() for x in (q, k, v))
    if sinks is not None:
        check_dtype("sinks", sinks, [state_dtype(q.dtype)])
        check_shape("sinks", sinks, "[Hq]", [q.shape[1]])
        check_device("sinks", sinks, q.device)
        sinks = sinks.contiguous()
    args = (q, k, v, *plan, sinks, float(scale), float(softcap), keys)
    if out is None:
        result: tuple[Tensor, Tensor] = _library.call(_ops.attend.default, *args, item_query)
        return result
    check_dtype("out", out, [q.dtype])
    check_shape("out", out, "[Nq, Hq, Dv]", [q.shape[0], q.shape[1], v.shape[2]])
    check_device("out", out, q.device)
    if is_expanded(out):
        raise ValueError(f"out must have memory of its own for every element, got strides {out.stride()}")
    if out.stride(2) != 1 and out.shape[2] > 1:
        raise ValueError(f"out must be contiguous in its last dimension, got stride {out.stride(2)}")
    inputs = [x for x in (q, k, v, sinks) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, out)):
        raise ValueError(
            "out must be None where gradients are wanted, got a tensor: call under torch.no_grad()"
        )
    if not torch.compiler.is_compiling():
        _check_overlap(out, inputs)
    lse = q.new_empty(q.shape[:2], dtype=state_dtype(q.dtype))
    _library.call(_ops.attend_out.default, *args, out, lse, item_query)
    return out, lse


@torch.library.register_fake("palmette::attend")
def _attend_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty((q.shape[0], q.shape[1], v.shape[2])), q.new_empty(
        q.shape[:2], dtype=state_dtype(q.dtype)
    )


@torch.library.register_fake("palmette::attend_out")
def _attend_out_fake(*_: Any) -> None:
    return None


@torch.library.register_fake("palmette::attend_backward")
def _attend_backward_fake(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *plan_and_options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = plan_and_options[8]
    num_sinks = 0 if sinks is None else q.shape[1]
    return (
        q.new_empty(q.shape),
        q.new_empty(k.shape),
        q.new_empty(v.shape),
        q.new_empty((num_sinks,), dtype=state_dtype(q.dtype)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *plan, sinks, ctx.scale, ctx.softcap, ctx.window, item_query = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, *output, *plan, sinks, item_query)


def _backward(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *plan, sinks, item_query = ctx.saved_tensors
    if dout is None and dlse is None:
        return (None,) * 16
    if dout is None:
        dout = torch.zeros_like(out)
    options = (sinks, ctx.scale, ctx.softcap, ctx.window, item_query)
    dq, dk, dv, dsinks = _ops.attend_backward(dout, dlse, q, k, v, out, lse, *plan, *options)
    return (dq, dk, dv, *(None,) * 8, None if sinks is None else dsinks, None, None, None, None)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError("attention has no second derivative: call backward without create_graph")


torch.library.register_autograd("palmette::attend", _backward, setup_context=_setup_context)
torch.library.register_autograd("palmette::attend_backward", _no_second_derivative)
