// SPDX-License-Identifier: Apache-2.0
// CUDA's words, for a compiler that does not know them.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "gpu/emulator/runtime.h"

// NOLINTBEGIN(bugprone-reserved-identifier): CUDA chose the names
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))

#define threadIdx (::palmette::emulator::thread_index())
#define blockIdx (::palmette::emulator::block_index())
#define blockDim (::palmette::emulator::block_size())
#define gridDim (::palmette::emulator::grid_size())
#define warpSize (::palmette::emulator::warp_size())

#define EMULATOR_VECTORS(T, name)                            \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };         \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };   \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; } \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATOR_VECTORS(float, float)
EMULATOR_VECTORS(int, int)
EMULATOR_VECTORS(unsigned, uint)
#undef EMULATOR_VECTORS

// ---- barriers
inline void __syncthreads(EMULATOR_SITE) { palmette::emulator::wait_at_barrier(0, 0, 0, site); }
inline int __syncthreads_count(int predicate, EMULATOR_SITE) {
  return palmette::emulator::wait_at_barrier(0, 0, predicate != 0, site).sum;
}
inline int __syncthreads_or(int predicate, EMULATOR_SITE) {
  return palmette::emulator::wait_at_barrier(0, 0, predicate != 0, site).sum != 0;
}
inline int __syncthreads_and(int predicate, EMULATOR_SITE) {
  return palmette::emulator::wait_at_barrier(0, 0, predicate == 0, site).sum == 0;
}
// Blocks run on several OS threads: what one publishes, another may read.
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() {}

// ---- numbers
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __popcll(unsigned long long bits) { return std::popcount(bits); }
inline int __clz(int bits) { return std::countl_zero(static_cast<unsigned>(bits)); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
using std::max;
using std::min;
// NOLINTEND(bugprone-reserved-identifier)
