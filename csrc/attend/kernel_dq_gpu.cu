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

template <class Math, int kColumns>
struct QueryGradient {
  using E = typename Math::Element;
  static constexpr int kKeys = kTileKeys<E>, kStep = 32, kN = kStep / 8, kRows = 16 * kWarps;
  static constexpr int kValues = kColumns / kLanes;  // of a lane, of a row that is written

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
      const int64_t index = state_index(a, RowOf{0, a.group}, first + r, kv_head);
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
        const KeyRange range{t.item_begin, t.item_end, query_begin, query_end, a.logits.window, false};
        for_each_tile(shared.ring, stages, a.stages, p.plan, range, a.k, a.v, kv_head,
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
                              gradient_of(r)[x] = narrow<E>(value);
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
      bad[i] = x < columns && !is_finite(widen(gradient_of(r)[x]));
      some_bad |= bad[i];
    }
    const int64_t state = state_index(a, RowOf{0, a.group}, first + r, kv_head);
    const float row_lse = log2_lse(a.lse[state]), row_delta = a.delta[state];
    if (row_lse != row_lse || !is_finite(row_delta) || !any(some_bad)) return;  // NaN it is

    const QueryRow seen = query_row(p.plan, (first + r) / a.group);
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
    for (int32_t t = 0; t < p.plan.counts[kNumTasks]; ++t) {
      const PlanTask& task = p.plan.task[t];
      const bool mine = seen.query >= task.query_begin && seen.query < task.query_end;
      if (mine && (task.kv_head < 0 || task.kv_head == kv_head))
        for_each_key_by_lanes(p.plan, task.item_begin, task.item_end, seen, a.logits.window, meet);
    }
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (bad[i]) gradient_of(r)[lane() + kLanes * i] = narrow<E>(total[i]);
    }
  }

  __device__ __forceinline__ E* gradient_of(int r) const {
    return a.dq + state_index(a, RowOf{0, a.group}, first + r, kv_head) * p.head_dim + first_column;
  }
};

template <class Math, int kColumns>
__global__ void __launch_bounds__(kThreads, 2)
    attend_dq_kernel(const __grid_constant__ BackwardProblem<typename Math::Element> a) {
  using E = typename Math::Element;
  const AttendParams& p = a.p;
  if (!plan_fits(p)) {
    const Strided dq{a.dq, int64_t{p.num_q_heads} * p.head_dim, p.head_dim};
    return fill_nan<E>(dq, p.plan.num_queries, p.num_q_heads, p.head_dim);
  }
  const BlockOf block(a);
  const int first = block.tile * 16 * kWarps, rows = p.plan.num_queries * a.group,
            column = block.part * kColumns;
  if (first >= rows || column >= p.head_dim) return;
  QueryGradient<Math, kColumns>(a, block.kv_head, first, min(16 * kWarps, rows - first), column).run();
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
  launch("attend_dq", &attend_dq_kernel<Math, kColumns>, a.blocks(tiles), dim3(kThreads), bytes, context, a);
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
