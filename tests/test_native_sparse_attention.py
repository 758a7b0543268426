# SPDX-License-Identifier: Apache-2.0
"""palmette.nn.NativeSparseAttention: against a plain computation, its cache, and checkpoints of others."""

from __future__ import annotations

import contextlib
import copy
import itertools

import pytest
import torch
from palmette import testing
from palmette.nn import NativeSparseAttention, RotaryEmbedding, SparseKVCache
from palmette.nn import sparse_attention as sparse_module
from palmette.reference import sparse_attention as reference
from palmette.sparse_attention import attend_branches
from torch import Tensor, nn

SMALL = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 2,
    "window_size": 24,
}


def make(dtype: torch.dtype = torch.float32, **options) -> NativeSparseAttention:
    torch.manual_seed(1)
    module = NativeSparseAttention(32, 4, 2, 16, **(SMALL | options)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return module.requires_grad_(True)


def indptr(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


class MeanAndMax(nn.Module):
    """A map of whole blocks that is no linear one."""

    def forward(self, blocks: Tensor) -> Tensor:
        return blocks.mean(2) + blocks.amax(2)


OPTIONS = [
    {},
    {"gate": "token"},
    {"separate_kv": True},
    {"v_head_dim": 8},
    {"compression": "mean"},
    {"compression": "weighted", "v_head_dim": 24},
    {"compression": (MeanAndMax(), MeanAndMax())},
    {"topk": 3, "init_blocks": 0, "local_blocks": 1},
]


def plain(module: NativeSparseAttention, x: Tensor) -> Tensor:
    """One sequence, by the equations of the paper."""
    tokens, heads, group = len(x), module.num_kv_heads, module.num_q_heads // module.num_kv_heads
    at = torch.arange(tokens)
    q = module.rope((x @ module.proj_q.weight.T).view(tokens, heads * group, -1), at)
    branches = 3 if module.separate_kv else 1
    k = (x @ module.proj_k.weight.T).view(tokens, branches, heads, -1)
    v = (x @ module.proj_v.weight.T).view(tokens, branches, heads, -1)
    sizes = {"kernel_size": module.kernel_size, "kernel_stride": module.kernel_stride}
    if module.compression == "module":
        count = reference.num_compressed(tokens, **sizes)
        blocks = [
            [
                m(y[i * module.kernel_stride :][: module.kernel_size].transpose(0, 1)[None])[0]
                for i in range(count)
            ]
            for m, y in ((module.compress_key, k[:, 0]), (module.compress_value, v[:, 0]))
        ]
        k_cmp, v_cmp = (
            torch.stack(b) if b else y.new_zeros(0, *y.shape[2:]) for b, y in zip(blocks, (k, v), strict=True)
        )
    else:
        k_cmp = reference.compress(k[:, 0], module.compress_key, module.intra_block_pe, **sizes)
        v_cmp = reference.compress(v[:, 0], module.compress_value, None, **sizes)
    k_cmp = module.rope(k_cmp, torch.arange(len(k_cmp)) * module.kernel_stride)
    compressed, _ = reference.compressed_attention(q, k_cmp, v_cmp, tokens, **sizes)
    scores = reference.block_scores(q, k_cmp, tokens, block_size=module.block_size, **sizes)
    index = reference.select_blocks(
        scores,
        tokens,
        block_size=module.block_size,
        topk=module.topk,
        init_blocks=module.init_blocks,
        local_blocks=module.local_blocks,
    )
    turned = [module.rope(k[:, i], at) for i in range(branches)]
    selected, _ = reference.selected_attention(
        q, turned[min(1, branches - 1)], v[:, min(1, branches - 1)], index, block_size=module.block_size
    )
    windowed, _ = reference.sliding_window_attention(q, turned[-1], v[:, -1], window=module.window_size)
    gates = torch.sigmoid(x @ module.gate[0].weight.T).view(tokens, 3, -1, 1)
    mixed = gates[:, 0] * compressed + gates[:, 1] * selected + gates[:, 2] * windowed
    return mixed.flatten(1) @ module.proj_o.weight.T


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 63, 64, 65, 150])
def test_equals_the_equations(scalar_backend, tokens, options):
    """In float64, where no score is too close to call."""
    module = make(torch.float64, **options)
    x = torch.randn(tokens, 32, dtype=torch.float64)
    torch.testing.assert_close(module(x), plain(module, x))
    dense = tokens <= module.topk * module.block_size
    assert module.report.selection == ("dense" if dense else "blocks")


