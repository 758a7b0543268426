// SPDX-License-Identifier: Apache-2.0
// The gradient of attend on the CPU.
//
//   P = exp(S - lse),  D_i = sum(dO_i * O_i) - dlse_i,  dP = dO V^T,  dS = scale P * (dP - D)
//   dQ = dS K,   dK = dS^T Q,   dV = P^T dO,   dsink_h = -sum_i exp(sink_h - lse_i) D_i
//
// One worker owns a KV head (or a head and one of a few groups of query tiles with a dK, dV copy of their
// own), so all three gradients accumulate in place, in the plan's order: no atomics, five products instead of
// the seven of a separate pass per output, and the same bits for any number of threads.
//
// Data flow of a task: Q, dO --pack--> lanes (for S, dP) and rows (for dK, dV); then per key tile and group
// of kGroupRows rows
//
//   S, dP [keys][rows] (rows in lanes) -> P, dS -> dQ += K^T dS (rows in lanes)
//                                               -> dV += P dO, dK += dS Q (head_dim in lanes)
//
// Where items name their queries one by one, the rows of the task lie side by side in scratch (Q, dO, dQ),
// and the data flow is that of an item's rows, kListedRows of them at a time.

#include <cmath>

#include "attend/block_cpu.h"
#include "core/parallel.h"
#include "core/workspace.h"

namespace palmette::PALMETTE_ISA_NS {

namespace {

constexpr int kTileKeys = 64;
constexpr int kListedRows = 256;

template <class S>
struct Backward {
  using T = typename S::Scalar;
  using Int = typename S::Int;
  using V = typename S::V;
  using B = BlockShape<S, 2, 1>;
  static constexpr int N = S::kLanes, W = B::kWidth;
  static constexpr int kGroupBlocks = 64 / W > 0 ? 64 / W : 1;
  static constexpr int kGroupRows = kGroupBlocks * W;

  const AttendBackwardParams& b;
  const AttendParams& p;
  const int group;
  const int64_t d_pad, dv_pad;
  T *q_lanes, *do_lanes, *dq_lanes;        // [blocks][d_pad][W]
  T *q_rows, *do_rows;                     // [rows][d_pad]
  T *task_q, *task_do, *task_dq;           // [rows of the task][d_pad]: where items name their queries
  T *task_lse, *task_delta;                // [rows of the task], log2 units / D_i
  T *lse, *delta;                          // [rows]: of those that are packed
  Int *pos, *depth;                        // [rows]: of the query, or of no query for this item
  T *k_tile, *v_tile, *dk_tile, *dv_tile;  // [kTileKeys][...]
  T *prob, *dscore;                        // [kTileKeys][kGroupRows]
  KeyTile* tile;
  int64_t rows_capacity;

  explicit Backward(const AttendBackwardParams& params)
      : b(params),
        p(params.forward),
        group(p.num_q_heads / p.num_kv_heads),
        d_pad((p.head_dim + W - 1) / W * W),
        dv_pad((p.v_head_dim + W - 1) / W * W) {}

  char* layout(char* at, int64_t rows) {
    const bool listed = p.plan.item_query != nullptr;
    const int64_t most = kListedRows > group ? kListedRows : group;
    rows_capacity = ((listed && rows > most ? most : rows) + kGroupRows - 1) / kGroupRows * kGroupRows;
    take(at, q_lanes, rows_capacity * d_pad);
    take(at, do_lanes, rows_capacity * dv_pad);
    take(at, dq_lanes, rows_capacity * d_pad);
    take(at, q_rows, rows_capacity * d_pad);
    take(at, do_rows, rows_capacity * dv_pad);
    take(at, task_q, listed ? rows * d_pad : 0);
    take(at, task_do, listed ? rows * dv_pad : 0);
    take(at, task_dq, listed ? rows * d_pad : 0);
    take(at, task_lse, rows);
    take(at, task_delta, rows);
    take(at, lse, rows_capacity);
    take(at, delta, rows_capacity);
    take(at, pos, rows_capacity);
    take(at, depth, rows_capacity);
    take(at, k_tile, kTileKeys * packed_stride<S>(p.head_dim));
    take(at, v_tile, kTileKeys * packed_stride<S>(p.v_head_dim));
    take(at, dk_tile, kTileKeys * d_pad);
    take(at, dv_tile, kTileKeys * dv_pad);
    take(at, prob, kTileKeys * kGroupRows);
    take(at, dscore, kTileKeys * kGroupRows);
    take(at, tile, 1);
    return at;
  }

