// SPDX-License-Identifier: Apache-2.0
// attend on the GPU: softmax attention of query rows to the keys that a plan lets them see.
//
//   S = Q K^T,   m' = max(m, max_k S),   P = 2^(S - m'),   c = 2^(m - m')
//   l' = c l + sum_k P,   O' = c O + P V        out = O / l,   lse = (m + log2 l) ln 2
//
// Data flow. A block of four warps owns the rows of one task and one KV head, 64 at a time: all query heads
// of the group are rows of one matrix, so K and V are read once for all of them.
//
//   plan --KeyCursor--> keys of a tile (slot, lo, hi, depth) in shared memory, one tile ahead of the copies
//   K, V --cp.async--> shared memory, a stage ahead of the products (one stage where two do not fit)
//   Q K^T --multiply_rows--> S in registers -> m, l, P --accumulate_rows--> O in registers
//   O, m, l of the warps --shared memory--> merged, and written: out, lse, or a partial state
//
// With more than 32 rows every warp takes 16 of them and all keys of a tile; with fewer, two or four warps
// share the rows and divide the keys, and their states are merged at the end.
//
// By blocks, K and V of a task stay where they are while its rows come and go, 64 at a time.
//
// A weight of exactly 0 contributes nothing, even times inf or NaN. The products cannot say that, so where V
// has made columns of a row inf or NaN, those are computed once more, key by key (careful_values). Finite
// results pay for a comparison.
#include <algorithm>

#include "attend/tiles_gpu.cuh"

namespace palmette::gpu {

namespace {

constexpr int kMaxRows = 16 * kWarps;

template <class E>
struct Shared {
  KeyRing<E> ring;
  PlanTask task;  // not in registers, of which there are none to spare
  float max[kWarps][16], sum[kWarps][16];
  alignas(1024) unsigned char tiles[16];  // Q, then stages of K and V; at the end O
};

template <class E>
struct Problem {
  AttendParams p;
  Source<E> q, k, v;
  Logits logits;
  Stages stages;
  int group;
  int states_offset;  // of O in the tiles: 0, over them, or, by blocks, behind those that stay
  int o_stride;       // floats between rows of O in shared memory
  bool out_by_fours;  // four columns of `out` lie at a multiple of their size

