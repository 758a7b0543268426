// SPDX-License-Identifier: Apache-2.0
// The check build: what memory does for a warp's accesses, counted if options().count_requests says so.
//
// A request is what the lanes of a warp ask for by one instruction. Global memory answers it in sectors of 32
// bytes, shared memory in wavefronts, each of which gives every one of the 32 banks one word, to all lanes
// that want this word; accesses of 8 bytes are made by 16 lanes at a time, those of 16 bytes by 8 lanes.
//
// Fibers run one after the other, so lanes' accesses are put together when the lanes meet (a collective, a
// barrier, the end): what the n-th execution of an instruction asks for in each lane since they last met is
// one request. Instructions are those of this compiler: it may join neighbouring accesses, as nvcc may.
#pragma once

#include <map>

#include "gpu/emulator/checker.h"

namespace palmette::emulator::requests {

struct SharedTraffic {
  uint64_t requests, wavefronts, least;       // least: what the same words take when no two share a bank
  std::map<const void*, uint64_t> conflicts;  // wavefronts above the least, by instruction
};
SharedTraffic& shared();  // of the last operator

// `buffer`: of global memory; null for shared memory.
void note(RunningThread& thread, const void* data, size_t bytes, Access kind, const void* code,
          BufferTraffic* buffer);
// The lanes have met.
void settle(RunningThread* const* threads, size_t count);

}  // namespace palmette::emulator::requests
