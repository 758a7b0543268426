# SPDX-License-Identifier: Apache-2.0
"""Decoding a tree of sequences with a Hugging Face model: all leaves in one forward, shared tokens once.

The system of DeFT (arXiv 2404.00242): branches share the KV cache of their common path, one tree attention
per layer serves all leaves. ``search`` builds few-shot, best-of-n, beam search and tree-of-thought on it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from .decoded_tree import DecodedTree
from .records import Node, Step, TreeBatch, Verified
from .sampling import check_sampling, choose_tokens, logprobs_of, probabilities
from .token_trees import Paths, TokenTree


class TreeDecoder(DecodedTree):
    """Decodes a tree of sequences with a Hugging Face causal language model.

    Args:
        model: A Llama- or Qwen-style ``transformers`` model on the CPU. Its attention is set to
            ``"palmette"`` (see ``palmette.integrations.transformers``), which it otherwise uses as before.
        dtype: The KV pool's dtype (default: the model's). Queries are converted to it, outputs back.
        max_slots: Tokens that the KV pool may hold (default: it grows as needed).
        page_size: Slots per page of the KV pool; a page belongs to one node.
        eos_token_id: Token or tokens that end a sequence. ``"model"`` (default) takes the model's; None:
            nothing ends.
        prefill_chunk: Tokens per forward when a prompt is read.
        split: How plans split the keys, see ``palmette.plan_tree_attention``.

    Raises:
        ValueError: An option is out of range.
        ImportError: ``transformers`` is not installed.
    """

    def __init__(
        self,
        model: Any,
        *,
        dtype: torch.dtype | None = None,
        max_slots: int | None = None,
        page_size: int = 16,
        eos_token_id: int | Iterable[int] | str | None = "model",
        prefill_chunk: int = 512,
        split: str = "auto",
    ) -> None:
        from ..integrations.transformers import ATTENTION_NAME, PagedCache, register

        if prefill_chunk < 1:
            raise ValueError(f"prefill_chunk must be positive, got {prefill_chunk}")
        self.config = model.config.get_text_config()
        super().__init__(
            page_size=page_size,
            max_slots=max_slots,
            max_length=getattr(self.config, "max_position_embeddings", None),
            eos_token_ids=_eos_token_ids(model, eos_token_id),
        )
        register()
        model.set_attn_implementation(ATTENTION_NAME)
        self.model = model
        self.num_q_heads = int(self.config.num_attention_heads)
        self.num_kv_heads = int(getattr(self.config, "num_key_value_heads", None) or self.num_q_heads)
        self.head_dim = int(
            getattr(self.config, "head_dim", None) or self.config.hidden_size // self.num_q_heads
        )
        self.prefill_chunk = prefill_chunk
        self.split = split
        self.cache = PagedCache(
            model.config, self._pool.num_slots, dtype=dtype or model.dtype, device=model.device
        )
        self._leaf_plan: Any = None

    @property
    def plan(self) -> Any:
        """The plan of the last step in which all leaves were decoded; None before it."""
        return self._leaf_plan

    def reset(self) -> None:
        """Forget every sequence; the KV pool keeps its memory."""
        super().reset()
        self._leaf_plan = None

    def prefill(
        self,
        prompt: Sequence[int] | torch.Tensor | Sequence[Sequence[int]],
        *,
        on_logits: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> list[int]:
        """Read one prompt or a batch of prompts, each the root of a new tree beside those that there are.

        Args:
            prompt: Token ids, or a list of lists of them.
            on_logits: Called per chunk with (tokens [n], logits [n, vocab]); without it, only the last
                token's logits are computed.

        Returns:
            The roots' ids.

        Raises:
            ValueError: A prompt is empty or longer than the model can take.
            RuntimeError: The KV pool is full.
        """
        from palmette import Tree

        prompts = _as_prompts(prompt)
        for tokens in prompts:
            self._check_length(len(tokens))
        slots = self._allocate([([], len(tokens)) for tokens in prompts])
        order = torch.tensor([slot for part in slots for slot in part])
        lengths = [len(tokens) for tokens in prompts]
        if self._tree is None:
            self._tree = Tree([-1] * len(prompts), lengths, order)
            roots = list(range(len(prompts)))
        else:
            roots = [int(root) for root in self._tree.add_roots(len(prompts))]
            self._tree.append(torch.tensor(roots), torch.tensor(lengths), order)
        for root, tokens, part in zip(roots, prompts, slots, strict=True):
            self._nodes[root] = Node(-1, 0, tokens, part, num_prompt=len(tokens))
        self._decode(dict(zip(roots, lengths, strict=True)), on_logits)
        return roots

    def extend(self, tokens: Mapping[int, Sequence[int]]) -> None:
        """Append given tokens (a question, the start of a thought) to leaves; they do not count in scores.

        Args:
            tokens: Per leaf its token ids, at least one.

        Raises:
            ValueError: A node is no leaf, is finished, or waits for its first token.
        """
        for node, given in tokens.items():
            self._check_leaf(node)
            if self._nodes[node].pending is not None:
                raise ValueError(f"node must have no pending token, got {node}: call step() first")
            if not len(given):
                raise ValueError(f"tokens must hold at least one token for every node, got none for {node}")
        if tokens:
            counts = {node: len(given) for node, given in tokens.items()}
            self._append(
                {node: [int(t) for t in given] for node, given in tokens.items()}, self._reserve(counts)
            )
            self._decode(counts)

    def step(
        self,
        nodes: Sequence[int] | None = None,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Step:
        """Append one token to each leaf and decode all of them in one forward.

        A leaf that was forked with a token takes that one. A leaf whose token ends its sequence is finished:
        the token is recorded, not decoded, and the leaf takes no part in later steps.

        Args:
            nodes: The leaves to decode (default: all that are active), in any order.
            temperature: 0 (default): the likeliest token; else the logits' divisor for sampling.
            top_k, top_p: Sample among the likeliest tokens only (default: all).
            generator: Source of the draws.

        Raises:
            ValueError: A node is no leaf or is finished, or an option is out of range.
            RuntimeError: The KV pool is full.
        """
        active = self.active
        if nodes is not None:
            for node in nodes:
                self._check_leaf(node)
            chosen = set(nodes)
            active = [node for node in active if node in chosen]
        self.choose(active, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        growing = {node: 1 for node in active if not self._is_at_end(node)}
        slots = self._reserve(growing)  # may fail, so it comes before anything is recorded
        tokens, logprobs = self._take_pending(active)
        if growing:
            self._append({node: tokens[i : i + 1] for i, node in enumerate(active) if node in growing}, slots)
            self._decode(growing)
        return Step(active, tokens, logprobs)

    def choose(
        self,
        nodes: Sequence[int],
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> list[int]:
        """Choose the next token of leaves without decoding it; the next ``step`` or ``verify_step`` takes it.

        Args:
            nodes: Leaves; those that have a pending token keep it.
            temperature, top_k, top_p, generator: See ``step``.

        Returns:
            The pending token of each leaf.
        """
        check_sampling(temperature, top_k, top_p)
        open_nodes = [node for node in nodes if self.node(node).pending is None]
        if open_nodes:
            logits = self.logits(open_nodes)
            tokens = choose_tokens(
                logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator
            )
            logprobs = logprobs_of(logits, tokens).tolist()
            for node, token, logprob in zip(open_nodes, tokens.tolist(), logprobs, strict=True):
                self._nodes[node].pending = (token, logprob)
        return [pending[0] for node in nodes if (pending := self._nodes[node].pending) is not None]

    def verify_step(
        self,
        paths: Paths | TokenTree,
        draft_tokens: torch.Tensor,
        nodes: Sequence[int] | None = None,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
        on_logits: Callable[[torch.Tensor], None] | None = None,
    ) -> list[Verified]:
        """Verify a token tree below the pending token of each leaf, and commit what the model agrees with.

        The committed tokens are what ``step`` would have chosen: the same ones when greedy, the same
        distribution when sampling. ``choose`` tells the pending token that drafts must continue.

        Args:
            paths: The token tree, Medusa-style paths of child indices (or a ``TokenTree`` made of them once).
            draft_tokens: int64 [leaves, len(paths)] (one leaf: [len(paths)] too), the token at the end of
                every path.
            nodes: The leaves (default: all that are active), in any order.
            temperature, top_k, top_p, generator: See ``step``.
            on_logits: Called with the model's logits [leaves * (1 + len(paths)), vocab]: per leaf those after
                its pending token, then those after each draft, depth-first (``TokenTree.order``).

        Raises:
            ValueError: ``draft_tokens`` has another shape, a node is no leaf or is finished.
            RuntimeError: The KV pool is full.
        """
        from .verification import verify_leaves

        check_sampling(temperature, top_k, top_p)
        drafts = paths if isinstance(paths, TokenTree) else TokenTree(paths)
        leaves = self.active if nodes is None else list(nodes)
        draft_tokens = torch.atleast_2d(torch.as_tensor(draft_tokens, dtype=torch.long))
        if draft_tokens.shape != (len(leaves), len(drafts)):
            raise ValueError(
                f"draft_tokens must be [{len(leaves)}, {len(drafts)}] for as many leaves and paths, "
                f"got {list(draft_tokens.shape)}"
            )
        for node in leaves:
            self._check_leaf(node)
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        self.choose(leaves, generator=generator, **options)  # type: ignore[arg-type]
        to_probabilities = partial(probabilities, **options) if temperature > 0 else None  # type: ignore[arg-type]
        return verify_leaves(self, drafts, draft_tokens, leaves, to_probabilities, generator, on_logits)

    def _decode(
        self,
        counts: Mapping[int, int],
        on_logits: Callable[[torch.Tensor, torch.Tensor], None] | None = None,
    ) -> None:
        """Run the model over the last ``counts[node]`` tokens of each node; keep their last logits."""
        todo: list[tuple[int, int]] = []
        last = []
        for node, count in counts.items():
            record = self._nodes[node]
            end = len(record.tokens)
            todo.extend((node, offset) for offset in range(end - count, end))
            last.append(len(todo) - 1)
        is_step = all(count == 1 for count in counts.values()) and list(counts) == self.leaves
        rows = []
        for begin in range(0, len(todo), len(todo) if is_step else self.prefill_chunk):
            part = todo if is_step else todo[begin : begin + self.prefill_chunk]
            nodes = [node for node, _ in part]
            offsets = torch.tensor([offset for _, offset in part])
            records = [self._nodes[node] for node in nodes]
            wanted = [index - begin for index in last if begin <= index < begin + len(part)]
            batch = TreeBatch(
                tree=self.tree,
                queries="leaves" if is_step else (torch.tensor(nodes), offsets),
                nodes=nodes,
                draft_parents=None,
                tokens=torch.tensor([r.tokens[o] for r, (_, o) in zip(records, part, strict=True)]),
                positions=torch.tensor([r.start for r in records]) + offsets,
                slots=torch.tensor([r.slots[o] for r, (_, o) in zip(records, part, strict=True)]),
                keep=torch.arange(len(part)) if on_logits else torch.tensor(wanted, dtype=torch.long),
            )
            logits = self._forward(batch)
            if on_logits is not None:
                on_logits(batch.tokens, logits)
                logits = logits[wanted]
            rows.append(logits)
        logits = rows[0] if len(rows) == 1 else torch.cat(rows)
        self._last = (list(counts), logits)
        for node, row in zip(counts, logits, strict=True):
            self._nodes[node].logits = row

    def _plan(self, batch: TreeBatch) -> Any:
        from palmette import plan_tree_attention

        if isinstance(batch.queries, str) and self._leaf_plan is not None:
            self._leaf_plan.update()
            return self._leaf_plan
        plan = plan_tree_attention(
            batch.tree,
            batch.queries,
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            split=self.split,
        )
        if isinstance(batch.queries, str):
            self._leaf_plan = plan
        return plan

    @torch.inference_mode()
    def _forward(self, batch: TreeBatch) -> torch.Tensor:
        """Logits [rows, vocab] of the tokens in ``batch.keep``; the K and V of all tokens go to the pool."""
        self.cache.slots = batch.slots
        output = self.model(
            input_ids=batch.tokens[None],
            position_ids=batch.positions[None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=batch.keep,
            tree_plan=self._plan(batch),
        )
        logits: torch.Tensor = output.logits[0]
        return logits

    def _grow_cache(self, num_slots: int) -> None:
        self.cache.reserve(num_slots)

    def _compact(self, node: int, source: Sequence[int], target: Sequence[int]) -> None:
        """Move tokens of ``node`` in every layer's pool from slots to slots."""
        from palmette import compact_kv_

        if list(source) != list(target):
            src, dst = torch.tensor(source), torch.tensor(target)
            for keys, values in self.cache.pools:
                compact_kv_(keys, values, src, dst)


def _eos_token_ids(model: Any, eos_token_id: int | Iterable[int] | str | None) -> frozenset[int]:
    if isinstance(eos_token_id, str):
        if eos_token_id != "model":
            raise ValueError(f'eos_token_id must be token ids, None or "model", got "{eos_token_id}"')
        eos_token_id = getattr(model.generation_config, "eos_token_id", None)
        if eos_token_id is None:
            eos_token_id = model.config.eos_token_id
    if eos_token_id is None:
        return frozenset()
    return frozenset([eos_token_id] if isinstance(eos_token_id, int) else eos_token_id)  # type: ignore[arg-type]


def _as_prompts(prompt: Any) -> list[list[int]]:
    if isinstance(prompt, torch.Tensor):
        prompt = prompt.tolist()
    prompts = [list(prompt)] if len(prompt) and isinstance(prompt[0], int) else [list(p) for p in prompt]
    if not prompts or not all(prompts):
        raise ValueError(f"prompt must hold at least one token, got lengths {[len(p) for p in prompts]}")
    return prompts
