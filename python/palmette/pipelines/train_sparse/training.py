# SPDX-License-Identifier: Apache-2.0
"""Training that can be stopped at any point and goes on to the same losses, bit for bit."""

from __future__ import annotations

import dataclasses
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..long_runs import Budget, Progress, StoppedError, write_atomically
from .model import LanguageModel


@dataclass(frozen=True)
class Schedule:
    """How a model is trained.

    Attributes:
        steps: Of the optimizer.
        learning_rate: After the warm-up, from where it falls to a tenth along half a cosine.
        warmup: Steps in which it rises from 0.
        weight_decay: On matrices.
        evaluate_every: Steps between evaluations during training; the end is always evaluated.
        save_every: Steps between checkpoints.
    """

    steps: int
    learning_rate: float
    warmup: int
    weight_decay: float
    evaluate_every: int
    save_every: int

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / self.warmup)
        fall = 0.5 * (1 + math.cos(math.pi * step / self.steps))
        return self.learning_rate * rise * (0.1 + 0.9 * fall)


class Task(Protocol):
    """What a model is trained for. Everything random is a function of the step, so nothing else is saved."""

    def loss(self, model: LanguageModel, step: int) -> tuple[Tensor, int]:
        """Mean loss of one step's batch, differentiable, and the tokens that the model has read for it."""

    def evaluate(self, model: LanguageModel) -> float:
        """What to follow during training: the same for every call on the same weights."""


@dataclass
class History:
    """What training has seen so far.

    Attributes:
        losses: One per step.
        tokens: Read up to and with each step.
        evaluations: [step, tokens, value], after that many steps.
        seconds: Of each step, without evaluations and checkpoints.
    """

    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    evaluations: list[tuple[int, int, float]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def step_seconds(self) -> float:
        """Median over the steps: a pause of the machine does not count."""
        return sorted(self.seconds)[len(self.seconds) // 2] if self.seconds else math.nan


def _optimizer(model: LanguageModel, schedule: Schedule) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, betas=(0.9, 0.98), foreach=True)


def train(
    model: LanguageModel,
    task: Task,
    schedule: Schedule,
    checkpoint: Path,
    *,
    title: str,
    progress: Progress,
    budget: Budget,
) -> History:
    """Train from the beginning or from the checkpoint, whichever is further.

    Args:
        model: With its initial weights; is changed in place, at the end it is the trained one.
        task: What to train it for.
        schedule: How.
        checkpoint: File that keeps weights, optimizer and history; replaced atomically, also when training
            stops for an exception.
        title: Of the progress bar.
        progress: ``progress(title, total, done)``, a context that yields a function of steps and a note.
        budget: Steps that this process may take.

    Returns:
        Losses, evaluations and times.

    Raises:
        StoppedError: the budget is used up.
    """
    optimizer = _optimizer(model, schedule)
    history = History()
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        history = History(**saved["history"])
        history.evaluations = [(step, tokens, value) for step, tokens, value in history.evaluations]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "history": dataclasses.asdict(history),
        }
        write_atomically(checkpoint, lambda file: torch.save(state, file))

    begun = len(history.losses)
    whole = begun  # the step that weights, optimizer and history agree on
    with progress(title, schedule.steps, begun) as tick:
        try:
            for step in range(begun, schedule.steps):
                budget.take()
                begin = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(step)
                loss, tokens = task.loss(model, step)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                whole = -1
                optimizer.step()
                history.losses.append(loss.item())
                history.tokens.append(tokens + (history.tokens[-1] if history.tokens else 0))
                history.seconds.append(time.perf_counter() - begin)
                done = step + 1
                if done == schedule.steps or done % schedule.evaluate_every == 0:
                    value = task.evaluate(model)
                    history.evaluations.append((done, history.tokens[-1], value))
                whole = done
                if done % schedule.save_every == 0 or done == schedule.steps:
                    save()
                tick(1, f"loss {history.losses[-1]:.3f}")
        except (KeyboardInterrupt, StoppedError):
            if whole > begun:
                save()
            raise
    return history
