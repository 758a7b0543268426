// SPDX-License-Identifier: Apache-2.0
// Lanes of a warp that do something together: each leaves its arguments and waits; the last one to come works
// for all. Lanes that name each other must be in the same instruction on the same line with the same mask.
#include <bit>

#include "gpu/emulator/checker.h"
#include "gpu/emulator/requests.h"

namespace palmette::emulator {

namespace {

using Hex = unsigned long long;

LaneMask all_lanes() {
  const int size = warp_size();
  return size == 64 ? ~LaneMask{0} : (LaneMask{1} << size) - 1;
}

// Lanes may have returned since the others came here.
void check_whole(const Warp& warp, const RunningThread& thread) {
  if (thread.whole && warp.alive != all_lanes())
    fail("%s at %s needs all lanes of the warp, there are %llx", thread.what, text_of(thread.site).c_str(),
         Hex{warp.alive});
}

void check_agreement(const RunningThread& a, const RunningThread& b) {
  if (a.mask == b.mask && a.what == b.what && same_site(a.site, b.site)) return;
  fail("divergent warp: lane %u in %s of lanes %llx at %s, lane %u in %s of lanes %llx at %s", a.lane, a.what,
       Hex{a.mask}, text_of(a.site).c_str(), b.lane, b.what, Hex{b.mask}, text_of(b.site).c_str());
}

// What lanes asked memory for belongs together up to here.
void settle_requests([[maybe_unused]] Warp& warp, [[maybe_unused]] LaneMask lanes) {
  if constexpr (kChecked) {
    if (!options().count_requests) return;
    RunningThread* threads[kMaxLanes];
    size_t count = 0;
    for (LaneMask left = lanes; left != 0; left &= left - 1)
      threads[count++] = warp.lane[std::countr_zero(left)];
    requests::settle(threads, count);
  }
}

// The collective of one mask; false when somebody is missing.
bool run_mask(Warp& warp, LaneMask mask) {
  const LaneMask needed = mask & warp.alive;
  if (needed == 0 || (warp.waiting & needed) != needed) return false;
  void* arguments[kMaxLanes] = {};
  Thread* lanes[kMaxLanes] = {};
  const RunningThread& first = *warp.lane[std::countr_zero(needed)];
  check_whole(warp, first);
  for (LaneMask left = needed; left != 0; left &= left - 1) {
    RunningThread& thread = *warp.lane[std::countr_zero(left)];
    check_agreement(first, thread);
    arguments[thread.lane] = thread.argument;
    lanes[thread.lane] = &thread;
  }
  RunningThread& here = running();
  here.in_engine = true;
  settle_requests(warp, needed);
  first.function(arguments, lanes, needed);
  settle_requests(warp, needed);
  here.in_engine = false;
  warp.waiting &= ~needed;
  for (LaneMask left = needed; left != 0; left &= left - 1) make_ready(*warp.lane[std::countr_zero(left)]);
  return true;
}

}  // namespace

void order_memory([[maybe_unused]] Thread** lanes, [[maybe_unused]] LaneMask active) {
  if constexpr (kChecked) {
    RunningThread* threads[kMaxLanes];
    size_t count = 0;
    for (LaneMask left = active; left != 0; left &= left - 1)
      threads[count++] = static_cast<RunningThread*>(lanes[std::countr_zero(left)]);
    checker::these_met(threads, count);
  }
}

// A lane has returned: others may have waited for it only.
void run_collective(Worker&, Warp& warp) {
  for (LaneMask left = warp.waiting; left != 0; left &= left - 1) {
    const int lane = std::countr_zero(left);
    if ((warp.waiting >> lane & 1) != 0) run_mask(warp, warp.lane[lane]->mask);
  }
}

void join_warp(LaneMask mask, const char* what, bool whole, void* argument, WarpFunction function,
               Site site) {
  RunningThread& thread = running();
  Warp& warp = *thread.warp;
  if ((mask >> thread.lane & 1) == 0)
    fail("%s at %s: lanes %llx do not include the caller, lane %u", what, text_of(site).c_str(), Hex{mask},
         thread.lane);
  thread.mask = mask;
  thread.whole = whole;
  thread.what = what;
  thread.argument = argument;
  thread.function = function;
  thread.site = site;
  thread.state = State::in_collective;
  warp.waiting |= LaneMask{1} << thread.lane;
  check_whole(warp, thread);
  run_mask(warp, mask & all_lanes());
  wait_until_ready();
}

}  // namespace palmette::emulator
