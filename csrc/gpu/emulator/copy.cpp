// SPDX-License-Identifier: Apache-2.0
// cp.async. A copy is only made when its group is waited for; until then its destination holds NaN in every
// floating-point format, so that a missing wait shows in the result.
#include <cstring>

#include "gpu/emulator/checker.h"

namespace palmette::emulator {

void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site) {
  if (bytes != 4 && bytes != 8 && bytes != 16)
    fail("cp.async at %s: must be of 4, 8 or 16 bytes, got %u", text_of(site).c_str(), bytes);
  if (source_bytes > bytes)
    fail("cp.async at %s: reads %u bytes to write %u", text_of(site).c_str(), source_bytes, bytes);
  if (!is_shared(shared, bytes)) fail("cp.async at %s writes outside shared memory", text_of(site).c_str());
  if (reinterpret_cast<uintptr_t>(shared) % bytes != 0 || reinterpret_cast<uintptr_t>(global) % bytes != 0)
    fail("misaligned cp.async at %s: both addresses must be multiples of %u", text_of(site).c_str(), bytes);
  if constexpr (kChecked) checker::copy_issued(running(), shared, global, bytes, source_bytes, site);
  std::memset(shared, 0xFF, bytes);
  running().copies.push_back({shared, global, bytes, source_bytes, site});
}

void commit_copies() {
  RunningThread& thread = running();
  thread.groups.push_back(thread.copies.size());
}

void wait_for_copies(unsigned groups_in_flight) {
  RunningThread& thread = running();
  if (thread.groups.size() <= groups_in_flight) return;
  const size_t landing = thread.groups.size() - groups_in_flight, end = thread.groups[landing - 1];
  for (size_t i = 0; i < end; ++i) {
    const AsyncCopy& copy = thread.copies[i];
    std::memcpy(copy.to, copy.from, copy.source_bytes);
    std::memset(static_cast<char*>(copy.to) + copy.source_bytes, 0, copy.bytes - copy.source_bytes);
    if constexpr (kChecked) checker::copy_landed(thread, copy.to, copy.bytes);
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<std::ptrdiff_t>(end));
  thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<std::ptrdiff_t>(landing));
  for (size_t& group : thread.groups) group -= end;
}

void check_copies_done(RunningThread& thread) {
  if (!thread.copies.empty())
    fail("cp.async at %s was never waited for", text_of(thread.copies.front().site).c_str());
}

}  // namespace palmette::emulator
