// SPDX-License-Identifier: Apache-2.0
// The one header that a GPU kernel includes: CUDA under nvcc, the emulator under any other compiler.
//
// A kernel keeps its shared memory in one struct, shared<S>(); it is launched through launch(); accesses
// wider than a word go through load() and store(); every PTX instruction is in ptx.cuh.
#pragma once

#if defined(__CUDACC__)

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace palmette::gpu {

using Stream = cudaStream_t;

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

template <class S>
__device__ __forceinline__ S& shared() {
  extern __shared__ __align__(1024) unsigned char palmette_shared[];
  return *reinterpret_cast<S*>(palmette_shared);
}

template <class T>
__device__ __forceinline__ T load(const T* address) {
  return *address;
}
template <class T>
__device__ __forceinline__ void store(T* address, T value) {
  *address = value;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream stream, Arguments&&... arguments) {
  if (shared_bytes > (48 << 10)) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
          name);
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

}  // namespace palmette::gpu

#else

#include <tuple>

#include "gpu/emulator/atomics.h"
#include "gpu/emulator/language.h"
#include "gpu/emulator/runtime.h"
#include "gpu/emulator/warp.h"

namespace palmette::gpu {

using Stream = void*;

template <class S>
S& shared() {
  return *static_cast<S*>(emulator::shared_memory(sizeof(S)));
}

template <class T>
T load(const T* address) {
  return *address;
}
template <class T>
void store(T* address, T value) {
  *address = value;
}

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            Stream, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  emulator::run_grid(
      grid, block, shared_bytes,
      [](void* context) {
        auto& call = *static_cast<Call*>(context);
        std::apply(call.kernel, call.arguments);
      },
      &call, sizeof(call), name);
}

}  // namespace palmette::gpu

#endif

namespace palmette::gpu {

// 16-bit storage; arithmetic is done in float, or by the tensor cores.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

}  // namespace palmette::gpu
