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
#include "attend/key_tiles.h"

namespace palmette::gpu {

namespace {

// What a row of queries brings besides q and dO; `pos` is of nobody where there is no such row.
struct alignas(16) RowState {
  int32_t pos, depth;
  float lse, delta;
};

// A query whose rows come next: its row of q, and what else a row brings.
struct alignas(16) QueryState {
  int32_t index, pos, depth, unused;
};

// Items, or entries of the index, that may hold keys of the tile: the first one, and every `step`-th behind
// it.
struct Candidates {
  int32_t first, step, count;
};

// How far a block has come in looking for the items that hold keys of its tile.
struct Search {
  // With an index: of the lists of the tile's node and of those above it, which are left. Without one: the
  // task that comes next of those in KeyShared::tasks, how many these are, and where to look for more.
  uint32_t lists;
  int32_t task, listed, tasks_behind;
  Candidates some;  // in which these have been looked at
  int32_t base;
  bool met;  // there were some: K and V have been asked for
};

template <class E>
struct KeyShared {
  KeyPiece piece;  // that is the block's, of this KV head
  int32_t kv_head;
  TaskList tasks, found;
  alignas(16) Search search;                // while the items that were found meet the tile
  alignas(16) PlanItem item[kThreads];      // these
  uint32_t waiting[kWarps];                 // which of them have not met it yet
  int32_t joined[kWarps], queries[kWarps];  // of a warp's items, those that meet it now
  uint8_t member[kThreads];                 // which these are,
  int32_t first_query[kThreads];            // and how many queries those before have
  int32_t members, rows;                    // of all
  Key key[kTileKeys<E>];                    // what they hold,
  int32_t lo, hi;                           // of which somebody sees one between these positions
  QueryState query[kTileKeys<E>];
  RowState row[kTileKeys<E>];
  uint8_t used[kTileKeys<E>];             // some query has met this key
  alignas(1024) unsigned char tiles[16];  // K and V, then Q and dO; at the end dK, dV
};

// Every element has one owner: what is there may be added to.
template <class E>
__device__ __forceinline__ void put_gradient(E* to, float* to_sum, int64_t i, float value) {
  if (to_sum != nullptr) {
    to_sum[i] += value;
  } else {
    to[i] = narrow<E>(value);
  }
}

template <class Math, int kColumns>
struct KeyGradient {
  using E = typename Math::Element;
  static constexpr int kKeys = kTileKeys<E>, kRows = kTileKeys<E>;  // of a tile
  // Warps own 16 keys each; what is left of them divides the rows.
  static constexpr int kKeyWarps = kKeys / 16, kParts = kWarps / kKeyWarps, kWarpRows = kRows / kParts;
  static constexpr int kStep = kWarpRows < 32 ? kWarpRows : 32, kN = kStep / 8;

  const BackwardProblem<E>& a;
  const AttendParams& p;
  const int first_column;
  KeyShared<E>& shared;
  Matrix<E> k, v, q, dout;
  float dk[kColumns / 8][4], dv[kColumns / 8][4];

