# SPDX-License-Identifier: Apache-2.0
"""Verification of token trees: which of the drafted tokens the target accepts, and what becomes of their KV.

Speculative decoding drafts a tree of candidate tokens below the last committed one, runs the target once over
all of them, walks down from the root for as long as the target agrees, and moves the keys and values of the
accepted path to where the next step expects them.

On a GPU none of these functions waits for it, so nobody looks at values that only the GPU has: what would
have been a ValueError is told by the results (``verify_*``) or left to the caller (slots).
"""

from __future__ import annotations

import torch
from torch import Tensor

from palmette import _library
from palmette._checks import (
    FLOATING,
    INDEX,
    check_device,
    check_dim,
    check_dtype,
    check_shape,
    small_array_devices,
)
from palmette.tree import Tree

_ops = torch.ops.palmette


def token_tree_shape(tree: Tree) -> tuple[int, int]:
    """``(B, L)``: the number of roots, and of nodes on the longest path below one.

    Raises:
        ValueError: a node below a root holds no token or several; the message names it.
    """
    num_roots, max_depth = _library.call(_ops.verify_extent.default, tree.nodes, tree.counts).tolist()
    return num_roots, max_depth


def verify_greedy(
    tree: Tree, draft_tokens: Tensor, target_logits: Tensor, *, shape: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The longest path of drafted tokens that greedy decoding would have produced.

    From each root, the walk goes to the child whose token is the argmax of the logits at the current node,
    until there is none; that argmax is the bonus token, so every root gains at least one token. Logits of
    nodes that are not visited are not read.

    Args:
        tree: the token tree, or a forest of them (a batch). Every node below a root holds exactly one token;
            a root may hold any number (the committed tokens; its last one is what the drafts follow).
        draft_tokens: [M], int32 or int64, by node id, M = ``tree.num_nodes``; in [0, vocab) for live nodes
            below the roots. What it holds for roots and pruned ids is ignored. Among siblings with the same
            token the lowest id counts. On the CPU, or where the logits are: on a GPU its values are not
            checked, and a token out of range is never accepted.
        target_logits: [M, vocab], by node id, at a root those of its last token; float32, bfloat16 or float16
            (float64 on the scalar backend). Ties go to the lower token. Rows of pruned ids are ignored. On a
            GPU vocab is at most 2^21.
        shape: ``(B, L)`` of the result, where L may be more than the tree needs. Default:
            ``token_tree_shape(tree)``, which is read from the tree. With it, the call compiles into a graph
            (``torch.compile(fullgraph=True)``) and trees of different depth give results of one shape.

    Returns:
        accepted [B, L], int64: ids of the accepted nodes, the root not among them, -1 on the right. One row
        per root in order of root ids; L is the number of nodes on the longest path below a root, however many
        are accepted, so that shapes depend on the tree alone.
        num_accepted [B], int64, 0 .. L.
        bonus [B], int64: the token that the target adds behind the accepted ones.
        On a GPU a root that visits a row with a NaN raises nothing: its num_accepted, its bonus and its row
        of accepted are -1.

    Raises:
        ValueError: shapes, dtypes or devices do not match; a node below a root does not hold exactly one
            token; a draft token on the CPU is out of range; a visited row of logits on the CPU holds a NaN.

    Source: SpecInfer (arXiv 2305.09781), section 4.3, "VerifyGreedy"; the results are those of SGLang's
    ``verify_tree_greedy``.
    """
    num_roots, max_depth = token_tree_shape(tree) if shape is None else shape
    _check_rows("target_logits", target_logits, draft_tokens)
    accepted, num_accepted, bonus = _library.call(
        _ops.verify_greedy.default, tree.nodes, tree.counts, draft_tokens, target_logits, num_roots, max_depth
    )
    return accepted, num_accepted, bonus


def verify_sample(
    tree: Tree,
    draft_tokens: Tensor,
    target_probs: Tensor,
    *,
    generator: torch.Generator | None = None,
    shape: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A path of drafted tokens and a bonus token that follow the target's distribution exactly.

    At each node a token is drawn from the target's distribution there. If a child holds it, the child is
    accepted and the walk goes on; otherwise the token is the bonus. The tokens are draws from the target's
    own conditionals, so their joint distribution is the target's whatever was drafted, and a token that
    several siblings hold counts once. No scheme that knows nothing of the draft's distribution accepts more
    often: a node goes on with the probability that the target gives its children's tokens together.

    Args:
        tree: as for ``verify_greedy``.
        draft_tokens: [M], int32 or int64, as for ``verify_greedy``.
        target_probs: [M, vocab], by node id: the target's probabilities after temperature, top-k and the
            like; float32, bfloat16 or float16 (float64 on the scalar backend). A row is scaled to sum to 1
            exactly, and has to be within 1e-3 of that (2e-2 for 16-bit dtypes). On a GPU vocab is at most
            2^21.
        generator: draws one uniform number per root and level, [B, L + 1] in float64, so all backends agree.
            Default: torch's generator of the device.
        shape: ``(B, L)`` of the result, as for ``verify_greedy``.

    Returns:
        accepted [B, L], num_accepted [B] and bonus [B], all int64, as for ``verify_greedy``: on a GPU all -1
        for a root that visits a row with a NaN or a negative number, or one that does not sum to 1.

    Raises:
        ValueError: as for ``verify_greedy``; a visited row on the CPU holds a NaN or a negative number, or
            does not sum to 1.

    Source: token-tree verification by sampling from the target and matching: SpecInfer (arXiv 2305.09781),
    section 4.3, the naive-sampling form, which is exact for deterministic drafts.
    """
    num_roots, max_depth = token_tree_shape(tree) if shape is None else shape
    _check_rows("target_probs", target_probs, draft_tokens)
    size = (num_roots, max_depth + 1)
    device = target_probs.device
    if generator is None:
        uniforms = torch.rand(size, dtype=torch.float64, device=device)
    else:
        # from pinned memory, so that nothing waits for a GPU
        pin = generator.device.type == "cpu" and device.type == "cuda"
        uniforms = torch.rand(
            size, dtype=torch.float64, device=generator.device, generator=generator, pin_memory=pin
        )
        uniforms = uniforms.to(device, non_blocking=pin)
    accepted, num_accepted, bonus = _library.call(
        _ops.verify_sample.default,
        tree.nodes,
        tree.counts,
        draft_tokens,
        target_probs,
        uniforms,
        num_roots,
        max_depth,
    )
    return accepted, num_accepted, bonus


def compact_kv_(k_cache: Tensor, v_cache: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    """Moves rows of a KV cache in place, as if all sources were read before any destination was written.

    ``cache[dst_slots] = cache[src_slots]`` for both caches. On the CPU without a copy of the sources: moves
    run in an order in which no row is overwritten before it was read, and one spare row per thread breaks
    cycles. The order is found in O(n log n), independent of the size of the cache. On a GPU, where moves in
    an order would wait for each other, all sources are copied, and the copies to the destinations.

    Args:
        k_cache: [slots, Hk, D], v_cache: [slots, Hk, Dv]; any dtype, any strides with a contiguous last
            dimension. The two must not be the same memory, nor require gradients.
        src_slots: [n], int32 or int64, in [0, slots); a source may be read several times.
        dst_slots: [n], int32 or int64, in [0, slots), distinct. A row whose source is itself stays. Both are
            on the CPU, or both where the caches are. On a GPU their values are not checked: a slot out of
            range is memory of something else, and of a destination that comes twice the bytes are of either
            source.

    Raises:
        ValueError: shapes, dtypes or devices do not match; slots on the CPU are out of range or a destination
            comes twice; the message holds the value and its place. The caches are unchanged then.

    Source: after verification of a token tree, the KV of the accepted path is gathered (SpecInfer, arXiv
    2305.09781, section 4.3); sources and destinations overlap there.
    """
    check_dim("k_cache", k_cache, "[slots, Hk, D]")
    check_dim("v_cache", v_cache, "[slots, Hk, Dv]")
    if v_cache.shape[:2] != k_cache.shape[:2]:
        wanted = f"[{k_cache.shape[0]}, {k_cache.shape[1]}, Dv] like k_cache"
        raise ValueError(f"v_cache must be {wanted}, got {list(v_cache.shape)}")
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check_device(name, cache, k_cache.device)
        if cache.requires_grad:
            raise ValueError(f"{name} must not require gradients, got requires_grad=True")
        if cache.shape[-1] > 1 and cache.stride(-1) != 1 and cache.numel() > 0:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {list(cache.stride())}"
            )
    places = small_array_devices(k_cache.device)
    for name, slots in (("src_slots", src_slots), ("dst_slots", dst_slots)):
        check_dtype(name, slots, INDEX)
        check_dim(name, slots, "[n]")
        check_device(name, slots, *places)
        places = (slots.device,)  # both in one place
    check_shape("dst_slots", dst_slots, "[n]", src_slots.shape)
    _library.call(_ops.compact_kv_.default, k_cache, v_cache, src_slots, dst_slots)


def _check_rows(name: str, rows: Tensor, draft_tokens: Tensor) -> None:
    check_dtype(name, rows, FLOATING)
    check_dim(name, rows, "[M, vocab]")
    check_dtype("draft_tokens", draft_tokens, INDEX)
    check_dim("draft_tokens", draft_tokens, "[M]")
    check_device("draft_tokens", draft_tokens, *small_array_devices(rows.device))


@torch.library.register_fake("palmette::verify_extent")
def _verify_extent_fake(nodes: Tensor, tree_counts: Tensor) -> Tensor:
    return tree_counts.new_empty((2,), dtype=torch.int64)


def _verified_fake(rows: Tensor, num_roots: int, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    accepted = rows.new_empty((num_roots, max_depth), dtype=torch.int64)
    return (
        accepted,
        rows.new_empty((num_roots,), dtype=torch.int64),
        rows.new_empty((num_roots,), dtype=torch.int64),
    )


@torch.library.register_fake("palmette::verify_greedy")
def _verify_greedy_fake(
    nodes: Tensor,
    tree_counts: Tensor,
    draft_tokens: Tensor,
    target_logits: Tensor,
    num_roots: int,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _verified_fake(target_logits, num_roots, max_depth)


@torch.library.register_fake("palmette::verify_sample")
def _verify_sample_fake(
    nodes: Tensor,
    tree_counts: Tensor,
    draft_tokens: Tensor,
    target_probs: Tensor,
    uniforms: Tensor,
    num_roots: int,
    max_depth: int,
) -> tuple[Tensor, Tensor, Tensor]:
    return _verified_fake(target_probs, num_roots, max_depth)


@torch.library.register_fake("palmette::compact_kv_")
def _compact_kv_fake(k_cache: Tensor, v_cache: Tensor, src_slots: Tensor, dst_slots: Tensor) -> None:
    return None
