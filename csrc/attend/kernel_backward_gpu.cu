// SPDX-License-Identifier: Apache-2.0
// The gradient of attend on the GPU.
//
//   P = 2^(S - lse),  D_i = sum(dO_i * O_i) - dlse_i,  dP = dO V^T,  dS = slope P * (dP - D)
//   dQ = dS K,   dK = dS^T Q,   dV = P^T dO,   dsink_h = -sum_i exp(sink_h - lse_i) D_i
//
// Every output has one owner, so there are no atomics and one order of summation. Four kernels:
//
//   attend_delta   a group of lanes per row of O: D, and the row's part of dsink
//   attend_dq      a block per 64 rows of one KV head's queries: walks the keys of all tasks that touch them,
//   as the
//                  forward pass does;  S, dP --registers--> dS --accumulate_rows--> dQ
//   attend_dkv     a block per tile of keys of one KV head: K and V stay in shared memory, the queries of all
//   items
//                  that hold one of the keys stream past;  S^T, dP^T --registers--> P^T, dS^T
//                  --accumulate_rows--> dV, dK
//   attend_dsinks  a group of lanes per head adds up the rows' parts
//
// A plan lists its keys by task. Who owns keys finds the tasks that hold them by looking through the plan's
// tables, 128 tasks at a time: that costs a few bytes per task, where a second set of tables, ordered by key,
// would have to be made, moved and kept up to date for every step of decoding that needs no gradient.
//
// A key tile is 64 (32 in float) neighbours in `slots`, not in depth-first order; where two of them name the
// same slot, its gradient is wrong: with gradients, slots must be distinct. Gradients of more than kColumns
// columns are computed in parts, each of which computes S and dP again.
#include <algorithm>

#include "attend/tiles_gpu.cuh"

namespace palmette::gpu {

namespace {

template <class E>
struct BackwardProblem {
  AttendParams p;
  Source<E> q, k, v, dout;
  const float *lse, *delta;  // [Nq, Hq]
  E *dq, *dk, *dv;           // contiguous
  Logits logits;
  Stages stages;
  int group;
  int column_parts;
};

// lse in units of log2; a row that has seen no key has P = 0.
__device__ __forceinline__ float log2_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

template <class E>
__device__ __forceinline__ int64_t state_index(const BackwardProblem<E>& a, int row, int kv_head) {
  const int64_t query = a.p.plan.query_index[row / a.group];
  return query * a.p.num_q_heads + kv_head * a.group + row % a.group;
}

// The tasks among kThreads from `base` on that pass a test, in ascending order.
struct TaskList {
  int32_t task[kThreads];
  int32_t passed[kWarps];
};
template <class Test>
__device__ __forceinline__ int list_tasks(TaskList& list, int32_t base, int32_t total, Test test) {
  const int32_t index = base + static_cast<int32_t>(threadIdx.x);
  const bool passes = index < total && test(index);
  const uint32_t votes = ballot(passes);
  __syncthreads();  // the list before is done with
  if (lane() == 0) list.passed[warp()] = __popc(votes);
  __syncthreads();
  int place = __popc(votes & ((1u << lane()) - 1)), count = 0;
  for (int w = 0; w < kWarps; ++w) {
    place += w < warp() ? list.passed[w] : 0;
    count += list.passed[w];
  }
  if (passes) list.task[place] = index;
  __syncthreads();
  return count;
}

// Sums of the warps into rows of an output: each warp leaves 16 rows of kColumns in shared memory, kParts
// warps have parts of the same rows. put(row, column, value) writes one.
template <int kColumns, int kParts, class Put>
__device__ __forceinline__ void write_sums(float* memory, const float (&sums)[kColumns / 8][4], int columns,
                                           Put put) {
  constexpr int kStride = kColumns + 8, kRowWarps = kWarps / kParts;
  const int g = fragment_row(), t = fragment_column();
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
      store(reinterpret_cast<float2*>(memory + (warp() * 16 + g + 8 * i) * kStride + 8 * n + t),
            make_float2(sums[n][2 * i], sums[n][2 * i + 1]));
    }
  }
  __syncthreads();
  for (int row = warp(); row < 16 * kRowWarps; row += kWarps) {
    for (int x = lane(); x < columns; x += kLanes) {
      float value = 0;
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        value += memory[((row / 16 + part * kRowWarps) * 16 + row % 16) * kStride + x];
      put(row, x, value);
    }
  }
}

