// SPDX-License-Identifier: Apache-2.0
// One block of query rows meets one tile of keys: the online softmax update of its state.
//
//   S = Q K^T                                    (logits in units of log2: the scale is folded into Q)
//   m' = max(m, max_k S),  P = 2^(S - m'),  c = 2^(m - m')
//   l' = c l + sum_k P,    O' = c O + P V
//
// Lanes hold rows (cpu/rows.h), so maximum, sum and rescaling are vertical and the rescaling of O rides on
// the load of the accumulators. m starts at -3e38, not -inf: m - m' is then never NaN, and a row that has
// seen no key keeps l = 0.
#pragma once

#include "attend/keys_cpu.h"
#include "cpu/microkernel.h"
#include "cpu/rows.h"

namespace palmette::PALMETTE_ISA_NS {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;
constexpr double kEmptyMax = -3e38;

// What a block knows about its rows. Rows that only fill up lanes repeat the first row's position.
template <class S>
struct BlockRows {
  const typename S::Int* pos;    // [NU * N]
  const typename S::Int* depth;  // [NU * N]
  int32_t min_pos, max_pos, min_depth, max_depth;
};

enum class Visibility { kNone, kAll, kSome };

template <class S>
PALMETTE_INLINE Visibility tile_visibility(const KeyTile& t, const BlockRows<S>& r, int window) {
  if (t.min_lo > r.max_pos || t.max_hi <= r.min_pos) return Visibility::kNone;
  if (window > 0 && r.min_depth - t.max_depth >= window) return Visibility::kNone;
  const bool all =
      t.max_lo <= r.min_pos && t.min_hi > r.max_pos && (window <= 0 || r.max_depth - t.min_depth < window);
  return all ? Visibility::kAll : Visibility::kSome;
}

template <class S>
PALMETTE_INLINE bool key_may_be_seen(const KeyTile& t, int k, const BlockRows<S>& r, int window) {
  return t.lo[k] <= r.max_pos && t.hi[k] > r.min_pos && (window <= 0 || r.min_depth - t.depth[k] < window);
}

// Mask of the lanes that see key k.
template <class S>
PALMETTE_INLINE typename S::I lanes_that_see(const KeyTile& t, int k, const BlockRows<S>& r, int u,
                                             int window) {
  const typename S::I pos = S::load_int(r.pos + u * S::kLanes);
  typename S::I see = (pos >= S::splat_int(t.lo[k])) & (pos < S::splat_int(t.hi[k]));
  if (window > 0) see &= (S::load_int(r.depth + u * S::kLanes) - t.depth[k]) < S::splat_int(window);
  return see;
}

// S[key][rows] = sum_d K[key][d] Q[d][rows] for keys [0, n).
template <class B>
PALMETTE_INLINE void scores(const TileView<typename B::S::Scalar>& k, int n, const typename B::S::Scalar* q,
                            int d, typename B::S::Scalar* s, int64_t lds, PrefetchQueue* soon = nullptr) {
  constexpr int NU = B::NU, P = B::P;
  const int steps = B::steps(d);
  auto run = [&]<int MR>(std::integral_constant<int, MR>, int i) {
    multiply_block<typename B::S, MR, NU, P, true, Start::kZero>(
        k.data + i * k.stride, k.stride, q, B::kWidth, s + i * lds, lds, steps, nullptr, soon);
  };
  constexpr int kMain = NU == 2 ? 6 : 12;
  int i = 0;
  for (; i + kMain <= n; i += kMain) run(std::integral_constant<int, kMain>{}, i);
  if constexpr (NU == 1) {
    for (; i + 8 <= n; i += 8) run(std::integral_constant<int, 8>{}, i);
  }
  for (; i + 4 <= n; i += 4) run(std::integral_constant<int, 4>{}, i);
  for (; i + 2 <= n; i += 2) run(std::integral_constant<int, 2>{}, i);
  for (; i < n; ++i) run(std::integral_constant<int, 1>{}, i);
}

// O[d][rows] = O + sum_k V[k][d] P[k][rows] for keys [0, n), where O starts as kStart says (scale: [rows]).
template <class B, Start kStart>
PALMETTE_INLINE void accumulate(const TileView<typename B::S::Scalar>& v, int n,
                                const typename B::S::Scalar* p, int64_t ldp, typename B::S::Scalar* o, int d,
                                const typename B::S::Scalar* scale = nullptr, PrefetchQueue* soon = nullptr) {
  constexpr int NU = B::NU, P = B::P;
  const int steps = B::steps(d);
  auto run = [&]<int MR>(std::integral_constant<int, MR>, int i) {
    multiply_block<typename B::S, MR, NU, P, false, kStart>(v.data + i * P, v.stride, p, ldp,
                                                            o + i * B::kWidth, B::kWidth, n, scale, soon);
  };
  constexpr int kMain = NU == 2 ? 6 : 12;
  int i = 0;
  for (; i + kMain <= steps; i += kMain) run(std::integral_constant<int, kMain>{}, i);
  if constexpr (NU == 1) {
    for (; i + 8 <= steps; i += 8) run(std::integral_constant<int, 8>{}, i);
  }
  for (; i + 4 <= steps; i += 4) run(std::integral_constant<int, 4>{}, i);
  for (; i + 2 <= steps; i += 2) run(std::integral_constant<int, 2>{}, i);
  for (; i < steps; ++i) run(std::integral_constant<int, 1>{}, i);
}

// The same where V (or K) holds inf or NaN that some row must not see: a weight of exactly 0 contributes
// nothing.
template <class B, Start kStart>
__attribute__((noinline)) void accumulate_visible(const TileView<typename B::S::Scalar>& v, int n,
                                                  const typename B::S::Scalar* p, int64_t ldp,
                                                  typename B::S::Scalar* o, int d,
                                                  const typename B::S::Scalar* scale = nullptr) {
  using S = typename B::S;
  using V = typename S::V;
  for (int i = 0; i < B::steps(d); ++i) {
    for (int u = 0; u < B::NU; ++u) {
      typename S::Scalar* dst = o + i * B::kWidth + u * S::kLanes;
      V acc = kStart == Start::kZero ? S::zero() : S::load(dst);
      if constexpr (kStart == Start::kScale) acc *= S::load(scale + u * S::kLanes);
      for (int k = 0; k < n; ++k) {
        V w = S::load(p + k * ldp + u * S::kLanes);
        V a = S::template splat_granule<B::P>(v.data + k * v.stride + i * B::P);
        acc = S::select(w == S::zero(), acc, S::fma(a, w, acc));
      }
      S::store(dst, acc);
    }
  }
}

template <class S>
__attribute__((noinline)) bool tile_is_finite(const TileView<typename S::Scalar>& t, int n, int d) {
  typename S::V bad = S::zero();
  for (int k = 0; k < n; ++k) {
    const typename S::Scalar* row = t.data + k * t.stride;
    int x = 0;
    for (; x + S::kLanes <= d; x += S::kLanes) bad += S::load(row + x) * S::zero();  // NaN from inf and NaN
    if (x < d) bad += S::load_n(row + x, d - x) * S::zero();
  }
  return !S::any(bad != S::zero());
}

template <class T>
struct BlockState {  // in the block's layout (cpu/rows.h)
  T* o;              // [steps(Dv)][NU * N]
  T* m;              // [NU * N], log2 units
  T* l;              // [NU * N]
  bool* touched;     // o holds something
};

template <class B>
__attribute__((noinline)) void attend_block(const KeyTile& t, const TileView<typename B::S::Scalar>& k,
                                            const TileView<typename B::S::Scalar>& v, bool v_finite,
                                            const typename B::S::Scalar* q, int d, int dv,
                                            const BlockRows<typename B::S>& rows, int window, double softcap,
                                            BlockState<typename B::S::Scalar> st, typename B::S::Scalar* s,
                                            PrefetchQueue* soon) {
  using S = typename B::S;
  using T = typename S::Scalar;
  using V = typename S::V;
  constexpr int N = S::kLanes, W = B::kWidth;

  int begin = 0, end = t.count;
  const Visibility visible = tile_visibility<S>(t, rows, window);
  if (visible == Visibility::kNone) return;
  if (visible == Visibility::kSome) {
    while (end > begin && !key_may_be_seen<S>(t, end - 1, rows, window)) --end;
    while (begin < end && !key_may_be_seen<S>(t, begin, rows, window)) ++begin;
    if (begin == end) return;
  }
  const int n = end - begin;
  const TileView<T> kk{k.data + begin * k.stride, k.stride}, vv{v.data + begin * v.stride, v.stride};
  scores<B>(kk, n, q, d, s, W, soon);
  if constexpr (B::P > 1) {
    for (int i = 0; i < n; ++i) S::store(s + i * W, S::template sum_granule<B::P>(S::load(s + i * W)));
  }
  if (softcap > 0) {
    for (int i = 0; i < n * W; i += N) S::store(s + i, S::tanh(S::load(s + i)) * T(softcap * kLog2e));
  }
  if (visible == Visibility::kSome) {
    for (int i = 0; i < n; ++i) {
      for (int u = 0; u < B::NU; ++u) {
        T* at = s + i * W + u * N;
        S::store(at, S::select(lanes_that_see<S>(t, begin + i, rows, u, window), S::load(at),
                               S::splat(-INFINITY)));
      }
    }
  }
  alignas(64) T correction[W];
  for (int u = 0; u < B::NU; ++u) {
    const V old = S::load(st.m + u * N);
    V top = old, more[4] = {old, old, old, old};  // one maximum alone would wait for itself at every key
    int k4 = 0;
    for (; k4 + 4 <= n; k4 += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) more[j] = S::max(more[j], S::load(s + (k4 + j) * W + u * N));
    }
    for (; k4 < n; ++k4) top = S::max(top, S::load(s + k4 * W + u * N));
    top = S::max(S::max(S::max(top, more[0]), S::max(more[1], more[2])), more[3]);
    const V c = S::exp2(old - top);
    S::store(correction + u * N, c);
    S::store(st.m + u * N, top);
    V sum = S::zero();
    for (int i = 0; i < n; ++i) {
      const V p = S::exp2(S::load(s + i * W + u * N) - top);
      S::store(s + i * W + u * N, p);
      sum += p;
    }
    S::store(st.l + u * N, S::load(st.l + u * N) * c + sum);
  }
  const bool plain = visible == Visibility::kAll || v_finite;
  if (!*st.touched) {
    if (plain) {
      accumulate<B, Start::kZero>(vv, n, s, W, st.o, dv, nullptr, soon);
    } else {
      accumulate_visible<B, Start::kZero>(vv, n, s, W, st.o, dv);
    }
  } else if (plain) {
    accumulate<B, Start::kScale>(vv, n, s, W, st.o, dv, correction, soon);
  } else {
    accumulate_visible<B, Start::kScale>(vv, n, s, W, st.o, dv, correction);
  }
  *st.touched = true;
}

}  // namespace palmette::PALMETTE_ISA_NS
