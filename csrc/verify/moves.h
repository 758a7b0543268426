// SPDX-License-Identifier: Apache-2.0
// Parallel assignment: rows move to other rows "as if all sources were read first", with one spare row.
//
// A move may run once nobody has still to read the row it overwrites. Every row is written at most once, so
// moves form chains (5 <- 7 <- 9: run from the end that nobody reads) and, where no end is left, cycles, of
// which one row waits in the spare row. n moves need n steps, and one more for each cycle.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

#include "core/checks.h"
#include "plan/tree.h"

namespace palmette {

constexpr int64_t kSpareRow = -1;

struct RowMove {
  int64_t src, dst;
};

// Checks the moves; returns them in order of their destinations.
inline std::vector<int64_t> check_moves(const IntArray& src, const IntArray& dst, int64_t num_slots) {
  if (src.size != dst.size) {
    require(false, "dst_slots", text("[", src.size, "] like src_slots"), "[", dst.size, "]");
  }
  const int64_t n = src.size;
  const auto check_range = [&](const IntArray& slots, const char* name) {
    for (int64_t i = 0; i < n; ++i) {
      if (slots[i] >= 0 && slots[i] < num_slots) continue;
      require(false, name, text("in [0, ", num_slots, ")"), slots[i], " at ", i);
    }
  };
  check_range(src, "src_slots");
  check_range(dst, "dst_slots");
  // Not a table over slots: a pool has many more of them than there are moves.
  std::vector<int64_t> by_dst(static_cast<size_t>(n));
  std::iota(by_dst.begin(), by_dst.end(), int64_t{0});
  std::stable_sort(by_dst.begin(), by_dst.end(), [&](int64_t a, int64_t b) { return dst[a] < dst[b]; });
  for (int64_t i = 1; i < n; ++i) {
    const int64_t a = by_dst[i - 1], b = by_dst[i];
    require(dst[a] != dst[b], "dst_slots", "distinct", dst[a], " at ", a, " and ", b);
  }
  return by_dst;
}

// The moves in an order in which they can run one after the other; src or dst may be kSpareRow. Moves of a
// row to itself are left out.
inline std::vector<RowMove> order_moves(const IntArray& src, const IntArray& dst, int64_t num_slots) {
  const std::vector<int64_t> by_dst = check_moves(src, dst, num_slots);
  const int64_t n = src.size;
  // overwrites[i]: the move that writes the row which move i reads, -1 if none.
  std::vector<int64_t> overwrites(static_cast<size_t>(n), -1), readers(static_cast<size_t>(n), 0);
  for (int64_t i = 0; i < n; ++i) {
    const auto at = std::lower_bound(by_dst.begin(), by_dst.end(), src[i],
                                     [&](int64_t move, int64_t slot) { return dst[move] < slot; });
    if (at == by_dst.end() || dst[*at] != src[i] || src[*at] == dst[*at] || src[i] == dst[i]) continue;
    overwrites[i] = *at;
    ++readers[*at];
  }

  std::vector<RowMove> steps;
  steps.reserve(static_cast<size_t>(n));
  std::vector<uint8_t> done(static_cast<size_t>(n), 0);
  for (int64_t i = 0; i < n; ++i) {
    if (src[i] == dst[i]) done[i] = 1;
    // From the end of a chain, upwards for as long as this was the last reader of the next row.
    for (int64_t m = i; m >= 0 && !done[m] && readers[m] == 0;) {
      steps.push_back({src[m], dst[m]});
      done[m] = 1;
      m = overwrites[m];
      if (m >= 0) --readers[m];
    }
  }
  for (int64_t i = 0; i < n; ++i) {
    if (done[i]) continue;
    const int64_t saved = dst[i];
    steps.push_back({saved, kSpareRow});
    for (int64_t m = i; !done[m]; m = overwrites[m]) {
      steps.push_back({src[m] == saved ? kSpareRow : src[m], dst[m]});
      done[m] = 1;
    }
  }
  return steps;
}

}  // namespace palmette
