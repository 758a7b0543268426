# SPDX-License-Identifier: Apache-2.0
"""What codecs ask of their arguments, and the memory of wires."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._checks import check_device, check_dtype, check_shape

ENCODED = (torch.float32, torch.bfloat16, torch.float16)
ALIGNMENT = 16  # bytes, of a wire's sections


def check_sizes(shape: Sequence[int]) -> None:
    # sizes may be symbols of a compiler, whose values nobody knows
    known = isinstance(shape, Sequence) and not any(isinstance(n, (bool, float, str)) for n in shape)
    if not known or any(is_int(n) and n < 0 for n in shape):
        raise ValueError(f"shape must be sizes of at least 0, got {shape!r}")


def is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def check_bits(**bits: object) -> None:
    for name, value in bits.items():
        if not is_int(value) or value not in range(2, 9):
            raise ValueError(f"{name} must be an integer in [2, 8], got {value!r}")


def bytes_of_bits(bits: int) -> int:
    return -(-bits // 8)


def aligned(num_bytes: int) -> int:
    """With what fills a wire's last 16 bytes."""
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def check_encoded(name: str, x: Tensor) -> None:
    check_dtype(name, x, ENCODED)
    check_device(name, x, torch.device("cpu"), x.device if x.is_cuda else torch.device("cpu"))


def check_message(m: Tensor, shape: Sequence[int], device: torch.device) -> None:
    check_dtype("m", m, ENCODED)
    check_shape("m", m, "the shape of x", shape)
    check_device("m", m, device)
    if not m.is_contiguous():
        raise ValueError(f"m must be contiguous, got strides {list(m.stride())}")
    if m.requires_grad:
        raise ValueError("m must not require gradients, got requires_grad=True")


def check_no_gradients(x: Tensor, out: Tensor) -> None:
    if out.requires_grad or (x.requires_grad and torch.is_grad_enabled()):
        raise ValueError("out must be left out where gradients are wanted, got a tensor")
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")


def memory_of(name: str, wire: Tensor, dtype: torch.dtype) -> Tensor:
    """A wire without a header as elements."""
    if not wire.is_contiguous() or wire.storage_offset() % dtype.itemsize:
        raise ValueError(
            f"{name} must be contiguous and begin at a multiple of {dtype.itemsize} bytes, got strides "
            f"{list(wire.stride())} from byte {wire.storage_offset()} on"
        )
    return wire.view(dtype)


def check_apart(name: str, t: Tensor, other_name: str, other: Tensor) -> None:
    """What is written and what is read must not be the same memory."""
    if torch.compiler.is_compiling() or t.numel() == 0 or other.numel() == 0 or t.device != other.device:
        return
    if t.device.type == "meta" or t.untyped_storage().data_ptr() != other.untyped_storage().data_ptr():
        return

    def span(x: Tensor) -> tuple[int, int]:
        last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        begin = int(x.storage_offset()) * x.element_size()
        return begin, begin + int(last + 1) * x.element_size()

    (begin, end), (other_begin, other_end) = span(t), span(other)
    if begin < other_end and other_begin < end:
        raise ValueError(f"{name} must be other memory than {other_name}, got memory of it")


def wire_for(x: Tensor, size: int, out: Tensor | None) -> Tensor:
    if out is None:
        return torch.empty(size, dtype=torch.uint8, device=x.device)
    check_dtype("out", out, (torch.uint8,))
    check_shape("out", out, "[wire_size]", [size])
    check_device("out", out, x.device)
    check_apart("out", out, "x", x)
    if not out.is_contiguous():
        raise ValueError(f"out must be contiguous, got strides {list(out.stride())}")
    return out


def result_for(wire: Tensor, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None) -> Tensor:
    if dtype not in ENCODED:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype}")
    check_sizes(shape)
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=wire.device)
    check_dtype("out", out, (dtype,))
    check_shape("out", out, "shape", shape)
    check_device("out", out, wire.device)
    check_no_gradients(wire, out)
    check_apart("out", out, "wire", wire)
    return out


def decode_wire(
    op: Any, wire: Tensor, shape: Sequence[int], dtype: torch.dtype, out: Tensor | None
) -> Tensor:
    check_dtype("wire", wire, (torch.uint8,))
    result = result_for(wire, shape, dtype, out)
    _library.call(op.default, wire, result)
    return result
