# SPDX-License-Identifier: Apache-2.0
"""Hadamard matrices, and the transform as a product with one of them."""

from __future__ import annotations

import torch
from torch import Tensor


def _paley(q: int) -> Tensor:
    """Legendre's symbol of i - j, for a prime q: [q, q]."""
    squares = {i * i % q for i in range(1, q)}
    symbol = torch.tensor([0, *(1 if i in squares else -1 for i in range(1, q))])
    i = torch.arange(q)
    return symbol[(i[:, None] - i) % q]


def hadamard_matrix(n: int) -> Tensor:
    """H with H @ H.T = n I, [n, n] float64, for n = 2^k, 12 2^k, 20 2^k, 28 2^k (and so 40 2^k).

    Sylvester's matrix for 2^k; Paley's first construction for 12 and 20, his second for 28; and the Kronecker
    product of the small one with Sylvester's.
    """
    odd = n // (n & -n)
    if odd == 1:
        h = torch.ones(1, 1, dtype=torch.float64)
        while h.shape[0] < n:
            h = torch.kron(torch.tensor([[1.0, 1], [1, -1]], dtype=torch.float64), h)
        return h
    base = 4 * odd
    if base not in (12, 20, 28) or n % base:
        raise ValueError(f"n must be 2^k, 12 * 2^k, 20 * 2^k, 28 * 2^k or 40 * 2^k, got {n}")
    if base == 28:
        q = _paley(13)
        s = torch.zeros(14, 14, dtype=torch.long)
        s[0, 1:] = s[1:, 0] = 1
        s[1:, 1:] = q
        h = torch.kron(s, torch.tensor([[1, 1], [1, -1]])) + torch.kron(
            torch.eye(14, dtype=torch.long), torch.tensor([[1, -1], [-1, -1]])
        )
    else:
        s = torch.zeros(base, base, dtype=torch.long)
        s[0, 1:], s[1:, 0] = 1, -1
        s[1:, 1:] = _paley(base - 1)
        h = s + torch.eye(base, dtype=torch.long)
    return torch.kron(h.double(), hadamard_matrix(n // base))


def hadamard_transform(x: Tensor, scale: float = 1.0, *, transpose: bool = False) -> Tensor:
    """``scale * x @ H.T``, or ``scale * x @ H``, in the dtype of x."""
    h = hadamard_matrix(x.shape[-1]).to(x.dtype)
    return (x @ (h if transpose else h.T)) * scale


def fwht(x: Tensor) -> Tensor:
    """The same for 2^k and scale 1, by butterflies of distance 1, 2, 4 ..., as the codecs compute it."""
    size, h = x.shape[-1], 1
    while h < size:
        a, b = x.unflatten(-1, (size // (2 * h), 2, h)).unbind(-2)
        x = torch.stack((a + b, a - b), -2).flatten(-3)
        h *= 2
    return x
