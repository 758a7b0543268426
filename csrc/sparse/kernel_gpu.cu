// SPDX-License-Identifier: Apache-2.0
// select_blocks on the GPU; kernel_cpu.cpp has the equations.
//
// Data flow. A block of four warps owns 16 queries of one KV head:
//
//   q of all heads of the group --cp.async--> shared memory, once (a few heads at a time where they do not
//   fit) compressed keys --cp.async--> shared memory, a tile at a time per head: Q K^T --multiply_rows--> S
//   in registers -> p += 2^(S - lse), head after head; a quarter of the
//             tile's keys per warp
//   p --shared memory--> scores of the key blocks that the tile touches, in a ring: a thread per query and
//   block scores of blocks that no key to come touches --insertion, a thread per query--> the best so far
//
// Keys ascend, so a block's score is known soon after the last of its keys; no more of them is ever stored
// than the ring holds. Sums are made in the order of the keys, heads in theirs.
#include <algorithm>

#include "attend/tiles_gpu.cuh"
#include "sparse/params.h"

namespace palmette::gpu {

namespace {

constexpr int kRows = 16;  // queries of a block
static_assert(kSelectQueries % kRows == 0);

template <class E>
struct Problem {
  SelectParams p;
  Source<E> q, k;
  Swizzle swizzle;
  int group, heads_at_once, ring;
  float scale;  // of logits in units of log2
  int q_offset, k_offset, weight_offset, score_offset, best_offset, chosen_offset, lse_offset;  // bytes
};

template <class Math>
struct Selection {
  using E = typename Math::Element;
  static constexpr int kKeys = kTileKeys<E>, kWarpKeys = kKeys / kWarps, kN = kWarpKeys / 8;

  const Problem<E>& a;
  const SelectParams& p;
  const int kv_head, query, token, count;  // token: of the first query, within its sequence
  const int first_key, num_keys;
  unsigned char* memory;

  __device__ __forceinline__ Selection(const Problem<E>& problem, const SelectTile& tile, int first, int head)
      : a(problem),
        p(problem.p),
        kv_head(head),
        query(tile.query + first),
        token(tile.token + first),
        count(min(kRows, tile.num_queries - first)),
        first_key(tile.key),
        num_keys(tile.num_keys),
        memory(gpu::shared<Bytes>().data) {}

  struct Bytes {
    alignas(1024) unsigned char data[16];
  };

  template <class T>
  __device__ __forceinline__ T* at(int offset) const {
    return reinterpret_cast<T*>(memory + offset);
  }
  __device__ __forceinline__ Matrix<E> queries() const { return {at<E>(a.q_offset), a.swizzle}; }
  __device__ __forceinline__ Matrix<E> keys() const { return {at<E>(a.k_offset), a.swizzle}; }
  __device__ __forceinline__ float& weight(int key, int row) const {
    return at<float>(a.weight_offset)[key * (kRows + 1) + row];
  }
  __device__ __forceinline__ float& score(int block, int row) const {
    return at<float>(a.score_offset)[block % a.ring * kRows + row];
  }
  __device__ __forceinline__ int own_block(int row) const {
    return (token + row) / (p.block_strides * p.stride);
  }
  __device__ __forceinline__ int last_token(int key) const { return (key + p.key_strides) * p.stride - 1; }

  __device__ __forceinline__ void run() {
    const auto thread = static_cast<int>(threadIdx.x);
    for (int i = thread; i < a.ring * kRows; i += kThreads) at<float>(a.score_offset)[i] = 0;
    for (int i = thread; i < a.group * kRows; i += kThreads) {
      const int row = i % kRows, head = kv_head * a.group + i / kRows;
      float lse = -INFINITY;
      if (row < count) lse = static_cast<const float*>(p.lse)[int64_t{query + row} * p.num_q_heads + head];
      at<float>(a.lse_offset)[i] = lse == -INFINITY ? INFINITY : lse * kLog2e;  // saw no key: p = 0
    }
    const int last = token + count - 1, own = own_block(count - 1);
    int seen = 0;  // keys that somebody sees
    if (own + 1 > p.topk && last + 1 >= p.key_strides * p.stride)
      seen = min(num_keys, (last + 1) / p.stride - p.key_strides + 1);
    if (seen > 0 && a.heads_at_once == a.group) copy_queries(0, a.group);
    int kept = 0;              // blocks whose scores are known
    int room = 0, chosen = 0;  // of this thread's query: blocks to choose, and chosen so far
    int init = 0, local = 0;   // it takes [0, init) and [local, its own] in any case
    if (thread < count) {
      const int mine = own_block(thread);
      init = min(p.init_blocks, mine + 1);
      local = max(init, mine + 1 - p.local_blocks);
      room = p.topk - init - (mine + 1 - local);
    }
    __syncthreads();
    for (int first = 0; first < seen; first += kKeys) {
      find_weights(first, seen);
      __syncthreads();
      add_scores(first, min(kKeys, seen - first), kept);
      __syncthreads();
      const int known = first + kKeys >= seen ? kept : (first + kKeys) / p.block_strides;
      if (thread < count) {
        for (int block = kept; block < known; ++block) insert(thread, block, init, local, room, chosen);
      }
      kept = known;
    }
    __syncthreads();
    if (thread < count) {
      for (int block = kept; block <= own; ++block) insert(thread, block, init, local, room, chosen);
      write(thread, init, local, chosen);
    }
  }

