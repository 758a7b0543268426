# SPDX-License-Identifier: Apache-2.0
"""What is particular to csrc/verify's GPU kernels: schedules, what they read, results in place of errors.

What they compute is in test_verify.py, test_verify_sample.py and test_compact_kv.py, for all backends.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import pytest
import torch
from palmette import Tree, _library, compact_kv_, testing, verify_greedy, verify_sample
from palmette.reference import verify as reference
from token_trees import DTYPES, assert_same, token_tree
from torch import Tensor

EMULATORS = [name for name in testing.EMULATORS if name in testing.backends()]
needs_emulator = pytest.mark.skipif(len(EMULATORS) < 2, reason="the emulators are not built")
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.ops.palmette._gpu_kernels("cuda"),
    reason="no GPU, or no kernels for it",
)

SCHEDULES = (("forward", 1), ("reverse", 1), ("random", 3))


def deep_walks(dtype: torch.dtype, vocab: int) -> tuple[list[int], Tensor, Tensor]:
    """(parent, draft tokens, probabilities): seven walks of up to four nodes, at every node three children.

    Most of a row's probability is on one token, which a child of most nodes holds.
    """
    parent = [-1] * 7
    for node in range(7 * 13):  # three levels below the roots
        parent += [node] * 3
    top = torch.randint(0, vocab, (len(parent),))
    tokens = torch.randint(0, vocab, (len(parent),))
    for node, up in enumerate(parent):
        if up >= 0 and node % 3 == up % 3:
            tokens[node] = top[up]
    logits = torch.randn(len(parent), vocab)
    logits[torch.arange(len(parent)), top] = math.log(vocab) + 4
    return parent, tokens, torch.softmax(logits, dim=-1).to(dtype)


@needs_emulator
@pytest.mark.parametrize("name", EMULATORS)
@pytest.mark.parametrize("warp_size", [32, 64])
@pytest.mark.parametrize(("order", "seed"), SCHEDULES)
def test_schedules(name, order, seed, warp_size):
    """Blocks of 1, 3 and 32 groups of lanes; rows that begin anywhere."""
    for vocab, dtype in ((37, torch.float32), (5003, torch.bfloat16), (5003, torch.float32)):
        parent, tokens, probs = deep_walks(dtype, vocab)
        tree = token_tree(parent)
        want_greedy = verify_greedy(tree, tokens, probs)
        want_sampled = verify_sample(tree, tokens, probs, generator=torch.Generator().manual_seed(2))
        assert max(want_greedy[1]) == 3
        assert max(want_sampled[1]) == 3
        k, v = torch.randn(50, 3, 40).to(dtype), torch.randn(3, 50, 7).to(dtype).transpose(0, 1)
        src, dst = torch.randperm(50)[:30], torch.randperm(50)[:30]
        want_k, want_v = k.clone(), v.clone()
        reference.compact_kv_(want_k, want_v, src, dst)
        with testing.backend(name), testing.emulator(order=order, seed=seed, warp_size=warp_size):
            assert_same(verify_greedy(tree, tokens, probs), want_greedy)
            generator = torch.Generator().manual_seed(2)
            assert_same(verify_sample(tree, tokens, probs, generator=generator), want_sampled)
            compact_kv_(k, v, src, dst)
        assert torch.equal(k, want_k)
        assert torch.equal(v, want_v)


# ---- what is read


@needs_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [3, 65, 1500, 5003])
def test_a_visited_row_is_read_once(dtype, vocab):
    """Sampling reads a chunk of 512 once more, to find the token in it."""
    parent, tokens, probs = deep_walks(dtype, vocab)
    tree, row_bytes = token_tree(parent), vocab * probs.element_size()
    with testing.backend("emulated_check"):
        visited = int((verify_greedy(tree, tokens, probs)[1] + 1).sum())
        assert testing.traffic("target_logits").read == visited * row_bytes
        visited = int((verify_sample(tree, tokens, probs)[1] + 1).sum())
        read = testing.traffic("target_probs").read
    chunk_bytes = min(vocab, 512) * probs.element_size()
    last_bytes = (vocab % 512 or 512) * probs.element_size()
    assert visited * (row_bytes + last_bytes) <= read <= visited * (row_bytes + chunk_bytes)


@needs_emulator
def test_moved_rows_are_read_once_and_written_once():
    k, v = torch.randn(40, 4, 16), torch.randn(40, 4, 24).half()
    with testing.backend("emulated_check"):
        compact_kv_(k, v, torch.arange(10, 20), torch.arange(15, 25))
        assert testing.traffic("scratch") == testing.Traffic(10 * 4 * (16 * 4 + 24 * 2), 0, 0)
        assert testing.traffic("k_cache") == testing.Traffic(0, 10 * 4 * 16 * 4, 0)
        assert testing.traffic("v_cache") == testing.Traffic(0, 10 * 4 * 24 * 2, 0)


@needs_emulator
def test_the_widest_row():
    tree, draft = Tree([-1], [1]), torch.tensor([0])
    wide = torch.zeros(1, 1).expand(1, 2**21 + 1)
    with testing.backend("emulated"):
        for verify, name in ((verify_greedy, "target_logits"), (verify_sample, "target_probs")):
            message = f"^{name} must be at most 2097152 tokens wide on a GPU, got 2097153$"
            with pytest.raises(ValueError, match=message):
                verify(tree, draft, wide)
        probs = torch.zeros(1, 2**21)
        probs[0, -1] = 1
        assert verify_greedy(tree, draft, probs)[2].tolist() == [2**21 - 1]
        assert verify_sample(tree, draft, probs)[2].tolist() == [2**21 - 1]


@needs_emulator
def test_the_longest_row_of_a_cache():
    k, v = torch.empty(1, 1, 2**31, dtype=torch.uint8), torch.empty(1, 1, 0)  # never touched
    slot = torch.zeros(1, dtype=torch.int64)
    message = "^{} must be rows of less than 2 GiB on a GPU, got 2147483648 bytes$"
    with testing.backend("emulated"):
        with pytest.raises(ValueError, match=message.format("k_cache")):
            compact_kv_(k, v, slot, slot)
        with pytest.raises(ValueError, match=message.format("v_cache")):
            compact_kv_(v, k, slot, slot)


# ---- what a GPU returns where the CPU raises: seen by calling a kernel without the operator around it


class Params(ctypes.Structure):
    """VerifyParams of csrc/verify/params.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("first_child", "next_sibling", "token", "root")),
        ("num_roots", ctypes.c_int64),
        ("max_depth", ctypes.c_int64),
        ("rows", ctypes.c_void_p),
        ("row_stride", ctypes.c_int64),
        ("vocab", ctypes.c_int64),
        ("dtype", ctypes.c_int),
        ("uniforms", ctypes.c_void_p),
        ("tolerance", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("accepted", "num_accepted", "bonus", "fault")),
    )


