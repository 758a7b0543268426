# SPDX-License-Identifier: Apache-2.0
"""TRL: ``SharedPrefixGRPOTrainer`` is ``trl.GRPOTrainer`` whose policy computes each prompt once per batch.

    from palmette.integrations.trl import SharedPrefixGRPOTrainer

    trainer = SharedPrefixGRPOTrainer(model=model, reward_funcs=reward, args=config, train_dataset=prompts)
    trainer.train()

Everything else is TRL's: generation, rewards, all of its losses, the optimizer. One method is replaced, the
one that computes log-probabilities of completions; its backward pass is a step of ``SharedPrefixSchedule``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from palmette.tree import Tree

from ..pipelines.shared_prefix import SharedPrefixSchedule
from ._extras import require

require("trl", "palmette.integrations.trl", install="'palmette[trl]'")

from trl.trainer.grpo_trainer import GRPOTrainer  # noqa: E402


class SharedPrefixGRPOTrainer(GRPOTrainer):  # type: ignore[misc]
    """``trl.GRPOTrainer`` on trees of shared prompts; for text, in one process.

    Args:
        mode: of the schedule: ``"retain"``, ``"offload"`` or ``"recompute"``.
        microbatch_tokens: that run forward and backward together at most. Default: 4096.
        others: as for ``trl.GRPOTrainer``.

    Raises:
        ValueError: the options want an entropy bonus or a load-balancing loss, whose gradients this does not
            compute, or there are several processes: nothing would sum their gradients.

    The model must be one that ``SharedPrefixSchedule`` can run. Log-probabilities are computed once more than
    TRL does, without a graph, because a loss of TRL's is known only when all of them are.
    """

    def __init__(
        self, *args: Any, mode: str = "retain", microbatch_tokens: int = 4096, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self.shared_prefix_mode, self.shared_prefix_tokens = mode, microbatch_tokens
        self._shared_prefix_schedule: SharedPrefixSchedule | None = None
        if self.accelerator.num_processes > 1:
            raise ValueError(
                f"processes must be one with shared prefixes, got {self.accelerator.num_processes}"
            )
        if getattr(self, "_entropy_bonus_enabled", False):
            raise ValueError("entropy_coef must be 0 with shared prefixes, got an entropy bonus")
        if getattr(self, "aux_loss_enabled", False):
            raise ValueError("router_aux_loss_coef must be 0 with shared prefixes, got a load-balancing loss")

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **multimodal: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        given = [name for name, value in multimodal.items() if value is not None]
        if given:
            raise ValueError(f"inputs must be text with shared prefixes, got {', '.join(given)}")
        policy = self.accelerator.unwrap_model(model)
        schedule = self._shared_prefix_schedule
        if schedule is None or schedule.model is not policy:  # TRL's reference model comes here too
            schedule = self._shared_prefix_schedule = SharedPrefixSchedule(
                policy, self.shared_prefix_mode, temperature=float(self.temperature), aux_loss=0.0
            )
        tree, token_ids, places = share_prompts(input_ids, attention_mask, logits_to_keep)
        run = schedule.differentiable_logprobs if torch.is_grad_enabled() else schedule.logprobs
        with self.accelerator.autocast():  # the schedule calls the decoder, not the wrapped forward
            found = run(
                tree, token_ids, microbatch_tokens=self.shared_prefix_tokens, return_entropy=compute_entropy
            )

        def of_rows(values: Tensor) -> Tensor:
            return torch.where(places >= 0, values[places.clamp(min=0)], values.new_zeros(()))

        if isinstance(found, Tensor):
            return of_rows(found), None, None
        return of_rows(found[0]), of_rows(found[1]), None


def share_prompts(
    input_ids: Tensor, attention_mask: Tensor, logits_to_keep: int
) -> tuple[Tree, Tensor, Tensor]:
    """A batch of prompts, padded on the left, and completions, padded on the right, as a forest.

    Args:
        input_ids, attention_mask: [B, prompt + completion].
        logits_to_keep: columns of the completion.

    Returns:
        A tree with a root per different prompt and a node per completion; token_ids [N] in depth-first order;
        and the depth-first number of each completion token [B, logits_to_keep], -1 where there is none.
    """
    split = input_ids.shape[1] - logits_to_keep
    rows, mask = input_ids.tolist(), attention_mask.bool()
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, tokens in enumerate(rows):
        prompt = tuple(t for t, seen in zip(tokens[:split], mask[row, :split].tolist(), strict=True) if seen)
        groups.setdefault(prompt, []).append(row)
    parents: list[int] = []
    counts: list[int] = []
    ids: list[int] = []
    places = torch.full((len(rows), logits_to_keep), -1, dtype=torch.long)
    for prompt, members in groups.items():
        root = len(parents)
        parents.append(-1)
        counts.append(len(prompt))
        ids += prompt
        for row in members:
            columns = mask[row, split:].nonzero()[:, 0].cpu()
            parents.append(root)
            counts.append(len(columns))
            places[row, columns] = torch.arange(len(ids), len(ids) + len(columns))
            ids += [rows[row][split + column] for column in columns.tolist()]
    tree = Tree(torch.tensor(parents), torch.tensor(counts))
    device = input_ids.device
    return tree, torch.tensor(ids, device=device), places.to(device)