  __device__ __forceinline__ KeyGradient(const BackwardProblem<E>& problem, int column)
      : a(problem), p(problem.p), first_column(column), shared(gpu::shared<KeyShared<E>>()) {
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

  __device__ __forceinline__ int first_key() const { return shared.piece.tile * kKeys; }
  __device__ __forceinline__ static int key_warp() { return warp() % kKeyWarps; }
  __device__ __forceinline__ static int part() { return warp() / kKeyWarps; }

  __device__ __forceinline__ bool holds(const PlanSegment& s) const {
    return s.length > 0 && s.begin < first_key() + kKeys && s.begin + s.length > first_key();
  }
  __device__ __forceinline__ bool some_hold(int32_t begin, int32_t end) const {
    for (int32_t s = begin; s < end; ++s) {
      if (holds(p.plan.segment[s])) return true;
    }
    return false;
  }

  __device__ __forceinline__ void run() {
    if (threadIdx.x < kKeys) shared.used[threadIdx.x] = 0;
    Search search = begin_search();
    for (int found = 0; find_items(search, found);) {
      if (!search.met) copy_keys();
      search.met = true;
      // dK and dV leave no registers for what nobody needs meanwhile.
      if (threadIdx.x == 0) shared.search = search;
      meet_items(found);
      search = shared.search;
    }
    if (shared.piece.parts > 1 && first_column == 0 && threadIdx.x < kKeys)
      a.part_met[part_index(static_cast<int>(threadIdx.x))] = shared.used[threadIdx.x];
    if (!search.met) return;
    ptx::wait_for_copies<0>();  // of K and V, if no query came to wait for them
    write();
  }

  // Of [begin, end), those of this piece.
  __device__ __forceinline__ Candidates share(int32_t begin, int32_t end) const {
    const KeyPiece& piece = shared.piece;
    return {begin + piece.part, piece.parts,
            max(0, end - begin - piece.part + piece.parts - 1) / piece.parts};
  }

  // False too where there are more entries than the index has room for.
  __device__ __forceinline__ bool indexed() const {
    const KeyIndex& index = a.index;
    return index.entry != nullptr && index.end[2 * index.leaves * index.chunks - 1] <= index.capacity;
  }

  // The entries of the node that many levels above the tile's.
  __device__ __forceinline__ Candidates list_of(int above) const {
    const KeyIndex& index = a.index;
    const int32_t node = (index.leaves + shared.piece.tile) >> above;
    if (node == 0) return {0, 1, 0};
    return share(index.end[node * index.chunks - 1], index.end[(node + 1) * index.chunks - 1]);
  }

  __device__ __forceinline__ Search begin_search() const {
    return {indexed() ? ballot(list_of(lane()).count > 0) : 0, 0, 0, 0, {0, 1, 0}, 0, false};
  }

  // The next items that hold keys of the tile, into shared.item; false if there are none left.
  __device__ __forceinline__ bool find_items(Search& search, int& found) const {
    const bool by_index = indexed();
    for (;;) {
      if (search.base >= search.some.count) {
        if (!(by_index ? next_list(search) : next_task(search))) return false;
        search.base = 0;
      }
      const auto candidate = [&](int32_t n) { return search.some.first + n * search.some.step; };
      found = list_tasks(shared.found, search.base, search.some.count, [&](int32_t n) {
        return by_index ? entry_holds(candidate(n)) : item_holds(p.plan.item[candidate(n)]);
      });
      search.base += kThreads;
      if (found == 0) continue;
      if (static_cast<int>(threadIdx.x) < found) {
        const int32_t mine = candidate(shared.found.task[threadIdx.x]);
        shared.item[threadIdx.x] = p.plan.item[by_index ? a.index.entry[mine].item : mine];
      }
      return true;
    }
  }

  __device__ __forceinline__ bool next_list(Search& search) const {
    if (search.lists == 0) return false;
    search.some = list_of(__ffs(static_cast<int>(search.lists)) - 1);
    search.lists &= search.lists - 1;
    return true;
  }

  __device__ __forceinline__ bool next_task(Search& search) const {
    const int32_t tasks = p.plan.counts[kNumTasks];
    while (search.task == search.listed) {
      if (search.tasks_behind >= tasks) return false;
      search.task = 0;
      search.listed = list_tasks(shared.tasks, search.tasks_behind, tasks, [&](int32_t index) {
        const PlanTask& t = p.plan.task[index];
        if (t.kv_head >= 0 && t.kv_head != shared.kv_head) return false;
        for (int32_t i = t.item_begin; i < t.item_end; ++i) {
          if (item_holds(p.plan.item[i])) return true;
        }
        return false;
      });
      search.tasks_behind += kThreads;
    }
    const PlanTask& t = p.plan.task[shared.tasks.task[search.task++]];
    search.some = {t.item_begin, 1, t.item_end - t.item_begin};
    return true;
  }

  __device__ __forceinline__ bool item_holds(const PlanItem& item) const {
    return some_hold(item.segment_begin, item.segment_end);
  }
  // An item is met for the first of its segments that hold keys of the tile.
  __device__ __forceinline__ bool entry_holds(int32_t i) const {
    const KeyEntry entry = load(a.index.entry + i);
    return (entry.kv_head < 0 || entry.kv_head == shared.kv_head) && holds(p.plan.segment[entry.segment]) &&
           !some_hold(entry.first_segment, entry.segment);
  }

  __device__ __forceinline__ void copy_keys() {
    // Slots that no item names may hold anything: they are copied only where somebody met the tile, and only
    // if they are rows of K.
    const auto row = [&](const Source<E>& x, int r) -> const E* {
      const int32_t at = first_key() + r < p.plan.num_places ? p.plan.slots[first_key() + r] : -1;
      return at >= 0 && at < p.num_slots ? x.row(at, shared.kv_head) : nullptr;
    };
    copy_rows(k, kKeys, a.k.width, a.k.by_chunks, a.k.data, [&](int r) { return row(a.k, r); });
    copy_rows(v, kKeys, a.v.width, a.v.by_chunks, a.v.data, [&](int r) { return row(a.v, r); });
    ptx::commit_copies();
  }

  // The items that were found. Those with the same segments hold the same keys, so their rows meet them
  // together: of a few queries that chose a block, each item alone would leave most of a tile of rows empty.
  __device__ __forceinline__ void meet_items(int found) {
    const uint32_t waiting = ballot(static_cast<int>(threadIdx.x) < found);
    if (lane() == 0) shared.waiting[warp()] = waiting;
    __syncthreads();
#pragma unroll 1
    for (int next = first_waiting(); next >= 0; next = first_waiting()) {
      join(shared.item[next]);
      find_keys(shared.item[next]);
      __syncthreads();
      meet_rows();
    }
  }

  __device__ __forceinline__ int first_waiting() const {
    int first = -1;
#pragma unroll
    for (int w = kWarps - 1; w >= 0; --w) {
      const auto waiting = static_cast<int>(shared.waiting[w]);
      if (waiting != 0) first = w * kLanes + __ffs(waiting) - 1;
    }
    return first;
  }

  // Makes members of the items that wait and have the same segments, in order. Behind its barrier everyone
  // has left the members before, and their keys.
  __device__ __forceinline__ void join(const PlanItem& like) {
    const uint32_t waiting = shared.waiting[warp()];
    PlanItem own{};
    if ((waiting >> lane() & 1) != 0) own = shared.item[threadIdx.x];
    const bool joins = (waiting >> lane() & 1) != 0 && own.segment_begin == like.segment_begin &&
                       own.segment_end == like.segment_end;
    const uint32_t votes = ballot(joins);
    const int queries = joins ? own.query_end - own.query_begin : 0;
    int sum = queries;
#pragma unroll
    for (int step = 1; step < kLanes; step *= 2) {
      const int before = shuffle_up(sum, step);
      if (lane() >= step) sum += before;
    }
    if (lane() == kLanes - 1) {
      shared.joined[warp()] = __popc(votes);
      shared.queries[warp()] = sum;
    }
    __syncthreads();
    int place = __popc(votes & ((1u << lane()) - 1)), before = sum - queries, members = 0, all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      if (w == warp()) {
        place += members;
        before += all;
      }
      members += shared.joined[w];
      all += shared.queries[w];
    }
    if (joins) {
      shared.member[place] = static_cast<uint8_t>(threadIdx.x);
      shared.first_query[place] = before;
    }
    if (lane() == 0) shared.waiting[warp()] = waiting & ~votes;
    if (threadIdx.x == 0) {
      shared.members = members;
      shared.rows = all * a.group;
    }
  }

