// SPDX-License-Identifier: Apache-2.0
// Which items hold keys of a tile, for dK and dV on the GPU (backward_gpu.cuh): a plan's tables, ordered by
// keys.
//
// The tiles of keys are the leaves of a binary tree whose nodes are numbered as in a heap: 1 is the root, 2 n
// and 2 n + 1 are below n, tile t is node leaves + t. A segment of an item that reaches from tile `first` to
// tile `last` is an entry of one or two neighbouring nodes,
//
//   (leaves + first) >> L, (leaves + last) >> L,  L = min{L : (last >> L) - (first >> L) <= 1},
//
// however long it is. So a tile finds its items in the lists of its own node and of those above it, among
// others of the same size that end nearby, and there are at most two entries per segment of an item.
//
// Data flow: a counting sort, by node, of what chunks of the plan's tasks list. A warp reads a chunk.
//
//   tasks, items, segments --attend_index_count--> entries of each node and chunk
//   --attend_index_sum, attend_index_place: one running sum, node by node, in each chunk by chunk--> where
//   the entries begin --attend_index_fill: the same entries again, each to its place--> lists, and where they
//   end
//
// The order within a list is that of the tasks, whatever runs first: nobody shares a place with another
// chunk.
#include "attend/backward_gpu.cuh"
#include "attend/key_tiles.h"

namespace palmette::gpu {

namespace {

struct Nodes {
  int32_t low, high;
};

__device__ __forceinline__ Nodes nodes_of(const PlanSegment& s, const KeyIndex& index) {
  const int32_t first = s.begin / index.keys, last = (s.begin + s.length - 1) / index.keys;
  int level = 0;
  while ((last >> level) - (first >> level) > 1) ++level;
  return {(index.leaves + first) >> level, (index.leaves + last) >> level};
}

// f(exists, entry, nodes) for each segment of each item of the chunk's tasks, 32 at a time, a lane each and
// all lanes together.
template <class F>
__device__ __forceinline__ void for_each_entry(const AttendBackwardParams& b, F f) {
  const PlanView& plan = b.forward.plan;
  const int64_t tasks = plan.counts[kNumTasks], chunk = blockIdx.x;
  const auto begin = static_cast<int32_t>(chunk * tasks / b.index.chunks),
             end = static_cast<int32_t>((chunk + 1) * tasks / b.index.chunks);
#pragma unroll 1
  for (int32_t t = begin; t < end; ++t) {
    const PlanTask task = plan.task[t];
#pragma unroll 1
    for (int32_t base = task.item_begin; base < task.item_end; base += kLanes) {
      // Every lane looks at an item; a running sum of their segments says whose a lane's next one is.
      PlanItem item{};
      if (base + lane() < task.item_end) item = plan.item[base + lane()];
      const int segments = item.segment_end - item.segment_begin;
      int behind = segments;
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        const int before = shuffle_up(behind, step);
        if (lane() >= step) behind += before;
      }
      const int total = shuffle(behind, kLanes - 1);
#pragma unroll 1
      for (int first = 0; first < total; first += kLanes) {
        const int i = first + lane();
        int holder = 0;  // the first lane whose segments end behind the i-th
#pragma unroll
        for (int step = kLanes / 2; step > 0; step /= 2) {
          if (shuffle(behind, holder + step - 1) <= i) holder += step;
        }
        const int32_t first_segment = shuffle(item.segment_begin, holder);
        const KeyEntry entry{base + holder, first_segment + i - shuffle(behind - segments, holder),
                             first_segment, task.kv_head};
        PlanSegment segment{};
        if (i < total) segment = plan.segment[entry.segment];
        const bool exists = segment.length > 0;
        f(exists, entry, exists ? nodes_of(segment, b.index) : Nodes{});
      }
    }
  }
}

__global__ void __launch_bounds__(kLanes)
    attend_index_count_kernel(const __grid_constant__ AttendBackwardParams b) {
  const KeyIndex& index = b.index;
  int32_t* count = index.end + blockIdx.x;
  for (int64_t node = lane(); node < 2 * index.leaves; node += kLanes) count[node * index.chunks] = 0;
  __syncthreads();
  for_each_entry(b, [&](bool exists, const KeyEntry&, const Nodes& nodes) {
    if (!exists) return;
    atomicAdd(count + int64_t{nodes.low} * index.chunks, 1);
    if (nodes.high != nodes.low) atomicAdd(count + int64_t{nodes.high} * index.chunks, 1);
  });
}

// Sums of a block's threads, in their order: what those before have, and all of them.
struct RunningSum {
  int32_t before, total;
};
__device__ __forceinline__ RunningSum running_sum(int32_t value, int32_t (&of_warp)[kWarps]) {
  int32_t sum = value;
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const int32_t before = shuffle_up(sum, step);
    if (lane() >= step) sum += before;
  }
  if (lane() == kLanes - 1) of_warp[warp()] = sum;
  __syncthreads();
  RunningSum result{sum - value, 0};
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    result.before += w < warp() ? of_warp[w] : 0;
    result.total += of_warp[w];
  }
  return result;
}

struct SumShared {
  int32_t blocks[kWarps], threads[kWarps];
};

// The counts that a thread of attend_index_sum and attend_index_place adds up: neighbours.
struct Counts {
  int32_t *begin, *end;

  __device__ __forceinline__ explicit Counts(const KeyIndex& index) {
    const int64_t counts = int64_t{2} * index.leaves * index.chunks,
                  threads = int64_t{kIndexBlocks} * kThreads;
    const int64_t run = (counts + threads - 1) / threads,
                  first = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * run;
    begin = index.end + min(first, counts);
    end = index.end + min(first + run, counts);
  }
  __device__ __forceinline__ int32_t sum() const {
    int32_t total = 0;
    for (const int32_t* count = begin; count < end; ++count) total += *count;
    return total;
  }
};

