// SPDX-License-Identifier: Apache-2.0
// What cuda.h and hip.h have in common: a compiler for a GPU knows the words of a kernel by itself.
#pragma once

#include <cstddef>

#define PALMETTE_SITE
#define PALMETTE_COMMA_SITE
#define PALMETTE_COMMA_PASS

namespace palmette::gpu {

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

}  // namespace palmette::gpu
