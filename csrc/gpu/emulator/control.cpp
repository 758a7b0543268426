// SPDX-License-Identifier: Apache-2.0
// What palmette.testing asks of an emulator that it has loaded: schedules, launches, and the bytes that were
// moved.
#include <cstring>

#include "gpu/emulator/checker.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace palmette::emulator {

// order: 0 forward, 1 reverse, 2 random with the seed.
EXPORTED void palmette_emulator_configure(int order, uint64_t seed, int warp_size, uint64_t shared_limit) {
  options().order = static_cast<Order>(order);
  options().seed = seed;
  options().warp_size = warp_size;
  options().shared_limit = shared_limit;
}

// Has every launch told to `recorder`, until it is null again.
EXPORTED void palmette_emulator_record(Recorder recorder) { options().recorder = recorder; }

// Bytes that the last operator read, wrote and updated atomically in the buffer of that name. Returns 0 where
// there is none; only the check build counts.
EXPORTED int palmette_emulator_traffic([[maybe_unused]] const char* name, [[maybe_unused]] uint64_t* bytes) {
  if constexpr (kChecked) {
    const BufferTraffic* traffic = traffic_of(name);
    if (traffic == nullptr) return 0;
    bytes[0] = traffic->bytes_read, bytes[1] = traffic->bytes_written, bytes[2] = traffic->bytes_atomic;
    return 1;
  }
  return 0;
}

}  // namespace palmette::emulator
