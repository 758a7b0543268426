# SPDX-License-Identifier: Apache-2.0
"""A run: rollouts, rewards, updates; what is done is kept, and a run that was ended goes on."""

from __future__ import annotations

import copy
import dataclasses
import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from palmette.losses import group_advantages, policy_loss

from ..long_runs import Budget, Progress, StoppedError, claim, write_atomically, write_json
from ..models import cut_layers, load_model
from ..rl import StalenessGate, VadeSampler
from ..shared_prefix import SharedPrefixSchedule
from .rollouts import Rollouts, roll_out
from .settings import Settings
from .task import Task

EVALUATED_TOGETHER = 50  # held-out problems that one tree decoder answers


@dataclass
class History:
    """What a run has seen.

    Attributes:
        rewards: mean of each update's rollouts.
        informative: share of groups with unequal rewards.
        staleness: updates that the rollouts were behind, the most of each update.
        losses: of the policy.
        tokens: computed by each update; and how many a dense batch would have had.
        dense_tokens: likewise.
        rollout_seconds: that an update has waited for its rollouts.
        update_seconds: of the update itself.
        accuracy: [updates, share of held-out problems that are solved], greedy.
    """

    rewards: list[float] = field(default_factory=list)
    informative: list[float] = field(default_factory=list)
    staleness: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    dense_tokens: list[int] = field(default_factory=list)
    rollout_seconds: list[float] = field(default_factory=list)
    update_seconds: list[float] = field(default_factory=list)
    accuracy: list[tuple[int, float]] = field(default_factory=list)


