// SPDX-License-Identifier: Apache-2.0
// attend on the CPU: softmax attention of query rows to the keys that a plan lets them see.
//
//   p_ik = exp(scale q_i . k_k - max_i),   l_i = sum_k p_ik
//   out_i = sum_k p_ik v_k / l_i,   lse_i = max_i + ln l_i
//
// Data flow of one unit (a task and some KV heads):
//
//   item: rows of Q --pack--> blocks (rows in lanes)
//         keys --KeyCursor--> tiles --copy or in place--> attend_block per block: (m, l, O) in lanes
//         blocks --unpack, add--> the task's row states (m, l, o[Dv]), row-major
//   task: row states --divide--> out, lse          (direct)
//                    --as they are--> partials     (rows that other tasks touch too; merged in a second pass)
//
// Bit-reproducible: the arithmetic of a row depends on the plan only, not on which worker runs the unit
// nor on how many heads a unit holds.

#include <cmath>

#include "attend/block_cpu.h"
#include "core/parallel.h"
#include "core/workspace.h"

namespace palmette::PALMETTE_ISA_NS {

namespace {

template <class S>
constexpr int64_t padded(int64_t d) {
  return (d + 2 * S::kLanes - 1) / (2 * S::kLanes) * (2 * S::kLanes);
}

struct Block {
  int shape;  // index into the shapes that for_each_block can produce
  int row, count;
  int64_t lane;        // first lane in the per-row arrays
  int64_t q_at, o_at;  // offsets into the packed Q and O of one head
  int32_t min_pos, max_pos, min_depth, max_depth;
};

// Row r of an item is its query r / group, head r % group of the KV head's group.
struct ItemRow {
  int32_t query, head, state;  // state: where the task keeps (m, l, o) of it
};

// A block's shape as a number and back, so that blocks can sit in an array.
template <class B>
constexpr int shape_code() {
  return B::NU == 2 ? 0 : B::P;
}
template <class S, class F>
PALMETTE_INLINE void with_shape(int code, F&& f) {
  constexpr int N = S::kLanes;
  switch (code) {
    case 0:
      return f(BlockShape<S, 2, 1>{});
    case 1:
      return f(BlockShape<S, 1, 1>{});
    case 2:
      return f(BlockShape<S, 1, 2>{});
    case 4:
      if constexpr (N >= 4) return f(BlockShape<S, 1, 4>{});
      break;
    case 8:
      if constexpr (N >= 8) return f(BlockShape<S, 1, 8>{});
      break;
    default:
      if constexpr (N >= 16) return f(BlockShape<S, 1, 16>{});
  }
}

// Where the rows of a task live, and the arithmetic type's view of everything.
template <class S>
struct Forward {
  using T = typename S::Scalar;
  using Int = typename S::Int;
  static constexpr int N = S::kLanes;

  const AttendParams& p;
  const int group;  // query heads per KV head
  const int64_t d_pad, dv_pad;
  // scratch of this worker
  T *o_rows, *m_rows, *l_rows;               // row states: [heads][rows][dv_pad], [heads][rows]
  T* q_rows;                                 // [rows][d_pad]: of the task, where items list their queries
  T *q_lanes, *o_lanes, *m_lanes, *l_lanes;  // blocks: [heads][...]
  ItemRow* item_rows;                        // [rows]
  Int *pos_lanes, *depth_lanes;
  bool* touched;  // [heads][blocks]
  Block* blocks;
  T *k_tile[2], *v_tile[2], *s_tile;  // of K and V: the tile at work and the one after it
  KeyTile* tiles;                     // [2]: the one at work and the one after it
  const char** soon;                  // [2 * kMaxTileKeys]: rows of K, then of V, of the tile after
  int buffer = 0;                     // which of k_tile and v_tile is at work
  bool ahead = false;                 // the tile that comes next is packed already
  int64_t lane_capacity, block_capacity, rows_capacity;

  static int64_t lanes_for(int64_t rows) { return rows + 3 * N; }
  static int64_t blocks_for(int64_t rows) { return rows / (2 * N) + 3; }

