# SPDX-License-Identifier: Apache-2.0
"""``python -m palmette demo``: a real language model decodes trees, next to every other way of doing it.

Three workloads: few-shot branches of one prompt, a tree of thoughts, and token trees of speculative decoding. Each runs with
Palmette, with a cascade written by hand on PyTorch's own kernels, with masked SDPA over all tokens, and, on some of the
steps, with per-sequence SDPA. All must choose the same tokens.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..integrations._extras import MissingExtraError, require
from .search import ThoughtNode, few_shot, tree_of_thought
from .token_trees import TokenRecycling, TokenTree, medusa_paths
from .tree_decoding import Step, TreeDecoder

LENGTH_DECILES = (18, 30, 42, 51, 63, 75, 93, 129, 171)
EXPANDED_RANK_WEIGHTS = (3, 5, 5, 12, 18, 47, 58, 88, 267, 297)


@dataclass(frozen=True)
class Sizes:
    """How much the demo decodes."""

    prompt: int = 2048
    branches: int = 32
    tokens: int = 64
    thought_prompt: int = 1024
    thoughts: int = 10  # per branching
    levels: int = 4
    thought_scale: float = 0.35
    draft_nodes: int = 63
    draft_tokens: int = 96
    samples: int = 4
    repeats: int = 5


QUICK = Sizes(
    prompt=48,
    branches=4,
    tokens=6,
    thought_prompt=24,
    thoughts=3,
    levels=2,
    thought_scale=0.1,
    draft_nodes=8,
    draft_tokens=12,
    samples=1,
    repeats=2,
)


@dataclass
class MethodResult:
    """One row of the table.

    Attributes:
        method: Its name.
        attention_ms: All layers' attention per step, mean over the sampled steps; NaN where it was not measured.
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


