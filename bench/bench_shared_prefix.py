# SPDX-License-Identifier: Apache-2.0
"""One update on a prompt with N rollouts: SmolLM2-135M cut to 6 layers, forward + backward, float32.

Peers: the dense batch; the dense batch a sequence at a time; prefix-grouper; and stock transformers on one
packed sequence with a 4-D tree mask. All of them compute logits only of the positions whose next token has a
loss, and their losses and gradients must agree. Freed memory stays with the process (keep_freed_memory): it
helps the peers, whose tensors are larger, more than it helps Palmette.

A mask over all rollouts grows with the square of their number. From 64 on the packed peer also runs in pieces
of 4 or 16 rollouts, each with the prompt, which is faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.jobs import Job, Row, Settings, SkipJobError, run_job, run_with
from bench.machine import available_memory
from bench.measure import Race
from bench.memory import return_freed_memory
from bench.peers import Contender

LAYERS = 6
BUDGET = 4096  # tokens of a microbatch
LENGTHS = ((640, 128), (384, 384), (128, 640), (2048, 256))
ROLLOUTS = {"quick": (4,), "default": (4, 16, 64), "full": (4, 16, 64)}
ROUNDS = {"quick": 2, "default": 3, "full": 7}
TOLERANCE = 2e-4  # of gradients, relative to a packed peer's; measured: 4e-7 to 6e-5
ONLY_PACKED = 64  # rollouts: dense batches would take minutes
PIECES = (4, 16)  # rollouts of a packed sequence then
# products of attention: q k and p v forward; q k again, dO v and three that sum up backward
ATTENTION_PRODUCTS = 7


@dataclass(frozen=True)
class Case:
    prefix: int
    suffix: int
    rollouts: int

    @property
    def name(self) -> str:
        return f"{self.prefix}/{self.suffix}, {self.rollouts} rollouts"

    @property
    def tokens(self) -> int:
        return self.prefix + self.suffix * self.rollouts

    @property
    def pairs(self) -> int:
        """Of tokens that see each other, each token computed once."""
        p, s, n = self.prefix, self.suffix, self.rollouts
        return p * (p + 1) // 2 + n * (s * p + s * (s + 1) // 2)


def flops_of(case: Case, model: Any) -> int:
    """Every product once forward and twice backward; logits of the suffixes' tokens only."""
    config = model.config
    linear = sum(p.numel() for n, p in model.model.layers.named_parameters() if p.dim() == 2)
    head = config.vocab_size * config.hidden_size * case.rollouts * case.suffix
    heads = config.num_attention_heads * model.model.layers[0].self_attn.head_dim
    attention = case.pairs * heads * config.num_hidden_layers * ATTENTION_PRODUCTS
    return 2 * (3 * linear * case.tokens + 3 * head + attention)


def jobs(settings: Settings) -> list[Job]:
    cases = [Case(p, s, n) for n in ROLLOUTS[settings.suite] for p, s in LENGTHS]
    return [
        Job("prefix", case.name, lambda case=case: _prepare(case, settings), inference=False)
        for case in cases
        if settings.wants("prefix", case.name)
    ]