class Policy:
    """The model that learns.

    Args:
        model: of transformers, in float32.
        settings: of the run.
    """

    def __init__(self, model: Any, settings: Settings) -> None:
        self.model, self.settings = model, settings
        self.schedule = SharedPrefixSchedule(model, settings.mode)
        self.optimizer = torch.optim.AdamW(
            model.parameters(), settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.version = 0

    def gradients(self, rollouts: Rollouts) -> float:
        """Those of GRPO, or of decoupled PPO where the rollouts are older; returns the loss."""
        settings = self.settings
        advantages = rollouts.of_tokens(group_advantages(rollouts.rewards))
        stale = rollouts.version != self.version
        options: dict[str, Any] = {"clip": settings.clip, "reduction": "sum"}
        old: Tensor | None = None
        if stale:
            found = self.schedule.logprobs(
                rollouts.tree, rollouts.token_ids, microbatch_tokens=settings.microbatch_tokens
            )
            assert isinstance(found, Tensor)
            old = found
            options["correction"] = "clamp"
        answers = rollouts.of_tokens(torch.ones(rollouts.rewards.shape)) > 0

        def loss(logprobs: Tensor, tokens: Tensor) -> Tensor:
            mine = answers[tokens]
            tokens, logprobs = tokens[mine], logprobs[mine]
            return policy_loss(
                logprobs,
                advantages[tokens],
                old_logprobs=None if old is None else old[tokens],
                behavior_logprobs=None if old is None else rollouts.logprobs[tokens],
                **options,
            )

        self.optimizer.zero_grad(set_to_none=True)
        value = self.schedule.step(
            rollouts.tree,
            rollouts.token_ids,
            loss,
            microbatch_tokens=settings.microbatch_tokens,
            denominator=float(max(1, rollouts.num_answer_tokens)),
        )
        return float(value)

    def step(self) -> None:
        """To the next version, by these gradients."""
        settings = self.settings
        rate = settings.learning_rate * min(1.0, (self.version + 1) / max(1, settings.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.version += 1


class Run:
    """One directory of results, its options, and the phases.

    Args:
        settings: what to do.
        model: directory of a checkpoint; None: SmolLM2.
        directory: where everything is kept.
        progress: title, total and done to something that ticks.
        budget: updates that this process may take.

    Raises:
        ValueError: a setting does not fit the model or the task, or the directory holds a run with other
            options (but for ``updates``: a run may go on for longer), or something else.
    """

    def __init__(
        self, settings: Settings, model: str | None, directory: Path, progress: Progress, budget: Budget
    ) -> None:
        self.settings, self.directory = settings, directory
        self.progress, self.budget = progress, budget
        if settings.prompts > settings.pool:
            raise ValueError(f"prompts must be at most the {settings.pool} there are, got {settings.prompts}")
        found, tokenizer = load_model(model)
        self.policy = Policy(cut_layers(found, settings.layers), settings)
        self.task = Task(tokenizer, settings.pool, settings.held_out)
        options = {
            **{name: value for name, value in dataclasses.asdict(settings).items() if name != "updates"},
            "model": model,
            # sums are rounded in another order with other threads or another torch
            "threads": torch.get_num_threads(),
            "torch": str(torch.__version__),
        }
        claim(directory, options)  # the last thing that may fail: a bad call leaves nothing behind
        self.sampler = VadeSampler(settings.pool) if settings.sampler == "vade" else None
        self._sampling = threading.Lock()  # rollouts choose while an update counts
        self.history = History()
        self._saved = -1  # the version that the checkpoint has
        self._whole = True  # do weights, optimizer and history agree?
        self._load()

    # ---- what is kept

    @property
    def _checkpoint(self) -> Path:
        return self.directory / "checkpoint.pt"

    def _load(self) -> None:
        if not self._checkpoint.exists():
            return
        saved = torch.load(self._checkpoint, weights_only=True)
        self.policy.model.load_state_dict(saved["model"])
        self.policy.optimizer.load_state_dict(saved["optimizer"])
        self.policy.version = saved["version"]
        self.history = History(**saved["history"])
        self.history.accuracy = [(updates, share) for updates, share in self.history.accuracy]
        if self.sampler is not None:
            self.sampler.load_state_dict(saved["sampler"])
        self._saved = self.policy.version

    def _save(self) -> None:
        state = {
            "model": self.policy.model.state_dict(),
            "optimizer": self.policy.optimizer.state_dict(),
            "version": self.policy.version,
            "history": dataclasses.asdict(self.history),
            "sampler": None if self.sampler is None else self.sampler.state_dict(),
        }
        write_atomically(self._checkpoint, lambda file: torch.save(state, file))
        write_json(self.directory / "history.json", dataclasses.asdict(self.history))
        self._saved = self.policy.version

    # ---- phases

    def all_phases(self) -> History:
        """Trains what is left and evaluates.

        Raises:
            StoppedError: the budget is used up; what was done is saved, as it is when somebody interrupts.
        """
        settings = self.settings
        if not self.history.accuracy:
            with self.progress("held-out problems", settings.held_out, 0) as tick:
                self._evaluate(tick)
        begun = self.policy.version
        with self.progress("updates", max(begun, settings.updates), begun) as tick:
            source = _Concurrent(self) if settings.eta > 0 else _Synchronous(self)
            try:
                self._keep()
                while self.policy.version < settings.updates:
                    self.budget.take()
                    self._update(source)
                    self._keep()
                    note = (
                        f"reward {self.history.rewards[-1]:.2f}, held out {self.history.accuracy[-1][1]:.2f}"
                    )
                    tick(1, note)
            except (KeyboardInterrupt, StoppedError):
                if self._whole and self.policy.version > self._saved:
                    self._save()
                raise
            finally:
                source.close()
        return self.history

    def _keep(self) -> None:
        """Evaluates and saves where it is time to."""
        settings, version = self.settings, self.policy.version
        last = version >= settings.updates
        if (last or version % settings.evaluate_every == 0) and self.history.accuracy[-1][0] < version:
            self._evaluate()
        if (last or version % settings.save_every == 0) and self._saved < version:
            self._save()

    def _update(self, source: _Synchronous | _Concurrent) -> None:
        history = self.history
        begin = time.perf_counter()
        prompts, rollouts = source.next()
        drawn = time.perf_counter()
        behind = self.policy.version - rollouts.version
        loss = self.policy.gradients(rollouts)
        self._whole = False
        self.policy.step()
        done = time.perf_counter()
        rewards = rollouts.rewards
        if self.sampler is not None:
            with self._sampling:
                self.sampler.update(prompts, rewards.sum(1), rewards.shape[1])
        history.staleness.append(behind)
        history.losses.append(loss)
        history.rewards.append(float(rewards.mean()))
        history.informative.append(float((rewards.amax(1) > rewards.amin(1)).double().mean()))
        history.tokens.append(len(rollouts.token_ids))
        history.dense_tokens.append(int(rollouts.tree.path_lengths[rollouts.tree.leaves.long()].sum()))
        history.rollout_seconds.append(drawn - begin)
        history.update_seconds.append(done - drawn)
        self._whole = True
        source.updated()

    def choose(self, number: int) -> Tensor:
        """Problems of batch ``number``, the same whenever it is asked."""
        settings = self.settings
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + 2 * number)
        if self.sampler is None:
            return torch.randperm(settings.pool, generator=generator)[: settings.prompts]
        with self._sampling:
            self.sampler.generator = generator
            return self.sampler.draw(settings.prompts)

    def roll_out(self, model: Any, prompts: Tensor, number: int) -> Rollouts:
        settings = self.settings
        return roll_out(
            model,
            self.task,
            [self.task.train[i] for i in prompts.tolist()],
            settings.group,
            max_tokens=settings.max_tokens,
            generator=torch.Generator().manual_seed(settings.seed * 1_000_003 + 2 * number + 1),
        )

    def _evaluate(self, tick: Callable[[int, str], None] | None = None) -> None:
        held_out = self.task.held_out
        rewards: list[Tensor] = []
        for begin in range(0, len(held_out), EVALUATED_TOGETHER):
            part = held_out[begin : begin + EVALUATED_TOGETHER]
            found = roll_out(
                self.policy.model, self.task, part, 1, max_tokens=self.settings.max_tokens, temperature=0.0
            )
            rewards.append(found.rewards.flatten())
            if tick is not None:
                tick(len(part), f"{float(torch.cat(rewards).mean()):.0%} solved")
        self.history.accuracy.append((self.policy.version, float(torch.cat(rewards).mean())))


class _Synchronous:
    """Rollouts by the policy itself, when they are wanted."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def next(self) -> tuple[Tensor, Rollouts]:
        run = self.run
        number = run.policy.version
        prompts = run.choose(number)
        rollouts = run.roll_out(run.policy.model, prompts, number)
        rollouts.version = run.policy.version
        return prompts, rollouts

    def updated(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Concurrent:
    """Rollouts by a copy of the policy in a thread of its own, up to ``eta`` updates behind.

    The thread takes over new weights between batches. Which version draws a batch depends on how fast both
    are, so runs differ in their last bits from each other.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.gate = StalenessGate(1, run.settings.eta)
        self.gate.version = self.gate.accepted = run.policy.version
        self.model = copy.deepcopy(run.policy.model)
        self.version = run.policy.version
        self._weights = threading.Lock()
        self._fresh: tuple[int, list[Tensor]] | None = None
        self._done: queue.SimpleQueue[tuple[Tensor, Rollouts] | BaseException] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._number = run.policy.version
        self._thread = threading.Thread(target=self._work, name="rollouts", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        torch.set_num_threads(max(1, torch.get_num_threads() // 2))
        try:
            while not self._stop.is_set():
                if not self.gate.start(timeout=0.2):
                    continue
                with self._weights:
                    fresh, self._fresh = self._fresh, None
                if fresh is not None:
                    self.version = fresh[0]
                    with torch.no_grad():
                        for p, value in zip(self.model.parameters(), fresh[1], strict=True):
                            p.copy_(value)
                prompts = self.run.choose(self._number)
                rollouts = self.run.roll_out(self.model, prompts, self._number)
                rollouts.version = self.version
                self._number += 1
                self.gate.finish()
                self._done.put((prompts, rollouts))
        except BaseException as error:  # the other thread raises it
            self._done.put(error)

    def next(self) -> tuple[Tensor, Rollouts]:
        found = self._done.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def updated(self) -> None:
        weights = [p.detach().clone() for p in self.run.policy.model.parameters()]
        with self._weights:
            self._fresh = (self.run.policy.version, weights)
        self.gate.update()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()


def load_history(directory: Path) -> History:
    """Of a run's directory, as far as it is.

    Raises:
        FileNotFoundError: there is none.
    """
    content = json.loads((directory / "history.json").read_text())
    history = History(**content)
    history.accuracy = [(int(updates), float(share)) for updates, share in history.accuracy]
    return history
