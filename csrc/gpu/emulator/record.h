// SPDX-License-Identifier: Apache-2.0
// Launches as palmette.testing sees them: what another machine needs to run them too.
#pragma once

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "gpu/library.h"

namespace palmette::emulator {

// palmette.testing has this struct and gpu::Extent once more, field by field.
struct LaunchRecord {
  const char* name;
  uint32_t grid[3], block[3];
  uint64_t shared_bytes;
  const void* parameters;
  uint64_t parameter_bytes;
  const gpu::Extent* extents;
  uint64_t num_extents;
};

// Is called right before a launch runs, and, `done`, once it has.
using Recorder = void (*)(const LaunchRecord* launch, int done);

// A kernel's arguments as a GPU gets them: one after the other, each at a multiple of its alignment.
template <class... Parameters>
std::vector<unsigned char> packed(const std::tuple<Parameters...>& arguments) {
  std::vector<unsigned char> bytes;
  const auto add = [&bytes](const auto& argument) {
    using T = std::remove_cvref_t<decltype(argument)>;
    const size_t at = (bytes.size() + alignof(T) - 1) / alignof(T) * alignof(T);
    bytes.resize(at + sizeof(T));
    std::memcpy(bytes.data() + at, &argument, sizeof(T));
  };
  std::apply([&](const auto&... argument) { (add(argument), ...); }, arguments);
  return bytes;
}

}  // namespace palmette::emulator
