# SPDX-License-Identifier: Apache-2.0
"""palmette.testing.backend("cuda"), as far as it goes without a GPU: its copies stay on the CPU here."""

from __future__ import annotations

import palmette
import pytest
import torch
from palmette import testing
from palmette.testing import _OperatorsOn
from test_tree_attention import IRREGULAR, make_case


@pytest.fixture
def calls(monkeypatch):
    """Addresses of the tensors that operators get, by operator."""
    seen = []
    dispatch = _OperatorsOn.__torch_dispatch__

    def look(self, func, types, args=(), kwargs=None):
        seen.append(func.name())
        return dispatch(self, func, types, args, kwargs)

    monkeypatch.setattr(_OperatorsOn, "__torch_dispatch__", look)
    return seen


def test_forward_and_backward(calls):
    case = make_case(*IRREGULAR)

    def run():
        inputs = [x.clone().requires_grad_() for x in (case.q, case.k, case.v)]
        out = palmette.tree_attention(*inputs, case.plan)
        out.sum().backward()
        return [out.detach(), *(x.grad for x in inputs)]

    want = run()
    with _OperatorsOn("cpu"):
        got = run()
    assert {"palmette::attend", "palmette::attend_backward"} <= set(calls)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_what_is_changed_in_place_comes_back():
    caches = [torch.randn(6, 2, 4) for _ in range(2)]
    want = [x[[0, 3, 4, 3, 4, 5]] for x in caches]
    source, target = torch.tensor([3, 4], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    with _OperatorsOn("cpu"):
        palmette.compact_kv_(*caches, source, target)
    assert all(torch.equal(a, b) for a, b in zip(caches, want, strict=True))


def test_operators_of_the_host_stay_there(calls):
    with _OperatorsOn("meta"):
        tree = palmette.Tree([-1, 0], [3, 2])
        plan = palmette.plan_tree_attention(tree, num_q_heads=2, num_kv_heads=1, head_dim=8)
    assert plan.num_queries == 1
    assert any(name.startswith("palmette::") for name in calls)


def test_there_is_no_such_backend_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "cuda" not in testing.backends()
    with pytest.raises(ValueError, match="backend must be one of"), testing.backend("cuda"):
        pass