template <int kColumns>
constexpr size_t kSumBytes = size_t{16} * kWarps * (kColumns + 8) * sizeof(float);

// ---- D and the sinks

template <class E>
__global__ void __launch_bounds__(kThreads)
    attend_delta_kernel(const __grid_constant__ AttendBackwardParams b) {
  const AttendParams& p = b.forward;
  const int64_t index = int64_t{blockIdx.x} * kWarps + warp();
  const int64_t row = index / p.num_q_heads, head = index % p.num_q_heads;
  if (row >= p.plan.num_queries) return;
  const E* out = static_cast<const E*>(p.out.data) + row * p.out.token + head * p.out.head;
  const E* dout = static_cast<const E*>(b.dout.data) + row * b.dout.token + head * b.dout.head;
  float sum = 0;
  for (int x = lane(); x < p.v_head_dim; x += kLanes) sum = fmaf(widen(out[x]), widen(dout[x]), sum);
  sum = group_sum(sum);
  if (lane() != 0) return;
  if (b.dlse != nullptr) sum -= static_cast<const float*>(b.dlse)[index];
  static_cast<float*>(b.delta)[index] = sum;
  if (b.dsinks == nullptr) return;
  const float sink = static_cast<const float*>(p.sinks)[head] * kLog2e;
  const float lse = log2_lse(static_cast<const float*>(p.lse)[index]);
  static_cast<float*>(b.dsinks)[index] = -ptx::ex2(sink - lse) * sum;
}

__global__ void __launch_bounds__(kLanes)
    attend_dsinks_kernel(const __grid_constant__ AttendBackwardParams b) {
  const AttendParams& p = b.forward;
  const auto head = static_cast<int64_t>(blockIdx.x);
  float sum = 0;
  for (int64_t row = lane(); row < p.plan.num_queries; row += kLanes)
    sum += static_cast<const float*>(b.dsinks)[row * p.num_q_heads + head];
  sum = group_sum(sum);
  if (lane() == 0) static_cast<float*>(b.sink_sums)[head] = sum;
}

// ---- dQ

template <class E>
struct QueryShared {
  KeyRing<E> ring;
  TaskList list;
  alignas(1024) unsigned char tiles[16];  // Q and dO, then stages of K and V; at the end dQ
};

template <class Math, int kColumns>
struct QueryGradient {
  using E = typename Math::Element;
  static constexpr int kKeys = kTileKeys<E>, kStep = 32, kN = kStep / 8, kRows = 16 * kWarps;

  const BackwardProblem<E>& a;
  const AttendParams& p;
  const int kv_head, first, count, first_column;
  QueryShared<E>& shared;
  QueryRow row[2];
  float lse[2], delta[2], dq[kColumns / 8][4];

