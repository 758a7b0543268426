# SPDX-License-Identifier: Apache-2.0
"""What codecs are measured against."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from palmette.reference.hadamard import hadamard_matrix
from torch import Tensor

from bench.peers import Contender


@dataclass
class Quantizer:
    """A peer that encodes and decodes.

    Attributes:
        name: For tables.
        encode: A tensor to whatever holds it.
        decode: The other way round.
        compiled: Is it torch.compile'd?
    """

    name: str
    encode: Callable[[Tensor], Any]
    decode: Callable[[Any], Tensor]
    compiled: bool = False


def fired_share(wire: Tensor, shape: Sequence[int]) -> float:
    """The part of a default wire's tiles that were transformed."""
    tokens = shape[0] * shape[1]
    tiles = tokens * shape[2] // 64
    begin = 64 + -(-tokens // 128) * 16
    bits = wire[begin : begin + tiles // 8]
    return sum(int(byte).bit_count() for byte in bits.tolist()) / tiles


def hadamard_in_place(x: Tensor) -> list[Contender]:
    """fht-cpu, where it is installed."""
    try:
        fht_cpu = importlib.import_module("fht_cpu")
    except ImportError:
        return []
    array, threads = x.numpy(), torch.get_num_threads()
    return [Contender("fht-cpu", lambda: fht_cpu.fht(array, num_threads=threads), lambda _: x)]


def hadamard_by_matmul(x: Tensor) -> Contender:
    """torch.mm with the matrix; it cannot work in place."""
    h, out = hadamard_matrix(x.shape[-1]).float() * x.shape[-1] ** -0.5, torch.empty_like(x)
    return Contender("torch.mm", lambda: torch.mm(x, h, out=out), lambda out: out)


# ---- TAH, one PyTorch operation after the other


def unfused_tah(x: Tensor, size: int = 64, low: int = 3, high: int = 4, ratio: float = 0.8) -> Quantizer:
    """The published steps: entropy, bits per token, gate, swap, transform, quantization, packing."""
    shape, dtype = x.shape, x.dtype
    h = hadamard_matrix(size).float() * size**-0.5

    def encode(x: Tensor) -> tuple[Tensor, ...]:
        x = x.float()
        a = x.abs()
        p = a / a.sum(-1, keepdim=True)
        entropy = -(p * (p + 1e-12).log()).sum(-1)
        count = int(shape[1] * (1 - ratio) + 1e-9)
        is_low = torch.zeros_like(entropy, dtype=torch.bool)
        is_low.scatter_(1, entropy.argsort(1)[:, :count], True)
        tiles = x.view(*shape[:2], -1, size)
        best = tiles.abs().topk(2, -1)
        fired = best.values[..., 0] >= 2 * best.values[..., 1]
        pivot = best.indices[..., :1]
        swapped = tiles.scatter(-1, pivot, tiles[..., :1])
        swapped[..., :1] = tiles.gather(-1, pivot)
        tiles = torch.where(fired[..., None], swapped @ h, tiles)
        levels = torch.where(is_low, 2**low - 1, 2**high - 1)[..., None]
        zero = tiles.amin(-1)
        step = (tiles.amax(-1) - zero) / levels
        codes = ((tiles - zero[..., None]) / step[..., None].clamp(min=1e-12)).round().to(torch.uint8)
        few, many = codes[is_low], codes[~is_low]
        packed = many[..., ::2] | many[..., 1::2] << 4
        bits = few.view(-1, 8, 1) >> torch.arange(3, dtype=torch.uint8) & 1
        weights = 2 ** torch.arange(8, dtype=torch.uint8)
        packed_few = (bits.reshape(-1, 3, 8) * weights).sum(-1, dtype=torch.uint8)
        return packed, packed_few, zero.half(), step.half(), is_low, fired, pivot.to(torch.uint8)

    def decode(wire: tuple[Tensor, ...]) -> Tensor:
        packed, packed_few, zero, step, is_low, fired, pivot = wire
        codes = torch.empty(*shape[:2], shape[2] // size, size, dtype=torch.uint8)
        codes[~is_low] = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
        bits = (packed_few[..., None] >> torch.arange(8, dtype=torch.uint8) & 1).view(-1, 8, 3)
        few = (bits << torch.arange(3, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
        codes[is_low] = few.view(-1, shape[2] // size, size)
        tiles = zero.float()[..., None] + codes * step.float()[..., None]
        back = tiles @ h
        swapped = back.scatter(-1, pivot.long(), back[..., :1])
        swapped[..., :1] = back.gather(-1, pivot.long())
        return torch.where(fired[..., None], swapped, tiles).view(shape).to(dtype)

    return Quantizer("unfused torch", encode, decode)


# ---- 4 bits in groups


def four_bit(x: Tensor, group: int) -> list[Quantizer]:
    """All that are there: a compiled reference, and packages that are installed."""
    makers = (_compiled, _bitsandbytes, _torchao, _hqq, _quanto)
    found = []
    for make in makers:
        try:
            found.append(make(x, group))
        except ImportError:
            continue
    return found


def _compiled(x: Tensor, group: int) -> Quantizer:
    shape, dtype = x.shape, x.dtype

    @torch.compile(dynamic=False)
    def encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        tiles = x.view(-1, group).float()
        least, most = tiles.amin(1, keepdim=True), tiles.amax(1, keepdim=True)
        step = ((most - least) / 15).half()
        zero = least.half()
        inverse = 1 / step.float().clamp(min=1e-7)
        codes = ((tiles - zero.float()) * inverse).round().clamp(0, 15).to(torch.uint8)
        codes = codes.view(-1, group // 2, 2)
        return codes[..., 0] | codes[..., 1] << 4, zero, step

    @torch.compile(dynamic=False)
    def decode(packed: Tensor, zero: Tensor, step: Tensor) -> Tensor:
        codes = torch.stack((packed & 15, packed >> 4), -1).view(-1, group)
        return (zero.float() + codes * step.float()).view(shape).to(dtype)

    return Quantizer("torch.compile", encode, lambda wire: decode(*wire), compiled=True)


def _bitsandbytes(x: Tensor, group: int) -> Quantizer:
    functional = importlib.import_module("bitsandbytes.functional")
    return Quantizer(
        "bitsandbytes nf4",
        lambda x: functional.quantize_4bit(x, blocksize=group, quant_type="nf4"),
        lambda wire: functional.dequantize_4bit(*wire),
    )


def _torchao(x: Tensor, group: int) -> Quantizer:
    primitives = importlib.import_module("torchao.quantization.quant_primitives")
    mapping, block, options = primitives.MappingType.ASYMMETRIC, (1, group), (torch.uint8, 0, 15)

    def encode(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scale, zero = primitives.choose_qparams_affine(x, mapping, block, *options)
        return primitives.quantize_affine(x, block, scale, zero, *options), scale, zero

    def decode(wire: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        codes, scale, zero = wire
        result: Tensor = primitives.dequantize_affine(
            codes, block, scale, zero, *options, output_dtype=x.dtype
        )
        return result

    return Quantizer("torchao eager (unpacked)", encode, decode)


def _hqq(x: Tensor, group: int) -> Quantizer:
    quantize = importlib.import_module("hqq.core.quantize").Quantizer

    def encode(x: Tensor) -> Any:
        return quantize.quantize(
            x, nbits=4, group_size=group, axis=1, optimize=False, device="cpu", compute_dtype=x.dtype
        )

    return Quantizer("hqq", encode, lambda wire: quantize.dequantize(*wire))


def _quanto(x: Tensor, group: int) -> Quantizer:
    quanto = importlib.import_module("optimum.quanto")
    optimizer = quanto.MaxOptimizer()

    def encode(x: Tensor) -> Any:
        scale, shift = optimizer(x, quanto.qint4, 0, group)
        return quanto.quantize_weight(x, quanto.qint4, 0, scale, shift, group_size=group, optimized=False)

    return Quantizer("optimum-quanto", encode, lambda wire: wire.dequantize())
