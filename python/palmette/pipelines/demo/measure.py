# SPDX-License-Identifier: Apache-2.0
"""How the demo measures: a clock that can stand still, all methods on the same q, k, v, and agreement."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, cast

import torch

from ...integrations.transformers import attention_forward
from ..records import Node, Step, TreeBatch
from ..tree_decoding import TreeDecoder
from .errors import DisagreementError
from .hand_written_cascade import HandWrittenCascade
from .masked_union import MaskedUnion
from .peers import ATTENTION_NAME as PEER_ATTENTION_NAME
from .peers import path_of, peer_forward, register_peers
from .per_sequence import PerSequence

CAPTURING_NAME = "palmette_captured"
NEAR_TIE = 1e-3  # two logits closer than this may swap places between methods
PALMETTE, CASCADE, UNION, SEQUENCES = "palmette", "cascade by hand", "masked union SDPA", "per-sequence SDPA"


class Clock:
    """Seconds that passed, less those in ``paused``."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._paused = 0.0
        self._depth = 0

    @property
    def seconds(self) -> float:
        """Time on the clock since it was made."""
        return time.perf_counter() - self._begin - self._paused

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The clock stands still inside."""
        begin = time.perf_counter()
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self._paused += time.perf_counter() - begin


@dataclass
class Sample:
    """One step on which all methods were measured.

    Attributes:
        attention_ms: Per method, all layers' attention of the step.
        kv_tokens: Per method, KV tokens read per layer and KV head.
        per_sequence_s: Time of the whole step with per-sequence attention; None where it was left out.
        redundancy: Tokens on all sequences over tokens in the tree.
        queries: Tokens decoded in the step.
    """

    attention_ms: dict[str, float]
    kv_tokens: dict[str, int]
    per_sequence_s: float | None
    redundancy: float
    queries: int


@dataclass
class Difference:
    """The first token of a branch on which a method does not agree with Palmette."""

    method: str
    branch: str
    index: int
    margin: float

    def __str__(self) -> str:
        return (
            f"{self.method}, {self.branch}: the first difference is at token {self.index}, "
            f"where the two candidates' logits are {self.margin:.1e} apart"
        )


@dataclass
class Record:
    """Tokens by node of the tree, and how far each was ahead of the runner-up."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    parents: dict[int, int] = field(default_factory=dict)
    margins: dict[int, list[float]] = field(default_factory=dict)

    def add(self, step: Step, decoder: TreeDecoder) -> None:
        """Take over the tokens of a step."""
        for node, token in zip(step.nodes, step.tokens, strict=True):
            self.tokens.setdefault(node, []).append(token)
            self.parents[node] = decoder.node(node).parent

    def differences(self, other: Record, method: str) -> list[Difference]:
        """First differences of another method's tokens; branches below one that differs have another past."""
        found: list[Difference] = []
        strayed: set[int] = set()
        for node in sorted(self.tokens):
            if self.parents[node] in strayed:
                strayed.add(node)
                continue
            mine, theirs = self.tokens[node], other.tokens.get(node, [])
            index = first_difference(mine, theirs)
            if index is not None:
                strayed.add(node)
                margins = self.margins.get(node, [])
                margin = margins[index] if index < len(margins) else float("inf")
                found.append(Difference(method, f"branch {node}", index, margin))
        return found


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Index of the first token that is not the same; None for equal sequences."""
    for index, (left, right) in enumerate(zip(a, b, strict=False)):
        if left != right:
            return index
    return None if len(a) == len(b) else min(len(a), len(b))


_captured: dict[int, torch.Tensor] = {}


def _capturing_attention(
    module: Any, query: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    _captured[module.layer_idx] = query
    return attention_forward(module, query, *args, **kwargs)


class MeasuredDecoder(TreeDecoder):
    """A ``TreeDecoder`` that measures the other methods on some of its own steps, and keeps its margins.

    Args:
        model: See ``TreeDecoder``.
        is_sampled: Whether to measure the i-th forward after ``start``.
        repeats: Rounds over all methods per sample.
        options: See ``TreeDecoder``.
    """

    def __init__(self, model: Any, is_sampled: Callable[[int], bool], repeats: int, **options: Any) -> None:
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        super().__init__(model, **options)
        ALL_ATTENTION_FUNCTIONS.register(CAPTURING_NAME, _capturing_attention)
        register_peers()
        self.clock = Clock()
        self.record = Record()
        self.samples: list[Sample] = []
        self.ties: list[Difference] = []
        self.on_sample: Callable[[Any], None] | None = None  # called with the plan
        self._is_sampled = is_sampled
        self._repeats = repeats
        self._shuffle = random.Random(0).shuffle
        self._forwards: int | None = None  # not counted before start()
        self._ranks: dict[int, list[float]] = {}

    def start(self) -> Clock:
        """Give the model this decoder's attention, and a new clock, which stands still for the samples.

        From the first call on, forwards are counted and sampled.
        """
        self.model.set_attn_implementation(CAPTURING_NAME)
        if self._forwards is None:
            self._forwards = 0
        self.clock = Clock()
        return self.clock

    def choose(self, nodes: Sequence[int], **options: Any) -> list[int]:
        with self.clock.paused():
            open_nodes = [node for node in nodes if self.node(node).pending is None]
            if open_nodes and self._forwards is not None:
                best = self.logits(open_nodes).topk(2, dim=-1).values
                for node, margin in zip(open_nodes, (best[:, 0] - best[:, 1]).tolist(), strict=True):
                    self.record.margins.setdefault(node, []).append(margin)
        return super().choose(nodes, **options)

    def likeliest(self, node: int, count: int) -> list[int]:
        with self.clock.paused():
            ranked = self.logits([node])[0].topk(count + 1).values
            steps = [float("inf"), *(ranked[:-1] - ranked[1:]).tolist()]
            self._ranks[node] = [min(pair) for pair in pairwise(steps)]
        return super().likeliest(node, count)

    def fork(self, node: int, branches: int | Sequence[int]) -> list[int]:
        children = super().fork(node, branches)
        for child, margin in zip(children, self._ranks.pop(node, []), strict=False):
            self.record.margins[child] = [margin]
        return children

    @torch.inference_mode()
    def _forward(self, batch: TreeBatch) -> torch.Tensor:
        logits = super()._forward(batch)
        if self._forwards is not None:
            if self._is_sampled(self._forwards):
                with self.clock.paused():
                    self._sample(batch, logits)
            self._forwards += 1
        return logits

    def _plan(self, batch: TreeBatch) -> Any:
        self._last_plan = super()._plan(batch)
        return self._last_plan

    def _sample(self, batch: TreeBatch, logits: torch.Tensor) -> None:
        plan = self._last_plan
        attention_ms, kv_tokens = self._attention_times(batch, plan)
        # the slowest by far: every other sample is enough of it
        seconds = None if len(self.samples) % 2 else self._per_sequence_step(batch, logits)
        unique, total = plan.io.kv_tokens_unique, kv_tokens[SEQUENCES]
        self.samples.append(Sample(attention_ms, kv_tokens, seconds, total / unique, len(batch.nodes)))
        if self.on_sample is not None:
            self.on_sample(plan)

    def _attention_times(self, batch: TreeBatch, plan: Any) -> tuple[dict[str, float], dict[str, int]]:
        """Milliseconds of every method's attention, on the q, k, v of the middle layer, times the layers."""
        from palmette import tree_attention

        layers = self.cache.pools
        middle = len(layers) // 2
        query = _captured[middle][0].transpose(0, 1).contiguous()
        keys, values = layers[middle]
        scale = self.head_dim**-0.5
        group = self.num_q_heads // self.num_kv_heads
        union, cascade = MaskedUnion(1, group), HandWrittenCascade(1, group)
        nodes, own = dense_slots(batch, self._nodes)
        fill(union, own, nodes, batch, self._nodes, keys, values)
        fill(cascade, own, nodes, batch, self._nodes, keys, values)
        sequences = PerSequence([(keys, values)])
        sequences.prepare(batch, self._nodes)
        replicas = sequences.replicate(0)
        methods: dict[str, Callable[[], torch.Tensor]] = {
            PALMETTE: lambda: cast(torch.Tensor, tree_attention(query, keys, values, plan, scale=scale)),
            CASCADE: lambda: cascade.attend(0, query, scale),
            UNION: lambda: union.attend(0, query, scale),
            SEQUENCES: lambda: sequences.attend(0, query, scale, replicas),
        }
        expected = methods[PALMETTE]()
        for name, attend in methods.items():
            error = float((attend() - expected).abs().max())
            if error > 1e-3 * max(1.0, float(expected.abs().max())):
                raise DisagreementError(f"{name} and {PALMETTE} must agree, got outputs {error:.1e} apart")
        times: dict[str, list[float]] = {name: [] for name in methods}
        order = list(methods)
        for _ in range(self._repeats):
            self._shuffle(order)  # nobody always follows the one that leaves the coldest caches
            for name in order:
                begin = time.perf_counter()
                methods[name]()
                times[name].append(1e3 * (time.perf_counter() - begin))
        milliseconds = {name: statistics.median(values) * len(layers) for name, values in times.items()}
        read = {
            PALMETTE: plan.io.kv_tokens_read,
            CASCADE: cascade.kv_tokens_read,
            UNION: union.kv_tokens_read,
            SEQUENCES: sequences.kv_tokens_read,
        }
        return milliseconds, read

    def _per_sequence_step(self, batch: TreeBatch, logits: torch.Tensor) -> float:
        """Seconds of the same forward with per-sequence attention; its tokens must be the same."""
        self.model.set_attn_implementation(PEER_ATTENTION_NAME)
        clock = Clock()
        peer = PerSequence(self.cache.pools, clock.paused)
        other = peer_forward(self.model, peer, batch, self._nodes)
        seconds = clock.seconds
        self.model.set_attn_implementation(CAPTURING_NAME)
        best = logits.topk(2, dim=-1).values
        for row in (other.argmax(-1) != logits.argmax(-1)).nonzero()[:, 0].tolist():
            margin = float(best[row, 0] - best[row, 1])
            self.ties.append(Difference(SEQUENCES, f"branch {batch.nodes[row]}", len(self.samples), margin))
        return seconds