  __device__ __forceinline__ QueryGradient(const BackwardProblem<E>& problem, int head, int first_row,
                                           int rows, int column)
      : a(problem),
        p(problem.p),
        kv_head(head),
        first(first_row),
        count(rows),
        first_column(column),
        shared(gpu::shared<QueryShared<E>>()) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = warp() * 16 + fragment_row() + 8 * i;
      row[i] = {-1, INT32_MIN, 0};
      lse[i] = INFINITY;
      delta[i] = 0;
      if (r >= count) continue;
      row[i] = query_row(p.plan, (first + r) / a.group);
      const int64_t index = state_index(a, first + r, kv_head);
      lse[i] = log2_lse(a.lse[index]);
      delta[i] = a.delta[index];
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0;
  }

  __device__ __forceinline__ void run() {
    const RowOf at{0, a.group};
    const int32_t query_begin = at.query(first), query_end = at.query(first + count - 1) + 1;
    const Matrix<E> q{reinterpret_cast<E*>(shared.tiles), a.stages.k};
    unsigned char* after_q = shared.tiles + kRows * a.stages.k.chunks * kChunkBytes;
    const Matrix<E> dout{reinterpret_cast<E*>(after_q), a.stages.v};
    unsigned char* stages = after_q + kRows * a.stages.v.chunks * kChunkBytes;
    copy_query_rows(q, kRows, a.q, p.plan, at, first, count, kv_head);
    copy_query_rows(dout, kRows, a.dout, p.plan, at, first, count, kv_head);
    ptx::commit_copies();
    const int32_t tasks = p.plan.counts[kNumTasks];
    for (int32_t base = 0; base < tasks; base += kThreads) {
      const int listed = list_tasks(shared.list, base, tasks, [&](int32_t index) {
        const PlanTask& t = p.plan.task[index];
        return (t.kv_head < 0 || t.kv_head == kv_head) && t.query_begin < query_end &&
               t.query_end > query_begin;
      });
      for (int i = 0; i < listed; ++i) {
        const PlanTask& t = p.plan.task[shared.list.task[i]];
        const KeyCursor<kKeys> cursor(p.plan, t.item_begin, t.item_end, query_begin, query_end,
                                      a.logits.window);
        for_each_tile(shared.ring, stages, a.stages, cursor, a.k, a.v, kv_head,
                      [&](const TileSpan& span, const Key* keys, const Matrix<E>& k, const Matrix<E>& v) {
                        meet(q, dout, span, keys, k, v);
                      });
      }
    }
    ptx::wait_for_copies<0>();
    write();
  }

  __device__ __forceinline__ void meet(const Matrix<E>& q, const Matrix<E>& dout, const TileSpan& span,
                                       const Key* keys, const Matrix<E>& k, const Matrix<E>& v) {
    const int window = a.logits.window;
    if (!any(row[0].sees_some(span, window) || row[1].sees_some(span, window))) return;
    const bool everything = all(row[0].sees_all(span, window, kKeys) && row[1].sees_all(span, window, kKeys));
    bool named[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) named[i] = row[i].meets(span);
#pragma unroll 1
    for (int first_key = 0; first_key < kKeys; first_key += kStep) {
      float s[kN][4], ds[kN][4];
      Math::multiply_rows(s, q, warp() * 16, k, first_key);
      Math::multiply_rows(ds, dout, warp() * 16, v, first_key);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          Key key = kNoKey;
          if (!everything) key = load(keys + first_key + 8 * n + fragment_column() + e);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float slope;
            const float weight = ptx::ex2(a.logits(s[n][2 * i + e], slope) - lse[i]);
            const bool seen = everything || (named[i] && row[i].sees(key, window));
            float& gradient = ds[n][2 * i + e];
            gradient = seen ? weight * (gradient - delta[i]) * slope : 0.0f;
          }
        }
      }
      Math::accumulate_rows(dq, ds, k, first_key, a.k.width - first_column, first_column);
    }
  }

  __device__ __forceinline__ void write() {
    const int columns = min(kColumns, p.head_dim - first_column);
    bool bad = false;
    write_sums<kColumns, 1>(reinterpret_cast<float*>(shared.tiles), dq, columns,
                            [&](int r, int x, float value) {
                              if (r >= count) return;
                              bad |= !is_finite(value);
                              gradient_of(r)[x] = narrow<E>(value);
                            });
    if (!any(bad)) return;
    // A weight of exactly 0 contributes nothing, even times inf or NaN: key by key.
    for (int r = warp(); r < count; r += kWarps) {
      for (int x = lane(); x < columns; x += kLanes) {
        if (!is_finite(widen(gradient_of(r)[x]))) gradient_of(r)[x] = narrow<E>(careful_value(r, x));
      }
    }
  }

  __device__ __forceinline__ E* gradient_of(int r) const {
    return a.dq + state_index(a, first + r, kv_head) * p.head_dim + first_column;
  }

  __device__ __forceinline__ float careful_value(int r, int column) const {
    const QueryRow seen = query_row(p.plan, (first + r) / a.group);
    const int64_t index = state_index(a, first + r, kv_head);
    const int64_t query = p.plan.query_index[seen.query];
    const int head = kv_head * a.group + (first + r) % a.group;
    const float max = log2_lse(a.lse[index]);
    float total = 0;
#pragma unroll 1
    for (int32_t t = 0; t < p.plan.counts[kNumTasks]; ++t) {
      const PlanTask& task = p.plan.task[t];
      if (task.kv_head >= 0 && task.kv_head != kv_head) continue;
      for_each_visible_key(
          p.plan, task.item_begin, task.item_end, seen, a.logits.window, [&](const Key& key) {
            const E* k = a.k.row(key.slot, kv_head);
            float slope;
            const float weight = ptx::ex2(a.logits(dot(a.q.row(query, head), k, p.head_dim), slope) - max);
            const float dp = dot(a.dout.row(query, head), a.v.row(key.slot, kv_head), p.v_head_dim);
            const float ds = weight * (dp - a.delta[index]) * slope;
            if (ds != 0) total = fmaf(ds, widen(k[first_column + column]), total);
          });
    }
    return total;
  }
};

