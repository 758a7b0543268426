// SPDX-License-Identifier: Apache-2.0
// dK and dV of attend on the GPU (equations in backward_gpu.cuh).
//
// Data flow. A block of four warps owns a tile of keys of one KV head; the queries of all items that hold one
// of the keys stream past:
//
//   K, V --cp.async--> shared memory, once, if any item holds a key of the tile
//   q, dO --cp.async--> shared memory, a tile of rows at a time
//   K Q^T, V dO^T --multiply_rows--> S^T, dP^T in registers -> P^T, dS^T --accumulate_rows--> dV, dK -> dv,
//   dk
//
// A tile is 64 (32 in float) neighbours in `slots`, not in depth-first order; where two of them name the same
// slot, its gradient is wrong: slots must be distinct, which tree_attention sees to. Gradients of more than
// kColumns columns are computed in parts, each of which computes S and dP again.
//
// The products multiply what a query does not see by a weight of 0. So NaN or inf in q or dO reaches all keys
// of a tile that it meets, seen or not.
#include <algorithm>

#include "attend/backward_gpu.cuh"

namespace palmette::gpu {

namespace {

// What a row of queries brings besides q and dO; `pos` is of nobody where there is no such row.
struct alignas(16) RowState {
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
    const RowOf at{item.query_begin, a.group, p.plan.item_query};
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
      const int32_t query = at.query(first + r);
      const int64_t index = state_index(a, at, first + r, kv_head);
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
  using E = typename Math::Element;
  const AttendParams& p = a.p;
  if (!plan_fits(p)) {
    const auto contiguous = [&](E* data, int width) {
      return Strided{data, int64_t{p.num_kv_heads} * width, width};
    };
    fill_nan<E>(contiguous(a.dk, p.head_dim), p.num_slots, p.num_kv_heads, p.head_dim);
    fill_nan<E>(contiguous(a.dv, p.v_head_dim), p.num_slots, p.num_kv_heads, p.v_head_dim);
    return;
  }
  const BlockOf block(a);
  const int first = block.tile * kTileKeys<E>;
  KeyGradient<Math, kColumns>(a, block.kv_head, first, min(kTileKeys<E>, p.plan.num_places - first),
                              block.part * kColumns)
      .run();
}

template <class Math, int kColumns>
void launch_columns(const AttendBackwardParams& b, const LaunchContext& context) {
  using E = typename Math::Element;
  constexpr int kKeys = kTileKeys<E>;
  auto a = BackwardProblem<E>::of(b);
  const int64_t tiles = (int64_t{a.p.plan.num_places} + kKeys - 1) / kKeys;
  if (tiles == 0) return;
  const size_t matrices = 2 * (bytes_of(a.stages.k, kKeys) + bytes_of(a.stages.v, kKeys));
  const size_t bytes = sizeof(KeyShared<E>) + std::max(matrices, kSumBytes<kColumns>);
  require_shared(bytes, a.p);
  a.column_parts = (std::max(a.p.head_dim, a.p.v_head_dim) + kColumns - 1) / kColumns;
  launch("attend_dkv", &attend_dkv_kernel<Math, kColumns>, a.blocks(tiles), dim3(kThreads), bytes, context,
         a);
}

}  // namespace

void launch_dkv(const AttendBackwardParams& b, const LaunchContext& context) {
  with_math(b.forward.dtype, [&]<class Math>(Math) {
    // dK and dV of 128 columns of float, both, would not fit the registers.
    constexpr int kMost = sizeof(typename Math::Element) == 4 ? 64 : 128;
    if (std::max(b.forward.head_dim, b.forward.v_head_dim) <= 64) {
      launch_columns<Math, 64>(b, context);
    } else {
      launch_columns<Math, kMost>(b, context);
    }
  });
}

}  // namespace palmette::gpu
