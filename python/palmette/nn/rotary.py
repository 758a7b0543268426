# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding, for modules that are not given their model's."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Rotates pairs of channels (i, i + D / 2) by ``position * base ** (-2 i / D)``.

    Called with x [T, heads, D] and positions [T], integers; returns the rotated x, same dtype. Angles are
    computed in float32 whatever the dtype of x.

    Args:
        head_dim: D, even.
        base: Default: 10000.

    Raises:
        ValueError: head_dim is odd.

    Source: RoFormer (arXiv 2104.09864), in the layout of Llama.
    """

    inverse: Tensor

    def __init__(self, head_dim: int, base: float = 10000.0) -> None:
        super().__init__()
        if head_dim % 2 or head_dim < 2:
            raise ValueError(f"head_dim must be even and positive, got {head_dim}")
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("inverse", base**-exponent, persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        angle = positions.to(device=x.device, dtype=torch.float32)[:, None] * self.inverse.float()
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        a, b = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
