// SPDX-License-Identifier: Apache-2.0
// The one header that a GPU kernel includes: CUDA under nvcc, HIP under hipcc, the emulator under any other
// compiler.
//
// A kernel keeps its shared memory in one struct, shared<S>(); it is launched through launch(); accesses
// wider than a word go through load() and store(); every PTX instruction is in ptx.cuh.
//
// Lanes work together in groups of 32: a warp, or half of a wave of 64 lanes. Kernels exchange values through
// shuffle(), shuffle_xor(), any(), all() and ballot() here, never through the compilers' own names.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gpu/library.h"

// Each defines its own name, PALMETTE_PTX, PALMETTE_HIP or PALMETTE_EMULATED, and, as 1 or 0,
//   PALMETTE_TENSOR_CORES  there may be tensor cores (has_tensor_cores())
//   PALMETTE_SCALAR_16     there may be none, so 16-bit elements need other code too
#if defined(__HIPCC__)
#include "gpu/hip.h"
#elif defined(__CUDACC__)
#include "gpu/cuda.h"
#else
#include "gpu/emulator/emulated.h"
#endif

namespace palmette::gpu {

constexpr int kLanes = 32;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x) & (kLanes - 1); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x) / kLanes; }

// Over the lanes of a group, the same on each: pairs are combined in an order that depends on nothing.
__device__ __forceinline__ float group_max(float x PALMETTE_COMMA_SITE) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = fmaxf(x, shuffle_xor(x, step PALMETTE_COMMA_PASS));
  return x;
}
__device__ __forceinline__ float group_sum(float x PALMETTE_COMMA_SITE) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x += shuffle_xor(x, step PALMETTE_COMMA_PASS);
  return x;
}
__device__ __forceinline__ int group_max(int x PALMETTE_COMMA_SITE) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = max(x, shuffle_xor(x, step PALMETTE_COMMA_PASS));
  return x;
}
__device__ __forceinline__ int group_min(int x PALMETTE_COMMA_SITE) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) x = min(x, shuffle_xor(x, step PALMETTE_COMMA_PASS));
  return x;
}

// Adds a launcher to the library that it is linked into:
//     const Registration<&merge_states> registration("merge_states");
template <auto kLaunch>
class Registration {
 public:
  explicit Registration(const char* name) noexcept { add(name, kLaunch); }

 private:
  template <class Params>
  static void add(const char* name, void (*)(const Params&, const LaunchContext&)) noexcept {
    add_kernel({name, sizeof(Params), [](const void* params, const LaunchContext& context) {
                  const LaunchScope scope(context);
                  kLaunch(*static_cast<const Params*>(params), context);
                }});
  }
};

// 16-bit storage; arithmetic is done in float, or by the tensor cores.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace palmette::gpu
