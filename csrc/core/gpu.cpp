// SPDX-License-Identifier: Apache-2.0
#include "core/gpu.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "core/checks.h"
#include "core/parallel.h"

namespace palmette {

namespace {

std::mutex mutex;
std::vector<const gpu::Library*> libraries;  // under the mutex; never closed
std::atomic<const gpu::Library*> emulator{nullptr};
std::atomic<const gpu::Library*> cuda{nullptr};

bool is_emulator(const gpu::Library& library) { return std::strncmp(library.backend, "emulated", 8) == 0; }

// The stream that torch would use now, as the GPU's own libraries know it. A build for a torch before 2.13,
// whose stable ABI does not tell, asks libtorch_cuda.so, which is there by then.
void* current_stream(int32_t device) {
#if TORCH_FEATURE_VERSION >= ((2ULL << 56) | (13ULL << 48))
  return torch::stable::accelerator::getCurrentStream(device).nativeHandle();
#else
  using Getter = int32_t (*)(int32_t device, void** stream);
  static const auto get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library == nullptr ? nullptr : dlsym(library, "aoti_torch_get_current_cuda_stream");
    return reinterpret_cast<Getter>(found);
  }();
  void* stream = nullptr;
  if (get == nullptr || get(device, &stream) != 0)
    throw std::runtime_error("this build of torch does not tell its current stream: use 2.13 or later");
  return stream;
#endif
}

// Names of a backend's kernels, for tests and `python -m palmette env`.
std::string gpu_kernels(const std::string& backend) {
  const gpu::Library* library = gpu_library(backend);
  std::string names;
  for (size_t i = 0; library != nullptr && i < library->num_kernels; ++i) {
    if (i > 0) names += ", ";
    names += library->kernels[i].name;
  }
  return names;
}

// Why a backend cannot run here; empty if it can.
std::string gpu_status(const std::string& backend) {
  const gpu::Library* library = gpu_library(backend);
  return library == nullptr ? "not built" : library->device_status();
}

}  // namespace

std::string load_gpu_library(const std::string& path) {
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) throw std::runtime_error(dlerror());
  const auto entry = reinterpret_cast<const gpu::Library* (*)()>(dlsym(handle, "palmette_gpu_library"));
  require(entry != nullptr, "path", "a library of GPU kernels", path);
  const gpu::Library* library = entry();
  if (gpu_library(library->backend) != nullptr) return library->backend;
  const std::lock_guard lock(mutex);
  libraries.push_back(library);
  if (std::strcmp(library->backend, "cuda") == 0 || std::strcmp(library->backend, "hip") == 0) cuda = library;
  return library->backend;
}

const gpu::Library* gpu_library(const std::string& backend) {
  const std::lock_guard lock(mutex);
  for (const gpu::Library* library : libraries) {
    if (backend == library->backend) return library;
  }
  return nullptr;
}

const gpu::Library* emulator_in_use() { return emulator.load(std::memory_order_relaxed); }
void use_emulator(const gpu::Library* library) { emulator.store(library, std::memory_order_relaxed); }

std::vector<std::string> emulators() {
  const std::lock_guard lock(mutex);
  std::vector<std::string> names;
  for (const gpu::Library* library : libraries) {
    if (is_emulator(*library)) names.emplace_back(library->backend);
  }
  return names;
}

Tensor host_table(int64_t size, const Tensor& like) {
  using torch::stable::Device, torch::stable::DeviceType;
  const bool pinned = !like.is_cpu();
  return torch::stable::empty({size}, ScalarType::Long, std::nullopt, Device(DeviceType::CPU), pinned);
}

Tensor to_device_of(const Tensor& like, const Tensor& table) {
  if (like.is_cpu()) return table;
  return torch::stable::to(table, like.device(), /*non_blocking=*/true);
}

GpuLaunch::GpuLaunch(const Tensor& like) {
  if (like.is_cpu()) {
    library_ = emulator_in_use();
    return;
  }
  library_ = cuda.load(std::memory_order_relaxed);
  if (library_ == nullptr)
    throw std::runtime_error(
        "this build of palmette has no CUDA kernels: build it where nvcc is found, with PALMETTE_CUDA=1 "
        "(docs/install.md)");
  device_ = like.get_device_index();
}

void GpuLaunch::add(const Tensor& t, const char* name, bool writable) {
  if (device_ >= 0 || t.numel() == 0) return;  // a real GPU finds out by itself
  int64_t last = 0;
  for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
  extents_.push_back({t.const_data_ptr(), static_cast<size_t>(last + 1) * t.element_size(), name, writable});
}

void GpuLaunch::launch(const char* kernel, const void* params, size_t params_bytes) const {
  for (size_t i = 0; i < library_->num_kernels; ++i) {
    const gpu::Kernel& k = library_->kernels[i];
    if (std::strcmp(k.name, kernel) != 0) continue;
    if (k.params_bytes != params_bytes)
      throw std::runtime_error(std::string("the ") + library_->backend +
                               " kernels are of another version of palmette than libpalmette.so: build both");
    if (device_ < 0) {
      k.launch(params, {nullptr, extents_.data(), extents_.size(), static_cast<int>(num_workers()), -1});
      return;
    }
    const torch::stable::accelerator::DeviceGuard guard(device_);
    void* stream = current_stream(device_);
    k.launch(params, {stream, nullptr, 0, 0, device_});
    return;
  }
  throw std::runtime_error(std::string("the ") + library_->backend + " backend has no kernel " + kernel);
}

}  // namespace palmette

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("_load_gpu_library", TORCH_BOX(&palmette::load_gpu_library));
  m.impl("_gpu_kernels", TORCH_BOX(&palmette::gpu_kernels));
  m.impl("_gpu_status", TORCH_BOX(&palmette::gpu_status));
}