  explicit Forward(const AttendParams& params)
      : p(params),
        group(params.num_q_heads / params.num_kv_heads),
        d_pad(padded<S>(params.head_dim)),
        dv_pad(padded<S>(params.v_head_dim)) {}

  // Lays out (or, with a null base, only measures) the scratch.
  char* layout(char* at, int64_t rows, int64_t heads) {
    rows_capacity = rows;
    lane_capacity = lanes_for(rows);
    block_capacity = blocks_for(rows);
    take(at, o_rows, heads * rows * dv_pad);
    take(at, m_rows, heads * rows);
    take(at, l_rows, heads * rows);
    take(at, q_rows, p.plan.item_query == nullptr ? 0 : rows * d_pad);
    take(at, q_lanes, heads * lane_capacity * d_pad);
    take(at, o_lanes, heads * lane_capacity * dv_pad);
    take(at, m_lanes, heads * lane_capacity);
    take(at, l_lanes, heads * lane_capacity);
    take(at, item_rows, rows);
    take(at, pos_lanes, lane_capacity);
    take(at, depth_lanes, lane_capacity);
    take(at, touched, heads * block_capacity);
    take(at, blocks, block_capacity);
    for (int i = 0; i < 2; ++i) {
      take(at, k_tile[i], kMaxTileKeys * packed_stride<S>(p.head_dim));
      take(at, v_tile[i], kMaxTileKeys * packed_stride<S>(p.v_head_dim));
    }
    take(at, s_tile, kMaxTileKeys * 2 * N);
    take(at, tiles, 2);
    take(at, soon, 2 * kMaxTileKeys);
    return at;
  }

  // ---- item
  template <int W>
  static std::pair<int32_t, int32_t> range(const Int* x) {
    Int low = x[0], high = x[0];
    for (int i = 0; i < W; ++i) {
      low = x[i] < low ? x[i] : low;
      high = x[i] > high ? x[i] : high;
    }
    return {static_cast<int32_t>(low), static_cast<int32_t>(high)};
  }

  int make_blocks(const PlanTask& task, const PlanItem& item, int32_t& min_query_depth) {
    const int rows = (item.query_end - item.query_begin) * group;
    ItemRow* row_of_item = item_rows;
    for (int32_t i = 0; i < item.query_end - item.query_begin; ++i) {
      const int32_t j = query_of(p.plan, item, i);
      for (int32_t g = 0; g < group; ++g) *row_of_item++ = {j, g, (j - task.query_begin) * group + g};
    }
    int count = 0;
    int64_t lane = 0, q_at = 0, o_at = 0;
    min_query_depth = INT32_MAX;
    for_each_block<S>(rows, [&](auto shape, int row, int n) {
      using B = decltype(shape);
      Block& b = blocks[count++];
      Int *pos = pos_lanes + lane, *depth = depth_lanes + lane;
      for (int i = 0; i < B::kWidth; ++i) {
        const int32_t j = item_rows[row + (i / B::P < n ? i / B::P : 0)].query;
        pos[i] = p.plan.query_pos[j];
        depth[i] = p.plan.query_depth[j];
      }
      const auto [min_pos, max_pos] = range<B::kWidth>(pos);
      const auto [min_depth, max_depth] = range<B::kWidth>(depth);
      b = {shape_code<B>(), row, n, lane, q_at, o_at, min_pos, max_pos, min_depth, max_depth};
      min_query_depth = b.min_depth < min_query_depth ? b.min_depth : min_query_depth;
      lane += B::kWidth;
      q_at += B::steps(p.head_dim) * B::kWidth;
      o_at += B::steps(p.v_head_dim) * B::kWidth;
    });
    return count;
  }

  T query_factor() const { return static_cast<T>(p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e); }

  template <class E>
  void pack_queries(int num_blocks, int kv_head, T* dst) {
    const E* base = static_cast<const E*>(p.q.data);
    pack_blocks<E>(num_blocks, query_factor(), dst, [&](const ItemRow& row) {
      return base + p.plan.query_index[row.query] * p.q.token + (kv_head * group + row.head) * p.q.head;
    });
  }

