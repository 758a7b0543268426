# SPDX-License-Identifier: Apache-2.0
"""Training on trees of tokens, of which each is computed once: a prompt with its rollouts, and deeper.

The loss is a sum over tokens, so the gradient of a prefix is the sum of what the tokens after it send back.
The schedule walks the tree depth first. A node with something below it is

    A  pushed:   forward once; its keys and values go to a stack, detached, and its hidden states become
    leaves B  (visited) what lies below runs forward and backward in microbatches; gradients to the stack's
    keys and
                 values, and to the hidden state that predicts a child's first token, add up
    C  popped:   one backward from its keys, values and hidden states, with the sums of their gradients

and its own backward adds to the sums of its ancestors. A subtree that fits a microbatch is one forward under
a tree's plan.

Source: "Schedule-Level Shared-Prefix Reuse for LLM RL Training" (arXiv 2606.01143), where the tree is a star.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from palmette._attend import state_dtype
from palmette._checks import INDEX, check_at_least, check_dtype, check_number, check_shape
from palmette.losses import CHUNK_BYTES, chunk_rows, widened
from palmette.tree import Tree

from ..integrations.prefix_transformers import PrefixPass, PrefixStack, prefix_attention_of
from .saved_tensors import OffloadedTensors

_ops = torch.ops.palmette

MODES = ("retain", "offload", "recompute")
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass
class _Forest:
    """A tree's nodes that hold tokens, in depth-first order; -1 is what the roots hang from.

    Attributes:
        start, length: of each node's tokens, depth-first.
        parent: place in these lists.
        children: of each place, and of -1.
        size: tokens of the subtree.
        leaves: leaf nodes below, itself included.
    """

    start: list[int] = field(default_factory=list)
    length: list[int] = field(default_factory=list)
    parent: list[int] = field(default_factory=list)
    children: dict[int, list[int]] = field(default_factory=lambda: {-1: []})
    size: list[int] = field(default_factory=list)
    leaves: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, tree: Tree) -> _Forest:
        forest = cls()
        starts, place = tree.node_start.tolist(), {-1: -1}
        for node in tree.order.tolist():
            above, length = place[tree.parent(node)], tree.length(node)
            if length == 0:  # its children hang from its parent
                place[node] = above
                continue
            here = place[node] = len(forest.start)
            forest.start.append(starts[node])
            forest.length.append(length)
            forest.parent.append(above)
            forest.children[above].append(here)
            forest.children[here] = []
        forest.size = list(forest.length)
        forest.leaves = [0] * len(forest.start)
        for here in reversed(range(len(forest.start))):
            forest.leaves[here] = forest.leaves[here] or 1
            if (above := forest.parent[here]) >= 0:
                forest.size[above] += forest.size[here]
                forest.leaves[above] += forest.leaves[here]
        return forest

    def subtree(self, place: int) -> list[int]:
        """A node and all below it, in depth-first order: neighbours in the lists."""
        end = place + 1
        while end < len(self.parent) and self.parent[end] >= place:
            end += 1
        return list(range(place, end))

    def walk(self, budget: int) -> Iterator[tuple[str, list[int], int]]:
        """("push", [node], parent), ("visit", nodes of a microbatch, their parent), ("pop", [node],
        parent)."""
        waiting: list[tuple[str, list[int], int]] = list(reversed(self._below(-1, budget)))
        while waiting:
            do, places, parent = waiting.pop()
            yield do, places, parent
            if do == "push":
                waiting.append(("pop", places, parent))
                waiting += reversed(self._below(places[0], budget))

    def _below(self, parent: int, budget: int) -> list[tuple[str, list[int], int]]:
        small = [c for c in self.children[parent] if self.size[c] <= budget or not self.children[c]]
        actions: list[tuple[str, list[int], int]] = []
        batch: list[int] = []
        tokens = 0
        for child in small:
            if batch and tokens + self.size[child] > budget:
                actions.append(("visit", batch, parent))
                batch, tokens = [], 0
            batch = batch + self.subtree(child)
            tokens += self.size[child]
        if batch:
            actions.append(("visit", batch, parent))
        return actions + [("push", [c], parent) for c in self.children[parent] if c not in set(small)]

    def path_length(self, place: int) -> int:
        """Tokens from the root down to the node's last."""
        total = 0
        while place >= 0:
            total += self.length[place]
            place = self.parent[place]
        return total


