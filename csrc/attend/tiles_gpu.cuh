// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward kernels share: how a block's shared memory is cut up, and how rows of q,
// k, v come into it.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "attend/keys_gpu.cuh"
#include "gpu/product.cuh"

namespace palmette::gpu {

// A tensor [tokens, heads, width] as copy_rows() reads it.
template <class E>
struct Source {
  const E* data;
  int32_t token;  // 32 bits: a row's place is then one multiplication
  int64_t head;
  int width;
  bool by_chunks;

  __device__ __forceinline__ const E* row(int32_t index, int h) const {
    return data + h * head + int64_t{index} * token;
  }
};

template <class E>
Source<E> source_of(const Strided& x, int width) {
  if (x.token > INT32_MAX)
    throw std::runtime_error("tokens of q, k and v must lie less than 2^31 elements apart on a GPU, got " +
                             std::to_string(x.token));
  return {static_cast<const E*>(x.data), static_cast<int32_t>(x.token), x.head, width,
          copies_by_chunks(x.data, sizeof(E), x.token, x.head)};
}

// Rows [first, first + rows) of a run of queries, of which `valid` exist.
template <class E, int kChunks>
__device__ __forceinline__ void copy_query_rows(const Matrix<E, kChunks>& to, int rows, const Source<E>& from,
                                                const PlanView& plan, RowOf at, int first, int valid,
                                                int kv_head) {
  const auto source = [&](int row) -> const E* {
    if (row >= valid) return nullptr;
    const int r = first + row;
    return from.row(plan.query_index[at.query(r)], kv_head * at.group + r % at.group);
  };
  copy_rows(to, rows, from.width, from.by_chunks, from.data, source, valid >= rows);
}

template <class E, int kChunks>
__device__ __forceinline__ void copy_key_rows(const Matrix<E, kChunks>& to, int rows, const Source<E>& from,
                                              const Key* keys, int count, int kv_head) {
  const auto source = [&](int row) -> const E* {
    return row < count ? from.row(keys[row].slot, kv_head) : nullptr;
  };
  copy_rows(to, rows, from.width, from.by_chunks, from.data, source, count >= rows);
}

// Is the plan still one for these q and k? A captured graph, or compiled code, is launched again with what
// the tables hold by then. Kernels follow any change of them, but not one that q or k has no rows for.
__device__ __forceinline__ bool plan_fits(const AttendParams& p) {
  return p.plan.counts[kNumQueries] == p.plan.num_queries && p.plan.counts[kNumSlots] <= p.num_slots;
}

// Where it is not, results are NaN: all blocks of a launch together fill a tensor [tokens, heads, width].
template <class E>
__device__ __forceinline__ void fill_nan(const Strided& to, int64_t tokens, int heads, int width) {
  for (int64_t row = int64_t{blockIdx.x} * kWarps + warp(); row < tokens * heads;
       row += int64_t{gridDim.x} * kWarps) {
    E* data = static_cast<E*>(to.data) + row / heads * to.token + row % heads * to.head;
    for (int x = lane(); x < width; x += kLanes) data[x] = narrow<E>(NAN);
  }
}

// Of a plan by blocks: where in the memory of partial results row `row` of a task lies, and that of a query's
// i-th choice; -1: there is none.
__device__ __forceinline__ int64_t first_entry(const AttendParams& p) {
  return int64_t{p.head_begin} * p.plan.num_queries * p.plan.choices;
}
__device__ __forceinline__ int64_t place_of_row(const AttendParams& p, const PlanTask& task, int row) {
  return (task.partial_begin - first_entry(p)) * (p.num_q_heads / p.num_kv_heads) + row;
}
__device__ __forceinline__ int64_t place_of_choice(const AttendParams& p, int64_t query, int head, int i) {
  if (i >= p.plan.choices) return -1;
  const int group = p.num_q_heads / p.num_kv_heads;
  const int64_t entry =
      p.plan.merge_row[(head / group * int64_t{p.plan.num_queries} + query) * p.plan.choices + i];
  return entry < 0 ? -1 : (entry - first_entry(p)) * group + head % group;
}

// f() for all KV heads, head_count of them at a time.
template <class F>
void in_turns(AttendParams& p, F f) {
  const int32_t at_once = p.head_count;
  for (p.head_begin = 0; p.head_begin < p.num_kv_heads; p.head_begin += at_once) {
    p.head_count = std::min(at_once, p.num_kv_heads - p.head_begin);
    f();
  }
}

// Stages of shared memory that K and V pass through, and the keys of the tiles in and before them.
constexpr int kMaxStages = 2;

template <class E>
struct KeyRing {
  Key key[kMaxStages + 1][kTileKeys<E>];
  TileSpan span[kMaxStages + 1];  // of no keys: there is no such tile
  KeyCursor<kTileKeys<E>> cursor;
};

struct Stages {
  int count;
  int v_offset, stage_offset;  // in bytes: from K to V, from stage to stage
  Swizzle k, v;

