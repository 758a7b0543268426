// SPDX-License-Identifier: Apache-2.0
// The one symbol that a library of GPU kernels exports. Compiled into each of them; PALMETTE_GPU_BACKEND is
// its name.
#include "gpu/gpu.cuh"

namespace palmette::gpu {

namespace {

constexpr size_t kMaxKernels = 64;

struct {
  Kernel kernel[kMaxKernels];
  size_t count;
} registered;  // no constructor: registrations run in any order

}  // namespace

void add_kernel(const Kernel& kernel) noexcept {
  if (registered.count == kMaxKernels) __builtin_trap();
  registered.kernel[registered.count++] = kernel;
}

extern "C" __attribute__((visibility("default"))) const Library* palmette_gpu_library() {
  static Library library;
  library = {PALMETTE_GPU_BACKEND, registered.kernel, registered.count, &device_status};
  return &library;
}

}  // namespace palmette::gpu
