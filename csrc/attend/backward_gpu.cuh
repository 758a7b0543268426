// SPDX-License-Identifier: Apache-2.0
// The gradient of attend on the GPU: what its kernels share.
//
//   P = 2^(S - lse),  D_i = sum(dO_i * O_i) - dlse_i,  dP = dO V^T,  dS = slope P * (dP - D)
//   dQ = dS K,   dK = dS^T Q,   dV = P^T dO,   dsink_h = -sum_i exp(sink_h - lse_i) D_i
//
// Every output has one owner, so there are no atomics and one order of summation:
//
//   kernel_backward_gpu.cu  attend_delta: D by rows of O, and the rows' parts of dsink; attend_dsinks adds
//                           those up
//   kernel_dq_gpu.cu        attend_dq: dQ by tiles of queries
//   kernel_index_gpu.cu     attend_index_...: which items hold keys of a tile
//   kernel_dkv_gpu.cu       attend_dkv: dK and dV by tiles of keys, or parts of them, which attend_dkv_add
//   adds
//
// A plan lists its keys by task. Who owns queries finds the tasks that touch them by looking through the
// plan's tables, 128 tasks at a time: a few bytes per task. Who owns keys does so too where that is little;
// elsewhere the GPU orders the tables by keys first, when a gradient is wanted: a second set of them would
// have to be made, moved and kept up to date for every step of decoding that needs none.
#pragma once

#include "attend/tiles_gpu.cuh"

namespace palmette::gpu {

void launch_dq(const AttendBackwardParams& b, const LaunchContext& context);
void launch_index(const AttendBackwardParams& b, const LaunchContext& context);
void launch_dkv(const AttendBackwardParams& b, const LaunchContext& context);

template <class E>
struct BackwardProblem {
  AttendParams p;
  Source<E> q, k, v, dout;
  const float *lse, *delta;  // [Nq, Hq]
  E *dq, *dk, *dv;           // contiguous
  float *dk_sum, *dv_sum;    // in place of dk and dv, or null
  Logits logits;
  Stages stages;
  int group;
  int column_parts;
  float* part_dq;
  KeyIndex index;  // of dK and dV: attend_dkv alone knows of these
  float *part_dk, *part_dv;
  int32_t* part_met;

  static BackwardProblem of(const AttendBackwardParams& b) {
    const AttendParams& p = b.forward;
    BackwardProblem a{};
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
    a.dk_sum = b.dk_sum;
    a.dv_sum = b.dv_sum;
    a.logits = Logits::of(p);
    a.stages = Stages::of<E>(p);
    a.group = p.num_q_heads / p.num_kv_heads;
    a.part_dq = b.part_dq;
    a.index = b.index;
    a.part_dk = b.part_dk;
    a.part_dv = b.part_dv;
    a.part_met = b.part_met;
    return a;
  }
  // A block per tile, KV head and part of the columns.
  dim3 blocks(int64_t tiles) const {
    return dim3(static_cast<unsigned>(tiles * p.num_kv_heads * column_parts));
  }
};

// Of a block, the inverse of blocks().
struct BlockOf {
  int tile, kv_head, part;

  template <class E>
  __device__ __forceinline__ explicit BlockOf(const BackwardProblem<E>& a)
      : tile(static_cast<int>(blockIdx.x / (a.column_parts * a.p.num_kv_heads))),
        kv_head(static_cast<int>(blockIdx.x / a.column_parts % a.p.num_kv_heads)),
        part(static_cast<int>(blockIdx.x % a.column_parts)) {}
};

// lse in units of log2; a row that has seen no key has P = 0.
__device__ __forceinline__ float log2_lse(float lse) { return lse == -INFINITY ? INFINITY : lse * kLog2e; }

// P * 2^lse and the slope of a logit. Which of the two kinds of logits it is, whoever meets a tile knows.
template <bool kCapped, class E>
__device__ __forceinline__ float logit_of(const BackwardProblem<E>& a, float product, float& slope) {
  Logits logits = a.logits;
  if (!kCapped) logits.cap = 0;
  return logits(product, slope);
}

// Of row `row` of `at`, in lse and delta.
template <class E>
__device__ __forceinline__ int64_t state_index(const BackwardProblem<E>& a, const RowOf& at, int row,
                                               int kv_head) {
  const int64_t query = a.p.plan.query_index[at.query(row)];
  return query * a.p.num_q_heads + kv_head * a.group + row % a.group;
}

// The tasks among kThreads from `base` on that pass a test, in ascending order. Everyone has left the list
// before when some thread comes here again: the last barrier of a call is behind all that it reads of
// `passed`, the first one of the next call behind all that was read of `task`.
struct TaskList {
  int32_t task[kThreads];
  int32_t passed[kWarps];
};
template <class Test>
__device__ __forceinline__ int list_tasks(TaskList& list, int32_t base, int32_t total, Test test) {
  const int32_t index = base + static_cast<int32_t>(threadIdx.x);
  const bool passes = index < total && test(index);
  const uint32_t votes = ballot(passes);
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

inline size_t bytes_of(const Swizzle& swizzle, int rows) {
  return static_cast<size_t>(rows) * swizzle.chunks * kChunkBytes;
}

}  // namespace palmette::gpu
