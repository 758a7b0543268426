# SPDX-License-Identifier: Apache-2.0
"""Hugging Face transformers: attention by the name ``"palmette"`` and a paged KV cache.

After ``register()``, a model with ``attn_implementation="palmette"`` attends

- along a tree, when its forward gets ``tree_plan=``: the plan reaches every layer's attention as a keyword
  argument, the tokens come packed in one row, and ``position_ids`` holds each token's depth on its path;
- as usual, when it does not: causal attention, padded batches and sliding windows run as a forest of chains
  (one chain per sequence), everything that is no forest of chains (a 4-D mask, packed rows, dropout,
  bidirectional attention) through ``torch.nn.functional.scaled_dot_product_attention``.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from ._extras import require

require("transformers", "palmette.integrations.transformers")

from transformers.cache_utils import Cache, CacheLayerMixin  # noqa: E402
from transformers.integrations.sdpa_attention import sdpa_attention_forward  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    ALL_MASK_ATTENTION_FUNCTIONS,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # noqa: E402

ATTENTION_NAME = "palmette"


def register() -> None:
    """Register ``attn_implementation="palmette"`` and ``"palmette_nsa"``; may be called repeatedly.

    Then ``AutoModelForCausalLM.from_pretrained(..., attn_implementation="palmette")`` or
    ``model.set_attn_implementation("palmette")``. ``"palmette_nsa"`` gives a Llama- or Qwen-like model native
    sparse attention (its own cache in ``generate``, its sizes in ``config.palmette_nsa``), when it is made or
    loaded with that name; a model that exists is changed by ``palmette.nn.convert_to_nsa``.
    """
    from . import sparse_transformers

    sparse_transformers.register()
    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attention_mask)


class DeferredMask:
    """What transformers knows when it makes a mask, kept until a layer needs it.

    A model makes its mask before its layers see ``tree_plan``. The dense mask of a large packed tree would be
    thrown away, so nothing is made until attention asks: a plan of chains, or the dense mask, each made once
    per forward.
    """

    def __init__(self, arguments: dict[str, Any]) -> None:
        self._arguments = arguments
        self._dense: torch.Tensor | None = None
        self._is_dense_made = False
        self._chains: dict[tuple[int, int, int], Chains | None] = {}

    def dense(self) -> torch.Tensor | None:
        """The mask for SDPA: bool [batch, 1, queries, keys], or None where ``is_causal`` says it all."""
        if not self._is_dense_made:
            self._dense = sdpa_mask(**self._arguments)
            self._is_dense_made = True
        return self._dense

    def chains(self, num_q_heads: int, num_kv_heads: int, head_dim: int) -> Chains | None:
        """The plan of one chain per sequence, or None for any mask but that of causal, padded sequences."""
        key = (num_q_heads, num_kv_heads, head_dim)
        if key not in self._chains:
            self._chains[key] = Chains(self._arguments, *key) if self._is_causal() else None
        return self._chains[key]

    def contiguous(self) -> DeferredMask:
        """Itself: what generate() asks of every mask that it makes."""
        return self

    def _is_causal(self) -> bool:
        a = self._arguments
        if (
            a.get("use_vmap")
            or not a.get("allow_is_causal_skip", True)
            or a.get("allow_is_bidirectional_skip")
        ):
            return False  # somebody combined the mask with one of their own
        # a sliding window announces itself by local_size; the layer hands its width to attention
        return a.get("mask_function") is causal_mask_function or a.get("local_size") is not None


class Chains:
    """A batch of causal sequences as a forest of chains: padding is in no chain, a padded query in no plan.

    Attributes:
        plan: The plan over keys flattened to [batch * keys, heads, head_dim].
        rows: int64 [queries], rows of the flattened queries [batch * queries, heads, head_dim] that see a
            key; None when all do.
    """

    def __init__(self, arguments: dict[str, Any], num_q_heads: int, num_kv_heads: int, head_dim: int) -> None:
        from palmette import Tree, plan_tree_attention

        batch, num_queries, num_keys = (int(arguments[n]) for n in ("batch_size", "q_length", "kv_length"))
        kv_offset = int(arguments.get("kv_offset", 0))
        first_query = int(arguments.get("q_offset", 0)) - kv_offset
        num_seen = min(num_keys, first_query + num_queries)
        padding = prepare_padding_mask(arguments.get("attention_mask"), num_keys, kv_offset)
        if padding is None:
            valid = torch.ones(batch, num_seen, dtype=torch.bool)
        else:
            valid = padding[:, kv_offset : kv_offset + num_seen].cpu()
        rank = valid.cumsum(1)  # of the last visible key, plus one
        offset = (rank[:, first_query:] - 1).flatten()
        sequence = torch.arange(batch).repeat_interleave(num_queries)
        sees = offset >= 0
        self.rows = None if bool(sees.all()) else sees.nonzero()[:, 0]
        slots = (valid.nonzero() * torch.tensor([num_keys, 1])).sum(1)
        tree = Tree(torch.full((batch,), -1), rank[:, -1], slots)
        queries = (sequence[sees], offset[sees])
        self.plan = plan_tree_attention(
            tree, queries, num_q_heads=num_q_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
        )


def attention_mask(**arguments: Any) -> DeferredMask | torch.Tensor | None:
    """The mask function of ``"palmette"``: nothing is made yet, see ``DeferredMask``.

    Static caches, which have keys behind the last query, and torch.compile get the dense mask: generate()
    makes it outside the model and expects a tensor.
    """
    end_of_keys, end_of_queries = (
        arguments.get(f"{x}_offset", 0) + arguments[f"{x}_length"] for x in ("kv", "q")
    )
    is_static = isinstance(end_of_queries, torch.Tensor) or end_of_keys > end_of_queries
    if is_static or torch.compiler.is_compiling():
        mask: torch.Tensor | None = sdpa_mask(**arguments)
        return mask
    return DeferredMask(arguments)


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: DeferredMask | torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    tree_plan: Any = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of ``"palmette"``, called by every layer of a transformers model.

    Args:
        module: The layer's attention module.
        query: [batch, Hq, queries, D]; with a plan, batch 1 and the plan's queries in its order.
        key: [batch, Hk, keys, D]; with a plan, batch 1: the pool of a ``PagedCache``, or without a cache the
            tokens of this forward, which the slots of the plan's tree then count.
        value: [batch, Hk, keys, Dv].
        attention_mask: What ``attention_mask`` above returned, or a 4-D mask of the caller's; a plan needs
            none.
        scaling: Softmax scale, ``D ** -0.5`` by default.
        dropout: Must be 0 with a plan.
        tree_plan: Plan of ``palmette.plan_tree_attention`` (default None: attention as usual).
        sliding_window: Keys that a query sees, its own included (default: all).
        softcap: Cap of the logits (default: none).
        s_aux: Attention sinks [Hq] (default: none).
        is_causal: False for bidirectional attention (default: what the module says).

    Returns:
        ``(out [batch, queries, Hq, Dv], None)``.

    Raises:
        ValueError: The batch, dropout or the mask does not go with the plan; or attention as usual needs a
            dense mask together with a softcap or sinks.
    """
    options = {"scale": scaling, "softcap": softcap or 0.0, "window": sliding_window, "sinks": s_aux}
    if tree_plan is not None:
        return _tree_forward(query, key, value, attention_mask, tree_plan, dropout, options), None
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    if isinstance(attention_mask, DeferredMask):
        chains = None
        if is_causal and not dropout:
            chains = attention_mask.chains(query.shape[1], key.shape[1], query.shape[-1])
        if chains is not None:
            return _chains_forward(query, key, value, chains, options), None
        attention_mask = attention_mask.dense()
    for name in ("softcap", "sinks"):
        if options[name] is not None and options[name] != 0.0:
            raise ValueError(
                f"{name} must be None with dropout or a dense attention mask, got {options[name]}"
            )
    out: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=is_causal,
        **kwargs,
    )
    return out