  template <int kChunks>
  __device__ __forceinline__ Matrix<E, kChunks> queries(unsigned char* tiles) const {
    return {reinterpret_cast<E*>(tiles), stages.k};
  }
  __device__ __forceinline__ unsigned char* after_queries(unsigned char* tiles) const {
    return tiles + kMaxRows * stages.k.chunks * kChunkBytes;
  }
};

// out and lse of a row from its state; a sink is one more logit with no value.
struct Finished {
  float factor, lse;  // out = factor * o
};
__device__ __forceinline__ Finished finish(const AttendParams& p, int head, float m, float l) {
  float weight = 1;
  if (p.sinks != nullptr) {
    const float sink = static_cast<const float*>(p.sinks)[head] * kLog2e;
    const float top = fmaxf(m, sink);
    weight = ptx::ex2(m - top);
    l = (l == 0 ? 0.0f : l * weight) + ptx::ex2(sink - top);
    m = top;
  }
  return {l == 0 ? 0.0f : weight / l, l == 0 ? -INFINITY : (m + log2f(l)) * kLn2};
}

// sum_k P V of one query of a task and one head, leaving out weights of exactly 0, by a group of lanes:
// column lane() + 32 i is total[i]. Rare, so small code is all that counts.
template <class E, int kValues>
__device__ __forceinline__ void careful_values(const Problem<E>& a, const PlanTask& task, const QueryRow& row,
                                               int head, float top, float (&total)[kValues]) {
  const int kv_head = head / (a.p.num_q_heads / a.p.num_kv_heads);
  const E* q = a.q.row(a.p.plan.query_index[row.query], head);
#pragma unroll
  for (float& sum : total) sum = 0;
  const auto meet = [&](const Key& key, bool sees) {
    float weight = 0;
    if (sees) weight = ptx::ex2(a.logits(dot(q, a.k.row(key.slot, kv_head), a.p.head_dim)) - top);
    add_rows_of_lanes(total, weight, key.slot, a.v, kv_head, 0, a.p.v_head_dim);
  };
  for_each_key_by_lanes(a.p.plan, task.item_begin, task.item_end, row, a.logits.window, meet);
}

// Keys that a warp meets at a time: all that it takes of a tile, where the columns of O, and addresses that
// have to be computed, leave registers for them.
template <class E, int kColumns, bool kExact, int kRowWarps>
constexpr int kStep = std::min(kTileKeys<E> / (kWarps / kRowWarps), (kColumns > 128             ? 16
                                                                     : kColumns > 64 && !kExact ? 32
                                                                                                : 64) /
                                                                        (sizeof(E) == 4 ? 2 : 1));

// The rows of a task from `first` on, at most 16 * kRowWarps of them: the warps are divided by rows and, what
// is left of them, by keys. kExact: q, k and v have kColumns columns.
template <class Math, int kColumns, bool kExact, int kRowWarps>
struct Rows {
  using E = typename Math::Element;
  static constexpr int kChunks = kExact ? kColumns / kPerChunk<E> : 0;
  using Tile = Matrix<E, kChunks>;
  static constexpr int kKeys = kTileKeys<E>, kTiles = kColumns / 8;
  static constexpr int kKeyWarps = kWarps / kRowWarps, kWarpKeys = kKeys / kKeyWarps;
  static constexpr int kN = kStep<E, kColumns, kExact, kRowWarps> / 8;
  static constexpr int kValues = kColumns / kLanes;            // of a lane, of a row
  static constexpr int kRowsOfWarp = 16 * kRowWarps / kWarps;  // that it writes
  using Four = Pack<float, 4>;

  const Problem<E>& a;
  const AttendParams& p;
  const PlanTask& task;
  const int kv_head, first, count;
  Shared<E>& shared;
  QueryRow row[2];  // of this thread
  float o[kTiles][4], m[2], l[2];

  __device__ __forceinline__ Rows(const Problem<E>& problem, const PlanTask& t, int head, int first_row,
                                  int rows)
      : a(problem),
        p(problem.p),
        task(t),
        kv_head(head),
        first(first_row),
        count(rows),
        shared(gpu::shared<Shared<E>>()) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = row_warp() * 16 + fragment_row() + 8 * i;
      row[i] = r < count ? query_row(p.plan, at().query(first + r)) : QueryRow{-1, INT32_MIN, 0};
    }
  }

