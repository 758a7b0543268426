# SPDX-License-Identifier: Apache-2.0
"""One step of speculative decoding with token trees, on the leaves of a ``TreeDecoder``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .records import TreeBatch, Verified
from .sampling import logprobs_of
from .token_trees import TokenTree

if TYPE_CHECKING:
    from .tree_decoding import TreeDecoder


def verify_leaves(
    decoder: TreeDecoder,
    drafts: TokenTree,
    draft_tokens: torch.Tensor,
    leaves: Sequence[int],
    to_probabilities: Callable[[torch.Tensor], torch.Tensor] | None,
    generator: torch.Generator | None,
    on_logits: Callable[[torch.Tensor], None] | None = None,
) -> list[Verified]:
    """Verify a token tree below each leaf's pending token; see ``TreeDecoder.verify_step``.

    Args:
        decoder: Every leaf has a pending token.
        drafts: The token tree.
        draft_tokens: int64 [leaves, len(drafts)], in the order of the paths.
        leaves: Which leaves.
        to_probabilities: The distribution to sample from, of logits [n, vocab]; None: greedy.
        generator: Source of the draws.
        on_logits: Called with the model's logits.
    """
    from palmette import verify_greedy, verify_sample

    size = 1 + len(drafts)
    open_rows = [row for row, leaf in enumerate(leaves) if not decoder._is_at_end(leaf)]
    open_leaves = [leaves[row] for row in open_rows]
    # slots that continue each leaf's own, so that what is accepted ends up right behind them
    slots = decoder._reserve(dict.fromkeys(open_leaves, size), ahead=size - 1 - max(drafts.depth))
    tokens, _ = decoder._take_pending(leaves)
    # what stays of those whose pending token is an end token
    outcome = {leaf: Verified(leaf, [token], 0) for leaf, token in zip(leaves, tokens, strict=True)}
    if not open_leaves:
        return list(outcome.values())
    # per leaf the pending token, then the drafts depth-first
    rows = torch.cat([torch.tensor(tokens)[open_rows, None], draft_tokens[open_rows][:, drafts.order]], dim=1)
    batch = _batch(decoder, drafts, open_leaves, rows, slots)
    logits = decoder._forward(batch)
    if on_logits is not None:
        on_logits(logits)

    tree = _token_forest(drafts, len(open_leaves))
    if to_probabilities is None:
        accepted, num_accepted, bonus = verify_greedy(tree, rows.flatten(), logits)
    else:
        accepted, num_accepted, bonus = verify_sample(
            tree, rows.flatten(), to_probabilities(logits), generator=generator
        )
    for index, leaf in enumerate(open_leaves):
        path = (accepted[index, : int(num_accepted[index])] - index * size).tolist()
        count = _commit(
            decoder, leaf, rows[index].tolist(), logits[index * size : (index + 1) * size], path, slots[leaf]
        )
        record = decoder.node(leaf)
        outcome[leaf] = Verified(leaf, [tokens[open_rows[index]], *rows[index, path[:count]].tolist()], count)
        if record.finished:
            continue
        end = index * size + (path[-1] if path else 0)
        record.logits = logits[end]
        next_token = bonus[index : index + 1].long()
        record.pending = (int(next_token), float(logprobs_of(logits[end : end + 1], next_token)))
    decoder._last = ([], torch.empty(0))
    return list(outcome.values())


def _batch(
    decoder: TreeDecoder,
    drafts: TokenTree,
    leaves: Sequence[int],
    rows: torch.Tensor,
    slots: dict[int, list[int]],
) -> TreeBatch:
    """The forward over pending tokens and drafts, along a tree of its own that is gone after the step."""
    from palmette import Tree

    size = rows.shape[1]
    number: dict[int, int] = {}
    parent: list[int] = []
    counts: list[int] = []
    order: list[int] = []  # slots, depth-first

    def add(above: int, held: Sequence[int]) -> int:
        parent.append(above)
        counts.append(len(held))
        order.extend(held)
        return len(parent) - 1

    children: dict[int, list[int]] = {}
    on_path = {node for leaf in leaves for node in decoder.path(leaf)}
    for node in sorted(on_path):
        children.setdefault(decoder.node(node).parent, []).append(node)
    first_draft: dict[int, int] = {}
    stack = children[-1][::-1]
    while stack:
        node = stack.pop()
        record = decoder.node(node)
        held = [*record.slots, *slots[node][:1]] if node in slots else record.slots
        number[node] = add(number.get(record.parent, -1), held)
        if node in slots:
            first_draft[node] = len(parent)
            for draft, above in enumerate(drafts.parent):
                add(
                    first_draft[node] + above if above >= 0 else number[node],
                    slots[node][draft + 1 : draft + 2],
                )
        stack.extend(reversed(children.get(node, [])))

    query_nodes, offsets, positions = [], [], []
    for leaf in leaves:
        record = decoder.node(leaf)
        query_nodes += [number[leaf], *range(first_draft[leaf], first_draft[leaf] + size - 1)]
        offsets += [len(record.tokens)] + [0] * (size - 1)
        positions += [record.start + len(record.tokens) + depth for depth in [0, *drafts.depth]]
    draft_parents = []
    for index in range(len(leaves)):
        draft_parents += [-1] + [index * size + 1 + above for above in drafts.parent]
    return TreeBatch(
        tree=Tree(parent, counts, torch.tensor(order)),
        queries=(torch.tensor(query_nodes), torch.tensor(offsets)),
        nodes=[leaf for leaf in leaves for _ in range(size)],
        draft_parents=draft_parents,
        tokens=rows.flatten(),
        positions=torch.tensor(positions),
        slots=torch.tensor([slot for leaf in leaves for slot in slots[leaf]]),
        keep=torch.arange(rows.numel()),
    )


def _token_forest(drafts: TokenTree, count: int) -> Any:
    """One token tree per leaf, every node one token; the roots are the pending tokens."""
    from palmette import Tree

    parent: list[int] = []
    for _ in range(count):
        root = len(parent)
        parent += [-1, *(root + 1 + above for above in drafts.parent)]
    return Tree(parent, [1] * len(parent))


def _commit(
    decoder: TreeDecoder,
    leaf: int,
    tokens: Sequence[int],
    logits: torch.Tensor,
    path: Sequence[int],
    slots: Sequence[int],
) -> int:
    """Make the pending token and the accepted path part of the leaf; returns how many drafts were kept."""
    record = decoder.node(leaf)
    ends = [index for index, node in enumerate(path) if tokens[node] in decoder.eos_token_ids]
    kept = path[: ends[0] + 1] if ends else path
    stored = kept[:-1] if ends else kept  # an end token is recorded, not decoded
    held = slots[: 1 + len(stored)]
    decoder._compact(leaf, [slots[node] for node in [0, *stored]], held)
    decoder._pool.release(slots[len(held) :], [*record.slots, *held])
    decoder.tree.append(torch.tensor([leaf]), torch.tensor([len(held)]), torch.tensor(held))
    above = torch.tensor([0, *kept[:-1]], dtype=torch.long)
    if kept:
        record.score += float(logprobs_of(logits[above], torch.tensor([tokens[node] for node in kept])).sum())
    record.slots.extend(held)
    record.tokens.extend([tokens[0], *(tokens[node] for node in kept)])
    if ends:
        record.finished, record.logits = True, None
    return len(kept)
