// SPDX-License-Identifier: Apache-2.0
// Walks a token tree from each root: the target picks a token at the node it stands on; if a child holds that
// token the walk goes on there, otherwise the token is the bonus and the walk ends.
//
// Greedy picks argmax(logits). Sampling picks by inversion,
//
//     token = min { t : u * sum(p) < p[0] + .. + p[t] }
//
// so the tokens that come out, accepted ones and the bonus alike, are draws from the target's own conditional
// distributions whatever was drafted: the output follows the target exactly. Siblings with the same token
// change nothing, because the draw does not look at them (schemes that subtract the probability of each
// rejected sibling count it twice). With one draft token per child and no draft distribution this also
// accepts as often as any exact scheme can: with the total probability of the distinct children.
//
// Only the rows of visited nodes are read. Walks are independent of each other, so the result does not depend
// on the number of threads; sums are taken in one order on every body, so all backends draw the same tokens.
#include <atomic>
#include <limits>
#include <type_traits>

#include "core/parallel.h"
#include "cpu/vec.h"
#include "verify/params.h"

namespace palmette::PALMETTE_ISA_NS {
namespace {

template <class E>
struct Pick {
  static constexpr bool kDouble = std::is_same_v<E, double>;
  using A = std::conditional_t<kDouble, double, float>;
  using S = Simd<A, kDouble ? 4 : PALMETTE_LANES>;
  using V = typename S::V;
  using I = typename S::I;
  static constexpr int L = S::kLanes;

  // The first token of the greatest logit, or -1 where there is a NaN.
  static int64_t argmax(const E* row, int64_t vocab, VerifyFault& fault) {
    constexpr int kChains = 4;  // independent, so that a maximum need not wait for the one before
    V best[kChains];
    I nan[kChains];
    for (int c = 0; c < kChains; ++c) {
      best[c] = S::splat(-std::numeric_limits<A>::infinity());
      nan[c] = I{};
    }
    int64_t i = 0;
    for (; i + kChains * L <= vocab; i += kChains * L) {
#pragma GCC unroll 4
      for (int c = 0; c < kChains; ++c) {
        const V x = S::load(row + i + c * L);
        best[c] = S::max(best[c], x);
        nan[c] |= x != x;
      }
    }
    for (int c = 1; c < kChains; ++c) {
      best[0] = S::max(best[0], best[c]);
      nan[0] |= nan[c];
    }
    A top = S::max_lane(best[0]);
    bool bad = S::any(nan[0]);
    for (; i < vocab; ++i) {
      const A x = S::to_scalar(row[i]);
      top = x > top ? x : top;
      bad = bad || x != x;
    }
    if (bad) {
      for (i = 0; i < vocab && S::to_scalar(row[i]) == S::to_scalar(row[i]);) ++i;
      fault = {RowFault::nan, 0, i, std::numeric_limits<double>::quiet_NaN()};
      return -1;
    }
    const V wanted = S::splat(top);
    for (i = 0; i + L <= vocab && !S::any(S::load(row + i) == wanted);) i += L;
    while (S::to_scalar(row[i]) != top) ++i;
    return i;
  }

  // p[0] + .. + p[count - 1]; `bad` when one of them is negative or NaN.
  static double chunk_sum(const E* p, int64_t count, bool& bad) {
    using W = Simd<A, kSumChains>;
    double sum[kSumChains] = {};
    typename W::I good = W::splat_int(-1);
    int64_t i = 0;
    for (; i + kSumChains <= count; i += kSumChains) {
      const typename W::V x = W::load(p + i);
      good &= x >= W::zero();
#pragma GCC unroll 8
      for (int c = 0; c < kSumChains; ++c) sum[c] += static_cast<double>(x[c]);
    }
    bad = bad || W::any(~good);
    double total = 0;
    for (int c = 0; c < kSumChains; ++c) total += sum[c];
    for (; i < count; ++i) {
      const A x = S::to_scalar(p[i]);
      total += static_cast<double>(x);
      bad = bad || !(x >= A(0));
    }
    return total;
  }

