// SPDX-License-Identifier: Apache-2.0
// dQ of attend on the GPU (equations in backward_gpu.cuh).
//
// Data flow. A block of four warps owns 64 rows of one KV head's queries and walks the keys of all tasks that
// touch them, as the forward pass does:
//
//   q, dO --cp.async--> shared memory, once
//   K, V --cp.async--> shared memory, a stage ahead
//   Q K^T, dO V^T --multiply_rows--> S, dP in registers -> dS --accumulate_rows--> dQ in registers -> dq
//
// In a plan by blocks the 64 rows are those of a task, whose one item is all that they meet; what comes of it
// is a part of dQ, and attend_dq_add adds up the parts of each row in the order of its choices.
//
// Gradients of more than kColumns columns are computed in parts, each of which computes S and dP again. A
// row whose gradient is not finite is computed once more, key by key, as in the forward pass.
#include <algorithm>

#include "attend/backward_gpu.cuh"

namespace palmette::gpu {

namespace {

template <class E>
struct QueryShared {
  KeyRing<E> ring;
  TaskList list;
  alignas(1024) unsigned char tiles[16];  // Q and dO, then stages of K and V; at the end dQ
};

template <class Math, int kColumns, bool kByBlocks>
struct QueryGradient {
  using E = typename Math::Element;
  static constexpr int kKeys = kTileKeys<E>, kStep = 32, kN = kStep / 8, kRows = 16 * kWarps;
  static constexpr int kValues = kColumns / kLanes;  // of a lane, of a row that is written

  const BackwardProblem<E>& a;
  const AttendParams& p;
  const PlanTask* const task;  // of a plan by blocks
  const RowOf at;
  const int kv_head, first, count, first_column;
  QueryShared<E>& shared;
  QueryRow row[2];
  float lse[2], delta[2], dq[kColumns / 8][4];

  __device__ __forceinline__ QueryGradient(const BackwardProblem<E>& problem, const PlanTask* of_task,
                                           int head, int first_row, int rows, int column)
      : a(problem),
        p(problem.p),
        task(of_task),
        at(kByBlocks ? RowOf{of_task->query_begin, a.group, p.plan.item_query} : RowOf{0, a.group}),
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
      row[i] = query_row(p.plan, at.query(first + r));
      const int64_t index = state_index(a, at, first + r, kv_head);
      lse[i] = log2_lse(a.lse[index]);
      delta[i] = a.delta[index];
    }
#pragma unroll
    for (int n = 0; n < kColumns / 8; ++n) dq[n][0] = dq[n][1] = dq[n][2] = dq[n][3] = 0;
  }

  __device__ __forceinline__ void run() {
    const int32_t query_begin = at.query(first), query_end = at.query(first + count - 1) + 1;
    const Matrix<E> q{reinterpret_cast<E*>(shared.tiles), a.stages.k};
    unsigned char* after_q = shared.tiles + kRows * a.stages.k.chunks * kChunkBytes;
    const Matrix<E> dout{reinterpret_cast<E*>(after_q), a.stages.v};
    unsigned char* stages = after_q + kRows * a.stages.v.chunks * kChunkBytes;
    copy_query_rows(q, kRows, a.q, p.plan, at, first, count, kv_head);
    copy_query_rows(dout, kRows, a.dout, p.plan, at, first, count, kv_head);
    ptx::commit_copies();
    const auto walk = [&](const PlanTask& t) {
      const KeyRange range{t.item_begin, t.item_end, query_begin, query_end, a.logits.window, kByBlocks};
      for_each_tile(shared.ring, stages, a.stages, p.plan, range, a.k, a.v, kv_head,
                    [&](const TileSpan& span, const Key* keys, const Matrix<E>& k, const Matrix<E>& v) {
                      meet(q, dout, span, keys, k, v);
                    });
    };
    const int32_t tasks = kByBlocks ? 0 : p.plan.counts[kNumTasks];
    if (kByBlocks) walk(*task);
    for (int32_t base = 0; base < tasks; base += kThreads) {
      const int listed = list_tasks(shared.list, base, tasks, [&](int32_t index) {
        const PlanTask& t = p.plan.task[index];
        return (t.kv_head < 0 || t.kv_head == kv_head) && t.query_begin < query_end &&
               t.query_end > query_begin;
      });
      for (int i = 0; i < listed; ++i) walk(p.plan.task[shared.list.task[i]]);
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
      const Key* step_keys = keys + first_key;
      if (a.logits.cap > 0) {
        weigh<true, true>(s, ds, step_keys, named);
      } else if (everything) {
        weigh<false, false>(s, ds, step_keys, named);
      } else {
        weigh<false, true>(s, ds, step_keys, named);
      }
      Math::accumulate_rows(dq, ds, k, first_key, a.k.width - first_column, first_column);
    }
  }

