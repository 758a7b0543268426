// SPDX-License-Identifier: Apache-2.0
// How a GPU cuts up dK and dV, and what scratch that takes. All of it follows from the sizes of tensors: what
// a plan on a GPU holds the host does not know, and neither the device nor its load may change a result.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attend/params.h"

namespace palmette {

// Keys of a tile: 64 of 16 bits, 32 of float.
constexpr int tile_keys(DType dtype) { return dtype == DType::f32 ? 32 : 64; }

constexpr int kIndexBlocks = 64;  // that add up the counts of an index

struct IndexSizes {
  int32_t keys, leaves, chunks, capacity;  // capacity 0: no index

  int64_t ends() const { return int64_t{2} * leaves * chunks; }
  int64_t words() const { return int64_t{4} * capacity + ends() + kIndexBlocks; }
  KeyIndex lay_out(int32_t* memory) const {
    static_assert(sizeof(KeyEntry) == 4 * sizeof(int32_t));
    int32_t* end = memory + int64_t{4} * capacity;
    return {reinterpret_cast<KeyEntry*>(memory), end, end + ends(), keys, leaves, chunks, capacity};
  }
};

class KeyTiles {
 public:
  explicit KeyTiles(const AttendParams& p)
      : keys_(tile_keys(p.dtype)),
        tiles_((int64_t{p.plan.num_places} + keys_ - 1) / keys_),
        kv_heads_(p.num_kv_heads),
        rows_(int64_t{p.plan.num_queries} * (p.num_q_heads / p.num_kv_heads)),
        column_parts_((std::max(p.head_dim, p.v_head_dim) + columns(p.dtype) - 1) / columns(p.dtype)) {}

  // Into how many parts a block's rows are divided, so that few tiles fill a GPU: about four blocks for each
  // of 132 multiprocessors where there are not two of them, and no part of less than 256 rows. A block leaves
  // 64 KB of partial sums, so that all of them are some 50 MB at most.
  int32_t parts() const {
    const int64_t blocks = tiles_ * kv_heads_ * column_parts_;
    if (blocks == 0 || blocks >= 2 * kMultiprocessors) return 1;
    const int64_t wanted = (4 * kMultiprocessors + blocks - 1) / blocks;
    return static_cast<int32_t>(std::max<int64_t>(1, std::min({wanted, rows_ / kLeastRows, kMostParts})));
  }

  // For tables of such capacities. Where looking through them is little work, none is made: it takes four
  // launches.
  IndexSizes index(int64_t segments, int64_t items, int64_t tasks) const {
    const int64_t capacity = 2 * (segments + items);  // two for each segment of an item, each is of one item,
                                                      // or each item has one
    if (tiles_ * kv_heads_ * items < kLeastScan || capacity > kMostEntries) return {};
    int64_t leaves = 1;
    while (leaves < tiles_) leaves *= 2;
    // A chunk's counts lie by node: all of them should not outgrow the tables.
    const int64_t room = std::max<int64_t>(int64_t{1} << 20, segments + items) / (2 * leaves);
    const int64_t chunks = std::max<int64_t>(1, std::min({room, tasks / 8, int64_t{1024}}));
    return {keys_, static_cast<int32_t>(leaves), static_cast<int32_t>(chunks),
            static_cast<int32_t>(capacity)};
  }

 private:
  static constexpr int64_t kMultiprocessors = 132, kLeastRows = 256, kMostParts = 128;
  static constexpr int64_t kLeastScan = int64_t{1} << 19, kMostEntries = int64_t{1} << 27;
  static constexpr int columns(DType dtype) { return dtype == DType::f32 ? 64 : 128; }

  int32_t keys_;
  int64_t tiles_, kv_heads_, rows_, column_parts_;
};

}  // namespace palmette