template <class Math, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    attend_dq_kernel(const __grid_constant__ BackwardProblem<typename Math::Element> a) {
  const AttendParams& p = a.p;
  const auto part = static_cast<int>(blockIdx.x % a.column_parts);
  const auto kv_head = static_cast<int>(blockIdx.x / a.column_parts % p.num_kv_heads);
  const auto first = static_cast<int>(blockIdx.x / (a.column_parts * p.num_kv_heads)) * 16 * kWarps;
  const int rows = p.plan.counts[kNumQueries] * a.group;
  if (first >= rows || part * kColumns >= p.head_dim) return;
  QueryGradient<Math, kColumns>(a, kv_head, first, min(16 * kWarps, rows - first), part * kColumns).run();
}

// ---- dK, dV

// What a row of queries brings besides q and dO; `pos` is of nobody where there is no such row.
struct RowState {
  int32_t pos, depth;
  float lse, delta;
};

template <class E>
struct KeyShared {
  TaskList list;
  Key key[kTileKeys<E>];
  RowState row[kTileKeys<E>];
  int32_t used[kTileKeys<E>];             // some query has met this key
  alignas(1024) unsigned char tiles[16];  // K and V, then Q and dO; at the end dK, dV
};

template <class Math, int kColumns>
struct KeyGradient {
  using E = typename Math::Element;
  static constexpr int kKeys = kTileKeys<E>, kRows = kTileKeys<E>;  // of a tile
  // Warps own 16 keys each; what is left of them divides the rows.
  static constexpr int kKeyWarps = kKeys / 16, kParts = kWarps / kKeyWarps, kWarpRows = kRows / kParts;
  static constexpr int kStep = kWarpRows < 32 ? kWarpRows : 32, kN = kStep / 8;

  const BackwardProblem<E>& a;
  const AttendParams& p;
  const int kv_head, first_key, keys, first_column;
  KeyShared<E>& shared;
  Matrix<E> k, v, q, dout;
  float dk[kColumns / 8][4], dv[kColumns / 8][4];

