# SPDX-License-Identifier: Apache-2.0
"""One transformer, three kinds of attention: dense, a sliding window, and native sparse attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...nn import NativeSparseAttention, RotaryEmbedding, SparseKVCache
from ...sparse_attention import sliding_window_attention
from .draws import generator_for

ATTENTIONS = ("dense", "window", "nsa")


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a ``LanguageModel``; those from ``window`` on are NSA's, ``window`` also the window model's.

    Attributes:
        vocab_size: Tokens.
        layers, hidden_size, mlp_size: Of the transformer.
        num_q_heads, num_kv_heads, head_dim: Of its attention.
        rotary: Channels of a head that RoPE turns, even; the others match by content at any distance.
        window: Keys of the sliding window, the query's own included.
        kernel_size, kernel_stride: Tokens of a compressed key, and from one to the next.
        block_size, topk: Keys of a block of the selection, and blocks that a query reads.
        compression_gain: Compressed keys and values begin as so many times the mean of their tokens. With
            ``kernel_size`` they begin as the sum: one token that matches among others that do not still
            stands out in the softmax, so that there is a gradient to learn from.
        token_shift: Whether each token's embedding has a learnt share of the one before.
    """

    vocab_size: int = 257
    layers: int = 3
    hidden_size: int = 128
    mlp_size: int = 384
    num_q_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    rotary: int = 16
    window: int = 64
    kernel_size: int = 16
    kernel_stride: int = 8
    block_size: int = 32
    topk: int = 8
    compression_gain: float = 1.0
    token_shift: bool = False


class PartialRotaryEmbedding(nn.Module):
    """RoPE on the first ``rotary`` channels, nothing on the others.

    Channels that are never turned compare a query with a key alike at every distance, so what they learn on
    short sequences holds on long ones.

    Args:
        head_dim: D of x [T, heads, D].
        rotary: channels to turn, even, at most D.

    Raises:
        ValueError: rotary is odd or larger than head_dim.

    Source: p-RoPE (arXiv 2410.06205); GPT-NeoX's ``rotary_pct``.
    """

    def __init__(self, head_dim: int, rotary: int) -> None:
        super().__init__()
        if rotary > head_dim:
            raise ValueError(f"rotary must be at most head_dim ({head_dim}), got {rotary}")
        self.rotary = rotary
        self.rope = RotaryEmbedding(rotary)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """Turn x [T, heads, D] to positions [T]."""
        turned = self.rope(x[..., : self.rotary], positions)
        return torch.cat([turned, x[..., self.rotary :]], -1)


class PlainAttention(nn.Module):
    """Dense causal or windowed attention, with the projections of ``NativeSparseAttention``.

    Args:
        kind: ``"dense"``: PyTorch's SDPA; ``"window"``: ``palmette.sliding_window_attention``.
        sizes: Of the model.
    """

    def __init__(self, kind: str, sizes: ModelSizes) -> None:
        super().__init__()
        self.kind, self.sizes = kind, sizes
        queries, keys = sizes.num_q_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.proj_q = nn.Linear(sizes.hidden_size, queries, bias=False)
        self.proj_k = nn.Linear(sizes.hidden_size, keys, bias=False)
        self.proj_v = nn.Linear(sizes.hidden_size, keys, bias=False)
        self.proj_o = nn.Linear(queries, sizes.hidden_size, bias=False)
        self.rope = PartialRotaryEmbedding(sizes.head_dim, sizes.rotary)

    def forward(self, x: Tensor) -> Tensor:
        """Attention of every token of x [B, N, hidden] to those before it, [B, N, hidden]."""
        sizes = self.sizes
        batch, length = x.shape[:2]
        packed = x.flatten(0, 1)
        positions = torch.arange(length).repeat(batch)
        q = self.rope(self.proj_q(packed).unflatten(-1, (sizes.num_q_heads, -1)), positions)
        k = self.rope(self.proj_k(packed).unflatten(-1, (sizes.num_kv_heads, -1)), positions)
        v = self.proj_v(packed).unflatten(-1, (sizes.num_kv_heads, -1))
        if self.kind == "window":
            ends = torch.arange(batch + 1, dtype=torch.int32) * length
            mixed = sliding_window_attention(q, k, v, ends, window=sizes.window)
            assert isinstance(mixed, Tensor)
        else:
            group = sizes.num_q_heads // sizes.num_kv_heads
            q, k, v = (t.unflatten(0, (batch, length)).transpose(1, 2) for t in (q, k, v))
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            mixed = mixed.transpose(1, 2).flatten(0, 1)
        projected: Tensor = self.proj_o(mixed.flatten(1)).view(batch, length, -1)
        return projected


