// SPDX-License-Identifier: Apache-2.0
// Which keys the rows of a block meet, a tile at a time: the items of a plan, walked by one group of lanes.
#pragma once

#include "attend/params.h"
#include "gpu/matrix.cuh"

namespace palmette::gpu {

// Keys of a tile: 64 of 16 bits, 32 of float, so that two tiles of K and V fit beside the queries.
template <class E>
constexpr int kTileKeys = sizeof(E) == 2 ? 64 : 32;

// A key as a query sees it: where it lies, and the positions lo <= pos < hi that see it.
struct alignas(16) Key {  // read by one instruction
  int32_t slot, lo, hi, depth;
};

constexpr Key kNoKey{0, INT32_MAX, INT32_MIN, 0};  // no position sees it

__device__ __forceinline__ Key key_at(const PlanView& plan, const PlanSegment& s, int i) {
  return {plan.slots[s.begin + i], s.lo + i * s.step, s.hi, s.depth + i};
}

// What is known of a whole tile: the queries of its item, and, if its keys are one run (`run`), the bounds of
// its intervals. Where items name their queries one by one, bit i of `named` is query first_named + i.
struct alignas(16) TileSpan {
  int32_t query_begin, query_end, count, first_named;
  uint64_t named;
  int32_t min_lo, max_lo, hi, min_depth, max_depth;
  int32_t run;
};

// A row of queries, and what it can see. Conditions are joined by & and |: all are cheap, and a branch is
// not.
struct QueryRow {
  int32_t query, pos, depth;  // query -1: there is no such row

  __device__ __forceinline__ bool meets(const TileSpan& t) const {
    const uint64_t bit = t.named >> ((query - t.first_named) & 63) & 1;
    return (query >= t.query_begin) & (query < t.query_end) & (bit != 0);
  }
  __device__ __forceinline__ bool sees(const Key& key, int window) const {
    return (pos >= key.lo) & (pos < key.hi) & ((window == 0) | (depth - key.depth < window));
  }
  __device__ __forceinline__ bool sees_some(const TileSpan& t, int window) const {
    const bool outside = (pos < t.min_lo) | (pos >= t.hi) | ((window != 0) & (depth - t.max_depth >= window));
    return meets(t) & !((t.run != 0) & outside);
  }
  // Every key or none, or there is no row that could see too much.
  __device__ __forceinline__ bool sees_all_or_none(const TileSpan& t, int window, int tile_keys) const {
    const bool inside = (pos >= t.max_lo) & (pos < t.hi) & ((window == 0) | (depth - t.min_depth < window));
    return (query < 0) | !meets(t) | ((t.run != 0) & (t.count == tile_keys) & inside);
  }
  __device__ __forceinline__ bool sees_all(const TileSpan& t, int window, int tile_keys) const {
    return ((query < 0) | meets(t)) & sees_all_or_none(t, window, tile_keys);
  }
};

__device__ __forceinline__ QueryRow query_row(const PlanView& plan, int32_t query) {
  return {query, plan.query_pos[query], plan.query_depth[query]};
}

// Row r of a task (or of any run, or list, of queries): its query r / group, and of its KV head's group the
// (r % group)-th.
struct RowOf {
  int32_t begin;
  int group;
  const int32_t* listed = nullptr;  // null: the queries from `begin` on; else listed[begin ..]
  __device__ __forceinline__ int32_t query(int row) const {
    const int32_t i = begin + row / group;
    return listed == nullptr ? i : listed[i];
  }
};

// Is the query one of the item's? For what is rare.
__device__ __forceinline__ bool names(const PlanView& plan, const PlanItem& item, int32_t query) {
  if (plan.item_query == nullptr) return query >= item.query_begin && query < item.query_end;
  bool found = false;
#pragma unroll 1
  for (int32_t i = item.query_begin; i < item.query_end; ++i) found |= plan.item_query[i] == query;
  return found;
}

// Items whose keys meet queries [query_begin, query_end), at most 64 of them where items list theirs. With a
// window, keys too far up the path for every query are skipped unread. `all_named`: the items are those of
// every row of the block.
struct KeyRange {
  int32_t item_begin, item_end, query_begin, query_end;
  int32_t window, all_named;
};

// Walks the tiles of a range: each holds keys of one item, across its segments. One group of lanes does that
// for a block; between two tiles the cursor lies in shared memory, not in the registers of all threads.
template <int kKeys>
class KeyCursor {
 public:
  static constexpr int kOfLane = kKeys / kLanes;  // keys of a lane: lane() + 32 j

  KeyCursor() = default;
  __device__ __forceinline__ KeyCursor(const PlanView& plan, const KeyRange& range)
      : range_(range), item_(range.item_begin) {
    look_at_item(plan);
  }

  // False when there is none left.
  __device__ __forceinline__ bool next(const PlanView& plan, TileSpan& span, Key (&key)[kOfLane]) {
    for (;;) {
      if (segment_ == segment_end_) {
        if (!enter_item(plan)) return false;
        continue;
      }
      if (segment_ != read_) {
        read_ = segment_;
        current_ = plan.segment[segment_];
      }
      offset_ = max(offset_, hidden(current_));
      if (offset_ < current_.length) break;
      ++segment_;
      offset_ = 0;
    }
    span = {query_begin_, query_end_, 0, range_.query_begin, named_, 0, 0, 0, 0, 0, 0};
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) key[j] = kNoKey;
    if (current_.length - offset_ >= kKeys || segment_ + 1 == segment_end_) {
      take_run(plan, span, key);
    } else {
      take_segments(plan, span, key);
    }
    return true;
  }