  __device__ __forceinline__ void copy_queries(int first_head, int heads) {
    copy_rows(queries(), heads * kRows, a.q.width, a.q.by_chunks, a.q.data, [&](int r) -> const E* {
      const int row = r % kRows;
      if (row >= count) return nullptr;
      return a.q.row(query + row, kv_head * a.group + first_head + r / kRows);
    });
    ptx::commit_copies();
  }

  // p of a tile's keys, 0 where a query does not see one.
  __device__ __forceinline__ void find_weights(int first, int seen) {
    copy_rows(keys(), kKeys, a.k.width, a.k.by_chunks, a.k.data, [&](int r) -> const E* {
      return first + r < seen ? a.k.row(first_key + first + r, kv_head) : nullptr;
    });
    ptx::commit_copies();
    float sum[kN][4] = {};
    for (int head = 0; head < a.group; head += a.heads_at_once) {
      const int heads = min(a.heads_at_once, a.group - head);
      if (a.heads_at_once < a.group) copy_queries(head, heads);
      ptx::wait_for_copies<0>();
      __syncthreads();
#pragma unroll 1
      for (int h = 0; h < heads; ++h) add_head(head + h, h * kRows, sum);
      if (a.heads_at_once < a.group) __syncthreads();  // before others take their place
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int key = warp() * kWarpKeys + 8 * n + fragment_column() + e % 2,
                  row = fragment_row() + e / 2 * 8;
        const bool sees = row < count && last_token(first + key) <= token + row;
        weight(key, row) = sees ? sum[n][e] : 0.0f;
      }
    }
  }

  __device__ __forceinline__ void add_head(int head, int first_row, float (&sum)[kN][4]) {
    const float* lse = at<float>(a.lse_offset) + head * kRows + fragment_row();
    const float low = lse[0], high = lse[8];
    const int key = warp() * kWarpKeys;
    float s[kN][4];
    Math::multiply_rows(s, queries(), first_row, keys(), key);
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[n][e] += ptx::ex2(s[n][e] * a.scale - (e < 2 ? low : high));
    }
  }

  // A key counts for a block once per stride that both cover.
  __device__ __forceinline__ void add_scores(int first, int n, int kept) {
    const auto thread = static_cast<int>(threadIdx.x);
    const int row = thread % kRows, end = (first + n + p.key_strides - 2) / p.block_strides + 1;
    for (int block = max(kept, first / p.block_strides) + thread / kRows; block < end;
         block += kThreads / kRows) {
      const int from = block * p.block_strides, to = from + p.block_strides;  // strides
      float sum = score(block, row);
      for (int key = max(first, from - p.key_strides + 1); key < min(first + n, to); ++key) {
        const int times = min(key + p.key_strides, to) - max(key, from);
        for (int i = 0; i < times; ++i) sum += weight(key - first, row);
      }
      score(block, row) = sum;
    }
  }

  // A block whose score is known, into the best so far of a query.
  __device__ __forceinline__ void insert(int row, int block, int init, int local, int room,
                                         int& chosen) const {
    const float value = score(block, row);
    score(block, row) = 0;  // for the block that comes next in its place
    float* best = at<float>(a.best_offset) + row;
    int32_t* blocks = at<int32_t>(a.chosen_offset) + row;
    if (block < init || block >= local || room == 0) return;
    // not "<=": a block whose score is NaN is never better
    if (!(chosen < room ? value == value : value > best[(chosen - 1) * kRows])) return;
    int place = chosen < room ? chosen++ : chosen - 1;
    for (; place > 0 && value > best[(place - 1) * kRows]; --place) {
      best[place * kRows] = best[(place - 1) * kRows];
      blocks[place * kRows] = blocks[(place - 1) * kRows];
    }
    best[place * kRows] = value;
    blocks[place * kRows] = block;
  }

