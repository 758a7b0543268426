# SPDX-License-Identifier: Apache-2.0
"""Drop-in modules."""

from palmette.nn.boundary import QuantBoundary
from palmette.nn.convert import convert_to_nsa
from palmette.nn.rotary import RotaryEmbedding
from palmette.nn.sparse_attention import NativeSparseAttention, SparseAttentionReport, SparseBranches
from palmette.nn.sparse_cache import SparseKVCache

__all__ = [
    "NativeSparseAttention",
    "QuantBoundary",
    "RotaryEmbedding",
    "SparseAttentionReport",
    "SparseBranches",
    "SparseKVCache",
    "convert_to_nsa",
]