class Update:
    """A prompt, its rollouts, weights of their tokens, and the model.

    Args:
        case: lengths.
        model: in training mode.
    """

    def __init__(self, case: Case, model: Any) -> None:
        self.case, self.model = case, model
        generator = torch.Generator().manual_seed(0)
        vocab = model.config.vocab_size
        self.prompt = torch.randint(0, vocab, (case.prefix,), generator=generator)
        self.suffixes = torch.randint(0, vocab, (case.rollouts, case.suffix), generator=generator)
        self.weights = torch.randn(case.rollouts, case.suffix, generator=generator)

    def loss(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        """Of logits [rows, vocab]."""
        logprobs = -torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")
        return (weights * logprobs).sum() / self.weights.numel()

    def backward(self, logits: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        loss = self.loss(logits, targets, weights)
        loss.backward()
        return loss.detach()

    def _one_sequence(self, rollouts: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Some as one: ids [1, tokens], positions [1, tokens], and which rows predict the rollouts."""
        case, suffixes = self.case, self.suffixes[rollouts]
        ids = torch.cat([self.prompt, suffixes.flatten()])
        own = torch.arange(case.prefix, case.prefix + case.suffix).repeat(len(suffixes))
        positions = torch.cat([torch.arange(case.prefix), own])
        before = torch.arange(case.prefix - 1, len(ids) - 1)
        before[:: case.suffix] = case.prefix - 1
        return ids[None], positions[None], before

    # ---- contenders: each returns the loss and leaves gradients

    def palmette(self, mode: str = "retain", budget: int = BUDGET) -> Callable[[], Tensor]:
        from palmette import Tree
        from palmette.pipelines import SharedPrefixSchedule

        case = self.case
        tree = Tree(
            torch.tensor([-1] + [0] * case.rollouts),
            torch.tensor([case.prefix] + [case.suffix] * case.rollouts),
        )
        ids = torch.cat([self.prompt, self.suffixes.flatten()])
        weights = torch.cat([torch.zeros(case.prefix), self.weights.flatten()])
        schedule = SharedPrefixSchedule(self.model, mode)

        def loss(logprobs: Tensor, tokens: Tensor) -> Tensor:
            return (weights[tokens] * logprobs).sum()

        def run() -> Tensor:
            return schedule.step(
                tree, ids, loss, microbatch_tokens=budget, denominator=float(self.weights.numel())
            )

        return run

    def dense(self, batch: int) -> Callable[[], Tensor]:
        """``batch`` sequences at a time."""
        sequences = torch.cat([self.prompt.expand(self.case.rollouts, -1), self.suffixes], 1)
        length = self.case.suffix

        def run() -> Tensor:
            total = torch.zeros(())
            for first in range(0, self.case.rollouts, batch):
                part = slice(first, first + batch)
                out = self.model(input_ids=sequences[part], use_cache=False, logits_to_keep=length + 1)
                logits = out.logits[:, :-1].flatten(0, 1)
                total += self.backward(logits, self.suffixes[part].flatten(), self.weights[part].flatten())
            return total

        return run

    def packed(self, piece: int) -> Callable[[], Tensor]:
        """One sequence: the prompt, then ``piece`` rollouts, which a 4-D mask keeps apart."""
        case = self.case
        count = min(piece, case.rollouts)
        rollout = torch.arange(count).repeat_interleave(case.suffix)
        sequence = torch.cat([torch.full((case.prefix,), -1), rollout])
        index = torch.arange(len(sequence))
        sees = (index[:, None] >= index) & ((sequence[:, None] == sequence) | (sequence == -1))
        # a float mask is what SDPA's fast path takes
        mask = torch.zeros(len(index), len(index)).masked_fill_(~sees, -torch.inf)[None, None]
        parts = [slice(first, first + count) for first in range(0, case.rollouts, count)]

        def run() -> Tensor:
            total = torch.zeros(())
            for part in parts:
                ids, positions, before = self._one_sequence(part)
                out = self.model(
                    input_ids=ids,
                    position_ids=positions,
                    attention_mask=mask,
                    use_cache=False,
                    logits_to_keep=before,
                )
                logits, targets = out.logits[0], self.suffixes[part].flatten()
                total += self.backward(logits, targets, self.weights[part].flatten())
            return total

        return run

    def prefix_grouper(self) -> Callable[[], Tensor]:
        """Its attention, as registered with transformers, over SDPA.

        Its masks are those of FlashAttention, of padding alone: the causal ones, which SDPA needs, are made
        here.
        """
        from prefix_grouper import PrefixGrouper
        from prefix_grouper.utils.register_transformers import register_attention
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        shape = (self.case.suffix, self.case.prefix + self.case.suffix)
        behind = torch.full(shape, -torch.inf).triu(self.case.prefix + 1)[None, None]

        def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, **options: Any) -> Any:
            mask = None if q.shape[2] == k.shape[2] else behind
            return sdpa_attention_forward(module, q, k, v, mask, is_causal=mask is None, **options)

        register_attention()
        ALL_ATTENTION_FUNCTIONS.register("prefix_grouper_sdpa", attend)
        ALL_MASK_ATTENTION_FUNCTIONS.register("prefix_grouper_attention", lambda **_: None)
        case = self.case
        ids, positions, before = self._one_sequence()
        grouper = PrefixGrouper([[case.prefix] + [case.suffix] * case.rollouts])

        def run() -> Tensor:
            self.model.set_attn_implementation("prefix_grouper_attention")
            try:
                out = self.model(
                    input_ids=ids,
                    position_ids=positions,
                    use_cache=False,
                    logits_to_keep=before,
                    prefix_grouper=grouper,
                    prefix_grouper_attn_func="prefix_grouper_sdpa",
                )
            finally:
                self.model.set_attn_implementation("sdpa")
            return self.backward(out.logits[0], self.suffixes.flatten(), self.weights.flatten())

        return run

    def fits(self, tokens: int, scored: int, mask: int = 0) -> bool:
        """Is there memory for the activations of so many tokens, and logits of those that are scored?"""
        activations = tokens * LAYERS * 60_000
        logits = 3 * 4 * scored * self.model.config.vocab_size
        return (activations + logits + mask) * 1.3 < available_memory()

    def all(self) -> dict[str, Callable[[], Tensor]]:
        case = self.case
        found = {"palmette": self.palmette()}
        if case.rollouts >= ONLY_PACKED:
            for piece in PIECES:
                found[f"packed, 4-D tree masks of {piece} rollouts"] = self.packed(piece)
            # the mask, and two of booleans it is made from
            if self.fits(case.tokens, self.weights.numel(), 6 * case.tokens**2):
                found["packed, 4-D tree mask"] = self.packed(case.rollouts)
            return found
        found["packed, 4-D tree mask"] = self.packed(case.rollouts)
        found["dense, one sequence at a time"] = self.dense(1)
        if self.fits(case.rollouts * (case.prefix + case.suffix), self.weights.numel()):
            found["dense batch"] = self.dense(case.rollouts)
        with contextlib.suppress(ImportError):
            found["prefix-grouper"] = self.prefix_grouper()
        return found


def load_cut_model() -> tuple[Any, str]:
    """The first and last layers of SmolLM2; without the package, random weights."""
    from palmette.pipelines.models import cut_layers, load_model

    try:
        model, _ = load_model()
        weights = "SmolLM2-135M-Instruct"
    except (ImportError, OSError):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=LAYERS,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        model, weights = LlamaForCausalLM(config), "random"
    model = cut_layers(model, LAYERS)
    model.set_attn_implementation("sdpa")
    return model.train().float(), weights


def _prepare(case: Case, settings: Settings) -> tuple[Race, Row]:
    try:
        from palmette.pipelines.long_runs import keep_freed_memory

        model, weights = load_cut_model()
    except ImportError:
        raise SkipJobError("transformers is not installed") from None
    keep_freed_memory()
    return_freed_memory()  # of the case before, for fits()
    update = Update(case, model)
    runs = update.all()
    errors = _check(model, runs)

    def timed(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        def call() -> Tensor:
            for p in model.parameters():
                p.grad = None
            return run()

        return call

    ours, *others = (Contender(name, timed(run), lambda result: result) for name, run in runs.items())
    race = Race(ours, others, budget_s=0.0, min_rounds=ROUNDS[settings.suite], before=settings.before())
    row = {
        "group": "prefix",
        "flops": flops_of(case, model),
        "bytes": 4 * sum(p.numel() for p in model.parameters()),
        "weights": weights,
        "max_error": errors,
        "tokens": case.tokens,
    }
    return race, row


def _check(model: Any, runs: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Gradients of all, against those of a packed peer."""
    want: dict[str, Tensor] = {}
    errors = {}
    names = sorted(runs, key=lambda name: not name.startswith("packed"))
    for name in names:
        for p in model.parameters():
            p.grad = None
        runs[name]()
        got = {n: p.grad.clone() for n, p in model.named_parameters()}
        if not want:
            want = got
        norm = sum(float(g.double().square().sum()) for g in want.values()) ** 0.5
        gap = sum(float((got[n] - g).double().square().sum()) for n, g in want.items()) ** 0.5
        errors[name] = gap / norm
        if not errors[name] < TOLERANCE:
            raise AssertionError(f"gradients of {name} are off by {errors[name]:.3g} of their norm")
    return errors


def test_prefix(benchmark: Any, job: Job, report: Any) -> None:
    benchmark.group = "prefix"
    benchmark.extra_info.update(report(run_job(job, run_with(benchmark))))
