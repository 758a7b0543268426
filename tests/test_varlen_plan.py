# SPDX-License-Identifier: Apache-2.0
"""Plans of packed sequences: every query meets exactly its keys, and the tables keep a plan's promises."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest
import torch
from palmette import _varlen
from palmette._varlen import plan_varlen
from palmette.reference.attention import masked_attention
from palmette.reference.cascade import varlen_mask
from plan_oracle import PlanTensors, check_plan, evaluate_plan, plan_keys

HEADS = ((1, 1), (8, 2), (16, 1), (32, 8), (9, 3), (512, 1))


def indptr(lengths: list[int], dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=dtype)


def make_plan(
    q_lengths: list[int],
    kv_lengths: list[int],
    causal: bool,
    heads: tuple[int, int] = (8, 2),
    head_dim: int = 64,
) -> PlanTensors:
    plan = plan_varlen(
        indptr(q_lengths),
        indptr(kv_lengths, torch.int64),
        causal=causal,
        num_queries=sum(q_lengths),
        num_keys=sum(kv_lengths),
        num_q_heads=heads[0],
        num_kv_heads=heads[1],
        head_dim=head_dim,
    )
    return PlanTensors(*plan)


def check(
    plan: PlanTensors, q_lengths: list[int], kv_lengths: list[int], causal: bool, heads: tuple[int, int]
) -> None:
    check_plan(plan, num_q_heads=heads[0], num_kv_heads=heads[1])
    visible = varlen_mask(indptr(q_lengths), indptr(kv_lengths), causal=causal)
    keys = plan_keys(plan)
    assert sorted(keys) == list(range(sum(q_lengths)))
    for row, slots in keys.items():
        assert slots == visible[row].nonzero().flatten().tolist(), f"query {row}"
    counts = plan.counts.tolist()
    assert counts[0] == sum(q_lengths)
    assert counts[8] == sum(kv_lengths)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int]]:
    longest_q, longest_k = draw(st.sampled_from([(1, 400), (3, 5), (40, 60), (300, 20), (20, 300), (90, 90)]))
    pairs = draw(st.lists(st.tuples(st.integers(0, longest_q), st.integers(0, longest_k)), max_size=12))
    return [q for q, _ in pairs], [k for _, k in pairs]


@hypothesis.given(lengths=batches(), causal=st.booleans(), heads=st.sampled_from(HEADS))
def test_every_query_meets_its_keys_once(lengths, causal, heads):
    check(make_plan(*lengths, causal, heads), *lengths, causal, heads)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("q_lengths", "kv_lengths"),
    [
        ([], []),
        ([0], [0]),
        ([0, 0], [3, 0]),
        ([3, 0, 2], [0, 7, 0]),
        ([4], [0]),
        ([0], [9]),
        ([1], [1]),
        ([1] * 5, [0, 3, 0, 0, 2]),
        ([5, 2, 9], [3, 1, 4]),  # more queries than keys: the first ones see nothing when causal
        ([64], [64]),
        ([65], [1]),
        ([129], [4000]),
        ([1], [20_000]),
        ([400], [400]),
        ([1] * 300, [2] * 300),
        ([300, 0, 1], [40, 5, 2000]),
    ],
)
def test_edge_cases(q_lengths, kv_lengths, causal):
    for heads in HEADS if sum(kv_lengths) < 1000 else HEADS[:2]:
        check(make_plan(q_lengths, kv_lengths, causal, heads), q_lengths, kv_lengths, causal, heads)


@pytest.mark.parametrize("causal", [False, True])
def test_long_keys_are_shared_out(causal):
    """One query tile and many keys: tasks of similar size, partial states merged in order of the keys."""
    plan = make_plan([32], [16_384], causal, (8, 1), 128)
    num_tasks, num_partials = plan.counts[3:5].tolist()
    assert num_tasks >= 4
    assert num_partials == 32 * num_tasks
    assert plan.merge_row[: plan.merge_ptr[1]].tolist() == [32 * t for t in range(num_tasks)]


def test_causal_tiles_leave_out_what_no_query_sees():
    """Prefill: the keys that are read grow from tile to tile, to half of the square."""
    plan = make_plan([1024], [1024], True, (32, 8), 128)
    counts = plan.counts.tolist()
    pairs = 0
    for segment_begin, segment_end, query_begin, query_end in plan.item[: counts[2]].tolist():
        keys = int(plan.segment[segment_begin:segment_end, 1].sum())
        pairs += keys * (query_end - query_begin)
    assert pairs < 0.56 * 1024 * 1024


@pytest.mark.parametrize(("num_sequences", "longest"), [(1, 3000), (200, 60), (2000, 3)])
@pytest.mark.parametrize("heads", HEADS)
def test_capacities_follow_from_shapes(num_sequences, longest, heads):
    """The planner never asks for more than the sizes that the fake promises."""
    generator = torch.Generator().manual_seed(num_sequences)
    for _ in range(4):
        lengths = torch.randint(0, longest + 1, (2, num_sequences), generator=generator).tolist()
        for causal in (False, True):
            check_plan(make_plan(*lengths, causal, heads, 8), num_q_heads=heads[0], num_kv_heads=heads[1])


def test_depth_allows_windows():
    """A window counts keys, the query's own included: depths are those along a path."""
    plan = make_plan([3, 5], [10, 4], True)
    visible = varlen_mask(indptr([3, 5]), indptr([10, 4]), causal=True)
    for window in (1, 2, 7):
        for row, slots in plan_keys(plan, window=window).items():
            assert slots == visible[row].nonzero().flatten().tolist()[-window:]


