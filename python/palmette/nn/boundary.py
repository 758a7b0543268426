# SPDX-License-Identifier: Apache-2.0
"""A boundary between stages of a pipeline, in one process."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palmette.codecs import Codec


class QuantBoundary(torch.nn.Module):
    """Sends activations forward and gradients backward through codecs, as two stages of a pipeline would.

    For finding out what a codec does to training or to perplexity without a pipeline: put it between two
    layers. The gradient is the straight-through one: what the next layers return is encoded and decoded, and
    given to the layers before.

    Args:
        forward_codec: for activations; None sends them as they are.
        backward_codec: for gradients; None sends them as they are.

    Attributes:
        wire_bytes: bytes that would have been sent so far, forward and backward, as a list of two.

    Source: one-process simulation of TAH-Quant (arXiv 2506.01352), section 4, and AQ-SGD (arXiv 2206.01299).
    """

    def __init__(self, forward_codec: Codec | None, backward_codec: Codec | None) -> None:
        super().__init__()
        for name, codec in (("forward_codec", forward_codec), ("backward_codec", backward_codec)):
            if codec is not None and not isinstance(codec, Codec):
                raise ValueError(f"{name} must be a Codec or None, got {type(codec).__name__}")
        self.forward_codec, self.backward_codec = forward_codec, backward_codec
        self.wire_bytes = [0, 0]

    def forward(self, x: Tensor) -> Tensor:
        """Encodes and decodes.

        Args:
            x: whatever the codecs take; float32, bfloat16 or float16.

        Returns:
            Of x's shape and dtype.

        Raises:
            ValueError: a codec does not take x, or its gradient (in backward).
        """
        result: Tensor = _ThroughCodecs.apply(x, self)  # type: ignore[no-untyped-call]
        return result

    def extra_repr(self) -> str:
        return f"forward={self.forward_codec}, backward={self.backward_codec}"

    def send(self, x: Tensor, direction: int) -> Tensor:
        """What arrives of x: 0 forward, 1 backward."""
        codec = (self.forward_codec, self.backward_codec)[direction]
        if codec is None:
            self.wire_bytes[direction] += x.numel() * x.element_size()
            return x
        wire = codec.encode(x)
        self.wire_bytes[direction] += wire.numel()
        return codec.decode(wire, x.shape, dtype=x.dtype)


class _ThroughCodecs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, boundary: QuantBoundary) -> Tensor:
        ctx.boundary = boundary
        return boundary.send(x, 0).view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        return ctx.boundary.send(grads[0], 1), None
