// SPDX-License-Identifier: Apache-2.0
// What the tile kernel costs, as the planner sees it: which keys to read together, and where to cut work in
// equal parts.
//
//   cost(item) = item + lanes(rows) * (row + keys * key) + keys * pack        [ns per KV head, one thread]
//
//   rows  = queries of the item * (query heads per KV head)
//   lanes = rows as the kernel runs them: blocks of 16, 8, 4, 2 or 1 rows (cpu/rows.h), weighted by how much
//   slower a row is in a
//           small block than in a block of 16
//
// The constants hold for head_dim 128 and grow in proportion to head_dim, except `item`, which is
// bookkeeping.
//
//   constant      ns      measured as
//   kItemCost     300     two items of 48 keys against one of 96
//   kRowCost       40     packing a query row, rescaling and storing its state: many items of few keys
//   kKeyCost      2.6     a row meeting a key (q k and p v, 512 flop) in blocks of 16
//   kPackCost      15     fetching a key and its value from the pool: chains with few rows
//   kBlock8        1.20   per-row cost in a block of 8, relative to 16; likewise 4, 2 and 1
//   kBlock4        1.56
//   kBlock2        2.03
//   kBlock1        2.64
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace palmette {

constexpr double kItemCost = 300, kRowCost = 40, kKeyCost = 2.6, kPackCost = 15;
constexpr double kBlock8 = 1.20, kBlock4 = 1.56, kBlock2 = 2.03, kBlock1 = 2.64;

// Query rows of one task: more would not stay in the cache beside a tile of keys.
constexpr int64_t kMaxTaskRows = 256;
// Up to this many rows the kernel runs several KV heads in one unit of work.
constexpr int64_t kThinRows = 32;
// Units of work that a plan aims at (tasks * KV heads), whatever the number of threads, and what one must
// cost at least.
constexpr double kUnits = 16, kMinUnitCost = 50e3;
constexpr int64_t kMinThinKeys = 192;
// Items of few rows get tasks of their own when they are at least this part of the cost.
constexpr double kWorthSeparating = 0.05;
// Items are cut between tiles of the kernel: at multiples of this many keys.
constexpr int32_t kKeyStep = 48;
// Partial states may always take this much memory, however few queries there are.
constexpr int64_t kFreePartialBytes = 1 << 20;
// How far the grouping of short pieces looks back.
constexpr int32_t kMaxGroupPieces = 64, kMaxGroupKeys = 512;

class CostModel {
 public:
  CostModel(int64_t group, int64_t head_dim, int64_t max_queries)
      : scale_(static_cast<double>(head_dim) / 128.0), group_(group) {
    lanes_.resize(static_cast<size_t>(max_queries) + 1);
    for (int64_t q = 0; q <= max_queries; ++q) lanes_[q] = lanes(q * group);
  }
  int64_t group() const { return group_; }
  // An item of `queries` queries costs fixed + keys * per_key.
  double fixed(int32_t queries) const { return kItemCost + scale_ * lanes_[queries] * kRowCost; }
  double per_key(int32_t queries) const { return scale_ * (lanes_[queries] * kKeyCost + kPackCost); }
  double item(int32_t queries, int64_t keys) const {
    return fixed(queries) + static_cast<double>(keys) * per_key(queries);
  }

 private:
  static double lanes(int64_t rows) {
    int64_t rest = rows % 16;
    double cost = static_cast<double>(rows - rest);
    if (rest > 12) return cost + 16;
    if (rest > 4) cost += 8 * kBlock8, rest = std::max<int64_t>(rest - 8, 0);
    return cost + (rest == 0 ? 0 : rest == 1 ? kBlock1 : rest == 2 ? 2 * kBlock2 : 4 * kBlock4);
  }

  double scale_;
  int64_t group_;
  std::vector<double> lanes_;  // by number of queries
};

}  // namespace palmette