  template <class E>
  static void copy_row(T* dst, const E* src, int d, int64_t padded) {
    int x = 0;
    for (; x + N <= d; x += N) S::store(dst + x, S::load(src + x));
    if (x < d) {
      S::store(dst + x, S::load_n(src + x, d - x));
      x += N;
    }
    for (; x < padded; x += N) S::store(dst + x, S::zero());
  }

  // lse and D of a task's rows, and the gradient of the sinks.
  template <class E>
  void find_deltas(const PlanTask& task, int kv_head) {
    const int rows = (task.query_end - task.query_begin) * group;
    for (int r = 0; r < rows; ++r) {
      const int64_t j = p.plan.query_index[task.query_begin + r / group];
      const int head = kv_head * group + r % group;
      const E* out = static_cast<const E*>(p.out.data) + j * p.out.token + head * p.out.head;
      const E* dout = static_cast<const E*>(b.dout.data) + j * b.dout.token + head * b.dout.head;
      V sum = S::zero();
      int x = 0;
      for (; x + N <= p.v_head_dim; x += N) sum += S::load(out + x) * S::load(dout + x);
      if (x < p.v_head_dim)
        sum += S::load_n(out + x, p.v_head_dim - x) * S::load_n(dout + x, p.v_head_dim - x);
      const int64_t stat = j * p.num_q_heads + head;
      const T l = static_cast<const T*>(p.lse)[stat];
      task_lse[r] = l == -T(INFINITY) ? T(INFINITY) : l * T(kLog2e);  // saw no key: P = 0
      task_delta[r] = S::sum(sum) - (b.dlse != nullptr ? static_cast<const T*>(b.dlse)[stat] : T(0));
      if (b.dsinks != nullptr) {
        const T sink = static_cast<const T*>(p.sinks)[head] * T(kLog2e);
        static_cast<T*>(b.dsinks)[stat] = -S::exp2(S::splat(sink - task_lse[r]))[0] * task_delta[r];
      }
    }
  }

  // Rows that are worked on together: r is head r % group of query query(r / group).
  struct Rows {
    const PlanTask& task;
    const int32_t* listed;  // null: all of the task's
    int count, group;

    int32_t query(int64_t r) const {
      return listed == nullptr ? task.query_begin + static_cast<int32_t>(r / group) : listed[r / group];
    }
    int64_t row_of_task(int64_t r) const {
      return (query(r) - task.query_begin) * int64_t{group} + r % group;
    }
  };

  // Where row r is in a tensor of the operator's.
  template <class E>
  const E* row_at(const Strided& x, const Rows& rows, int kv_head, int64_t r) const {
    return static_cast<const E*>(x.data) + p.plan.query_index[rows.query(r)] * x.token +
           (kv_head * group + r % group) * x.head;
  }

  // Q and dO of rows in both layouts, and what is known of them; q_at(r) and do_at(r) point at row r.
  template <class QueryAt, class OutAt>
  void pack(const Rows& rows, QueryAt q_at, OutAt do_at) {
    const T factor = static_cast<T>(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e);
    const int64_t filled = (rows.count + kGroupRows - 1) / kGroupRows * kGroupRows;
    std::memset(dq_lanes, 0, sizeof(T) * static_cast<size_t>(filled * d_pad));
    for (int64_t r = 0; r < filled; ++r) {
      if (r >= rows.count) {  // a row that is not there has P = 0
        lse[r] = T(INFINITY), delta[r] = 0;
        std::memset(q_rows + r * d_pad, 0, sizeof(T) * static_cast<size_t>(d_pad));
        std::memset(do_rows + r * dv_pad, 0, sizeof(T) * static_cast<size_t>(dv_pad));
        continue;
      }
      copy_row(q_rows + r * d_pad, q_at(r), p.head_dim, d_pad);
      copy_row(do_rows + r * dv_pad, do_at(r), p.v_head_dim, dv_pad);
      lse[r] = task_lse[rows.row_of_task(r)], delta[r] = task_delta[rows.row_of_task(r)];
    }
    for (int64_t r = 0; r < filled; r += W) {
      auto count = [&](int64_t left) { return static_cast<int>(left < 0 ? 0 : left < W ? left : W); };
      pack_rows<B, T>(q_lanes + r * d_pad, count(rows.count - r), p.head_dim, factor,
                      [&](int i) { return q_rows + (r + i) * d_pad; });
      pack_rows<B, T>(do_lanes + r * dv_pad, count(rows.count - r), p.v_head_dim, T(1),
                      [&](int i) { return do_rows + (r + i) * dv_pad; });
    }
  }

