// SPDX-License-Identifier: Apache-2.0
// Shuffles, votes and reductions. Masks are 64 bits wide, so that warps of 64 lanes can name themselves;
// CUDA's full mask 0xffffffff names the lower half of such a warp only.
#pragma once

#include <bit>
#include <cstring>
#include <type_traits>

#include "gpu/emulator/runtime.h"

namespace palmette::emulator {

enum class Shuffle { index, up, down, exclusive_or };

struct ShuffleArgument {
  uint64_t value, result;
  Shuffle mode;
  int operand, width;
  bool from_absent;
};

struct RunShuffle {
  void operator()(ShuffleArgument** arguments, Thread** lanes, LaneMask active) const {
    for (LaneMask left = active; left != 0; left &= left - 1) {
      const int lane = std::countr_zero(left);
      ShuffleArgument& a = *arguments[lane];
      const int first = lane & ~(a.width - 1), end = first + a.width;
      int source = lane;
      if (a.mode == Shuffle::index) source = first + (a.operand & (a.width - 1));
      if (a.mode == Shuffle::up && lane - a.operand >= first) source = lane - a.operand;
      if (a.mode == Shuffle::down && lane + a.operand < end) source = lane + a.operand;
      if (a.mode == Shuffle::exclusive_or && (lane ^ a.operand) < end) source = lane ^ a.operand;
      a.from_absent = lanes[source] == nullptr;
      a.result = a.from_absent ? ~uint64_t{0} : arguments[source]->value;
    }
  }
};

template <class T>
T shuffle(LaneMask mask, T value, Shuffle mode, int operand, int width, const char* name, Site site) {
  static_assert(std::is_trivially_copyable_v<T> && (sizeof(T) == 4 || sizeof(T) == 8), "4 or 8 bytes");
  ShuffleArgument a{0, 0, mode, operand, width, false};
  std::memcpy(&a.value, &value, sizeof(T));
  join_warp(mask, name, false, a, RunShuffle{}, site);
  if (a.from_absent) fail("%s at %s:%d reads from a lane that takes no part", name, site.file, site.line);
  T result;
  std::memcpy(&result, &a.result, sizeof(T));
  return result;
}

// `Fold` combines the values of the lanes in ascending order; every lane receives the result.
template <class T>
struct FoldArgument {
  T value;
};
template <class T, class Fold>
struct RunFold {
  void operator()(FoldArgument<T>** arguments, Thread**, LaneMask active) const {
    T total = arguments[std::countr_zero(active)]->value;
    for (LaneMask left = active & (active - 1); left != 0; left &= left - 1)
      total = Fold{}(total, arguments[std::countr_zero(left)]->value);
    for (LaneMask left = active; left != 0; left &= left - 1)
      arguments[std::countr_zero(left)]->value = total;
  }
};
template <class Fold, class T>
T fold(LaneMask mask, T value, const char* name, Site site) {
  FoldArgument<T> a{value};
  join_warp(mask, name, false, a, RunFold<T, Fold>{}, site);
  return a.value;
}

struct SyncArgument {};
struct RunSync {
  void operator()(SyncArgument**, Thread** lanes, LaneMask active) const { order_memory(lanes, active); }
};

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    return b > a ? b : a;
  }
};
struct Or {
  template <class T>
  T operator()(T a, T b) const {
    return a | b;
  }
};

}  // namespace palmette::emulator

// NOLINTBEGIN(bugprone-reserved-identifier): CUDA chose the names
#define EMULATOR_SHUFFLE(name, mode)                                                                   \
  template <class T>                                                                                   \
  inline T name(uint64_t mask, T value, int operand, int width = ::palmette::emulator::warp_size(),    \
                EMULATOR_SITE) {                                                                       \
    return palmette::emulator::shuffle(mask, value, palmette::emulator::Shuffle::mode, operand, width, \
                                       #name, site);                                                   \
  }
EMULATOR_SHUFFLE(__shfl_sync, index)
EMULATOR_SHUFFLE(__shfl_up_sync, up)
EMULATOR_SHUFFLE(__shfl_down_sync, down)
EMULATOR_SHUFFLE(__shfl_xor_sync, exclusive_or)
#undef EMULATOR_SHUFFLE

#define EMULATOR_REDUCE(name, T, function)                                                   \
  inline T name(uint64_t mask, T value, EMULATOR_SITE) {                                     \
    return palmette::emulator::fold<palmette::emulator::function>(mask, value, #name, site); \
  }
EMULATOR_REDUCE(__reduce_add_sync, int, Add)
EMULATOR_REDUCE(__reduce_add_sync, unsigned, Add)
EMULATOR_REDUCE(__reduce_min_sync, int, Least)
EMULATOR_REDUCE(__reduce_min_sync, unsigned, Least)
EMULATOR_REDUCE(__reduce_max_sync, int, Greatest)
EMULATOR_REDUCE(__reduce_max_sync, unsigned, Greatest)
EMULATOR_REDUCE(__reduce_or_sync, unsigned, Or)
#undef EMULATOR_REDUCE

inline void __syncwarp(uint64_t mask = ~uint64_t{0}, EMULATOR_SITE) {
  palmette::emulator::SyncArgument nothing;
  palmette::emulator::join_warp(mask, "__syncwarp", false, nothing, palmette::emulator::RunSync{}, site);
}
inline uint64_t __ballot_sync(uint64_t mask, int predicate, EMULATOR_SITE) {
  const uint64_t bit = predicate != 0 ? uint64_t{1} << palmette::emulator::lane_index() : 0;
  return palmette::emulator::fold<palmette::emulator::Or>(mask, bit, "__ballot_sync", site);
}
inline int __any_sync(uint64_t mask, int predicate, EMULATOR_SITE) {
  return palmette::emulator::fold<palmette::emulator::Or>(mask, predicate != 0 ? 1U : 0U, "__any_sync",
                                                          site) != 0;
}
inline int __all_sync(uint64_t mask, int predicate, EMULATOR_SITE) {
  return palmette::emulator::fold<palmette::emulator::Or>(mask, predicate == 0 ? 1U : 0U, "__all_sync",
                                                          site) == 0;
}
// NOLINTEND(bugprone-reserved-identifier)