  template <class E>
  static Stages of(const AttendParams& p) {
    Stages s{kMaxStages, 0, 0, swizzle_of<E>(p.head_dim), swizzle_of<E>(p.v_head_dim)};
    s.v_offset = kTileKeys<E> * s.k.chunks * kChunkBytes;
    s.stage_offset = s.v_offset + kTileKeys<E> * s.v.chunks * kChunkBytes;
    return s;
  }
};

// Brings the tiles of a range into shared memory, one after the other, and calls meet(span, keys, K, V) for
// each, by all threads. With two stages, K and V of a tile are copied while the one before is met; the first
// warp looks up the keys of a tile one tile before that. Copies that were committed before have arrived when
// the first tile has. kChunks: of rows of K and V, where it is known when compiling. `keep`: there is one
// stage, and the call before has left the only tile of the range in it.
template <int kChunks = 0, class E, class Meet>
__device__ __forceinline__ void for_each_tile(KeyRing<E>& ring, unsigned char* memory, const Stages& stages,
                                              const PlanView& plan, const KeyRange& range, const Source<E>& k,
                                              const Source<E>& v, int kv_head, Meet meet, bool keep = false) {
  constexpr int kKeys = kTileKeys<E>;
  using Cursor = KeyCursor<kKeys>;
  // Tile n uses ring slot n % (stages + 1) and stage n % stages.
  const bool ahead = stages.count == 2;
  const int slots = stages.count + 1;
  const int v_offset = kChunks > 0 ? kKeys * kChunks * kChunkBytes : stages.v_offset;
  const int stage_offset = kChunks > 0 ? 2 * v_offset : stages.stage_offset;
  const auto k_of = [&](int stage) {
    return Matrix<E, kChunks>{reinterpret_cast<E*>(memory + stage * stage_offset), stages.k};
  };
  const auto v_of = [&](int stage) {
    return Matrix<E, kChunks>{reinterpret_cast<E*>(memory + stage * stage_offset + v_offset), stages.v};
  };
  // The next tile's keys, all but where they lie: that comes from global memory, and is put in place later.
  const auto look_ahead = [&](int slot, int32_t (&place)[Cursor::kOfLane]) {
    group_sync();
    Cursor cursor = ring.cursor;
    group_sync();
    TileSpan span;
    Key key[Cursor::kOfLane];
    if (!cursor.next(plan, span, key)) span.count = 0;
#pragma unroll
    for (int j = 0; j < Cursor::kOfLane; ++j) {
      place[j] = key[j].slot;
      key[j].slot = 0;
      ring.key[slot][lane() + kLanes * j] = key[j];
    }
    if (lane() == 0) {
      ring.span[slot] = span;
      ring.cursor = cursor;
    }
  };
  const auto put_place = [&](int slot, const int32_t (&place)[Cursor::kOfLane]) {
#pragma unroll
    for (int j = 0; j < Cursor::kOfLane; ++j) ring.key[slot][lane() + kLanes * j].slot = place[j];
  };
  const auto fetch = [&](int slot, int stage) {
    copy_key_rows(k_of(stage), kKeys, k, ring.key[slot], ring.span[slot].count, kv_head);
    copy_key_rows(v_of(stage), kKeys, v, ring.key[slot], ring.span[slot].count, kv_head);
    ptx::commit_copies();
  };
  const auto next = [](int i, int count) { return i + 1 == count ? 0 : i + 1; };

  int32_t place[Cursor::kOfLane];
  if (warp() == 0 && !keep) {
    const Cursor cursor(plan, range);
    if (lane() == 0) ring.cursor = cursor;
    for (int i = 0; i < stages.count; ++i) {
      look_ahead(i, place);
      put_place(i, place);
    }
  }
  __syncthreads();
  if (ahead && ring.span[0].count > 0) fetch(0, 0);
#pragma unroll 1
  for (int slot = 0, stage = 0; ring.span[slot].count > 0;
       slot = next(slot, slots), stage = next(stage, stages.count)) {
    if (!ahead && !keep) fetch(slot, stage);
    ptx::wait_for_copies<0>();
    __syncthreads();  // everyone has left the tile before; this one is there, and the next one's keys
    const int following = next(slot, slots), free = next(following, slots);  // of the tile before
    if (ahead && ring.span[following].count > 0) fetch(following, stage ^ 1);
    if (warp() == 0) look_ahead(ahead ? free : following, place);
    meet(load(&ring.span[slot]), ring.key[slot], k_of(stage), v_of(stage));
    if (warp() == 0) put_place(ahead ? free : following, place);
    if (!ahead) __syncthreads();
  }
  ptx::wait_for_copies<0>();
  __syncthreads();
}

// Logits in units of log2.
struct Logits {
  float scale, cap;  // without cap: logit * scale; with it: cap * tanh(logit * scale)
  float slope;       // of the logit in natural units at 0
  int window;