  __device__ __forceinline__ void write(int row, int init, int local, int chosen) const {
    int32_t* blocks = at<int32_t>(a.chosen_offset) + row;
    for (int i = 1; i < chosen; ++i) {  // into ascending order
      const int32_t block = blocks[i * kRows];
      int place = i;
      for (; place > 0 && blocks[(place - 1) * kRows] > block; --place)
        blocks[place * kRows] = blocks[(place - 1) * kRows];
      blocks[place * kRows] = block;
    }
    int32_t* out = p.block_index + (int64_t{kv_head} * p.num_queries + query + row) * p.topk;
    int at = 0;
    for (int block = 0; block < init; ++block) out[at++] = block;
    for (int i = 0; i < chosen; ++i) out[at++] = blocks[i * kRows];
    for (int block = local; block <= own_block(row); ++block) out[at++] = block;
    while (at < p.topk) out[at++] = -1;
  }
};

template <class Math>
__global__ void __launch_bounds__(kThreads, 4)
    select_blocks_kernel(const __grid_constant__ Problem<typename Math::Element> a) {
  constexpr int kParts = kSelectQueries / kRows;
  const auto kv_head = static_cast<int>(blockIdx.x % a.p.num_kv_heads);
  const auto part = static_cast<int>(blockIdx.x / a.p.num_kv_heads);
  const SelectTile tile = a.p.tiles[part / kParts];
  const int first = part % kParts * kRows;
  if (first < tile.num_queries) Selection<Math>(a, tile, first, kv_head).run();
}

template <class Math>
void launch_selection(const SelectParams& p, const LaunchContext& context) {
  using E = typename Math::Element;
  Problem<E> a{};
  a.p = p;
  a.q = source_of<E>(p.q, p.head_dim);
  a.k = source_of<E>(p.k, p.head_dim);
  a.swizzle = swizzle_of<E>(p.head_dim);
  a.group = p.num_q_heads / p.num_kv_heads;
  a.scale = static_cast<float>(p.scale * 1.4426950408889634);
  const int64_t ring = (int64_t{kTileKeys<E>} + p.key_strides) / p.block_strides + 2;
  const int64_t row_bytes = int64_t{a.swizzle.chunks} * kChunkBytes, floats = sizeof(float);
  size_t bytes = 0;
  for (a.heads_at_once = a.group; a.heads_at_once > 0; a.heads_at_once = a.heads_at_once / 2) {
    int64_t end = 0;
    const auto take = [&](int64_t size) {
      const int64_t begin = end;
      end += (size + 1023) / 1024 * 1024;
      return static_cast<int>(begin);
    };
    a.q_offset = take(a.heads_at_once * kRows * row_bytes);
    a.k_offset = take(kTileKeys<E> * row_bytes);
    a.weight_offset = take(kTileKeys<E> * (kRows + 1) * floats);
    a.score_offset = take(ring * kRows * floats);
    a.best_offset = take(p.topk * kRows * floats);
    a.chosen_offset = take(p.topk * kRows * floats);
    a.lse_offset = take(a.group * kRows * floats);
    bytes = static_cast<size_t>(end);
    if (bytes <= shared_limit()) break;
  }
  if (a.heads_at_once == 0)
    throw std::runtime_error("topk, head_dim and kernel_size must be such that a block fits the GPU's " +
                             std::to_string(shared_limit()) + " bytes of shared memory, got " +
                             std::to_string(p.topk) + ", " + std::to_string(p.head_dim) + " and " +
                             std::to_string(int64_t{p.key_strides} * p.stride) + ", which need " +
                             std::to_string(bytes));
  a.ring = static_cast<int>(ring);
  const auto blocks = static_cast<unsigned>(int64_t{p.num_tiles} * (kSelectQueries / kRows) * p.num_kv_heads);
  if (blocks > 0)
    launch("select_blocks", &select_blocks_kernel<Math>, dim3(blocks), dim3(kThreads), bytes, context, a);
}

void select_blocks(const SelectParams& p, const LaunchContext& context) {
  with_math(p.dtype, [&]<class Math>(Math) { launch_selection<Math>(p, context); });
}

const Registration<&select_blocks> registration("select_blocks");

}  // namespace

}  // namespace palmette::gpu
