#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# ci/hip.sh [--install] [--syntax] [architecture...]: compiles the GPU kernels with hipcc and links build/hip/libpalmette_hip.so,
# for gfx90a (waves of 64 lanes) and gfx1030 (of 32) unless told otherwise; what is up to date is not compiled again.
#   --syntax   only checks the sources: half a minute instead of several
#   --install  installs Debian's hipcc where there is none (1 GB; as root)
# Where there is no hipcc it says so and returns 77.
set -euo pipefail
cd "$(dirname "$0")/.."

install=0 syntax=0 architectures=()
for argument in "$@"; do
  case $argument in
    --install) install=1 ;;
    --syntax) syntax=1 ;;
    -*) sed -n '3,6s/^# *//p' "$0" >&2 && exit 2 ;;
    *) architectures+=("$argument") ;;
  esac
done
[ ${#architectures[@]} -gt 0 ] || architectures=(gfx90a gfx1030)

skip() {
  echo "palmette: HIP kernels not compiled: $*"
  exit 77
}
if ! command -v hipcc >/dev/null; then
  [ $install = 1 ] || skip "there is no hipcc on the PATH (ci/hip.sh --install gets Debian's)"
  [ -f /etc/debian_version ] || skip "--install knows Debian's hipcc only"
  [ "$(id -u)" = 0 ] || skip "--install needs root"
  apt-get update -qq
  DEBIAN_FRONTEND=noninteractive apt-get install -qq -y hipcc
fi

export HIP_PLATFORM=amd # hipcc takes nvcc where it finds one
# Among the warnings: a loop that clang has not unrolled, whose arrays would then be in memory.
flags=(-x hip -std=c++20 -O3 -fPIC -fvisibility=hidden -Icsrc '-DPALMETTE_GPU_BACKEND="hip"' -Wall -Wextra -Werror
  -Wno-unused-parameter -Wno-unused-command-line-argument)
for architecture in "${architectures[@]}"; do flags+=("--offload-arch=$architecture"); done
sources=(csrc/*/kernel_gpu.cu csrc/*/kernel_*_gpu.cu csrc/gpu/library.cu)

if [ $syntax = 1 ]; then
  for source in "${sources[@]}"; do
    echo "palmette: hipcc looks at $source"
    hipcc "${flags[@]}" -fsyntax-only "$source"
  done
  exit
fi

mkdir -p build/hip
compiled_by="$(hipcc --version 2>/dev/null) ${flags[*]}"
[ "$(cat build/hip/compiled-by 2>/dev/null)" = "$compiled_by" ] || rm -f build/hip/*.o
printf '%s\n' "$compiled_by" >build/hip/compiled-by
objects=()
for source in "${sources[@]}"; do
  object=${source#csrc/}
  object=build/hip/${object//\//-}.o
  objects+=("$object")
  if [ -f "$object" ] && [ -z "$(find "$source" csrc/gpu csrc/core/isa.h csrc/*/*.h csrc/*/*.cuh -newer "$object" -print -quit)" ]; then
    continue
  fi
  echo "palmette: hipcc compiles $source for ${architectures[*]}"
  hipcc "${flags[@]}" -c "$source" -o "$object.new"
  mv "$object.new" "$object"
done
hipcc -shared --offload-arch="${architectures[0]}" "${objects[@]}" -o build/hip/libpalmette_hip.so
echo "palmette: build/hip/libpalmette_hip.so, $(du -h build/hip/libpalmette_hip.so | cut -f1)"
