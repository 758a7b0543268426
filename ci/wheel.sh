#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Builds dist/palmette-*.whl, installs it in a fresh venv and uses it there, away from the source tree.
set -euo pipefail
cd "$(dirname "$0")/.."
ci/setup.sh none
export PATH="$PWD/.venv/bin:$PATH"
rm -rf dist
echo "palmette: compiling the wheel (2 to 3 minutes on 2 cores)"
pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
wheel=$(ls "$PWD"/dist/palmette-*-py3-none-*.whl)
echo "palmette: built ${wheel##*/}, $(du -h "$wheel" | cut -f1)"

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
"${PYTHON:-python3}" -m venv "$scratch/venv"
read -r -a pip_args <<<"${PIP_ARGS:-}"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pip_args[@]}" "${TORCH:-torch==2.13.0}"
"$scratch/venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pip_args[@]}" "$wheel"
cp ci/smoke.py "$scratch/"
cd "$scratch"
venv/bin/python -m palmette env
venv/bin/python smoke.py
