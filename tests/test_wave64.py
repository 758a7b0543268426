# SPDX-License-Identifier: Apache-2.0
"""GPU kernels where a wave has 64 lanes, as on some AMD GPUs: two groups of 32 that may part, no tensor
cores, and 64 KB of shared memory."""

from __future__ import annotations

from collections.abc import Iterator

import palmette
import pytest
import torch
from palmette import testing
from palmette.reference import merge as merge_reference
from palmette.testing import assert_accurate
from test_merge import states
from test_tree_attention import check, expected, make_case

EMULATORS = [name for name in testing.EMULATORS if name in testing.backends()]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
AMD = {"warp_size": 64, "shared_limit": 64 << 10}
FOREST = ([-1, 0, 0, 1, 1, 2, -1, 6], [70, 5, 33, 1, 0, 17, 9, 3])

pytestmark = pytest.mark.skipif(len(EMULATORS) < 2, reason="the emulators are not built")


@pytest.fixture(params=testing.EMULATORS)
def wave64(request: pytest.FixtureRequest) -> Iterator[str]:
    with testing.backend(request.param), testing.emulator(**AMD):
        yield request.param


# ---- merge_states


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [5, 64])
def test_merge(wave64, dtype, head_dim):
    """Ragged, so that the two groups of a wave read different numbers of states; an odd number of groups."""
    counts = [0, 3, 1, 70, 0, 7, 33]
    outs, lses = states(sum(counts), 3, head_dim, dtype=dtype, empty=0.2)
    outs = outs.nan_to_num()  # of empty states: gradients of the reference would be NaN
    indptr = torch.tensor([0, *counts]).cumsum(0)
    dout, dlse = torch.randn(len(counts), 3, head_dim).to(dtype), torch.randn(len(counts), 3)

    def run(merge, outs, lses):
        outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
        out, lse = merge(outs, lses, indptr)
        some = ~torch.isneginf(lse)
        loss = (out * dout.to(out.dtype)).sum() + (lse[some] * dlse.to(lse.dtype)[some]).sum()
        return out, lse, *torch.autograd.grad(loss, (outs, lses))

    got = run(palmette.merge_states, outs, lses)
    want = run(merge_reference.merge_states, outs.double(), lses.double())
    rounding = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    for name, a, b, atol in zip(
        ("out", "lse", "douts", "dlses"),
        got,
        want,
        (rounding, 2e-6, rounding, rounding * head_dim**0.5 * 3),
        strict=True,
    ):
        assert_accurate(a, b, atol=atol, name=name)


# ---- attend


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", ["leaves", "tokens"])
@pytest.mark.parametrize("split", ["flatten", "sequence"])
def test_trees(wave64, dtype, queries, split):
    check(make_case(*FOREST, queries, dtype=dtype, split=split, block_len=50))


@pytest.mark.parametrize("leaves", [1, 17, 33, 70])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_leave_groups_idle(wave64, dtype, leaves):
    """Some of a wave's groups have no rows, or no keys."""
    check(make_case([-1] + [0] * leaves, [100] + [3] * leaves, q_heads=1, kv_heads=1, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("segments", [31, 33, 97])
def test_many_short_segments(wave64, dtype, segments):
    for tokens in (1, 3):
        case = make_case(
            [-1] + [0] * segments,
            [7] + [tokens] * segments,
            "tokens",
            q_heads=1,
            kv_heads=1,
            dtype=dtype,
            split="flatten",
            block_len=500,
        )
        check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("window", [1, 9])
@pytest.mark.parametrize("queries", ["leaves", "tokens"])
def test_windows(wave64, dtype, window, queries):
    check(make_case(*FOREST, queries, window=window, dtype=dtype), window=window)


def test_what_the_products_cannot_say(wave64):
    """inf in a row of V sends some rows, and so some groups of a wave, the slow way."""
    case = make_case([-1, 0, 0, 0, 2], [20, 6, 6, 6, 3], "tokens", head_dim=16)
    case.v[22] = torch.inf
    out = palmette.tree_attention(case.q, case.k, case.v, case.plan)
    sees = case.visible[:, 22]
    assert torch.isfinite(out[~sees]).all()
    assert not torch.isfinite(out[sees]).any()


# ---- gradients


def everything(case, *, sinks=None, douts=None, **options):
    """out, lse and the gradients of q, k, v and sinks."""
    inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v, sinks) if x is not None]
    extra = {} if sinks is None else {"sinks": inputs[3]}
    out, lse = palmette.tree_attention(*inputs[:3], case.plan, return_lse=True, **options, **extra)
    dout, dlse = douts or (torch.cos(out.detach()), torch.sin(lse.detach()))
    torch.autograd.backward([out, lse], [dout, dlse])
    return [out, lse, *(x.grad for x in inputs)]


