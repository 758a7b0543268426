# SPDX-License-Identifier: Apache-2.0
"""The PTX that nvcc makes of the project's kernels, read by tests/ptx: results against float64, defects in
the PTX, each of which must change results, and conflicts of shared memory.

nvcc takes half a minute for attend, once: tests/ptx/nvcc.py keeps its results.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Iterable, Iterator
from pathlib import Path

import palmette
import ptx
import pytest
import test_key_tiles as key_tiles
import test_sparse_attention as sparse
import torch
from palmette import testing
from palmette.reference import merge as merge_reference
from palmette.testing import RecordedLaunch, assert_accurate
from ptx.mutations import IGNORED_SOURCE_SIZE, MISSING_SYNCTHREADS
from ptx.replay import Choice, Replayed, replay, replays
from test_merge import states
from test_tree_attention import Case, check, check_gradients, make_case

if ptx.find_nvcc() is None:
    pytest.skip("nvcc is not on the PATH, nor below CUDA_HOME", allow_module_level=True)
if "emulated" not in testing.backends():
    pytest.skip("the emulator is not built (ci/build.sh builds it)", allow_module_level=True)

CSRC = Path(__file__).parent.parent / "csrc"
SOURCES = {
    "attend": "attend/kernel_gpu.cu",
    "attend_merge": "attend/kernel_gpu.cu",
    "attend_delta": "attend/kernel_backward_gpu.cu",
    "attend_dsinks": "attend/kernel_backward_gpu.cu",
    "attend_dq": "attend/kernel_dq_gpu.cu",
    "attend_dkv": "attend/kernel_dkv_gpu.cu",
    "attend_dkv_add": "attend/kernel_dkv_gpu.cu",
    **{
        f"attend_index_{part}": "attend/kernel_index_gpu.cu"
        for part in ("count", "sum", "place", "fill", "cut")
    },
    "merge_states": "merge/kernel_gpu.cu",
    "merge_states_backward": "merge/kernel_gpu.cu",
    "select_blocks": "sparse/kernel_gpu.cu",
    "gather_logprobs": "loss/kernel_gpu.cu",
    "gather_logprobs_backward": "loss/kernel_gpu.cu",
}
BACKWARD = ["attend_delta", "attend_dq", "attend_dkv"]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.fixture(autouse=True)
def _memory_that_nobody_wrote_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def _garbage() -> Iterator[None]:
    """Decoding makes many objects; that torch's are looked through each time takes a third of all time."""
    gc.freeze()
    yield
    gc.unfreeze()


@functools.cache
def machine_of(source: str) -> ptx.Machine:
    return ptx.Machine(ptx.Module(ptx.compile_ptx(CSRC / source, include=[CSRC])))


def kernels(dtype: torch.dtype, head_dim: int = 0, v_head_dim: int | None = None, width: int = 4) -> Choice:
    """What each launch runs: parts of mangled names."""
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    element = {FP32: "f", BF16: "NS0_4bf16E", FP16: "NS0_4fp16E"}[dtype]
    math = "NS0_6ScalarIfEE" if dtype == FP32 else f"NS0_6TensorI{element}EE"
    columns = next(n for n in (64, 128, 256) if v_head_dim <= n)
    narrow = max(head_dim, v_head_dim) <= 64
    exact = dtype != FP32 and head_dim == v_head_dim and head_dim in (64, 128)
    names = {
        "attend": f"attend_kernelI{math}Li{columns}ELb{int(exact)}E",
        "attend_merge": f"attend_merge_kernelI{element}E",
        "attend_delta": f"attend_delta_kernelI{element}E",
        "attend_dsinks": "attend_dsinks_kernel",
        "attend_dq": f"attend_dq_kernelI{math}Li{64 if narrow else 128}ELb0E",
        "attend_dkv": f"attend_dkv_kernelI{math}Li{64 if narrow or dtype == FP32 else 128}E",
        "attend_dkv_add": f"attend_dkv_add_kernelI{element}E",
        **{name: f"{name}_kernel" for name in SOURCES if name.startswith("attend_index")},
        "merge_states": f"merge_states_kernelI{element}Li{width}E",
        "merge_states_backward": f"merge_states_backward_kernelI{element}E",
        "select_blocks": f"select_blocks_kernelI{math}E",
        "gather_logprobs": f"gather_logprobs_kernelI{element}E",
        "gather_logprobs_backward": f"gather_logprobs_backward_kernelI{element}E",
    }
    return lambda launch: (machine_of(SOURCES[launch.name]), names[launch.name])


