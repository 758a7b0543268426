# SPDX-License-Identifier: Apache-2.0
"""On a real GPU: what the emulator cannot show. Results against the float64 reference, streams, graphs."""

from __future__ import annotations

import palmette
import pytest
import torch
from palmette.testing import assert_accurate
from test_tree_attention import IRREGULAR, expected, make_case

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.ops.palmette._gpu_kernels("cuda")),
    reason="no GPU, or no kernels for it",
)

SIZES = ((32, 32), (64, 64), (80, 80), (96, 40), (128, 128), (192, 128), (256, 256))


def on_gpu(case, queries="leaves"):
    plan = palmette.plan_tree_attention(
        case.plan.tree,
        queries,
        num_q_heads=case.q.shape[1],
        num_kv_heads=case.k.shape[1],
        head_dim=case.q.shape[2],
        device="cuda",
    )
    return case._replace(q=case.q.cuda(), k=case.k.cuda(), v=case.v.cuda(), plan=plan)


def everything(case, **options):
    inputs = [x.detach().clone().requires_grad_() for x in (case.q, case.k, case.v)]
    out, lse = palmette.tree_attention(*inputs, case.plan, return_lse=True, **options)
    torch.autograd.backward([out, lse], [torch.cos(out.detach()), torch.sin(lse.detach())])
    return [x.cpu() for x in (out, lse, *(x.grad for x in inputs))]


@pytest.mark.parametrize("queries", ["leaves", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), SIZES)
def test_tree_attention(queries, dtype, head_dim, v_head_dim):
    case = make_case(*IRREGULAR, queries, q_heads=6, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype)
    got = everything(on_gpu(case, queries))
    want_out, want_lse = expected(case)
    base_out, base_lse = expected(case, dtype)
    assert_accurate(got[0], want_out, base_out, atol=2e-6, name="out")
    assert_accurate(got[1], want_lse, base_lse, atol=5e-6, name="lse")
    for a, b in zip(got[2:], everything(case)[2:], strict=True):
        rounding = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
        torch.testing.assert_close(a, b, atol=rounding, rtol=rounding)


def test_runs_are_bit_identical():
    case = on_gpu(make_case([-1] + [0] * 30, [3000] + [40] * 30, dtype=torch.bfloat16, head_dim=128))
    first, second = everything(case), everything(case)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_in_a_graph_while_the_tree_grows():
    case = on_gpu(
        make_case([-1, 0, 0], [500, 3, 3], slots=list(range(506)), dtype=torch.bfloat16, head_dim=64)
    )
    k, v = (torch.randn(600, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        palmette.tree_attention(case.q, k, v, case.plan)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = palmette.tree_attention(case.q, k, v, case.plan)
    tables = case.plan.tensors
    for step in range(5):
        case.plan.tree.append([1, 2], [1, 1], [506 + 2 * step, 507 + 2 * step])
        case.plan.update()
        assert all(a is b for a, b in zip(case.plan.tensors, tables, strict=True))
        graph.replay()
        assert torch.equal(out, palmette.tree_attention(case.q, k, v, case.plan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("group", "head_dim"), [(1, 64), (4, 128), (16, 80)])
def test_selected_attention(dtype, group, head_dim):
    """In the order of a GPU's own plan, against the CPU's."""
    tokens, ends = 700, torch.tensor([0, 400, 400, 700])
    q = torch.randn(tokens, 2 * group, head_dim, dtype=dtype)
    k, v = (torch.randn(tokens, 2, head_dim, dtype=dtype) for _ in range(2))
    # the first block, the own one, and one between them
    own = torch.cat([torch.arange(400), torch.arange(300)]) // 32
    middle = torch.where(own > 1, 1 + (torch.arange(tokens) * 7) % (own - 1).clamp(min=1), -1)
    index = torch.stack([torch.zeros_like(own), middle, torch.where(own > 0, own, -1)], 1).int()
    index = index.expand(2, -1, -1).contiguous()
    dout = torch.randn_like(q)

    def run(device):
        inputs = [x.to(device).detach().requires_grad_() for x in (q, k, v)]
        out, lse = palmette.selected_attention(
            *inputs, index.to(device), ends, block_size=32, return_lse=True
        )
        out.backward(dout.to(device))
        return [x.detach().cpu().float() for x in (out, lse, *(x.grad for x in inputs))]

    rounding = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}[dtype]
    first = run("cuda")
    for a, b in zip(first, run("cpu"), strict=True):
        torch.testing.assert_close(a, b, atol=rounding, rtol=rounding)
    assert all(torch.equal(a, b) for a, b in zip(first, run("cuda"), strict=True))


def test_merge_states():
    outs, lses = torch.randn(9, 5, 3, 128), torch.randn(9, 5, 3)
    for got, want in zip(
        palmette.merge_states(outs.cuda(), lses.cuda()), palmette.merge_states(outs, lses), strict=True
    ):
        torch.testing.assert_close(got.cpu(), want)


def test_cascade():
    q = torch.randn(6, 4, 64)
    levels = [
        (torch.randn(n, 2, 64), torch.randn(n, 2, 64), torch.tensor(qi), torch.tensor(ki))
        for n, qi, ki in ((300, [0, 6], [0, 300]), (9, [0, 2, 6], [0, 4, 9]))
    ]
    moved = [(k.cuda(), v.cuda(), qi, ki) for k, v, qi, ki in levels]
    torch.testing.assert_close(
        palmette.cascade_attention(q.cuda(), moved).cpu(),
        palmette.cascade_attention(q, levels),
        atol=1e-5,
        rtol=1e-5,
    )
