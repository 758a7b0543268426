// SPDX-License-Identifier: Apache-2.0
// The register-tiled product that every attention kernel is made of.
//
//     C[i][u] (+)= sum_k A(i, k) * B[k][u]        i < MR,  u < NU vectors,  k < steps
//
// C stays in MR x NU vector registers. A is read as *granules* of P neighbouring elements, each repeated
// over a vector; B and C are vectors. What the lanes mean is the caller's choice ("units"):
//   P = 1: the lanes are N query rows; one element of K or V serves all of them.
//   P > 1: the lanes are N/P rows times P neighbouring positions of head_dim, so that few rows
//          still fill a vector. P = N is a dot product along head_dim.
//
//   q.k   S[key][rows]  = sum_d K[key][d]    * Q[d][rows]      A walks along its rows   (kAlongRow)
//   p.v   O[d][rows]   += sum_k V[k][d]      * P[k][rows]      A walks down its columns (!kAlongRow)
//   dK    dK[key][d]   += sum_r dS[key][r]   * Q[r][d]         A along its rows, lanes are head_dim
//
// MR x NU is 6 x 2 or 12 x 1 on 16 vector registers: 12 accumulators cover the latency of two FMA pipes and
// leave room for B and the broadcast. Every loop over the accumulators must be unrolled by pragma, the
// initialisation included, or GCC keeps the array in memory (three times slower).
#pragma once

#include "vec.h"

namespace palmette::PALMETTE_ISA_NS {

// Rows that will be read soon. Every step of the inner loop asks for a line or a few: a core drops requests
// beyond those that it has buffers for, or stalls the loads behind them (docs/performance.md, "What bounds a
// chain").
struct PrefetchQueue {
  const char* const* row = nullptr;  // the next row
  const char* const* end = nullptr;
  int lines = 0;  // cache lines per row
};

enum class Start { kZero, kLoad, kScale };  // C starts at 0, at its stored value, or at value * scale[u]

template <class S, int MR, int NU, int P, bool kAlongRow, Start kStart>
PALMETTE_INLINE void multiply_block(const typename S::Scalar* a, int64_t lda, const typename S::Scalar* b,
                                    int64_t ldb, typename S::Scalar* c, int64_t ldc, int steps,
                                    const typename S::Scalar* scale = nullptr,
                                    PrefetchQueue* soon = nullptr) {
  using V = typename S::V;
  using T = typename S::Scalar;
  constexpr int N = S::kLanes;
  V acc[MR][NU];
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int u = 0; u < NU; ++u) {
      if constexpr (kStart == Start::kZero) acc[i][u] = S::zero();
      if constexpr (kStart == Start::kLoad) acc[i][u] = S::load(c + i * ldc + u * N);
      if constexpr (kStart == Start::kScale)
        acc[i][u] = S::load(c + i * ldc + u * N) * S::load(scale + u * N);
    }
  }
  // Three rows per pointer along the rows: base, base + lda, base + 2 lda are x86 addressing modes.
  constexpr int kBases = kAlongRow ? (MR + 2) / 3 : 1;
  const T* base[kBases];
#pragma GCC unroll 8
  for (int j = 0; j < kBases; ++j) base[j] = a + 3 * j * lda;
  auto step = [&]() __attribute__((always_inline)) {
    V bv[NU];
#pragma GCC unroll 4
    for (int u = 0; u < NU; ++u) bv[u] = S::load(b + u * N);
    b += ldb;
#pragma GCC unroll 16
    for (int i = 0; i < MR; ++i) {
      const T* at = kAlongRow ? base[kAlongRow ? i / 3 : 0] + (i % 3) * lda : base[0] + i * P;
      const V av = S::template splat_granule<P>(at);
#pragma GCC unroll 4
      for (int u = 0; u < NU; ++u) acc[i][u] = S::fma(av, bv[u], acc[i][u]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < kBases; ++j) base[j] += kAlongRow ? P : lda;
  };
  int k = 0;
  if (soon != nullptr) {
    const int per_row =
        (soon->lines + P - 1) / P;  // P lines a step: as many bytes as P rows of lanes leave time for
    for (; soon->row < soon->end && k + per_row <= steps; k += per_row) {
      const char* line = *soon->row++;
      for (int j = 0; j < per_row; ++j) {
#pragma GCC unroll 16
        for (int x = 0; x < P; ++x) prefetch(line + 64 * x);
        line += 64 * P;
        step();
      }
    }
  }
#pragma GCC unroll 4
  for (; k < steps; ++k) step();
#pragma GCC unroll 16
  for (int i = 0; i < MR; ++i) {
#pragma GCC unroll 4
    for (int u = 0; u < NU; ++u) S::store(c + i * ldc + u * N, acc[i][u]);
  }
}

}  // namespace palmette::PALMETTE_ISA_NS