  __device__ __forceinline__ KeyGradient(const BackwardProblem<E>& problem, int head, int key, int count,
                                         int column)
      : a(problem),
        p(problem.p),
        kv_head(head),
        first_key(key),
        keys(count),
        first_column(column),
        shared(gpu::shared<KeyShared<E>>()) {
    unsigned char* memory = shared.tiles;
    const auto take = [&](int rows, const Swizzle& swizzle) {
      const Matrix<E> m{reinterpret_cast<E*>(memory), swizzle};
      memory += rows * swizzle.chunks * kChunkBytes;
      return m;
    };
    k = take(kKeys, a.stages.k);
    v = take(kKeys, a.stages.v);
    q = take(kRows, a.stages.k);
    dout = take(kRows, a.stages.v);
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) dk[n][i] = dv[n][i] = 0;
    }
  }

  __device__ __forceinline__ static int key_warp() { return warp() % kKeyWarps; }
  __device__ __forceinline__ static int part() { return warp() / kKeyWarps; }

  __device__ __forceinline__ bool holds(const PlanSegment& s) const {
    return s.begin < first_key + keys && s.begin + s.length > first_key;
  }

  __device__ __forceinline__ void run() {
    const auto slot = [&](int i) { return p.plan.slots[first_key + i]; };
    bool met = false;
    if (threadIdx.x < kKeys) shared.used[threadIdx.x] = 0;
    const int32_t tasks = p.plan.counts[kNumTasks];
    for (int32_t base = 0; base < tasks; base += kThreads) {
      const int listed = list_tasks(shared.list, base, tasks, [&](int32_t index) {
        const PlanTask& t = p.plan.task[index];
        if (t.kv_head >= 0 && t.kv_head != kv_head) return false;
        for (int32_t i = t.item_begin; i < t.item_end; ++i) {
          const PlanItem& item = p.plan.item[i];
          for (int32_t s = item.segment_begin; s < item.segment_end; ++s) {
            if (holds(p.plan.segment[s])) return true;
          }
        }
        return false;
      });
      for (int i = 0; i < listed; ++i) {
        if (!met) {
          // Slots that no item names may hold anything: they are copied only where somebody met the tile, and
          // only if they are rows of K.
          const auto row = [&](const Source<E>& x, int r) -> const E* {
            const int32_t at = r < keys ? slot(r) : -1;
            return at >= 0 && at < p.num_slots ? x.row(at, kv_head) : nullptr;
          };
          copy_rows(k, kKeys, a.k.width, a.k.by_chunks, a.k.data, [&](int r) { return row(a.k, r); });
          copy_rows(v, kKeys, a.v.width, a.v.by_chunks, a.v.data, [&](int r) { return row(a.v, r); });
          ptx::commit_copies();
          met = true;
        }
        const PlanTask& t = p.plan.task[shared.list.task[i]];
        for (int32_t item = t.item_begin; item < t.item_end; ++item) run_item(p.plan.item[item]);
      }
    }
    if (!met) return;
    ptx::wait_for_copies<0>();  // of K and V, if no query came to wait for them
    write();
  }

  // Which of the tile's keys the item holds, and who sees them; false if it holds none.
  __device__ __forceinline__ bool find_keys(const PlanItem& item) {
    const int mine = first_key + static_cast<int>(threadIdx.x);
    Key key = kNoKey;
    bool found = false;
    for (int32_t base = item.segment_begin; base < item.segment_end; base += kLanes) {
      const int32_t s = base + lane();
      uint32_t candidates = ballot(s < item.segment_end && holds(p.plan.segment[s]));
      for (; candidates != 0; candidates &= candidates - 1) {
        found = true;
        const PlanSegment segment = p.plan.segment[base + __ffs(static_cast<int>(candidates)) - 1];
        const int i = mine - segment.begin;
        if (i >= 0 && i < segment.length)
          key = {1, segment.lo + i * segment.step, segment.hi, segment.depth + i};
      }
    }
    if (found && threadIdx.x < kKeys) {
      shared.key[threadIdx.x] = key;
      if (key.slot != 0) shared.used[threadIdx.x] = 1;
    }
    return found;
  }

  __device__ __forceinline__ void run_item(const PlanItem& item) {
    __syncthreads();  // the item before is done with
    if (!find_keys(item)) return;
    __syncthreads();
    // the positions between which somebody sees one of the keys
    int lo = INT32_MAX, hi = INT32_MIN;
    for (int i = lane(); i < kKeys; i += kLanes) {
      lo = min(lo, shared.key[i].lo);
      hi = max(hi, shared.key[i].hi);
    }
    lo = group_min(lo);
    hi = group_max(hi);
    const RowOf at{item.query_begin, a.group};
    const int rows = (item.query_end - item.query_begin) * a.group;
    for (int first = 0; first < rows; first += kRows) {
      const int count = min(kRows, rows - first);
      const int32_t least = p.plan.query_pos[at.query(first)],
                    most = p.plan.query_pos[at.query(first + count - 1)];
      if (most < lo || least >= hi) continue;
      copy_query_rows(q, kRows, a.q, p.plan, at, first, count, kv_head);
      copy_query_rows(dout, kRows, a.dout, p.plan, at, first, count, kv_head);
      ptx::commit_copies();
      put_rows(at, first, count);
      ptx::wait_for_copies<0>();
      __syncthreads();
#pragma unroll 1
      for (int row = part() * kWarpRows; row < (part() + 1) * kWarpRows; row += kStep) {
        if (row < count) meet(row, least, most, count);
      }
      __syncthreads();
    }
  }

  __device__ __forceinline__ void put_rows(RowOf at, int first, int count) {
    if (threadIdx.x >= kRows) return;
    const auto r = static_cast<int>(threadIdx.x);
    RowState state{INT32_MIN, 0, INFINITY, 0};
    if (r < count) {
      const int row = at.begin * a.group + first + r;
      const int32_t query = row / a.group;
      const int64_t index = state_index(a, row, kv_head);
      state = {p.plan.query_pos[query], p.plan.query_depth[query], log2_lse(a.lse[index]), a.delta[index]};
    }
    shared.row[r] = state;
  }

  // This warp's keys meet kStep rows, whose positions are in [least, most].
  __device__ __forceinline__ void meet(int first_row, int32_t least, int32_t most, int count) {
    const int window = a.logits.window, key0 = key_warp() * 16;
    Key key[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) key[i] = load(&shared.key[key0 + fragment_row() + 8 * i]);
    if (!any((key[0].lo <= most && key[0].hi > least) || (key[1].lo <= most && key[1].hi > least))) return;
    const bool everything = all(window == 0 && first_row + kStep <= count && key[0].lo <= least &&
                                key[0].hi > most && key[1].lo <= least && key[1].hi > most);
    float weight[kN][4], ds[kN][4];
    Math::multiply_rows(weight, k, key0, q, first_row);
    Math::multiply_rows(ds, v, key0, dout, first_row);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const RowState row = load(&shared.row[first_row + 8 * n + fragment_column() + e]);
        const QueryRow seen{0, row.pos, row.depth};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float slope;
          float& w = weight[n][2 * i + e];
          float& gradient = ds[n][2 * i + e];
          const bool sees = everything || seen.sees(key[i], window);
          w = sees ? ptx::ex2(a.logits(w, slope) - row.lse) : 0.0f;
          gradient = sees ? w * (gradient - row.delta) * slope : 0.0f;
        }
      }
    }
    Math::accumulate_rows(dv, weight, dout, first_row, a.v.width - first_column, first_column);
    Math::accumulate_rows(dk, ds, q, first_row, a.k.width - first_column, first_column);
  }

  __device__ __forceinline__ void write() {
    float* memory = reinterpret_cast<float*>(shared.tiles);
    const auto put = [&](E* to, int width, const float (&sums)[kColumns / 8][4]) {
      write_sums<kColumns, kParts>(
          memory, sums, min(kColumns, width - first_column), [&](int i, int x, float value) {
            if (shared.used[i] == 0) return;
            const int64_t slot = p.plan.slots[first_key + i];
            to[(slot * p.num_kv_heads + kv_head) * width + first_column + x] = narrow<E>(value);
          });
    };
    put(a.dk, p.head_dim, dk);
    put(a.dv, p.v_head_dim, dv);
  }
};

