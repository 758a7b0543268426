# SPDX-License-Identifier: Apache-2.0
"""Palmette: attention for everything irregular: trees of tokens, cascades, shared prefixes, sparse blocks."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import Any

_SUBMODULES = ("integrations", "nn", "pipelines", "reference", "testing")  # import on first use
_broken: Exception | None = None

try:
    from palmette.cascade import cascade_attention, merge_state, merge_states
    from palmette.codecs import (
        CastCodec,
        Codec,
        FixpointCodec,
        TahCodec,
        delta_decode_,
        delta_encode_,
        fixpoint_decode,
        fixpoint_encode,
        fixpoint_wire_size,
        tah_decode,
        tah_encode,
        tah_wire_size,
        wire_status,
    )
    from palmette.hadamard import hadamard_transform
    from palmette.losses import group_advantages, policy_loss, token_logprobs
    from palmette.prefix_attention import PrefixPlan, plan_prefix_attention, prefix_attention
    from palmette.sparse_attention import (
        compress,
        compressed_attention,
        select_blocks,
        selected_attention,
        sliding_window_attention,
    )
    from palmette.tree import Tree
    from palmette.tree_attention import tree_attention
    from palmette.tree_plan import TreeAttentionIO, TreeAttentionPlan, plan_tree_attention
    from palmette.verify import compact_kv_, verify_greedy, verify_sample
except (ImportError, RuntimeError) as error:  # raised on first use: `python -m palmette env` must not fail
    _broken = error

__all__ = [
    "CastCodec",
    "Codec",
    "FixpointCodec",
    "PrefixPlan",
    "TahCodec",
    "Tree",
    "TreeAttentionIO",
    "TreeAttentionPlan",
    "cascade_attention",
    "compact_kv_",
    "compress",
    "compressed_attention",
    "delta_decode_",
    "delta_encode_",
    "fixpoint_decode",
    "fixpoint_encode",
    "fixpoint_wire_size",
    "group_advantages",
    "hadamard_transform",
    "merge_state",
    "merge_states",
    "plan_prefix_attention",
    "plan_tree_attention",
    "policy_loss",
    "prefix_attention",
    "select_blocks",
    "selected_attention",
    "sliding_window_attention",
    "tah_decode",
    "tah_encode",
    "tah_wire_size",
    "token_logprobs",
    "tree_attention",
    "verify_greedy",
    "verify_sample",
    "wire_status",
]

try:
    __version__ = metadata.version("palmette")
except metadata.PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return importlib.import_module(f"palmette.{name}")
    if name in __all__ and _broken is not None:
        hint = (
            ""
            if isinstance(_broken, ImportError)
            else " (is the compiled library older than the Python code?)"
        )
        raise ImportError(f"{_broken}{hint}") from _broken
    raise AttributeError(f"module 'palmette' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