  // Which of the tile's keys an item holds, and who sees them.
  __device__ __forceinline__ void find_keys(const PlanItem& item) {
    const int mine = first_key() + static_cast<int>(threadIdx.x);
    Key key = kNoKey;
#pragma unroll 1
    for (int32_t base = item.segment_begin; base < item.segment_end; base += kLanes) {
      const int32_t s = base + lane();
      uint32_t candidates = ballot(s < item.segment_end && holds(p.plan.segment[s]));
      for (; candidates != 0; candidates &= candidates - 1) {
        const PlanSegment segment = p.plan.segment[base + __ffs(static_cast<int>(candidates)) - 1];
        const int i = mine - segment.begin;
        if (i >= 0 && i < segment.length)
          key = {1, segment.lo + i * segment.step, segment.hi, segment.depth + i};
      }
    }
    if (threadIdx.x < kKeys) {
      shared.key[threadIdx.x] = key;
      if (key.slot != 0) shared.used[threadIdx.x] = 1;
    }
  }

  // Query i of those of all members, one behind the other.
  __device__ __forceinline__ QueryState query_of(int i) const {
    int place = 0;  // the last member with at most i queries before it
#pragma unroll
    for (int step = kThreads / 2; step > 0; step /= 2) {
      if (place + step < shared.members && shared.first_query[place + step] <= i) place += step;
    }
    const int32_t at = shared.item[shared.member[place]].query_begin + i - shared.first_query[place];
    const int32_t query = p.plan.item_query == nullptr ? at : p.plan.item_query[at];
    return {p.plan.query_index[query], p.plan.query_pos[query], p.plan.query_depth[query], 0};
  }

