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
//          much as lanes4 or lanes8 rows of a full one
//
// The constants hold for head_dim 128 and grow in proportion to head_dim, except `item`, which is
// bookkeeping. A plan does not depend on the body that runs it, nor on the number of threads or on the model
// of a GPU.
//
// Of the CPU, `python -m bench.cost` measures them; where the bodies differ (two cores of an AMD EPYC, family
// 26), the constant lies between them, or near AVX2's where AVX-512 is less common. item is too small to
// measure well; it keeps out items of no use.
//
//   constant   ns   avx2   avx512   what it is
//   item       50    27      0      bookkeeping of an item
//   row        45    51     40      packing a query row, rescaling and storing its state
//   key         3    4.2    2.2     a row meeting a key: q k and p v, 512 flop
//   pack       28    27     29      fetching a key and its value and packing them, beside other work
//   read       52    52     53      the same with nothing else to do: items of up to 8 rows
//   lanes8     10    9.4   13.7     a block of 5 to 8 rows, in rows of a full block
//   lanes4      8    6.7   15.1     a block of 1 to 4 rows
//
// Of the GPU nothing has been measured; these are data sheets divided by the number of multiprocessors (A100,
// H100): a multiprocessor reads about 20 bytes per ns, so 512 bytes of K and V (bf16) take 25 ns; at half of
// the tensor cores' rate 16 rows meet a key in 2 to 4 ns, less than reading it. An item costs what its last
// tile of 64 keys wastes and the fetch of its first keys.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace palmette {

struct Target {
  const char* name;
  double item, row, key, pack, read, lanes8, lanes4;
  int64_t
      max_task_rows;    // query rows of one task: more would not stay in the cache (CPU) or fit a block (GPU)
  int64_t thin_rows;    // items of so few rows run better in tasks of their own
  bool heads_together;  // thin tasks run for several KV heads at a time
  double units;  // units of work that a plan aims at (tasks * KV heads), whatever the number of workers
  double min_unit_cost;   // what one must cost at least
  int64_t min_thin_keys;  // a thin item is not cut into parts of fewer keys
  int32_t key_step;       // items are cut between tiles of the kernel: at multiples of this many keys
};

constexpr Target kCpuTarget{.name = "cpu",
                            .item = 50,
                            .row = 45,
                            .key = 3,
                            .pack = 28,
                            .read = 52,
                            .lanes8 = 10,
                            .lanes4 = 8,
                            .max_task_rows = 256,
                            .thin_rows = 32,
                            .heads_together = true,
                            .units = 16,
                            .min_unit_cost = 50e3,
                            .min_thin_keys = 192,
                            .key_step = 48};
constexpr Target kGpuTarget{.name = "gpu",
                            .item = 1000,
                            .row = 10,
                            .key = 0.2,
                            .pack = 0,
                            .read = 25,
                            .lanes8 = 16,
                            .lanes4 = 16,
                            .max_task_rows = 64,
                            .thin_rows = 16,
                            .heads_together = false,
                            .units = 132,
                            .min_unit_cost = 5e3,
                            .min_thin_keys = 128,
                            .key_step = 64};

// Items of few rows get tasks of their own when they are at least this part of the cost.
constexpr double kWorthSeparating = 0.05;
// Partial states may always take this much memory, however few queries there are.
constexpr int64_t kFreePartialBytes = 640 << 10;
// How far the grouping of short pieces looks back.
constexpr int32_t kMaxGroupPieces = 64, kMaxGroupKeys = 512;

class CostModel {
 public:
  CostModel(const Target& target, int64_t group, int64_t head_dim, int64_t max_queries)
      : target_(target), scale_(static_cast<double>(head_dim) / 128.0), group_(group) {
    per_key_.resize(static_cast<size_t>(max_queries) + 1);
    for (int64_t q = 0; q <= max_queries; ++q) {
      per_key_[q] = scale_ * std::max(target.read, target.pack + lanes(q * group) * target.key);
    }
  }
  const Target& target() const { return target_; }
  int64_t group() const { return group_; }
  // An item of `queries` queries costs fixed + keys * per_key.
  double fixed(int32_t queries) const {
    return target_.item + scale_ * static_cast<double>(queries * group_) * target_.row;
  }
  double per_key(int32_t queries) const { return per_key_[queries]; }
  double item(int32_t queries, int64_t keys) const {
    return fixed(queries) + static_cast<double>(keys) * per_key(queries);
  }

 private:
  double lanes(int64_t rows) const {
    const int64_t rest = rows % 16;
    const double full = static_cast<double>(rows - rest);
    return full + (rest == 0 ? 0 : rest <= 4 ? target_.lanes4 : rest <= 8 ? target_.lanes8 : 16);
  }

  const Target& target_;
  double scale_;
  int64_t group_;
  std::vector<double> per_key_;  // by number of queries
};

}  // namespace palmette