class Block(nn.Module):
    """Attention and a SwiGLU MLP, each behind an RMSNorm and added to what went in."""

    def __init__(self, attention: str, sizes: ModelSizes) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(sizes.hidden_size)
        self.attention: nn.Module
        if attention == "nsa":
            self.attention = NativeSparseAttention(
                sizes.hidden_size,
                sizes.num_q_heads,
                sizes.num_kv_heads,
                sizes.head_dim,
                kernel_size=sizes.kernel_size,
                kernel_stride=sizes.kernel_stride,
                block_size=sizes.block_size,
                topk=sizes.topk,
                window_size=sizes.window,
                rope=PartialRotaryEmbedding(sizes.head_dim, sizes.rotary),
            )
        else:
            self.attention = PlainAttention(attention, sizes)
        self.norm_mlp = nn.RMSNorm(sizes.hidden_size)
        self.mlp_in = nn.Linear(sizes.hidden_size, 2 * sizes.mlp_size, bias=False)
        self.mlp_out = nn.Linear(sizes.mlp_size, sizes.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: SparseKVCache | None) -> Tensor:
        """x [B, N, hidden] -> [B, N, hidden]; the cache is for NSA only."""
        normed = self.norm_attention(x)
        x = x + (self.attention(normed) if cache is None else self.attention(normed, cache=cache))
        gate, up = self.mlp_in(self.norm_mlp(x)).chunk(2, -1)
        return x + self.mlp_out(F.silu(gate) * up)  # type: ignore[no-any-return]


class LanguageModel(nn.Module):
    """A pre-norm transformer over tokens, input and output embeddings shared.

    Parameters that two kinds of attention have in common begin with the same values for the same seed.

    Args:
        attention: ``"dense"``, ``"window"`` or ``"nsa"``.
        sizes: Of the model.
        seed: Of the initial weights. Default: 0.

    Raises:
        ValueError: the attention is unknown, or sizes do not fit each other.
    """

    def __init__(self, attention: str, sizes: ModelSizes, seed: int = 0) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}, got {attention!r}")
        self.kind, self.sizes = attention, sizes
        self.embedding = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        # RWKV's token shift (arXiv 2305.13048), once instead of in every layer
        self.shift = nn.Parameter(torch.full((sizes.hidden_size,), 0.5)) if sizes.token_shift else None
        self.blocks = nn.ModuleList(Block(attention, sizes) for _ in range(sizes.layers))
        self.norm = nn.RMSNorm(sizes.hidden_size)
        self._initialise(seed)

    @torch.no_grad()
    def _initialise(self, seed: int) -> None:
        plain = self.sizes.hidden_size**-0.5  # keeps the size of what a matrix is given
        residual = plain / (2 * self.sizes.layers) ** 0.5  # GPT-2's, so that depth does not add up
        for name, weight in self.named_parameters():
            # a generator for each name: what one kind has in addition shifts nothing for the others
            generator = generator_for("weights", seed, name)
            if name.endswith(("compress_key", "compress_value")):
                width = weight.shape[2]
                taps = weight.shape[1] // width
                mean = torch.eye(width).repeat(taps, 1) / taps
                noise = torch.randn(weight.shape, generator=generator)
                start = mean + 0.1 / (taps * width) ** 0.5 * noise
                weight.copy_(self.sizes.compression_gain * start)
            elif weight.dim() > 1:
                deviation = residual if name.endswith(("proj_o.weight", "mlp_out.weight")) else plain
                if name.endswith("intra_block_pe"):
                    deviation = 0.02  # as the module does
                weight.copy_(deviation * torch.randn(weight.shape, generator=generator))

    @property
    def num_parameters(self) -> int:
        """Learnt numbers, the shared embedding once."""
        return sum(weight.numel() for weight in self.parameters())

    def hidden(self, tokens: Tensor, caches: Sequence[SparseKVCache] | None = None) -> Tensor:
        """What the output embedding sees: [B, N, hidden] for tokens [B, N], int64."""
        x = self.embedding(tokens)
        if self.shift is not None:
            if caches is not None:
                raise ValueError("caches must be None for a model with token_shift, got some")
            x = x + self.shift * F.pad(x[:, :-1], (0, 0, 1, 0))
        for layer, block in enumerate(self.blocks):
            x = block(x, None if caches is None else caches[layer])
        return self.norm(x)  # type: ignore[no-any-return]

    def forward(self, tokens: Tensor, caches: Sequence[SparseKVCache] | None = None) -> Tensor:
        """Logits of the next token.

        Args:
            tokens: [B, N], int64.
            caches: One per layer, to go on from (``"nsa"`` only). Default: none.

        Returns:
            [B, N, vocab].
        """
        return F.linear(self.hidden(tokens, caches), self.embedding.weight)

    def keys_read(self, length: int) -> int:
        """Keys that the last query of ``length`` tokens reads in a layer, over all branches.

        Source: ``SparseAttentionReport.keys_read`` for ``"nsa"``.
        """
        sizes = self.sizes
        if self.kind == "dense":
            return length
        windowed = min(length, sizes.window)
        if self.kind == "window":
            return windowed
        compressed = max(0, (length - sizes.kernel_size) // sizes.kernel_stride + 1)
        return compressed + min(length, sizes.topk * sizes.block_size) + windowed