  // Made anew where it is needed: from shared memory and constants.
  __device__ __forceinline__ RowOf at() const {
    return {task.query_begin, a.group, p.plan.choices > 0 ? p.plan.item_query : nullptr};
  }
  __device__ __forceinline__ static int row_warp() { return warp() % kRowWarps; }
  __device__ __forceinline__ static int key_warp() { return warp() / kRowWarps; }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int i = 0; i < kTiles; ++i) o[i][0] = o[i][1] = o[i][2] = o[i][3] = 0;
    m[0] = m[1] = kEmptyMax;
    l[0] = l[1] = 0;
    const auto queries = a.template queries<kChunks>(shared.tiles);
    copy_query_rows(queries, 16 * kRowWarps, a.q, p.plan, at(), first, count, kv_head);
    ptx::commit_copies();
    const bool by_blocks = p.plan.choices > 0;  // all rows of a task are named then
    const KeyRange range{task.item_begin,
                         task.item_end,
                         by_blocks ? 0 : at().query(first),
                         by_blocks ? INT32_MAX : at().query(first + count - 1) + 1,
                         a.logits.window,
                         by_blocks};
    const bool keep = first > 0 && a.states_offset > 0 && p.plan.counts[kMaxItemKeys] <= kKeys;
    for_each_tile<kChunks>(
        shared.ring, a.after_queries(shared.tiles), a.stages, p.plan, range, a.k, a.v, kv_head,
        [&](const TileSpan& span, const Key* keys, const Tile& k, const Tile& v) {
          meet(queries, span, keys, k, v);
        },
        keep);
    write();
  }

  // This warp's rows meet its keys of a tile.
  __device__ __forceinline__ void meet(const Tile& queries, const TileSpan& span, const Key* keys,
                                       const Tile& k, const Tile& v) {
    const int window = a.logits.window;
    const bool named[2] = {row[0].meets(span), row[1].meets(span)};
    if (!any(row[0].sees_some(span, window) | row[1].sees_some(span, window))) return;
    const bool by_rows =
        all(row[0].sees_all_or_none(span, window, kKeys) & row[1].sees_all_or_none(span, window, kKeys));
    const bool everything = by_rows && all((named[0] | (row[0].query < 0)) & (named[1] | (row[1].query < 0)));
#pragma unroll 1
    for (int step = 0; step < kWarpKeys; step += 8 * kN) {
      const int first_key = key_warp() * kWarpKeys + step;
      float s[kN][4];
      Math::multiply_rows(s, queries, row_warp() * 16, k, first_key);
      a.logits.of_products(s);
      if (!by_rows) {
        hide_keys(s, named, keys + first_key);
      } else if (!everything) {
        hide_rows(s, named);
      }
      add(s, v, first_key);
    }
  }

  __device__ __forceinline__ static void hide_rows(float (&s)[kN][4], const bool (&named)[2]) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) s[n][i] = named[i / 2] ? s[n][i] : -INFINITY;
    }
  }

  __device__ __forceinline__ void hide_keys(float (&s)[kN][4], const bool (&named)[2],
                                            const Key* keys) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Key key = load(keys + 8 * n + fragment_column() + e);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float& logit = s[n][2 * i + e];
          logit = named[i] & row[i].sees(key, a.logits.window) ? logit : -INFINITY;
        }
      }
    }
  }

  // Keys with logits s, from `first_key` of the tile on, join the states.
  __device__ __forceinline__ void add(float (&s)[kN][4], const Tile& v, int first_key) {
    float c[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      float top = m[i];
#pragma unroll
      for (int n = 0; n < kN; ++n) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      c[i] = ptx::ex2(m[i] - top);
      m[i] = top;
    }
    float sum[2][2] = {};  // of this thread's columns, even and odd
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        s[n][i] = ptx::ex2(s[n][i] - m[i / 2]);
        sum[i / 2][i % 2] += s[n][i];
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) l[i] = l[i] * c[i] + (sum[i][0] + sum[i][1]);
    if (any((c[0] != 1.0f) | (c[1] != 1.0f))) {
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o[n][i] *= c[i / 2];
      }
    }
    Math::accumulate_rows(o, s, v, first_key, kExact ? kColumns : a.v.width);
  }

  // The warps' states meet in shared memory, in the place of the tiles.
  __device__ __forceinline__ void write() {
    float* states = reinterpret_cast<float*>(shared.tiles + a.states_offset);
    const int here = lane_here(), g = here / 4, t = here % 4 * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      l[i] += shuffle_xor(l[i], 1);
      l[i] += shuffle_xor(l[i], 2);
      if (t == 0) {
        shared.max[warp()][g + 8 * i] = m[i];
        shared.sum[warp()][g + 8 * i] = l[i];
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        if (8 * n >= a.v.width) break;
        store(reinterpret_cast<float2*>(states + (warp() * 16 + g + 8 * i) * a.o_stride + 8 * n + t),
              make_float2(o[n][2 * i], o[n][2 * i + 1]));
      }
    }
    if (kKeyWarps == 1) {  // a warp writes the rows that it has summed
      group_sync();
    } else {
      __syncthreads();
    }
    write_rows(states);
    __syncthreads();  // the next rows use the same memory
  }

  // Every lane finishes the state of one row; then all of them write one row after the other.
  __device__ __forceinline__ void write_rows(const float* states) {
    const bool direct = task.partial_begin < 0;
    float weight[kKeyWarps] = {}, top = kEmptyMax, sum = 0, factor = 1;
    int64_t target = 0;  // of the row in `out` or `partial_out`
    const int mine = lane_here();
    if (mine < kRowsOfWarp && row_of_warp(mine) < count) {
      const int r = row_of_warp(mine);
#pragma unroll
      for (int i = 0; i < kKeyWarps; ++i) top = fmaxf(top, shared.max[r / 16 + kRowWarps * i][r % 16]);
#pragma unroll
      for (int i = 0; i < kKeyWarps; ++i) {
        const int w = r / 16 + kRowWarps * i;
        weight[i] = ptx::ex2(shared.max[w][r % 16] - top);
        sum += shared.sum[w][r % 16] * weight[i];
      }
      const int32_t query = at().query(first + r);
      if (direct) {
        const int64_t index = p.plan.query_index[query];
        const Finished done = finish(p, head_of(r), top, sum);
        static_cast<float*>(p.lse)[index * p.num_q_heads + head_of(r)] = done.lse;
        factor = done.factor;
        target = index * p.out.token + head_of(r) * p.out.head;
      } else {
        const int64_t row = int64_t{task.partial_begin} + query - task.query_begin;
        target = row * p.num_q_heads + head_of(r);
        if (p.plan.choices > 0) {
          target = place_of_row(p, task, first + r);
          factor = sum == 0 ? 0.0f : 1.0f / sum;
        }
        static_cast<float*>(p.partial_max)[target] = top;
        static_cast<float*>(p.partial_sum)[target] = sum;
        target *= p.v_head_dim;
      }
    }
#pragma unroll 1
    for (int i = 0; i < kRowsOfWarp; ++i) {
      const int r = row_of_warp(i);
      if (r >= count) break;
      float w[kKeyWarps];
#pragma unroll
      for (int j = 0; j < kKeyWarps; ++j) w[j] = shuffle(weight[j], i);
      const float f = shuffle(factor, i), total = shuffle(sum, i), most = shuffle(top, i);
      const int64_t begin = shuffle(target, i);
      bool bad = false;
      for (int x = 4 * lane(); x < p.v_head_dim; x += 4 * kLanes) {
        Four value{};
#pragma unroll
        for (int j = 0; j < kKeyWarps; ++j) {
          const Four part = load(reinterpret_cast<const Four*>(state_of(states, r, j) + x));
#pragma unroll
          for (int e = 0; e < 4; ++e) value.value[e] += part.value[e] * w[j];
        }
        const int valid = min(4, p.v_head_dim - x);
#pragma unroll
        for (int e = 0; e < 4; ++e) bad |= e < valid && !is_finite(value.value[e]);
        put(direct, begin + x, value, f, valid);
      }
      // The sum of a row that has met a logit of NaN or +inf is NaN, and so will be its results.
      if (any(bad) && total == total) write_carefully(states, r, w, most, direct, begin, f);
    }
  }

  // Columns of a row that are not finite, once more.
  __device__ __forceinline__ void write_carefully(const float* states, int r, const float (&w)[kKeyWarps],
                                                  float top, bool direct, int64_t begin, float factor) {
    group_sync();  // other lanes have written what this one writes again
    float value[kValues];
    careful_values(a, task, query_row(p.plan, at().query(first + r)), head_of(r), top, value);
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int x = lane() + kLanes * i;
      if (x >= p.v_head_dim) break;
      float before = 0;
#pragma unroll
      for (int j = 0; j < kKeyWarps; ++j) before += state_of(states, r, j)[x] * w[j];
      if (!is_finite(before)) put(direct, begin + x, Four{{value[i]}}, factor, 1);
    }
  }

  // The lane's number, shuffled, so that it is news to the compiler, which would compute addresses of the end
  // before all tiles and keep them in registers.
  __device__ __forceinline__ static int lane_here() { return shuffle(lane(), lane()); }
  __device__ __forceinline__ static int row_of_warp(int i) { return warp() * kRowsOfWarp + i; }
  __device__ __forceinline__ int head_of(int r) const { return kv_head * a.group + (first + r) % a.group; }
  // Columns of row r that the j-th warp of its keys has summed.
  __device__ __forceinline__ const float* state_of(const float* states, int r, int j) const {
    return states + ((r / 16 + kRowWarps * j) * 16 + r % 16) * a.o_stride;
  }
  // `valid` columns from `at_element` on, of `out` or of a partial state, in E times the factor or in float.
  __device__ __forceinline__ void put(bool direct, int64_t at_element, const Four& value, float factor,
                                      int valid) const {
    if (direct || p.plan.choices > 0) {
      E* out = static_cast<E*>(direct ? p.out.data : p.partial_out) + at_element;
      Pack<E, 4> narrowed;
#pragma unroll
      for (int e = 0; e < 4; ++e) narrowed.value[e] = narrow<E>(value.value[e] * factor);
      const bool by_fours = direct ? a.out_by_fours : p.v_head_dim % 4 == 0;
      if (valid == 4 && by_fours) return store(reinterpret_cast<Pack<E, 4>*>(out), narrowed);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e < valid) out[e] = narrowed.value[e];
      }
    } else {
      float* out = static_cast<float*>(p.partial_out) + at_element;
      if (valid == 4 && p.v_head_dim % 4 == 0) return store(reinterpret_cast<Four*>(out), value);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        if (e < valid) out[e] = value.value[e];
      }
    }
  }
};

