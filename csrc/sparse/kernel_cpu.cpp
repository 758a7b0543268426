// SPDX-License-Identifier: Apache-2.0
// select_blocks on the CPU: the key blocks that a query's group of heads pays most attention to, as its
// attention to compressed keys tells (NSA, arXiv 2502.11089, equations 9 to 12).
//
//   p_i = sum over the heads of a group of exp(scale q . k_i - lse)
//   score_j = sum over the strides t of block j of sum_n p_{t - n}      n < strides of a compressed key
//
// Data flow of a unit (a tile of queries and a KV head):
//
//   q of each head --pack--> lanes (queries in lanes)
//   compressed keys, 48 at a time: S [keys][queries] of a head -> p += exp2(S - lse), head after head
//     p --each key's strides--> score [blocks][queries]
//   score --insertion into the best so far, queries in lanes--> block_index
//
// Heads come one after the other into the same lanes, so the sum over a group is vertical; where a tile has
// few queries, as in decoding, its queries and heads fill the lanes together. Scores live in the scratch of a
// worker, a tile at a time.
#include <cmath>

#include "attend/block_cpu.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "sparse/params.h"

namespace palmette::PALMETTE_ISA_NS {

namespace {

template <class S>
struct Select {
  using T = typename S::Scalar;
  using Int = typename S::Int;
  using V = typename S::V;
  using B = BlockShape<S, 2, 1>;
  static constexpr int W = B::kWidth, kKeys = 48, kLanes = kSelectQueries, kBlocks = kLanes / W;
  static_assert(kLanes % W == 0 && kKeys <= kMaxTileKeys);

  static constexpr Int kNone = INT32_MAX;  // behind every block
  static constexpr int kFewQueries = 8;

  const SelectParams& p;
  const int group;
  T *q_lanes, *lse;   // [group][blocks][D][W] and [group][lanes], or those of the blocks of few rows
  T *prob, *weight;   // [keys][W], [keys][lanes]
  T *k_tile, *score;  // [keys][packed_stride], [blocks][lanes]
  T* best;            // [topk][vector], falling
  Int* chosen;        // [topk][vector]: their blocks

  explicit Select(const SelectParams& params) : p(params), group(params.num_q_heads / params.num_kv_heads) {}

  char* layout(char* at) {
    take(at, q_lanes, (int64_t{group} * kLanes + 3 * S::kLanes) * (p.head_dim + S::kLanes));
    take(at, lse, int64_t{group} * kLanes + 3 * S::kLanes);
    take(at, prob, kKeys * W);
    take(at, weight, kKeys * kLanes);
    take(at, k_tile, kKeys * packed_stride<S>(p.head_dim));
    take(at, score, (int64_t{p.max_blocks} + 1) * kLanes);
    take(at, best, int64_t{p.topk} * S::kLanes);
    take(at, chosen, int64_t{p.topk} * S::kLanes);
    return at;
  }

  // Tokens that a compressed key ends at, and blocks that a query can choose from.
  int64_t last_token(int64_t key) const { return (key + p.key_strides) * p.stride - 1; }
  int32_t own_block(const SelectTile& t, int i) const { return (t.token + i) / (p.block_strides * p.stride); }

  bool few(const SelectTile& t) const { return t.num_queries <= kFewQueries; }

  // Row r of a tile of few queries is head r % group of query r / group. f(shape, first row, rows, lane).
  template <class F>
  void for_each_row_block(const SelectTile& t, F&& f) {
    int64_t lane = 0;
    for_each_block<S>(t.num_queries * group, [&](auto shape, int row, int count) {
      f(shape, row, count, lane);
      lane += decltype(shape)::kWidth;
    });
  }

  T lse_of(int32_t query, int head) const {
    const T l = static_cast<const T*>(p.lse)[int64_t{query} * p.num_q_heads + head];
    return l == -T(INFINITY) ? T(INFINITY) : l * T(kLog2e);  // saw no key: p = 0
  }

  template <class E>
  void pack(const SelectTile& t, int kv_head) {
    const E* base = static_cast<const E*>(p.q.data);
    if (few(t)) {
      for_each_row_block(t, [&](auto shape, int row, int count, int64_t lane) {
        using Block = decltype(shape);
        pack_rows<Block, E>(q_lanes + lane * (p.head_dim + S::kLanes), count, p.head_dim,
                            static_cast<T>(p.scale * kLog2e), [&](int r) {
                              return base + (t.query + (row + r) / group) * p.q.token +
                                     (kv_head * group + (row + r) % group) * p.q.head;
                            });
        for (int i = 0; i < Block::kWidth; ++i) {
          const int r = row + (i / Block::P < count ? i / Block::P : 0);
          lse[lane + i] = lse_of(t.query + r / group, kv_head * group + r % group);
        }
      });
      return;
    }
    for (int g = 0; g < group; ++g) {
      const int head = kv_head * group + g;
      for (int b = 0; b < kBlocks; ++b) {
        const int left = t.num_queries - b * W, count = left < 0 ? 0 : left < W ? left : W;
        pack_rows<B, E>(q_lanes + (g * kBlocks + b) * int64_t{W} * p.head_dim, count, p.head_dim,
                        static_cast<T>(p.scale * kLog2e),
                        [&](int r) { return base + (t.query + b * W + r) * p.q.token + head * p.q.head; });
      }
      for (int i = 0; i < kLanes; ++i) {
        lse[g * kLanes + i] = i < t.num_queries ? lse_of(t.query + i, head) : T(INFINITY);
      }
    }
  }

