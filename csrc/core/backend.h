// SPDX-License-Identifier: Apache-2.0
// The CPU backend: which ISA body of a kernel runs.
//
// A kernel family declares its launchers in params.h as templates over the body,
//     template <Isa isa> void merge_states(const MergeParams&);
// kernel_cpu.cpp, compiled once per body, specialises them for its own,
//     template <> void merge_states<Isa::PALMETTE_ISA_NS>(const MergeParams& p) { ... }
// and the operator picks one: dispatch_isa([&]<Isa isa>() { merge_states<isa>(p); }). Nothing here names a
// family.
#pragma once

#include "core/isa.h"

namespace palmette {

// The body in use: the best that this CPU runs, or PALMETTE_ISA, or what _set_backend chose. Throws when
// PALMETTE_ISA names a body that does not exist or that this CPU cannot run.
Isa current_isa();

// Float64 kernels exist on the scalar body only.
bool runs_float64();

template <class F>
auto dispatch_isa(F&& f) {
  switch (current_isa()) {
#if defined(__x86_64__)
    case Isa::avx2:
      return f.template operator()<Isa::avx2>();
    case Isa::avx2x16:
      return f.template operator()<Isa::avx2x16>();
    case Isa::avx512:
      return f.template operator()<Isa::avx512>();
#endif
    default:
      return f.template operator()<Isa::scalar>();
  }
}

}  // namespace palmette