@pytest.mark.parametrize("options", OPTIONS[:4], ids=str)
def test_every_backend(backend, options):
    module = make(**options)
    x = torch.randn(150, 32)
    got = module(x)
    want = plain(copy.deepcopy(module).double(), x.double())
    testing.assert_accurate(got, want, plain(module, x), atol=2e-6)


def test_a_batch_is_its_sequences():
    module = make()
    x = torch.randn(3, 100, 32)
    got = module(x)
    assert got.shape == x.shape
    for a, b in zip(got, x, strict=True):
        # not equal: torch's sigmoid of the gates rounds the end of a tensor otherwise on some processors
        torch.testing.assert_close(a, module(b), rtol=1e-6, atol=1e-7)
    ends = torch.tensor([0, 100, 200, 300])
    assert torch.equal(module(x.flatten(0, 1), ends), got.flatten(0, 1))


def test_gradients_equal_those_of_the_equations(scalar_backend):
    module = make(torch.float64)
    x = torch.randn(150, 32, dtype=torch.float64, requires_grad=True)
    inputs = [x, *module.parameters()]
    got = torch.autograd.grad(module(x).cos().sum(), inputs)
    want = torch.autograd.grad(plain(module, x).cos().sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# ---- the cache


def cut(total: int, sizes: list[int]) -> list[int]:
    """Lengths of chunks of the given sizes, again and again."""
    chunks = []
    for size in itertools.cycle(sizes):
        if sum(chunks) + size >= total:
            return [*chunks, total - sum(chunks)]
        chunks.append(size)
    raise AssertionError


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("chunks", [[1], [3], [7, 1, 40], [64]], ids=str)
def test_decoding_equals_prefill_at_every_step(scalar_backend, chunks, options):
    module = make(torch.float64, **options).requires_grad_(False)
    x = torch.randn(130, 32, dtype=torch.float64)
    want = module(x)
    cache, at = SparseKVCache(), 0
    for n in cut(130, chunks):
        got = module(x[at : at + n], cache=cache)
        torch.testing.assert_close(got, want[at : at + n])
        at += n
    assert cache.lengths.tolist() == [130]


@torch.no_grad()
def test_ragged_batches(backend):
    """Sequences of different lengths that grow by different amounts, some by nothing."""
    module = make()
    lengths = [150, 1, 77, 0]
    x = [torch.randn(n, 32) for n in lengths]
    want = [module(y) if len(y) else y for y in x]
    cache, done = SparseKVCache(), [0] * 4
    for step in range(200):
        counts = [
            min((step * (b + 2)) % 5, n - d) for b, (n, d) in enumerate(zip(lengths, done, strict=True))
        ]
        if sum(counts) == 0 and done == lengths:
            break
        parts = [y[d : d + n] for y, d, n in zip(x, done, counts, strict=True)]
        ends = torch.tensor([0, *counts]).cumsum(0)
        got = module(torch.cat(parts), ends, cache).split(counts)
        for a, w, d, n in zip(got, want, done, counts, strict=True):
            torch.testing.assert_close(a, w[d : d + n], rtol=1e-4, atol=1e-5)
        done = [d + n for d, n in zip(done, counts, strict=True)]
        assert cache.lengths.tolist() == done
    assert done == lengths


@torch.no_grad()
def test_sequences_of_a_cache_can_be_copied():
    module = make()
    x = torch.randn(3, 90, 32)
    cache = SparseKVCache(max_length=128)
    module(x[:, :80], cache=cache)
    before = cache.nbytes
    cache.reorder(torch.tensor([2, 0, 0]))
    more = torch.stack([x[2, 80:], x[0, 80:], x[1, 80:]])
    got = module(more, cache=cache)
    assert abs(cache.nbytes - before) < before / 50  # but for tails, nothing has grown
    torch.testing.assert_close(got[:2], module(x[[2, 0]])[:, 80:], rtol=1e-4, atol=1e-5)


def test_cache_is_of_other_sequences():
    module, cache = make().requires_grad_(False), SparseKVCache()
    module(torch.randn(2, 5, 32), cache=cache)
    with pytest.raises(ValueError, match=r"^cache must be of 1 sequences, got one of 2$"):
        module(torch.randn(5, 32), cache=cache)


def test_gradients_and_a_cache():
    """Of what is put into an empty cache; what it keeps has none."""
    module, cache = make(), SparseKVCache()
    x = torch.randn(90, 32)
    want = torch.autograd.grad(module(x).cos().sum(), module.proj_k.weight)[0]
    got = torch.autograd.grad(module(x, cache=cache).cos().sum(), module.proj_k.weight)[0]
    assert torch.equal(got, want)
    with pytest.raises(
        ValueError, match=r"^cache must be empty where gradients are wanted, got one that hol"
    ):
        module(x, cache=cache)


@pytest.mark.parametrize("name", ["proj_k.weight", "proj_v.weight", "compress_value"])
def test_gradients_of_keys_and_a_cache(name):
    """Whatever of what the cache keeps wants a gradient."""
    module, cache = make().requires_grad_(False), SparseKVCache()
    x = torch.randn(40, 32)
    module(x, cache=cache)
    dict(module.named_parameters())[name].requires_grad_()
    with pytest.raises(
        ValueError, match=r"^cache must be empty where gradients are wanted, got one that hol"
    ):
        module(x[:2], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("failing", ["attend_branches", "packed_ends", "compressed_attention"])
def test_a_call_that_fails_leaves_the_cache_as_it_was(monkeypatch, failing):
    module = make()
    x = torch.randn(90, 32)
    want, cache = module(x), SparseKVCache()
    for begin, end in [(0, 70), (70, 73), (73, 74), (74, 90)]:
        for attempt in range(2):
            with monkeypatch.context() as patch:
                if attempt == 0:
                    patch.setattr(sparse_module, failing, raise_interrupt)
                    few = 0 if failing == "compressed_attention" else 64
                    patch.setattr(sparse_module, "FEW_QUERIES", few)
                    with contextlib.suppress(KeyboardInterrupt):
                        module(x[begin:end], cache=cache)
                    if cache.past != [begin]:
                        break  # the long prefill does without attend_branches
                else:
                    got = module(x[begin:end], cache=cache)
                    torch.testing.assert_close(got, want[begin:end], rtol=1e-4, atol=1e-5)
    assert cache.lengths.tolist() == [90]


def raise_interrupt(*_, **__):
    raise KeyboardInterrupt


@torch.no_grad()
def test_rows_of_another_dtype_are_refused():
    module, cache = make(), SparseKVCache()
    x = torch.randn(40, 32)
    module(x, cache=cache)
    with (
        pytest.raises(
            ValueError, match=r"^cache must be of rows \[2, 16\] of torch.bfloat16 as the tokens are"
        ),
        torch.autocast("cpu", torch.bfloat16),
    ):
        module(x[:1], cache=cache)
    want = module(torch.cat([x, x[:1]]))[40:]
    torch.testing.assert_close(module(x[:1], cache=cache), want, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_an_empty_cache_takes_other_sequences_after_a_failure(monkeypatch):
    module, cache = make(), SparseKVCache()
    with monkeypatch.context() as patch:
        patch.setattr(sparse_module, "attend_branches", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            module(torch.randn(2, 5, 32), cache=cache)
    x = torch.randn(30, 32)
    torch.testing.assert_close(module(x, cache=cache), module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("index", [torch.tensor([2]), torch.tensor([-1]), torch.tensor([0.0])], ids=str)
def test_bad_order_of_a_cache(index):
    cache = SparseKVCache()
    make().requires_grad_(False)(torch.randn(2, 5, 32), cache=cache)
    with pytest.raises(ValueError, match=r"^index must be"):
        cache.reorder(index)


def test_scale():
    module, other = make(), make(scale=0.7)
    x = torch.randn(150, 32)
    with torch.no_grad():
        assert not torch.allclose(module(x), other(x))
        other.proj_q.weight.mul_(0.25 / 0.7)
        torch.testing.assert_close(module(x), other(x), rtol=1e-4, atol=1e-5)


# ---- few queries: one operator for all branches


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_few_queries_in_one_call(backend, monkeypatch, options, dtype):
    """What the branches give one by one: short sequences, in which all blocks are chosen, and long ones."""
    module = make(dtype, **options)
    for lengths in ([150, 9, 0], [30, 9, 0]):
        x = torch.randn(sum(lengths), 32, dtype=dtype)
        more = torch.randn(4, 32, dtype=dtype)
        caches = SparseKVCache(), SparseKVCache()
        results = []
        for cache, most in zip(caches, (64, 0), strict=True):
            module(x, indptr(lengths), cache)
            calls = []
            monkeypatch.setattr(sparse_module, "FEW_QUERIES", most)
            monkeypatch.setattr(
                sparse_module,
                "attend_branches",
                lambda *a, _calls=calls, **b: _calls.append(1) or attend_branches(*a, **b),
            )
            results.append(module(more, indptr([2, 1, 1]), cache))
            assert len(calls) == (1 if most else 0)
        assert module.report.selection == ("blocks" if lengths[0] == 150 else "dense")
        size = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 4e-3}[dtype]
        torch.testing.assert_close(*results, rtol=size, atol=size)


def branches(**change):
    keys = torch.ones(80, 2, 8), torch.ones(80, 2, 8)
    arguments = {
        "q": torch.ones(2, 4, 8),
        "compressed": (torch.ones(9, 2, 8), torch.ones(9, 2, 8)),
        "selected": keys,
        "window": keys,
        "gates": torch.ones(2, 3, 1),
        "cu_seqlens": indptr([2]),
        "cu_seqlens_cmp": indptr([9]),
        "cu_seqlens_k": indptr([80]),
        "kernel_size": 16,
        "kernel_stride": 8,
        "block_size": 16,
        "topk": 3,
        "init_blocks": 1,
        "local_blocks": 1,
        "window_size": 20,
        "scale": None,
    }
    return arguments | change


def test_gradients_of_the_one_call():
    keys = torch.ones(80, 2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"^k_slc must not need a gradient, got one that does$"):
        attend_branches(**branches(selected=(keys, keys)))


def test_gradients_do_without_the_one_call(monkeypatch):
    monkeypatch.setattr(sparse_module, "attend_branches", None)
    module = make()
    x = torch.randn(40, 32)
    module(x).sum().backward()
    assert module.proj_q.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.ones(2, 8)}, r"^q must be \[Nq, Hq, D\], got \[2, 8\]$"),
        ({"q": torch.ones(2, 1, 8)}, r"^q must be of a positive multiple of k_cmp's 2 heads, got 1$"),
        ({"q": torch.ones(2, 4, 0)}, r"^k_cmp must be of q's positive head_dim 0, got 8$"),
        ({"cu_seqlens_cmp": indptr([5])}, r"^cu_seqlens_cmp must be 9 \(rows of k_cmp\) at its end, got 5$"),
        (
            {"topk": 30, "cu_seqlens_k": indptr([79])},
            r"^cu_seqlens_cmp must be such that sequence 0 of 79 tok",
        ),
        ({"topk": 1}, r"^topk must be at least init_blocks \+ local_blocks = 2, got 1$"),
        ({"block_size": 12}, r"^block_size must be a multiple of kernel_stride 8, got 12$"),
        ({"gates": torch.ones(2, 3, 3)}, r"^gates must be \[2, 3, 4 or 1\], got \[2, 3, 3\]$"),
        ({"gates": torch.ones(2, 3, 1).double()}, r"^gates must be float32, got float64$"),
        (
            {"window": (torch.ones(80, 1, 8), torch.ones(80, 1, 8))},
            r"^k_win must be of k_cmp's 2 heads, got 1$",
        ),
        (
            {"selected": (torch.ones(80, 2, 8), torch.ones(80, 2, 9))},
            r"^v_slc and v_win must be of v_cmp's head",
        ),
        ({"window_size": 0}, r"^window must be at least 1, got 0$"),
        ({"topk": 0}, r"^topk must be at least 1 and below 2\^31, got 0$"),
        ({"cu_seqlens": indptr([3])}, r"^cu_seqlens must be 2 \(rows of q\) at its end, got 3$"),
        ({"scale": float("nan")}, r"^scale must be a number in"),
        (
            {"starts": (torch.tensor([5]), None, None)},
            r"^k_starts or cmp_starts must be such that sequence 0",
        ),
    ],
    ids=str,
)
def test_bad_branches(change, message):
    assert attend_branches(**branches()).shape == (2, 4, 8)
    with pytest.raises(ValueError, match=message):
        attend_branches(**branches(**change))


