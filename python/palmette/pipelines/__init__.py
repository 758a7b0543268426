# SPDX-License-Identifier: Apache-2.0
"""Whole systems on top of the operators. Extra dependencies are imported when they are used."""

import importlib
from typing import Any

from .activation_store import ActivationStore
from .delta_codec import DeltaCodec
from .records import Completion, Step, Verified
from .rl import StalenessGate, VadeSampler
from .search import (
    ThoughtNode,
    Thoughts,
    beam_search,
    best_of_n,
    few_shot,
    few_shot_steps,
    tree_of_thought,
    tree_of_thought_steps,
)
from .token_trees import TokenRecycling, TokenTree, medusa_paths
from .tree_decoding import TreeDecoder

__all__ = [
    "ActivationStore",
    "Completion",
    "DeltaCodec",
    "Edge",
    "PipelineError",
    "QuantPipelineStage",
    "SharedPrefixSchedule",
    "StalenessGate",
    "Step",
    "ThoughtNode",
    "Thoughts",
    "TokenRecycling",
    "TokenTree",
    "TreeDecoder",
    "VadeSampler",
    "Verified",
    "beam_search",
    "best_of_n",
    "few_shot",
    "few_shot_steps",
    "medusa_paths",
    "tree_of_thought",
    "tree_of_thought_steps",
]

# imported on first use: torch.distributed takes a second, and transformers more
_LATER = dict.fromkeys(("Edge", "PipelineError", "QuantPipelineStage"), "pipeline_parallel") | {
    "SharedPrefixSchedule": "shared_prefix"
}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(f"palmette.pipelines.{_LATER[name]}"), name)
    raise AttributeError(f"module 'palmette.pipelines' has no attribute {name!r}")
