// SPDX-License-Identifier: Apache-2.0
// The GPU backends: kernels in libraries of their own, opened when they are wanted. Operators ask for the one
// of a tensor's device and launch by name:
//
//     if (GpuLaunch gpu(q); gpu) {
//       gpu.reads(q, "q");
//       gpu.writes(out, "out");
//       return gpu.run("attend", params);
//     }
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "gpu/library.h"

namespace palmette {

// Opens a library of GPU kernels and returns its backend's name. Throws when it is none.
std::string load_gpu_library(const std::string& path);

// The library of a backend, or null.
const gpu::Library* gpu_library(const std::string& backend);

// Which library CPU tensors use instead of the bodies of core/backend.h: an emulator, or null.
const gpu::Library* emulator_in_use();
void use_emulator(const gpu::Library* library);
// Names of the emulators that have been opened.
std::vector<std::string> emulators();

// Small arrays that the host makes for kernels: int64 [size] on the CPU. Where kernels run on another device
// (`like`'s), its memory is pinned, so that to_device_of() waits for nothing. One table for all arrays of a
// call: every copy has its price.
torch::stable::Tensor host_table(int64_t size, const torch::stable::Tensor& like);
torch::stable::Tensor to_device_of(const torch::stable::Tensor& like, const torch::stable::Tensor& table);

class GpuLaunch {
 public:
  // For the device of `like`. False when the CPU's bodies are to run. Throws when `like` is a CUDA tensor and
  // there are no CUDA kernels.
  explicit GpuLaunch(const torch::stable::Tensor& like);
  explicit operator bool() const { return library_ != nullptr; }

  // Names the memory that the kernels will touch.
  void reads(const torch::stable::Tensor& t, const char* name) { add(t, name, false); }
  void writes(const torch::stable::Tensor& t, const char* name) { add(t, name, true); }

  template <class Params>
  void run(const char* kernel, const Params& params) const {
    launch(kernel, &params, sizeof(Params));
  }

 private:
  void add(const torch::stable::Tensor& t, const char* name, bool writable);
  void launch(const char* kernel, const void* params, size_t params_bytes) const;

  const gpu::Library* library_ = nullptr;
  int32_t device_ = -1;  // -1: the emulator's
  std::vector<gpu::Extent> extents_;
};

}  // namespace palmette