  // Positions of the item's rows; rows that the item does not name get one that no key can see.
  void set_positions(const Rows& rows, const PlanItem& item, int32_t& min_query_depth) {
    min_query_depth = INT32_MAX;
    for (int r = 0; r < (rows.count + kGroupRows - 1) / kGroupRows * kGroupRows; ++r) {
      const int32_t j = r < rows.count ? rows.query(r) : -1;
      const bool named = j >= 0 && (rows.listed != nullptr || (j >= item.query_begin && j < item.query_end));
      pos[r] = named ? p.plan.query_pos[j] : INT32_MIN;
      depth[r] = named ? p.plan.query_depth[j] : 0;
      if (named && p.plan.query_depth[j] < min_query_depth) min_query_depth = p.plan.query_depth[j];
    }
  }

  BlockRows<S> block_rows(int64_t first) const {
    BlockRows<S> r{pos + first, depth + first, INT32_MAX, INT32_MIN, INT32_MAX, INT32_MIN};
    for (int i = 0; i < W; ++i) {
      const int32_t at = static_cast<int32_t>(r.pos[i]), d = static_cast<int32_t>(r.depth[i]);
      r.min_pos = at < r.min_pos ? at : r.min_pos;
      r.max_pos = at > r.max_pos ? at : r.max_pos;
      r.min_depth = d < r.min_depth ? d : r.min_depth;
      r.max_depth = d > r.max_depth ? d : r.max_depth;
    }
    return r;
  }

  // P and dS of one block into columns [column, column + W) of the group's buffers.
  void block_gradients(const TileView<T>& k, const TileView<T>& v, int64_t first, int column,
                       const BlockRows<S>& rows, Visibility visible) {
    const int n = tile->count;
    T* pr = prob + column;
    T* ds = dscore + column;
    scores<B>(k, n, q_lanes + first * d_pad, p.head_dim, pr, kGroupRows);
    scores<B>(v, n, do_lanes + first * dv_pad, p.v_head_dim, ds, kGroupRows);
    for (int u = 0; u < 2; ++u) {
      const V l = S::load(lse + first + u * N), dl = S::load(delta + first + u * N);
      for (int i = 0; i < n; ++i) {
        T* at = pr + i * kGroupRows + u * N;
        T* dat = ds + i * kGroupRows + u * N;
        V s = S::load(at), slope = S::splat(T(p.scale));
        if (p.softcap > 0) {
          const V th = S::tanh(s);
          slope *= T(1) - th * th;
          s = th * T(p.softcap * kLog2e);
        }
        V w = S::exp2(s - l);
        V g = w * (S::load(dat) - dl) * slope;
        if (visible == Visibility::kSome) {
          const typename S::I see = lanes_that_see<S>(*tile, i, rows, u, p.window);
          w = S::select(see, w, S::zero());
          g = S::select(see, g, S::zero());
        }
        S::store(at, w);
        S::store(dat, g);
      }
    }
  }

  // C[key][d] += sum_r A[key][r] rows[r][d] of `count` rows, head_dim in the lanes.
  static void accumulate_keys(const T* a, int n, const T* rows, int count, int64_t width, T* c) {
    for (int64_t x = 0; x < width; x += W) {
      auto run = [&]<int MR>(std::integral_constant<int, MR>, int i) {
        multiply_block<S, MR, 2, 1, true, Start::kLoad>(a + i * kGroupRows, kGroupRows, rows + x, width,
                                                        c + i * width + x, width, count);
      };
      int i = 0;
      for (; i + 6 <= n; i += 6) run(std::integral_constant<int, 6>{}, i);
      for (; i + 2 <= n; i += 2) run(std::integral_constant<int, 2>{}, i);
      for (; i < n; ++i) run(std::integral_constant<int, 1>{}, i);
    }
  }

  TileView<T> load_tile(const Strided& x, int head, int d, bool in_place, T* buffer) {
    if (in_place && tile->contiguous) {
      return {static_cast<const T*>(x.data) + head * x.head + tile->slot[0] * x.token, x.token};
    }
    const char* rows[kTileKeys];
    point_at_rows(x, p.dtype, head, *tile, rows);
    pack_rows_of_tile<S>(buffer, rows, 0, tile->count, p.dtype, d);
    return {buffer, packed_stride<S>(d)};
  }