def _tree_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: DeferredMask | torch.Tensor | None,
    plan: Any,
    dropout: float,
    options: dict[str, Any],
) -> torch.Tensor:
    from palmette import tree_attention

    if query.shape[0] != 1:
        raise ValueError(
            f"input_ids must be one packed row [1, tokens] with a tree_plan, got {query.shape[0]} rows"
        )
    if dropout:
        raise ValueError(f"attention_dropout must be 0 with a tree_plan, got {dropout}")
    if isinstance(mask, torch.Tensor):
        raise ValueError(f"attention_mask must be None with a tree_plan, got {list(mask.shape)}")
    # a pool may be kept in a shorter dtype than the model's: the queries join it there
    q = query[0].transpose(0, 1).to(key.dtype)
    out: Any = tree_attention(q, key[0].transpose(0, 1), value[0].transpose(0, 1), plan, **options)
    attended: torch.Tensor = out.to(query.dtype).unsqueeze(0)
    return attended


def _chains_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, chains: Chains, options: dict[str, Any]
) -> torch.Tensor:
    from palmette import tree_attention

    batch, _, num_queries, _ = query.shape
    # [batch, heads, tokens, dim] -> [batch * tokens, heads, dim]: a view for one sequence, a copy for more
    q, k, v = (
        x[0].transpose(0, 1) if batch == 1 else x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)
    )
    visible = q if chains.rows is None else q[chains.rows]
    out = cast(torch.Tensor, tree_attention(visible, k, v, chains.plan, **options))
    if chains.rows is not None:
        out = out.new_zeros(q.shape[0], *out.shape[1:]).index_copy(0, chains.rows, out)
    attended: torch.Tensor = out.unflatten(0, (batch, num_queries))
    return attended