  TileView<T> load_keys(const SelectTile& t, int kv_head, int64_t first, int n) {
    if (streams_in_place<S>(p.k, p.dtype, p.head_dim)) {
      return {static_cast<const T*>(p.k.data) + (t.key + first) * p.k.token + kv_head * p.k.head, p.k.token};
    }
    const char* rows[kKeys];
    const int64_t size = element_size(p.dtype);
    for (int i = 0; i < n; ++i) {
      rows[i] =
          static_cast<const char*>(p.k.data) + ((t.key + first + i) * p.k.token + kv_head * p.k.head) * size;
    }
    pack_rows_of_tile<S>(k_tile, rows, 0, n, p.dtype, p.head_dim);
    return {k_tile, packed_stride<S>(p.head_dim)};
  }

  // p of keys into weight: a row of query and head per granule of lanes.
  void add_few(const SelectTile& t, const TileView<T>& k, int n) {
    for_each_row_block(t, [&](auto shape, int row, int count, int64_t lane) {
      using Block = decltype(shape);
      scores<Block>(k, n, q_lanes + lane * (p.head_dim + S::kLanes), p.head_dim, prob, Block::kWidth);
      for (int u = 0; u < Block::kWidth; u += S::kLanes) {
        const V l = S::load(lse + lane + u);
        for (int i = 0; i < n; ++i) {
          T* at = prob + i * Block::kWidth + u;
          S::store(at, S::exp2(S::template sum_granule<Block::P>(S::load(at)) - l));
        }
      }
      for (int r = 0; r < count; ++r) {
        const int query = (row + r) / group;
        for (int i = 0; i < n; ++i) weight[i * kLanes + query] += prob[i * Block::kWidth + r * Block::P];
      }
    });
  }

  // p of keys into weight: queries in the lanes, head after head.
  void add_many(const SelectTile& t, const TileView<T>& k, int n) {
    for (int b = 0; b * W < t.num_queries; ++b) {
      for (int g = 0; g < group; ++g) {
        scores<B>(k, n, q_lanes + (g * kBlocks + b) * int64_t{W} * p.head_dim, p.head_dim, prob, W);
        for (int u = 0; u < 2; ++u) {
          const int lane = b * W + u * S::kLanes;
          const V l = S::load(lse + g * kLanes + lane);
          for (int i = 0; i < n; ++i) {
            T* to = weight + i * kLanes + lane;
            S::store(to, S::load(to) + S::exp2(S::load(prob + i * W + u * S::kLanes) - l));
          }
        }
      }
    }
  }

  // weight [keys][lanes] = p of keys [first, first + n), 0 where a query does not see one.
  void find_weights(const SelectTile& t, const TileView<T>& k, int64_t first, int n) {
    std::memset(weight, 0, sizeof(T) * static_cast<size_t>(n * kLanes));
    if (few(t)) {
      add_few(t, k, n);
    } else {
      add_many(t, k, n);
    }
    for (int i = 0; i < n; ++i) {
      const int64_t hidden = last_token(first + i) - t.token;  // queries before this one do not see the key
      for (int lane = 0; lane < hidden && lane < kLanes; ++lane) weight[i * kLanes + lane] = 0;
    }
  }

  void add_scores(int64_t first, int n) {
    for (int i = 0; i < n; ++i) {
      for (int s = 0; s < p.key_strides; ++s) {
        T* to = score + (first + i + s) / p.block_strides * kLanes;
        for (int x = 0; x < kLanes; x += S::kLanes)
          S::store(to + x, S::load(to + x) + S::load(weight + i * kLanes + x));
      }
    }
  }

  // The blocks of a vector of queries. Of those that see more than topk blocks: [0, init) and [local, own]
  // are taken, and the best `room` of the others.
  void choose(const SelectTile& t, int kv_head, int first) {
    const int count = t.num_queries - first < S::kLanes ? t.num_queries - first : S::kLanes;
    const int32_t last = own_block(t, first + count - 1);
    const int32_t room = last < p.topk ? 0 : p.topk - p.init_blocks - p.local_blocks;
    if (room > 0) find_best(t, first, last, room);
    for (int x = 0; x < count; ++x) {
      int32_t* out = p.block_index + (int64_t{kv_head} * p.num_queries + t.query + first + x) * p.topk;
      int32_t* const end = out + p.topk;
      const int32_t own = own_block(t, first + x);
      if (own < p.topk) {
        for (int32_t j = 0; j <= own; ++j) *out++ = j;
      } else {
        for (int32_t j = 0; j < p.init_blocks; ++j) *out++ = j;
        for (int32_t i = 0; i < room && chosen[i * S::kLanes + x] != kNone; ++i) {
          *out++ = static_cast<int32_t>(chosen[i * S::kLanes + x]);
        }
        for (int32_t j = own + 1 - p.local_blocks; j <= own; ++j) *out++ = j;
      }
      while (out < end) *out++ = -1;
    }
  }