@dataclass
class _Rows:
    """The tokens of one forward.

    Attributes:
        tokens: their depth-first numbers [t].
        positions: along their paths [t].
        before: row of the token before each on its path; -1: the last one of the prefix [t].
        shape: for the plan.
        leaves: leaves at or below each [t].
        below: is it below a root? [t]
    """

    tokens: Tensor
    positions: Tensor
    before: Tensor
    shape: Tree | Tensor
    leaves: Tensor
    below: Tensor

    @classmethod
    def of(cls, forest: _Forest, places: list[int], prefix_len: int) -> _Rows:
        tokens, positions, before, leaves, below = [], [], [], [], []
        local: dict[int, int] = {}  # place -> number here
        last: dict[int, int] = {}  # place -> row of its last token
        depth: dict[int, int] = {}
        parents, lengths, row = [], [], 0
        for place in places:
            above, length = forest.parent[place], forest.length[place]
            inside = above in local
            begin = depth[above] if inside else prefix_len
            parents.append(local[above] if inside else -1)
            lengths.append(length)
            local[place] = len(local)
            depth[place] = begin + length
            tokens.append(torch.arange(forest.start[place], forest.start[place] + length))
            positions.append(torch.arange(begin, begin + length))
            previous = torch.arange(row - 1, row + length - 1)
            previous[0] = last[above] if inside else -1
            before.append(previous)
            leaves.append(torch.full((length,), forest.leaves[place]))
            below.append(torch.full((length,), above >= 0))
            row += length
            last[place] = row - 1
        flat = all(parent < 0 for parent in parents)
        shape: Tree | Tensor
        if flat:
            shape = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        else:
            shape = Tree(torch.tensor(parents), torch.tensor(lengths))
        return cls(
            torch.cat(tokens),
            torch.cat(positions),
            torch.cat(before),
            shape,
            torch.cat(leaves),
            torch.cat(below),
        )


@dataclass
class _Node:
    """A node that has been pushed.

    Attributes:
        rows: its tokens.
        begin: where they are on the stack.
        last: hidden state of its last token [hidden], detached.
        dhidden: gradients of its hidden states so far [t, hidden], in the dtype of sums.
        hidden, kept: with their graph; None in the mode "recompute".
        saved: what the graph has saved elsewhere.
        rng: what random numbers began from.
    """

    rows: _Rows
    begin: int
    last: Tensor
    dhidden: Tensor
    hidden: Tensor | None
    kept: dict[int, tuple[Tensor, Tensor]]
    aux: Tensor | None
    rng: list[Tensor]