  static Logits of(const AttendParams& p) {
    const double log2e = 1.4426950408889634;
    const auto slope = static_cast<float>(p.scale);
    if (p.softcap > 0)
      return {static_cast<float>(p.scale / p.softcap), static_cast<float>(p.softcap * log2e), slope,
              p.window};
    return {static_cast<float>(p.scale * log2e), 0, slope, p.window};
  }
  __device__ __forceinline__ float operator()(float product) const {
    return cap > 0 ? cap * tanhf(product * scale) : product * scale;
  }
  // Products of queries and keys become logits; asks once about the cap.
  template <int kN>
  __device__ __forceinline__ void of_products(float (&s)[kN][4]) const {
    if (cap > 0) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] = cap * tanhf(s[n][i] * scale);
      }
    } else {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) s[n][i] *= scale;
      }
    }
  }
  __device__ __forceinline__ float operator()(float product, float& slope_there) const {
    slope_there = slope;
    if (cap <= 0) return product * scale;
    const float bent = tanhf(product * scale);
    slope_there *= 1.0f - bent * bent;
    return cap * bent;
  }
};

// f(key, sees) for the keys of items [item_begin, item_end), 32 at a time, a lane each: for what is rare, and
// the same query on all lanes.
template <class F>
__device__ __forceinline__ void for_each_key_by_lanes(const PlanView& plan, int32_t item_begin,
                                                      int32_t item_end, const QueryRow& row, int window,
                                                      F f) {
#pragma unroll 1
  for (int32_t i = item_begin; i < item_end; ++i) {
    const PlanItem item = plan.item[i];
    if (!names(plan, item, row.query)) continue;
#pragma unroll 1
    for (int32_t at = item.segment_begin; at < item.segment_end; ++at) {
      const PlanSegment s = plan.segment[at];
#pragma unroll 1
      for (int32_t n = 0; n < s.length; n += kLanes) {
        Key key = kNoKey;
        if (n + lane() < s.length) key = key_at(plan, s, n + lane());
        f(key, row.sees(key, window));
      }
    }
  }
}

template <class E>
__device__ __forceinline__ float dot(const E* a, const E* b, int width) {
  float sum = 0;
#pragma unroll 1
  for (int x = 0; x < width; ++x) sum = fmaf(widen(a[x]), widen(b[x]), sum);
  return sum;
}

// total[i] += weight * rows[slot][first_column + lane() + 32 i], below `columns`, for the weight and slot of
// every lane in turn, but for weights of exactly 0.
template <class E, int kValues>
__device__ __forceinline__ void add_rows_of_lanes(float (&total)[kValues], float weight, int32_t slot,
                                                  const Source<E>& rows, int head, int first_column,
                                                  int columns) {
#pragma unroll 1
  for (int from = 0; from < kLanes; ++from) {
    const float w = shuffle(weight, from);
    const int32_t at = shuffle(slot, from);
    if (w == 0) continue;
    const E* row = rows.row(at, head) + first_column;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int x = lane() + kLanes * i;
      if (x < columns) total[i] = fmaf(w, widen(row[x]), total[i]);
    }
  }
}

constexpr float kLargest = 3.4028235e38f;
__device__ __forceinline__ bool is_finite(float x) { return fabsf(x) <= kLargest; }

constexpr int kMaxHeadDim = 256;
constexpr float kEmptyMax = -3e38f;  // not -inf: a difference of maxima is then never NaN

inline void require_head_dims(const AttendParams& p) {
  if (p.head_dim <= kMaxHeadDim && p.v_head_dim <= kMaxHeadDim) return;
  const bool of_v = p.head_dim <= kMaxHeadDim;
  throw std::runtime_error(std::string("head_dim of ") + (of_v ? "v" : "q and k") +
                           " must be at most 256 on a GPU, got " +
                           std::to_string(of_v ? p.v_head_dim : p.head_dim));
}

inline void require_shared(size_t bytes, const AttendParams& p) {
  if (bytes <= shared_limit()) return;
  throw std::runtime_error("head_dim must be such that a block fits the GPU's " +
                           std::to_string(shared_limit()) + " bytes of shared memory, got " +
                           std::to_string(p.head_dim) + " (of v: " + std::to_string(p.v_head_dim) +
                           "), which needs " + std::to_string(bytes));
}

}  // namespace palmette::gpu
