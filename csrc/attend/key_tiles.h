// SPDX-License-Identifier: Apache-2.0
// What scratch a GPU needs for dK and dV. All of it follows from the sizes of tensors: what a plan on a GPU
// holds the host does not know.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attend/params.h"

namespace palmette {

// Keys of a tile: 64 of 16 bits, 32 of float.
constexpr int tile_keys(DType dtype) { return dtype == DType::f32 ? 32 : 64; }

constexpr int kIndexBlocks = 64;  // that add up the counts of an index

struct IndexSizes {
  int32_t keys, tiles, leaves, chunks, capacity;  // capacity 0: no index
  int32_t extra, least;

  int64_t slots() const { return int64_t{2} * extra; }  // a tile of n pieces has n - 1 of the extra ones
  int64_t pieces() const { return int64_t{tiles} + extra; }
  int64_t ends() const { return int64_t{2} * leaves * chunks; }
  int64_t words() const {
    return 4 * (capacity + pieces()) + ends() + int64_t{2} * leaves + kIndexBlocks + tiles;
  }
  KeyIndex lay_out(int32_t* memory) const {
    static_assert(sizeof(KeyEntry) == 4 * sizeof(int32_t) && sizeof(KeyPiece) == 4 * sizeof(int32_t));
    KeyIndex x{};
    const auto take = [&memory](int64_t words) {
      int32_t* taken = memory;
      memory += words;
      return taken;
    };
    x.entry = reinterpret_cast<KeyEntry*>(take(int64_t{4} * capacity));
    x.piece = reinterpret_cast<KeyPiece*>(take(4 * pieces()));
    x.end = take(ends());
    x.queries = take(int64_t{2} * leaves);
    x.sums = take(kIndexBlocks);
    x.work = take(tiles);
    x.keys = keys, x.tiles = tiles, x.leaves = leaves, x.chunks = chunks, x.capacity = capacity;
    x.extra = extra, x.least = least;
    return x;
  }
};

// For a plan whose tables have such capacities. Where looking through them is little work and there is none
// to share out, no index is made: it takes five launches.
inline IndexSizes index_sizes(const AttendParams& p, int64_t segments, int64_t items, int64_t tasks) {
  constexpr int64_t kLeastScan = int64_t{1} << 19, kMostEntries = int64_t{1} << 27;
  constexpr int64_t kMultiprocessors = 132, kLeastRows = 256, kManyRows = 4096;
  const int keys = tile_keys(p.dtype), columns = p.dtype == DType::f32 ? 64 : 128;
  const int64_t tiles = (int64_t{p.plan.num_places} + keys - 1) / keys,
                group = p.num_q_heads / p.num_kv_heads, rows = p.plan.num_queries * group;
  // of a tile: one per KV head and part of the columns
  const int64_t blocks = p.num_kv_heads * ((std::max(p.head_dim, p.v_head_dim) + columns - 1) / columns);
  const int64_t capacity = 2 * (segments + items);  // two for each segment of an item; either each segment is
                                                    // of one item, or each item has one
  const bool few = tiles * blocks < 2 * kMultiprocessors && rows >= kManyRows;
  if (tiles == 0 || (tiles * p.num_kv_heads * items < kLeastScan && !few) || capacity > kMostEntries)
    return {};
  int64_t leaves = 1;
  while (leaves < tiles) leaves *= 2;
  // A chunk's counts lie by node: all of them should not outgrow the tables.
  const int64_t room = std::max<int64_t>(int64_t{1} << 20, segments + items) / (2 * leaves);
  const int64_t chunks = std::max<int64_t>(1, std::min({room, tasks / 8, int64_t{1024}}));
  // So that few tiles fill a GPU, and none that many queries meet keeps it waiting: about four blocks more
  // for each multiprocessor, none for less than 256 rows. Each leaves 64 KB of sums; all of them 70 MB at
  // most.
  const int64_t extra = std::min((4 * kMultiprocessors + blocks - 1) / blocks, tiles * rows / kLeastRows);
  const auto narrow = [](int64_t x) { return static_cast<int32_t>(x); };
  return {keys,
          narrow(tiles),
          narrow(leaves),
          narrow(chunks),
          narrow(capacity),
          narrow(extra),
          narrow(std::max<int64_t>(1, kLeastRows / group))};
}

}  // namespace palmette
