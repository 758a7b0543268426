# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules."""

from palmette.nn.rotary import RotaryEmbedding
from palmette.nn.sparse_attention import NativeSparseAttention, SparseAttentionReport
from palmette.nn.sparse_cache import SparseKVCache

__all__ = ["NativeSparseAttention", "RotaryEmbedding", "SparseAttentionReport", "SparseKVCache"]