template <class Math, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 64 ? 2 : 1)
    attend_dkv_kernel(const __grid_constant__ BackwardProblem<typename Math::Element> a) {
  constexpr int kKeys = kTileKeys<typename Math::Element>;
  const AttendParams& p = a.p;
  const auto part = static_cast<int>(blockIdx.x % a.column_parts);
  const auto kv_head = static_cast<int>(blockIdx.x / a.column_parts % p.num_kv_heads);
  const auto first = static_cast<int>(blockIdx.x / (a.column_parts * p.num_kv_heads)) * kKeys;
  KeyGradient<Math, kColumns>(a, kv_head, first, min(kKeys, p.plan.num_places - first), part * kColumns)
      .run();
}

// ---- launches

size_t bytes_of(const Swizzle& swizzle, int rows) {
  return static_cast<size_t>(rows) * swizzle.chunks * kChunkBytes;
}

template <class E>
dim3 blocks_of(const BackwardProblem<E>& a, int64_t tiles) {
  return dim3(static_cast<unsigned>(tiles * a.p.num_kv_heads * a.column_parts));
}

template <class Math, int kColumns>
void launch_queries(BackwardProblem<typename Math::Element> a, const LaunchContext& context) {
  using E = typename Math::Element;
  constexpr int kRows = 16 * kWarps;
  const int64_t tiles = (int64_t{a.p.plan.num_queries} * a.group + kRows - 1) / kRows;
  if (tiles == 0) return;
  size_t bytes = 0;
  for (int& stages = a.stages.count; stages > 0; --stages) {
    bytes = bytes_of(a.stages.k, kRows) + bytes_of(a.stages.v, kRows) +
            static_cast<size_t>(stages * a.stages.stage_offset);
    bytes = sizeof(QueryShared<E>) + std::max(bytes, kSumBytes<kColumns>);
    if (bytes <= shared_limit()) break;
  }
  require_shared(bytes, a.p);
  a.column_parts = (a.p.head_dim + kColumns - 1) / kColumns;
  launch("attend_dq", &attend_dq_kernel<Math, kColumns>, blocks_of(a, tiles), dim3(kThreads), bytes, context,
         a);
}