  // Ascending, kNone behind them. A block whose score is NaN is never better than another.
  void find_best(const SelectTile& t, int first, int32_t last, int32_t room) {
    using I = typename S::I;
    constexpr int N = S::kLanes;
    alignas(64) Int local[N];
    for (int x = 0; x < N; ++x) local[x] = own_block(t, first + x) + 1 - p.local_blocks;
    for (int32_t i = 0; i < room; ++i) {
      S::store(best + i * N, S::splat(-INFINITY));
      S::store_int(chosen + i * N, S::splat_int(kNone));
    }
    const I end = S::load_int(local);
    for (int32_t j = p.init_blocks; j <= last; ++j) {
      V value = S::load(score + int64_t{j} * kLanes + first);
      I block = S::splat_int(j), better = (value > S::load(best + (room - 1) * N)) & (block < end);
      if (!S::any(better)) continue;
      value = S::select(better, value, S::splat(-INFINITY));
      better = S::splat_int(0);
      for (int32_t i = 0; i < room; ++i) {  // equal ones stay in front, what has been moved moves the rest
        const V old = S::load(best + i * N);
        const I old_block = S::load_int(chosen + i * N);
        better |= value > old;
        S::store(best + i * N, S::select(better, value, old));
        S::store_int(chosen + i * N, better ? block : old_block);
        value = S::select(better, old, value);
        block = better ? old_block : block;
      }
    }
    for (int32_t n = room; n > 1; --n) {
      I most = S::load_int(chosen);
      for (int32_t i = 1; i < n; ++i) {
        const I next = S::load_int(chosen + i * N);
        S::store_int(chosen + (i - 1) * N, next < most ? next : most);
        most = next < most ? most : next;
      }
      S::store_int(chosen + (n - 1) * N, most);
    }
  }

  void run_unit(int32_t unit) {
    const SelectTile& t = p.tiles[unit / p.num_kv_heads];
    const int kv_head = unit % p.num_kv_heads;
    const int32_t last = t.token + t.num_queries - 1;
    std::memset(score, 0, sizeof(T) * static_cast<size_t>(own_block(t, t.num_queries - 1) + 1) * kLanes);
    if (own_block(t, t.num_queries - 1) + 1 > p.topk) {  // else every block is chosen
      with_element<T>(p.dtype, [&]<class E>(E) { pack<E>(t, kv_head); });
      for (int64_t first = 0; first < t.num_keys && last_token(first) <= last; first += kKeys) {
        const int n = t.num_keys - first < kKeys ? static_cast<int>(t.num_keys - first) : kKeys;
        find_weights(t, load_keys(t, kv_head, first, n), first, n);
        add_scores(first, n);
      }
    }
    for (int lane = 0; lane < t.num_queries; lane += S::kLanes) choose(t, kv_head, lane);
  }
};

template <class S>
void run(const SelectParams& p) {
  struct Context {
    const SelectParams& p;
    int32_t next = 0;
  } ctx{p};
  const int32_t units = p.num_tiles * p.num_kv_heads;
  run_workers(
      num_workers() < units ? num_workers() : units,
      [](void* c, int64_t) {
        Context& ctx = *static_cast<Context*>(c);
        Select<S> body(ctx.p);
        body.layout(static_cast<char*>(thread_workspace(ctx.p.scratch_bytes)));
        const int32_t units = ctx.p.num_tiles * ctx.p.num_kv_heads;
        for (;;) {
          // the last tiles of a sequence have most to look at
          const int32_t i = __atomic_fetch_add(&ctx.next, 1, __ATOMIC_RELAXED);
          if (i >= units) break;
          body.run_unit(units - 1 - i);
        }
      },
      &ctx);
}

template <class T>
int64_t measure(const SelectParams& p) {
  return reinterpret_cast<intptr_t>(Select<Native<T>>(p).layout(nullptr)) + 64;
}

}  // namespace

}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

template <>
int64_t select_scratch_bytes<Isa::PALMETTE_ISA_NS>(const SelectParams& p) {
  return p.dtype == DType::f64 ? PALMETTE_ISA_NS::measure<double>(p) : PALMETTE_ISA_NS::measure<float>(p);
}

template <>
void select_blocks<Isa::PALMETTE_ISA_NS>(const SelectParams& p) {
#if PALMETTE_LANES == 4
  if (p.dtype == DType::f64) return PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<double>>(p);
#endif
  PALMETTE_ISA_NS::run<PALMETTE_ISA_NS::Native<float>>(p);
}

}  // namespace palmette
