// SPDX-License-Identifier: Apache-2.0
// What the compiler calls in kernels of the check build: -fsanitize=thread before every access,
// -fsanitize=alignment,bounds,shift where one is wrong. No sanitizer library is linked; these are the
// functions.
#include "gpu/emulator/checker.h"

#if PALMETTE_EMULATOR_CHECK

#include <cstring>

namespace {

using namespace palmette::emulator;

inline void look(const volatile void* data, size_t bytes, Access kind, const void* address) {
  RunningThread* thread = running_or_null();
  if (thread == nullptr || thread->in_engine) return;  // host code, or the emulator on a kernel's behalf
  thread->in_engine = true;
  checker::access(*thread, const_cast<const void*>(data), bytes, kind, address);
  thread->in_engine = false;
}

}  // namespace

// NOLINTBEGIN(bugprone-reserved-identifier): the compiler chose the names
#define HOOK extern "C" __attribute__((visibility("hidden")))
#define CALLER __builtin_return_address(0)

HOOK void __tsan_init() {}
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_read_range(void* p, size_t n) { look(p, n, Access::read, CALLER); }
HOOK void __tsan_write_range(void* p, size_t n) { look(p, n, Access::write, CALLER); }
#define ACCESSES(N)                                                                  \
  HOOK void __tsan_read##N(void* p) { look(p, N, Access::read, CALLER); }            \
  HOOK void __tsan_write##N(void* p) { look(p, N, Access::write, CALLER); }          \
  HOOK void __tsan_volatile_read##N(void* p) { look(p, N, Access::read, CALLER); }   \
  HOOK void __tsan_volatile_write##N(void* p) { look(p, N, Access::write, CALLER); } \
  HOOK void __tsan_unaligned_read##N(void* p) { look(p, N, Access::read, CALLER); }  \
  HOOK void __tsan_unaligned_write##N(void* p) { look(p, N, Access::write, CALLER); }
ACCESSES(1)
ACCESSES(2)
ACCESSES(4)
ACCESSES(8)
ACCESSES(16)

// Atomics, of kernels and of host code in the same file.
#define ATOMICS(N, T)                                                                              \
  HOOK T __tsan_atomic##N##_load(const volatile T* p, int) {                                       \
    look(p, sizeof(T), Access::atomic, CALLER);                                                    \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  HOOK void __tsan_atomic##N##_store(volatile T* p, T v, int) {                                    \
    look(p, sizeof(T), Access::atomic, CALLER);                                                    \
    __atomic_store_n(p, v, __ATOMIC_SEQ_CST);                                                      \
  }                                                                                                \
  HOOK T __tsan_atomic##N##_exchange(volatile T* p, T v, int) {                                    \
    look(p, sizeof(T), Access::atomic, CALLER);                                                    \
    return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST);                                            \
  }                                                                                                \
  HOOK T __tsan_atomic##N##_fetch_add(volatile T* p, T v, int) {                                   \
    look(p, sizeof(T), Access::atomic, CALLER);                                                    \
    return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  HOOK T __tsan_atomic##N##_fetch_sub(volatile T* p, T v, int) {                                   \
    look(p, sizeof(T), Access::atomic, CALLER);                                                    \
    return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST);                                             \
  }                                                                                                \
  HOOK int __tsan_atomic##N##_compare_exchange_strong(volatile T* p, T* expected, T v, int, int) { \
    look(p, sizeof(T), Access::atomic, CALLER);                                                    \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }                                                                                                \
  HOOK int __tsan_atomic##N##_compare_exchange_weak(volatile T* p, T* expected, T v, int, int) {   \
    look(p, sizeof(T), Access::atomic, CALLER);                                                    \
    return __atomic_compare_exchange_n(p, expected, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)
HOOK void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
HOOK void __tsan_atomic_signal_fence(int) {}

// Every record of the undefined-behaviour checks begins with the place in the source.
struct UndefinedAt {
  const char* file;
  uint32_t line, column;
};
#define UNDEFINED(name, what)                                                          \
  HOOK void __ubsan_handle_##name(UndefinedAt* at, ...) {                              \
    if (running_or_null() != nullptr)                                                  \
      fail("%s at %s", what, text_of({at->file, static_cast<int>(at->line)}).c_str()); \
  }
UNDEFINED(type_mismatch_v1, "misaligned access")
UNDEFINED(out_of_bounds, "array index out of bounds")
UNDEFINED(shift_out_of_bounds, "shift by more than the width")

// NOLINTEND(bugprone-reserved-identifier)

#endif
