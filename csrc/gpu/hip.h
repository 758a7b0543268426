// SPDX-License-Identifier: Apache-2.0
// gpu.cuh under hipcc; tried with ROCm 5.2. A wave has 64 lanes (CDNA, GCN) or 32 (RDNA); the two groups of a
// wave of 64 may be at different places of a kernel, so a group exchanges values within its own half only.
//
// CUDA's words are HIP's too, but for two: __grid_constant__, and the second number of __launch_bounds__,
// which HIP reads as waves per SIMD. It leaves a thread about the same number of registers there, so kernels
// need not care.
#pragma once

#include <hip/hip_runtime.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "gpu/native.h"

#define PALMETTE_HIP 1
#define PALMETTE_TENSOR_CORES 0  // CDNA's work on a whole wave, and their fragments are laid out otherwise
#define PALMETTE_SCALAR_16 1

#ifndef __grid_constant__
#define __grid_constant__
#endif

namespace palmette::gpu {

inline void check(hipError_t status, const char* what) {
  if (status != hipSuccess) throw std::runtime_error(std::string(what) + ": " + hipGetErrorString(status));
}

// ---- groups of 32 lanes
template <class T>
__device__ __forceinline__ T shuffle(T value, int source) {
  return __shfl(value, source, 32);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int distance) {
  return __shfl_xor(value, distance, 32);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int distance) {
  return __shfl_up(value, static_cast<unsigned>(distance), 32);
}
__device__ __forceinline__ uint32_t ballot(bool predicate) {
  return static_cast<uint32_t>(__ballot(predicate) >> (__lane_id() & 32));
}
__device__ __forceinline__ bool any(bool predicate) { return ballot(predicate) != 0; }
__device__ __forceinline__ bool all(bool predicate) { return ballot(!predicate) == 0; }
__device__ __forceinline__ void group_sync() {  // lanes go in step: only the compiler must not reorder
  __builtin_amdgcn_fence(__ATOMIC_ACQ_REL, "wavefront");
  __builtin_amdgcn_wave_barrier();
}

// ---- launches
struct LaunchScope {  // lives while an operator launches its kernels
  explicit LaunchScope(const LaunchContext& context) { check(hipSetDevice(context.device), "hipSetDevice"); }
};

inline const char* device_status() {
  int count = 0;
  const hipError_t status = hipGetDeviceCount(&count);
  return status != hipSuccess ? hipGetErrorString(status) : count == 0 ? "there is no device" : "";
}

inline bool has_tensor_cores() { return false; }

// The most LDS that a workgroup of this device may have; a launch needs no leave to use all of it.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  check(hipGetDevice(&device), "hipGetDevice");
  check(hipDeviceGetAttribute(&bytes, hipDeviceAttributeMaxSharedMemoryPerBlock, device),
        "hipDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const LaunchContext& context, Arguments&&... arguments) {
  // not <<< >>>, whose errors are those of any earlier call too
  std::tuple<Parameters...> values{static_cast<Parameters>(arguments)...};
  std::apply(
      [&](auto&... value) {
        void* addresses[] = {&value...};
        check(hipLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, addresses, shared_bytes,
                              static_cast<hipStream_t>(context.stream)),
              name);
      },
      values);
}

}  // namespace palmette::gpu
