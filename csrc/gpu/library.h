// SPDX-License-Identifier: Apache-2.0
// A library of GPU kernels as the operators see it: launchers by name. libpalmette.so opens such libraries
// (core/gpu.h); this header is all that the two share.
#pragma once

#include <cstddef>
#include <cstdint>

namespace palmette::gpu {

// Memory that a launch may touch.
struct Extent {
  const void* data;
  size_t bytes;
  const char* name;
  bool writable;
};

struct LaunchContext {
  void* stream;           // of the device; null on the emulator
  const Extent* extents;  // all memory that the kernels may touch
  size_t num_extents;
  int workers;  // threads that the emulator may use
  int device;   // its number; -1: the emulator's
};

struct Kernel {
  const char* name;
  size_t params_bytes;  // both sides must mean the same struct
  void (*launch)(const void* params, const LaunchContext& context);
};

struct Library {
  const char* backend;  // "cuda", "hip", "emulated", "emulated_check"
  const Kernel* kernels;
  size_t num_kernels;
  const char* (*device_status)();  // why nothing can run here; empty if it can
};

// What every such library exports, under this name.
extern "C" const Library* palmette_gpu_library();

// Adds a kernel to the library that it is linked into; gpu.cuh's Registration calls it.
void add_kernel(const Kernel& kernel) noexcept;

}  // namespace palmette::gpu