  template <class E, class At>
  void pack_blocks(int num_blocks, T factor, T* dst, At at) {
    for (int b = 0; b < num_blocks; ++b) {
      const Block& block = blocks[b];
      with_shape<S>(block.shape, [&](auto shape) {
        pack_rows<decltype(shape), E>(dst + block.q_at, block.count, p.head_dim, factor,
                                      [&](int r) { return at(item_rows[block.row + r]); });
      });
    }
  }

  // Rows that many items read lie close together first: in q they may be kilobytes apart, in few cache sets.
  template <class E>
  void gather_queries(const PlanTask& task, int kv_head) {
    const typename S::V factor = S::splat(query_factor());
    T* dst = q_rows;
    for (int32_t j = task.query_begin; j < task.query_end; ++j) {
      for (int g = 0; g < group; ++g, dst += d_pad) {
        const E* src = static_cast<const E*>(p.q.data) + p.plan.query_index[j] * p.q.token +
                       (kv_head * group + g) * p.q.head;
        int x = 0;
        for (; x + N <= p.head_dim; x += N) S::store(dst + x, S::load(src + x) * factor);
        if (x < p.head_dim) S::store(dst + x, S::load_n(src + x, p.head_dim - x) * factor);
      }
    }
  }

  static int tile_keys(int rows) {  // with few rows, this tile and the next share L1
    return rows > 4 * N ? 48 : rows > N ? 24 : 12;
  }
  // Blocks of keys that many rows meet are not cut for a rest of a few.
  int tile_keys(const PlanItem& item) const {
    const int rows = (item.query_end - item.query_begin) * group, limit = tile_keys(rows);
    if (rows <= 4 * N || item.segment_end - item.segment_begin != 1) return limit;
    return p.plan.segment[item.segment_begin].length <= kMaxTileKeys ? kMaxTileKeys : limit;
  }

  // K or V of the tile at work: in place, packed ahead while the tile before it was at work, or packed now.
  TileView<T> view(const Strided& x, int head, int d, const KeyTile& t, bool in_place, T* packed,
                   bool ready) {
    if (in_place && t.contiguous) {
      return {static_cast<const T*>(x.data) + head * x.head + t.slot[0] * x.token, x.token};
    }
    if (!ready) {
      point_at_rows(x, p.dtype, head, t, soon);
      pack_rows_of_tile<S>(packed, soon, 0, t.count, p.dtype, d);
    }
    return {packed, packed_stride<S>(d)};
  }

