# SPDX-License-Identifier: Apache-2.0
"""One step over a tree: pushed nodes, microbatches, popped nodes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from palmette.losses import LogitsBuffer

from ...integrations.prefix_transformers import prefix_attention_of
from ..saved_tensors import OffloadedTensors
from .context import autocast_of, random_state, random_state_of
from .forest import Action, Forest, Rows
from .path import PrefixPass, PrefixStack
from .router import Router
from .vocabulary import Embedding, Head, LossFunction, TableGradients


@dataclass
class Options:
    """Of a schedule, see there."""

    mode: str
    temperature: float
    aux_loss: float
    chunk_bytes: int
    group: Any
    buffer: LogitsBuffer = field(default_factory=LogitsBuffer)

    def without_aux_loss(self) -> Options:
        """The same, with the same buffer, but no load-balancing loss."""
        return replace(self, aux_loss=0.0)


@dataclass
class Forward:
    """What has run forward.

    Attributes:
        hidden: states after the last norm [t, hidden].
        kept: by layer, keys and values [t, Hk, D], if they were to be kept.
        aux: part of the load-balancing loss.
        embedded: what ``Embedding`` gave.
    """

    hidden: Tensor
    kept: dict[int, tuple[Tensor, Tensor]]
    aux: Tensor | None
    embedded: Tensor | None


@dataclass
class Node:
    """A node that has been pushed.

    Attributes:
        rows: its tokens.
        begin: where they are on the stack.
        last: hidden state of its last token [hidden], detached.
        dhidden: gradients of its hidden states so far [t, hidden], in the dtype of sums.
        forward: with its graph; None in the mode "recompute".
        rng: what random numbers began from.
    """

    rows: Rows
    begin: int
    last: Tensor
    dhidden: Tensor
    forward: Forward | None
    rng: list[Tensor]


class Step:
    """What one step knows.

    Args:
        model: a causal language model of transformers.
        options: of the schedule.
        forest: of tokens.
        token_ids: [N].
        loss_fn: of tokens.
        denominator: of the loss.
    """

    def __init__(
        self,
        model: Any,
        options: Options,
        forest: Forest,
        token_ids: Tensor,
        loss_fn: LossFunction,
        denominator: float,
    ) -> None:
        self.model, self.options, self.forest = model, options, forest
        self.decoder = model.get_decoder()
        config = model.config.get_text_config()
        self.device = next(model.parameters()).device
        self.token_ids = token_ids.long().to(self.device)
        self.grad = torch.is_grad_enabled()
        self.tables = TableGradients()
        self.embedding = Embedding(model.get_input_embeddings(), self.tables)
        self.head = Head(
            model.get_output_embeddings(),
            config,
            loss_fn,
            float(denominator),
            options.temperature,
            options.chunk_bytes,
            options.buffer,
            self.tables if self.grad else None,
        )
        self.num_layers = config.num_hidden_layers
        self.router = Router(options.aux_loss, self.decoder, config, graph=self.grad)
        self.stack = PrefixStack(0, self.grad)
        self.nodes: dict[int, Node] = {}
        self.parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def run(self, budget: int) -> Tensor:
        """All of it; returns the loss. Microbatches have at most ``budget`` tokens, or are one leaf."""
        actions = list(self.forest.walk(budget))
        deepest = max((self.forest.path_length(p[0]) for do, p, _ in actions if do == "push"), default=0)
        with prefix_attention_of(self.model), autocast_of(self.device):
            if self.router.coefficient:
                self._count(actions, deepest)
            self.stack = PrefixStack(deepest, self.grad)
            try:
                for do, places, parent in actions:
                    if do == "push":
                        self._push(places[0], parent)
                    elif do == "pop":
                        self._pop(places[0])
                    else:
                        self._visit(places, parent)
            finally:
                self.nodes.clear()  # graphs hold hooks, which hold this
        self.tables.finish()
        self.head.finish()
        return self.head.loss + self.router.loss

    def _count(self, actions: list[Action], deepest: int) -> None:
        """A pass without gradients: which experts the tokens go to."""
        self.stack = PrefixStack(deepest, False)
        with torch.no_grad(), random_state_of(None, self.device), self.router.counting():
            for do, places, parent in actions:
                if do != "pop":
                    begin = self.forest.path_length(parent)
                    rows = self._rows(places, begin)
                    self._forward(rows, begin, keep=do == "push")
        self.router.sum_over(self.options.group)

    def _rows(self, places: list[int], begin: int) -> Rows:
        return Rows.of(self.forest, places, begin, self.device)

    def _forward(self, rows: Rows, prefix_len: int, *, keep: bool, write: bool = True) -> Forward:
        this = PrefixPass(
            rows.shape, prefix_len, self.stack, keep=keep, write=write, graph=torch.is_grad_enabled()
        )
        inputs, embedded = self.embedding(self.token_ids[rows.tokens])
        with self.router.watch(rows) as aux:
            out = self.decoder(
                **inputs,
                position_ids=rows.positions[None],
                use_cache=False,
                return_dict=True,
                prefix_pass=this,
            )
        this.finished = True
        if len(this.layers) != self.num_layers:
            raise ValueError(
                f"model must attend to the tokens before in all of its {self.num_layers} layers, as softmax "
                f"attention that transformers dispatches by name, got {len(this.layers)} that do"
            )
        return Forward(out.last_hidden_state[0], this.kept, aux(), embedded)

    def _visit(self, places: list[int], parent: int) -> None:
        begin = self.forest.path_length(parent)
        rows = self._rows(places, begin)
        forward = self._forward(rows, begin, keep=False)
        dhidden = self._score(rows, forward.hidden.detach(), parent)
        if self.grad:
            self._backward(rows, forward, [(forward.hidden, dhidden)])

    def _push(self, place: int, parent: int) -> None:
        begin = self.forest.path_length(parent)
        rows = self._rows([place], begin)
        again = self.options.mode == "recompute"
        rng = random_state(self.device) if again else []
        context: Any = nullcontext()
        if again:
            context = torch.no_grad()
        elif self.options.mode == "offload" and self.grad:
            context = OffloadedTensors(self._lives_on)
        with context:
            forward = self._forward(rows, begin, keep=True)
        hidden = forward.hidden.detach()
        last, dhidden = hidden[-1].clone(), self._score(rows, hidden, parent)
        self.nodes[place] = Node(
            rows, begin, last, dhidden, forward if self.grad and not again else None, rng
        )

    def _pop(self, place: int) -> None:
        node = self.nodes.pop(place)
        if not self.grad:
            return
        forward = node.forward
        if forward is None:
            with random_state_of(node.rng, self.device):
                # what is on the stack stays: sums of gradients belong to it
                forward = self._forward(node.rows, node.begin, keep=True, write=False)
        pairs = [(forward.hidden, node.dhidden)]
        for layer, kept in forward.kept.items():
            sums = self.stack.sums(layer, node.begin, node.begin + len(node.rows.tokens))
            pairs += zip(kept, sums, strict=True)
        self._backward(node.rows, forward, pairs)

    def _backward(self, rows: Rows, forward: Forward, pairs: list[tuple[Tensor, Tensor]]) -> None:
        """From tensors, with their gradients."""
        pairs = [(x, g.to(x.dtype)) for x, g in pairs if x.requires_grad]
        if forward.aux is not None and forward.aux.requires_grad:
            pairs.append((forward.aux, torch.ones_like(forward.aux)))
        if pairs:
            torch.autograd.backward([x for x, _ in pairs], [g for _, g in pairs])
        self.embedding.add(self.token_ids[rows.tokens], forward.embedded)

    def _score(self, rows: Rows, hidden: Tensor, parent: int) -> Tensor:
        """Losses of the rows' tokens; returns gradients of hidden [t, hidden], adds that of the parent's."""
        scored = rows.below.nonzero()[:, 0]
        before = rows.before[scored]
        above = self.nodes[parent] if parent >= 0 else None
        source = hidden if above is None else torch.cat([hidden, above.last[None]])  # -1 is the last row
        tokens = rows.tokens[scored]
        drows = self.head.losses(source[before], self.token_ids[tokens], tokens)
        if not self.grad:
            return drows
        dhidden = torch.zeros_like(source, dtype=drows.dtype)
        dhidden.index_add_(0, before % max(1, len(source)), drows)
        if above is not None:
            above.dhidden[-1] += dhidden[-1]
            dhidden = dhidden[:-1]
        return dhidden

    def _lives_on(self, storage: int) -> bool:
        return storage in self.parameters or self.stack.holds(storage)
