// SPDX-License-Identifier: Apache-2.0
// What palmette.testing asks of an emulator that it has loaded: schedules, launches, and the bytes that were
// moved.
#include <cstring>

#include "gpu/emulator/checker.h"
#include "gpu/emulator/requests.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace palmette::emulator {

// order: 0 forward, 1 reverse, 2 random with the seed.
EXPORTED void palmette_emulator_configure(int order, uint64_t seed, int warp_size, uint64_t shared_limit,
                                          int count_requests) {
  const std::lock_guard lock(mutex());
  options().order = static_cast<Order>(order);
  options().seed = seed;
  options().warp_size = warp_size;
  options().shared_limit = shared_limit;
  options().count_requests = count_requests != 0;
}

// Has every launch told to `recorder`, until it is null again.
EXPORTED void palmette_emulator_record(Recorder recorder) {
  const std::lock_guard lock(mutex());
  options().recorder = recorder;
}

// What the last operator did to the buffer of that name, as BufferTraffic lists it. Returns 0 where there is
// none; only the check build counts.
EXPORTED int palmette_emulator_traffic([[maybe_unused]] const char* name, [[maybe_unused]] uint64_t* counts) {
  if constexpr (kChecked) {
    const std::lock_guard lock(mutex());
    const BufferTraffic* traffic = traffic_of(name);
    if (traffic == nullptr) return 0;
    std::memcpy(counts, traffic, sizeof *traffic);
    return 1;
  }
  return 0;
}

// What the last operator did to shared memory: requests, wavefronts, the least that it could have been; and
// lines of text, each a place in the source and its wavefronts above the least.
EXPORTED const char* palmette_emulator_shared_traffic([[maybe_unused]] uint64_t* counts) {
  static thread_local std::string lines;
  const std::lock_guard lock(mutex());
  lines.clear();
  if constexpr (kChecked) {
    const requests::SharedTraffic& shared = requests::shared();
    counts[0] = shared.requests, counts[1] = shared.wavefronts, counts[2] = shared.least;
    for (const auto& [code, wavefronts] : shared.conflicts)
      lines += checker::place(code) + " " + std::to_string(wavefronts) + "\n";
  }
  return lines.c_str();
}

}  // namespace palmette::emulator
