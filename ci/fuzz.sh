#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/fuzz.sh [--count N] [--seed S] [--backends A,B]: builds the library in build/fuzz, its codecs with the address and
# undefined-behaviour sanitizers, and reads N (1,000,000) wires that say something else than they should, with right and with
# wrong checksums.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh test
export PATH="$PWD/.venv/bin:$PATH"
cmake -S . -B build/fuzz -G Ninja -DPython_EXECUTABLE="$PWD/.venv/bin/python" -DPALMETTE_CUDA=0 -DPALMETTE_SANITIZE_CODECS=ON \
  -DPALMETTE_LIBRARY_DIR="$PWD/build/fuzz/lib" >/dev/null
cmake --build build/fuzz --target palmette_ops
PALMETTE_LIBRARY="$PWD/build/fuzz/lib/libpalmette.so" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 PYTHONPATH=python \
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)" python tests/fuzz_wires.py "$@"
