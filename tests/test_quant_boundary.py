# SPDX-License-Identifier: Apache-2.0
"""nn.QuantBoundary: what arrives, forward and backward, and how much was sent."""

from __future__ import annotations

import palmette
import pytest
import torch
from palmette import CastCodec, FixpointCodec, TahCodec
from palmette.nn import QuantBoundary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_directions(backend, dtype):
    boundary = QuantBoundary(TahCodec(), FixpointCodec(6))
    x = torch.randn(2, 5, 64).to(dtype).requires_grad_()
    y = boundary(x)
    assert torch.equal(y, palmette.tah_decode(palmette.tah_encode(x), x.shape, dtype=dtype))
    grad = torch.randn(2, 5, 64).to(dtype)
    y.backward(grad)
    wire = palmette.fixpoint_encode(grad, bits=6)
    assert torch.equal(x.grad, palmette.fixpoint_decode(wire, x.shape, dtype=dtype))
    assert boundary.wire_bytes == [palmette.tah_wire_size(x.shape), wire.numel()]


@pytest.mark.parametrize("codec", [None, CastCodec()])
def test_lossless(codec):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(16, 16), torch.nn.Linear(16, 4)]
    x = torch.randn(3, 7, 16)
    want = torch.autograd.grad(layers[1](layers[0](x).tanh()).sum(), layers[0].weight)
    boundary = QuantBoundary(codec, codec)
    got = torch.autograd.grad(layers[1](boundary(layers[0](x).tanh())).sum(), layers[0].weight)
    assert torch.equal(got[0], want[0])
    assert boundary.wire_bytes == [3 * 7 * 16 * 4] * 2


def test_training_goes_on(num_threads):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 64),
        torch.nn.Tanh(),
        QuantBoundary(TahCodec(), FixpointCodec(6)),
        torch.nn.Linear(64, 1),
    )
    x = torch.randn(4, 16, 8)
    y = x.sum(-1, keepdim=True).sin()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = (model(x) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.15 * losses[0]


def test_without_gradients_and_printing():
    boundary = QuantBoundary(TahCodec(tile_size=32), None)
    with torch.no_grad():
        assert boundary(torch.randn(2, 64)).shape == (2, 64)
    assert "forward=TahCodec(tile_size=32, " in repr(boundary)
    assert "backward=None" in repr(boundary)
    with pytest.raises(ValueError, match="forward_codec must be a Codec or None, got str"):
        QuantBoundary("tah", None)
    with pytest.raises(ValueError, match="tile_size must be a divisor of the 48 channels"):
        boundary(torch.randn(2, 48))
