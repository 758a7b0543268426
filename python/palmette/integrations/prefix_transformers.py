# SPDX-License-Identifier: Apache-2.0
"""Attention of a transformers model for tokens that come after a shared prefix; its model is not edited.

``pipelines.SharedPrefixSchedule`` gives a forward of the model ``prefix_pass=``, which reaches the attention
of every layer as a keyword argument and attends for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._extras import require

if TYPE_CHECKING:
    from palmette.pipelines.shared_prefix.path import PrefixPass

require("transformers", "palmette.pipelines.SharedPrefixSchedule", install="'palmette[transformers]'")

from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

ATTENTION_NAME = "palmette_prefix"


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    prefix_pass: PrefixPass | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: query [1, Hq, T, D], key and value [1, Hk, T, D] -> out [1, T, Hq, Dv]."""
    if prefix_pass is None:
        raise ValueError(
            "model must not be called by others while a step of it runs, and must pass keyword arguments to "
            "its attention, got a call without prefix_pass (in loss_fn?)"
        )
    if dropout:
        raise ValueError(f"attention_dropout must be 0 behind a shared prefix, got {dropout}")
    if s_aux is not None:
        raise ValueError("attention sinks must be None behind a shared prefix, got a tensor")
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if torch.is_autocast_enabled(q.device.type):  # as for PyTorch's own attention
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    layer: Any = module.layer_idx
    out = prefix_pass.attend(
        int(layer), q, k, v, scale=scaling, softcap=softcap or 0.0, window=sliding_window
    )
    return out.unsqueeze(0), None


def _no_mask(**_: Any) -> None:
    """The plan says who sees whom."""


@contextmanager
def prefix_attention_of(model: Any) -> Iterator[None]:
    """Within, the model attends behind a prefix; afterwards as before."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _no_mask)
    config = model.config
    before = {"": config._attn_implementation}
    for name in getattr(config, "sub_configs", None) or {}:
        if (part := getattr(config, name, None)) is not None:
            before[name] = part._attn_implementation
    undecided = [name for name, value in before.items() if value is None]
    try:
        model.set_attn_implementation(ATTENTION_NAME)
        yield
    finally:
        model.set_attn_implementation({name: value for name, value in before.items() if value is not None})
        for name in undecided:  # transformers takes no None back
            (getattr(config, name) if name else config)._attn_implementation = None