template <class Math, int kColumns, bool kExact>
__global__ void __launch_bounds__(kThreads, 2)
    attend_kernel(const __grid_constant__ Problem<typename Math::Element> a) {
  const AttendParams& p = a.p;
  const int heads = p.plan.choices > 0 ? 1 : p.num_kv_heads;  // that a task may run for
  const auto index = static_cast<int32_t>(blockIdx.x / heads);
  using E = typename Math::Element;
  if (!plan_fits(p)) {
    fill_nan<E>(p.out, p.plan.num_queries, p.num_q_heads, p.v_head_dim);
    fill_nan<float>({p.lse, p.num_q_heads, 1}, p.plan.num_queries, p.num_q_heads, 1);
    return;
  }
  if (index >= p.plan.counts[kNumTasks]) return;
  PlanTask& task = shared<Shared<E>>().task;
  if (threadIdx.x == 0) task = p.plan.task[index];
  __syncthreads();
  const int kv_head = p.plan.choices > 0 ? task.kv_head : static_cast<int>(blockIdx.x) % heads;
  if (p.plan.choices > 0 ? kv_head < p.head_begin || kv_head >= p.head_begin + p.head_count
                         : task.kv_head >= 0 && task.kv_head != kv_head)
    return;
  const auto rows = [&] { return (task.query_end - task.query_begin) * (p.num_q_heads / p.num_kv_heads); };
  for (int first = 0; first < rows(); first += kMaxRows) {
    const int count = min(kMaxRows, rows() - first);
    constexpr bool kHalves = kColumns <= 128;  // 256 have no registers to spare for a third body
    if (count > (kHalves ? 32 : 16)) {
      Rows<Math, kColumns, kExact, 4>(a, task, kv_head, first, count).run();
    } else if (kHalves && count > 16) {
      Rows<Math, kColumns, kExact, 2>(a, task, kv_head, first, count).run();
    } else {
      Rows<Math, kColumns, kExact, 1>(a, task, kv_head, first, count).run();
    }
  }
}

