# SPDX-License-Identifier: Apache-2.0
"""Training on trees of tokens, of which each is computed once: a prompt with its rollouts, and deeper.

The loss is a sum over tokens, so the gradient of a prefix is the sum of what the tokens after it send back.
The schedule walks the tree depth first. A node with something below it is

    A  pushed:   forward once; its keys and values go to a stack, detached
    B  visited:  what lies below runs forward and backward in microbatches; gradients to the stack's keys and
                 values, and to the hidden state that predicts a child's first token, add up
    C  popped:   one backward from its keys, values and hidden states, with the sums of their gradients

and its own backward adds to the sums of its ancestors. A subtree that fits a microbatch is one forward under
a tree's plan.

Source: "Schedule-Level Shared-Prefix Reuse for LLM RL Training" (arXiv 2606.01143), where the tree is a star.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from palmette._checks import INDEX, check_at_least, check_dtype, check_number, check_shape, is_expanded
from palmette.losses import CHUNK_BYTES, LogitsBuffer
from palmette.tree import Tree

from .context import autocast_of, random_state, random_state_of
from .forest import Forest
from .model_checks import check_model, longest_path
from .step import Options, Step
from .vocabulary import LossFunction, ensure_gradient

MODES = ("retain", "offload", "recompute")


class SharedPrefixSchedule:
    """Runs a causal language model of transformers over a tree of tokens, each computed once.

    Gradients are those of the dense baseline (every path from a root to a leaf as a sequence of its own, a
    token's loss counted once), whatever the mode and the size of microbatches.

    Args:
        model: a Llama, Qwen2, Qwen3, Qwen3-MoE, Mistral or one like them, as it is: its attention is
            exchanged by name while a step runs. LoRA adapters, frozen parameters, tied embeddings, gradient
            checkpointing (not the reentrant one), sliding windows and autocast work (logits are float32 then
            too); attention dropout must be 0.
        mode: what becomes of a prefix's graph while the tokens below run. ``"retain"``: it stays.
            ``"offload"``: what it has saved goes to the host's memory, or from the CPU to a temporary file.
            ``"recompute"``: there is none; the prefix runs forward once more, with the same random numbers.
        temperature: divides the logits, as in the rollout.
        aux_loss: coefficient of a mixture of experts' load-balancing loss over all sequences, as transformers
            defines it. Exact for any microbatches, at the price of a forward pass of all tokens before, which
            counts. Default: what the model's configuration says (router_aux_loss_coef, where
            output_router_logits is set), else 0.
        group: a torch.distributed group whose ranks hold trees of their own: gradients and the loss are
            summed over them, once, at the end of the step, and experts are counted over all of them. A rank
            that raises leaves the others waiting for it, as with any collective. Default: this process alone.
        chunk_bytes: of logits that may be alive.

    Raises:
        ValueError: an option is unknown, or the model is none that this can run: not a causal language model
            of transformers itself but a wrapper of one (DistributedDataParallel, FSDP2), or one with layers
            that are not softmax attention over all tokens before or a window of them, or prompts of PEFT, or
            logits that are not its output embeddings times its decoder's hidden states (three tokens are run
            to see).

    Source: "Schedule-Level Shared-Prefix Reuse for LLM RL Training" (arXiv 2606.01143).
    """

    def __init__(
        self,
        model: Any,
        mode: str = "retain",
        *,
        temperature: float = 1.0,
        aux_loss: float | None = None,
        group: Any = None,
        chunk_bytes: int = CHUNK_BYTES,
    ) -> None:
        if mode not in MODES:
            raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
        check_number("temperature", temperature, 1e-6, 1e6)
        check_at_least(1, chunk_bytes=chunk_bytes)
        config = check_model(model)
        if aux_loss is None:
            wanted = getattr(config, "output_router_logits", False)
            aux_loss = getattr(config, "router_aux_loss_coef", 0.0) if wanted else 0.0
        check_number("aux_loss", aux_loss, 0, 1e6)
        self.model = model
        self._options = Options(mode, float(temperature), float(aux_loss), chunk_bytes, group)
        self._vocab_size = config.vocab_size
        self._longest = longest_path(config)
        self._buffer_in_use = threading.Lock()

    def step(
        self,
        tree: Tree,
        token_ids: Tensor,
        loss_fn: LossFunction,
        *,
        microbatch_tokens: int,
        denominator: float | Tensor,
    ) -> Tensor:
        """Adds the gradients of ``sum of losses / denominator`` to the parameters' ``grad``.

        Gradients that are there are held beside the new ones until the end. Under ``torch.no_grad`` there are
        none, only the loss. Hooks of the embeddings and the head and of their weights are seen, but cost
        speed; hooks on accumulated gradients are called once per microbatch.

        Args:
            tree: of tokens: a root is a prompt, a child of it a rollout; any depth.
            token_ids: [N], int32 or int64, in depth-first order (``tree.node_start`` says where nodes begin).
            loss_fn: ``loss_fn(logprobs [t], token [t])`` returns the sum of the losses of some tokens, a
                differentiable scalar; token: their depth-first numbers, to look up advantages, old
                log-probabilities and so on. Called with any tokens below the roots, each once in a step. What
                else it is computed from (parameters of its own) gets no gradient.
            microbatch_tokens: how many run forward and backward together at most. No node is cut: a longer
                one is a microbatch of its own.
            denominator: what the loss is divided by, a number or a tensor of one; with a group, that of all
                ranks.

        Returns:
            The loss, a float64 scalar without a graph; the load-balancing loss is part of it.

        Raises:
            ValueError: an argument does not fit. Like any other exception it leaves parameters and their
                gradients as they were before the step.
        """
        if isinstance(denominator, Tensor) and denominator.numel() == 1:
            denominator = float(denominator)
        check_number("denominator", denominator, 1e-300, 1e300)
        assert not isinstance(denominator, Tensor)
        return self._step(tree, token_ids, loss_fn, microbatch_tokens, denominator, self._options)

    def _step(
        self,
        tree: Tree,
        token_ids: Tensor,
        loss_fn: LossFunction,
        microbatch_tokens: int,
        denominator: float,
        options: Options,
    ) -> Tensor:
        forest = self._check(tree, token_ids, microbatch_tokens)
        if not callable(loss_fn):
            raise ValueError(f"loss_fn must be a function, got {type(loss_fn).__name__}")
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            with self._buffer(options) as options:
                step = Step(self.model, options, forest, token_ids, loss_fn, denominator)
                loss = step.run(microbatch_tokens)
            if options.group is not None:
                loss = _reduce(parameters, loss, options.group)
            # in the new gradients first: what is wrong with the old ones shows before they change
            both = [(p, grad) for p, grad in zip(parameters, before, strict=True) if grad is not None]
            for p, grad in both:
                if grad.is_inference() or grad.layout != torch.strided or is_expanded(grad):
                    raise ValueError(
                        "gradients that are there must be dense, not expanded, no inference tensors, got one"
                    )
                p.grad = grad.clone() if p.grad is None else p.grad.add_(grad)
        except BaseException:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
            raise
        for p, grad in both:
            assert p.grad is not None
            p.grad = grad.copy_(p.grad)
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_buffer_in_use"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _buffer_in_use=threading.Lock())

    @contextmanager
    def _buffer(self, options: Options) -> Iterator[Options]:
        """The options; within, their buffer is nobody else's: loss_fn may call the schedule itself."""
        if not self._buffer_in_use.acquire(blocking=False):
            yield replace(options, buffer=LogitsBuffer())
            return
        try:
            yield options
        finally:
            self._buffer_in_use.release()

    @torch.no_grad()
    def logprobs(
        self, tree: Tree, token_ids: Tensor, *, microbatch_tokens: int, return_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities of all tokens below the roots, each given its path.

        Args:
            tree, token_ids, microbatch_tokens: as for ``step``.
            return_entropy: also the entropies of the distributions that the tokens are from, in nats.

        Returns:
            [N] on the model's device, float32 (float64 for a float64 model), depth-first; 0 for tokens of the
            roots. With return_entropy also entropies [N].
        """
        forest = self._check(tree, token_ids, microbatch_tokens)
        found: list[tuple[Tensor, Tensor]] = []

        def keep(logprobs: Tensor, tokens: Tensor) -> Tensor:
            found.append((logprobs, tokens))
            return logprobs.new_zeros(())

        with self._buffer(self._options.without_aux_loss()) as options:
            step = Step(self.model, options, forest, token_ids, keep, 1.0)
            step.head.entropies = [] if return_entropy else None
            step.run(microbatch_tokens)

        def in_order(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
            result = torch.zeros(len(token_ids), dtype=step.head.dtype, device=step.device)
            for values, tokens in parts:
                result[tokens] = values
            return result

        if step.head.entropies is None:
            return in_order(found)
        return in_order(found), in_order(step.head.entropies)

    def differentiable_logprobs(
        self, tree: Tree, token_ids: Tensor, *, microbatch_tokens: int, return_entropy: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Log-probabilities as ``logprobs`` has them, whose backward pass is a step.

        For losses that are not sums over tokens. It costs a forward pass more than ``step``, because a
        token's gradient is known only when all log-probabilities are.

        Args:
            tree, token_ids, microbatch_tokens: as for ``step``.
            return_entropy: also the entropies, as ``logprobs`` has them; they have no gradient.

        Returns:
            [N]; with return_entropy also entropies [N]. The backward of the first adds to the parameters'
            ``grad``, those of a load-balancing loss left out; ``torch.autograd.grad`` finds nothing. Dropout
            is the same in both passes. It raises RuntimeError where the parameters have changed since.
        """
        anchor = torch.zeros((), requires_grad=True)
        found, entropies = _StepBackward.apply(  # type: ignore[no-untyped-call]
            anchor, self, tree, token_ids, microbatch_tokens, return_entropy
        )
        return (found, entropies) if return_entropy else found

    def _check(self, tree: Tree, token_ids: Tensor, microbatch_tokens: int) -> Forest:
        if not isinstance(tree, Tree):
            raise ValueError(f"tree must be a palmette.Tree, got {type(tree).__name__}")
        check_dtype("token_ids", token_ids, INDEX)
        check_shape("token_ids", token_ids, "[N]", [tree.num_tokens])
        check_at_least(1, microbatch_tokens=microbatch_tokens)
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self._vocab_size:
            raise ValueError(
                f"token_ids must be in [0, {self._vocab_size}), got {int(token_ids.min())} to "
                f"{int(token_ids.max())}"
            )
        longest = int(tree.path_lengths.max()) if tree.num_nodes else 0
        if longest > self._longest:
            raise ValueError(
                f"tree must have paths of at most {self._longest} tokens, got {longest}: beyond, all "
                f"positions are turned another way (rope_type), those of the prefix too"
            )
        return Forest.of(tree)


def _reduce(parameters: list[Tensor], loss: Tensor, group: Any) -> Tensor:
    """Sums over the ranks. A rank whose tree does not reach a parameter has zeros."""
    import torch.distributed as dist

    for p in parameters if torch.is_grad_enabled() else ():
        dist.all_reduce(ensure_gradient(p), group=group)
    dist.all_reduce(loss, group=group)
    return loss


def _versions(model: Any) -> list[int]:
    """How often parameters have been written to."""
    return [0 if p.is_inference() else p._version for p in model.parameters()]


class _StepBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        schedule: SharedPrefixSchedule,
        tree: Tree,
        token_ids: Tensor,
        microbatch_tokens: int,
        return_entropy: bool,
    ) -> tuple[Tensor, Tensor | None]:
        ctx.step = (schedule, tree.copy(), token_ids.clone(), microbatch_tokens)
        device = next(schedule.model.parameters()).device
        ctx.rng, ctx.autocast = random_state(device), autocast_of(device)
        ctx.versions = _versions(schedule.model)
        found = schedule.logprobs(
            tree, token_ids, microbatch_tokens=microbatch_tokens, return_entropy=return_entropy
        )
        if isinstance(found, Tensor):
            return found, None
        ctx.mark_non_differentiable(found[1])
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        schedule, tree, token_ids, microbatch_tokens = ctx.step
        if ctx.versions != _versions(schedule.model):
            raise RuntimeError("parameters must not change between log-probabilities and their backward pass")
        device = next(schedule.model.parameters()).device
        with torch.enable_grad(), random_state_of(ctx.rng, device), ctx.autocast:
            schedule._step(
                tree,
                token_ids,
                lambda logprobs, tokens: (gradient[tokens] * logprobs).sum(),
                microbatch_tokens,
                1.0,
                schedule._options.without_aux_loss(),
            )
        return torch.zeros(()), *(None,) * 5
