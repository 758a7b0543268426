// SPDX-License-Identifier: Apache-2.0
// Walks the keys of an item, a tile at a time, and brings K and V tiles into a form the micro-kernel can
// stream.
#pragma once

#include "attend/params.h"
#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {

constexpr int kMaxTileKeys = 64;

// The i-th query of an item.
PALMETTE_INLINE int32_t query_of(const PlanView& plan, const PlanItem& item, int32_t i) {
  return plan.item_query == nullptr ? item.query_begin + i : plan.item_query[item.query_begin + i];
}

struct KeyTile {
  int count = 0;
  bool contiguous = false;  // slot[i] == slot[0] + i
  int32_t slot[kMaxTileKeys], lo[kMaxTileKeys], hi[kMaxTileKeys], depth[kMaxTileKeys];
  int32_t min_lo, max_lo, min_hi, max_hi, min_depth, max_depth;
};

// Cuts the keys of an item into tiles of at most `limit` keys, across segment boundaries. With a window, keys
// that are too far up the path for every query (min_query_depth is the shallowest one) are skipped unread.
class KeyCursor {
 public:
  KeyCursor(const PlanView& plan, const PlanItem& item, int window, int32_t min_query_depth)
      : plan_(plan), segment_(item.segment_begin), end_(item.segment_end) {
    first_depth_ = window > 0 ? min_query_depth - window + 1 : INT32_MIN;
    enter();
  }

  bool next(KeyTile& t, int limit) {
    int n = 0;
    bool contiguous = true;
    int32_t min_lo = INT32_MAX, max_lo = INT32_MIN, min_hi = INT32_MAX, max_hi = INT32_MIN;
    int32_t min_depth = INT32_MAX, max_depth = INT32_MIN;
    while (n < limit && segment_ < end_) {
      const PlanSegment& s = plan_.segment[segment_];
      const int take = s.length - offset_ < limit - n ? s.length - offset_ : limit - n;
      const int32_t* slots = plan_.slots + s.begin + offset_;
      const int32_t lo = s.lo + offset_ * s.step, depth = s.depth + offset_;
      int32_t breaks = n > 0 && t.slot[n - 1] + 1 != slots[0];
      for (int i = 1; i < take; ++i) breaks |= slots[i] ^ (slots[0] + i);
      for (int i = 0; i < take; ++i) {
        t.slot[n + i] = slots[i];
        t.lo[n + i] = lo + i * s.step;
        t.hi[n + i] = s.hi;
        t.depth[n + i] = depth + i;
      }
      contiguous &= breaks == 0;
      const int32_t last = lo + (take - 1) * s.step;
      min_lo = lo < min_lo ? lo : min_lo;
      max_lo = last > max_lo ? last : max_lo;
      min_hi = s.hi < min_hi ? s.hi : min_hi;
      max_hi = s.hi > max_hi ? s.hi : max_hi;
      min_depth = depth < min_depth ? depth : min_depth;
      max_depth = depth + take - 1 > max_depth ? depth + take - 1 : max_depth;
      n += take;
      offset_ += take;
      if (offset_ == s.length) {
        ++segment_;
        enter();
      }
    }
    t.count = n;
    t.contiguous = contiguous;
    t.min_lo = min_lo, t.max_lo = max_lo, t.min_hi = min_hi, t.max_hi = max_hi;
    t.min_depth = min_depth, t.max_depth = max_depth;
    return n > 0;
  }

 private:
  void enter() {  // the first segment from here on that has a key within the window
    for (; segment_ < end_; ++segment_) {
      const PlanSegment& s = plan_.segment[segment_];
      offset_ = first_depth_ > s.depth ? first_depth_ - s.depth : 0;
      if (offset_ < s.length) return;
    }
  }

  const PlanView& plan_;
  int32_t segment_, end_, offset_ = 0, first_depth_;
};

// f(E) of the stored type, where T is computed with.
template <class T, class F>
PALMETTE_INLINE void with_element(DType dtype, F&& f) {
  if constexpr (sizeof(T) == 4) {
    if (dtype == DType::bf16) return f(bf16{});
    if (dtype == DType::f16) return f(fp16{});
  }
  f(T{});
}

// Lays n elements out at `at`, the next free place of a worker's scratch (or, from null, only measures).
template <class T>
PALMETTE_INLINE void take(char*& at, T*& pointer, int64_t n) {
  pointer = reinterpret_cast<T*>(at);
  at += (n * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
}

// A tile of K or V as the micro-kernel reads it.
template <class T>
struct TileView {
  const T* data;
  int64_t stride;  // elements between keys
};

// Rows of a packed tile are this far apart: whole vectors, and an odd number of half cache lines, because
// rows a multiple of 512 bytes apart share cache sets (docs/performance.md).
template <class S>
constexpr int64_t packed_stride(int64_t d) {
  return (d + 2 * S::kLanes - 1) / (2 * S::kLanes) * (2 * S::kLanes) + 8;
}

// Copies one key's row, widened to the arithmetic type and filled up with zeros.
template <class S, class E>
PALMETTE_INLINE void pack_row(typename S::Scalar* row, const E* src, int d, int64_t stride) {
  constexpr int N = S::kLanes;
  int x = 0;
  for (; x + N <= d; x += N) S::store(row + x, S::load(src + x));
  if (x < d) {
    S::store(row + x, S::load_n(src + x, d - x));
    x += N;
  }
  if (x < stride - 8) S::store(row + x, S::zero());
}

// Rows [begin, end) of a tile into their places in `buffer`; rows[i] points at the row of key i.
template <class S>
__attribute__((noinline)) void pack_rows_of_tile(typename S::Scalar* buffer, const char* const* rows,
                                                 int begin, int end, DType dtype, int d) {
  const int64_t stride = packed_stride<S>(d);
  with_element<typename S::Scalar>(dtype, [&]<class E>(E) {
    for (int i = begin; i < end; ++i) {
      pack_row<S>(buffer + i * stride, reinterpret_cast<const E*>(rows[i]), d, stride);
    }
  });
}

inline int64_t element_size(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

// Where the rows of a tile begin, in the pool.
inline void point_at_rows(const Strided& x, DType dtype, int head, const KeyTile& t, const char** rows) {
  const int64_t size = element_size(dtype);
  const char* base = static_cast<const char*>(x.data) + head * x.head * size;
  for (int i = 0; i < t.count; ++i) rows[i] = base + t.slot[i] * x.token * size;
}

// Can the micro-kernel stream K or V as it lies in the pool? Rows a kilobyte and more apart share too few
// cache sets.
template <class S>
bool streams_in_place(const Strided& x, DType dtype, int d) {
  const bool native = dtype == (sizeof(typename S::Scalar) == 8 ? DType::f64 : DType::f32);
  return native && d % S::kLanes == 0 && x.token * element_size(dtype) < 1024;
}

}  // namespace palmette::PALMETTE_ISA_NS
