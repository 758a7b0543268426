// SPDX-License-Identifier: Apache-2.0
// Who runs next.
//
//   run_block: starts a fiber per thread, then jumps to the first
//   a thread that must wait: marks why, and wait_until_ready() jumps to another one that can run
//   a thread that returns: leaves its warp and its block, which may complete what others wait for
//   nobody can run, not all have returned: deadlock
//
// Forward and reverse order run a warp until all of its lanes wait, so that a mistake that only shows when
// warps interleave shows under the random order, which draws a warp and a lane at every switch.
#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <map>

#include "gpu/emulator/checker.h"
#include "gpu/emulator/requests.h"

namespace palmette::emulator {

namespace {

thread_local RunningThread* current = nullptr;

// Fibers move on no other OS thread, but the compiler may keep the address of a thread_local across a jump;
// reading it in functions that are never inlined avoids all doubt.
__attribute__((noinline)) RunningThread* get_current() { return current; }
__attribute__((noinline)) void set_current(RunningThread* thread) { current = thread; }

int highest(uint64_t bits) { return 63 - std::countl_zero(bits); }
int lowest(uint64_t bits) { return std::countr_zero(bits); }
// A random one of the bits that are set.
int any(uint64_t bits, Worker& worker) {
  const int turn = static_cast<int>(worker.random() & 63);
  return (lowest(std::rotr(bits, turn)) + turn) & 63;
}

RunningThread* take_next(Worker& worker) {
  const uint64_t warps = worker.ready_warps;
  if (warps == 0) return nullptr;
  const Order order = options().order;
  int w, lane;
  if (order == Order::random) {
    w = any(warps, worker);
    lane = any(worker.warps[static_cast<size_t>(w)].ready, worker);
  } else {
    const bool same = (warps >> worker.current_warp & 1) != 0;
    w = same ? static_cast<int>(worker.current_warp)
             : (order == Order::forward ? lowest(warps) : highest(warps));
    const LaneMask ready = worker.warps[static_cast<size_t>(w)].ready;
    lane = order == Order::forward ? lowest(ready) : highest(ready);
  }
  Warp& warp = worker.warps[static_cast<size_t>(w)];
  worker.current_warp = warp.number;
  warp.ready &= ~(LaneMask{1} << lane);
  if (warp.ready == 0) worker.ready_warps &= ~(uint32_t{1} << w);
  return warp.lane[lane];
}

[[noreturn]] void leave_block(RunningThread& thread) {
  Worker& worker = worker_of(thread);
  set_current(nullptr);
  jump(thread.fiber, worker.main);
  __builtin_unreachable();
}

std::string deadlock_text(Worker& worker) {
  std::map<std::string, std::pair<int, const RunningThread*>> groups;  // where, how many, who first
  for (const RunningThread& thread : worker.threads) {
    std::string where = "returned";
    if (thread.state == State::at_barrier)
      where = "at barrier " + std::to_string(thread.barrier) + ", " + text_of(thread.site);
    if (thread.state == State::in_collective) {
      char mask[32];
      std::snprintf(mask, sizeof mask, "%llx", static_cast<unsigned long long>(thread.mask));
      where = std::string("in ") + thread.what + " of lanes " + mask + ", " + text_of(thread.site);
    }
    auto [place, fresh] = groups.try_emplace(where, 0, &thread);
    ++place->second.first;
  }
  std::string text = "deadlock: no thread can run";
  for (const auto& [where, group] : groups) {
    text += "\n  " + std::to_string(group.first) + (group.first == 1 ? " thread " : " threads ") + where +
            " (first: " + name_of(*group.second) + ")";
  }
  return text;
}

void enter_thread() {
  {
    RunningThread& thread = *get_current();
    Worker& worker = worker_of(thread);
    worker.body(worker.context);
  }
  RunningThread& thread = *get_current();
  Worker& worker = worker_of(thread);
  check_copies_done(thread);
  thread.state = State::done;
  Warp& warp = *thread.warp;
  warp.alive &= ~(LaneMask{1} << thread.lane);
  --worker.alive;
  run_collective(worker, warp);
  for (int id = 0; id < kMaxBarriers; ++id) release_barrier(worker, id);
  if (worker.alive == 0) leave_block(thread);
  wait_until_ready();
  __builtin_unreachable();  // nobody makes a thread ready that has returned
}

}  // namespace

uint64_t Worker::random() {  // xorshift64
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

RunningThread& running() { return *get_current(); }
RunningThread* running_or_null() { return get_current(); }
Thread& self() { return *get_current(); }
Worker& worker_of(const RunningThread& thread) { return static_cast<Worker&>(*thread.block); }
uint3 thread_index() { return self().index; }
uint3 block_index() { return self().block->index; }
dim3 block_size() { return self().block->size; }
dim3 grid_size() { return self().block->grid; }
unsigned lane_index() { return self().lane; }
int warp_size() { return options().warp_size; }

std::string name_of(const RunningThread& thread) {
  char text[128];
  const uint3 &b = thread.block->index, &t = thread.index;
  std::snprintf(text, sizeof text, "block (%u, %u, %u) thread (%u, %u, %u)", b.x, b.y, b.z, t.x, t.y, t.z);
  return text;
}

std::string text_of(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash == nullptr ? site.file : slash + 1) + ":" + std::to_string(site.line);
}

bool same_site(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

void fail(const char* format, ...) {
  char message[2048];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  RunningThread& thread = running();
  worker_of(thread).error = std::string(message) + ", in " + name_of(thread);
  leave_block(thread);
}

void make_ready(RunningThread& thread) {
  thread.state = State::ready;
  thread.warp->ready |= LaneMask{1} << thread.lane;
  worker_of(thread).ready_warps |= uint32_t{1} << thread.warp->number;
}

void wait_until_ready() {
  RunningThread& thread = running();
  Worker& worker = worker_of(thread);
  RunningThread* next = take_next(worker);
  if (next == nullptr) {
    worker.error = deadlock_text(worker);
    leave_block(thread);
  }
  if (next == &thread) return;
  set_current(next);
  jump(thread.fiber, next->fiber);
}

void yield() {
  make_ready(running());
  wait_until_ready();
}

// What threads asked memory for before they returned.
[[maybe_unused]] static void settle_block(Worker& worker) {
  if (!options().count_requests) return;
  std::vector<RunningThread*> threads;
  threads.reserve(worker.threads.size());
  for (RunningThread& thread : worker.threads) threads.push_back(&thread);
  requests::settle(threads.data(), threads.size());
}

// The block's index, size and shared memory are set; threads are fresh.
void run_block(Worker& worker) {
  const unsigned lanes = static_cast<unsigned>(warp_size());
  const unsigned count = worker.size.x * worker.size.y * worker.size.z;
  worker.stacks.reserve(count);
  worker.threads.resize(count);
  worker.warps.resize((count + lanes - 1) / lanes);
  worker.alive = count;
  worker.ready_warps = 0;
  worker.current_warp = 0;
  worker.error.clear();
  for (Barrier& barrier : worker.barriers) barrier = {};
  for (unsigned w = 0; w < worker.warps.size(); ++w) worker.warps[w] = Warp{w, {}, 0, 0, 0};
  for (unsigned i = 0; i < count; ++i) {
    RunningThread& thread = worker.threads[i];
    thread.index = {i % worker.size.x, i / worker.size.x % worker.size.y,
                    i / (worker.size.x * worker.size.y)};
    thread.number = i;
    thread.lane = i % lanes;
    thread.block = &worker;
    thread.warp = &worker.warps[i / lanes];
    thread.warp->lane[thread.lane] = &thread;
    thread.warp->alive |= LaneMask{1} << thread.lane;
    thread.in_engine = false;
    thread.copies.clear();
    thread.groups.clear();
    thread.accesses.clear();
    worker.stacks.start(thread.fiber, i, enter_thread);
    make_ready(thread);
  }
  if constexpr (kChecked) checker::start_block(worker);
  RunningThread* first = take_next(worker);
  set_current(first);
  jump(worker.main, first->fiber);
  if constexpr (kChecked) settle_block(worker);
}

}  // namespace palmette::emulator
