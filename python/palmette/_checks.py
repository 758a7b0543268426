# SPDX-License-Identifier: Apache-2.0
"""Argument checks in one message style, ``NAME must be WANTED, got GOT``; all raise ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX = (torch.int32, torch.int64)


def check_number(name: str, value: object, least: float, most: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{name} must be a number in [{least:g}, {most:g}], got {value!r}")


def check_at_least(least: int, **sizes: object) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < least:
            raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")


def check_choice(name: str, value: object, names: Sequence[str]) -> None:
    if value not in names:
        raise ValueError(f"{name} must be one of {', '.join(names)}, got {value!r}")


def check_dtype(name: str, tensor: torch.Tensor, wanted: Sequence[torch.dtype]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in wanted:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in wanted)
        raise ValueError(f"{name} must be {names}, got {str(tensor.dtype).removeprefix('torch.')}")


def check_dim(name: str, tensor: torch.Tensor, symbols: str) -> None:
    """``symbols`` names the dimensions: ``"[N, H, Dv]"``."""
    if tensor.dim() != symbols.count(",") + 1:
        raise ValueError(f"{name} must be {symbols}, got {list(tensor.shape)}")


def check_shape(name: str, tensor: torch.Tensor, symbols: str, wanted: Sequence[int]) -> None:
    if tensor.dim() != len(wanted) or any(a != b for a, b in zip(tensor.shape, wanted, strict=True)):
        raise ValueError(f"{name} must be {symbols} = {list(wanted)}, got {list(tensor.shape)}")


def is_expanded(tensor: torch.Tensor) -> bool:
    """Do elements of it share memory by a stride of 0?"""
    return any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True))


class PlannedHeads(Protocol):
    """A plan that was made for some heads."""

    @property
    def num_q_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def check_plan_heads(plan: PlannedHeads, q: torch.Tensor, k: torch.Tensor) -> None:
    """q [tokens, Hq, D] and k [slots, Hk, D] are what the plan was made for."""
    for name, got, wanted in (
        ("heads of q", q.shape[1], plan.num_q_heads),
        ("heads of k", k.shape[1], plan.num_kv_heads),
        ("head_dim", q.shape[2], plan.head_dim),
    ):
        if got != wanted:
            raise ValueError(f"{name} must be the plan's {wanted}, got {got}")


def check_device(name: str, tensor: torch.Tensor, *wanted: torch.device) -> None:
    if tensor.device not in wanted:
        raise ValueError(f"{name} must be on {' or '.join(map(str, wanted))}, got {tensor.device}")


def check_indptr(name: str, indptr: torch.Tensor, device: torch.device) -> torch.Tensor:
    """One int per sequence boundary, on the CPU or on ``device``; returned on the CPU and contiguous."""
    check_dtype(name, indptr, INDEX)
    if indptr.dim() != 1 or indptr.shape[0] == 0:
        raise ValueError(f"{name} must be [B + 1], got {list(indptr.shape)}")
    if indptr.device.type != "cpu":
        check_device(name, indptr, device)
    return indptr.detach().cpu().contiguous()


def small_array_devices(device: torch.device) -> tuple[torch.device, ...]:
    """Where the small arrays of a call may be whose large ones are on ``device``."""
    return (device, torch.device("cpu")) if device.type == "cuda" else (device,)