__global__ void __launch_bounds__(kThreads)
    attend_index_sum_kernel(const __grid_constant__ AttendBackwardParams b) {
  const RunningSum sum = running_sum(Counts(b.index).sum(), shared<SumShared>().threads);
  if (threadIdx.x == 0) b.index.sums[blockIdx.x] = sum.total;
  for (int32_t node = static_cast<int32_t>(blockIdx.x) * kThreads + static_cast<int32_t>(threadIdx.x);
       node < 2 * b.index.leaves; node += kIndexBlocks * kThreads)
    b.index.queries[node] = 0;
}

__global__ void __launch_bounds__(kThreads)
    attend_index_place_kernel(const __grid_constant__ AttendBackwardParams b) {
  static_assert(kIndexBlocks <= kThreads);
  const Counts counts(b.index);
  const bool before = threadIdx.x < blockIdx.x;
  int32_t place = running_sum(before ? b.index.sums[threadIdx.x] : 0, shared<SumShared>().blocks).total +
                  running_sum(counts.sum(), shared<SumShared>().threads).before;
  for (int32_t* count = counts.begin; count < counts.end; ++count) {
    const int32_t entries = *count;
    *count = place;
    place += entries;
  }
}

__global__ void __launch_bounds__(kLanes)
    attend_index_fill_kernel(const __grid_constant__ AttendBackwardParams b) {
  const KeyIndex& index = b.index;
  // Of the lanes with the same node, each takes a place behind the one before, the last one says where they
  // end. Entries beyond the capacity are counted only: attend_dkv sees that there were more.
  const auto put = [&](bool exists, const KeyEntry& entry, int32_t node) {
    if (!any(exists)) return;
    if (exists) {
      const PlanItem& item = b.forward.plan.item[entry.item];
      atomicAdd(index.queries + node, item.query_end - item.query_begin);
    }
    const int32_t mine = exists ? node : -1;
    int before = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      const bool same = shuffle(mine, i) == mine;
      equal += same ? 1 : 0;
      before += same && i < lane() ? 1 : 0;
    }
    int32_t* end = index.end + int64_t{node} * index.chunks + blockIdx.x;
    const int32_t place = exists ? *end + before : 0;
    if (exists && place < index.capacity) store(index.entry + place, entry);
    __syncthreads();
    if (exists && before == equal - 1) *end = place + 1;
    __syncthreads();
  };
  for_each_entry(b, [&](bool exists, const KeyEntry& entry, const Nodes& nodes) {
    put(exists, entry, nodes.low);
    put(exists && nodes.high != nodes.low, entry, nodes.high);
  });
}

// The pieces that attend_dkv works on. A tile is cut where queries enough meet it, or may meet it: those of
// the lists that it will look through. One block; all of its choices follow from the plan.
__global__ void __launch_bounds__(kThreads)
    attend_index_cut_kernel(const __grid_constant__ AttendBackwardParams b) {
  const KeyIndex& index = b.index;
  auto& memory = shared<SumShared>();
  const auto thread = static_cast<int32_t>(threadIdx.x);
  const bool complete = index.end[2 * index.leaves * index.chunks - 1] <= index.capacity;
  for (int32_t tile = thread; tile < index.tiles; tile += kThreads) {
    int32_t queries = 0;
    for (int32_t node = complete ? index.leaves + tile : 0; node > 0; node /= 2)
      queries += index.queries[node];
    index.work[tile] = queries;
  }
  // Each thread comes back to the tiles that it has written.
  const auto parts = [&](int32_t tile, int32_t queries) {
    return max(1, (index.work[tile] + queries - 1) / queries);
  };
  int32_t queries = index.least;
  for (;; queries *= 2) {
    int32_t extra = 0;  // up to one more than there may be
    for (int32_t tile = thread; tile < index.tiles; tile += kThreads)
      extra = min(extra + parts(tile, queries) - 1, index.extra + 1);
    const int32_t all = running_sum(extra, memory.threads).total;
    __syncthreads();
    if (all <= index.extra) break;
  }
  int32_t piece = 0, slot = 0;
  for (int32_t base = 0; base < index.tiles; base += kThreads) {
    const int32_t tile = base + thread, n = tile < index.tiles ? parts(tile, queries) : 0;
    const RunningSum pieces = running_sum(n, memory.threads),
                     slots = running_sum(n > 1 ? n : 0, memory.blocks);
    for (int32_t part = 0; part < n; ++part) {
      store(index.piece + piece + pieces.before + part,
            KeyPiece{tile, part, n, n > 1 ? slot + slots.before + part : -1});
    }
    piece += pieces.total;
    slot += slots.total;
    __syncthreads();
  }
  for (int32_t i = piece + thread; i < index.tiles + index.extra; i += kThreads)
    store(index.piece + i, KeyPiece{0, 0, 0, -1});
}

}  // namespace

void launch_index(const AttendBackwardParams& b, const LaunchContext& context) {
  const dim3 chunks(static_cast<unsigned>(b.index.chunks)), blocks(kIndexBlocks);
  launch("attend_index_count", &attend_index_count_kernel, chunks, dim3(kLanes), 0, context, b);
  launch("attend_index_sum", &attend_index_sum_kernel, blocks, dim3(kThreads), sizeof(SumShared), context, b);
  launch("attend_index_place", &attend_index_place_kernel, blocks, dim3(kThreads), sizeof(SumShared), context,
         b);
  launch("attend_index_fill", &attend_index_fill_kernel, chunks, dim3(kLanes), 0, context, b);
  launch("attend_index_cut", &attend_index_cut_kernel, dim3(1), dim3(kThreads), sizeof(SumShared), context,
         b);
}

}  // namespace palmette::gpu
