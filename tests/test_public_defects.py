# SPDX-License-Identifier: Apache-2.0
"""What public code of sparse attention gets wrong: its formula fails here, and ours does not.

The formulas are those of the public kernels (Flash-Sparse-Attention, native-sparse-attention-triton) in plain
PyTorch; what happens on a GPU (a tile that nobody launches, a read behind a row, an atomic) is imitated.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import palmette
import pytest
import torch
from palmette.nn import NativeSparseAttention, SparseKVCache
from palmette.reference import sparse_attention as reference
from test_sparse_attention import (
    BLOCK,
    OPTIONS,
    SIZES,
    check_selected,
    compressed,
    indptr,
    make,
    run_compressed,
    run_selection,
)
from torch import Tensor, nn


def logits(q: Tensor, k: Tensor) -> Tensor:
    """[H, Nq, N], of one query head per KV head."""
    return torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5


# ---- one maximum for all rows


def one_maximum(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """The first token's first logit is subtracted from every row's."""
    s = logits(q, k)
    p = (s - s[:, :1, :1]).exp().masked_fill(~seen, 0.0)
    return torch.einsum("hqk,khd->qhd", p / p.sum(-1, keepdim=True), v)


@pytest.mark.parametrize("factor", [3.0, 100.0])
def test_every_row_has_a_maximum(backend, factor):
    case = make([130], q_heads=2, head_dim=64, factor=10 * factor)
    own = torch.arange(130, dtype=torch.int32) // BLOCK
    index = (
        torch.stack([torch.zeros_like(own), torch.where(own > 0, own, -1)], 1).expand(2, 130, 2).contiguous()
    )
    seen = reference.sees_selected(index, 130, block_size=BLOCK)
    assert not one_maximum(case.q, case.k, case.v, seen).isfinite().all()
    out, _ = check_selected(case, index)
    assert out.isfinite().all()


# ---- the first head decides for its group


def test_the_whole_group_decides(backend):
    case = make([300], q_heads=8)
    k_cmp, _, ends = compressed(case)
    _, lse = run_compressed(case, *compressed(case))
    got = run_selection(case, k_cmp, lse, ends)

    def chosen(q: Tensor) -> Tensor:
        scores = reference.block_scores(q.double(), k_cmp.double(), 300, block_size=BLOCK, **SIZES)
        return reference.select_blocks(scores, 300, **OPTIONS)

    def agreement(a: Tensor, b: Tensor) -> float:
        return float((a == b).all(-1).double().mean())

    assert agreement(got, chosen(case.q)) > 0.999  # near ties may fall either way
    assert agreement(got, chosen(case.q[:, ::4])) < 0.9


# ---- rows left out


@pytest.mark.parametrize("tokens", [1, 2, 3, 6, 7, 11])
def test_every_row_is_computed(backend, tokens):
    case = make([tokens])
    index = torch.full((2, tokens, 2), -1, dtype=torch.int32)
    index[..., 0] = 0
    want, _ = reference.selected_attention(case.q, case.k, case.v, index, block_size=BLOCK)
    whole_tiles = torch.full_like(want, torch.nan)  # a grid of tokens // 4 tiles of 4 rows
    whole_tiles[: tokens // 4 * 4] = want[: tokens // 4 * 4]
    assert whole_tiles.isnan().any()
    check_selected(case, index)


# ---- head_dim that is no power of two


@pytest.mark.parametrize("head_dim", [40, 80, 96, 100, 192])
def test_no_read_behind_a_row(backend, head_dim):
    case = make([70], q_heads=2, head_dim=head_dim)
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    padded = 1 << (head_dim - 1).bit_length()

    def rows(x: Tensor) -> Tensor:
        """Of so many elements as the next power of two: without a mask, those of the next rows too."""
        flat = torch.cat([x.flatten(), torch.zeros(padded)])
        return flat.as_strided((*x.shape[:2], padded), (x.stride(0), x.stride(1), 1))

    p = (torch.einsum("qhd,khd->hqk", rows(case.q), rows(case.k)) * head_dim**-0.5).masked_fill(
        ~seen, -torch.inf
    )
    behind = torch.einsum("hqk,khd->qhd", p.softmax(-1), case.v)
    blocks = -(-70 // BLOCK)
    index = torch.arange(blocks, dtype=torch.int32).expand(2, 70, blocks)
    own = torch.arange(70)[:, None] // BLOCK
    index = torch.where(index <= own, index, -1).contiguous()
    want, _ = reference.selected_attention(case.q, case.k, case.v, index, block_size=BLOCK)
    assert (behind - want).abs().max() > 0.1
    check_selected(case, index)  # the check build of the emulator sees every read


# ---- memory

KV_HEADS, GROUP, CONTEXT = 2, 4, 65536


def measured(tokens: int) -> dict[str, int]:
    """Bytes of index and plan, and what calls take beside them, in a process of its own."""
    root = Path(__file__).parent.parent
    paths = [str(root), str(Path(palmette.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-m", "bench.sparse_memory", str(tokens), "1"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    )
    result: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_memory_grows_with_what_is_chosen():
    """The public index has a row of N for every block, and scores are a matrix of N * N / stride.

    One block that all queries choose makes partial results for every block: 17 GB per head at 64k.
    """
    tokens = 8192
    index_of_blocks = 4 * KV_HEADS * (tokens // 64) * tokens
    scores = 4 * KV_HEADS * GROUP * tokens * (tokens // 16)
    of_one_block = 4 * CONTEXT * (CONTEXT // 64) * 64
    assert of_one_block > 17e9
    ours = measured(tokens)
    assert ours["plan_bytes"] + ours["index_bytes"] < index_of_blocks / 2
    assert ours["select_extra_bytes"] < scores / 20


# ---- gradients by atomics


def test_gradients_are_added_in_one_order():
    """Windows overlap, so an element of dx is a sum, whose order an atomic leaves to the schedule."""
    tokens, size, stride = 515, 32, 16
    x = torch.randn(tokens, 2, 16, requires_grad=True)
    y, _ = palmette.compress(x, None, None, indptr([tokens]), kernel_size=size, kernel_stride=stride)
    dy = torch.randn_like(y) * torch.logspace(-4, 4, len(y))[:, None, None]

    def by_atomics(order: list[int]) -> Tensor:
        dx = torch.zeros_like(x)
        for i, part in itertools.product(order, range(4)):  # four blocks of threads share a window
            dx[i * stride : i * stride + size] += dy[i] * ((1 + part) / 10 / size)
        return dx

    forward = list(range(len(y)))
    assert not torch.equal(by_atomics(forward), by_atomics(forward[::-1]))
    want = torch.autograd.grad(y, x, dy, retain_graph=True)[0]
    assert all(torch.equal(torch.autograd.grad(y, x, dy, retain_graph=True)[0], want) for _ in range(10))


# ---- decoding at position 0


@torch.no_grad()
def test_a_step_stands_where_it_is(backend):
    """The public preview of decoding turns its query as at position 0, and takes one sequence."""
    torch.manual_seed(1)
    module = NativeSparseAttention(32, 4, 2, 16, kernel_size=8, kernel_stride=4, block_size=16, topk=4)
    x = torch.randn(2, 121, 32)
    want = module(x)[:, -1:]

    def step() -> Tensor:
        cache = SparseKVCache()
        module(x[:, :-1], cache=cache)
        return module(x[:, -1:], cache=cache)

    torch.testing.assert_close(step(), want, rtol=1e-4, atol=1e-5)

    class AtZero(nn.Module):
        def forward(self, y: Tensor, positions: Tensor) -> Tensor:
            return rope(y, positions * (len(positions) != 2))  # 2: the step's own tokens

    rope, module.rope = module.rope, AtZero()
    assert (step() - want).abs().max() > 1e-3
