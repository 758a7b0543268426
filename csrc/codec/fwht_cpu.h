// SPDX-License-Identifier: Apache-2.0
// The fast Walsh-Hadamard transform in registers: butterflies (a, b) -> (a + b, a - b) at distances
// 1, 2, 4, ... of neighbouring elements. The order of the distances is part of the wire: another one rounds
// otherwise.
#pragma once

#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {

template <class T, int N>
struct Butterfly {
  using S = Simd<T, N>;
  using V = typename S::V;

  // Within a vector: lane i meets lane i ^ H. Its own value times 1 or -1 is exact, so one multiply-add
  // rounds as the sum or the difference does.
  template <int H>
  static PALMETTE_INLINE V lanes(V v) {
    return signed_add<H>(v, S::template swap_impl<H>(v, std::make_integer_sequence<int, N>{}));
  }
  // The stages 1, 2, ... below 2^kStages.
  template <int kStages>
  static PALMETTE_INLINE V in_lanes(V v) {
    if constexpr (kStages > 0) v = lanes<1>(v);
    if constexpr (kStages > 1) v = lanes<2>(v);
    if constexpr (kStages > 2) v = lanes<4>(v);
    if constexpr (kStages > 3) v = lanes<8>(v);
    return v;
  }
  // Between R vectors, the smallest distance first.
  template <int R>
  static PALMETTE_INLINE void between(V (&v)[R]) {
#pragma GCC unroll 8
    for (int h = 1; h < R; h *= 2) {
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        if (i & h) continue;
        const V a = v[i], b = v[i + h];
        v[i] = a + b;
        v[i + h] = a - b;
      }
    }
  }

 private:
  template <int H, int... Is>
  static PALMETTE_INLINE V signs(std::integer_sequence<int, Is...>) {
    return V{((Is & H) ? T(-1) : T(1))...};
  }
  template <int H>
  static PALMETTE_INLINE V signed_add(V v, V partner) {
    const V s = signs<H>(std::make_integer_sequence<int, N>{});
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4)
      return (V)_mm512_fmadd_ps((__m512)v, (__m512)s, (__m512)partner);
#endif
#if defined(__FMA__)
    if constexpr (sizeof(V) == 32 && sizeof(T) == 4)
      return (V)_mm256_fmadd_ps((__m256)v, (__m256)s, (__m256)partner);
#endif
    return v * s + partner;
  }
};

constexpr int log2_of(int n) { return n <= 1 ? 0 : 1 + log2_of(n / 2); }

// A whole tile of R vectors of N lanes.
template <class T, int N, int R>
PALMETTE_INLINE void fwht(typename Simd<T, N>::V (&v)[R]) {
  using B = Butterfly<T, N>;
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) v[i] = B::template in_lanes<log2_of(N)>(v[i]);
  B::between(v);
}

}  // namespace palmette::PALMETTE_ISA_NS
