#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/bench.sh [options of bench/]
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh demo bench
HF_HUB_OFFLINE=1 .venv/bin/python -m bench "$@"
