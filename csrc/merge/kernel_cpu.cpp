// SPDX-License-Identifier: Apache-2.0
// Log-sum-exp merge of attention states (o_s, l_s), s = 1..S, of the same query and head:
//
//     m = max_s l_s     p_s = e^(l_s - m) / sum_t e^(l_t - m)
//     o = sum_s p_s o_s     l = m + log sum_t e^(l_t - m)
//
// and its gradient, from do, dl (with 2 and log2 for base 2, c = ln 2; otherwise c = 1):
//
//     do_s = p_s do          dl_s = p_s (c <do, o_s - o> + dl)
//
// A state with l_s = -inf is empty: its o_s is never read, so whatever it holds cannot leak. If all are
// empty, o = 0 and l = -inf. l_s = +inf or NaN makes o and l NaN.
//
// The weights of one block of heads are computed with heads in the lanes, then each head's rows are summed
// with head_dim in the lanes: both are the memory order. Queries are independent and a state belongs to one
// query, so the result does not depend on how the work is split.
#include <limits>

#include "core/workspace.h"
#include "cpu/chunks.h"
#include "cpu/vec.h"
#include "merge/params.h"

namespace palmette::PALMETTE_ISA_NS {
namespace {

template <class E>
struct Arithmetic {
  using A = float;
  static constexpr int kLanes = PALMETTE_LANES;
};
template <>
struct Arithmetic<double> {
  using A = double;
  static constexpr int kLanes = 4;
};

constexpr float kEmpty = -1.0f;  // in the table of weights: a state that must not be read

struct Rows {
  int64_t begin, count;
};

// Where query n's states lie: the first and their number. Dense states are addressed through the query's
// stride.
Rows rows_of(const MergeParams& p, int64_t n) {
  if (p.indptr32 != nullptr) return {p.indptr32[n], p.indptr32[n + 1] - p.indptr32[n]};
  if (p.indptr64 != nullptr) return {p.indptr64[n], p.indptr64[n + 1] - p.indptr64[n]};
  return {0, p.num_states};
}

template <class E>
struct Merge {
  using A = typename Arithmetic<E>::A;
  using S = Simd<A, Arithmetic<E>::kLanes>;
  using V = typename S::V;
  static constexpr int L = S::kLanes;
  static constexpr A kInf = std::numeric_limits<A>::infinity();
  static constexpr A kLn2 = A(0.69314718055994530942);

  static V load_heads(const A* p, int64_t stride, int heads) {
    if (stride == 1 && heads == L) return S::load(p);
    V v = S::splat(-kInf);
    for (int i = 0; i < heads; ++i) v[i] = p[i * stride];
    return v;
  }

  // Weights of heads [h, h + heads) of query n into table[state][lane]; writes their merged LSE.
  static void weights(const MergeParams& p, int64_t n, Rows rows, int64_t h, int heads, A* table) {
    const A* lses =
        static_cast<const A*>(p.lses) + n * p.lses_query + rows.begin * p.lses_state + h * p.lses_head;
    V top = S::splat(-kInf);
    for (int64_t s = 0; s < rows.count; ++s) {
      const V l = load_heads(lses + s * p.lses_state, p.lses_head, heads);
      S::store(table + s * L, l);
      top = S::max(top, l);
    }
    const V shift = S::select(top == S::splat(-kInf), S::zero(), top);
    V sum = S::zero();
    for (int64_t s = 0; s < rows.count; ++s) {
      const V l = S::load(table + s * L);
      const V w = p.base2 ? S::exp2(l - shift) : S::exp(l - shift);
      sum += w;
      S::store(table + s * L, S::select(l == S::splat(-kInf), S::splat(kEmpty), w));
    }
    const V scale = S::splat(A(1)) / sum;  // NaN if a state has +inf (inf - inf) or NaN
    for (int64_t s = 0; s < rows.count; ++s) {
      const V w = S::load(table + s * L);
      S::store(table + s * L, S::select(w < S::zero(), w, w * scale));
    }
    const V log_sum = p.base2 ? S::log2(sum) : S::log(sum);
    const V merged = top + log_sum;  // -inf where all are empty, as log 0 is -inf
    A* lse = static_cast<A*>(p.lse) + n * p.num_heads + h;
    if (heads == L) return S::store(lse, merged);
    S::store_n(lse, merged, heads);
  }

  // out[0 .. U*L) = sum_s table[s] * outs[s]: U vectors of head_dim in registers, states in memory order.
  template <int U>
  static void accumulate(const E* outs, int64_t stride, const A* table, int64_t states, E* out) {
    V acc[U];
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) acc[u] = S::zero();
    for (int64_t s = 0; s < states; ++s) {
      const A w = table[s * L];
      if (w < A(0)) continue;
      const V weight = S::splat(w);
#pragma GCC unroll 8
      for (int u = 0; u < U; ++u) acc[u] = S::fma(weight, S::load(outs + s * stride + u * L), acc[u]);
    }
#pragma GCC unroll 8
    for (int u = 0; u < U; ++u) S::store(out + u * L, acc[u]);
  }

  static void accumulate_tail(const E* outs, int64_t stride, const A* table, int64_t states, E* out, int n) {
    V acc = S::zero();
    for (int64_t s = 0; s < states; ++s) {
      const A w = table[s * L];
      if (w < A(0)) continue;
      acc = S::fma(S::splat(w), S::load_n(outs + s * stride, n), acc);
    }
    S::store_n(out, acc, n);
  }