def reference(case, dtype, dout, dlse, *, sinks=None, window=None, **options):
    inputs = [x.to(dtype).requires_grad_() for x in (case.q, case.k, case.v, sinks) if x is not None]
    extra = {} if sinks is None else {"sinks": inputs[3]}
    outs = expected(case._replace(q=inputs[0], k=inputs[1], v=inputs[2]), dtype, **options, **extra)
    torch.autograd.backward(outs, [dout.to(dtype), dlse.to(outs[1].dtype)])
    return [x.grad for x in inputs]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("queries", ["leaves", "tokens"])
@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 4.0, "sinks": True}], ids=str)
def test_gradients(wave64, dtype, queries, options):
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.randn(6)
    case = make_case(
        *FOREST,
        queries,
        q_heads=6,
        v_head_dim=24,
        dtype=dtype,
        window=options.get("window"),
        split="flatten",
    )
    douts = torch.randn(*case.q.shape[:2], 24).to(dtype), torch.randn(case.q.shape[:2])
    got = everything(case, douts=douts, **options)[2:]
    want = reference(case, torch.float64, *douts, **options)
    base = reference(case, dtype, *douts, **options)
    for name, a, b, c in zip(("dq", "dk", "dv", "dsinks"), got, want, base, strict=False):
        # as in test_tree_attention.py
        atol = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
        assert_accurate(a, b, c, factor=3.0, atol=atol, name=name)


def test_many_short_segments_have_gradients(wave64):
    case = make_case([-1] + [0] * 70, [7] + [2] * 70, "tokens", split="flatten", block_len=500, head_dim=16)
    douts = torch.randn_like(case.q), torch.randn(case.q.shape[:2])
    got = everything(case, douts=douts)[2:]
    for name, a, b in zip(("dq", "dk", "dv"), got, reference(case, torch.float64, *douts), strict=True):
        assert_accurate(a, b, atol=1e-5, name=name)


@pytest.mark.parametrize("queries", ["leaves", "tokens"])
def test_float32_is_the_same_for_waves_of_32_and_of_64(queries):
    """Groups of 32 lanes do the same work in the same order, whatever they are half of."""
    case = make_case([-1, 0, 0, 1], [70, 9, 40, 5], queries, q_heads=6, split="flatten", block_len=48)
    with testing.backend("emulated"):
        want = everything(case)
        for order in ({}, {"order": "reverse"}, {"order": "random", "seed": 5}):
            with testing.emulator(**AMD, **order):
                got = everything(case)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- shared memory


@pytest.mark.parametrize(
    ("dtype", "forward", "backward"), [(torch.bfloat16, 144, 112), (torch.float32, 112, 80)], ids=str
)
def test_head_dims_that_fit_64_kilobytes(dtype, forward, backward):
    """The table in docs/gpu.md; what does not fit says what it needs."""

    def run(head_dim, grad):
        case = make_case([-1, 0], [40, 3], q_heads=1, kv_heads=1, head_dim=head_dim, dtype=dtype)
        everything(case) if grad else check(case)

    with testing.backend("emulated"), testing.emulator(**AMD):
        run(forward, grad=False)
        run(backward, grad=True)
        message = "head_dim must be such that a block fits the GPU's 65536 bytes of shared memory, got"
        with pytest.raises(ValueError, match=message):
            run(forward + 16, grad=False)
        with pytest.raises(RuntimeError, match=message):
            run(backward + 16, grad=True)
