// SPDX-License-Identifier: Apache-2.0
// gpu.cuh on the emulator.
#pragma once

#include <bit>
#include <tuple>

#include "gpu/emulator/atomics.h"
#include "gpu/emulator/checker.h"
#include "gpu/emulator/language.h"
#include "gpu/emulator/options.h"
#include "gpu/emulator/record.h"
#include "gpu/emulator/runtime.h"
#include "gpu/emulator/warp.h"
#include "gpu/library.h"

#define PALMETTE_EMULATED 1
#define PALMETTE_TENSOR_CORES 1
#define PALMETTE_SCALAR_16 1

// The line of a kernel that a helper was called from, handed on from helper to helper.
#define PALMETTE_SITE EMULATOR_SITE
#define PALMETTE_COMMA_SITE , EMULATOR_SITE
#define PALMETTE_COMMA_PASS , site

namespace palmette::gpu {

template <class S>
S& shared() {
  return *static_cast<S*>(emulator::shared_memory(sizeof(S)));
}

// One access of all bytes of T, as on a GPU: the compiler may not go through its members.
template <size_t kBytes>
using Word =
    std::conditional_t<kBytes == 16, unsigned __int128, std::conditional_t<kBytes == 8, uint64_t, uint32_t>>;
template <class T>
constexpr bool kIsWide = sizeof(T) == alignof(T) && (sizeof(T) == 8 || sizeof(T) == 16);
template <class T>
T load(const T* address) {
  if constexpr (kIsWide<T>)
    return std::bit_cast<T>(*reinterpret_cast<const Word<sizeof(T)>*>(address));
  else
    return *address;
}
template <class T>
void store(T* address, T value) {
  if constexpr (kIsWide<T>)
    *reinterpret_cast<Word<sizeof(T)>*>(address) = std::bit_cast<Word<sizeof(T)>>(value);
  else
    *address = value;
}

// ---- groups of 32 lanes
inline emulator::LaneMask group_mask() {
  return emulator::lane_index() < 32 ? 0xFFFFFFFFULL : 0xFFFFFFFFULL << 32;
}
template <class T>
T shuffle(T value, int source, EMULATOR_SITE) {
  return __shfl_sync(group_mask(), value, source, 32, site);
}
template <class T>
T shuffle_xor(T value, int distance, EMULATOR_SITE) {
  return __shfl_xor_sync(group_mask(), value, distance, 32, site);
}
template <class T>
T shuffle_up(T value, int distance, EMULATOR_SITE) {
  return __shfl_up_sync(group_mask(), value, distance, 32, site);
}
inline bool any(bool predicate, EMULATOR_SITE) { return __any_sync(group_mask(), predicate, site) != 0; }
inline bool all(bool predicate, EMULATOR_SITE) { return __all_sync(group_mask(), predicate, site) != 0; }
inline uint32_t ballot(bool predicate, EMULATOR_SITE) {
  const uint64_t votes = __ballot_sync(group_mask(), predicate, site);
  return static_cast<uint32_t>(emulator::lane_index() < 32 ? votes : votes >> 32);
}
inline void group_sync(EMULATOR_SITE) { __syncwarp(group_mask(), site); }

// ---- launches
using LaunchScope = emulator::LaunchScope;

inline const char* device_status() { return ""; }
inline bool has_tensor_cores() { return emulator::options().warp_size == 32; }
inline size_t shared_limit() { return emulator::options().shared_limit; }

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
            const LaunchContext& context, Arguments&&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  } call{kernel, {static_cast<Parameters>(arguments)...}};
  const emulator::Recorder recorder = emulator::options().recorder;
  std::vector<unsigned char> parameters;
  emulator::LaunchRecord record{};
  if (recorder != nullptr) {
    parameters = emulator::packed(call.arguments);
    record = {name,
              {grid.x, grid.y, grid.z},
              {block.x, block.y, block.z},
              shared_bytes,
              parameters.data(),
              parameters.size(),
              context.extents,
              context.num_extents};
    recorder(&record, 0);
  }
  emulator::run_grid(
      grid, block, shared_bytes,
      [](void* context) {
        auto& call = *static_cast<Call*>(context);
        std::apply(call.kernel, call.arguments);
      },
      &call, sizeof(call), name);
  if (recorder != nullptr) recorder(&record, 1);
}

}  // namespace palmette::gpu