  void run_tile(const AttendUnit& unit, int rows, bool in_place_k, bool in_place_v) {
    const int head = unit.head_begin, n = tile->count;
    const auto k = load_tile(p.k, head, p.head_dim, in_place_k, k_tile);
    const auto v = load_tile(p.v, head, p.v_head_dim, in_place_v, v_tile);
    int k_finite = -1;
    bool used = false;
    for (int64_t first = 0; first < rows; first += kGroupRows) {
      Visibility visible[kGroupBlocks];
      BlockRows<S> block[kGroupBlocks];
      bool any = false;
      const int filled =
          rows - first < kGroupRows ? static_cast<int>((rows - first + W - 1) / W) : kGroupBlocks;
      for (int i = 0; i < filled; ++i) {
        block[i] = block_rows(first + i * W);
        visible[i] = tile_visibility<S>(*tile, block[i], p.window);
        any |= visible[i] != Visibility::kNone;
      }
      if (!any) continue;
      if (!used) {
        std::memset(dk_tile, 0, sizeof(T) * static_cast<size_t>(n * d_pad));
        std::memset(dv_tile, 0, sizeof(T) * static_cast<size_t>(n * dv_pad));
        used = true;
      }
      for (int i = 0; i < filled; ++i) {
        const int column = i * W;
        if (visible[i] == Visibility::kNone) {
          for (int key = 0; key < n; ++key) {
            for (int u = 0; u < 2; ++u) {
              S::store(prob + key * kGroupRows + column + u * N, S::zero());
              S::store(dscore + key * kGroupRows + column + u * N, S::zero());
            }
          }
          continue;
        }
        block_gradients(k, v, first + column, column, block[i], visible[i]);
        T* dq = dq_lanes + (first + column) * d_pad;
        if (visible[i] == Visibility::kSome && k_finite < 0) k_finite = tile_is_finite<S>(k, n, p.head_dim);
        if (visible[i] == Visibility::kAll || k_finite == 1) {
          accumulate<B, Start::kLoad>(k, n, dscore + column, kGroupRows, dq, p.head_dim);
        } else {
          accumulate_visible<B, Start::kLoad>(k, n, dscore + column, kGroupRows, dq, p.head_dim);
        }
      }
      accumulate_keys(prob, n, do_rows + first * dv_pad, filled * W, dv_pad, dv_tile);
      accumulate_keys(dscore, n, q_rows + first * d_pad, filled * W, d_pad, dk_tile);
    }
    if (!used) return;
    add_rows(b.dk, b.dk_more, unit, dk_tile, d_pad, p.head_dim);
    add_rows(b.dv, b.dv_more, unit, dv_tile, dv_pad, p.v_head_dim);
  }

  void add_rows(void* first, void* more, const AttendUnit& unit, const T* src, int64_t stride, int d) {
    T* dst = static_cast<T*>(unit.group == 0 ? first : more);
    const int64_t begin = unit.group == 0 ? 0 : int64_t{unit.group - 1} * p.num_slots;
    for (int i = 0; i < tile->count; ++i) {
      T* row = dst + ((begin + tile->slot[i]) * p.num_kv_heads + unit.head_begin) * d;
      for (int x = 0; x < d; ++x) row[x] += src[i * stride + x];
    }
  }

  template <class E>
  void run_task(const PlanTask& task, const AttendUnit& unit) {
    find_deltas<E>(task, unit.head_begin);
    const Rows every{task, nullptr, (task.query_end - task.query_begin) * group, group};
    const auto q_at = [&](int64_t r) { return row_at<E>(p.q, every, unit.head_begin, r); };
    const auto do_at = [&](int64_t r) { return row_at<E>(b.dout, every, unit.head_begin, r); };
    if (p.plan.item_query == nullptr) {
      pack(every, q_at, do_at);
      run_rows(every, task.item_begin, task.item_end, unit);
      // Others of the same rows run on this worker too, before or after: add.
      add_to_rows(every, [&](int64_t r) { return dq_at(every, unit.head_begin, r); });
      return;
    }
    for (int64_t r = 0; r < every.count; ++r) {
      copy_row(task_q + r * d_pad, q_at(r), p.head_dim, d_pad);
      copy_row(task_do + r * dv_pad, do_at(r), p.v_head_dim, dv_pad);
    }
    std::memset(task_dq, 0, sizeof(T) * static_cast<size_t>(every.count * d_pad));
    const int32_t most = kListedRows > group ? kListedRows / group : 1;
    for (int i = task.item_begin; i < task.item_end; ++i) {
      const PlanItem& item = p.plan.item[i];
      for (int32_t first = item.query_begin; first < item.query_end; first += most) {
        const int32_t count = item.query_end - first < most ? item.query_end - first : most;
        const Rows rows{task, p.plan.item_query + first, count * group, group};
        pack(
            rows, [&](int64_t r) { return task_q + rows.row_of_task(r) * d_pad; },
            [&](int64_t r) { return task_do + rows.row_of_task(r) * dv_pad; });
        run_rows(rows, i, i + 1, unit);
        add_to_rows(rows, [&](int64_t r) { return task_dq + rows.row_of_task(r) * d_pad; });
      }
    }
    for (int64_t r = 0; r < every.count; ++r) {
      T* dst = dq_at(every, unit.head_begin, r);
      for (int x = 0; x < p.head_dim; ++x) dst[x] += task_dq[r * d_pad + x];
    }
  }

