// SPDX-License-Identifier: Apache-2.0
#include "core/workspace.h"

#include <cstdlib>
#include <memory>
#include <new>

namespace palmette {

namespace {
struct Free {
  void operator()(void* p) const { std::free(p); }
};
struct Buffer {
  std::unique_ptr<void, Free> memory;
  int64_t bytes = 0;
};
}  // namespace

void* thread_workspace(int64_t bytes) {
  thread_local Buffer buffer;
  if (buffer.bytes < bytes) {
    buffer.memory.reset();
    buffer.bytes = 0;
    const int64_t rounded = (bytes + 4095) / 4096 * 4096;
    void* fresh = std::aligned_alloc(4096, static_cast<size_t>(rounded));
    if (fresh == nullptr) throw std::bad_alloc();
    buffer.memory.reset(fresh);
    buffer.bytes = rounded;
  }
  return buffer.memory.get();
}

}  // namespace palmette
