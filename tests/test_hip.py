# SPDX-License-Identifier: Apache-2.0
"""The GPU kernels' sources under hipcc. What they compute on waves of 64 lanes is in test_wave64.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from palmette import testing

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "ci" / "hip.sh"
LIBRARY = ROOT / "build" / "hip" / "libpalmette_hip.so"
MISSING = 77


def test_without_hipcc_the_script_says_so(tmp_path):
    for command in ("bash", "dirname"):
        (tmp_path / command).symlink_to(shutil.which(command))
    run = subprocess.run([SCRIPT], env={"PATH": str(tmp_path)}, capture_output=True, text=True)
    assert run.returncode == MISSING, run.stderr
    assert "there is no hipcc on the PATH" in run.stdout


def test_the_sources_compile():
    run = subprocess.run([SCRIPT, "--syntax"], capture_output=True, text=True)
    if run.returncode == MISSING:
        pytest.skip(run.stdout.strip())
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_library_has_every_kernel():
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.suffix in (".cu", ".cuh", ".h")]
    if not LIBRARY.is_file() or LIBRARY.stat().st_mtime < max(path.stat().st_mtime for path in sources):
        pytest.skip("build/hip/libpalmette_hip.so is not built, or not of these sources (ci/hip.sh)")
    if "emulated" not in testing.backends():
        pytest.skip("the emulator is not built")
    # in a process of its own: it becomes the backend of GPU tensors
    code = (
        "import sys, torch, palmette\n"
        "print(torch.ops.palmette._load_gpu_library(sys.argv[1]))\n"
        "print(torch.ops.palmette._gpu_kernels('hip'))\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code, LIBRARY], env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    backend, kernels = run.stdout.splitlines()
    assert backend == "hip"
    assert sorted(kernels.split(", ")) == sorted(torch.ops.palmette._gpu_kernels("emulated").split(", "))
