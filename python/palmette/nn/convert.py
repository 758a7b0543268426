# SPDX-License-Identifier: Apache-2.0
"""Sparse attention for models that exist."""

from __future__ import annotations

from typing import Any


def convert_to_nsa(model: Any, **options: Any) -> Any:
    """Swaps the attention of a Hugging Face Llama or Qwen model for native sparse attention, in place.

    Projections and norms stay; compression starts near the mean of a block and gates near one half, so the
    model has to be trained on. It generates with a cache of its own, and is saved and loaded as usual, with
    ``attn_implementation="palmette_nsa"``.

    Args:
        model: a ``PreTrainedModel`` whose layers have ``self_attn`` with ``q_proj``, ``k_proj``, ``v_proj``,
            ``o_proj``.
        options: of ``NativeSparseAttention``: kernel_size, kernel_stride, block_size, topk, init_blocks,
            local_blocks, window_size, gate, compression (by name).

    Returns:
        The model.

    Raises:
        ImportError: transformers is not installed.
        ValueError: the model has other layers or is converted already, or an option does not fit.
    """
    from palmette.integrations import sparse_transformers

    sparse_transformers.register()
    return sparse_transformers.convert(model, **options)
