#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks what only the system can provide, and names everything that is missing at once.
set -euo pipefail

python=${PYTHON:-python3}
missing=()
packages=()
need() { # need <what> <Debian package>
  missing+=("$1")
  packages+=("$2")
}

if ! command -v "$python" >/dev/null; then
  need "$python (Python 3.10 or later)" python3
  need "Python's venv module" python3-venv
  need "Python.h" python3-dev
else
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || need "Python 3.10 or later (set PYTHON=)" python3
  "$python" -c 'import venv, ensurepip' 2>/dev/null || need "Python's venv module" python3-venv
  header=$("$python" -c 'import os, sysconfig; print(os.path.join(sysconfig.get_paths()["include"], "Python.h"))')
  [ -f "$header" ] || need "Python.h" python3-dev
fi

# The kernels use C++20's template lambdas and the vector shuffles that GCC has from version 12 and clang always had.
if ! "${CXX:-g++}" -std=c++20 -fsyntax-only -x c++ - 2>/dev/null <<'CPP'; then
#include <cstdint>
typedef float V __attribute__((vector_size(16)));
V swap(V v) { return __builtin_shufflevector(v, v, 1, 0, 3, 2); }
int main() { return [] <int n> { return n; }.template operator()<0>(); }
CPP
  need "a C++20 compiler (g++ 12 or later; set CXX= for another one)" g++
fi
command -v make >/dev/null || need make make

if [ ${#missing[@]} -gt 0 ]; then
  echo "palmette: the system lacks" >&2
  printf '  - %s\n' "${missing[@]}" >&2
  echo "On Debian or Ubuntu: apt-get install ${packages[*]}" >&2
  exit 1
fi
