// SPDX-License-Identifier: Apache-2.0
// Work that is dealt out in chunks of equal size, and the element types of tensors.
#pragma once

#include <atomic>

#include "core/isa.h"
#include "core/parallel.h"
#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {

template <class Params>
struct Chunks {
  const Params* p;
  int64_t count, chunk;  // of whatever a worker takes: queries, rows, elements
  std::atomic<int64_t> next{0};

  void run(void (*body)(void*, int64_t)) {
    const int64_t chunks = (count + chunk - 1) / chunk, workers = num_workers();
    if (chunks > 0) run_workers(chunks < workers ? chunks : workers, body, this);
  }
  // f(begin, end), by each worker until there is no more.
  template <class F>
  void each_chunk(F&& f) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < count;)
      f(begin, begin + chunk < count ? begin + chunk : count);
  }
};

// f.operator()<E>() of the stored type, bf16, fp16 or float.
template <class F>
void with_element(DType dtype, F&& f) {
  switch (dtype) {
    case DType::bf16:
      return f.template operator()<bf16>();
    case DType::f16:
      return f.template operator()<fp16>();
    default:
      return f.template operator()<float>();
  }
}

// The same with double, which only the scalar body has.
template <class F>
void with_any_element(DType dtype, F&& f) {
  if (dtype != DType::f64) return with_element(dtype, f);
  if constexpr (Isa::PALMETTE_ISA_NS == Isa::scalar) f.template operator()<double>();
}

}  // namespace palmette::PALMETTE_ISA_NS
