// SPDX-License-Identifier: Apache-2.0
#include "gpu/emulator/fiber.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <stdexcept>

namespace palmette::emulator {

namespace {

constexpr size_t kStackBytes = 64 << 10;
// Tops of neighbouring stacks differ by this much more than their size, or all threads' locals would share a
// few sets of the cache.
constexpr size_t kStagger = 1088, kStaggered = 16;

}  // namespace

#if defined(__x86_64__)

// What a call may assume to be kept (rbx, rbp, r12 to r15) waits on the stack that is left.
extern "C" void palmette_emulator_jump(void** save_stack_pointer, void* stack_pointer);
asm(R"(
.text
.p2align 4
.globl palmette_emulator_jump
.hidden palmette_emulator_jump
.type palmette_emulator_jump, @function
palmette_emulator_jump:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size palmette_emulator_jump, . - palmette_emulator_jump
)");

void jump(Fiber& from, Fiber& to) { palmette_emulator_jump(&from.stack_pointer, to.stack_pointer); }

#else

void jump(Fiber& from, Fiber& to) { swapcontext(&from.context, &to.context); }

#endif

Stacks::~Stacks() {
  if (base_ != nullptr) munmap(base_, count_ * kStackBytes);
}

void Stacks::reserve(unsigned count) {
  if (count <= count_) return;
  if (base_ != nullptr) munmap(base_, count_ * kStackBytes);
  void* memory = mmap(nullptr, count * kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::runtime_error("no memory for the stacks of a block");
  base_ = static_cast<char*>(memory);
  count_ = count;
  const long page = sysconf(_SC_PAGESIZE);
  for (unsigned i = 0; i < count; ++i)
    mprotect(base_ + i * kStackBytes, static_cast<size_t>(page), PROT_NONE);
}

void Stacks::start(Fiber& fiber, unsigned i, void (*entry)()) {
  char* top = base_ + (i + 1) * kStackBytes - i % kStaggered * kStagger;
#if defined(__x86_64__)
  // As palmette_emulator_jump leaves a stack: six registers, then the address that it returns to, and below
  // that what looks like a caller's return address, so that the stack is aligned as after a call.
  top -= reinterpret_cast<uintptr_t>(top) % 16;
  auto** slot = reinterpret_cast<void**>(top);
  *--slot = nullptr;
  *--slot = reinterpret_cast<void*>(entry);
  for (int k = 0; k < 6; ++k) *--slot = nullptr;
  fiber.stack_pointer = static_cast<void*>(slot);
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = base_ + i * kStackBytes;
  fiber.context.uc_stack.ss_size = static_cast<size_t>(top - (base_ + i * kStackBytes));
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

bool Stacks::holds(const void* address) const {
  const char* p = static_cast<const char*>(address);
  return p >= base_ && p < base_ + count_ * kStackBytes;
}

unsigned Stacks::owner(const void* address) const {
  return static_cast<unsigned>(static_cast<size_t>(static_cast<const char*>(address) - base_) / kStackBytes);
}

}  // namespace palmette::emulator