# ---- checkpoints


def test_state_dicts_of_fsa_load():
    """Names and shapes of the public module (Flash-Sparse-Attention, NativeSparseAttention)."""
    hidden, heads, kv_heads, dim = 64, 8, 2, 16
    state = {
        "proj_q.weight": torch.randn(heads * dim, hidden),
        "proj_k.weight": torch.randn(kv_heads * dim, hidden),
        "proj_v.weight": torch.randn(kv_heads * dim, hidden),
        "proj_o.weight": torch.randn(hidden, heads * dim),
        "compress_key": torch.randn(kv_heads, 32 * dim, dim),
        "compress_value": torch.randn(kv_heads, 32 * dim, dim),
        "intra_block_pe": torch.randn(kv_heads, 32, dim),
        "gate.0.weight": torch.randn(3, hidden),
    }
    module = NativeSparseAttention(hidden, heads, kv_heads, dim, gate="token")
    module.load_state_dict(state)  # strict
    assert {name: tuple(p.shape) for name, p in module.state_dict().items()} == {
        name: tuple(p.shape) for name, p in state.items()
    }
    assert module(torch.randn(40, hidden)).shape == (40, hidden)


# ---- the rest


def test_autocast():
    module = make()
    x = torch.randn(2, 100, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), module(x), rtol=0.1, atol=0.1)
    y.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("shape", [(0, 5, 32), (2, 0, 32), (0, 32)])
