// SPDX-License-Identifier: Apache-2.0
// Which keys the rows of a block meet, a tile at a time: the items of a plan, walked by all threads in step.
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
struct TileSpan {
  int32_t query_begin, query_end, count, first_named;
  uint64_t named;
  int32_t min_lo, max_lo, hi, min_depth, max_depth;
  bool run;
};

// A row of queries, and what it can see.
struct QueryRow {
  int32_t query, pos, depth;  // query -1: there is no such row

  __device__ __forceinline__ bool meets(const TileSpan& t) const {
    return query >= t.query_begin && query < t.query_end && (t.named >> (query - t.first_named) & 1) != 0;
  }
  __device__ __forceinline__ bool sees(const Key& key, int window) const {
    return pos >= key.lo && pos < key.hi && (window == 0 || depth - key.depth < window);
  }
  __device__ __forceinline__ bool sees_some(const TileSpan& t, int window) const {
    if (!meets(t)) return false;
    return !t.run || (pos >= t.min_lo && pos < t.hi && (window == 0 || depth - t.max_depth < window));
  }
  // Every key or none, or there is no row that could see too much.
  __device__ __forceinline__ bool sees_all_or_none(const TileSpan& t, int window, int tile_keys) const {
    if (query < 0 || !meets(t)) return true;
    return t.run && t.count == tile_keys && pos >= t.max_lo && pos < t.hi &&
           (window == 0 || depth - t.min_depth < window);
  }
  __device__ __forceinline__ bool sees_all(const TileSpan& t, int window, int tile_keys) const {
    return query < 0 || (meets(t) && sees_all_or_none(t, window, tile_keys));
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

// The tiles of the items [item_begin, item_end) that meet queries [query_begin, query_end). A tile holds keys
// of one item, across its segments. With a window, keys too far up the path for every query are skipped
// unread.
template <int kKeys>
class KeyCursor {
 public:
  __device__ __forceinline__ KeyCursor(const PlanView& plan, int32_t item_begin, int32_t item_end,
                                       int32_t query_begin, int32_t query_end, int window)
      : plan_(plan),
        item_(item_begin),
        item_end_(item_end),
        tile_begin_(query_begin),
        tile_end_(query_end),
        window_(window) {
    look_at_item();
  }

  // False when there is none left. Thread i receives key i.
  __device__ __forceinline__ bool next(TileSpan& span, Key& key) {
    for (;;) {
      if (segment_ == segment_end_) {
        if (!enter_item()) return false;
        continue;
      }
      if (segment_ != read_) {
        read_ = segment_;
        current_ = plan_.segment[segment_];
      }
      offset_ = max(offset_, hidden(current_));
      if (offset_ < current_.length) break;
      ++segment_;
      offset_ = 0;
    }
    const PlanSegment s = current_;
    span.query_begin = query_begin_;
    span.query_end = query_end_;
    span.first_named = tile_begin_;
    span.named = named_;
    key = kNoKey;
    if (s.length - offset_ >= kKeys || segment_ + 1 == segment_end_) {
      take_run(s, span, key);
    } else {
      take_segments(span, key);
    }
    return true;
  }

 private:
  // An item ahead: where each has a tile of its own, every tile would wait for it.
  __device__ __forceinline__ void look_at_item() {
    if (item_ < item_end_) upcoming_ = plan_.item[item_];
  }

  __device__ __forceinline__ bool enter_item() {
    while (item_ < item_end_) {
      const PlanItem item = upcoming_;
      ++item_;
      look_at_item();
      if (plan_.item_query == nullptr) {
        query_begin_ = max(item.query_begin, tile_begin_);
        query_end_ = min(item.query_end, tile_end_);
      } else {
        find_named(item);
      }
      if (query_begin_ >= query_end_ || item.segment_begin >= item.segment_end) continue;
      segment_ = item.segment_begin;
      segment_end_ = item.segment_end;
      offset_ = 0;
      if (window_ > 0) {
        int32_t depth = INT32_MAX;
        for (int32_t j = query_begin_ + lane(); j < query_end_; j += kLanes)
          depth = min(depth, plan_.query_depth[j]);
        first_depth_ = group_min(depth) - window_ + 1;
      }
      return true;
    }
    return false;
  }

  // Which queries of the tile, at most 64, an item lists.
  __device__ __forceinline__ void find_named(const PlanItem& item) {
    uint32_t low = 0, high = 0;
    for (int32_t i = item.query_begin + lane(); i < item.query_end; i += kLanes) {
      const int32_t j = plan_.item_query[i], bit = j - tile_begin_;
      if (j < tile_begin_ || j >= tile_end_) continue;
      (bit < 32 ? low : high) |= 1u << (bit & 31);
    }
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      low |= shuffle_xor(low, step);
      high |= shuffle_xor(high, step);
    }
    named_ = uint64_t{high} << 32 | low;
    query_begin_ = tile_begin_;
    query_end_ = named_ == 0 ? tile_begin_ : tile_end_;
  }

  // Keys at the begin of a segment that no query's window reaches.
  __device__ __forceinline__ int hidden(const PlanSegment& s) const {
    return window_ > 0 ? max(0, min(first_depth_ - s.depth, s.length)) : 0;
  }

  __device__ __forceinline__ void take_run(const PlanSegment& s, TileSpan& span, Key& key) {
    const int count = min(s.length - offset_, kKeys), i = static_cast<int>(threadIdx.x);
    if (i < count) key = key_at(plan_, s, offset_ + i);
    span.run = true;
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

  // Short segments: every lane looks at one, a running sum of their lengths says which of them holds a
  // thread's key.
  __device__ __forceinline__ void take_segments(TileSpan& span, Key& key) {
    const int32_t mine = segment_ + lane();
    int first = 0, length = 0;
    if (mine < segment_end_) {
      const PlanSegment s = plan_.segment[mine];
      first = lane() == 0 ? offset_ : hidden(s);
      length = s.length - first;
    }
    int end = length;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const int before = shuffle_up(end, step);
      if (lane() >= step) end += before;
    }
    const int count = min(shuffle(end, kLanes - 1), kKeys), i = static_cast<int>(threadIdx.x);
    int holder = 0;  // the first lane whose segment ends behind key i
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      if (shuffle(end, holder + step - 1) <= i) holder += step;
    }
    const int at = shuffle(first, holder) + i - shuffle(end - length, holder);
    if (i < count) key = key_at(plan_, plan_.segment[segment_ + holder], at);
    span.run = false;
    span.count = count;

    const int done = __popc(ballot(mine < segment_end_ && end <= count));
    if (done == min(kLanes, segment_end_ - segment_)) {
      offset_ = 0;
    } else {  // the tile is full
      offset_ = shuffle(first, done) + count - (done > 0 ? shuffle(end, done - 1) : 0);
    }
    segment_ += done;
  }

  const PlanView& plan_;
  int32_t item_, item_end_, tile_begin_, tile_end_;
  int window_;
  int32_t segment_ = 0, segment_end_ = 0, query_begin_ = 0, query_end_ = 0, first_depth_ = 0;
  int offset_ = 0;
  uint64_t named_ = ~uint64_t{0};
  PlanItem upcoming_{0, 0, 0, 0};
  int32_t read_ = -1;  // the segment that current_ is
  PlanSegment current_{0, 0, 0, 0, 0, 0};
};

}  // namespace palmette::gpu
