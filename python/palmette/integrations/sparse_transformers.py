# SPDX-License-Identifier: Apache-2.0
"""Native sparse attention in Hugging Face models, by the name ``"palmette_nsa"``.

After ``palmette.integrations.transformers.register()``, a Llama- or Qwen-like model that is made with
``attn_implementation="palmette_nsa"`` has ``SparseAttention`` in its layers; ``palmette.nn.convert_to_nsa``
puts it into a model that exists. The sizes are kept in ``config.palmette_nsa``, so a saved model loads with
them.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from palmette.nn.sparse_attention import SparseBranches
from palmette.nn.sparse_cache import SparseKVCache

from ._extras import require

require("transformers", "palmette.integrations.transformers")

from transformers import PreTrainedModel  # noqa: E402
from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask  # noqa: E402
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

ATTENTION_NAME = "palmette_nsa"
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


class SparseLayer(CacheLayerMixin):
    """One layer of a transformers cache that holds a ``SparseKVCache``."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sparse = SparseKVCache()
        self.columns = 0  # tokens per row of the batch, padding included
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to initialize."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        raise ValueError(
            "a layer of palmette_nsa must be used by its own attention, got an update of K and V"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns + query_length, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.sparse, self.columns = SparseKVCache(), 0

    def crop(self, max_length: int) -> None:
        """Raises ValueError where that would take tokens back, as assisted generation does."""
        if max_length < self.columns:
            raise ValueError(
                "past_key_values of palmette_nsa must keep its tokens, which compressed keys are made of, "
                f"got crop({max_length}) of {self.columns}"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if len(self.sparse):
            self.sparse.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.reorder_cache(torch.arange(len(self.sparse)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)


class SparseAttention(SparseBranches):
    """A layer's self-attention, made sparse: its own projections and norms, NSA between them.

    Args:
        attention: the layer's attention module, whose projections (and norms of q and k) are taken over.
        rotary: the model's rotary embedding.
        options: of ``palmette.nn.NativeSparseAttention``: kernel_size, block_size, topk, gate, ...
    """

    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, attention: nn.Module, rotary: nn.Module, options: dict[str, Any]) -> None:
        config: Any = attention.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        super().__init__(
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            head_dim,
            rope=self._turn,
            scale=getattr(attention, "scaling", None),
            **options,
        )
        self.config = config
        self.layer_idx: int = attention.layer_idx  # type: ignore[assignment]
        self._rotary = [rotary]  # in a list: the model's, not a part of this module
        for name in _PROJECTIONS:
            setattr(self, name, getattr(attention, name))
        self.q_norm: nn.Module = getattr(attention, "q_norm", nn.Identity())
        self.k_norm: nn.Module = getattr(attention, "k_norm", nn.Identity())

    def _turn(self, x: Tensor, positions: Tensor) -> Tensor:
        """The model's rotary embedding of x [T, heads, D]."""
        if x.shape[0] == 0:
            return x  # some embeddings look at the largest position
        cos, sin = (y[0, :, None] for y in self._rotary[0](x, positions[None].to(x.device)))
        a, b = x.chunk(2, -1)
        turned: Tensor = x * cos + torch.cat([-b, a], -1) * sin
        return turned.to(x.dtype)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """As the layer's own attention; attention_mask is 2-D (padding) or None.

        Documents that are packed into a row, whose position_ids begin again with 0, do not see each other.

        Raises:
            ValueError: attention_mask has more dimensions, position_ids neither go up by 1 nor begin again,
                or the cache holds another attention's tokens.
        """
        batch, length = hidden_states.shape[:2]
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask must be [batch, tokens] with palmette_nsa, got {list(attention_mask.shape)}"
            )
        valid = None if attention_mask is None else attention_mask[:, -length:].bool()
        if valid is not None and bool(valid.all()):
            valid = None
        x = hidden_states.flatten(0, 1) if valid is None else hidden_states[valid]
        counts = torch.full((batch,), length) if valid is None else valid.sum(1).cpu()
        ends = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int()
        if position_ids is not None and length > 1:
            positions = position_ids.expand(batch, length)
            ends = _documents(positions.flatten() if valid is None else positions[valid], ends)
        layer = None if past_key_values is None else self._layer(past_key_values)
        q, k = self.q_proj(x), self.k_proj(x)
        q = self.q_norm(q.unflatten(-1, (-1, self.head_dim)))
        k = self.k_norm(k.unflatten(-1, (-1, self.head_dim)))
        v = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        mixed = self.mix(x, q, [k], [v], ends, None if layer is None else layer.sparse)
        if layer is not None:
            layer.columns += length
        out = self.o_proj(mixed.flatten(1))
        if valid is None:
            return out.view(batch, length, -1), None
        padded = out.new_zeros(batch, length, out.shape[-1])
        padded[valid] = out
        return padded, None

    def _layer(self, cache: Cache) -> SparseLayer:
        layers: list[Any] = cache.layers
        while len(layers) <= self.layer_idx:
            layers.append(SparseLayer())
        layer = layers[self.layer_idx]
        if isinstance(layer, SparseLayer):
            return layer
        if layer.get_seq_length():
            raise ValueError("past_key_values must be palmette_nsa's own, got another attention's")
        layers[self.layer_idx] = own = SparseLayer()
        return own


