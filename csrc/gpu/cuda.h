// SPDX-License-Identifier: Apache-2.0
// gpu.cuh under nvcc.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "gpu/native.h"

#define PALMETTE_PTX 1
#define PALMETTE_TENSOR_CORES 1
#define PALMETTE_SCALAR_16 0

namespace palmette::gpu {

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// ---- groups of 32 lanes
template <class T>
__device__ __forceinline__ T shuffle(T value, int source) {
  return __shfl_sync(0xFFFFFFFFu, value, source);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int distance) {
  return __shfl_xor_sync(0xFFFFFFFFu, value, distance);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, int distance) {
  return __shfl_up_sync(0xFFFFFFFFu, value, distance);
}
__device__ __forceinline__ bool any(bool predicate) { return __any_sync(0xFFFFFFFFu, predicate) != 0; }
__device__ __forceinline__ bool all(bool predicate) { return __all_sync(0xFFFFFFFFu, predicate) != 0; }
__device__ __forceinline__ uint32_t ballot(bool predicate) { return __ballot_sync(0xFFFFFFFFu, predicate); }
// What a lane has written before, all read behind it.
__device__ __forceinline__ void group_sync() { __syncwarp(); }

// ---- launches
// Lives while an operator launches its kernels. This library's copy of the CUDA runtime need not know which
// device torch's copy has chosen.
struct LaunchScope {
  explicit LaunchScope(const LaunchContext& context) {
    check(cudaSetDevice(context.device), "cudaSetDevice");
  }
};

inline const char* device_status() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  return status != cudaSuccess ? cudaGetErrorString(status) : count == 0 ? "there is no device" : "";
}

inline bool has_tensor_cores() { return true; }

// The most shared memory that a block of this device may have.
inline size_t shared_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        "cudaDeviceGetAttribute");
  return static_cast<size_t>(bytes);
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const LaunchContext& context, Arguments&&... arguments) {
  // The most that any launch may want, so that threads which launch the same kernel agree.
  if (shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_limit())),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(context.stream);
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace palmette::gpu