def recorded_like_schedule(
    levels: int, branching: int, scale: float, generator: random.Random
) -> list[ThoughtNode]:
    """A tree of thoughts with the statistics of DeFT's recorded set-intersection runs (arXiv 2404.00242, section 4.1).

    There, every expansion makes 10 thoughts and one of them, mostly among the longest, is expanded in turn while the others
    run out; lengths have deciles 18, 30, 42, 51, 63, 75, 93, 129, 171.

    Args:
        levels: Expansions on the way down (the recorded trees have 9).
        branching: Thoughts per expansion.
        scale: Factor on all lengths.
        generator: Source of the draws.

    Returns:
        A schedule for ``tree_of_thought``.
    """
    deciles = (6, *LENGTH_DECILES, 260)

    def length() -> int:
        decile = generator.randrange(10)
        return max(1, round(scale * generator.uniform(deciles[decile], deciles[decile + 1])))

    ends, children = [0], [[*range(1, branching + 1)]]
    parent_end = 0
    for level in range(levels):
        first = len(ends)
        lengths = [length() for _ in range(branching)]
        ends.extend(parent_end + n for n in lengths)
        children.extend([] for _ in lengths)
        if level + 1 < levels:
            weights = [EXPANDED_RANK_WEIGHTS[rank * 10 // branching] for rank in range(branching)]
            rank = generator.choices(range(branching), weights)[0]
            expanded = first + sorted(range(branching), key=lengths.__getitem__)[rank]
            children[expanded] = [*range(len(ends), len(ends) + branching)]
            parent_end = ends[expanded]
    return [ThoughtNode(end, below) for end, below in zip(ends, children, strict=True)]


class Demo:
    """The three workloads on one model.

    Args:
        model: The language model.
        text: Token ids to take prompts from.
        sizes: How much to decode.
        seed: Of the tree of thoughts.
        output: Directory of the pictures of trees; None: no pictures.
        progress: Called as ``progress(description, total)``, a context that yields a function to call per step.
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
        from .measure import CASCADE, PALMETTE, SEQUENCES, UNION

        self.model, self.text, self.sizes, self.seed = model, list(text), sizes, seed
        self.output, self.progress = output, progress
        self.names = (PALMETTE, CASCADE, UNION, SEQUENCES)
        config = model.config.get_text_config()
        self.num_layers = config.num_hidden_layers
        self.group = config.num_attention_heads // config.num_key_value_heads
        self._best_picture = 0

    def run(self) -> Iterator[WorkloadResult]:
        """Run one workload after the other."""
        yield self.few_shot()
        yield self.tree_of_thought()
        yield self.token_trees()

    def few_shot(self) -> WorkloadResult:
        """One prompt, many branches."""
        sizes = self.sizes

        def loop(decoder: TreeDecoder, on_step: Callable[[Step], None]) -> None:
            few_shot(decoder, None, sizes.branches, sizes.tokens, on_step=on_step)

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

        def loop(decoder: TreeDecoder, on_step: Callable[[Step], None]) -> None:
            tree_of_thought(decoder, None, schedule, on_step=on_step)

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
        loop: Callable[[TreeDecoder, Callable[[Step], None]], None],
        picture: bool = False,
    ) -> WorkloadResult:
        """A workload in which every step decodes one token per leaf."""
        from .measure import PALMETTE, Clock, MeasuredDecoder, Record

        spread = _spread(steps, self.sizes.samples)
        ours = MeasuredDecoder(self.model, spread.__contains__, self.sizes.repeats, eos_token_id=None)
        with self.progress(f"{name}: reading the prompt", 1) as tick:
            ours.prefill(prompt)
            tick()
            peers = self._peers(ours)
        if picture and self.output is not None:
            ours.on_sample = self._picture
        rates = {}
        ours.start()
        with self.progress(f"{name}: {PALMETTE}", steps) as tick:
            loop(ours, lambda step: (ours.record.add(step, ours), tick())[1])  # type: ignore[func-returns-value]
        count = sum(map(len, ours.record.tokens.values()))
        rates[PALMETTE] = count / ours.stop()
        found = list(ours.ties)
        for method, decoder in peers.items():
            record = Record()
            self._set_attention(peer=True)
            clock = Clock()
            with self.progress(f"{name}: {method}", steps) as tick:
                loop(decoder, lambda step, d=decoder, r=record: (r.add(step, d), tick())[1])  # type: ignore[misc]
            rates[method] = sum(map(len, record.tokens.values())) / clock.seconds
            found += ours.record.differences(record, method)
        return self._result(name, description, ours, rates, steps, found, tokens_per_step=None)

    def token_trees(self) -> WorkloadResult:
        """Speculative decoding: token trees verified step by step."""
        from .measure import PALMETTE, Clock, MeasuredDecoder, Record

        sizes = self.sizes
        prompt = self.text[: sizes.prompt]
        tree = TokenTree(medusa_paths(sizes.draft_nodes))
        learned = TokenRecycling(self.model.config.get_text_config().vocab_size)
        every = max(1, sizes.draft_tokens // (3 * sizes.samples))
        name = "token trees"
        ours = MeasuredDecoder(self.model, lambda i: i % every == every // 2, sizes.repeats, eos_token_id=None)
        plain = MeasuredDecoder(self.model, lambda i: False, 1, eos_token_id=None)
        with self.progress(f"{name}: reading the prompt", 2) as tick:
            (root,) = ours.prefill(prompt, on_logits=learned.update)
            tick()
            plain.prefill(prompt)
            tick()
            peers = self._peers(ours)
        rates, notes = {}, {}
        with self.progress(f"{name}: one token at a time", sizes.draft_tokens) as tick:
            plain.start()
            for _ in range(sizes.draft_tokens):
                plain.record.add(plain.step(), plain)
                tick()
            rates["palmette, no drafts"] = sizes.draft_tokens / plain.stop()
        found = []
        for method, decoder in {PALMETTE: ours, **peers}.items():
            self._set_attention(peer=decoder is not ours)
            recycling = learned.copy()
            if decoder is ours:
                ours.start()
            clock = Clock() if decoder is not ours else ours.clock
            steps = 0
            committed: list[int] = []
            with self.progress(f"{name}: {method}", sizes.draft_tokens) as tick:
                while len(committed) < sizes.draft_tokens:
                    (pending,) = decoder.choose([root])
                    drafted = recycling.draft(pending, tree)
                    with_logits: list[torch.Tensor] = []
                    (outcome,) = decoder.verify_step(tree, drafted, [root], on_logits=with_logits.append)
                    rows = torch.cat([torch.tensor([pending]), drafted[tree.order]])
                    recycling.update(rows, with_logits[0])
                    committed += outcome.tokens
                    steps += 1
                    tick(len(outcome.tokens))
            seconds = ours.stop() if decoder is ours else clock.seconds
            rates[method] = len(committed) / seconds
            notes[method] = f"{len(committed) / steps:.2f} tokens per step"
            if decoder is ours:
                total_steps, tokens_per_step = steps, len(committed) / steps
                found += ours.ties
            record = Record(tokens={root: committed[: sizes.draft_tokens]}, parents={root: -1})
            found += plain.record.differences(record, method)
        description = (
            f"{sizes.draft_nodes} drafts per step on a prompt of {sizes.prompt}, drafted by Token Recycling "
            f"(the model's own likeliest successors of each token)"
        )
        result = self._result(name, description, ours, rates, total_steps, found, tokens_per_step, notes)
        result.rows.append(
            MethodResult("palmette, no drafts", math.nan, rates["palmette, no drafts"], math.nan, "one token per step")
        )
        return result

    def _peers(self, source: TreeDecoder) -> dict[str, TreeDecoder]:
        from .measure import CASCADE, UNION
        from .peers import HandWrittenCascade, MaskedUnion, PeerDecoder

        options: dict[str, Any] = {"page_size": 1, "eos_token_id": None}
        return {
            CASCADE: PeerDecoder(HandWrittenCascade(self.num_layers, self.group), source, **options),
            UNION: PeerDecoder(MaskedUnion(self.num_layers, self.group), source, **options),
        }

    def _set_attention(self, *, peer: bool) -> None:
        from ..integrations.transformers import ATTENTION_NAME
        from .peers import ATTENTION_NAME as PEER_ATTENTION_NAME

        self.model.set_attn_implementation(PEER_ATTENTION_NAME if peer else ATTENTION_NAME)

    def _result(
        self,
        name: str,
        description: str,
        ours: Any,
        rates: dict[str, float],
        steps: int,
        differences: Sequence[Any],
        tokens_per_step: float | None,
        notes: dict[str, str] | None = None,
    ) -> WorkloadResult:
        from .measure import NEAR_TIE, SEQUENCES

        wrong = [d for d in differences if not d.margin < NEAR_TIE]
        if wrong:
            raise AssertionError(f"{name}: all methods must choose the same tokens. " + "; ".join(map(str, wrong)))
        samples = ours.samples
        seconds = sum(sample.per_sequence_s for sample in samples)
        per_step = [tokens_per_step or sample.queries for sample in samples]
        rates = {**rates, SEQUENCES: sum(per_step) / seconds}
        notes = {**(notes or {}), SEQUENCES: f"sampled {len(samples)} of {steps} steps"}
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

    def _picture(self, batch: Any, plan: Any) -> None:
        assert self.output is not None
        if len(batch.nodes) > self._best_picture:
            self._best_picture = len(batch.nodes)
            for suffix in ("svg", "png"):
                plan.plot(self.output / f"tree.{suffix}")


def _mean(values: Any) -> float:
    collected = list(values)
    return sum(collected) / len(collected)


def _spread(steps: int, count: int) -> set[int]:
    """``count`` of ``steps`` indices, evenly spread."""
    return {int((index + 0.5) * steps / count) for index in range(min(count, steps))}


def text_tokens(tokenizer: Any, count: int) -> list[int]:
    """Tokens of English prose from the standard library: Python's documentation topics."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokens: list[int] = []
    characters = 8 * count
    while len(tokens) < count:
        if characters > 2 * len(text):
            raise ValueError(f"the prompt must be at most {len(tokens)} tokens, got {count}")
        tokens = list(tokenizer(text[:characters])["input_ids"])
        characters *= 2
    return tokens[:count]


def tiny_model(seed: int) -> tuple[Any, list[int]]:
    """A random Llama of two layers and bytes of prose as its tokens: what ``--quick`` runs on."""
    transformers = require("transformers", "palmette demo")
    from pydoc_data.topics import topics

    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.3,
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).eval(), list("".join(topics.values())[:4096].encode())


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m palmette demo",
        description="Decode trees with a real language model: Palmette next to per-sequence attention, masked attention "
        "and a cascade written by hand.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    sizes = Sizes()
    parser.add_argument("--quick", action="store_true", help="a tiny random model, seconds: to see that all works")
    parser.add_argument("--model", help="directory of a Llama- or Qwen-style checkpoint; default: SmolLM2-135M-Instruct")
    parser.add_argument("--output", type=Path, default=Path("palmette-demo"), help="where the results go")
    parser.add_argument("--threads", type=int, help="CPU threads; default: what PyTorch takes")
    parser.add_argument("--seed", type=int, default=0, help="of the tree of thoughts")
    parser.add_argument("--branches", type=int, default=sizes.branches, help="few-shot: branches")
    parser.add_argument("--tokens", type=int, default=sizes.tokens, help="few-shot: tokens per branch")
    parser.add_argument("--prompt", type=int, default=sizes.prompt, help="few-shot, token trees: tokens of the prompt")
    parser.add_argument("--levels", type=int, default=sizes.levels, help="tree of thoughts: branchings (recorded: 9)")
    parser.add_argument(
        "--thought-scale", type=float, default=sizes.thought_scale, help="tree of thoughts: length over the recorded"
    )
    return parser.parse_args(arguments)


@contextmanager
def _bar(description: str, total: int) -> Iterator[Callable[..., None]]:
    tqdm = require("tqdm", "palmette demo")
    with tqdm.tqdm(desc=description, total=total, leave=False, file=sys.stderr, dynamic_ncols=True) as bar:
        yield lambda count=1: bar.update(min(count, bar.total - bar.n)) and None


def run(options: argparse.Namespace) -> int:
    """Run the demo and write its results."""
    begin = time.perf_counter()
    for package in ("matplotlib", "tqdm", "transformers"):
        require(package, "palmette demo", install="'palmette[demo]'")
    from . import report
    from .models import load_model

    if options.threads is not None:
        if options.threads < 1:
            raise ValueError(f"--threads must be positive, got {options.threads}")
        torch.set_num_threads(options.threads)
    require("transformers.utils.logging", "palmette demo").disable_progress_bar()
    if options.quick:
        sizes = QUICK
        model, text = tiny_model(options.seed)
        model_name = "a random Llama of two layers"
    else:
        sizes = Sizes(
            prompt=options.prompt,
            branches=options.branches,
            tokens=options.tokens,
            levels=options.levels,
            thought_scale=options.thought_scale,
        )
        with _bar("loading the model", 1):
            model, tokenizer = load_model(options.model)
        text = text_tokens(tokenizer, max(sizes.prompt, sizes.thought_prompt))
        model_name = str(options.model or "SmolLM2-135M-Instruct")
    options.output.mkdir(parents=True, exist_ok=True)
    demo = Demo(model, text, sizes, seed=options.seed, output=options.output, progress=_bar)
    results = []
    for result in demo.run():
        results.append(result)
        for difference in result.differences:
            print(f"near tie, {result.name}: {difference}")
    seconds = time.perf_counter() - begin
    table = report.write(results, options.output, model_name, seconds, vars(options))
    print(table)
    print(f"all methods chose the same tokens; {seconds:.0f} s; results in {options.output}")
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m palmette demo``; returns the exit status."""
    # nothing is fetched from a hub: said before transformers is imported, which reads it once
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    options = parse_arguments(arguments)
    try:
        return run(options)
    except (MissingExtraError, FileNotFoundError, ValueError) as error:
        print(f"palmette demo: {error}", file=sys.stderr)
        return 1
