# SPDX-License-Identifier: Apache-2.0
"""The demo's three workloads, each decoded by every method."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from ...integrations.transformers import ATTENTION_NAME
from ...tree import Tree
from ..records import Step
from ..search import Thoughts, few_shot_steps, tree_of_thought_steps
from ..token_trees import TokenRecycling, TokenTree, medusa_paths
from ..tree_decoding import TreeDecoder
from .errors import DisagreementError
from .hand_written_cascade import HandWrittenCascade
from .inputs import Sizes, recorded_like_schedule
from .masked_union import MaskedUnion
from .measure import CASCADE, NEAR_TIE, PALMETTE, SEQUENCES, UNION, Clock, Difference, MeasuredDecoder, Record
from .peers import ATTENTION_NAME as PEER_ATTENTION_NAME
from .peers import PeerDecoder

UNDRAFTED = "palmette, no drafts"

T = TypeVar("T")


@dataclass
class MethodResult:
    """One row of the table.

    Attributes:
        method: Its name.
        attention_ms: All layers' attention per step, mean over the sampled steps; NaN where it was not
            measured.
        tokens_per_s: Tokens committed per second of its own decode loop.
        kv_tokens: KV tokens read per step, layer and KV head, mean over the sampled steps.
        note: What to know about the row.
    """

    method: str
    attention_ms: float
    tokens_per_s: float
    kv_tokens: float
    note: str = ""


@dataclass
class WorkloadResult:
    """One workload's part of the table."""

    name: str
    description: str
    redundancy: float
    steps: int
    rows: list[MethodResult]
    differences: list[str] = field(default_factory=list)