def look_at(done: list[Replayed], dtype: torch.dtype) -> None:
    """What holds for all launches: they agree with the emulator, and ldmatrix meets no bank twice."""
    for one in done:
        for m in one.launch.memory:
            if m.writable:
                assert close(m.name, one.written[m.name], m.after, dtype), (one.launch.name, m.name)
        for opcode, banks in one.counters.shared.items():
            assert not opcode.startswith("ldmatrix") or banks.conflicts == 0, (one.launch.name, opcode)


def numbers(name: str, data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """What a tensor holds that a kernel writes."""
    if name == "block_index":
        return torch.frombuffer(bytearray(data), dtype=torch.int32).double()
    if not data:
        return torch.empty(0)
    of_element = name in ("out", "dq", "dk", "dv", "douts", "dout_a", "dout_b", "logits")
    return torch.frombuffer(bytearray(data), dtype=dtype if of_element else FP32).double()


def close(name: str, actual: bytes, expected: bytes, dtype: torch.dtype) -> bool:
    """Whether two machines that round differently may come to these results."""
    if name in ("index", "part_met"):
        return actual == expected
    got, want = numbers(name, actual, dtype), numbers(name, expected, dtype)
    largest = want[torch.isfinite(want)].abs().max().item() if torch.isfinite(want).any() else 0.0
    tolerance = 1e-4 if dtype == FP32 else 1e-2
    return torch.allclose(got, want, tolerance, tolerance * largest, equal_nan=True)


# ---- attend

TOKEN_TREE = [-1, 0, 0, 0, 1, 1, 2, 2, 3, 3, *(4 + i % 6 for i in range(24))]


def star(leaves: int, root: int, leaf: int) -> tuple[list[int], list[int]]:
    return [-1] + [0] * leaves, [root] + [leaf] * leaves


def most_rows(case: Case) -> int:
    """Of a task: queries times the query heads of a KV head."""
    task = case.plan.tensors[4]
    return int((task[:, 3] - task[:, 2]).max()) * (case.q.shape[1] // case.k.shape[1])


def attend(case: Case, schedule: ptx.block.Schedule = "block", **options) -> list[Replayed]:
    dtype = case.q.dtype
    with replays(kernels(dtype, case.k.shape[2], case.v.shape[2]), schedule) as done:
        check(case, **options)
    assert [one.launch.name for one in done] == ["attend", "attend_merge"]
    look_at(done, dtype)
    return done


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize(("leaves", "rows"), [(3, 6), (10, 20), (20, 40)])
def test_rows(leaves, rows, dtype):
    """Up to 16 rows, up to 32, and more: the warps divide them in three ways."""
    case = make_case(*star(leaves, 66, 3), q_heads=2, kv_heads=1, head_dim=64, dtype=dtype)
    assert most_rows(case) == rows
    attend(case)


@pytest.mark.parametrize("schedule", ["forward", "reverse"])
def test_more_rows_than_a_block_has(schedule):
    case = make_case([-1], [75], "tokens", q_heads=2, kv_heads=2, head_dim=64, dtype=BF16)
    assert most_rows(case) == 75
    attend(case, schedule)


@pytest.mark.parametrize(("dtype", "head_dim", "tokens"), [(BF16, 128, 260), (FP32, 64, 400)], ids=str)
@pytest.mark.parametrize("sinks", [False, True])
def test_partial_states(dtype, head_dim, tokens, sinks):
    case = make_case(*star(3, tokens, 7), q_heads=2, kv_heads=1, head_dim=head_dim, dtype=dtype)
    plan = palmette.plan_tree_attention(
        case.plan.tree, num_q_heads=2, num_kv_heads=1, head_dim=head_dim, target="gpu"
    )
    assert plan.io.partial_states > 0
    attend(case._replace(plan=plan), **({"sinks": torch.tensor([-1.0, 2.0])} if sinks else {}))


@pytest.mark.parametrize("queries", ["leaves", "tokens"])
def test_many_short_segments(queries):
    attend(make_case(TOKEN_TREE, [40] + [1] * 33, queries, head_dim=64, dtype=BF16))


OPTIONS = [{"window": 9}, {"softcap": 4.0}, {"sinks": torch.linspace(-2, 2, 4)}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_options(options, dtype):
    attend(make_case(*star(6, 70, 9), head_dim=64, dtype=dtype, window=options.get("window")), **options)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "dtype"),
    [(192, 128, BF16), (24, 40, BF16), (33, 5, BF16), (80, 80, FP16), (20, 7, FP32), (128, 128, FP32)],
)
def test_head_dims(head_dim, v_head_dim, dtype):
    attend(
        make_case(
            *star(3, 66, 3), q_heads=2, kv_heads=1, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype
        )
    )


def test_no_width_has_bank_conflicts_where_ldmatrix_reads():
    for width in range(16, 257, 16):
        case = make_case(*star(3, 40, 3), q_heads=2, kv_heads=1, head_dim=width, dtype=BF16)
        counters = attend(case)[0].counters  # with what look_at() asserts
        assert counters.executed("ldmatrix") > 0
        copies = counters.shared["cp.async.cg.shared.global"]
        assert copies.conflicts == 0, width


def test_keys_and_values_are_read_once():
    case = make_case(*star(3, 66, 3), q_heads=8, kv_heads=2, head_dim=64, v_head_dim=80, dtype=BF16)
    traffic = attend(case)[0].counters.buffers
    assert traffic["k"].bytes_read == case.k.numel() * 2
    assert traffic["v"].bytes_read == case.v.numel() * 2
    assert traffic["k"].read_sectors * 32 == traffic["k"].bytes_read


def wider(x: torch.Tensor, width: int, first: int = 0) -> torch.Tensor:
    """The same tensor in rows of `width` elements."""
    storage = torch.full((*x.shape[:2], width), torch.nan, dtype=x.dtype)
    storage[..., first : first + x.shape[2]] = x
    return storage[..., first : first + x.shape[2]]


def test_rows_as_they_lie():
    case = make_case(*star(3, 66, 3), q_heads=2, kv_heads=1, head_dim=20, dtype=BF16)
    # 16 bytes at a time, but for the last 8 of a row; one by one; K and V in one storage
    attend(case._replace(q=wider(case.q, 24), k=wider(case.k, 32, 8), v=wider(case.v, 24)))
    attend(case._replace(k=wider(case.k, 23), v=wider(case.v, 24, 1)))
    both = torch.cat([case.k, torch.full_like(case.k[..., :4], torch.nan), case.v], dim=2)
    attend(case._replace(k=both[..., :20], v=both[..., 24:]))


def test_one_stage():
    case = make_case(*star(3, 130, 7), q_heads=2, kv_heads=1, head_dim=64, dtype=BF16)
    with testing.emulator(shared_limit=40 << 10):
        assert attend(case)[0].launch.shared_bytes < 40 << 10


def test_what_is_not_finite_stays_with_who_sees_it():
    case = make_case([-1, 0, 0, 0], [20, 6, 6, 6], ([1, 3], [5, 2]), head_dim=64, dtype=BF16)
    unseen = ~case.visible.any(dim=0)
    case.k[unseen] = torch.nan
    case.v[unseen] = torch.inf
    case.v[22] = torch.inf  # the first query sees it
    with replays(kernels(BF16, 64)) as done:
        out = palmette.tree_attention(case.q, case.k, case.v, case.plan)
    look_at(done, BF16)
    assert not torch.isfinite(out[0]).any()
    assert torch.isfinite(out[1]).all()


# ---- attend_backward


def attend_backward(case: Case, **options) -> list[Replayed]:
    dtype = case.q.dtype
    with replays(kernels(dtype, case.k.shape[2], case.v.shape[2])) as done:
        check_gradients(case, **options)
    names = ["attend", "attend_merge", "attend_delta", "attend_dsinks", "attend_dq", "attend_dkv"]
    assert [one.launch.name for one in done] == [
        n for n in names if "sinks" in options or n != "attend_dsinks"
    ]
    look_at(done, dtype)
    return done


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_gradients(dtype):
    """More rows than a block has, and two tiles of keys."""
    forest = [-1, 0, 0], [40, 26, 9] if dtype != FP32 else [20, 16, 9]
    attend_backward(make_case(*forest, "tokens", q_heads=2, kv_heads=1, head_dim=64, dtype=dtype))


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_gradients_with_options(options, dtype):
    case = make_case(*star(6, 30, 9), head_dim=64, dtype=dtype, window=options.get("window"))
    attend_backward(case, **options)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "dtype"), [(80, 80, BF16), (192, 128, BF16), (33, 20, BF16), (72, 72, FP32)]
)
def test_gradients_of_head_dims(head_dim, v_head_dim, dtype):
    attend_backward(
        make_case(
            *star(3, 36, 3), q_heads=2, kv_heads=1, head_dim=head_dim, v_head_dim=v_head_dim, dtype=dtype
        )
    )