  __device__ __forceinline__ void meet_rows() {
    if (warp() == 0) {
      int lo = INT32_MAX, hi = INT32_MIN;
      for (int i = lane(); i < kKeys; i += kLanes) {
        lo = min(lo, shared.key[i].lo);
        hi = max(hi, shared.key[i].hi);
      }
      lo = group_min(lo);
      hi = group_max(hi);
      if (lane() == 0) {
        shared.lo = lo;
        shared.hi = hi;
      }
    }
#pragma unroll 1
    for (int first = 0; first < shared.rows; first += kRows) {
      // Row r of the tile is row `skipped` + r of the queries that it begins with.
      const int count = min(kRows, shared.rows - first), begin = first / a.group, skipped = first % a.group;
      const int tile_queries = (skipped + count - 1) / a.group + 1;
      if (static_cast<int>(threadIdx.x) < tile_queries)
        shared.query[threadIdx.x] = query_of(begin + static_cast<int>(threadIdx.x));
      __syncthreads();  // the rows before are done with, too
      int least = INT32_MAX, most = INT32_MIN;
      for (int i = lane(); i < tile_queries; i += kLanes) {
        least = min(least, shared.query[i].pos);
        most = max(most, shared.query[i].pos);
      }
      least = group_min(least);
      most = group_max(most);
      if (most < shared.lo || least >= shared.hi) {
        __syncthreads();
        continue;
      }
      const auto row = [&](const Source<E>& x, int r) -> const E* {
        if (r >= count) return nullptr;
        return x.row(shared.query[(skipped + r) / a.group].index,
                     shared.kv_head * a.group + (skipped + r) % a.group);
      };
      copy_rows(q, kRows, a.q.width, a.q.by_chunks, a.q.data, [&](int r) { return row(a.q, r); });
      copy_rows(dout, kRows, a.dout.width, a.dout.by_chunks, a.dout.data,
                [&](int r) { return row(a.dout, r); });
      ptx::commit_copies();
      put_rows(skipped, count);
      ptx::wait_for_copies<0>();
      __syncthreads();
#pragma unroll 1
      for (int row = part() * kWarpRows; row < (part() + 1) * kWarpRows; row += kStep) {
        if (row < count) meet(row, least, most, count);
      }
    }
  }

  __device__ __forceinline__ void put_rows(int skipped, int count) {
    if (threadIdx.x >= kRows) return;
    const auto r = static_cast<int>(threadIdx.x);
    RowState state{INT32_MIN, 0, INFINITY, 0};
    if (r < count) {
      const QueryState query = load(&shared.query[(skipped + r) / a.group]);
      const int64_t index =
          int64_t{query.index} * p.num_q_heads + shared.kv_head * a.group + (skipped + r) % a.group;
      state = {query.pos, query.depth, log2_lse(a.lse[index]), a.delta[index]};
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
    if (a.logits.cap > 0) {
      weigh<true, true>(weight, ds, key, first_row);
    } else if (everything) {
      weigh<false, false>(weight, ds, key, first_row);
    } else {
      weigh<false, true>(weight, ds, key, first_row);
    }
    Math::accumulate_rows(dv, weight, dout, first_row, a.v.width - first_column, first_column);
    Math::accumulate_rows(dk, ds, q, first_row, a.k.width - first_column, first_column);
  }

  // S and dP become P and dS; kMasked: not all rows see all keys.
  template <bool kCapped, bool kMasked>
  __device__ __forceinline__ void weigh(float (&weight)[kN][4], float (&ds)[kN][4], const Key (&key)[2],
                                        int first_row) const {
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
          const bool sees = !kMasked || seen.sees(key[i], a.logits.window);
          w = sees ? ptx::ex2(logit_of<kCapped>(a, w, slope) - row.lse) : 0.0f;
          gradient = sees ? w * (gradient - row.delta) * slope : 0.0f;
        }
      }
    }
  }

  // In part_dk, part_dv and part_met, of the tile's i-th key.
  __device__ __forceinline__ int64_t part_index(int i) const {
    return (int64_t{shared.piece.slot} * p.num_kv_heads + shared.kv_head) * kKeys + i;
  }

  __device__ __forceinline__ void write() {
    float* memory = reinterpret_cast<float*>(shared.tiles);
    const auto put = [&](E* to, float* to_sum, float* to_part, int width,
                         const float (&sums)[kColumns / 8][4]) {
      write_sums<kColumns, kParts>(
          memory, sums, min(kColumns, width - first_column), [&](int i, int x, float value) {
            if (shared.used[i] == 0) return;
            if (shared.piece.parts > 1) {
              to_part[part_index(i) * width + first_column + x] = value;
              return;
            }
            const int64_t slot = p.plan.slots[first_key() + i];
            put_gradient(to, to_sum, (slot * p.num_kv_heads + shared.kv_head) * width + first_column + x,
                         value);
          });
    };
    put(a.dk, a.dk_sum, a.part_dk, p.head_dim, dk);
    put(a.dv, a.dv_sum, a.part_dv, p.v_head_dim, dv);
  }
};

