#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/build.sh [cmake options]: compiles into build/ and python/palmette/lib/; only what changed, after the first time.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PATH"

[ -f build/build.ninja ] || echo "palmette: compiling the library (2 to 3 minutes on 2 cores)"
cmake -S . -B build -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" "$@" >/dev/null
cmake --build build