// Second pass: a group of lanes merges `count` partial states of one head of a query in order, 32 of them at
// a time: each lane fetches the maximum and the sum of one, and its columns of all. place(i) is where the
// i-th lies, -1 where there is none, behind the last one too. kDivided: their results, of type Part, have
// been divided by their sums.
template <class E, class Part, bool kDivided, class Place>
__device__ __forceinline__ void merge_partials(const AttendParams& p, int64_t query, int head, int count,
                                               Place place) {
  const auto* part_max = static_cast<const float*>(p.partial_max);
  const auto* part_sum = static_cast<const float*>(p.partial_sum);
  const auto* part_out = static_cast<const Part*>(p.partial_out);
  constexpr int kColumns = 4;  // of a lane at a time
  float top = kEmptyMax;
  for (int i = lane(); i < count; i += kLanes) {
    const int64_t at = place(i);
    if (at >= 0) top = fmaxf(top, part_max[at]);
  }
  top = group_max(top);
  const int64_t row = p.plan.query_index[query];
  E* out = static_cast<E*>(p.out.data) + row * p.out.token + head * p.out.head;
  for (int first = 0; first < p.v_head_dim; first += kColumns * kLanes) {
    float value[kColumns] = {}, sum = 0;
    for (int base = 0; base < count; base += kLanes) {
      const int64_t mine = place(base + lane());
      float weight = 0;
      if (mine >= 0 && part_sum[mine] != 0) {
        const float factor = ptx::ex2(part_max[mine] - top), share = part_sum[mine] * factor;
        sum += share;
        weight = kDivided ? share : factor;
      }
      const int together = min(count - base, kLanes);
#pragma unroll 4
      for (int i = 0; i < together; ++i) {
        const float w = shuffle(weight, i);
        const int64_t at = shuffle(mine, i);
        const Part* from = part_out + at * p.v_head_dim + first;
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int x = lane() + kLanes * c;
          const float part = at >= 0 && first + x < p.v_head_dim ? widen(from[x]) : 0.0f;
          value[c] = w == 0 ? value[c] : fmaf(part, w, value[c]);  // whatever a row of no weight holds
        }
      }
    }
    const Finished done = finish(p, head, top, group_sum(sum));
    if (lane() == 0 && first == 0) static_cast<float*>(p.lse)[row * p.num_q_heads + head] = done.lse;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int x = first + lane() + kLanes * c;
      if (x < p.v_head_dim) out[x] = narrow<E>(value[c] * done.factor);
    }
  }
}