  void run_item(const PlanTask& task, int32_t index, const AttendUnit& unit) {
    const PlanItem& item = p.plan.item[index];
    int32_t min_query_depth = 0;
    const int num_blocks = make_blocks(task, item, min_query_depth);
    const int heads = unit.head_count;
    const int64_t q_head = lane_capacity * d_pad, o_head = lane_capacity * dv_pad;
    if (p.plan.item_query != nullptr) {
      pack_blocks<T>(num_blocks, T(1), q_lanes,
                     [&](const ItemRow& row) { return q_rows + row.state * d_pad; });
    } else {
      for (int h = 0; h < heads; ++h) {
        with_element<T>(p.dtype, [&]<class E>(E) {
          pack_queries<E>(num_blocks, unit.head_begin + h, q_lanes + h * q_head);
        });
      }
    }
    for (int h = 0; h < heads; ++h) load_states(num_blocks, h);

    // Blocks share out the rows of the tile that comes next: each asks for its part while it multiplies, and
    // the part is packed when the block is done. So the pool is read evenly, and rows do not wait in caches
    // that their stride makes them share.
    const bool k_in_place = streams_in_place<S>(p.k, p.dtype, p.head_dim);
    const bool v_in_place = streams_in_place<S>(p.v, p.dtype, p.v_head_dim);
    const int widest = p.head_dim > p.v_head_dim ? p.head_dim : p.v_head_dim;
    const int lines = static_cast<int>((widest * element_size(p.dtype) + 63) / 64);
    const int limit = tile_keys(item);
    KeyCursor cursor(p.plan, item, p.window, min_query_depth);
    KeyTile *tile = tiles, *next = tiles + 1;
    bool more = cursor.next(*tile, limit);
    while (more) {
      more = cursor.next(*next, limit);
      bool known = more;  // the tile after this one, be it of the next item
      if (!more && index + 1 < task.item_end && p.window <= 0) {
        const PlanItem& after = p.plan.item[index + 1];
        known = KeyCursor(p.plan, after, 0, 0).next(*next, tile_keys(after));
      }
      for (int h = 0; h < heads; ++h) {
        const int head = unit.head_begin + h;
        const auto k = view(p.k, head, p.head_dim, *tile, k_in_place, k_tile[buffer], ahead);
        const auto v = view(p.v, head, p.v_head_dim, *tile, v_in_place, v_tile[buffer], ahead);
        // A single block is done with its tile when packing begins: one buffer, which then fits L1, will do.
        const int fill = num_blocks == 1 ? buffer : buffer ^ 1;
        const bool same_tile = h + 1 < heads;
        ahead = same_tile || known;
        const KeyTile& coming = same_tile ? *tile : *next;
        const int keys = ahead ? coming.count : 0;
        if (ahead) {
          const int coming_head = same_tile ? head + 1 : unit.head_begin;
          point_at_rows(p.k, p.dtype, coming_head, coming, soon);
          point_at_rows(p.v, p.dtype, coming_head, coming, soon + keys);
        }
        int finite = -1;  // not yet known
        for (int b = 0; b < num_blocks; ++b) {
          const Block& block = blocks[b];
          const BlockRows<S> seen{pos_lanes + block.lane, depth_lanes + block.lane, block.min_pos,
                                  block.max_pos,          block.min_depth,          block.max_depth};
          if (finite < 0 && tile_visibility<S>(*tile, seen, p.window) == Visibility::kSome) {
            finite = tile_is_finite<S>(v, tile->count, p.v_head_dim);
          }
          const BlockState<T> state{
              o_lanes + h * o_head + block.o_at, m_lanes + h * lane_capacity + block.lane,
              l_lanes + h * lane_capacity + block.lane, touched + h * block_capacity + b};
          const int first = 2 * keys * b / num_blocks, last = 2 * keys * (b + 1) / num_blocks;
          PrefetchQueue queue{soon + first, soon + last, lines};
          with_shape<S>(block.shape, [&](auto shape) {
            attend_block<decltype(shape)>(*tile, k, v, finite != 0, q_lanes + h * q_head + block.q_at,
                                          p.head_dim, p.v_head_dim, seen, p.window, p.softcap, state, s_tile,
                                          &queue);
          });
          if (!(k_in_place && coming.contiguous) && first < keys) {
            pack_rows_of_tile<S>(k_tile[fill], soon, first, last < keys ? last : keys, p.dtype, p.head_dim);
          }
          if (!(v_in_place && coming.contiguous) && last > keys) {
            pack_rows_of_tile<S>(v_tile[fill], soon + keys, (first > keys ? first : keys) - keys, last - keys,
                                 p.dtype, p.v_head_dim);
          }
        }
        buffer = fill;
      }
      KeyTile* done = tile;
      tile = next;
      next = done;
    }
    for (int h = 0; h < heads; ++h) add_item(num_blocks, h, o_lanes + h * o_head);
  }

  // The rows' running maxima and sums into the lanes of their blocks; what the item adds to o starts at 0.
  void load_states(int num_blocks, int h) {
    const T *m = m_rows + h * rows_capacity, *l = l_rows + h * rows_capacity;
    for (int b = 0; b < num_blocks; ++b) {
      const Block& block = blocks[b];
      touched[h * block_capacity + b] = false;
      const int64_t lane = h * lane_capacity + block.lane;
      with_shape<S>(block.shape, [&](auto shape) {
        using B = decltype(shape);
        for (int i = 0; i < B::kWidth; ++i) {
          const int32_t at = item_rows[block.row + (i / B::P < block.count ? i / B::P : 0)].state;
          m_lanes[lane + i] = m[at];
          l_lanes[lane + i] = l[at];
        }
      });
    }
  }