@pytest.mark.parametrize("dtype", [BF16, FP32], ids=str)
def test_gradients_by_an_index(dtype):
    """In pieces."""
    p = key_tiles.selection([100, 30], 64, 2, q_heads=16, dtype=dtype, head_dim=64).indexed()
    with testing.backend("emulated"):
        out, lse = p.forward()
    with testing.backend("emulated"), replays(kernels(dtype, 64)) as done:
        p.backward(out, lse)
    names = ["attend_delta", "attend_dq", *key_tiles.INDEX, "attend_dkv", "attend_dkv_add"]
    assert [one.launch.name for one in done] == names
    look_at(done, dtype)


def test_gradients_that_are_added_to_sums():
    """As test_gradients has them, but in float32 onto what is there."""
    case = make_case([-1, 0, 0], [40, 26, 9], "tokens", q_heads=2, kv_heads=1, head_dim=64, dtype=BF16)
    arguments, options = (case.q, case.k, case.v), (*case.plan.tensors, None, 0.125, 0.0, 0)
    with testing.backend("emulated"):
        out, lse = torch.ops.palmette.attend(*arguments, *options)
        dout = torch.randn_like(out)
        _, *want, _ = torch.ops.palmette.attend_backward(dout, None, *arguments, out, lse, *options)
    sums = [torch.ones(x.shape) for x in (case.k, case.v)]
    with testing.backend("emulated"), testing.recorded_launches() as launches:
        torch.ops.palmette.attend_backward_accumulate_(dout, None, *arguments, out, lse, *options, *sums)
    (launch,) = (one for one in launches if one.name == "attend_dkv")
    machine, kernel = kernels(BF16, 64)(launch)
    written = replay(machine, kernel, launch)
    for name, total, gradient in zip(("dk", "dv"), sums, want, strict=True):
        got = torch.frombuffer(bytearray(written[name]), dtype=FP32).view(total.shape)
        torch.testing.assert_close(got, total, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(got - 1, gradient.float(), rtol=2e-2, atol=2e-2)


# ---- losses


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_logprobs(dtype):
    """Rows that begin anywhere."""
    x = torch.randn(3, 1003).to(dtype)[:, 1:]
    y = torch.tensor([0, 500, 1001])
    with testing.backend("emulated"), replays(kernels(dtype)) as done:
        logprobs, lse, entropies = torch.ops.palmette.gather_logprobs(x, y, 0.7, True)
        torch.ops.palmette.gather_logprobs_backward_(logprobs, entropies, x, y, lse, entropies, 0.7)
    assert [one.launch.name for one in done] == ["gather_logprobs", "gather_logprobs_backward"]
    look_at(done, dtype)


# ---- merge_states


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("counts", [None, [0, 3, 0, 1, 7]], ids=["dense", "ragged"])
@pytest.mark.parametrize(("head_dim", "base"), [(40, "e"), (13, "2")])
def test_merging(dtype, counts, head_dim, base):
    """As test_merge.py does it."""
    total = (4, 5) if counts is None else (sum(counts),)
    outs, lses = states(*total, 3, head_dim, dtype=dtype, empty=0.25)
    indptr = None if counts is None else torch.tensor([0, *counts]).cumsum(0).to(torch.int32)

    def compute(merge, outs, lses):
        outs, lses = outs.detach().requires_grad_(), lses.detach().requires_grad_()
        out, lse = merge(outs, lses, indptr, lse_base=base)
        some = ~torch.isneginf(lse)
        generator = torch.Generator().manual_seed(3)
        dout = torch.randn(out.shape, generator=generator).to(dtype).to(out.dtype)
        dlse = torch.randn(lse.shape, generator=generator).to(lse.dtype)
        loss = (out * dout).sum() + (lse[some] * dlse[some]).sum()
        return [out.detach(), lse.detach(), *torch.autograd.grad(loss, (outs, lses))]

    with replays(kernels(dtype, width=1 if head_dim % 4 else 4)) as done:
        got = compute(palmette.merge_states, outs, lses)
    assert [one.launch.name for one in done] == ["merge_states", "merge_states_backward"]
    look_at(done, dtype)
    want = compute(merge_reference.merge_states, outs.double(), lses.double())
    rounding = {FP32: 2e-6, BF16: 2e-2, FP16: 3e-3}[dtype]
    for name, a, b in zip(("out", "lse", "douts", "dlses"), got, want, strict=True):
        atol = {"lse": 2e-6, "dlses": rounding * head_dim**0.5 * 3}.get(name, rounding)
        assert_accurate(a, b, atol=atol, name=name)


def test_merging_a_pair():
    outs, lses = states(5, 2, 3, 40, dtype=BF16)
    a, b = (outs[:, i].clone().requires_grad_() for i in range(2))
    with replays(kernels(BF16)) as done:
        out, lse = palmette.merge_state(a, lses[:, 0].clone(), b, lses[:, 1].clone())
        (out.float().sum() + lse.sum()).backward()
    look_at(done, BF16)
    assert_accurate(out, merge_reference.merge_states(outs, lses)[0], atol=2e-2)


# ---- defects


def recorded(case: Case, backward: bool = False) -> dict[str, RecordedLaunch]:
    """Launches by name."""
    with testing.backend("emulated"), testing.recorded_launches() as launches:
        q = case.q.clone().requires_grad_(backward)
        out, lse = palmette.tree_attention(q, case.k, case.v, case.plan, return_lse=True)
        if backward:
            torch.autograd.backward([out, lse], [torch.randn_like(out), torch.randn_like(lse)])
    return {launch.name: launch for launch in launches}


def defects(
    launch: RecordedLaunch,
    choose: Choice,
    mutations: Iterable[ptx.Mutation],
    schedules: tuple[ptx.block.Schedule, ...] = ("block",),
    most: int = 8,
    equivalent: int = 0,
) -> set[str]:
    """Asserts that results change with every mutation; returns the names of those that there were."""
    machine, kernel = choose(launch)

    def passes(text: str) -> bool:
        mutant = ptx.Machine(ptx.Module(text))
        for schedule in schedules:
            written = replay(mutant, kernel, launch, schedule)
            if not all(close(m.name, written[m.name], m.after, BF16) for m in launch.memory if m.writable):
                return False
        return True

    text = machine.module.text
    tried = ptx.check_mutations(text, kernel, passes, mutations, most, equivalent)
    return {name.split(" (")[0] for name in tried}


# Where warps run one after the other, it is seen that a barrier is missing.
ORDERS: tuple[ptx.block.Schedule, ...] = ("forward", "reverse")
OF_MATRICES = {m.name for m in ptx.MUTATIONS if m.name.startswith(("cvt", "ldmatrix", "mma", "cp.async"))}
OF_COPIES = [m for m in ptx.MUTATIONS if m.name.startswith("cp.async") and m.sites == "each"]


def case_of_tiles(tiles: int, leaves: int, q_heads: int) -> Case:
    """Rows are filled up with zeros; the first row of K and V is no key, and what it holds is not finite."""
    forest = star(leaves, 64 * tiles - 6 - 3 * leaves, 3)
    case = make_case(
        *forest, q_heads=q_heads, kv_heads=1, head_dim=56, dtype=BF16, split="flatten", block_len=64,
        slots=list(range(1, 64 * tiles - 5)),
    )  # fmt: skip
    assert int(case.plan.counts[2]) == tiles
    case.k[0], case.v[0] = torch.nan, torch.inf
    return case


def test_no_defect_in_attend_escapes():
    """64 rows, of which each warp has some, and then 16 that the warps share: each has code of its own."""
    case = case_of_tiles(4, 20, 4)
    assert most_rows(case) == 80
    launch, choose = recorded(case)["attend"], kernels(BF16, 56)
    # In each code, the copies of Q, committed or not, are waited for with those of the first tile (a commit),
    # and no copy is left when the last tile has been met (two mutations of a wait). The next test needs both.
    seen = defects(launch, choose, [*ptx.MUTATIONS, IGNORED_SOURCE_SIZE], most=4, equivalent=2 * 3)
    assert seen >= OF_MATRICES | {IGNORED_SOURCE_SIZE.name}
    # Behind the last rows of a block there is nothing to wait for. Behind the 64 before them there is: their
    # states lie where the next copies of Q go, but a copy that arrives when it is waited for, as here, finds
    # everyone past a barrier by then. (The check build sees it: a copy is on its way from the start.)
    defects(launch, choose, [MISSING_SYNCTHREADS], ORDERS, most=99, equivalent=2)


def hand_made(items: list[list[int]], segments: list[list[int]], tasks: int) -> list[torch.Tensor]:
    """A plan of one query, at position 0, as no tree has one."""
    table = functools.partial(torch.tensor, dtype=torch.int32)
    counts = table([1, len(segments), len(items), tasks] + [0] * 12)
    return [
        torch.arange(8, dtype=torch.int32), table([[0], [0], [0], [0]]),
        table(segments or [[0] * 6]), table(items or [[0] * 4]),
        table([[0, len(items), 0, 1, -1, -1]]), table([0, 0]), table([]), counts,
    ]  # fmt: skip


def run_hand_made(plan: list[torch.Tensor], backward: bool) -> dict[str, RecordedLaunch]:
    q, dout = (torch.randn(1, 64, 56, dtype=BF16) for _ in range(2))
    k, v = (torch.randn(8, 1, 56, dtype=BF16) for _ in range(2))
    out, lse = torch.zeros(1, 64, 56, dtype=BF16), torch.zeros(1, 64)
    with testing.backend("emulated"), testing.recorded_launches() as launches:
        if backward:
            torch.ops.palmette.attend_backward(dout, None, q, k, v, out, lse, *plan, None, 1.0, 0.0, 0)
        else:
            torch.ops.palmette.attend(q, k, v, *plan, None, 1.0, 0.0, 0)
    return {launch.name: launch for launch in launches}


def test_no_defect_in_attend_escapes_where_there_are_no_keys():
    with testing.emulator(shared_limit=40 << 10):  # one stage
        launch = run_hand_made(hand_made([[0, 0, 0, 1]], [], 1), False)["attend"]
    assert defects(launch, kernels(BF16, 56), OF_COPIES) == {m.name for m in OF_COPIES}


def gradient_launches(case: Case) -> dict[str, RecordedLaunch]:
    """With two tasks for the same rows: of one tile of keys, and of the others."""
    out, lse = palmette.tree_attention(case.q, case.k, case.v, case.plan, return_lse=True)
    plan = [table.clone() for table in case.plan.tensors]
    assert int(plan[7][3]) == 1
    tasks = plan[4]
    tasks[1] = tasks[0]
    tasks[0, 0] = tasks[1, 1] = 1
    plan[7][3] = 2
    with testing.backend("emulated"), testing.recorded_launches() as launches:
        torch.ops.palmette.attend_backward(
            torch.randn_like(out), torch.randn_like(lse), case.q, case.k, case.v, out, lse, *plan, None, 0.1,
            0.0, 0,
        )  # fmt: skip
    return {launch.name: launch for launch in launches}


def test_no_defect_in_dq_escapes():
    launch, choose = gradient_launches(case_of_tiles(5, 16, 4))["attend_dq"], kernels(BF16, 56)
    # as in attend: Q and dO come with the first tile, and no copy is left, here or behind all tasks
    seen = defects(launch, choose, [*ptx.MUTATIONS, IGNORED_SOURCE_SIZE], most=4, equivalent=1 + 2 * 2)
    assert seen >= OF_MATRICES | {IGNORED_SOURCE_SIZE.name}
    # that of write_sums(): nobody reads what it divides from what is written
    defects(launch, choose, [MISSING_SYNCTHREADS], ORDERS, most=99, equivalent=1)


def test_no_defect_in_dq_escapes_where_there_are_no_tasks():
    launch, choose = run_hand_made(hand_made([], [], 0), True)["attend_dq"], kernels(BF16, 56)
    assert defects(launch, choose, OF_COPIES) == {m.name for m in OF_COPIES}
    defects(launch, choose, [MISSING_SYNCTHREADS], ORDERS, most=99)


def test_no_defect_in_dkv_escapes():
    # more rows than a tile of them has
    launch, choose = gradient_launches(case_of_tiles(2, 11, 6))["attend_dkv"], kernels(BF16, 56)
    mutations = [m for m in [*ptx.MUTATIONS, IGNORED_SOURCE_SIZE] if not m.name.startswith("shfl")]
    # K and V come with the first rows, and no copy is left behind the last ones
    seen = defects(launch, choose, mutations, most=4, equivalent=1 + 2)
    assert seen >= OF_MATRICES | {IGNORED_SOURCE_SIZE.name}
    # With one or two tasks and items the first warp does alone what comes before three of them (the piece,
    # the items that were found, and those that wait), and what nobody has written passes for many rows.
    defects(launch, choose, [MISSING_SYNCTHREADS], ORDERS, most=99, equivalent=3 + 1)


HIDDEN, SEEN = [0, 4, 5, 1, 9, 0], [4, 4, 0, 0, 9, 0]  # segments, from the query's position 0


def test_no_defect_in_dkv_escapes_where_keys_are_hidden():
    choose = kernels(BF16, 56)
    # Nobody sees the keys, so nobody has waited for them before the end.
    launch = run_hand_made(hand_made([[0, 1, 0, 1]], [HIDDEN], 1), True)["attend_dkv"]
    assert defects(launch, choose, OF_COPIES) == {m.name for m in OF_COPIES}
    # those three, that before the only item's members, that behind rows without a next tile, and the two of
    # the second sums, all zeros as the first
    defects(launch, choose, [MISSING_SYNCTHREADS], ORDERS, most=99, equivalent=3 + 2 + 2)
    # An item whose keys nobody sees, and the next one.
    launch = run_hand_made(hand_made([[0, 1, 0, 1], [1, 2, 0, 1]], [HIDDEN, SEEN], 1), True)["attend_dkv"]
    # those five, and that before members are read
    defects(launch, choose, [MISSING_SYNCTHREADS], ORDERS, most=99, equivalent=3 + 2 + 1)


def test_no_defect_in_the_reductions_escapes():
    # of 64 keys, the last of either half are seen, each lane 31's; and every tile of rows is one query
    case = make_case(
        [-1, -1, 1, 1, 1], [31, 1, 15, 16, 1], ([1, 4], [0, 0]), q_heads=64, kv_heads=1, head_dim=8,
        dtype=BF16, split="flatten", block_len=64,
    )  # fmt: skip
    launches = recorded(case, backward=True)
    shuffles = [m for m in ptx.MUTATIONS if m.name.startswith("shfl")]
    for name in ("attend_dkv", "attend_delta"):
        assert defects(launches[name], kernels(BF16, 8), shuffles, most=99)
    outs, lses = states(1, 40, 3, 40, dtype=BF16)
    with testing.backend("emulated"), testing.recorded_launches() as launches:
        palmette.merge_states(outs, lses)
    assert defects(launches[0], kernels(BF16), shuffles, most=99)


# ---- select_blocks


def selection_case(dtype: torch.dtype, tokens: list[int], queries: list[int]):
    case = sparse.make(tokens, queries, q_heads=6, head_dim=32, dtype=dtype)
    k_cmp, v_cmp, ends = sparse.compressed(case)
    _, lse = sparse.run_compressed(case, k_cmp, v_cmp, ends)
    return lambda: sparse.run_selection(case, k_cmp, lse, ends, init_blocks=0, local_blocks=1)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
def test_select_blocks(dtype):
    """More than one tile of keys, sequences that go on, blocks that are chosen without a look."""
    run = selection_case(dtype, [300, 9, 150], [20, 9, 2])
    with replays(kernels(dtype)) as done:
        run()
    assert [one.launch.name for one in done] == ["select_blocks"]
    look_at(done, dtype)


def test_no_defect_in_select_blocks_escapes():
    with testing.backend("emulated"), testing.recorded_launches() as launches:
        selection_case(BF16, [300], [20])()
    # the copies of Q, committed or not, are waited for with those of the first tile
    seen = defects(launches[-1], kernels(BF16), ptx.MUTATIONS, most=4, equivalent=1)
    assert seen >= {name for name in OF_MATRICES if not name.startswith("cvt") and "trans" not in name}