// States that merge_ptr and merge_row name, in float.
template <class E>
__global__ void __launch_bounds__(kThreads) attend_merge_kernel(const __grid_constant__ AttendParams p) {
  const int64_t index = int64_t{blockIdx.x} * kWarps + warp();
  const int64_t query = index / p.num_q_heads, head = index % p.num_q_heads;
  if (query >= p.plan.num_queries || !plan_fits(p) || p.plan.counts[kNumPartials] == 0) return;
  const int32_t begin = p.plan.merge_ptr[query], end = p.plan.merge_ptr[query + 1];
  if (begin == end) return;
  const auto place = [&](int i) -> int64_t {
    return begin + i < end ? p.plan.merge_row[begin + i] * int64_t{p.num_q_heads} + head : -1;
  };
  merge_partials<E, float, false>(p, query, static_cast<int>(head), end - begin, place);
}

// Those of a plan by blocks.
template <class E>
__global__ void __launch_bounds__(kThreads)
    attend_merge_blocks_kernel(const __grid_constant__ AttendParams p) {
  const int group = p.num_q_heads / p.num_kv_heads, heads = p.head_count * group;
  const int64_t index = int64_t{blockIdx.x} * kWarps + warp(), query = index / heads;
  if (query >= p.plan.num_queries || !plan_fits(p)) return;
  const int head = p.head_begin * group + static_cast<int>(index % heads);
  const auto place = [&](int i) { return place_of_choice(p, query, head, i); };
  merge_partials<E, E, true>(p, query, head, p.plan.choices, place);
}