  // What the item's blocks have found, into the row states: o' = 2^(m - m') o + O.
  void add_item(int num_blocks, int h, const T* o_head) {
    T *m = m_rows + h * rows_capacity, *l = l_rows + h * rows_capacity,
      *o = o_rows + h * rows_capacity * dv_pad;
    for (int b = 0; b < num_blocks; ++b) {
      const Block& block = blocks[b];
      if (!touched[h * block_capacity + b]) continue;
      const int64_t lane = h * lane_capacity + block.lane;
      with_shape<S>(block.shape, [&](auto shape) {
        using B = decltype(shape);
        const ItemRow* row = item_rows + block.row;
        alignas(64) T weight[B::kWidth];
        for (int i = 0; i < B::kWidth; ++i) weight[i] = m[row[i / B::P < block.count ? i / B::P : 0].state];
        for (int i = 0; i < B::kWidth; i += N) {
          S::store(weight + i, S::exp2(S::load(weight + i) - S::load(m_lanes + lane + i)));
        }
        for (int r = 0; r < block.count; ++r) {
          m[row[r].state] = m_lanes[lane + r * B::P];
          l[row[r].state] = l_lanes[lane + r * B::P];
        }
        const auto add = [&](int r, int x, typename S::V value, int = N) {
          T* dst = o + row[r].state * dv_pad + x;
          S::store(dst, S::load(dst) * weight[r * B::P] + value);
        };
        unpack_rows<B>(o_head + block.o_at, block.count, p.v_head_dim, add, add);
      });
    }
  }

  static T exp2_scalar(T x) { return S::exp2(S::splat(x))[0]; }

  // ---- task
  void run_unit(const AttendUnit& unit) {
    ahead = false;
    const PlanTask& task = p.plan.task[unit.task_begin];
    const int rows = (task.query_end - task.query_begin) * group;
    for (int64_t i = 0; i < unit.head_count * rows_capacity; ++i) m_rows[i] = T(kEmptyMax), l_rows[i] = 0;
    for (int h = 0; h < unit.head_count; ++h) {
      std::memset(o_rows + h * rows_capacity * dv_pad, 0, sizeof(T) * static_cast<size_t>(rows * dv_pad));
    }
    if (p.plan.item_query != nullptr) {
      with_element<T>(p.dtype, [&]<class E>(E) { gather_queries<E>(task, unit.head_begin); });
    }
    for (int i = task.item_begin; i < task.item_end; ++i) run_item(task, i, unit);
    for (int h = 0; h < unit.head_count; ++h) {
      const int kv_head = unit.head_begin + h;
      for (int r = 0; r < rows; ++r) {
        const int j = task.query_begin + r / group, head = kv_head * group + r % group;
        const T* o = o_rows + (h * rows_capacity + r) * dv_pad;
        const T m = m_rows[h * rows_capacity + r], l = l_rows[h * rows_capacity + r];
        if (task.partial_begin < 0) {
          finish(j, head, m, l, o);
        } else {
          const int64_t at = (task.partial_begin + r / group) * int64_t{p.num_q_heads} + head;
          static_cast<T*>(p.partial_max)[at] = m;
          static_cast<T*>(p.partial_sum)[at] = l;
          std::memcpy(static_cast<T*>(p.partial_out) + at * p.v_head_dim, o,
                      sizeof(T) * static_cast<size_t>(p.v_head_dim));
        }
      }
    }
  }

  // out = o / l, lse = (m + log2 l) ln 2; a sink is one more logit with no value.
  void finish(int j, int head, T m, T l, const T* o) {
    T weight = 1;
    if (p.sinks != nullptr) {
      const T sink = static_cast<const T*>(p.sinks)[head] * T(kLog2e);
      const T top = sink > m ? sink : m;
      weight = exp2_scalar(m - top);
      l = (l == 0 ? T(0) : l * weight) + exp2_scalar(sink - top);
      m = top;
    }
    const int64_t index = p.plan.query_index[j];
    static_cast<T*>(p.lse)[index * p.num_q_heads + head] =
        l == 0 ? -T(INFINITY) : (m + std::log2(l)) * T(kLn2);
    const T factor = l == 0 ? T(0) : weight / l;
    with_element<T>(p.dtype, [&]<class E>(E) {
      E* dst = static_cast<E*>(p.out.data) + index * p.out.token + head * p.out.head;
      const typename S::V f = S::splat(factor);
      int x = 0;
      for (; x + N <= p.v_head_dim; x += N) S::store(dst + x, S::load(o + x) * f);
      if (x < p.v_head_dim) S::store_n(dst + x, S::load(o + x) * f, p.v_head_dim - x);
    });
  }

