# SPDX-License-Identifier: Apache-2.0
"""Searches over a tree of sequences: few-shot, best-of-n, beam search, tree-of-thought."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .records import Completion, Step

if TYPE_CHECKING:
    from .tree_decoding import TreeDecoder


class ThoughtNode(NamedTuple):
    """A thought of a recorded tree: when it ends, and which thoughts follow it.

    Attributes:
        end_step: The decode step after which it ends; steps count from 1, the root ends at 0.
        children: Indices of the thoughts that branch off then; a thought without any is pruned.
    """

    end_step: int
    children: Sequence[int]


@dataclass
class Thoughts:
    """What ``tree_of_thought`` decoded.

    Attributes:
        tokens: Tokens of every thought that came to be, by its index in the schedule, pruned ones included.
        parent: Each thought's parent, by index.
        steps: Decode steps.
        kv_tokens: Sum over the steps of the tree's tokens, shared ones counted once.
        kv_tokens_per_sequence: Sum over the steps of the leaves' path lengths.
    """

    tokens: dict[int, list[int]] = field(default_factory=dict)
    parent: dict[int, int] = field(default_factory=dict)
    steps: int = 0
    kv_tokens: int = 0
    kv_tokens_per_sequence: int = 0


def few_shot(
    decoder: TreeDecoder,
    prompt: Sequence[int] | torch.Tensor | None,
    branches: int,
    max_new_tokens: int,
    **options: Any,
) -> list[Completion]:
    """Continue one prompt in several branches.

    Args:
        decoder: A decoder without a tree; or, with ``prompt`` None, one that holds the prompt's.
        prompt: Token ids.
        branches: Number of branches. Greedy, branch i starts with the i-th likeliest token.
        max_new_tokens: Tokens per branch at most.
        options: ``temperature`` (default 0, greedy), ``top_k``, ``top_p``, ``generator``: see
            ``TreeDecoder.step``.

    Returns:
        One sequence per branch.

    Raises:
        ValueError: ``branches`` or ``max_new_tokens`` is not positive.
    """
    for _ in few_shot_steps(decoder, prompt, branches, max_new_tokens, **options):
        pass
    return decoder.sequences()


def few_shot_steps(
    decoder: TreeDecoder,
    prompt: Sequence[int] | torch.Tensor | None,
    branches: int,
    max_new_tokens: int,
    **options: Any,
) -> Iterator[Step]:
    """``few_shot``, step by step."""
    root = _root(decoder, prompt, branches, max_new_tokens)
    decoder.fork(root, branches if _samples(options) else decoder.likeliest(root, branches))
    for _ in range(max_new_tokens):
        if not decoder.active:
            break
        yield decoder.step(**options)


def best_of_n(
    decoder: TreeDecoder,
    prompt: Sequence[int] | torch.Tensor | None,
    n: int,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    length_penalty: float = 1.0,
    **options: Any,
) -> list[Completion]:
    """Sample ``n`` continuations, ranked by log-probability over length ** ``length_penalty``, best first.

    Args and errors: see ``few_shot``; ``length_penalty`` 0 ranks by the plain sum.
    """
    sequences = few_shot(decoder, prompt, n, max_new_tokens, temperature=temperature, **options)
    return sorted(sequences, key=lambda s: _rank(s.score, len(s.tokens), length_penalty), reverse=True)


def beam_search(
    decoder: TreeDecoder,
    prompt: Sequence[int] | torch.Tensor | None,
    num_beams: int,
    max_new_tokens: int,
    *,
    length_penalty: float = 1.0,
) -> list[Completion]:
    """Keep the ``num_beams`` likeliest sequences at every step; the beams of a common past share its KV.

    A beam that ends with an end token is set aside while its place goes to the next best; the search stops
    when ``num_beams`` have ended or ``max_new_tokens`` are decoded.

    Args:
        decoder, prompt, max_new_tokens: See ``few_shot``.
        num_beams: Sequences kept.
        length_penalty: Sequences are ranked by log-probability over length ** ``length_penalty``.

    Returns:
        The best ``num_beams`` sequences, best first. Their nodes may be pruned already.
    """
    root = _root(decoder, prompt, num_beams, max_new_tokens)
    beams, scores = [root], torch.zeros(1)
    finished: list[Completion] = []
    for length in range(1, max_new_tokens + 1):
        logprobs = decoder.logits(beams).float().log_softmax(-1)
        vocab = logprobs.shape[1]
        # enough candidates that num_beams remain when every end token is set aside
        count = min(num_beams * (1 + len(decoder.eos_token_ids)), logprobs.numel())
        values, indices = (scores[:, None] + logprobs).flatten().topk(count)
        chosen: dict[int, list[int]] = {}
        kept: list[tuple[int, int, float]] = []
        for rank, (score, index) in enumerate(zip(values.tolist(), indices.tolist(), strict=True)):
            beam, token = beams[index // vocab], index % vocab
            if token in decoder.eos_token_ids:
                if rank < num_beams:
                    tokens = [*decoder.sequence(beam).tokens, token]
                    finished.append(Completion(beam, tokens, score, True))
            elif len(kept) < num_beams:
                kept.append((beam, len(chosen.setdefault(beam, [])), score))
                chosen[beam].append(token)
        if len(finished) >= num_beams or not kept:
            break
        grown = {}
        for beam, tokens in chosen.items():
            if len(tokens) > 1:
                grown[beam] = decoder.fork(beam, tokens)
            else:  # the beam goes on by itself: no node of one token per step
                decoder.force({beam: tokens[0]})
                grown[beam] = [beam]
        for beam in beams:
            if beam not in grown:
                decoder.prune(beam)
        beams = [grown[beam][place] for beam, place, _ in kept]
        scores = torch.tensor([score for *_, score in kept])
        if length < max_new_tokens:
            decoder.step()
    else:
        for beam in beams:
            pending = decoder.choose([beam])  # the last tokens need no forward
            sequence = decoder.sequence(beam)
            score = float(scores[beams.index(beam)])
            finished.append(Completion(beam, [*sequence.tokens, *pending], score, False))
    return sorted(finished, key=lambda s: _rank(s.score, len(s.tokens), length_penalty), reverse=True)[
        :num_beams
    ]


def tree_of_thought(
    decoder: TreeDecoder,
    prompt: Sequence[int] | torch.Tensor | None,
    schedule: Sequence[ThoughtNode],
    *,
    max_steps: int | None = None,
    **options: Any,
) -> Thoughts:
    """Decode a tree of thoughts along a schedule, such as one recorded from a reasoning run.

    Every live thought gains one token per step; one that ends is branched into its children or, without any,
    pruned, and with it all ancestors left without leaves. Ends are handled in the order of the leaves.

    Args:
        decoder: A decoder without a tree; or, with ``prompt`` None, one that holds the prompt's.
        prompt: Token ids of the root.
        schedule: The thoughts; number 0 is the root, which is branched before step 1.
        max_steps: Stop after so many steps (default: when no thought is left).
        options: ``temperature`` (default 0, greedy), ``top_k``, ``top_p``, ``generator``: see
            ``TreeDecoder.step``. Greedy, child i starts with the i-th likeliest token.

    Raises:
        ValueError: The schedule is empty, its root has no children, or a child is not a later index.
    """
    thoughts = Thoughts()
    for _ in tree_of_thought_steps(decoder, prompt, schedule, thoughts, max_steps=max_steps, **options):
        pass
    return thoughts


def tree_of_thought_steps(
    decoder: TreeDecoder,
    prompt: Sequence[int] | torch.Tensor | None,
    schedule: Sequence[ThoughtNode],
    thoughts: Thoughts,
    *,
    max_steps: int | None = None,
    **options: Any,
) -> Iterator[Step]:
    """``tree_of_thought``, step by step, into ``thoughts``; a thought ends after its last step is yielded."""
    _check_schedule(schedule)
    root = _root(decoder, prompt, 1, 1)
    thought = {root: 0}

    def branch(node: int) -> None:
        names = schedule[thought[node]].children
        count = len(names)
        children = decoder.fork(node, count if _samples(options) else decoder.likeliest(node, count))
        for child, name in zip(children, names, strict=True):
            thought[child] = name
            thoughts.parent[name] = thought[node]

    branch(root)
    while decoder.active and (max_steps is None or thoughts.steps < max_steps):
        step = decoder.step(**options)
        thoughts.steps += 1
        paths = [decoder.path(leaf) for leaf in decoder.leaves]
        length = {node: len(decoder.node(node).slots) for path in paths for node in path}
        thoughts.kv_tokens += sum(length.values())
        thoughts.kv_tokens_per_sequence += sum(length[node] for path in paths for node in path)
        yield step
        for leaf in decoder.leaves:
            entry = schedule[thought[leaf]]
            if entry.end_step > thoughts.steps:
                continue
            thoughts.tokens[thought[leaf]] = list(decoder.node(leaf).tokens)
            if entry.children and not decoder.node(leaf).finished:
                branch(leaf)
            else:
                decoder.prune(leaf)
    for leaf in decoder.leaves:
        thoughts.tokens[thought[leaf]] = list(decoder.node(leaf).tokens)


def _samples(options: Mapping[str, Any]) -> bool:
    return bool(options.get("temperature", 0.0) > 0)


def _root(
    decoder: TreeDecoder, prompt: Sequence[int] | torch.Tensor | None, branches: int, max_new_tokens: int
) -> int:
    for name, value in (("branches", branches), ("max_new_tokens", max_new_tokens)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if prompt is not None:
        roots = decoder.prefill(prompt)
    else:
        roots = decoder.leaves
    if len(roots) != 1:
        raise ValueError(f"prompt must be one sequence, got {len(roots)}")
    return roots[0]


def _rank(score: float, length: int, length_penalty: float) -> float:
    rank: float = score / max(length, 1) ** length_penalty
    return rank


def _check_schedule(schedule: Sequence[ThoughtNode]) -> None:
    if not schedule or not schedule[0].children:
        raise ValueError("schedule must begin with a root that has children, got none")
    for index, entry in enumerate(schedule):
        for child in entry.children:
            if not index < child < len(schedule):
                raise ValueError(
                    f"schedule must list children behind their parent, got child {child} of {index} "
                    f"among {len(schedule)} thoughts"
                )