class Demo:
    """The three workloads on one model.

    Args:
        model: The language model.
        text: Token ids to take prompts from.
        sizes: How much to decode.
        seed: Of the tree of thoughts.
        output: Directory of the pictures of trees; None: no pictures.
        progress: Called as ``progress(description, total)``, a context that yields a function to call per
            step.
    """

    def __init__(
        self,
        model: Any,
        text: Sequence[int],
        sizes: Sizes,
        *,
        seed: int,
        output: Path | None,
        progress: Callable[[str, int], Any],
    ) -> None:
        self.model, self.text, self.sizes, self.seed = model, list(text), sizes, seed
        self.output, self.progress = output, progress
        self.names = (PALMETTE, CASCADE, UNION, SEQUENCES)
        config = model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        self.group = config.num_attention_heads // config.num_key_value_heads
        self._best_picture = 0
        self._seconds: dict[str, float] = {}  # of the last race

    def run(self) -> Iterator[WorkloadResult]:
        """Run one workload after the other."""
        yield self.few_shot()
        yield self.tree_of_thought()
        yield self.token_trees()

    def few_shot(self) -> WorkloadResult:
        """One prompt, many branches."""
        sizes = self.sizes

        def loop(decoder: TreeDecoder) -> Iterator[Step]:
            return few_shot_steps(decoder, None, sizes.branches, sizes.tokens)

        return self._branching(
            "few-shot",
            f"{sizes.branches} branches of {sizes.tokens} tokens on a prompt of {sizes.prompt}",
            self.text[: sizes.prompt],
            sizes.tokens,
            loop,
        )

    def tree_of_thought(self) -> WorkloadResult:
        """Thoughts that branch and end."""
        sizes = self.sizes
        schedule = recorded_like_schedule(
            sizes.levels, sizes.thoughts, sizes.thought_scale, random.Random(self.seed)
        )

        def loop(decoder: TreeDecoder) -> Iterator[Step]:
            return tree_of_thought_steps(decoder, None, schedule, Thoughts())

        return self._branching(
            "tree of thoughts",
            f"{sizes.levels} levels of {sizes.thoughts} thoughts on a prompt of {sizes.thought_prompt}",
            self.text[: sizes.thought_prompt],
            max(entry.end_step for entry in schedule),
            loop,
            picture=True,
        )

    def _branching(
        self,
        name: str,
        description: str,
        prompt: Sequence[int],
        steps: int,
        loop: Callable[[TreeDecoder], Iterator[Step]],
        picture: bool = False,
    ) -> WorkloadResult:
        """A workload in which every step decodes one token per leaf."""
        spread = _spread(steps, self.sizes.samples)
        ours = MeasuredDecoder(self.model, spread.__contains__, self.sizes.repeats, eos_token_id=None)
        with self.progress(f"{name}: reading the prompt", 1) as tick:
            ours.prefill(prompt)
            tick()
        if picture and self.output is not None:
            ours.on_sample = self._picture
        decoders = {PALMETTE: ours, **self._peers(ours)}
        records = {
            method: ours.record if decoder is ours else Record() for method, decoder in decoders.items()
        }
        with self.progress(name, steps) as tick:
            racers = {method: (decoder, loop(decoder)) for method, decoder in decoders.items()}
            for method, step in self._race(racers):
                records[method].add(step, decoders[method])
                if method == PALMETTE:
                    tick()
        rates = {m: sum(map(len, r.tokens.values())) / self._seconds[m] for m, r in records.items()}
        found = list(ours.ties)
        for method, record in records.items():
            found += ours.record.differences(record, method)
        return self._result(name, description, ours, rates, steps, found)

    def token_trees(self) -> WorkloadResult:
        """Speculative decoding: token trees verified step by step."""
        sizes = self.sizes
        name, count = "token trees", sizes.draft_tokens
        prompt = self.text[: sizes.prompt]
        tree = TokenTree(medusa_paths(sizes.draft_nodes))
        learned = TokenRecycling(self.model.config.get_text_config().vocab_size)
        every = max(1, count // (3 * sizes.samples))
        ours = MeasuredDecoder(
            self.model, lambda i: i % every == every // 2, sizes.repeats, eos_token_id=None
        )
        plain = MeasuredDecoder(self.model, lambda i: False, 1, eos_token_id=None)
        with self.progress(f"{name}: reading the prompt", 2) as tick:
            (root,) = ours.prefill(prompt, on_logits=learned.update)
            tick()
            plain.prefill(prompt)
            tick()
        decoders = {PALMETTE: ours, **self._peers(ours)}

        racers: dict[str, tuple[TreeDecoder, Iterator[list[int]]]] = {
            method: (decoder, speculate(decoder, root, count, tree, learned.copy()))
            for method, decoder in decoders.items()
        }
        racers[UNDRAFTED] = (plain, ([token] for step in plain_steps(plain, count) for token in step.tokens))
        tokens: dict[str, list[int]] = {method: [] for method in racers}
        steps = dict.fromkeys(racers, 0)
        with self.progress(name, count) as tick:
            for method, committed in self._race(racers):
                tokens[method] += committed
                steps[method] += 1
                if method == PALMETTE:
                    tick(len(committed))
        rates = {method: len(found) / self._seconds[method] for method, found in tokens.items()}
        notes = {method: f"{len(tokens[method]) / steps[method]:.2f} tokens per step" for method in decoders}
        expected = Record({root: tokens[UNDRAFTED]}, {root: -1}, plain.record.margins)
        found = list(ours.ties)
        for method in decoders:
            found += expected.differences(Record({root: tokens[method][:count]}, {root: -1}), method)
        result = self._result(
            name,
            f"{sizes.draft_nodes} drafts per step on a prompt of {sizes.prompt}, drafted by Token Recycling "
            "(the likeliest successors of each token, as of the last time that the model saw that token)",
            ours,
            rates,
            steps[PALMETTE],
            found,
            tokens_per_step=len(tokens[PALMETTE]) / steps[PALMETTE],
            notes=notes,
        )
        result.rows.append(MethodResult(UNDRAFTED, math.nan, rates[UNDRAFTED], math.nan, "1 token per step"))
        return result

    def _peers(self, source: TreeDecoder) -> dict[str, TreeDecoder]:
        """The other methods' decoders, with the prompt that ``source`` has read."""
        options: dict[str, Any] = {"page_size": 1, "eos_token_id": None}
        return {
            CASCADE: PeerDecoder(HandWrittenCascade(self.num_layers, self.group), source, **options),
            UNION: PeerDecoder(MaskedUnion(self.num_layers, self.group), source, **options),
        }

    def _race(self, racers: Mapping[str, tuple[TreeDecoder, Iterator[T]]]) -> Iterator[tuple[str, T]]:
        """Every method takes a step in turn, so that the machine's moods meet all; counts their seconds."""
        self._seconds = dict.fromkeys(racers, 0.0)
        running = list(racers)
        shuffle = random.Random(self.seed).shuffle
        while running:
            shuffle(running)  # nobody always follows the same one
            for method in list(running):
                decoder, steps = racers[method]
                if isinstance(decoder, MeasuredDecoder):
                    clock = decoder.start()
                else:
                    self.model.set_attn_implementation(PEER_ATTENTION_NAME)
                    clock = Clock()
                step = next(steps, None)
                self._seconds[method] += clock.seconds
                if step is None:
                    running.remove(method)
                else:
                    yield method, step
        self.model.set_attn_implementation(ATTENTION_NAME)

    def _result(
        self,
        name: str,
        description: str,
        ours: MeasuredDecoder,
        rates: dict[str, float],
        steps: int,
        differences: Sequence[Difference],
        *,
        tokens_per_step: float | None = None,
        notes: dict[str, str] | None = None,
    ) -> WorkloadResult:
        wrong = [d for d in differences if not d.margin < NEAR_TIE]
        if wrong:
            raise DisagreementError(
                f"{name}: all methods must choose the same tokens. " + "; ".join(map(str, wrong))
            )
        samples = ours.samples
        timed = [
            (s.per_sequence_s, tokens_per_step or s.queries) for s in samples if s.per_sequence_s is not None
        ]
        rates = {
            **rates,
            SEQUENCES: sum(tokens for _, tokens in timed) / sum(seconds for seconds, _ in timed),
        }
        notes = {**(notes or {}), SEQUENCES: f"sampled {len(timed)} of {steps} steps"}
        rows = [
            MethodResult(
                method,
                _mean(sample.attention_ms[method] for sample in samples),
                rates[method],
                _mean(sample.kv_tokens[method] for sample in samples),
                notes.get(method, ""),
            )
            for method in self.names
        ]
        redundancy = _mean(sample.redundancy for sample in samples)
        return WorkloadResult(name, description, redundancy, steps, rows, [str(d) for d in differences])

    def _picture(self, plan: Any) -> None:
        assert self.output is not None
        richness = _levels(plan.tree) * plan.tree.leaves.numel()
        if richness > self._best_picture:  # of the trees sampled
            self._best_picture = richness
            for suffix in ("svg", "png"):
                plan.plot(self.output / f"tree.{suffix}")


def _levels(tree: Tree) -> int:
    level = {-1: 0}
    for node in tree.order.tolist():
        level[node] = level[tree.parent(node)] + 1
    return max(level.values())


def plain_steps(decoder: TreeDecoder, count: int) -> Iterator[Step]:
    """Decode ``count`` tokens, one per step."""
    for _ in range(count):
        yield decoder.step()


def speculate(
    decoder: TreeDecoder, leaf: int, count: int, tree: TokenTree, draft: TokenRecycling
) -> Iterator[list[int]]:
    """Decode at least ``count`` tokens by token trees; yields those of each step."""
    decoded = 0
    while decoded < count:
        (pending,) = decoder.choose([leaf])
        drafted = draft.draft(pending, tree)
        verified = torch.cat([torch.tensor([pending]), drafted[tree.order]])

        def learn(logits: torch.Tensor, verified: torch.Tensor = verified) -> None:
            draft.update(verified, logits)

        (outcome,) = decoder.verify_step(tree, drafted, [leaf], on_logits=learn)
        decoded += len(outcome.tokens)
        yield outcome.tokens


def _mean(values: Iterable[float]) -> float:
    return statistics.fmean(values)


def _spread(steps: int, count: int) -> set[int]:
    """``count`` of ``steps`` indices, evenly spread."""
    return {int((index + 0.5) * steps / count) for index in range(min(count, steps))}