class Context(ctypes.Structure):
    """LaunchContext of csrc/gpu/library.h."""

    _fields_ = (
        ("stream", ctypes.c_void_p),
        ("extents", ctypes.c_void_p),
        ("num_extents", ctypes.c_size_t),
        ("workers", ctypes.c_int),
    )


class Kernel(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("params_bytes", ctypes.c_size_t),
        ("launch", ctypes.CFUNCTYPE(None, ctypes.POINTER(Params), ctypes.POINTER(Context))),
    )


class Kernels(ctypes.Structure):
    _fields_ = (
        ("backend", ctypes.c_char_p),
        ("kernels", ctypes.POINTER(Kernel)),
        ("num_kernels", ctypes.c_size_t),
    )


def run_kernel(
    children: Sequence[int], rows: Tensor, uniforms: Tensor | None, token: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Roots 0 and 1, node 2 below one of them: ``children[root]`` is 2 or -1. L is 3."""
    library = ctypes.CDLL(str(_library.LIBRARY.parent / "libpalmette_emulated.so"))
    library.palmette_gpu_library.restype = ctypes.POINTER(Kernels)
    found = library.palmette_gpu_library().contents
    wanted = b"verify_greedy" if uniforms is None else b"verify_sample"
    (kernel,) = (k for k in found.kernels[: found.num_kernels] if k.name == wanted)
    assert kernel.params_bytes == ctypes.sizeof(Params)
    first, following = torch.tensor([*children, -1]).int(), torch.tensor([1, -1, -1]).int()
    tokens, roots = torch.tensor(token), torch.tensor([0, 1]).int()
    accepted, num_accepted, bonus = (torch.full(s, -77) for s in ((2, 3), (2,), (2,)))
    fault = torch.full((2, 4), -77)
    kernel.launch(
        Params(
            *(t.data_ptr() for t in (first, following, tokens, roots)),
            2,
            3,
            rows.data_ptr(),
            rows.stride(0),
            rows.shape[1],
            0,
            None if uniforms is None else uniforms.data_ptr(),
            1e-3,
            *(t.data_ptr() for t in (accepted, num_accepted, bonus, fault)),
        ),
        Context(None, None, 0, 1),
    )
    return accepted, num_accepted, bonus


@needs_emulator
@pytest.mark.parametrize(
    ("value", "where", "bad"),
    [(math.nan, 2, [1]), (math.nan, 1, [1]), (-1.0, 2, [1]), (0.5, 2, [1]), (math.nan, 0, [0])],
)
@pytest.mark.parametrize("uniforms", [None, torch.full((2, 4), 0.5).double()], ids=["greedy", "sample"])
def test_results_of_a_root_that_visits_a_bad_row(uniforms, value, where, bad):
    rows = torch.zeros(3, 600)
    rows[0, 3] = rows[1, 4] = rows[2, 550] = 1.0
    want = [[[-1, -1, -1], 0, 3], [[2, -1, -1], 1, 550]]
    rows[where, 200] = value
    if uniforms is not None or math.isnan(value):
        for root in bad:
            want[root] = [[-1, -1, -1], -1, -1]
    accepted, num_accepted, bonus = run_kernel([-1, 2], rows, uniforms, [0, 0, 4])
    assert [
        list(got) for got in zip(accepted.tolist(), num_accepted.tolist(), bonus.tolist(), strict=True)
    ] == want


@needs_emulator
def test_a_bad_row_ends_the_walk_although_a_child_holds_minus_one():
    rows = torch.zeros(3, 600)
    rows[1, 5] = math.nan
    accepted, num_accepted, bonus = run_kernel([-1, 2], rows, None, [0, 0, -1])
    assert accepted.tolist() == [[-1] * 3] * 2
    assert (num_accepted.tolist(), bonus.tolist()) == ([0, -1], [0, -1])


@needs_emulator
@pytest.mark.parametrize("token", [-1, -5, 2**40 + 4, 600])
def test_tokens_out_of_range_are_not_accepted(token):
    rows = torch.zeros(3, 600)
    rows[:, 4] = 1.0
    accepted, num_accepted, bonus = run_kernel([-1, 2], rows, None, [0, 0, token])
    assert accepted.tolist() == [[-1] * 3] * 2
    assert num_accepted.tolist() == [0, 0]
    assert bonus.tolist() == [4, 4]


@needs_emulator
@pytest.mark.parametrize("uniform", [-math.inf, -0.25, 1.0, 17.0, math.inf, math.nan])
@pytest.mark.parametrize("vocab", [1, 31, 600, 2000])
def test_uniform_numbers_out_of_range_draw_some_token(uniform, vocab):
    """They are not looked at on a GPU; no memory but the row's is read for them."""
    chunk = 0 if uniform < 0 else (vocab - 1) // 512
    for place in {0, vocab - 1}:
        rows = torch.zeros(3, vocab)
        rows[:, place] = 1.0
        _, num_accepted, bonus = run_kernel([-1, -1], rows, torch.full((2, 4), uniform).double(), [0, 0, 0])
        assert num_accepted.tolist() == [0, 0]
        assert all(token in range(512 * chunk, min(vocab, 512 * chunk + 512)) for token in bonus.tolist())


# ---- a GPU


@needs_gpu
@pytest.mark.parametrize("tokens_on", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gpu_agrees_with_the_cpu(dtype, tokens_on):
    parent, tokens, probs = deep_walks(dtype, 5003)
    tree = token_tree(parent)
    device_tokens, device_probs = tokens.to(tokens_on), probs.cuda()
    want = verify_greedy(tree, tokens, probs)
    assert_same([x.cpu() for x in verify_greedy(tree, device_tokens, device_probs)], want)
    want = verify_sample(tree, tokens, probs, generator=torch.Generator().manual_seed(2))
    got = verify_sample(tree, device_tokens, device_probs, generator=torch.Generator().manual_seed(2))
    assert_same([x.cpu() for x in got], want)
    k, v = torch.randn(50, 3, 40).to(dtype), torch.randn(3, 50, 7).to(dtype).transpose(0, 1)
    src, dst = torch.randperm(50)[:30], torch.randperm(50)[:30]
    device_k, device_v = k.cuda(), v.cuda()
    compact_kv_(k, v, src, dst)
    compact_kv_(device_k, device_v, src.to(tokens_on), dst.to(tokens_on))
    assert torch.equal(device_k.cpu(), k)
    assert torch.equal(device_v.cpu(), v)


@needs_gpu
def test_a_gpu_tells_bad_rows_by_its_results():
    tree, tokens = token_tree([-1, 0, -1]), torch.tensor([0, 4, 0])
    logits = torch.zeros(3, 600, device="cuda")
    logits[:, 4] = 1.0
    logits[1, 100] = math.nan
    accepted, num_accepted, bonus = verify_greedy(tree, tokens, logits)
    assert (accepted.tolist(), num_accepted.tolist(), bonus.tolist()) == ([[-1], [-1]], [-1, 0], [-1, 4])
