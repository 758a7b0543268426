# SPDX-License-Identifier: Apache-2.0
"""Which models of transformers a schedule can run."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor

from .context import random_state_of
from .vocabulary import logits_of, softcap_of

LAYER_TYPES = ("full_attention", "sliding_attention")


def check_model(model: Any) -> Any:
    """Is it one that a schedule can run? Returns the configuration of its decoder."""
    if not (hasattr(model, "config") and hasattr(model, "get_decoder")):
        raise ValueError(
            f"model must be a causal language model of transformers, not wrapped, got {type(model).__name__}"
        )
    if model.get_output_embeddings() is None:
        raise ValueError(f"model must have a language-model head, got {type(model).__name__} without one")
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "model must have no learned prompts (prompt or prefix tuning), got a model with some"
        )
    if any(hasattr(p, "device_mesh") for p in model.parameters()):
        raise ValueError("model must hold whole parameters, got DTensors (FSDP2 is not supported)")
    config = model.config.get_text_config()
    others = sorted({*(getattr(config, "layer_types", None) or ())} - {*LAYER_TYPES})
    if others:
        raise ValueError(
            f"layer_types of the model must be of {', '.join(LAYER_TYPES)}, got {', '.join(others)}"
        )
    for name in ("logit_scale", "logits_scaling"):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise ValueError(f"{name} of the model must be 1, got {getattr(config, name)}")
    _check_logits(model, config)
    return config


@torch.no_grad()
def _check_logits(model: Any, config: Any) -> None:
    """Are the model's logits those of its output embeddings? Runs three tokens."""
    found: list[Tensor] = []
    decoder = model.get_decoder()
    handle = decoder.register_forward_hook(lambda _, __, out: found.append(out[0]))
    device = next(model.parameters()).device
    ids = torch.arange(min(3, config.vocab_size), device=device)[None]
    try:
        with random_state_of(None, device):
            want = model(input_ids=ids, use_cache=False, return_dict=True).logits
    finally:
        handle.remove()
    fits = False
    if len(found) == 1:
        with contextlib.suppress(RuntimeError):  # shapes that do not fit
            got = logits_of(model.get_output_embeddings(), softcap_of(config), found[0])
            # of the same hidden states; autocast rounds to 8 bits
            fits = not float((got - want).abs().max()) > 0.05 * float(want.abs().max())
    if not fits:
        raise ValueError(
            f"logits of the model must be its output embeddings times its decoder's hidden states, got "
            f"{type(model).__name__}, whose logits are others (scaled, or of a larger head)"
        )


def longest_path(config: Any) -> float:
    """Tokens of a path up to which rotary positions do not depend on how long it is."""
    found = getattr(config, "rope_parameters", None) or {}
    kinds = [found] if "rope_type" in found else [part for part in found.values() if isinstance(part, dict)]
    limits = [
        part.get("original_max_position_embeddings") or config.max_position_embeddings
        for part in kinds
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
    return min(limits, default=math.inf)
