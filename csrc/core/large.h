// SPDX-License-Identifier: Apache-2.0
// New tensors that an operator fills from end to end. From 32 MiB on, glibc maps memory of its own for them,
// and a page fault for every 4 KiB takes longer than writing it; so the system is asked for huge pages, as
// numpy does for its arrays. It may say no.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/checks.h"

namespace palmette {

inline void ask_for_huge_pages(const Tensor& t) {
#if defined(__linux__)
  constexpr int64_t kPage = 4096, kLarge = 32 << 20;
  const int64_t bytes = t.numel() * static_cast<int64_t>(t.element_size());
  if (!t.is_cpu() || bytes < kLarge) return;
  char* memory = static_cast<char*>(t.data_ptr());
  const auto skipped =
      static_cast<int64_t>(-reinterpret_cast<uintptr_t>(memory) % static_cast<uintptr_t>(kPage));
  // what it says is of no consequence
  (void)madvise(memory + skipped, static_cast<size_t>((bytes - skipped) / kPage * kPage), MADV_HUGEPAGE);
#else
  (void)t;
#endif
}

inline Tensor new_large(const Tensor& like, std::initializer_list<int64_t> sizes) {
  Tensor t = torch::stable::new_empty(like, {sizes.begin(), sizes.size()});
  ask_for_huge_pages(t);
  return t;
}

}  // namespace palmette
