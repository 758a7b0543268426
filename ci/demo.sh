#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/demo.sh [options of the demo]
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh demo
HF_HUB_OFFLINE=1 .venv/bin/python -m palmette demo "$@"