def dense_slots(batch: TreeBatch, nodes: Mapping[int, Node]) -> tuple[dict[int, Node], TreeBatch]:
    """Nodes and batch with their slots renumbered without gaps, as a cache without pages would have them."""
    on_path = sorted({above for node in set(batch.nodes) for above in path_of(node, nodes)})
    dense: dict[int, Node] = {}
    number: dict[int, int] = {}
    for node in on_path:
        for slot in nodes[node].slots:
            number[slot] = len(number)
        dense[node] = replace(nodes[node], slots=[number[slot] for slot in nodes[node].slots])
    for slot in batch.slots.tolist():
        number.setdefault(slot, len(number))
    return dense, replace(batch, slots=torch.tensor([number[slot] for slot in batch.slots.tolist()]))


def fill(
    peer: MaskedUnion | HandWrittenCascade,
    dense_batch: TreeBatch,
    dense: Mapping[int, Node],
    batch: TreeBatch,
    nodes: Mapping[int, Node],
    keys: torch.Tensor,
    values: torch.Tensor,
) -> None:
    """Bring a peer of one layer to where a forward attends, from the pool's ``keys`` and ``values``."""
    new = set(batch.nodes) if batch.draft_parents is None else set()
    for node, record in dense.items():
        count = len(record.slots) - (node in new)
        if count:
            slots = torch.tensor(nodes[node].slots[:count])
            peer.load(0, node, record.slots[:count], keys[slots], values[slots])
    if isinstance(peer, HandWrittenCascade):
        peer.regroup([node for node in dense_batch.nodes if node in new])
    peer.prepare(dense_batch, dense)
    peer.write(0, keys[batch.slots], values[batch.slots])
