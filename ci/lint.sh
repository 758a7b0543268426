#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ruff, mypy, clang-format and clang-tidy. Runs all of them, then fails if one did.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
set -e
ci/setup.sh lint
ci/build.sh -DPALMETTE_TEST_MODULE=OFF -DPALMETTE_EMULATOR=ON
set +e

export PATH="$PWD/.venv/bin:$PATH"
failed=()
check() { # check <name> <command>...
  local name=$1
  shift
  echo "palmette: $name"
  "$@" || failed+=("$name")
}

mapfile -t cpp < <(git ls-files --cached --others --exclude-standard '*.cpp' '*.h' '*.cu' '*.cuh')
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "mypy" mypy
check "clang-format" clang-format --dry-run -Werror "${cpp[@]}"
check "clang-tidy" ci/tidy.py

if [ ${#failed[@]} -gt 0 ]; then
  echo "palmette: failed: $(IFS=,; echo "${failed[*]}" | sed 's/,/, /g')" >&2
  exit 1
fi
echo "palmette: lint is clean"
