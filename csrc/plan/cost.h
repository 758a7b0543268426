// SPDX-License-Identifier: Apache-2.0
// What the tile kernel costs, as the planner sees it: which keys to read together, and where to cut work in
// equal parts.
//
// In ns per KV head, on one thread:
//
//   cost(item) = item + rows * row + keys * max(read, pack + lanes(rows) * key)
//
//   rows   queries of the item * (query heads per KV head)
//   lanes  rows as the kernel runs them (cpu/rows.h): full blocks of 16; the rest in a block that costs as
//          much as kLanes4 or kLanes8 rows of a full one
//
// The constants hold for head_dim 128 and grow in proportion to head_dim, except `item`, which is
// bookkeeping. `python -m bench.cost` measures them; a plan does not depend on the body that runs it, so
// where the bodies differ (two cores of an AMD EPYC, family 26), the constant lies between them, or near
// AVX2's where AVX-512 is less common. kItemCost is too small to measure well; it keeps out items of no use.
//
//   constant      ns   avx2   avx512   what it is
//   kItemCost     50    27      0      bookkeeping of an item
//   kRowCost      45    51     40      packing a query row, rescaling and storing its state
//   kKeyCost       3    4.2    2.2     a row meeting a key: q k and p v, 512 flop
//   kPackCost     28    27     29      fetching a key and its value and packing them, beside other work
//   kReadCost     52    52     53      the same with nothing else to do: items of up to 8 rows
//   kLanes8       10    9.4   13.7     a block of 5 to 8 rows, in rows of a full block
//   kLanes4        8    6.7   15.1     a block of 1 to 4 rows
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace palmette {

constexpr double kItemCost = 50, kRowCost = 45, kKeyCost = 3, kPackCost = 28, kReadCost = 52;
constexpr double kLanes8 = 10, kLanes4 = 8;

// Query rows of one task: more would not stay in the cache beside a tile of keys.
constexpr int64_t kMaxTaskRows = 256;
// Up to this many rows the kernel runs several KV heads in one unit of work.
constexpr int64_t kThinRows = 32;
// Units of work that a plan aims at (tasks * KV heads), whatever the number of threads, and what one must
// cost at least.
constexpr double kUnits = 16, kMinUnitCost = 50e3;
// An item of few rows is not cut into parts of fewer keys.
constexpr int64_t kMinThinKeys = 192;
// Items of few rows get tasks of their own when they are at least this part of the cost.
constexpr double kWorthSeparating = 0.05;
// Items are cut between tiles of the kernel: at multiples of this many keys.
constexpr int32_t kKeyStep = 48;
// Partial states may always take this much memory, however few queries there are.
constexpr int64_t kFreePartialBytes = 640 << 10;
// How far the grouping of short pieces looks back.
constexpr int32_t kMaxGroupPieces = 64, kMaxGroupKeys = 512;

class CostModel {
 public:
  CostModel(int64_t group, int64_t head_dim, int64_t max_queries)
      : scale_(static_cast<double>(head_dim) / 128.0), group_(group) {
    per_key_.resize(static_cast<size_t>(max_queries) + 1);
    for (int64_t q = 0; q <= max_queries; ++q) {
      per_key_[q] = scale_ * std::max(kReadCost, kPackCost + lanes(q * group) * kKeyCost);
    }
  }
  int64_t group() const { return group_; }
  // An item of `queries` queries costs fixed + keys * per_key.
  double fixed(int32_t queries) const {
    return kItemCost + scale_ * static_cast<double>(queries * group_) * kRowCost;
  }
  double per_key(int32_t queries) const { return per_key_[queries]; }
  double item(int32_t queries, int64_t keys) const {
    return fixed(queries) + static_cast<double>(keys) * per_key(queries);
  }

 private:
  static double lanes(int64_t rows) {
    const int64_t rest = rows % 16;
    const double full = static_cast<double>(rows - rest);
    return full + (rest == 0 ? 0 : rest <= 4 ? kLanes4 : rest <= 8 ? kLanes8 : 16);
  }

  double scale_;
  int64_t group_;
  std::vector<double> per_key_;  // by number of queries
};

}  // namespace palmette