class PagedLayer(CacheLayerMixin):
    """One layer of a ``PagedCache``: ``keys`` [slots, Hk, D] and ``values`` [slots, Hk, Dv], token-major."""

    is_sliding = False

    def __init__(self, cache: PagedCache, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache
        self.keys: torch.Tensor = keys
        self.values: torch.Tensor = values
        self.is_initialized = True

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing is left to initialize: the pool is there from the start."""

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new states [1, Hk, tokens, D] to their slots; returns the pool as [1, Hk, slots, D]."""
        slots = self._cache.slots
        if slots is None or key_states.shape[0] != 1 or key_states.shape[2] != slots.shape[0]:
            raise ValueError(
                f"slots must name one slot for each token of one packed row, got "
                f"{0 if slots is None else slots.shape[0]} slots for states {list(key_states.shape)}"
            )
        self.keys.index_copy_(0, slots, key_states[0].transpose(0, 1).to(self.keys.dtype))
        self.values.index_copy_(0, slots, value_states[0].transpose(0, 1).to(self.values.dtype))
        return self.keys.transpose(0, 1).unsqueeze(0), self.values.transpose(0, 1).unsqueeze(0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0  # a plan needs no mask: the smallest will do

    def get_seq_length(self) -> int:
        return 0  # slots are not positions: position_ids must be given

    def get_max_length(self) -> int:
        return -1


class PagedCache(Cache):
    """A paged KV cache for trees of tokens: per layer a pool [slots, Hk, D], written where the caller says.

    Which slot belongs to which token is the tree's business (``palmette.Tree(..., slots=...)``). Before every
    forward, set ``slots`` to the slots of its tokens; the forward needs ``position_ids`` and ``tree_plan``.

    Args:
        config: The model's configuration (a Llama's or Qwen's).
        num_slots: Tokens that the pool holds at first.
        dtype: The pool's dtype; by default the model's, float32 where the configuration names none.
        device: The pool's device.
    """

    def __init__(
        self,
        config: Any,
        num_slots: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        text = config.get_text_config()
        if num_slots < 1:
            raise ValueError(f"num_slots must be positive, got {num_slots}")
        heads = text.num_attention_heads
        num_kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
        dtype = dtype or getattr(text, "dtype", None) or torch.float32
        shape = (num_slots, num_kv_heads, head_dim)
        #: int64 [tokens]: where the next forward's tokens go
        self.slots: torch.Tensor | None = None
        super().__init__(
            layers=[
                PagedLayer(
                    self,
                    torch.empty(shape, dtype=dtype, device=device),
                    torch.empty(shape, dtype=dtype, device=device),
                )
                for _ in range(text.num_hidden_layers)
            ]
        )

    @property
    def pools(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Per layer keys [slots, Hk, D] and values [slots, Hk, Dv]."""
        return [(layer.keys, layer.values) for layer in self.layers if isinstance(layer, PagedLayer)]

    @property
    def num_slots(self) -> int:
        """Tokens that the pool holds."""
        return self.pools[0][0].shape[0]

    def reserve(self, num_slots: int) -> None:
        """Grow every layer's pool to at least ``num_slots`` slots, keeping what it holds."""
        if num_slots <= self.num_slots:
            return
        for layer in self.layers:
            for name in ("keys", "values"):
                old = getattr(layer, name)
                new = old.new_empty(num_slots, *old.shape[1:])
                new[: old.shape[0]] = old
                setattr(layer, name, new)