  static void forward(const MergeParams& p, int64_t n, A* table) {
    const Rows rows = rows_of(p, n);
    const E* outs = static_cast<const E*>(p.outs) + n * p.outs_query + rows.begin * p.outs_state;
    E* out = static_cast<E*>(p.out) + n * p.num_heads * p.head_dim;
    for (int64_t h = 0; h < p.num_heads; h += L) {
      const int heads = int(p.num_heads - h < L ? p.num_heads - h : L);
      weights(p, n, rows, h, heads, table);
      for (int i = 0; i < heads; ++i) {
        const E* from = outs + (h + i) * p.outs_head;
        E* to = out + (h + i) * p.head_dim;
        int64_t d = 0;
        for (; d + 8 * L <= p.head_dim; d += 8 * L)
          accumulate<8>(from + d, p.outs_state, table + i, rows.count, to + d);
        for (; d + L <= p.head_dim; d += L)
          accumulate<1>(from + d, p.outs_state, table + i, rows.count, to + d);
        if (d < p.head_dim)
          accumulate_tail(from + d, p.outs_state, table + i, rows.count, to + d, int(p.head_dim - d));
      }
    }
  }

  static void backward(const MergeBackwardParams& b, int64_t n) {
    const MergeParams& p = b.forward;
    const Rows rows = rows_of(p, n);
    const E* outs = static_cast<const E*>(p.outs) + n * p.outs_query + rows.begin * p.outs_state;
    const A* lses = static_cast<const A*>(p.lses) + n * p.lses_query + rows.begin * p.lses_state;
    for (int64_t s = 0; s < rows.count; ++s) {
      for (int64_t h = 0; h < p.num_heads; ++h) {
        const int64_t query = n * p.num_heads + h;
        E* douts =
            static_cast<E*>(b.douts) + n * b.douts_query + (rows.begin + s) * b.douts_state + h * p.head_dim;
        A* dlses = static_cast<A*>(b.dlses) + n * b.dlses_query + (rows.begin + s) * b.dlses_state + h;
        const A l = lses[s * p.lses_state + h * p.lses_head];
        if (l == -kInf) {
          for (int64_t d = 0; d < p.head_dim; ++d) S::from_scalar(douts[d], A(0));
          *dlses = A(0);
          continue;
        }
        const A x = l - static_cast<const A*>(p.lse)[query];
        const A weight = p.base2 ? std::exp2(x) : std::exp(x);
        const A dot = backward_row(
            outs + s * p.outs_state + h * p.outs_head, static_cast<const E*>(p.out) + query * p.head_dim,
            static_cast<const E*>(b.dout) + query * p.head_dim, weight, p.head_dim, douts);
        *dlses = weight * ((p.base2 ? kLn2 : A(1)) * dot + static_cast<const A*>(b.dlse)[query]);
      }
    }
  }

  // douts = weight * dout; returns <dout, outs - out>.
  static A backward_row(const E* outs, const E* out, const E* dout, A weight, int64_t head_dim, E* douts) {
    V dot = S::zero();
    int64_t d = 0;
    for (; d + L <= head_dim; d += L) {
      const V g = S::load(dout + d);
      dot = S::fma(g, S::load(outs + d) - S::load(out + d), dot);
      S::store(douts + d, g * S::splat(weight));
    }
    if (d < head_dim) {
      const int tail = int(head_dim - d);
      const V g = S::load_n(dout + d, tail);
      dot = S::fma(g, S::load_n(outs + d, tail) - S::load_n(out + d, tail), dot);
      S::store_n(douts + d, g * S::splat(weight), tail);
    }
    return S::sum(dot);
  }
};

// Queries in chunks of about 64 KB of states, so that small merges stay on one thread.
template <class Params>
Chunks<Params> queries_of(const Params& params, const MergeParams& p) {
  const int64_t bytes = (p.num_states + 1) * p.num_heads * (p.head_dim + 2) * 4;
  return {&params, p.num_queries, bytes >= 65536 ? 1 : 65536 / (bytes > 0 ? bytes : 1)};
}

template <class E>
void forward_worker(void* ctx, int64_t) {
  auto& work = *static_cast<Chunks<MergeParams>*>(ctx);
  const MergeParams& p = *work.p;
  using M = Merge<E>;
  auto* table =
      static_cast<typename M::A*>(thread_workspace(p.num_states * M::L * int64_t(sizeof(typename M::A))));
  work.each_chunk([&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) M::forward(p, n, table);
  });
}

template <class E>
void backward_worker(void* ctx, int64_t) {
  auto& work = *static_cast<Chunks<MergeBackwardParams>*>(ctx);
  work.each_chunk([&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) Merge<E>::backward(*work.p, n);
  });
}

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

namespace body = PALMETTE_ISA_NS;

template <>
void merge_states<Isa::PALMETTE_ISA_NS>(const MergeParams& p) {
  auto work = body::queries_of(p, p);
  body::with_any_element(p.dtype, [&]<class E>() { work.run(&body::forward_worker<E>); });
}

template <>
void merge_states_backward<Isa::PALMETTE_ISA_NS>(const MergeBackwardParams& b) {
  auto work = body::queries_of(b, b.forward);
  body::with_any_element(b.forward.dtype, [&]<class E>() { work.run(&body::backward_worker<E>); });
}

}  // namespace palmette
