#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/test.sh [pytest options]: builds the library and the module of tests/cpp, and runs all tests, on all backends if --backends
# says nothing else, in PALMETTE_TEST_WORKERS (2) processes.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh demo test
ci/build.sh -DPALMETTE_EMULATOR=ON -DPALMETTE_TEST_MODULE=ON
[[ " $* " == *" --backends"* ]] || set -- --backends=all "$@"
HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n "${PALMETTE_TEST_WORKERS:-2}" --dist worksteal "$@"
