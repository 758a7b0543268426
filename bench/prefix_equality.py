# SPDX-License-Identifier: Apache-2.0
"""``python -m bench.prefix_equality [--out FILE.md]``: an update of train-rl, dense and by the schedule.

SmolLM2-135M draws 64 answers to 8 sums (train-rl's batch); the same answers then train it as a batch of 64
padded sequences and as a tree. "error" is the norm of the difference to the dense float64 gradient over that
gradient's norm, of all parameters together; "weights" is the largest difference to the dense batch's weights
after one step of AdamW, in learning rates. The dense batch computes logits of the answers' tokens only.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from palmette import group_advantages, policy_loss, testing
from palmette.pipelines import SharedPrefixSchedule
from palmette.pipelines.long_runs import keep_freed_memory
from palmette.pipelines.models import load_model
from palmette.pipelines.train_rl.rollouts import Rollouts, roll_out
from palmette.pipelines.train_rl.settings import DEFAULT
from palmette.pipelines.train_rl.task import Task
from torch import Tensor

from bench.machine import describe, headline
from bench.pages import publish, table

REPEATS = 3
LEARNING_RATE = 1e-5


class Batch:
    """Answers of the model, with their advantages.

    Args:
        rollouts: as drawn.
    """

    def __init__(self, rollouts: Rollouts) -> None:
        self.rollouts = rollouts
        self.advantages = group_advantages(rollouts.rewards)

    def dense(self, model: Any) -> Tensor:
        """A step on padded sequences; returns the loss."""
        rollouts = self.rollouts
        tree, ids = rollouts.tree, rollouts.token_ids
        paths = [ids[tree.path_slots(leaf).long()] for leaf in tree.leaves.tolist()]
        batch = torch.nn.utils.rnn.pad_sequence(paths, batch_first=True)
        lengths = torch.tensor([len(path) for path in paths])
        answers = rollouts.answers[..., 1].flatten()
        column = torch.arange(batch.shape[1])
        scored = (column >= (lengths - answers)[:, None]) & (column < lengths[:, None])
        hidden = model.model(
            input_ids=batch, attention_mask=(column < lengths[:, None]).long(), use_cache=False
        ).last_hidden_state
        logits = model.lm_head(hidden[:, :-1][scored[:, 1:]])
        logprobs = -torch.nn.functional.cross_entropy(logits, batch[scored], reduction="none")
        advantages = self.advantages.flatten().repeat_interleave(answers)
        loss = policy_loss(logprobs, advantages, reduction="sum") / rollouts.num_answer_tokens
        loss.backward()
        return loss.detach()

    def shared(self, model: Any, mode: str, budget: int) -> Tensor:
        """The same by the schedule."""
        rollouts = self.rollouts
        advantages = rollouts.of_tokens(self.advantages)
        answers = rollouts.of_tokens(torch.ones(rollouts.rewards.shape)) > 0

        def loss_fn(logprobs: Tensor, tokens: Tensor) -> Tensor:
            mine = answers[tokens]
            return policy_loss(logprobs[mine], advantages[tokens[mine]], reduction="sum")

        return SharedPrefixSchedule(model, mode).step(
            rollouts.tree,
            rollouts.token_ids,
            loss_fn,
            microbatch_tokens=budget,
            denominator=float(rollouts.num_answer_tokens),
        )


def gradients(model: Any, step: Callable[[Any], Tensor]) -> tuple[float, list[Tensor]]:
    """The loss, and gradients in float64."""
    model.zero_grad(set_to_none=True)
    loss = float(step(model))
    return loss, [p.grad.double() for p in model.parameters()]


def stepped(model: Any, step: Callable[[Any], Tensor]) -> list[Tensor]:
    """Weights after one step of AdamW."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.0)
    step(model)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return [p.detach() for p in model.parameters()]


def seconds(model: Any, step: Callable[[Any], Tensor]) -> float:
    times = []
    for _ in range(REPEATS):
        model.zero_grad(set_to_none=True)
        begin = time.perf_counter()
        step(model)
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    keep_freed_memory()
    model, tokenizer = load_model(None)
    model = model.float()
    task = Task(tokenizer, DEFAULT.pool, DEFAULT.held_out)
    batch = Batch(
        roll_out(
            model.eval(),
            task,
            task.train[: DEFAULT.prompts],
            DEFAULT.group,
            max_tokens=DEFAULT.max_tokens,
            generator=torch.Generator().manual_seed(0),
        )
    )
    model.set_attn_implementation("sdpa")
    model.train()
    exact = copy.deepcopy(model).double()
    _, want = gradients(exact, batch.dense)
    norm = sum(float(g.square().sum()) for g in want) ** 0.5
    dense_weights = stepped(model, batch.dense)
    tree = batch.rollouts.tree
    dense_tokens = int(tree.path_lengths[tree.leaves.long()].sum())
    contenders: list[tuple[str, Any, Callable[[Any], Tensor], int]] = [
        ("dense batch, float32", model, batch.dense, dense_tokens)
    ]
    for mode, budget in (("retain", 1024), ("offload", 1024), ("recompute", 1024), ("retain", 64)):

        def step(model: Any, mode: str = mode, budget: int = budget) -> Tensor:
            return batch.shared(model, mode, budget)

        tokens = tree.num_tokens
        contenders.append((f"shared, {mode}, microbatches of {budget}", model, step, tokens))
        if (mode, budget) == ("retain", 64):

            def in_float64(model: Any, step: Callable[[Any], Tensor] = step) -> Tensor:
                with testing.backend("scalar"):  # which has float64
                    return step(model)

            contenders.append(
                (f"shared, {mode}, microbatches of {budget}, float64", exact, in_float64, tokens)
            )
    rows = []
    for name, which, step, tokens in contenders:
        loss, got = gradients(which, step)
        gap = sum(float((g - w).square().sum()) for g, w in zip(got, want, strict=True)) ** 0.5
        cells = [name, str(tokens), f"{loss:.7f}", f"{gap / norm:.1e}"]
        if which is model:
            moved = [
                float((a - b).abs().max()) for a, b in zip(stepped(model, step), dense_weights, strict=True)
            ]
            cells += [f"{max(moved) / LEARNING_RATE:.1e}", f"{seconds(model, step):.2f}"]
        else:
            cells += ["", ""]
        rows.append(cells)
        print(cells, file=sys.stderr)
    header = ["", "tokens", "loss", "error", "weights", "s"]
    text = f"{headline(describe())}\n\n{table([header, *rows])}\n"
    publish(text, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
