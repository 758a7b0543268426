// SPDX-License-Identifier: Apache-2.0
#include "core/backend.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "core/gpu.h"

namespace palmette {
namespace {

struct Body {
  Isa isa;
  const char* name;
};

// Best first. avx2x16 stays behind avx2: it exists to test the 16-lane code.
constexpr Body kBodies[] = {
#if defined(__x86_64__)
    {Isa::avx512, "avx512"},
    {Isa::avx2, "avx2"},
    {Isa::avx2x16, "avx2x16"},
#endif
    {Isa::scalar, "scalar"}};

bool cpu_runs(Isa isa) {
#if defined(__x86_64__)
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  switch (isa) {
    case Isa::avx512:
      return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx2:
    case Isa::avx2x16:
      return avx2;
    default:
      return true;
  }
#else
  return isa == Isa::scalar;
#endif
}

std::string available() {
  std::string names;
  for (const Body& body : kBodies) {
    if (!cpu_runs(body.isa)) continue;
    if (!names.empty()) names += ", ";
    names += body.name;
  }
  return names;
}

Isa find(std::string_view argument, std::string_view name) {
  for (const Body& body : kBodies) {
    if (name == body.name && cpu_runs(body.isa)) return body.isa;
  }
  throw std::runtime_error(std::string(argument) + " must be one of the bodies that this CPU runs (" +
                           available() + "), got " + std::string(name));
}

// Bodies of the CPU, then the emulators of a GPU that have been opened.
std::string all_backends() {
  std::string names = available();
  for (const std::string& name : emulators()) names += ", " + name;
  return names;
}

Isa initial() {
  const char* name = std::getenv("PALMETTE_ISA");
  if (name != nullptr && *name != '\0') return find("PALMETTE_ISA", name);
  for (const Body& body : kBodies) {
    if (cpu_runs(body.isa)) return body.isa;
  }
  return Isa::scalar;
}

constexpr int kUnset = -1;
std::atomic<int> chosen{kUnset};

std::string set_backend(const std::string& name) {
  std::string previous;
  for (const Body& body : kBodies) {
    if (body.isa == current_isa()) previous = body.name;
  }
  if (emulator_in_use() != nullptr) previous = emulator_in_use()->backend;
  if (name.empty()) return previous;
  const gpu::Library* emulator = name.starts_with("emulated") ? gpu_library(name) : nullptr;
  if (emulator == nullptr) chosen.store(static_cast<int>(find("backend", name)));
  use_emulator(emulator);
  return previous;
}

std::string build_info() { return PALMETTE_BUILD_INFO; }

}  // namespace

bool runs_float64() { return emulator_in_use() == nullptr && current_isa() == Isa::scalar; }

Isa current_isa() {
  int isa = chosen.load(std::memory_order_relaxed);
  if (isa == kUnset) {
    isa = static_cast<int>(initial());
    chosen.store(isa, std::memory_order_relaxed);
  }
  return static_cast<Isa>(isa);
}

}  // namespace palmette

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("_set_backend", TORCH_BOX(&palmette::set_backend));
  m.impl("_backends", TORCH_BOX(&palmette::all_backends));
  m.impl("_build_info", TORCH_BOX(&palmette::build_info));
}
