# SPDX-License-Identifier: Apache-2.0
"""Parts of reinforcement learning on verifiable rewards: which prompts, and how old a rollout may be."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor

from palmette._checks import (
    FLOATING,
    INDEX,
    check_at_least,
    check_dim,
    check_dtype,
    check_number,
    check_shape,
)


class VadeSampler:
    """Chooses prompts that are neither too easy nor too hard, by Thompson sampling.

    Each prompt's rate of success has a Beta(alpha, beta) belief. A draw p from every belief, and the prompts
    with the largest p (1 - p), which is the variance of a rollout's reward, are the batch. Successes and
    failures of a group are counted, and all counts decay toward the prior, because the policy changes.

    Args:
        count: prompts.
        prior: (alpha, beta) of all at first.
        decay: of what was counted, per update; 1: nothing is forgotten.
        generator: of the draws.

    Attributes:
        alpha, beta: float64 [count].

    Raises:
        ValueError: an argument is out of range.

    Source: VADE: variance-aware dynamic sampling for group-based policy optimization.
    """

    def __init__(
        self,
        count: int,
        *,
        prior: tuple[float, float] = (1.0, 1.0),
        decay: float = 0.95,
        generator: torch.Generator | None = None,
    ) -> None:
        check_at_least(1, count=count)
        if not isinstance(prior, (tuple, list)) or len(prior) != 2:
            raise ValueError(f"prior must be (alpha, beta), got {prior!r}")
        for name, value in zip(("prior's alpha", "prior's beta"), prior, strict=True):
            check_number(name, value, 0.01, 1e6)  # draws of smaller ones round to 0
        check_number("decay", decay, 0, 1)
        self.prior, self.decay, self.generator = prior, float(decay), generator
        self.alpha = torch.full((count,), float(prior[0]), dtype=torch.float64)
        self.beta = torch.full((count,), float(prior[1]), dtype=torch.float64)

    def draw(self, batch: int) -> Tensor:
        """``batch`` different prompts, int64, those of the largest drawn variance first.

        Raises:
            ValueError: there are fewer prompts.
        """
        check_at_least(1, batch=batch)
        if batch > len(self.alpha):
            raise ValueError(f"batch must be at most the {len(self.alpha)} prompts, got {batch}")
        gammas = [torch._standard_gamma(x, generator=self.generator) for x in (self.alpha, self.beta)]
        p = gammas[0] / (gammas[0] + gammas[1])
        return (p * (1 - p)).sort(descending=True, stable=True).indices[:batch]

    def update(self, prompts: Tensor, successes: Tensor, group: int) -> None:
        """Counts what groups of ``group`` rollouts have come to.

        Args:
            prompts: int64 [B].
            successes: [B], each in [0, group].

        Raises:
            ValueError: shapes do not fit, or a number is out of range.
        """
        check_dtype("prompts", prompts, [torch.int64])
        check_dim("prompts", prompts, "[B]")
        check_dtype("successes", successes, (*FLOATING, *INDEX))
        check_shape("successes", successes, "[B]", prompts.shape)
        check_at_least(1, group=group)
        if len(prompts) and not 0 <= int(prompts.min()) <= int(prompts.max()) < len(self.alpha):
            raise ValueError(f"prompts must be in [0, {len(self.alpha)}), got {prompts.tolist()}")
        if len(successes) and not 0 <= float(successes.min()) <= float(successes.max()) <= group:
            raise ValueError(f"successes must be in [0, {group}], got {successes.tolist()}")
        for counts, prior in zip((self.alpha, self.beta), self.prior, strict=True):
            counts.mul_(self.decay).add_((1 - self.decay) * prior)
        self.alpha.index_add_(0, prompts, successes.double())
        self.beta.index_add_(0, prompts, group - successes.double())

    def state_dict(self) -> dict[str, Tensor]:
        return {"alpha": self.alpha.clone(), "beta": self.beta.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in ("alpha", "beta"):
            check_dtype(name, state.get(name), [torch.float64])  # type: ignore[arg-type]
            check_shape(name, state[name], "[count]", self.alpha.shape)
            if not bool((state[name] > 0).all()):
                raise ValueError(f"{name} must be positive, got {float(state[name].min())}")
        self.alpha, self.beta = state["alpha"].clone(), state["beta"].clone()


class StalenessGate:
    """How many rollouts may start, so that none is used more than ``eta`` updates after its policy.

    With version v of the policy (updates so far), batches of B,

        capacity = min(max_concurrent - running, (eta + v + 1) B - (accepted + running))

    eta 0 is synchronous: a batch is rolled out by the policy that it updates. Threads may share a gate.

    Args:
        batch: rollouts (or groups of them) per update.
        eta: updates that a rollout may be behind.
        max_concurrent: rollouts at a time. Default: no limit of its own.

    Raises:
        ValueError: an argument is out of range.

    Source: AReaL (arXiv 2505.24298), section 5.1.
    """

    def __init__(self, batch: int, eta: int, max_concurrent: int | None = None) -> None:
        check_at_least(1, batch=batch)
        check_at_least(0, eta=eta)
        if max_concurrent is not None:
            check_at_least(1, max_concurrent=max_concurrent)
        self.batch, self.eta = batch, eta
        self.max_concurrent = max_concurrent
        self.version = self.running = self.accepted = 0
        self._changed = threading.Condition()

    @property
    def capacity(self) -> int:
        """Rollouts that may start now; never negative."""
        by_age = (self.eta + self.version + 1) * self.batch - (self.accepted + self.running)
        if self.max_concurrent is not None:
            by_age = min(by_age, self.max_concurrent - self.running)
        return max(0, by_age)

    def start(self, count: int = 1, timeout: float | None = None) -> bool:
        """Waits until ``count`` may start, and starts them; False after ``timeout`` seconds.

        Raises:
            ValueError: so many may never start together.
        """
        check_at_least(1, count=count)
        most = min(self.max_concurrent or count, (self.eta + 1) * self.batch)
        if count > most:
            raise ValueError(f"count must be at most {most}, else it would never start, got {count}")
        with self._changed:
            if not self._changed.wait_for(lambda: self.capacity >= count, timeout):
                return False
            self.running += count
            return True

    def finish(self, count: int = 1, *, accepted: bool = True) -> None:
        """Of those that run, some are done; rejected ones leave their place to others.

        Raises:
            ValueError: fewer are running.
        """
        check_at_least(1, count=count)
        with self._changed:
            if count > self.running:
                raise ValueError(f"count must be at most the {self.running} that run, got {count}")
            self.running -= count
            self.accepted += count if accepted else 0
            self._changed.notify_all()

    def update(self) -> None:
        """The policy has a new version."""
        with self._changed:
            self.version += 1
            self._changed.notify_all()