  // The token that `uniform` falls on, or -1 where the row is no distribution.
  static int64_t sample(const E* p, int64_t vocab, double uniform, double tolerance, VerifyFault& fault) {
    constexpr int64_t kChunk = kSumChunk;
    bool bad = false;
    double total = 0;
    for (int64_t i = 0; i < vocab; i += kChunk) {
      total += chunk_sum(p + i, vocab - i < kChunk ? vocab - i : kChunk, bad);
    }
    if (bad) {
      int64_t i = 0;
      while (S::to_scalar(p[i]) >= A(0)) ++i;
      const double value = static_cast<double>(S::to_scalar(p[i]));
      fault = {value < 0 ? RowFault::negative : RowFault::nan, 0, i, value};
      return -1;
    }
    if (!(total >= 1.0 - tolerance && total <= 1.0 + tolerance)) {
      fault = {RowFault::sum, 0, 0, total};
      return -1;
    }
    const double target = uniform * total;
    double before = 0;
    int64_t last = -1;  // the last token so far that can be drawn
    for (int64_t i = 0; i < vocab; i += kChunk) {
      const int64_t count = vocab - i < kChunk ? vocab - i : kChunk;
      const double sum = chunk_sum(p + i, count, bad);
      if (target >= before + sum && i + kChunk < vocab) {
        before += sum;
        continue;
      }
      for (int64_t t = i; t < i + count; ++t) {
        const double x = static_cast<double>(S::to_scalar(p[t]));
        before += x;
        if (x > 0) last = t;
        if (target < before) return t;
      }
      if (last >= 0) return last;  // this chunk, added in another order, fell short by a rounding error
    }
    for (int64_t t = vocab - 1; last < 0 && t >= 0; --t) {
      if (static_cast<double>(S::to_scalar(p[t])) > 0) last = t;
    }
    return last;
  }

  static void walk(const VerifyParams& p, int64_t r) {
    int64_t* accepted = p.accepted + r * p.max_depth;
    const double* uniform = p.uniforms == nullptr ? nullptr : p.uniforms + r * (p.max_depth + 1);
    int64_t count = 0;
    p.fault[r] = {RowFault::none, 0, 0, 0};
    for (int32_t node = p.root[r];;) {
      const E* row = static_cast<const E*>(p.rows) + node * p.row_stride;
      const int64_t token = uniform == nullptr
                                ? argmax(row, p.vocab, p.fault[r])
                                : sample(row, p.vocab, uniform[count], p.tolerance, p.fault[r]);
      if (token < 0) {
        p.fault[r].node = node;
        return;
      }
      int32_t child = p.first_child[node];
      while (child >= 0 && p.token[child] != token) child = p.next_sibling[child];
      if (child < 0) {
        p.num_accepted[r] = count;
        p.bonus[r] = token;
        while (count < p.max_depth) accepted[count++] = -1;
        return;
      }
      accepted[count++] = child;
      node = child;
    }
  }
};

struct Work {
  const VerifyParams* params;
  std::atomic<int64_t> next{0};
};

template <class E>
void worker(void* ctx, int64_t) {
  Work& work = *static_cast<Work*>(ctx);
  for (int64_t r; (r = work.next.fetch_add(1)) < work.params->num_roots;) Pick<E>::walk(*work.params, r);
}

void run(const VerifyParams& p, void (*body)(void*, int64_t)) {
  Work work{&p};
  const int64_t workers = num_workers();
  run_workers(p.num_roots < workers ? p.num_roots : workers, body, &work);
}

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

namespace body = PALMETTE_ISA_NS;

template <>
void verify<Isa::PALMETTE_ISA_NS>(const VerifyParams& p) {
  switch (p.dtype) {
    case DType::bf16:
      return body::run(p, &body::worker<body::bf16>);
    case DType::f16:
      return body::run(p, &body::worker<body::fp16>);
    case DType::f64:
      if constexpr (Isa::PALMETTE_ISA_NS == Isa::scalar) body::run(p, &body::worker<double>);
      return;
    case DType::f32:
      return body::run(p, &body::worker<float>);
  }
}

}  // namespace palmette