template <class Math, int kColumns>
void launch_keys(BackwardProblem<typename Math::Element> a, const LaunchContext& context) {
  using E = typename Math::Element;
  constexpr int kKeys = kTileKeys<E>;
  const int64_t tiles = (int64_t{a.p.plan.num_places} + kKeys - 1) / kKeys;
  if (tiles == 0) return;
  const size_t matrices = 2 * (bytes_of(a.stages.k, kKeys) + bytes_of(a.stages.v, kKeys));
  const size_t bytes = sizeof(KeyShared<E>) + std::max(matrices, kSumBytes<kColumns>);
  require_shared(bytes, a.p);
  a.column_parts = (std::max(a.p.head_dim, a.p.v_head_dim) + kColumns - 1) / kColumns;
  launch("attend_dkv", &attend_dkv_kernel<Math, kColumns>, blocks_of(a, tiles), dim3(kThreads), bytes,
         context, a);
}

template <class Math>
void launch_backward(const AttendBackwardParams& b, const LaunchContext& context) {
  using E = typename Math::Element;
  const AttendParams& p = b.forward;
  const int64_t groups = int64_t{p.plan.num_queries} * p.num_q_heads;
  if (groups > 0) {
    launch("attend_delta", &attend_delta_kernel<E>,
           dim3(static_cast<unsigned>((groups + kWarps - 1) / kWarps)), dim3(kThreads), 0, context, b);
  }
  if (b.sink_sums != nullptr) {
    launch("attend_dsinks", &attend_dsinks_kernel, dim3(static_cast<unsigned>(p.num_q_heads)), dim3(kLanes),
           0, context, b);
  }
  BackwardProblem<E> a{};
  a.p = p;
  a.q = source_of<E>(p.q, p.head_dim);
  a.k = source_of<E>(p.k, p.head_dim);
  a.v = source_of<E>(p.v, p.v_head_dim);
  a.dout = source_of<E>(b.dout, p.v_head_dim);
  a.lse = static_cast<const float*>(p.lse);
  a.delta = static_cast<const float*>(b.delta);
  a.dq = static_cast<E*>(b.dq);
  a.dk = static_cast<E*>(b.dk);
  a.dv = static_cast<E*>(b.dv);
  a.logits = Logits::of(p);
  a.stages = Stages::of<E>(p);
  a.group = p.num_q_heads / p.num_kv_heads;
  // Gradients of 128 columns of float, dK and dV both, would not fit the registers.
  constexpr int kKeyColumns = sizeof(E) == 4 ? 64 : 128;
  if (std::max(p.head_dim, p.v_head_dim) <= 64) {
    launch_queries<Math, 64>(a, context);
    launch_keys<Math, 64>(a, context);
  } else {
    launch_queries<Math, 128>(a, context);
    launch_keys<Math, kKeyColumns>(a, context);
  }
}

void attend_backward(const AttendBackwardParams& b, const LaunchContext& context) {
  require_head_dims(b.forward);
  with_math(b.forward.dtype, [&]<class Math>(Math) { launch_backward<Math>(b, context); });
}

const Registration<&attend_backward> registration("attend_backward");

}  // namespace

}  // namespace palmette::gpu
