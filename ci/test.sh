#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/test.sh [pytest options]: builds the library and the module of tests/cpp, and runs all tests.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh demo test
ci/build.sh -DPALMETTE_EMULATOR=ON -DPALMETTE_TEST_MODULE=ON
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest "$@"