template <class Math, int kColumns>
__global__ void __launch_bounds__(kThreads, kColumns == 64 ? 2 : 1)
    attend_dkv_kernel(const __grid_constant__ BackwardProblem<typename Math::Element> a) {
  using E = typename Math::Element;
  const AttendParams& p = a.p;
  if (!plan_fits(p)) {
    const auto fill = [&](E* to, float* to_sum, int width) {
      const int64_t token = int64_t{p.num_kv_heads} * width;
      if (to_sum != nullptr)
        fill_nan<float>({to_sum, token, width}, p.num_slots, p.num_kv_heads, width);
      else
        fill_nan<E>({to, token, width}, p.num_slots, p.num_kv_heads, width);
    };
    fill(a.dk, a.dk_sum, p.head_dim);
    fill(a.dv, a.dv_sum, p.v_head_dim);
    return;
  }
  const BlockOf block(a);
  KeyPiece piece{block.tile, 0, 1, -1};
  if (a.index.entry != nullptr) piece = load(a.index.piece + block.tile);
  if (piece.parts == 0) return;
  if (threadIdx.x == 0) {
    shared<KeyShared<E>>().piece = piece;
    shared<KeyShared<E>>().kv_head = block.kv_head;
  }
  __syncthreads();
  KeyGradient<Math, kColumns>(a, block.part * kColumns).run();
}

// Adds up what the pieces of a tile have left, in their order: a block for the first one of each tile and KV
// head.
template <class E>
__global__ void __launch_bounds__(kThreads)
    attend_dkv_add_kernel(const __grid_constant__ BackwardProblem<E> a) {
  constexpr int kKeys = kTileKeys<E>;
  const AttendParams& p = a.p;
  const KeyPiece piece = load(a.index.piece + blockIdx.x);
  const auto kv_head = static_cast<int>(blockIdx.y);
  if (piece.parts < 2 || piece.part != 0 || !plan_fits(p)) return;
  const int first = piece.tile * kKeys;
#pragma unroll 1
  for (int i = warp(); i < min(kKeys, p.plan.num_places - first); i += kWarps) {
    const auto from = [&](int part) {
      return (int64_t{piece.slot + part} * p.num_kv_heads + kv_head) * kKeys + i;
    };
    bool met = false;
    for (int part = lane(); part < piece.parts; part += kLanes) met |= a.part_met[from(part)] != 0;
    if (!any(met)) continue;
    const int64_t to = int64_t{p.plan.slots[first + i]} * p.num_kv_heads + kv_head;
    const auto add = [&](E* sums, float* float_sums, const float* parts, int width) {
      for (int x = lane(); x < width; x += kLanes) {
        float sum = 0;
        for (int part = 0; part < piece.parts; ++part) {
          if (a.part_met[from(part)] != 0) sum += parts[from(part) * width + x];
        }
        put_gradient(sums, float_sums, to * width + x, sum);
      }
    };
    add(a.dk, a.dk_sum, a.part_dk, p.head_dim);
    add(a.dv, a.dv_sum, a.part_dv, p.v_head_dim);
  }
}

template <class Math, int kColumns>
void launch_columns(const AttendBackwardParams& b, const LaunchContext& context) {
  using E = typename Math::Element;
  constexpr int kKeys = kTileKeys<E>;
  auto a = BackwardProblem<E>::of(b);
  if (kKeys != tile_keys(a.p.dtype)) throw std::logic_error("tile_keys() is not kTileKeys");
  const int64_t tiles = (int64_t{a.p.plan.num_places} + kKeys - 1) / kKeys;
  if (tiles == 0) return;
  const size_t matrices = 2 * (bytes_of(a.stages.k, kKeys) + bytes_of(a.stages.v, kKeys));
  const size_t bytes = sizeof(KeyShared<E>) + std::max(matrices, kSumBytes<kColumns>);
  require_shared(bytes, a.p);
  a.column_parts = (std::max(a.p.head_dim, a.p.v_head_dim) + kColumns - 1) / kColumns;
  const int64_t pieces = tiles + a.index.extra;
  launch("attend_dkv", &attend_dkv_kernel<Math, kColumns>, a.blocks(pieces), dim3(kThreads), bytes, context,
         a);
  if (a.index.extra == 0) return;
  launch("attend_dkv_add", &attend_dkv_add_kernel<E>,
         dim3(static_cast<unsigned>(pieces), static_cast<unsigned>(a.p.num_kv_heads)), dim3(kThreads), 0,
         context, a);
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