  // dP becomes dS; kMasked: not all rows see all keys.
  template <bool kCapped, bool kMasked>
  __device__ __forceinline__ void weigh(const float (&s)[kN][4], float (&ds)[kN][4], const Key* keys,
                                        const bool (&named)[2]) const {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        Key key = kNoKey;
        if (kMasked) key = load(keys + 8 * n + fragment_column() + e);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          float slope;
          const float weight = ptx::ex2(logit_of<kCapped>(a, s[n][2 * i + e], slope) - lse[i]);
          const bool seen = !kMasked || (named[i] && row[i].sees(key, a.logits.window));
          float& gradient = ds[n][2 * i + e];
          gradient = seen ? weight * (gradient - delta[i]) * slope : 0.0f;
        }
      }
    }
  }

  __device__ __forceinline__ void write() {
    const int columns = min(kColumns, p.head_dim - first_column);
    bool bad = false;
    write_sums<kColumns, 1>(reinterpret_cast<float*>(shared.tiles), dq, columns,
                            [&](int r, int x, float value) {
                              if (r >= count) return;
                              bad |= !is_finite(value);
                              put(r, x, value);
                            });
    if (!any(bad)) return;
    for (int r = warp(); r < count; r += kWarps) write_carefully(r, columns);
  }

  // A weight of exactly 0 contributes nothing, even times inf or NaN: where K has made columns of a row inf
  // or NaN, they are computed key by key. This lane has written the columns that it looks at.
  __device__ __forceinline__ void write_carefully(int r, int columns) const {
    bool bad[kValues] = {}, some_bad = false;
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int x = lane() + kLanes * i;
      bad[i] = x < columns && !is_finite(written(r, x));
      some_bad |= bad[i];
    }
    const int64_t state = state_index(a, at, first + r, kv_head);
    const float row_lse = log2_lse(a.lse[state]), row_delta = a.delta[state];
    if (row_lse != row_lse || !is_finite(row_delta) || !any(some_bad)) return;  // NaN it is

    const QueryRow seen = query_row(p.plan, at.query(first + r));
    const int64_t query = p.plan.query_index[seen.query];
    const int head = kv_head * a.group + (first + r) % a.group;
    float total[kValues] = {};
    const auto meet = [&](const Key& key, bool sees) {
      float ds = 0, slope;
      if (sees) {
        const float product = dot(a.q.row(query, head), a.k.row(key.slot, kv_head), p.head_dim);
        const float weight = ptx::ex2(a.logits(product, slope) - row_lse);
        const float dp = dot(a.dout.row(query, head), a.v.row(key.slot, kv_head), p.v_head_dim);
        if (weight != 0) ds = weight * (dp - row_delta) * slope;
      }
      add_rows_of_lanes(total, ds, key.slot, a.k, kv_head, first_column, columns);
    };
#pragma unroll 1
    for (int32_t i = 0; i < (kByBlocks ? 1 : p.plan.counts[kNumTasks]); ++i) {
      const PlanTask& t = kByBlocks ? *task : p.plan.task[i];
      const bool mine = kByBlocks || (seen.query >= t.query_begin && seen.query < t.query_end &&
                                      (t.kv_head < 0 || t.kv_head == kv_head));
      if (mine) for_each_key_by_lanes(p.plan, t.item_begin, t.item_end, seen, a.logits.window, meet);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (bad[i]) put(r, lane() + kLanes * i, total[i]);
    }
  }

  // Row r's gradient, or its part: column x of those from first_column on.
  __device__ __forceinline__ void put(int r, int x, float value) const {
    if (kByBlocks) {
      part_of(r)[x] = value;
    } else {
      gradient_of(r)[x] = narrow<E>(value);
    }
  }
  __device__ __forceinline__ float written(int r, int x) const {
    return kByBlocks ? part_of(r)[x] : widen(gradient_of(r)[x]);
  }
  __device__ __forceinline__ E* gradient_of(int r) const {
    return a.dq + state_index(a, at, first + r, kv_head) * p.head_dim + first_column;
  }
  __device__ __forceinline__ float* part_of(int r) const {
    return a.part_dq + place_of_row(p, *task, first + r) * p.head_dim + first_column;
  }
};