 private:
  // An item ahead: where each has a tile of its own, every tile would wait for it.
  __device__ __forceinline__ void look_at_item(const PlanView& plan) {
    if (item_ < range_.item_end) upcoming_ = plan.item[item_];
  }

  __device__ __forceinline__ bool enter_item(const PlanView& plan) {
    while (item_ < range_.item_end) {
      const PlanItem item = upcoming_;
      ++item_;
      look_at_item(plan);
      if (range_.all_named != 0) {
        query_begin_ = range_.query_begin;
        query_end_ = range_.query_end;
      } else if (plan.item_query == nullptr) {
        query_begin_ = max(item.query_begin, range_.query_begin);
        query_end_ = min(item.query_end, range_.query_end);
      } else {
        find_named(plan, item);
      }
      if (query_begin_ >= query_end_ || item.segment_begin >= item.segment_end) continue;
      segment_ = item.segment_begin;
      segment_end_ = item.segment_end;
      offset_ = 0;
      if (range_.window > 0) {
        int32_t depth = INT32_MAX;
        for (int32_t j = query_begin_ + lane(); j < query_end_; j += kLanes)
          depth = min(depth, plan.query_depth[j]);
        first_depth_ = group_min(depth) - range_.window + 1;
      }
      return true;
    }
    return false;
  }

  // Which queries of the range an item lists.
  __device__ __forceinline__ void find_named(const PlanView& plan, const PlanItem& item) {
    uint32_t low = 0, high = 0;
    for (int32_t i = item.query_begin + lane(); i < item.query_end; i += kLanes) {
      const int32_t j = plan.item_query[i], bit = j - range_.query_begin;
      if (j < range_.query_begin || j >= range_.query_end) continue;
      (bit < 32 ? low : high) |= 1u << (bit & 31);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      low |= shuffle_xor(low, step);
      high |= shuffle_xor(high, step);
    }
    named_ = uint64_t{high} << 32 | low;
    query_begin_ = range_.query_begin;
    query_end_ = named_ == 0 ? range_.query_begin : range_.query_end;
  }

  // Keys at the begin of a segment that no query's window reaches.
  __device__ __forceinline__ int hidden(const PlanSegment& s) const {
    return range_.window > 0 ? max(0, min(first_depth_ - s.depth, s.length)) : 0;
  }

  __device__ __forceinline__ void take_run(const PlanView& plan, TileSpan& span, Key (&key)[kOfLane]) {
    const PlanSegment& s = current_;
    const int count = min(s.length - offset_, kKeys);
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      const int i = lane() + kLanes * j;
      if (i < count) key[j] = key_at(plan, s, offset_ + i);
    }
    span.run = 1;
    span.count = count;
    span.min_lo = s.lo + offset_ * s.step;
    span.max_lo = span.min_lo + (count - 1) * s.step;
    span.hi = s.hi;
    span.min_depth = s.depth + offset_;
    span.max_depth = span.min_depth + count - 1;
    offset_ += count;
    if (offset_ == s.length) {
      ++segment_;
      offset_ = 0;
    }
  }

  // Short segments: every lane looks at one, a running sum of their lengths says which of them holds a key.
  __device__ __forceinline__ void take_segments(const PlanView& plan, TileSpan& span, Key (&key)[kOfLane]) {
    const int32_t mine = segment_ + lane();
    int first = 0, length = 0;
    if (mine < segment_end_) {
      const PlanSegment s = plan.segment[mine];
      first = lane() == 0 ? offset_ : hidden(s);
      length = s.length - first;
    }
    int end = length;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const int before = shuffle_up(end, step);
      if (lane() >= step) end += before;
    }
    const int count = min(shuffle(end, kLanes - 1), kKeys);
#pragma unroll
    for (int j = 0; j < kOfLane; ++j) {
      const int i = lane() + kLanes * j;
      int holder = 0;  // the first lane whose segment ends behind key i
#pragma unroll
      for (int step = kLanes / 2; step > 0; step /= 2) {
        if (shuffle(end, holder + step - 1) <= i) holder += step;
      }
      const int at = shuffle(first, holder) + i - shuffle(end - length, holder);
      if (i < count) key[j] = key_at(plan, plan.segment[segment_ + holder], at);
    }
    span.run = 0;
    span.count = count;

    const int done = __popc(ballot(mine < segment_end_ && end <= count));
    if (done == min(kLanes, segment_end_ - segment_)) {
      offset_ = 0;
    } else {  // the tile is full
      offset_ = shuffle(first, done) + count - (done > 0 ? shuffle(end, done - 1) : 0);
    }
    segment_ += done;
  }

  KeyRange range_{};
  int32_t item_ = 0, segment_ = 0, segment_end_ = 0, query_begin_ = 0, query_end_ = 0, first_depth_ = 0;
  int32_t offset_ = 0;
  int32_t read_ = -1;  // the segment that current_ is
  uint64_t named_ = ~uint64_t{0};
  PlanItem upcoming_{};
  PlanSegment current_{};
};

}  // namespace palmette::gpu
