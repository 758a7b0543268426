# SPDX-License-Identifier: Apache-2.0
"""How large everything is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run, but for the model.

    Attributes:
        layers: of the model, the first and the last ones; None: all.
        prompts: problems of an update.
        group: rollouts of a problem.
        updates: of the policy.
        pool: problems that there are for training, the same for all seeds.
        held_out: problems for evaluation, others.
        evaluate_every, save_every: updates.
        max_tokens: of an answer.
        learning_rate: of AdamW, after a warm-up of ``warmup`` updates.
        clip: of the loss.
        microbatch_tokens: of the schedule.
        mode: of the schedule.
        eta: updates that a rollout may be behind its policy; 0: synchronous.
        sampler: ``"uniform"`` or ``"vade"``.
        seed: of what is drawn.
    """

    layers: int | None = None
    prompts: int = 8
    group: int = 8
    updates: int = 120
    pool: int = 4096
    held_out: int = 200
    evaluate_every: int = 10
    save_every: int = 10
    max_tokens: int = 5
    learning_rate: float = 5e-6
    warmup: int = 5
    clip: float = 0.2
    microbatch_tokens: int = 1024
    mode: str = "retain"
    eta: int = 0
    sampler: str = "uniform"
    seed: int = 0


DEFAULT = Settings()
QUICK = Settings(
    layers=4, prompts=2, group=4, updates=4, pool=64, held_out=8, evaluate_every=2, save_every=2, warmup=1
)
