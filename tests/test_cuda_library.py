# SPDX-License-Identifier: Apache-2.0
"""libpalmette_cuda.so, where nvcc has built it: it loads beside any torch, and what its kernels became."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from palmette import testing
from palmette._library import LIBRARY

CUDA = LIBRARY.with_name("libpalmette_cuda.so")
ROOT = Path(__file__).parents[1]
KERNELS = {
    "attend",
    "attend_backward",
    "merge_states",
    "merge_states_backward",
    "verify_greedy",
    "verify_sample",
    "copy_rows",
    "select_blocks",
    "hadamard_transform",
    "tah_encode",
    "tah_decode",
    "fixpoint_encode",
    "fixpoint_decode",
    "gather_logprobs",
    "gather_logprobs_backward",
}

built = pytest.mark.skipif(not CUDA.is_file(), reason="built without nvcc, or with PALMETTE_CUDA=0")


def names(backend: str) -> set[str]:
    return set(filter(None, torch.ops.palmette._gpu_kernels(backend).split(", ")))


@built
def test_all_kernels_are_registered():
    assert names("cuda") == KERNELS


@pytest.mark.parametrize("name", ["emulated", "emulated_check"])
def test_the_emulators_have_the_same_kernels(name):
    if name not in testing.backends():
        pytest.skip("the emulator is not built")
    assert names(name) == KERNELS


@pytest.mark.parametrize("op", ["attend", "attend_out", "attend_backward", "merge_state", "merge_states"])
def test_operators_have_a_cuda_implementation(op):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"palmette::{op}", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("palmette::verify_greedy", "CUDA")
    assert torch._C._dispatch_has_kernel_for_dispatch_key("palmette::compact_kv_", "CUDA")


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_driver_it_says_so():
    status = torch.ops.palmette._gpu_status("cuda")
    assert "driver" in status or "device" in status


def test_a_library_that_is_none(tmp_path):
    missing = tmp_path / "libnothing.so"
    with pytest.raises(RuntimeError, match=missing.name):
        torch.ops.palmette._load_gpu_library(str(missing))
    with pytest.raises(RuntimeError, match="path must be a library of GPU kernels"):
        torch.ops.palmette._load_gpu_library(str(LIBRARY))


@built
def test_cubins():
    """No spills anywhere; tensor cores, ldmatrix and cp.async where they belong."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "ci" / "cubins.py"), "--library", str(CUDA)],
        capture_output=True,
        text=True,
    )
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    for name in ("`attend_kernel<Tensor<bf16>, 128, true>`", "`attend_dkv_kernel<Scalar<float>, 64>`"):
        assert name in done.stdout