template <class Math, int kColumns, bool kByBlocks>
__global__ void __launch_bounds__(kThreads, 2)
    attend_dq_kernel(const __grid_constant__ BackwardProblem<typename Math::Element> a) {
  using E = typename Math::Element;
  const AttendParams& p = a.p;
  if (!plan_fits(p)) {
    const Strided dq{a.dq, int64_t{p.num_q_heads} * p.head_dim, p.head_dim};
    return fill_nan<E>(dq, p.plan.num_queries, p.num_q_heads, p.head_dim);
  }
  if constexpr (kByBlocks) {
    const auto index = static_cast<int32_t>(blockIdx.x) / a.column_parts;
    const int part = static_cast<int>(blockIdx.x) % a.column_parts * kColumns;
    if (index >= p.plan.counts[kNumTasks]) return;
    const PlanTask& task = p.plan.task[index];
    const int of_task = (task.query_end - task.query_begin) * a.group;
    if (task.kv_head < p.head_begin || task.kv_head >= p.head_begin + p.head_count) return;
#pragma unroll 1
    for (int from = 0; from < of_task; from += 16 * kWarps) {
      QueryGradient<Math, kColumns, true>(a, &task, task.kv_head, from, min(16 * kWarps, of_task - from),
                                          part)
          .run();
      __syncthreads();
    }
  } else {
    const BlockOf block(a);
    const int first = block.tile * 16 * kWarps, rows = p.plan.num_queries * a.group,
              column = block.part * kColumns;
    if (first >= rows || column >= p.head_dim) return;
    QueryGradient<Math, kColumns, false>(a, nullptr, block.kv_head, first, min(16 * kWarps, rows - first),
                                         column)
        .run();
  }
}

// The parts of a row of a query, of a plan by blocks, by a group of lanes.
template <class E>
__global__ void __launch_bounds__(kThreads)
    attend_dq_add_kernel(const __grid_constant__ BackwardProblem<E> a) {
  const AttendParams& p = a.p;
  const int heads = p.head_count * a.group;
  const int64_t index = int64_t{blockIdx.x} * kWarps + warp(), query = index / heads;
  if (query >= p.plan.num_queries || !plan_fits(p)) return;
  const int head = p.head_begin * a.group + static_cast<int>(index % heads);
  E* dq = a.dq + (p.plan.query_index[query] * int64_t{p.num_q_heads} + head) * p.head_dim;
  for (int x = lane(); x < p.head_dim; x += kLanes) {
    float sum = 0;
#pragma unroll 4
    for (int i = 0; i < p.plan.choices; ++i) {
      const int64_t at = place_of_choice(p, query, head, i);
      if (at >= 0) sum += a.part_dq[at * p.head_dim + x];
    }
    dq[x] = narrow<E>(sum);
  }
}

template <class Math, int kColumns>
void launch_columns(const AttendBackwardParams& b, const LaunchContext& context) {
  using E = typename Math::Element;
  constexpr int kRows = 16 * kWarps;
  auto a = BackwardProblem<E>::of(b);
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
  if (a.p.plan.choices == 0)
    return launch("attend_dq", &attend_dq_kernel<Math, kColumns, false>, a.blocks(tiles), dim3(kThreads),
                  bytes, context, a);
  in_turns(a.p, [&] {
    const auto blocks = static_cast<unsigned>(a.p.plan.num_tasks * a.column_parts);
    if (blocks > 0)
      launch("attend_dq", &attend_dq_kernel<Math, kColumns, true>, dim3(blocks), dim3(kThreads), bytes,
             context, a);
    const int64_t rows = int64_t{a.p.plan.num_queries} * a.p.head_count * a.group;
    launch("attend_dq_add", &attend_dq_add_kernel<E>,
           dim3(static_cast<unsigned>((rows + kWarps - 1) / kWarps)), dim3(kThreads), 0, context, a);
  });
}

}  // namespace

void launch_dq(const AttendBackwardParams& b, const LaunchContext& context) {
  with_math(b.forward.dtype, [&]<class Math>(Math) {
    if (std::max(b.forward.head_dim, b.forward.v_head_dim) <= 64) {
      launch_columns<Math, 64>(b, context);
    } else {
      launch_columns<Math, 128>(b, context);
    }
  });
}

}  // namespace palmette::gpu
