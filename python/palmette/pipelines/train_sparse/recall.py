# SPDX-License-Identifier: Apache-2.0
"""Multi-query associative recall: pairs of a key and a value among noise, and questions far behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .draws import generator_for
from .model import LanguageModel


@dataclass(frozen=True)
class RecallTask:
    """What a sequence is made of: noise, with pairs spread over it; a gap; and keys that are asked for.

    A sequence is ``noise.. k v noise.. k v noise.. | gap of noise | k k k ..``, and behind each key of the
    last part the model has to name its value. Keys of a sequence differ, so an answer stands in one place
    only; values are drawn anew for every pair of every sequence.

    Attributes:
        keys, values, noise: Tokens of each kind.
        pairs: Pairs of a sequence, all of which are asked for, in another order.
    """

    keys: int = 64
    values: int = 32
    noise: int = 16
    pairs: int = 16

    @property
    def vocab_size(self) -> int:
        """Tokens in all."""
        return self.keys + self.values + self.noise

    @property
    def chance(self) -> float:
        """Accuracy of a guess among the values."""
        return 1 / self.values

    def sample(self, batch: int, length: int, gap: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random sequences.

        Args:
            batch: Sequences.
            length: Tokens of each.
            gap: Tokens of noise, at least, between any value and the first question.
            generator: Of all draws.

        Returns:
            tokens [batch, length] and targets [batch, pairs], the answers to the last ``pairs`` tokens;
            int64.

        Raises:
            ValueError: the pairs do not fit into the length.
        """
        room = length - gap - self.pairs  # for pairs and the noise between them
        if room < 2 * self.pairs:
            raise ValueError(
                f"length must be at least {3 * self.pairs + gap} for {self.pairs} pairs and a gap of {gap}, "
                f"got {length}"
            )
        tokens = torch.randint(self.noise, (batch, length), generator=generator) + self.keys + self.values
        keys = torch.rand(batch, self.keys, generator=generator).argsort(1)[:, : self.pairs]
        values = torch.randint(self.values, (batch, self.pairs), generator=generator) + self.keys
        # places of pairs, if a pair were one token wide; the pairs before each one shift it by one more
        narrow = torch.rand(batch, room - self.pairs, generator=generator).argsort(1)[:, : self.pairs]
        places = narrow.sort(1).values + torch.arange(self.pairs)
        tokens.scatter_(1, places, keys).scatter_(1, places + 1, values)
        order = torch.rand(batch, self.pairs, generator=generator).argsort(1)
        tokens[:, -self.pairs :] = keys.gather(1, order)
        return tokens, values.gather(1, order)


@dataclass(frozen=True)
class Stage:
    """Part of a curriculum.

    Attributes:
        until: Step before which it ends, as a share of all.
        length: Tokens of a sequence.
        gap: Least tokens between a value and the first question.
    """

    until: float
    length: int
    gap: int


@dataclass
class RecallTraining:
    """Training on recall, from short sequences to longer ones.

    Attributes:
        task: What sequences are made of.
        stages: The curriculum, ascending in ``until``, the last one 1.
        steps: Of the whole training.
        tokens: Of one step's batch, about: as many sequences as fit, at least one.
        seed: Of all sequences.
        followed: Sequences of the last stage's length that ``evaluate`` uses.
    """

    task: RecallTask
    stages: tuple[Stage, ...]
    steps: int
    tokens: int
    seed: int
    followed: int = 16

    def loss(self, model: LanguageModel, step: int) -> tuple[Tensor, int]:
        """Mean loss of the answers of one step's batch, and the tokens read for it."""
        stage = next(stage for stage in self.stages if step < stage.until * self.steps)
        batch = max(1, self.tokens // stage.length)
        generator = generator_for("recall, training", self.seed, step)
        tokens, targets = self.task.sample(batch, stage.length, stage.gap, generator)
        logits = answers(model, tokens, self.task.pairs)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten()), tokens.numel()

    def evaluate(self, model: LanguageModel) -> float:
        """Accuracy on sequences as long as the last stage's."""
        stage = self.stages[-1]
        generator = generator_for("recall, followed", self.seed)
        return accuracy(model, self.task, self.followed, stage.length, stage.gap, generator)

    def final(
        self, model: LanguageModel, length: int, sequences: int, tick: Callable[[int, str], None]
    ) -> float:
        """Accuracy on sequences of any length that were never trained on, with the last stage's gap.

        ``tick(1, note)`` is called per sequence.
        """
        generator = generator_for("recall, final", self.seed, length)
        gap = self.stages[-1].gap
        return accuracy(model, self.task, sequences, length, gap, generator, tick)


def answers(model: LanguageModel, tokens: Tensor, pairs: int) -> Tensor:
    """Logits behind the last ``pairs`` tokens, [batch, pairs, vocab]; the others' are not computed."""
    return F.linear(model.hidden(tokens)[:, -pairs:], model.embedding.weight)


@torch.no_grad()
def accuracy(
    model: LanguageModel,
    task: RecallTask,
    sequences: int,
    length: int,
    gap: int,
    generator: torch.Generator,
    tick: Callable[[int, str], None] | None = None,
) -> float:
    """Share of questions whose most likely token, of all tokens, is the answer.

    Args:
        model: Of any kind.
        task: What sequences are made of.
        sequences: How many, drawn one by one from ``generator``.
        length, gap: Of each.
        generator: Of the draws.
        tick: Called as ``tick(1, note)`` per sequence. Default: nothing.
    """
    right = 0
    for _ in range(sequences):
        tokens, targets = task.sample(1, length, gap, generator)
        right += int((answers(model, tokens, task.pairs).argmax(-1) == targets).sum())
        if tick is not None:
            tick(1, f"{length} tokens")
    return right / (sequences * task.pairs)
