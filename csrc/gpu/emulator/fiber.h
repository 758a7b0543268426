// SPDX-License-Identifier: Apache-2.0
// Fibers: places in the program with a stack of their own, and the jump from one to another.
#pragma once

#include <cstddef>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace palmette::emulator {

#if defined(__x86_64__)
struct Fiber {
  void* stack_pointer = nullptr;
};
#else
struct Fiber {
  ucontext_t context;
};
#endif

// Saves the place of the caller in `from` and goes on where `to` was left.
void jump(Fiber& from, Fiber& to);

// Stacks of equal size, a page that faults below each.
class Stacks {
 public:
  Stacks() = default;
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;
  ~Stacks();

  void reserve(unsigned count);
  // A fiber that starts with `entry` on stack i; `entry` never returns.
  void start(Fiber& fiber, unsigned i, void (*entry)());
  bool holds(const void* address) const;
  unsigned owner(const void* address) const;  // which stack holds it

 private:
  char* base_ = nullptr;
  unsigned count_ = 0;
};

}  // namespace palmette::emulator