template <class E>
Problem<E> problem_of(const AttendParams& p) {
  Problem<E> a{};
  a.p = p;
  a.q = source_of<E>(p.q, p.head_dim);
  a.k = source_of<E>(p.k, p.head_dim);
  a.v = source_of<E>(p.v, p.v_head_dim);
  a.logits = Logits::of(p);
  a.stages = Stages::of<E>(p);
  a.group = p.num_q_heads / p.num_kv_heads;
  a.o_stride = padded(p.v_head_dim) + 8;
  a.out_by_fours = reinterpret_cast<uintptr_t>(p.out.data) % (4 * sizeof(E)) == 0 && p.out.token % 4 == 0 &&
                   p.out.head % 4 == 0;
  return a;
}

// Two stages where they fit; by blocks one, and a place for O behind it. Returns the bytes of shared memory.
template <class E>
size_t choose_stages(Problem<E>& a) {
  const size_t queries = kMaxRows * static_cast<size_t>(a.stages.k.chunks) * kChunkBytes;
  const size_t states = kMaxRows * sizeof(float) * static_cast<size_t>(a.o_stride);
  if (a.p.plan.choices > 0) {
    a.stages.count = 1;
    const size_t tiles = queries + static_cast<size_t>(a.stages.stage_offset);
    a.states_offset = static_cast<int>(tiles);
    if (const size_t bytes = sizeof(Shared<E>) + tiles + states; bytes <= shared_limit()) return bytes;
    a.states_offset = 0;
  }
  size_t bytes = 0;
  for (int& count = a.stages.count; count > 0; --count) {
    const size_t tiles = queries + static_cast<size_t>(count * a.stages.stage_offset);
    bytes = sizeof(Shared<E>) + std::max(tiles, states);
    if (bytes <= shared_limit()) return bytes;
  }
  require_shared(bytes, a.p);
  return bytes;
}

template <class Math>
void launch_attend(const AttendParams& p, const LaunchContext& context) {
  using E = typename Math::Element;
  Problem<E> a = problem_of<E>(p);
  const size_t bytes = choose_stages(a);
  auto kernel = p.v_head_dim <= 64    ? &attend_kernel<Math, 64, false>
                : p.v_head_dim <= 128 ? &attend_kernel<Math, 128, false>
                                      : &attend_kernel<Math, 256, false>;
  if constexpr (sizeof(E) == 2) {
    if (p.head_dim == p.v_head_dim && p.head_dim == 64) kernel = &attend_kernel<Math, 64, true>;
    if (p.head_dim == p.v_head_dim && p.head_dim == 128) kernel = &attend_kernel<Math, 128, true>;
  }
  const int64_t groups = int64_t{p.plan.num_queries} * p.num_q_heads;
  if (p.plan.choices > 0) {
    in_turns(a.p, [&] {
      if (p.plan.num_tasks > 0)
        launch("attend", kernel, dim3(static_cast<unsigned>(p.plan.num_tasks)), dim3(kThreads), bytes,
               context, a);
      const int64_t merged = groups / p.num_kv_heads * a.p.head_count;
      if (merged > 0)
        launch("attend_merge_blocks", &attend_merge_blocks_kernel<E>,
               dim3(static_cast<unsigned>((merged + kWarps - 1) / kWarps)), dim3(kThreads), 0, context, a.p);
    });
    return;
  }
  const auto blocks = static_cast<unsigned>(int64_t{p.plan.num_tasks} * p.num_kv_heads);
  if (blocks > 0) launch("attend", kernel, dim3(blocks), dim3(kThreads), bytes, context, a);
  if (p.plan.num_partials > 0 && groups > 0) {
    launch("attend_merge", &attend_merge_kernel<E>,
           dim3(static_cast<unsigned>((groups + kWarps - 1) / kWarps)), dim3(kThreads), 0, context, p);
  }
}

void attend(const AttendParams& p, const LaunchContext& context) {
  require_head_dims(p);
  with_math(p.dtype, [&]<class Math>(Math) { launch_attend<Math>(p, context); });
}

const Registration<&attend> registration("attend");

}  // namespace

}  // namespace palmette::gpu