@pytest.mark.parametrize("cached", [False, True])
def test_nothing_in_nothing_out(shape, cached):
    assert make()(torch.randn(shape), cache=SparseKVCache() if cached else None).shape == shape


@pytest.mark.parametrize("ends", [[0, 3, 5], [0, 30, 20], [1, 20]])
def test_bad_sequences(ends):
    with pytest.raises(
        ValueError, match=r"cu_seqlens must be non-decreasing from 0 to 20 \(rows of x\), got"
    ):
        make()(torch.randn(20, 32), torch.tensor(ends))


def test_rope_may_come_from_the_model():
    calls = []

    def rope(x, positions):
        calls.append((tuple(x.shape), positions.tolist()))
        return x

    module = make(rope=rope)
    module(torch.randn(20, 32))
    assert ((20, 4, 16), list(range(20))) in calls
    assert ((4, 2, 16), [0, 4, 8, 12]) in calls  # compressed keys, where their blocks begin


def test_rotary_embedding():
    rope = RotaryEmbedding(8)
    x, y = torch.randn(2, 1, 1, 8, dtype=torch.float64)

    def dot(a, b):
        return (rope(x, torch.tensor([a])) * rope(y, torch.tensor([b]))).sum()

    torch.testing.assert_close(dot(5, 3), dot(105, 103), rtol=1e-5, atol=1e-5)
    assert torch.equal(rope(x, torch.tensor([0])), x)
    with pytest.raises(ValueError, match="head_dim must be even and positive, got 7"):
        RotaryEmbedding(7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_kv_heads": 3}, r"^num_q_heads must be a multiple of num_kv_heads \(3\), got 4$"),
        ({"kernel_size": 10}, "^kernel_size must be a multiple of kernel_stride 4, got 10$"),
        ({"block_size": 18}, "^block_size must be a multiple of kernel_stride 4, got 18$"),
        ({"topk": 2}, r"^topk must be at least init_blocks \+ local_blocks = 3, got 2$"),
        ({"gate": "tokens"}, "^gate must be one of head, token, got 'tokens'$"),
        ({"compression": "max"}, "^compression must be one of mean, weighted, linear or a pair of modules"),
        ({"window_size": 0}, "^window_size must be an integer of at least 1, got 0$"),
    ],
)
def test_bad_options(options, message):
    sizes = {"hidden_size": 32, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 16}
    with pytest.raises(ValueError, match=message):
        NativeSparseAttention(**(sizes | SMALL | options))


def test_bad_input():
    module = make()
    with pytest.raises(ValueError, match=r"^x must be \[T, 32\] or \[B, N, 32\], got \[5, 31\]$"):
        module(torch.randn(5, 31))
    with pytest.raises(ValueError, match=r"^cu_seqlens must be None for x \[B, N, hidden\], got a tensor$"):
        module(torch.randn(2, 5, 32), torch.tensor([0, 10]))
