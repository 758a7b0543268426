// SPDX-License-Identifier: Apache-2.0
// What kernels, compiled as ordinary C++, need of the machine that runs them on the CPU.
//
// Every CUDA thread is a fiber: a stack of its own and a place in the program. A fiber runs until it has to
// wait (a barrier, a collective of its warp, a full stop) and then hands over to the next one that can run,
// so one OS thread runs a whole block, and blocks are shared out among OS threads. Nothing is preempted: what
// a kernel does between two waits happens at once, in an order that the schedule chooses (options.h).
//
//   language.h     CUDA's words: qualifiers, vector types, threadIdx, intrinsics
//   warp.h         shuffles, votes, reductions: collectives of a warp
//   atomics.h      atomicAdd and its kin
//   scheduler.cpp  fibers, who runs next, deadlocks
//   barrier.cpp    __syncthreads and named barriers
//   collective.cpp lanes of a warp that wait for each other
//   copy.cpp       cp.async: copies that land when they are waited for
//   launch.cpp     blocks, workers, shared memory
//   record.h       launches as tests see them
//   checker.h      the check build: races, bounds, what nobody has written
//   requests.h     the check build: sectors of global memory, conflicts of banks in shared memory
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace palmette::emulator {

// A line of a kernel. As a default argument, Site{} written by EMULATOR_SITE is the line of the call.
struct Site {
  const char* file;
  int line;
};
#define EMULATOR_SITE ::palmette::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

using LaneMask = uint64_t;  // one bit per lane; warps have 32 lanes, or 64 as on some AMD GPUs

struct Block {
  uint3 index;
  dim3 size, grid;
  unsigned char* shared;
  size_t shared_bytes;
};

struct Thread {
  uint3 index;
  unsigned number;  // in the block
  unsigned lane;
  Block* block;
};

Thread& self();
uint3 thread_index();
uint3 block_index();
dim3 block_size();
dim3 grid_size();
unsigned lane_index();
int warp_size();

// Ends the launch; what launch() then throws names the block and the thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

void yield();

// ---- barriers
struct BarrierResult {
  int sum;  // of the predicates
};
// Waits for `count` threads at barrier `id`; 0: for all threads of the block that have not returned.
BarrierResult wait_at_barrier(int id, unsigned count, int predicate, Site site);
// Is counted at the barrier, and goes on.
void arrive_at_barrier(int id, unsigned count, Site site);

// ---- collectives of a warp
// Called with the arguments of all lanes of the mask that are there, by the last of them to arrive.
using WarpFunction = void (*)(void** arguments, Thread** lanes, LaneMask active);
// `whole`: the instruction is defined for complete warps only (ldmatrix, mma).
void join_warp(LaneMask mask, const char* what, bool whole, void* argument, WarpFunction function, Site site);

// The lanes' memory is in order now (__syncwarp).
void order_memory(Thread** lanes, LaneMask active);

// join_warp with typed arguments; `function` has no state.
template <class Argument, class Function>
void join_warp(LaneMask mask, const char* what, bool whole, Argument& argument, Function, Site site) {
  join_warp(
      mask, what, whole, &argument,
      [](void** arguments, Thread** lanes, LaneMask active) {
        Function{}(reinterpret_cast<Argument**>(arguments), lanes, active);
      },
      site);
}

// ---- cp.async
// The destination reads as NaN from now on, and holds the data once the copy's group has been waited for.
void copy_async(void* shared, const void* global, unsigned bytes, unsigned source_bytes, Site site);
void commit_copies();
void wait_for_copies(unsigned groups_in_flight);

// ---- memory
// The check build looks at what an instruction reads for a lane.
void note_read(Thread& thread, const void* data, size_t bytes);
bool is_shared(const void* address, size_t bytes);
void* shared_memory(size_t bytes);

// ---- launches
void run_grid(dim3 grid, dim3 block, size_t shared_bytes, void (*body)(void*), void* context,
              size_t context_bytes, const char* name);

}  // namespace palmette::emulator
