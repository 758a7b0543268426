# SPDX-License-Identifier: Apache-2.0
"""The Hadamard transform: a rotation of rows in O(n log n), which spreads an outlier over all elements."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palmette import _library
from palmette._checks import check_device, check_dtype, check_shape
from palmette._codec_checks import ENCODED, check_no_gradients

_ops = torch.ops.palmette

SIZES = "2^k or 12, 20, 28 or 40 times 2^k, up to 40960"


def hadamard_transform(
    x: Tensor, scale: float = 1.0, *, transpose: bool = False, out: Tensor | None = None
) -> Tensor:
    """Multiplies the last dimension by a Hadamard matrix: ``scale * x @ H.T``, in O(n log n).

    H has entries 1 and -1 and H @ H.T = n I, so with ``scale = n ** -0.5`` the transform is orthogonal. For
    n = 2^k it is Sylvester's, which is symmetric. For n = 12, 20, 28 times 2^k it is the Kronecker product of
    Paley's matrix (first construction for 12 and 20, second for 28) with Sylvester's; 40 is 20 times 2. Those
    of 12 and 20 are not symmetric: the inverse is ``transpose=True``, and gradients use it.

    Args:
        x: [..., n]; float32, bfloat16 or float16 (float64 on the scalar backend). n is 2^k, or 12, 20, 28 or
            40 times 2^k, up to 40,960. Other sizes raise: a row that is padded, transformed and cut is not
            transformed by an orthogonal matrix.
        scale: a factor of the result. Sums are in float32, the result is rounded once.
        transpose: multiply by ``H`` instead of ``H.T``.
        out: [..., n], contiguous, of x's dtype; receives the result, ``out=x`` in place. Without gradients.

    Returns:
        [..., n], of x's dtype; ``out`` if it was given.

    Raises:
        ValueError: n has no matrix here; dtype or device does not fit; out with gradients.

    Source: QuaRot (arXiv 2404.00456), section 3; sizes of the package fast-hadamard-transform, whose matrices
    for 12, 20, 28 and 40 are other ones and whose backward applies the forward's matrix once more.
    """
    check_dtype("x", x, (*ENCODED, torch.float64))
    if x.dim() == 0 or not is_hadamard_size(x.shape[-1]):
        raise ValueError(f"x must be [..., n] with n = {SIZES}, got {list(x.shape)}")
    if out is None:
        result: Tensor = _library.call(_ops.hadamard_transform.default, x, float(scale), transpose)
        return result
    check_shape("out", out, "[..., n]", x.shape)
    check_dtype("out", out, (x.dtype,))
    check_device("out", out, x.device)
    check_no_gradients(x, out)
    _library.call(_ops.hadamard_transform_out.default, x.detach(), float(scale), transpose, out)
    return out


def is_hadamard_size(n: int) -> bool:
    """Does ``hadamard_transform`` take rows of n elements?"""
    odd = n // (n & -n) if n > 0 else 0
    return n <= 40960 and (odd == 1 or (odd in (3, 5, 7) and n % (4 * odd) == 0))


@torch.library.register_fake("palmette::hadamard_transform")
def _hadamard_transform_fake(x: Tensor, scale: float, transpose: bool) -> Tensor:
    return x.new_empty(x.shape)


def _hadamard_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ctx.scale, ctx.transpose = inputs


def _hadamard_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _ops.hadamard_transform(grad, ctx.scale, not ctx.transpose), None, None


torch.library.register_autograd(
    "palmette::hadamard_transform", _hadamard_backward, setup_context=_hadamard_setup
)


@torch.library.register_fake("palmette::hadamard_transform_out")
def _hadamard_transform_out_fake(x: Tensor, scale: float, transpose: bool, out: Tensor) -> None:
    return None