def _documents(positions: Tensor, ends: Tensor) -> Tensor:
    """Where sequences begin, if one also begins wherever positions [T] begin again with 0."""
    positions = positions.cpu()
    goes_on = torch.zeros(len(positions), dtype=torch.bool)
    goes_on[1:] = positions[1:] == positions[:-1] + 1
    goes_on[ends[:-1][ends[:-1] < len(positions)].long()] = True
    begins = (~goes_on).nonzero().flatten()
    if len(begins) == 0:
        return ends
    wrong = begins[positions[begins] != 0]
    if len(wrong):
        at = int(wrong[0])
        raise ValueError(
            "position_ids must go up by 1, or begin again with 0 where a document begins, got "
            f"{int(positions[at])} after {int(positions[at - 1])}"
        )
    return torch.cat([ends, begins.int()]).sort().values


def convert(model: Any, **options: Any) -> Any:
    """``palmette.nn.convert_to_nsa``."""
    of_the_model = {"hidden_size", "num_q_heads", "num_kv_heads", "head_dim", "scale"}
    known = set(inspect.signature(SparseBranches).parameters) - of_the_model
    for name in options:
        if name not in known:
            raise ValueError(f"options must be of {', '.join(sorted(known))}, got {name}")
    if not isinstance(options.get("compression", ""), str):
        raise ValueError(
            "compression must be mean, weighted or linear in a model that is saved by its config, got "
            f"{options['compression']}"
        )
    base = getattr(model, "base_model", None)
    layers = getattr(base, "layers", None)
    rotary = getattr(base, "rotary_emb", None)
    if layers is None or rotary is None or not all(_is_attention(layer) for layer in layers):
        raise ValueError(
            "model must have layers with self_attn (q_proj, k_proj, v_proj, o_proj) and a rotary_emb, as "
            f"Llama and Qwen have, got {type(model).__name__}"
        )
    if options.get("separate_kv") or options.get("v_head_dim") or "rope" in options:
        raise ValueError(
            "separate_kv, v_head_dim and rope must be left as they are: the model's projections stay, got "
            f"{options}"
        )
    for layer in layers:
        if isinstance(layer.self_attn, SparseAttention):
            raise ValueError("model must have dense attention, got one that is converted")
        for name in ("sliding_window", "attn_logit_softcapping"):
            if getattr(layer.self_attn, name, None) is not None:
                raise ValueError(
                    f"{name} of the model's layers must be None, got {getattr(layer.self_attn, name)}"
                )
        if getattr(layer.self_attn, "attention_dropout", 0):
            raise ValueError(
                f"attention_dropout of the model's layers must be 0, got {layer.self_attn.attention_dropout}"
            )
    for layer in layers:
        weight = layer.self_attn.q_proj.weight
        sparse = SparseAttention(layer.self_attn, rotary, options)
        layer.self_attn = sparse.to(device=weight.device, dtype=weight.dtype).train(layer.training)
    for part in {id(base): base, id(model): model}.values():
        part.config._attn_implementation = ATTENTION_NAME
        part.config.palmette_nsa = dict(options)
    return model


def _is_attention(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    names = (*_PROJECTIONS, "layer_idx", "config")
    return attention is not None and all(hasattr(attention, name) for name in names)


def _not_converted(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise ValueError(
        f"attn_implementation must be {ATTENTION_NAME} when a model is made (or use "
        f"palmette.nn.convert_to_nsa), got a {type(module).__name__} that is dense"
    )


def register() -> None:
    """Registers ``attn_implementation="palmette_nsa"``; may be called repeatedly."""
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, _not_converted)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, flash_attention_mask)
    if getattr(PreTrainedModel.post_init, "of_palmette", False):
        return
    finish: Any = PreTrainedModel.post_init

    def post_init(self: PreTrainedModel) -> None:
        """Attention becomes sparse before weights are initialised, or loaded."""
        wanted = getattr(self.config, "_attn_implementation", None) == ATTENTION_NAME
        if wanted and self.base_model is self and hasattr(self, "layers"):
            convert(self, **(getattr(self.config, "palmette_nsa", None) or {}))
        finish(self)

    initialise: Any = PreTrainedModel._initialize_weights

    def initialize_weights(self: PreTrainedModel, module: nn.Module, *args: Any, **kwargs: Any) -> None:
        """What a checkpoint lacks: transformers knows its own modules only."""
        known = getattr(module, "_is_hf_initialized", False)
        initialise(self, module, *args, **kwargs)
        if isinstance(module, SparseBranches) and not known:
            loaded = [
                (p, p.clone()) for p in module.branch_parameters() if getattr(p, "_is_hf_initialized", False)
            ]
            module.reset_branches()
            for parameter, value in loaded:
                parameter.copy_(value)

    post_init.of_palmette = True  # type: ignore[attr-defined]
    PreTrainedModel.post_init = post_init  # type: ignore[method-assign]
    PreTrainedModel._initialize_weights = initialize_weights  # type: ignore[method-assign]