def test_same_input_gives_the_same_plan_on_any_number_of_threads(num_threads):
    lengths = ([7, 300, 0, 1], [900, 20, 3, 4000])
    plans = []
    for threads in (1, 2, 1):
        num_threads(threads)
        plan = make_plan(*lengths, True)
        counts = plan.counts.tolist()
        plans.append((counts, plan.segment[: counts[1]], plan.item[: counts[2]], plan.task[: counts[3]]))
    for other in plans[1:]:
        assert other[0] == plans[0][0]
        assert all(torch.equal(a, b) for a, b in zip(other[1:], plans[0][1:], strict=True))


@hypothesis.settings(max_examples=20)
@hypothesis.given(lengths=batches(), causal=st.booleans(), seed=st.integers(0, 1000))
def test_the_plan_evaluates_to_attention(lengths, causal, seed):
    q_lengths, kv_lengths = lengths[0][:4], lengths[1][:4]
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(q_lengths), 4, 3, dtype=torch.float64, generator=generator)
    k = torch.randn(sum(kv_lengths), 2, 3, dtype=torch.float64, generator=generator)
    v = torch.randn(sum(kv_lengths), 2, 5, dtype=torch.float64, generator=generator)
    out, lse = evaluate_plan(q, k, v, make_plan(q_lengths, kv_lengths, causal, (4, 2), 3))
    want, want_lse = masked_attention(
        q, k, v, varlen_mask(indptr(q_lengths), indptr(kv_lengths), causal=causal)
    )
    torch.testing.assert_close(out, want, atol=1e-12, rtol=0)
    torch.testing.assert_close(lse, want_lse, atol=1e-12, rtol=0)


def call(q_indptr: list[int], kv_indptr: list[int], **changes: object) -> None:
    arguments = {
        "num_queries": 5,
        "num_keys": 9,
        "num_q_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "causal": True,
    }
    tensors = [torch.tensor(values, dtype=torch.int64) for values in (q_indptr, kv_indptr)]
    plan_varlen(*tensors, **{**arguments, **changes})


@pytest.mark.parametrize(
    ("q_indptr", "kv_indptr", "message"),
    [
        ([1, 5], [0, 9], "^q_indptr must be 0 at its begin, got 1$"),
        ([0, 4], [0, 9], r"^q_indptr must be 5 \(rows of q\) at its end, got 4$"),
        ([0, 5], [0, 10], r"^kv_indptr must be 9 \(rows of k\) at its end, got 10$"),
        ([0, 3, 2, 5], [0, 3, 6, 9], "^q_indptr must be non-decreasing, got 2 after 3 at 2$"),
        ([0, 2, 5], [0, -4, 9], "^kv_indptr must be non-decreasing, got -4 after 0 at 1$"),
        ([0, 2, 5], [0, 9], r"^kv_indptr must be \[3\] like q_indptr, got \[2\]$"),
        ([], [], r"^q_indptr must be \[B \+ 1\], got \[0\]$"),
    ],
)
def test_bad_indptr(q_indptr, kv_indptr, message):
    with pytest.raises(ValueError, match=message):
        call(q_indptr, kv_indptr)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_q_heads": 5}, r"^num_q_heads must be a multiple of num_kv_heads \(2\), got 5$"),
        ({"head_dim": 0, "num_q_heads": 2}, "^head_dim must be at least 1, got 0$"),
    ],
)
def test_bad_heads(changes, message):
    with pytest.raises(ValueError, match=message):
        call([0, 5], [0, 9], **changes)


def test_too_little_capacity_raises_instead_of_writing_past_the_end():
    arguments = (indptr([40]), indptr([40]), True, 40, 40, 64, 1, 8, "cpu")
    with pytest.raises(RuntimeError, match=r"^item_capacity must be at least \d+, got 3"):
        torch.ops.palmette.plan_varlen(*arguments, 3, 100)
    long = (indptr([4]), indptr([20_000]), True, 4, 20_000, 64, 1, 128, "cpu")
    with pytest.raises(RuntimeError, match=r"^partial_capacity must be at least \d+, got 1"):
        torch.ops.palmette.plan_varlen(*long, 100, 1)


OPCHECK_CASES = {
    "plan_varlen": lambda: [
        (indptr([3, 0, 2]), indptr([5, 1, 1], torch.int64), True, 5, 7, 8, 2, 64, "cpu", 20, 100),
        (indptr([]), indptr([]), False, 0, 0, 1, 1, 8, "cpu", 4, 4),
    ]
}


def test_the_bounds_know_the_planner_s_constants():
    text = (Path(__file__).parent.parent / "csrc" / "plan" / "cost.h").read_text()
    for target in ("cpu", "gpu"):
        (block,) = re.findall(rf'name = "{target}",(.*?)}};', text, re.S)
        for field, value in (
            ("max_task_rows", _varlen._MAX_TASK_ROWS[target]),
            ("key_step", _varlen._KEY_STEP[target]),
        ):
            assert re.findall(rf"\.{field} = (\d+)", block) == [str(value)]
    (number,) = re.findall(r"kFreePartialBytes = (\d+) << 10;", text)
    assert int(number) << 10 == _varlen._FREE_PARTIAL_BYTES
