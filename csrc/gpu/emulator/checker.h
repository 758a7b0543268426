// SPDX-License-Identifier: Apache-2.0
// The check build: every access of a kernel to memory is looked at.
//
// The kernels are compiled with -fsanitize=thread, whose calls before each access hooks.cpp takes (no
// sanitizer library is linked), and with -fsanitize=alignment,bounds,shift. An access must lie in the block's
// shared memory, in a buffer that was registered, in the thread's own stack, or (reads) in the launch's
// arguments or a constant table; must be aligned; must not read what nobody has written or what a cp.async
// has not delivered; and must be ordered after the last access of another thread to the same byte, if one of
// the two writes.
//
// Order is kept as in a vector clock: a barrier of the whole block starts a new epoch, which is after
// everything before it; __syncwarp and named barriers join the clocks of those who meet. Shuffles order
// nothing. Between blocks only atomics order: a block that has done one may read what others wrote.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "gpu/emulator/engine.h"

#ifndef PALMETTE_EMULATOR_CHECK
#define PALMETTE_EMULATOR_CHECK 0
#endif

namespace palmette::emulator {

constexpr bool kChecked = PALMETTE_EMULATOR_CHECK;

// Buffers of global memory, for the launches to come.
struct BufferTraffic {
  uint64_t bytes_read, bytes_written, bytes_atomic;
  uint64_t read_requests, read_sectors, write_requests, write_sectors;  // requests.h
};
void register_buffer(const void* data, size_t bytes, const char* name, bool writable);
void forget_buffers();
const BufferTraffic* traffic_of(const char* name);  // of the first buffer of that name, or null

namespace checker {

void start_grid(const void* context, size_t context_bytes);
void start_block(Worker& worker);
// `address`: where the code is; looked up only when there is something to report.
void access(RunningThread& thread, const void* data, size_t bytes, Access kind, const void* address);
void copy_issued(RunningThread& thread, const void* to, const void* from, size_t bytes, size_t source_bytes,
                 Site site);
void copy_landed(RunningThread& thread, const void* to, size_t bytes);
void all_met();  // a barrier of the whole block
void these_met(RunningThread* const* threads,
               size_t count);                      // those who wait at a barrier, or a warp's lanes
void arrived(RunningThread& thread, int barrier);  // bar.arrive
void arrivals_met(int barrier, RunningThread* const* threads, size_t count);

// A line of the source: of `address` as access() got it.
std::string place(const void* address);
// What stands for an address where only the line is known.
const void* address_of(Site site);

}  // namespace checker

}  // namespace palmette::emulator
