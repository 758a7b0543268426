// SPDX-License-Identifier: Apache-2.0
// __syncthreads (barrier 0, all threads that have not returned) and named barriers (bar.sync, bar.arrive).
#include "gpu/emulator/checker.h"
#include "gpu/emulator/requests.h"

namespace palmette::emulator {

namespace {

Barrier& count_in(int id, unsigned count, int predicate, Site site) {
  RunningThread& thread = running();
  Worker& worker = worker_of(thread);
  if (id < 0 || id >= kMaxBarriers) fail("barrier %d at %s: there are 16", id, text_of(site).c_str());
  if (count % static_cast<unsigned>(warp_size()) != 0)
    fail("barrier %d at %s: %u threads are no whole number of warps", id, text_of(site).c_str(), count);
  Barrier& barrier = worker.barriers[id];
  if (barrier.arrived > 0 && barrier.expected != count)
    fail("barrier %d at %s: %u threads, others said %u at %s", id, text_of(site).c_str(), count,
         barrier.expected, text_of(barrier.site).c_str());
  if (count == 0 && barrier.arrived > 0 && !same_site(barrier.site, site))
    fail("divergent barrier %d: some threads at %s, this one at %s", id, text_of(barrier.site).c_str(),
         text_of(site).c_str());
  barrier.site = site;
  barrier.expected = count;
  barrier.sum += predicate;
  ++barrier.arrived;
  return barrier;
}

}  // namespace

// Lets everyone go if all are there. Threads that have returned are not waited for.
void release_barrier(Worker& worker, int id) {
  Barrier& barrier = worker.barriers[id];
  const unsigned expected = barrier.expected != 0 ? barrier.expected : worker.alive;
  if (barrier.arrived == 0 || barrier.arrived < expected) return;
  if constexpr (kChecked) {
    if (options().count_requests) requests::settle(barrier.waiting.data(), barrier.waiting.size());
    if (barrier.expected == 0) {
      checker::all_met();
    } else {
      checker::arrivals_met(id, barrier.waiting.data(), barrier.waiting.size());
    }
  }
  for (RunningThread* thread : barrier.waiting) {
    thread->barrier_sum = barrier.sum;
    make_ready(*thread);
  }
  barrier.arrived = 0;
  barrier.sum = 0;
  barrier.waiting.clear();
}

BarrierResult wait_at_barrier(int id, unsigned count, int predicate, Site site) {
  RunningThread& thread = running();
  Barrier& barrier = count_in(id, count, predicate, site);
  barrier.waiting.push_back(&thread);
  thread.state = State::at_barrier;
  thread.site = site;
  thread.barrier = id;
  release_barrier(worker_of(thread), id);
  wait_until_ready();
  return {running().barrier_sum};
}

void arrive_at_barrier(int id, unsigned count, Site site) {
  count_in(id, count, 0, site);
  if constexpr (kChecked) checker::arrived(running(), id);
  release_barrier(worker_of(running()), id);
}

}  // namespace palmette::emulator