  // Second pass: the partial states of query j in the order of the plan. row: v_head_dim elements of scratch.
  void merge_partials(int j) {
    const int32_t begin = p.plan.merge_ptr[j], end = p.plan.merge_ptr[j + 1];
    if (begin == end) return;
    const T* part_m = static_cast<const T*>(p.partial_max);
    const T* part_l = static_cast<const T*>(p.partial_sum);
    const T* part_o = static_cast<const T*>(p.partial_out);
    for (int head = 0; head < p.num_q_heads; ++head) {
      T m = T(kEmptyMax), l = 0;
      for (int i = begin; i < end; ++i) {
        const T value = part_m[p.plan.merge_row[i] * int64_t{p.num_q_heads} + head];
        m = value > m ? value : m;
      }
      std::memset(o_rows, 0, sizeof(T) * static_cast<size_t>(dv_pad));
      for (int i = begin; i < end; ++i) {
        const int64_t at = p.plan.merge_row[i] * int64_t{p.num_q_heads} + head;
        if (part_l[at] == 0) continue;
        const T w = exp2_scalar(part_m[at] - m);
        l += part_l[at] * w;
        const T* src = part_o + at * p.v_head_dim;
        for (int x = 0; x < p.v_head_dim; ++x) o_rows[x] += src[x] * w;
      }
      finish(j, head, m, l, o_rows);
    }
  }
};

template <class S>
void run(const AttendParams& p) {
  struct Context {
    const AttendParams& p;
    int32_t next_unit = 0, next_query = 0;
  } ctx{p};
  const int64_t workers = num_workers() < p.num_units ? num_workers() : p.num_units;
  run_workers(
      workers,
      [](void* c, int64_t) {
        Context& ctx = *static_cast<Context*>(c);
        const AttendParams& p = ctx.p;
        Forward<S> f(p);
        char* scratch = static_cast<char*>(thread_workspace(p.scratch_bytes));
        for (;;) {
          const int32_t i = __atomic_fetch_add(&ctx.next_unit, 1, __ATOMIC_RELAXED);
          if (i >= p.num_units) break;
          const AttendUnit& unit = p.units[i];
          const PlanTask& task = p.plan.task[unit.task_begin];
          f.layout(scratch, (task.query_end - task.query_begin) * int64_t{f.group}, unit.head_count);
          f.run_unit(unit);
        }
      },
      &ctx);
  if (p.plan.num_partials == 0) return;
  run_workers(
      num_workers() < p.plan.num_queries ? num_workers() : p.plan.num_queries,
      [](void* c, int64_t) {
        Context& ctx = *static_cast<Context*>(c);
        Forward<S> f(ctx.p);
        f.layout(static_cast<char*>(thread_workspace(ctx.p.scratch_bytes)), 1, 1);
        for (;;) {
          const int32_t j = __atomic_fetch_add(&ctx.next_query, 1, __ATOMIC_RELAXED);
          if (j >= ctx.p.plan.num_queries) break;
          f.merge_partials(j);
        }
      },
      &ctx);
}

template <class T>
int64_t measure(const AttendParams& p, int64_t rows, int64_t heads) {
  return reinterpret_cast<intptr_t>(Forward<Native<T>>(p).layout(nullptr, rows, heads)) + 64;
}

}  // namespace

}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

template <>
int64_t attend_scratch_bytes<Isa::PALMETTE_ISA_NS>(const AttendParams& p, int64_t rows, int64_t heads) {
  return p.dtype == DType::f64 ? PALMETTE_ISA_NS::measure<double>(p, rows, heads)
                               : PALMETTE_ISA_NS::measure<float>(p, rows, heads);
}

template <>
void attend<Isa::PALMETTE_ISA_NS>(const AttendParams& p) {
#if PALMETTE_LANES == 4
  if (p.dtype == DType::f64) return PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<double>>(p);
#endif
  PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<float>>(p);
}

}  // namespace palmette