  T* dq_at(const Rows& rows, int kv_head, int64_t r) const {
    const int64_t j = p.plan.query_index[rows.query(r)];
    return static_cast<T*>(b.dq) + (j * p.num_q_heads + kv_head * group + r % group) * p.head_dim;
  }

  void run_rows(const Rows& rows, int item_begin, int item_end, const AttendUnit& unit) {
    const bool k_in_place = streams_in_place<S>(p.k, p.dtype, p.head_dim);
    const bool v_in_place = streams_in_place<S>(p.v, p.dtype, p.v_head_dim);
    for (int i = item_begin; i < item_end; ++i) {
      int32_t min_query_depth;
      set_positions(rows, p.plan.item[i], min_query_depth);
      KeyCursor cursor(p.plan, p.plan.item[i], p.window, min_query_depth);
      while (cursor.next(*tile, kTileKeys)) run_tile(unit, rows.count, k_in_place, v_in_place);
    }
  }

  // dq of the rows in lanes, onto rows elsewhere: at(r) points at row r.
  template <class At>
  void add_to_rows(const Rows& rows, At at) {
    for (int64_t first = 0; first < rows.count; first += W) {
      const int count = static_cast<int>(rows.count - first < W ? rows.count - first : W);
      T* row[W];
      for (int r = 0; r < count; ++r) row[r] = at(first + r);
      unpack_rows<B>(
          dq_lanes + first * d_pad, count, p.head_dim,
          [&](int r, int x, V value) { S::store(row[r] + x, S::load(row[r] + x) + value); },
          [&](int r, int x, V value, int n) {
            T* dst = row[r] + x;
            S::store_n(dst, S::load_n(dst, n) + value, n);
          });
    }
  }
};

template <class S>
void run(const AttendBackwardParams& p) {
  struct Context {
    const AttendBackwardParams& p;
    int32_t next = 0;
  } ctx{p};
  const AttendParams& f = p.forward;
  run_workers(
      num_workers() < f.num_units ? num_workers() : f.num_units,
      [](void* c, int64_t) {
        using T = typename S::Scalar;
        Context& ctx = *static_cast<Context*>(c);
        const AttendParams& f = ctx.p.forward;
        Backward<S> body(ctx.p);
        char* scratch = static_cast<char*>(thread_workspace(f.scratch_bytes));
        for (;;) {
          const int32_t i = __atomic_fetch_add(&ctx.next, 1, __ATOMIC_RELAXED);
          if (i >= f.num_units) break;
          const AttendUnit& unit = f.units[i];
          for (int t = unit.task_begin; t < unit.task_end; ++t) {
            const PlanTask& task = f.plan.task[t];
            if (task.kv_head >= 0 && task.kv_head != unit.head_begin) continue;
            body.layout(scratch, (task.query_end - task.query_begin) * int64_t{body.group});
            with_element<T>(f.dtype, [&]<class E>(E) { body.template run_task<E>(task, unit); });
          }
        }
      },
      &ctx);
}

template <class T>
int64_t measure(const AttendParams& p, int64_t rows) {
  AttendBackwardParams b{};
  b.forward = p;
  return reinterpret_cast<intptr_t>(Backward<Native<T>>(b).layout(nullptr, rows)) + 64;
}

}  // namespace

}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

template <>
int64_t attend_backward_scratch_bytes<Isa::PALMETTE_ISA_NS>(const AttendParams& p, int64_t rows) {
  return p.dtype == DType::f64 ? PALMETTE_ISA_NS::measure<double>(p, rows)
                               : PALMETTE_ISA_NS::measure<float>(p, rows);
}

template <>
void attend_backward<Isa::PALMETTE_ISA_NS>(const AttendBackwardParams& p) {
#if PALMETTE_LANES == 4
  if (p.forward.dtype == DType::f64) return PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<double>>(p);
#endif
  PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<float>>(p);
}

}  // namespace palmette
