#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/gpu.sh [pytest options]: on a machine with an NVIDIA GPU, nvcc and a CUDA build of torch (TORCH=...): builds, runs the whole
# suite, whose tests of kernels then run on the GPU too, and prints what the compiler made of the kernels and how fast they are.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh demo test
ci/build.sh -DPALMETTE_CUDA=1 -DPALMETTE_EMULATOR=ON -DPALMETTE_TEST_MODULE=ON
.venv/bin/python - <<'PY'
import sys

import torch

if not torch.cuda.is_available():
    sys.exit(f"palmette: torch {torch.__version__} sees no GPU: set TORCH to a CUDA build of torch")
print(f"palmette: {torch.cuda.get_device_name()}, torch {torch.__version__}")
PY
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest "$@"
.venv/bin/python ci/cubins.py
.venv/bin/python -m bench.gpu
