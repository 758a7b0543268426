# SPDX-License-Identifier: Apache-2.0
"""Palmette: attention for everything irregular (trees of tokens, cascades, shared prefixes)."""

from __future__ import annotations

import importlib
from importlib import metadata
from typing import TYPE_CHECKING, Any

# Public name -> the module that defines it. Modules load on first use, so that `python -m palmette env` can
# report a broken installation instead of failing on it.
_EXPORTS = {
    "merge_state": "cascade",
    "merge_states": "cascade",
    "cascade_attention": "cascade",
    "Tree": "tree",
    "TreeAttentionIO": "tree_plan",
    "TreeAttentionPlan": "tree_plan",
    "plan_tree_attention": "tree_plan",
    "tree_attention": "tree_attention",
    "verify_greedy": "verify",
    "verify_sample": "verify",
    "compact_kv_": "verify",
}
_SUBMODULES = ("integrations", "nn", "pipelines", "reference", "testing")

if TYPE_CHECKING:
    from palmette.cascade import cascade_attention, merge_state, merge_states
    from palmette.tree import Tree
    from palmette.tree_attention import tree_attention
    from palmette.tree_plan import TreeAttentionIO, TreeAttentionPlan, plan_tree_attention
    from palmette.verify import compact_kv_, verify_greedy, verify_sample

__all__ = [
    "Tree",
    "TreeAttentionIO",
    "TreeAttentionPlan",
    "cascade_attention",
    "compact_kv_",
    "merge_state",
    "merge_states",
    "plan_tree_attention",
    "tree_attention",
    "verify_greedy",
    "verify_sample",
]

try:
    __version__ = metadata.version("palmette")
except metadata.PackageNotFoundError:  # a source tree on sys.path that was never installed
    __version__ = "unknown"


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(f"palmette.{_EXPORTS[name]}"), name)
        globals()[name] = value
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"palmette.{name}")
    raise AttributeError(f"module 'palmette' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_EXPORTS, *_SUBMODULES})
