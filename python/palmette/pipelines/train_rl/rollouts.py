# SPDX-License-Identifier: Apache-2.0
"""Rollouts of a batch of problems by a tree decoder: instructions once, each question once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from palmette.tree import Tree

from ..tree_decoding import TreeDecoder
from .task import Problem, Task


@dataclass
class Rollouts:
    """A batch of groups as a tree of tokens: instructions, questions, answers.

    Attributes:
        tree: one root, a node per problem, a node per answer below it.
        token_ids: int64 [N], depth-first.
        answers: first token and length of each answer in depth-first numbers, int64 [B, G, 2].
        logprobs: float32 [N] of the sampled tokens under the policy that drew them; 0 elsewhere.
        rewards: float32 [B, G].
        version: of the policy that drew them.
    """

    tree: Tree
    token_ids: Tensor
    answers: Tensor
    logprobs: Tensor
    rewards: Tensor
    version: int = 0

    def of_tokens(self, values: Tensor) -> Tensor:
        """A value per answer [B, G], for each of its tokens: [N], 0 elsewhere."""
        result = torch.zeros(len(self.token_ids), dtype=values.dtype)
        for (begin, length), value in zip(self.answers.view(-1, 2).tolist(), values.flatten(), strict=True):
            result[begin : begin + length] = value
        return result

    @property
    def num_answer_tokens(self) -> int:
        return int(self.answers[..., 1].sum())


def roll_out(
    model: Any,
    task: Task,
    problems: Sequence[Problem],
    group: int,
    *,
    max_tokens: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> Rollouts:
    """``group`` answers to each problem, drawn at ``temperature`` (0: the likeliest ones).

    The decoder reads the instructions once, each question once, and steps all answers together.
    """
    decoder = TreeDecoder(model, eos_token_id=task.end_tokens)
    (root,) = decoder.prefill(task.instructions)
    questions = decoder.fork(root, len(problems))
    asked = [task.question(problem) for problem in problems]
    decoder.extend(dict(zip(questions, asked, strict=True)))
    leaves = [decoder.fork(node, group) for node in questions]
    tokens: dict[int, list[int]] = {leaf: [] for some in leaves for leaf in some}
    logprobs: dict[int, list[float]] = {leaf: [] for leaf in tokens}
    for _ in range(max_tokens):
        if not decoder.active:
            break
        step = decoder.step(temperature=temperature, generator=generator)
        for leaf, token, logprob in zip(step.nodes, step.tokens, step.logprobs, strict=True):
            tokens[leaf].append(token)
            logprobs[leaf].append(logprob)

    parents, counts, ids, places, drawn = [-1], [len(task.instructions)], list(task.instructions), [], []
    drawn += [0.0] * len(ids)
    rewards = []
    for problem, question, some in zip(problems, asked, leaves, strict=True):
        node = len(parents)
        parents.append(0)
        counts.append(len(question))
        ids += question
        drawn += [0.0] * len(question)
        for leaf in some:
            parents.append(node)
            counts.append(len(tokens[leaf]))
            places.append((len(ids), len(tokens[leaf])))
            ids += tokens[leaf]
            drawn += logprobs[leaf]
            rewards.append(task.reward(problem, tokens[leaf]))
    shape = (len(problems), group)
    return Rollouts(
        Tree(torch.tensor(parents), torch.tensor(counts)),
        torch.tensor(ids),
        torch.tensor(places).view(*shape, 2),
        torch.tensor(drawn),
        torch.tensor(rewards).view(shape),
    )
