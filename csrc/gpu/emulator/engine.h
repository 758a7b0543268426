// SPDX-License-Identifier: Apache-2.0
// The state of the running blocks, shared by the files of the engine and seen by nobody else.
#pragma once

#include <string>
#include <vector>

#include "gpu/emulator/fiber.h"
#include "gpu/emulator/options.h"
#include "gpu/emulator/runtime.h"

namespace palmette::emulator {

constexpr int kMaxLanes = 64, kMaxWarps = 32, kMaxBarriers = 16, kMaxThreads = 1024;

enum class State { ready, at_barrier, in_collective, done };

struct Warp;

enum class Access { read, write, atomic };

// What a lane did since it last met others of its warp (requests.h).
struct BufferTraffic;
struct LaneAccess {
  const void* code;
  size_t part;
  const void* data;
  size_t bytes;
  Access kind;
  BufferTraffic* buffer;  // null: shared memory
};

struct AsyncCopy {
  void* to;
  const void* from;
  unsigned bytes, source_bytes;
  Site site;
};

struct RunningThread : Thread {
  Fiber fiber;
  State state;
  bool in_engine;  // what it does now is the emulator's, not the kernel's
  Warp* warp;
  Site site;  // where it waits
  // while in a collective
  LaneMask mask;
  bool whole;
  const char* what;
  void* argument;
  WarpFunction function;
  // while at a barrier
  int barrier, barrier_sum;
  // cp.async: copies issued, oldest first, and where committed groups end
  std::vector<AsyncCopy> copies;
  std::vector<size_t> groups;
  std::vector<LaneAccess> accesses;
};

struct Warp {
  unsigned number;
  RunningThread* lane[kMaxLanes];
  LaneMask alive, ready, waiting;  // waiting: in a collective
};

struct Barrier {
  unsigned arrived, expected;  // expected: 0 is all threads alive
  int sum;
  Site site;
  std::vector<RunningThread*> waiting;
};

// One OS thread's block.
struct Worker : Block {
  std::vector<RunningThread> threads;
  std::vector<Warp> warps;
  Barrier barriers[kMaxBarriers];
  uint32_t ready_warps = 0;  // bit w: some lane of warp w can run
  unsigned current_warp = 0, alive = 0;
  Fiber main;  // the OS thread itself
  Stacks stacks;
  std::vector<unsigned char> shared_storage;
  uint64_t random_state = 1;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::string error;

  uint64_t random();
};

RunningThread& running();
RunningThread* running_or_null();  // null in host code
Worker& worker_of(const RunningThread& thread);

// scheduler.cpp
void make_ready(RunningThread& thread);
void wait_until_ready();  // lets others run until make_ready(running())
void run_block(Worker& worker);
// barrier.cpp
void release_barrier(Worker& worker, int id);
// collective.cpp: runs the collective that the warp's lanes wait in, if all that it names are there
void run_collective(Worker& worker, Warp& warp);
// copy.cpp
void check_copies_done(RunningThread& thread);

std::string name_of(const RunningThread& thread);
std::string text_of(Site site);
bool same_site(Site a, Site b);

}  // namespace palmette::emulator
