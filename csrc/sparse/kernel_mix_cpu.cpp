// SPDX-License-Identifier: Apache-2.0
// The gated sum of three branches on the CPU: out = g_0 o_0 + g_1 o_1 + g_2 o_2, head by head, rounded once.
// It is called for few queries: one thread.
#include "attend/block_cpu.h"
#include "sparse/params.h"

namespace palmette::PALMETTE_ISA_NS {

namespace {

template <class S>
void run(const MixParams& p) {
  with_element<typename S::Scalar>(p.dtype, [&]<class E>(E) {
    const E* gates = static_cast<const E*>(p.gates);
    for (int64_t row = 0; row < p.num_queries * p.num_heads; ++row) {
      const int64_t query = row / p.num_heads, head = p.gate_heads == 1 ? 0 : row % p.num_heads;
      typename S::V weight[3];
      const E* part[3];
      for (int i = 0; i < 3; ++i) {
        weight[i] = S::splat(S::to_scalar(gates[(3 * query + i) * p.gate_heads + head]));
        part[i] = static_cast<const E*>(p.part[i]) + row * p.head_dim;
      }
      E* out = static_cast<E*>(p.out) + row * p.head_dim;
      int64_t x = 0;
      for (; x + S::kLanes <= p.head_dim; x += S::kLanes) {
        S::store(out + x, weight[0] * S::load(part[0] + x) + weight[1] * S::load(part[1] + x) +
                              weight[2] * S::load(part[2] + x));
      }
      if (const int rest = static_cast<int>(p.head_dim - x); rest > 0) {
        S::store_n(out + x,
                   weight[0] * S::load_n(part[0] + x, rest) + weight[1] * S::load_n(part[1] + x, rest) +
                       weight[2] * S::load_n(part[2] + x, rest),
                   rest);
      }
    }
  });
}

}  // namespace

}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

template <>
void mix_branches<Isa::PALMETTE_ISA_NS>(const MixParams& p) {
#if PALMETTE_LANES == 4
  if (p.dtype == DType::f64) return PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<double>>(p);
#endif
  PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<float>>(p);
}

}  // namespace palmette