class SharedPrefixSchedule:
    """Runs a causal language model of transformers over a tree of tokens, each computed once.

    Gradients are those of the dense baseline (every path from a root to a leaf as a sequence of its own, a
    token's loss counted once), whatever the mode and the size of microbatches.

    Args:
        model: a Llama, Qwen2, Qwen3, Qwen3-MoE, Mistral or one like them, as it is: its attention is
            exchanged by name while a step runs. LoRA adapters, frozen parameters, tied embeddings, gradient
            checkpointing (not the reentrant one) and sliding windows work; attention dropout must be 0.
        mode: what becomes of a prefix's graph while the tokens below run. ``"retain"``: it stays.
            ``"offload"``: what it has saved goes to the host's memory, or from the CPU to a temporary file.
            ``"recompute"``: there is none; the prefix runs forward once more, with the same random numbers.
        temperature: divides the logits, as in the rollout.
        aux_loss: coefficient of a mixture of experts' load-balancing loss over all sequences, as transformers
            defines it. Exact for any microbatches, at the price of a forward pass of all tokens before, which
            counts. Default: what the model's configuration says (router_aux_loss_coef, where
            output_router_logits is set), else 0.
        group: a torch.distributed group whose ranks hold trees of their own: gradients and the loss are
            summed over them, once, at the end of the step. Default: this process alone.
        chunk_bytes: of logits that may be alive.

    Raises:
        ValueError: an option is unknown.

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
        self.model, self.mode, self.temperature, self.group = model, mode, float(temperature), group
        self.chunk_bytes = chunk_bytes
        config = model.config.get_text_config()
        if aux_loss is None:
            wanted = getattr(config, "output_router_logits", False)
            aux_loss = getattr(config, "router_aux_loss_coef", 0.0) if wanted else 0.0
        check_number("aux_loss", aux_loss, 0, 1e6)
        self.aux_loss = float(aux_loss)
        self._config = config

    def step(
        self,
        tree: Tree,
        token_ids: Tensor,
        loss_fn: LossFunction,
        *,
        microbatch_tokens: int,
        denominator: float,
    ) -> Tensor:
        """Adds the gradients of ``sum of losses / denominator`` to the parameters' ``grad``.

        Args:
            tree: of tokens: a root is a prompt, a child of it a rollout; any depth.
            token_ids: [N], int32 or int64, in depth-first order (``tree.node_start`` says where nodes begin).
            loss_fn: ``loss_fn(logprobs [t], token [t])`` returns the sum of the losses of some tokens, a
                differentiable scalar; token: their depth-first numbers, to look up advantages, old
                log-probabilities and so on. Called with any tokens below the roots, each once in a step.
            microbatch_tokens: how many run forward and backward together at most; a longer leaf is one
                microbatch.
            denominator: what the loss is divided by; with a group, that of all ranks.

        Returns:
            The loss, a float64 scalar without a graph; the load-balancing loss is part of it.

        Raises:
            ValueError: an argument does not fit. Like any other exception it leaves parameters and their
                gradients as they were before the step.
        """
        forest = self._check(tree, token_ids, microbatch_tokens)
        check_number("denominator", denominator, 1e-300, 1e300)
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        try:
            run = _Step(self, forest, token_ids, loss_fn, denominator)
            loss = run.all(microbatch_tokens)
            if self.group is not None:
                loss = self._reduce(parameters, loss)
        except BaseException:
            for p, grad in zip(parameters, before, strict=True):
                p.grad = grad
            raise
        for p, grad in zip(parameters, before, strict=True):
            if grad is not None:
                p.grad = grad if p.grad is None else grad.add_(p.grad)
        return loss

    @torch.no_grad()
    def logprobs(self, tree: Tree, token_ids: Tensor, *, microbatch_tokens: int) -> Tensor:
        """Log-probabilities of all tokens below the roots, each given its path.

        Args:
            tree, token_ids, microbatch_tokens: as for ``step``.

        Returns:
            [N], float32 (float64 for a float64 model), depth-first; 0 for tokens of the roots.
        """
        forest = self._check(tree, token_ids, microbatch_tokens)
        found: list[tuple[Tensor, Tensor]] = []

        def keep(logprobs: Tensor, tokens: Tensor) -> Tensor:
            found.append((logprobs, tokens))
            return logprobs.new_zeros(())

        step = _Step(self, forest, token_ids, keep, 1.0)
        step.all(microbatch_tokens)
        result = torch.zeros(len(token_ids), dtype=step.head.dtype, device=token_ids.device)
        for logprobs, tokens in found:
            result[tokens] = logprobs
        return result

    def _check(self, tree: Tree, token_ids: Tensor, microbatch_tokens: int) -> _Forest:
        if not isinstance(tree, Tree):
            raise ValueError(f"tree must be a palmette.Tree, got {type(tree).__name__}")
        check_dtype("token_ids", token_ids, INDEX)
        check_shape("token_ids", token_ids, "[N]", [tree.num_tokens])
        check_at_least(1, microbatch_tokens=microbatch_tokens)
        if len(token_ids) and not 0 <= int(token_ids.min()) <= int(token_ids.max()) < self._config.vocab_size:
            raise ValueError(
                f"token_ids must be in [0, {self._config.vocab_size}), got {int(token_ids.min())} to "
                f"{int(token_ids.max())}"
            )
        return _Forest.of(tree)

    def _reduce(self, parameters: list[Tensor], loss: Tensor) -> Tensor:
        """Sums over the ranks. A rank whose tree does not reach a parameter has zeros."""
        import torch.distributed as dist

        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            dist.all_reduce(p.grad, group=self.group)
        dist.all_reduce(loss, group=self.group)
        return loss


class _Step:
    """What one step knows.

    Args:
        schedule: whose.
        forest: of tokens.
        token_ids: [N].
        loss_fn: of tokens.
        denominator: of the loss.
    """

    def __init__(
        self,
        schedule: SharedPrefixSchedule,
        forest: _Forest,
        token_ids: Tensor,
        loss_fn: LossFunction,
        denominator: float,
    ) -> None:
        self.schedule, self.forest, self.loss_fn = schedule, forest, loss_fn
        self.denominator = float(denominator)
        self.model = schedule.model
        self.decoder = self.model.get_decoder()
        self.device = next(self.model.parameters()).device
        self.token_ids = token_ids.long().to(self.device)
        self.grad = torch.is_grad_enabled()
        self.loss = torch.zeros((), dtype=torch.float64, device=self.device)
        self.head = _Head(self)
        self.router = _Router(self)
        self.stack = PrefixStack(0, self.grad)
        self.nodes: dict[int, _Node] = {}
        self.parameters = {p.untyped_storage().data_ptr() for p in self.model.parameters()}

    def all(self, budget: int) -> Tensor:
        actions = list(self.forest.walk(budget))
        deepest = max((self.forest.path_length(p[0]) for do, p, _ in actions if do == "push"), default=0)
        with prefix_attention_of(self.model):
            if self.router.coefficient and self.grad:
                self._count(actions, deepest)
            self.stack = PrefixStack(deepest, self.grad)
            for do, places, parent in actions:
                if do == "push":
                    self._push(places[0], parent)
                elif do == "pop":
                    self._pop(places[0], parent)
                else:
                    self._visit(places, parent)
        self.head.finish()
        return self.loss + self.router.loss

    def _count(self, actions: list[tuple[str, list[int], int]], deepest: int) -> None:
        """A pass without gradients: which experts the tokens go to."""
        self.stack = PrefixStack(deepest, False)
        with torch.no_grad(), self._random_numbers_of_their_own(), self.router.counting():
            for do, places, parent in actions:
                if do != "pop":
                    rows = self._rows(places, parent)
                    self._forward(rows, self._prefix_len(parent), keep=do == "push")

    def _random_numbers_of_their_own(self) -> AbstractContextManager[None]:
        devices = [self.device] if self.device.type == "cuda" else []
        return torch.random.fork_rng(devices)

    def _prefix_len(self, parent: int) -> int:
        return self.forest.path_length(parent)

    def _rows(self, places: list[int], parent: int) -> _Rows:
        return _Rows.of(self.forest, places, self._prefix_len(parent))

    def _forward(
        self, rows: _Rows, prefix_len: int, *, keep: bool
    ) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]], Tensor | None]:
        """Hidden states [t, hidden], what is kept of keys and values, and the load-balancing loss."""
        this = PrefixPass(rows.shape, prefix_len, self.stack, keep=keep, graph=torch.is_grad_enabled())
        with self.router.watch(rows) as aux:
            out = self.decoder(
                input_ids=self.token_ids[rows.tokens.to(self.device)].unsqueeze(0),
                position_ids=rows.positions.to(self.device).unsqueeze(0),
                use_cache=False,
                prefix_pass=this,
            )
        return out.last_hidden_state[0], this.kept, aux()

    def _visit(self, places: list[int], parent: int) -> None:
        rows = self._rows(places, parent)
        hidden, _, aux = self._forward(rows, self._prefix_len(parent), keep=False)
        dhidden = self._score(rows, hidden.detach(), parent)
        if not self.grad:
            return
        self._backward([hidden], [dhidden], aux)

    def _push(self, place: int, parent: int) -> None:
        schedule = self.schedule
        rows = self._rows([place], parent)
        begin = self._prefix_len(parent)
        rng = self._random_state() if schedule.mode == "recompute" else []
        context: Any = nullcontext()
        if schedule.mode == "recompute":
            context = torch.no_grad()
        elif schedule.mode == "offload" and self.grad:
            context = OffloadedTensors(self._lives_on)
        with context:
            hidden, kept, aux = self._forward(rows, begin, keep=True)
        graph = self.grad and schedule.mode != "recompute"
        self.nodes[place] = _Node(
            rows,
            begin,
            hidden[-1].detach().clone(),
            self._score(rows, hidden.detach(), parent),
            hidden if graph else None,
            kept if graph else {},
            aux if graph else None,
            rng,
        )

    def _pop(self, place: int, parent: int) -> None:
        node = self.nodes.pop(place)
        if not self.grad:
            return
        hidden, kept, aux = node.hidden, node.kept, node.aux
        if hidden is None:
            with self._random_numbers_of_their_own():
                self._set_random_state(node.rng)
                # what is on the stack stays: sums of gradients belong to it
                hidden, kept, aux = self._again(node)
        outputs, gradients = [hidden], [node.dhidden]
        for layer, pair in kept.items():
            sums = self.stack.sums(layer, node.begin, node.begin + len(node.rows.tokens))
            for x, total in zip(pair, sums, strict=True):
                outputs.append(x)
                gradients.append(total)
        self._backward(outputs, gradients, aux)

    def _again(self, node: _Node) -> tuple[Tensor, dict[int, tuple[Tensor, Tensor]], Tensor | None]:
        this = self.stack
        kept: dict[int, tuple[Tensor, Tensor]] = {}

        class Reading(PrefixStack):
            """The same stack, which is not written to."""

            def __init__(self) -> None:
                self.capacity, self.gradients = this.capacity, this.gradients
                self._keys, self._sums = this._keys, this._sums

            def write(self, layer: int, begin: int, k: Tensor, v: Tensor) -> None:
                pass

        try:
            self.stack = Reading()
            hidden, kept, aux = self._forward(node.rows, node.begin, keep=True)
        finally:
            self.stack = this
        return hidden, kept, aux

    def _backward(self, outputs: list[Tensor], gradients: list[Tensor], aux: Tensor | None) -> None:
        pairs = [(x, g.to(x.dtype)) for x, g in zip(outputs, gradients, strict=True) if x.requires_grad]
        if aux is not None and aux.requires_grad:
            pairs.append((aux, torch.ones_like(aux)))
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])

    def _score(self, rows: _Rows, hidden: Tensor, parent: int) -> Tensor:
        """Losses of the rows' tokens; returns gradients of ``hidden`` [t, hidden], adds those of the
        prefix."""
        scored = rows.below.nonzero()[:, 0].to(self.device)
        before = rows.before.to(self.device)[scored]
        above = self.nodes[parent] if parent >= 0 else None
        source = hidden if above is None else torch.cat([hidden, above.last[None]])  # -1 is the last row
        tokens = rows.tokens.to(self.device)[scored]
        drows = self.head.losses(source[before], self.token_ids[tokens], tokens)
        dhidden = torch.zeros_like(source, dtype=drows.dtype) if self.grad else drows
        if self.grad:
            dhidden.index_add_(0, before % len(source), drows)
            if above is not None:
                above.dhidden[-1] += dhidden[-1]
                dhidden = dhidden[:-1]
        return dhidden

    def _lives_on(self, storage: int) -> bool:
        return storage in self.parameters or storage in self.stack.storages()

    def _random_state(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        if self.device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self.device))
        return states

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self.device)


class _Head:
    """Hidden states to losses and back, a chunk of logits at a time.

    A chunk's gradients are taken while its logits are there: three products of a forward and backward pass,
    not the four of computing logits again.
    """

    def __init__(self, step: _Step) -> None:
        self.step = step
        schedule = step.schedule
        module = step.model.get_output_embeddings()
        config = schedule._config
        for name in ("logit_scale", "logits_scaling"):
            if getattr(config, name, None) not in (None, 1, 1.0):
                raise ValueError(f"{name} of the model must be 1, got {getattr(config, name)}")
        self.softcap = getattr(config, "final_logit_softcapping", None)
        self.dtype = state_dtype(next(module.parameters()).dtype)
        plain = type(module) is torch.nn.Linear and module.bias is None and not self.softcap
        self.module = module
        self.weight = module.weight if plain else None
        self.wide = None if self.weight is None else widened(self.weight.detach())
        self.dweight: Tensor | None = None
        if step.grad and self.weight is not None and self.weight.requires_grad:
            self.dweight = torch.zeros_like(self.wide)  # type: ignore[arg-type]
        self.rows = chunk_rows(config.vocab_size, next(module.parameters()).dtype, schedule.chunk_bytes)

    def losses(self, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
        """Adds to the step's loss; returns gradients of hidden [t, hidden]."""
        wide = widened(hidden)
        dhidden = torch.zeros_like(wide)
        for begin in range(0, len(tokens), self.rows):
            part = slice(begin, begin + self.rows)
            one = self._by_module if self.wide is None else self._by_weight
            dhidden[part] = one(wide[part], targets[part], tokens[part])
        return dhidden

    def _loss(self, logprobs: Tensor, tokens: Tensor) -> Tensor:
        loss = self.step.loss_fn(logprobs, tokens)
        if not isinstance(loss, Tensor) or loss.dim() != 0:
            got = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"loss_fn must return a scalar tensor, got {got}")
        loss = loss / self.step.denominator
        self.step.loss += loss.detach().double()
        return loss

    def _gradient(self, logprobs: Tensor, tokens: Tensor) -> Tensor | None:
        """Of the loss, to the log-probabilities; None where it is 0."""
        if not self.step.grad:
            self._loss(logprobs, tokens)
            return None
        with torch.enable_grad():
            leaf = logprobs.detach().requires_grad_()
            loss = self._loss(leaf, tokens)
        if not loss.requires_grad:
            return None
        (gradient,) = torch.autograd.grad(loss, leaf, allow_unused=True)
        return gradient if gradient is not None and bool((gradient != 0).any()) else None

    @torch.no_grad()
    def _by_weight(self, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
        assert self.wide is not None
        temperature = self.step.schedule.temperature
        logits = hidden @ self.wide.T
        logprobs, lse, _ = _ops.gather_logprobs(logits, targets, temperature, False)
        gradient = self._gradient(logprobs, tokens)
        if gradient is None:
            return torch.zeros_like(hidden)
        _ops.gather_logprobs_backward_(gradient.contiguous(), None, logits, targets, lse, None, temperature)
        if self.dweight is not None:
            self.dweight.addmm_(logits.T, hidden)
        return logits @ self.wide

    def _by_module(self, hidden: Tensor, targets: Tensor, tokens: Tensor) -> Tensor:
        """Of a head that is more than a matrix: LoRA, a bias, capped logits."""
        dtype = next(self.module.parameters()).dtype
        with torch.set_grad_enabled(self.step.grad):
            leaf = hidden.to(dtype).requires_grad_(self.step.grad)
            logits = widened(self.module(leaf))
            if self.softcap:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            logprobs = torch.log_softmax(logits / self.step.schedule.temperature, -1)
            chosen = logprobs.gather(-1, targets[:, None])[:, 0]
        gradient = self._gradient(chosen, tokens)
        if gradient is None:
            return torch.zeros_like(hidden)
        chosen.backward(gradient)
        assert leaf.grad is not None
        return leaf.grad.to(hidden.dtype)

    def finish(self) -> None:
        if self.dweight is None or self.weight is None:
            return
        gradient = self.dweight.to(self.weight.dtype)
        self.weight.grad = gradient if self.weight.grad is None else self.weight.grad.add_(gradient)


class _Router:
    """The load-balancing loss of a mixture of experts, ``E sum_e f_e P_e``.

    f_e is the share of choices that go to expert e, times how many experts a token has, and P_e the mean
    probability, over the tokens of all sequences and layers: a token counts once for each leaf at or below
    it. The counts are those of a pass before, so that the loss is a sum over tokens, as any other.

    Source: Switch Transformers (arXiv 2101.03961), as transformers computes it.
    """

    def __init__(self, step: _Step) -> None:
        self.coefficient = step.schedule.aux_loss
        self.loss = torch.zeros((), dtype=torch.float64, device=step.device)
        self.modules: list[Any] = []
        if not self.coefficient:
            return
        config = step.schedule._config
        recorded = getattr(type(step.decoder), "_can_record_outputs", None) or {}
        recorder = recorded.get("router_logits") or getattr(step.decoder, "_can_record_outputs", {}).get(
            "router_logits"
        )
        kind = getattr(recorder, "target_class", recorder)
        self.index = getattr(recorder, "index", 0)
        self.modules = [] if kind is None else [m for m in step.decoder.modules() if isinstance(m, kind)]
        if not self.modules:
            raise ValueError("aux_loss must be 0 for a model without routers, got one that has none")
        self.top_k = config.num_experts_per_tok
        self.counts: Tensor | None = None  # choices of all sequences by expert
        self.rows = 0.0  # tokens of all sequences and layers
        self._counting = False

    def counting(self) -> AbstractContextManager[None]:
        router = self

        class Counting(AbstractContextManager[None]):
            def __enter__(self) -> None:
                router.counts, router.rows, router._counting = None, 0.0, True

            def __exit__(self, *_: object) -> None:
                router._counting = False

        return Counting()

    def watch(self, rows: _Rows) -> _Watch:
        return _Watch(self, rows)


class _Watch:
    """One forward under the router's eyes; called afterwards, it returns the forward's part of the loss."""

    def __init__(self, router: _Router, rows: _Rows) -> None:
        self.router, self.rows = router, rows
        self.parts: list[Tensor] = []
        self.handles: list[Any] = []
        self.open = False

    def __enter__(self) -> _Watch:
        if self.router.modules and (self.router._counting or self.router.counts is not None):
            self.handles = [m.register_forward_hook(self._see) for m in self.router.modules]
            self.open = True
        return self

    def __exit__(self, *_: object) -> None:
        self.open = False  # layers that are computed again in the backward pass are not seen twice
        for handle in self.handles:
            handle.remove()

    def _see(self, module: Any, inputs: Any, output: Any) -> None:
        router = self.router
        logits = output[router.index] if isinstance(output, tuple) else output
        probabilities = torch.softmax(logits, -1)
        weights = self.rows.leaves.to(logits.device, torch.float64)
        if router._counting:
            chosen = probabilities.topk(router.top_k, -1).indices
            counts = torch.zeros(logits.shape[-1], dtype=torch.float64, device=logits.device)
            counts.scatter_add_(0, chosen.flatten(), weights.repeat_interleave(router.top_k))
            router.counts = counts if router.counts is None else router.counts + counts
            router.rows += float(weights.sum())
            return
        assert router.counts is not None
        factor = router.coefficient * len(router.counts) / router.rows**2
        dtype = torch.promote_types(probabilities.dtype, torch.float32)
        by_expert = (router.counts * factor).to(dtype)
        self.parts.append(weights.to(dtype) @ (probabilities.to(dtype) @ by_expert))

    def __call__(self) -> Tensor | None:
        if not self.parts:
            return None
        total = torch.stack(self.parts).sum()
        if torch.is_grad_enabled():  # not when a prefix runs that is going to run again
            self.router.loss += total.detach().double()
        return total
