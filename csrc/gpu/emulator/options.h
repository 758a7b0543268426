// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>

#include "gpu/emulator/record.h"

namespace palmette::emulator {

enum class Order { forward, reverse, random };  // of warps, of lanes in a warp, and of blocks

struct Options {
  Order order = Order::forward;
  uint64_t seed = 1;                // of the random order: the same seed is the same schedule
  int workers = 1;                  // OS threads that share the blocks out
  int warp_size = 32;               // 32 or 64
  size_t shared_limit = 227 << 10;  // bytes of shared memory that a block may have (H100)
  bool count_requests = false;      // requests.h; slow
  Recorder recorder = nullptr;
};

Options& options();

// Is held by whoever reads or writes options() or what the check build knows.
std::recursive_mutex& mutex();

// Lives while an operator launches its kernels; one at a time: the check build looks at one launch, and a
// recorder pairs what was before a launch with what is after it.
class LaunchScope {
 public:
  explicit LaunchScope(const gpu::LaunchContext& context);
  ~LaunchScope();
  LaunchScope(const LaunchScope&) = delete;
  LaunchScope& operator=(const LaunchScope&) = delete;

 private:
  std::lock_guard<std::recursive_mutex> lock_;
};

}  // namespace palmette::emulator
