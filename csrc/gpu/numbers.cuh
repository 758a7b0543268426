// SPDX-License-Identifier: Apache-2.0
// Numbers as they are stored (float, bf16, fp16) and as they are computed with (float).
#pragma once

#include "core/isa.h"
#include "gpu/ptx.cuh"

namespace palmette::gpu {

constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
__device__ __forceinline__ float widen(fp16 x) { return ptx::widen_fp16(x.bits); }

template <class E>
__device__ __forceinline__ E narrow(float x);
template <>
__device__ __forceinline__ float narrow<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 narrow<bf16>(float x) {
  return {static_cast<uint16_t>(ptx::pack_bf16(x, 0.0f))};
}
template <>
__device__ __forceinline__ fp16 narrow<fp16>(float x) {
  return {static_cast<uint16_t>(ptx::pack_fp16(x, 0.0f))};
}

// kCount neighbours, read or written as one.
template <class E, int kCount>
struct alignas(sizeof(E) * kCount) Pack {
  E value[kCount];
};

// exp and log of either base, as the caller's LSE has it.
__device__ __forceinline__ float exponential(float x, bool base2) { return ptx::ex2(base2 ? x : x * kLog2e); }

// f(element) of the stored type; the GPU has no float64 kernels.
template <class F>
void with_element(DType dtype, F&& f) {
  if (dtype == DType::bf16) return f(bf16{});
  if (dtype == DType::f16) return f(fp16{});
  f(float{});
}

}  // namespace palmette::gpu
