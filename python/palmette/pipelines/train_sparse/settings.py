# SPDX-License-Identifier: Apache-2.0
"""How large everything is, by default and with ``--quick``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from .data import VOCAB_SIZE
from .model import ModelSizes
from .recall import RecallTask, Stage
from .training import Schedule

TEXT_KINDS = ("dense", "nsa")
RECALL_KINDS = ("window", "nsa")


@dataclass(frozen=True)
class Settings:
    """Everything that decides the losses, but for the seed and the text.

    Attributes:
        text_model, recall_model: Sizes.
        text, recall: Schedules.
        context, batch: Tokens of a training sequence of text, and sequences of a step.
        windows: Held-out windows for evaluation.
        corpus_limit: Bytes of text to read, about; None for all.
        task, stages: What recall is, and its curriculum.
        recall_tokens: Of one step of recall.
        recall_lengths, recall_sequences: Of the final table.
        prompt, generated, recomputed: Tokens of the generation, and steps that are done without a cache too.
    """

    text_model: ModelSizes
    recall_model: ModelSizes
    text: Schedule
    recall: Schedule
    context: int
    batch: int
    windows: int
    corpus_limit: int | None
    task: RecallTask
    stages: tuple[Stage, ...]
    recall_tokens: int
    recall_lengths: tuple[int, ...]
    recall_sequences: int
    prompt: int
    generated: int
    recomputed: int

    def with_steps(self, text: int | None, recall: int | None) -> Settings:
        """The same with other numbers of steps, where given.

        Raises:
            ValueError: a number is not positive.
        """
        changed: dict[str, Any] = {}
        for name, option, steps in (("text", "--text-steps", text), ("recall", "--recall-steps", recall)):
            if steps is None:
                continue
            if steps < 1:
                raise ValueError(f"{option} must be positive, got {steps}")
            changed[name] = dataclasses.replace(getattr(self, name), steps=steps)
        return dataclasses.replace(self, **changed)


_TASK = RecallTask()
_RECALL_MODEL = ModelSizes(
    vocab_size=_TASK.vocab_size,
    layers=2,
    hidden_size=128,
    mlp_size=256,
    num_q_heads=2,
    num_kv_heads=1,
    head_dim=64,
    rotary=16,
    window=64,
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    topk=16,
    compression_gain=8.0,
    token_shift=True,
)

DEFAULT = Settings(
    text_model=ModelSizes(vocab_size=VOCAB_SIZE, window=128),
    recall_model=_RECALL_MODEL,
    text=Schedule(800, 3e-3, 50, 0.1, 100, 25),
    recall=Schedule(1500, 3e-3, 50, 0.0, 100, 50),
    context=2048,
    batch=4,
    windows=32,
    corpus_limit=None,
    task=_TASK,
    stages=(Stage(0.2, 128, 0), Stage(0.35, 512, 128), Stage(0.6, 1024, 128), Stage(1.0, 4096, 128)),
    recall_tokens=4096,
    recall_lengths=(512, 1024, 2048, 4096, 8192),
    recall_sequences=32,
    prompt=4096,
    generated=256,
    recomputed=16,
)

QUICK = Settings(
    text_model=dataclasses.replace(
        DEFAULT.text_model, layers=2, hidden_size=64, mlp_size=128, window=32, topk=4
    ),
    recall_model=dataclasses.replace(_RECALL_MODEL, head_dim=32, window=16, topk=4),
    text=Schedule(60, 3e-3, 10, 0.1, 20, 10),
    recall=Schedule(300, 3e-3, 20, 0.0, 50, 25),
    context=512,
    batch=4,
    windows=8,
    corpus_limit=1_000_000,
    task=RecallTask(pairs=8),
    stages=(Stage(0.7, 64, 0), Stage(1.0, 256, 32)),
    recall_tokens=1024,
    recall_lengths=(128, 256, 512),
    recall_sequences=8,
    prompt=1024,
    generated=32,
    recomputed=4,
)
