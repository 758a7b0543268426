// SPDX-License-Identifier: Apache-2.0
// Query rows in the lanes of vectors: the shapes, and how rows get into them and out again.
//
// A row is one (query, query head) pair of one KV head. The rows of an item are cut into blocks:
//
//   Block<NU = 2, P = 1>   2N rows in two vectors, one position of head_dim at a time
//   Block<NU = 1, P = 1>    N rows in one vector
//   Block<NU = 1, P > 1>  N/P rows in one vector, P neighbouring positions of head_dim at a time
//
// A matrix [rows, D] of a block is stored as [ceil(D / P)] steps of NU vectors: lane r * P + e of step s is
// element (row r, s * P + e); of a pair of vectors the second holds rows N .. 2N. Per-row numbers (maximum,
// sum, position) are NU vectors with the value repeated over the P lanes of its row.
#pragma once

#include "vec.h"

namespace palmette::PALMETTE_ISA_NS {

template <class S_, int NU_, int P_>
struct BlockShape {
  using S = S_;
  static constexpr int N = S::kLanes, NU = NU_, P = P_;
  static constexpr int kWidth = NU * N;     // elements per step
  static constexpr int kRows = NU * N / P;  // rows it can hold
  static constexpr int kRowsPerVec = N / P;
  static constexpr int steps(int d) { return (d + P - 1) / P; }
};

// Calls f(shape, first row, rows) for the blocks that cover `rows` rows: pairs while they last, then the
// remainder in the shapes that waste the fewest lanes.
template <class S, class F>
PALMETTE_INLINE void for_each_block(int rows, F&& f) {
  constexpr int N = S::kLanes;
  int r = 0;
  for (; rows - r > N + N / 2; r += 2 * N) f(BlockShape<S, 2, 1>{}, r, rows - r < 2 * N ? rows - r : 2 * N);
  if (rows - r > N / 2) {
    f(BlockShape<S, 1, 1>{}, r, rows - r < N ? rows - r : N);
    r += N;
  }
  int rest = rows - r;
  if (rest <= 0) return;
  if constexpr (N >= 16) {
    if (rest == 1) return f(BlockShape<S, 1, N>{}, r, rest);
    if (rest == 2) return f(BlockShape<S, 1, N / 2>{}, r, rest);
    if (rest <= 4) return f(BlockShape<S, 1, N / 4>{}, r, rest);
    return f(BlockShape<S, 1, 2>{}, r, rest);
  } else if constexpr (N >= 8) {
    if (rest == 1) return f(BlockShape<S, 1, N>{}, r, rest);
    if (rest == 2) return f(BlockShape<S, 1, N / 2>{}, r, rest);
    return f(BlockShape<S, 1, 2>{}, r, rest);
  } else {
    if (rest == 1) return f(BlockShape<S, 1, N>{}, r, rest);
    return f(BlockShape<S, 1, 2>{}, r, rest);
  }
}

// Rows -> lanes: dst [steps(D)] of the block from rows given by `row(r)` (a pointer to D elements of type E);
// rows beyond `count` and positions beyond D become 0. Multiplies by `factor`.
template <class B, class E, class Row>
PALMETTE_INLINE void pack_rows(typename B::S::Scalar* dst, int count, int d, typename B::S::Scalar factor,
                               Row&& row) {
  using S = typename B::S;
  using V = typename S::V;
  constexpr int N = B::N, P = B::P, R = B::kRowsPerVec;
  V f = S::splat(factor);
  for (int u = 0; u < B::NU; ++u) {
    const int first = u * R;
    const E* rows[R];
    for (int r = 0; r < R; ++r) {
      rows[r] = first < count ? static_cast<const E*>(row(first + r < count ? first + r : first)) : nullptr;
    }
    for (int x = 0; x < d; x += N) {
      V m[R];
      if (first + R <= count && x + N <= d) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) m[r] = S::load(rows[r] + x) * f;
      } else {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          m[r] = first + r >= count ? S::zero()
                                    : (x + N <= d ? S::load(rows[r] + x) : S::load_n(rows[r] + x, d - x)) * f;
        }
      }
      S::template transpose<P>(m);
      const int left = B::steps(d) - x / P;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if (r < left) S::store(dst + (x / P + r) * B::kWidth + u * N, m[r]);
      }
    }
  }
}

// Lanes -> rows: calls sink(row, position, vector) for every full vector of N positions and
// tail(row, position, vector, n) for the last n < N; each row's positions come in ascending order.
template <class B, class Sink, class Tail>
PALMETTE_INLINE void unpack_rows(const typename B::S::Scalar* src, int count, int d, Sink&& sink,
                                 Tail&& tail) {
  using S = typename B::S;
  using V = typename S::V;
  constexpr int N = B::N, P = B::P, R = B::kRowsPerVec;
  for (int u = 0; u < B::NU; ++u) {
    const int first = u * R;
    if (first >= count) break;
    for (int x = 0; x < d; x += N) {
      V m[R];
      const int left = B::steps(d) - x / P;
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
        m[r] = r < left ? S::load(src + (x / P + r) * B::kWidth + u * N) : S::zero();
      S::template transpose<P>(m);
      if (first + R <= count && x + N <= d) {
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sink(first + r, x, m[r]);
        continue;
      }
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        if (first + r >= count) continue;
        if (x + N <= d) {
          sink(first + r, x, m[r]);
        } else {
          tail(first + r, x, m[r], d - x);
        }
      }
    }
  }
}

}  // namespace palmette::PALMETTE_ISA_NS
