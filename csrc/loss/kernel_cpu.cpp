// SPDX-License-Identifier: Apache-2.0
// Log-probabilities of chosen tokens, from logits x [T, vocab]. With m = max x and z = (x - m) / temperature
//
//     s = sum_v e^z_v           lse = m / temperature + log s       logprob = z_y - log s
//     u = sum_v e^z_v z_v                                           entropy = log s - u / s
//
// (the difference first: rounded after the division, a probability could be more than 1) and back, of
// gradients g of a row's logprob and h of its entropy H, with p_v = e^(x_v / temperature - lse),
//
//     dx_v = (g [v = y] - p_v (g + h (log p_v + H))) / temperature
//
// A row is read once, in blocks that stay in L1: the block's maximum, then its exponentials. What m was
// before scales s and u down. A worker owns a row.
#include <algorithm>
#include <cmath>

#include "cpu/chunks.h"
#include "cpu/vec.h"
#include "loss/params.h"

namespace palmette::PALMETTE_ISA_NS {
namespace {

constexpr int64_t kBlock = 2048;      // elements
constexpr float kLeastLogit = -1e4f;  // below the maximum: e^x is 0, and 0 x is not NaN as with -inf

template <class E>
struct Rows {
  using T = std::conditional_t<std::is_same_v<E, double>, double, float>;
  static constexpr int L = sizeof(T) == 8 ? 4 : PALMETTE_LANES;
  using S = Simd<T, L>;
  using V = typename S::V;

  // f(vector, first element, how many) over [begin, end).
  template <class F>
  static PALMETTE_INLINE void each_vector(const E* x, int64_t begin, int64_t end, F&& f) {
    int64_t i = begin;
    for (; i + L <= end; i += L) f(S::load(x + i), i, L);
    if (i < end) f(S::load_n(x + i, int(end - i)), i, int(end - i));
  }

  static void forward(const LogprobsParams& p, int64_t row) {
    const E* x = static_cast<const E*>(p.logits) + row * p.row_stride;
    const T inverse = T(p.inverse_temperature);
    const bool entropy = p.entropies != nullptr;
    T most = -T(INFINITY);
    double sum = 0, weighted = 0;
    for (int64_t begin = 0; begin < p.vocab; begin += kBlock) {
      const int64_t end = begin + kBlock < p.vocab ? begin + kBlock : p.vocab;
      V top[4];
      for (int k = 0; k < 4; ++k) top[k] = S::splat(-T(INFINITY));
      int64_t i = begin;
      for (; i + 4 * L <= end; i += 4 * L) {
#pragma GCC unroll 4
        for (int k = 0; k < 4; ++k) top[k] = S::max(S::load(x + i + k * L), top[k]);
      }
      T highest = S::max_lane(S::max(S::max(top[0], top[1]), S::max(top[2], top[3])));
      for (; i < end; ++i) {
        const T value = S::to_scalar(x[i]);
        highest = value > highest ? value : highest;
      }
      if (highest > most) {
        const double rise = (double(most) - double(highest)) * inverse, scale = std::exp(rise);
        weighted = sum == 0 ? 0 : scale * (weighted + sum * rise);
        sum *= scale;
        most = highest;
      }
      V s = S::zero(), u = S::zero();
      const V m = S::splat(most == -T(INFINITY) ? T(0) : most), least = S::splat(T(kLeastLogit));
      each_vector(x, begin, end, [&](V v, int64_t, int n) {
        const V z = S::max((v - m) * inverse, least);
        V e = S::exp(z);
        if (n < L) e = first_lanes(e, n);
        s += e;
        if (entropy) u += e * z;
      });
      sum += double(S::sum(s));
      weighted += double(S::sum(u));
    }
    const double log_sum = std::log(sum);
    static_cast<T*>(p.lse)[row] = T(double(most) * inverse + log_sum);
    static_cast<T*>(p.logprobs)[row] =
        T((double(S::to_scalar(x[p.targets[row]])) - double(most)) * inverse - log_sum);
    if (entropy) static_cast<T*>(p.entropies)[row] = T(log_sum - weighted / sum);
  }

  static PALMETTE_INLINE V first_lanes(V v, int n) {
    V r = S::zero();
    for (int i = 0; i < n; ++i) r[i] = v[i];
    return r;
  }

  static void backward(const LogprobsBackwardParams& p, int64_t row) {
    E* x = static_cast<E*>(p.logits) + row * p.row_stride;
    const T inverse = T(p.inverse_temperature), lse = static_cast<const T*>(p.lse)[row];
    const T g = p.dlogprobs == nullptr ? T(0) : static_cast<const T*>(p.dlogprobs)[row];
    const T h = p.dentropies == nullptr ? T(0) : static_cast<const T*>(p.dentropies)[row];
    if (g == 0 && h == 0) {
      for (int64_t i = 0; i < p.vocab; ++i) x[i] = E{};
      return;
    }
    const int64_t y = p.targets[row];
    const T at_target = S::to_scalar(x[y]);
    const V l = S::splat(lse), least = S::splat(T(kLeastLogit));
    const V own = S::splat(-g * inverse), of_entropy = S::splat(-h * inverse);
    const V entropy = S::splat(h == 0 ? T(0) : static_cast<const T*>(p.entropies)[row]);
    each_vector(x, 0, p.vocab, [&](V v, int64_t i, int n) {
      const V z = S::max(v * inverse - l, least);
      V factor = own;
      if (h != 0) factor += of_entropy * (z + entropy);
      const V d = S::exp(z) * factor;
      if (n == L)
        S::store(x + i, d);
      else
        S::store_n(x + i, d, n);
    });
    const T z = std::max(at_target * inverse - lse, T(kLeastLogit));
    const T factor = g + (h == 0 ? T(0) : h * (z + static_cast<const T*>(p.entropies)[row]));
    S::from_scalar(x[y], (g - S::exp(S::splat(z))[0] * factor) * inverse);
  }
};

// Each row to one worker: f(p, row).
template <class Params, class F>
void each_row(void* ctx, F&& f) {
  auto& work = *static_cast<Chunks<Params>*>(ctx);
  work.each_chunk([&](int64_t row, int64_t) { f(*work.p, row); });
}

template <class E>
void forward_worker(void* ctx, int64_t) {
  each_row<LogprobsParams>(ctx, &Rows<E>::forward);
}
template <class E>
void backward_worker(void* ctx, int64_t) {
  each_row<LogprobsBackwardParams>(ctx, &Rows<E>::backward);
}

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

namespace body = PALMETTE_ISA_NS;

template <>
void gather_logprobs<Isa::PALMETTE_ISA_NS>(const LogprobsParams& p) {
  body::Chunks<LogprobsParams> work{&p, p.num_rows, 1};
  body::with_any_element(p.dtype, [&]<class E>() { work.run(&body::forward_worker<E>); });
}

template <>
void gather_logprobs_backward<Isa::PALMETTE_ISA_NS>(const LogprobsBackwardParams& p) {
  body::Chunks<LogprobsBackwardParams> work{&p, p.num_rows, 1};
  body::with_any_element(p.dtype, [&]<class E>() { work.run(&body::backward_worker<E>); });
}

}  // namespace palmette
