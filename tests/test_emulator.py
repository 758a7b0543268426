# SPDX-License-Identifier: Apache-2.0
"""csrc/gpu/emulator: correct kernels give a GPU's results under every schedule; defects are reported."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import numpy as np
import pytest

BUILD = Path(os.environ.get("PALMETTE_BUILD_DIR", Path(__file__).parent.parent / "build"))
sys.path.insert(0, str(BUILD / "tests"))
try:
    BUILDS = [importlib.import_module(name) for name in ("palmette_emulator", "palmette_emulator_check")]
except ImportError:
    pytest.skip("tests/cpp is not built (make test builds it)", allow_module_level=True)
finally:
    sys.path.pop(0)

SCHEDULES = (("forward", 1), ("reverse", 1), ("random", 1), ("random", 2), ("random", 3))


@pytest.fixture(params=BUILDS, ids=["plain", "check"], autouse=True)
def build(request):
    global emulator
    emulator = request.param
    return request.param


@pytest.fixture(params=SCHEDULES, ids=lambda s: f"{s[0]}{s[1]}", autouse=True)
def schedule(request, build):
    emulator.configure(*request.param, 1, 32)
    yield request.param
    emulator.configure("forward", 1, 1, 32)


@pytest.fixture(params=[1, 3], ids=["1 worker", "3 workers"])
def workers(request, schedule):
    emulator.configure(*schedule, request.param, 32)
    return request.param


def run(name, n=0, grid=1, block=64, out=None, size=None):
    def three(x):
        return x if isinstance(x, tuple) else (x, 1, 1)

    values = [-1] * (size or 1) if out is None else out
    return np.array(emulator.run(name, n, three(grid), three(block), values))


def test_indices(workers):
    got = run("indices", grid=(3, 2, 2), block=(5, 3, 2), size=360)
    assert (got == np.arange(360)).all()


def test_threads_that_return_early():
    got = run("some_return_early", 40, size=64)
    assert (got == [40] * 40 + [-1] * 24).all()


def test_votes_of_a_block():
    got = run("votes", 63, block=96, size=288).reshape(96, 3)
    assert (got == [1, 0, 32]).all()


def test_warps_at_different_trips():
    got = run("trips_differ_by_warp", size=64)
    pair = np.arange(64) // 2 * 4 + 1
    assert (got == np.where(np.arange(64) < 32, pair, 2 * pair)).all()


@pytest.mark.parametrize("warp_size", [32, 64])
def test_shuffles(schedule, warp_size):
    emulator.configure(*schedule, 1, warp_size)
    lane = np.arange(64)
    got = run("shuffles", size=256).reshape(64, 4)
    assert (got[:, 0] == lane // 8 * 8 + 3).all()
    assert (got[:, 1] == np.where(lane % 8 >= 2, lane - 2, lane)).all()
    assert (got[:, 2] == np.where(lane % 8 < 6, lane + 2, lane)).all()
    assert (got[:, 3] == lane ^ 5).all()


def test_two_halves_of_a_warp():
    lane = np.arange(64)
    assert (run("half_warps_apart", size=64) == np.where(lane % 32 < 16, lane ^ 8, lane ^ 4)).all()


@pytest.mark.parametrize("warp_size", [32, 64])
def test_votes_of_a_warp(schedule, warp_size):
    emulator.configure(*schedule, 1, warp_size)
    got = run("warp_votes", 63, size=320).reshape(64 // warp_size, warp_size, 5)
    for w, warp in enumerate(got):
        lanes = np.arange(w * warp_size, (w + 1) * warp_size)
        assert (warp == [lanes.sum(), -lanes[0], warp_size // 2, 40 in lanes, lanes[-1] < 63]).all()
    whole = run("whole_warp", size=64).reshape(-1, warp_size)
    assert (whole == np.arange(64).reshape(-1, warp_size).sum(1, keepdims=True)).all()


def test_a_sum_in_shared_memory(workers):
    assert (run("tree_sum", block=1024, size=1024) == 256).all()


def test_atomics(workers):
    got = run("atomics", grid=7, block=96, out=[0, 0, 0, 0])
    assert got.tolist() == [7 * 96 * 95 // 2, 95, 2**31 - 1, 7 * 96]


def test_the_last_block_to_come(workers):
    got = run("last_block_sums", grid=9, out=[0] * (2 + 9 * 64))
    assert got[:2].tolist() == [0, 9 * 64 * 65 // 2]


def test_named_barriers():
    got = run("producers_and_consumers", 5, block=96, size=96)
    want = sum(100 * i + np.arange(96) % 32 for i in range(5))
    assert (got[32:] == want[32:]).all()


def test_copies_in_two_stages():
    data = np.arange(5 * 128) * 7
    got = run("copies_in_two_stages", 5, block=32, out=[*data, *[0] * 32])
    thread = np.arange(32)
    want = sum(data[128 * i + (4 * thread + 64) % 128] for i in range(5))
    assert (got[5 * 128 :] == want).all()


@pytest.mark.parametrize("source_bytes", [0, 4, 12, 16])
def test_copy_of_a_part(source_bytes):
    got = run("copy_of_a_part", source_bytes, block=8, out=list(range(1, 33))).reshape(8, 4)
    want = np.arange(1, 33).reshape(8, 4) * (np.arange(4) < source_bytes // 4)
    assert (got == want).all()


def test_what_is_read_before_its_copy_lands(build):
    if build.checked:
        return  # reported: see below
    got = run("copy_read_too_early", block=8, out=list(range(32)))
    assert (got[::4] == -1).all()


@pytest.mark.parametrize(
    ("kernel", "message", "options"),
    [
        (
            "lanes_part_in_a_shuffle",
            r"divergent warp: lane \d+ in __shfl_xor_sync of lanes .* lane \d+ in",
            {},
        ),
        ("a_lane_is_missing", "deadlock: no thread can run\n.*1 thread at barrier 0, emulator.cpp:", {}),
        ("a_lane_is_missing", "deadlock: no thread can run\n.*31 threads in __shfl_xor_sync of lanes ", {}),
        ("reads_an_absent_lane", "__shfl_xor_sync at .* reads from a lane that takes no part", {}),
        ("mask_without_the_caller", "lanes ffff do not include the caller, lane", {}),
        ("barrier_in_two_branches", "divergent barrier 0: some threads at emulator.cpp", {}),
        ("barrier_of_a_few", "deadlock: no thread can run", {}),
        ("barrier_counts_differ", r"barrier 1 at .*: (64|96) threads, others said (96|64)", {"block": 96}),
        ("barrier_of_half_a_warp", "48 threads are no whole number of warps", {}),
        ("barrier_beyond_15", "barrier 16 at .*: there are 16", {}),
        (
            "more_shared_memory_than_launched",
            "uses 400000 bytes of shared memory, it was launched with 1028",
            {},
        ),
        ("copy_never_waited_for", "cp.async at emulator.cpp:.* was never waited for", {"size": 8}),
        ("copy_outside_shared", "cp.async at emulator.cpp:.* writes outside shared memory", {"size": 8}),
        ("copy_misaligned", "misaligned cp.async at emulator.cpp:", {"size": 8}),
        (
            "matrix_of_a_part_of_a_warp",
            r"ldmatrix at .* needs all lanes of the warp, there are \w*ff,",
            {"block": 32},
        ),
        ("matrix_row_misaligned", "the row of lane 0 is no multiple of 16 bytes", {"block": 32}),
        ("matrix_row_not_shared", "the row of lane 0 is not in shared memory", {"block": 32, "size": 8}),
    ],
)
def test_defects_are_reported(kernel, message, options):
    with pytest.raises(RuntimeError, match=f"(?s){kernel}: .*(?:{message})"):
        run(kernel, **{"size": 96, **options})
    assert (run("indices", size=64) == np.arange(64)).all()  # and the next launch is fine


@pytest.mark.parametrize(
    ("kernel", "message", "options"),
    [
        ("reads_what_nobody_wrote", "uninitialised memory: read of shared memory", {}),
        ("no_barrier", "uninitialised memory|data race", {}),
        ("no_sync_in_a_warp", "uninitialised memory|data race", {}),
        ("shuffles_order_no_memory", "data race: (read|write) of shared memory", {}),
        ("written_while_read", "data race: (read|write) of shared memory", {}),
        ("counted_without_atomics", "data race: (read|write) of shared memory", {}),
        ("sync_of_other_lanes", "uninitialised memory|data race", {}),
        ("copy_seen_by_others_too_early", "a cp.async is in flight|data race|uninitialised", {"size": 256}),
        (
            "copy_read_too_early",
            r"a cp.async is in flight: read of shared memory\+\d+ at emulator.cpp:",
            {"size": 32, "block": 8},
        ),
        ("beyond_shared", "out of bounds", {}),
        ("beyond_a_buffer", "out of bounds: write of 4 bytes in no buffer at emulator.cpp:", {}),
        ("misaligned_pair", "misaligned", {}),
        ("local_of_another_thread", "another thread's local memory", {}),
        ("blocks_write_the_same", "race between blocks: write of out", {"grid": 2}),
        ("last_block_without_atomics", "race between blocks: read of out", {"grid": 3, "size": 200}),
        ("index_beyond_an_array", "array index out of bounds at emulator.cpp:", {}),
        ("shift_too_far", "shift by more than the width at emulator.cpp:", {}),
        ("barrier_without_arrivals", "uninitialised memory|data race", {}),
    ],
)
def test_defects_that_the_check_build_sees(build, kernel, message, options):
    if not build.checked:
        pytest.skip("seen by the check build only")
    with pytest.raises(RuntimeError, match=f"(?s){kernel}: .*(?:{message})"):
        run(kernel, **{"size": 96, **options})


def test_bytes_are_counted(build):
    if not build.checked:
        pytest.skip("counted by the check build only")
    run("indices", grid=3, size=192)
    assert emulator.traffic() == (0, 4 * 192, 0)
    run("copies_in_two_stages", 5, block=32, out=[0] * (5 * 128 + 32))
    assert emulator.traffic() == (4 * 5 * 128, 4 * 32, 0)
    run("atomics", grid=7, block=96, out=[0, 0, 0, 0])
    assert emulator.traffic()[:2] == (0, 0)
    assert emulator.traffic()[2] >= 4 * 7 * (3 * 96 + 1)


@pytest.mark.parametrize(
    ("kernel", "n", "block", "sectors", "wavefronts"),
    [
        # (read requests, sectors, write requests, sectors), (requests, wavefronts, the least)
        ("strides", 1, 32, (0, 0, 2, 4 + 1), (4, 4, 4)),
        ("strides", 1, 64, (0, 0, 3, 8 + 1), (7, 7, 7)),  # two warps
        ("strides", 1, 20, (0, 0, 2, 3 + 1), (4, 4, 4)),
        ("strides", 2, 32, (0, 0, 2, 8 + 1), (4, 6, 4)),
        ("strides", 8, 32, (0, 0, 2, 32 + 1), (4, 2 * 8 + 1 + 2, 4)),
        ("quads", 4, 32, (1, 16, 0, 0), (1, 4, 4)),  # 8 lanes at a time
        ("quads", 8, 32, (1, 16, 0, 0), (1, 8, 4)),
    ],
)
def test_requests_are_counted(build, schedule, kernel, n, block, sectors, wavefronts):
    if not build.checked:
        pytest.skip("counted by the check build only")
    emulator.configure(*schedule, 1, 32, count_requests=True)
    run(kernel, n, block=block, size=512)
    assert emulator.sectors() == sectors
    assert emulator.wavefronts() == wavefronts


def test_sync_orders_the_memory_of_a_warp():
    assert (run("sync_in_a_warp", 3, size=64) == 2 + (np.arange(64) ^ 1)).all()


@pytest.mark.parametrize(
    ("grid", "block", "message"),
    [
        ((0, 1, 1), (32, 1, 1), "at least one block"),
        ((1, 65536, 1), (32, 1, 1), "at most 65535 blocks in y and z"),
        ((1, 1, 1), (1025, 1, 1), "1 to 1024 threads"),
        ((1, 1, 1), (1, 1, 65), "at most 64 layers"),
    ],
)
def test_launches_that_no_gpu_takes(grid, block, message):
    with pytest.raises(RuntimeError, match=f"indices: .*{message}"):
        run("indices", grid=grid, block=block)


def test_which_thread_failed():
    with pytest.raises(RuntimeError, match=r"in block \(0, 0, 0\) thread \(\d+, 0, 0\)"):
        run("mask_without_the_caller", size=64)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_product_of_matrices(dtype):
    draw = np.random.default_rng(0)
    values = [draw.standard_normal(shape).astype(np.float32) for shape in ((16, 16), (16, 8))]
    if dtype == "fp16":
        stored = [x.astype(np.float16) for x in values]
        bits = [x.view(np.uint16) for x in stored]
        exact = [x.astype(np.float64) for x in stored]
    else:
        bits = [(x.view(np.uint32) >> 16).astype(np.uint16) for x in values]
        exact = [(x.astype(np.uint32) << 16).view(np.float32).astype(np.float64) for x in bits]
    d = draw.standard_normal((16, 8)).astype(np.float32)
    want = d + exact[0] @ exact[1]
    emulator.multiply(dtype == "fp16", bits[0], bits[1], d)
    np.testing.assert_allclose(d, want, rtol=1e-6, atol=1e-6)
