// SPDX-License-Identifier: Apache-2.0
// Walks a token tree from each root on the GPU; kernel_cpu.cpp has the rules.
//
// A block owns a root. All its threads read the row of the node on which it stands, once; then every thread
// knows the token and takes the same step.
//
// Greedy: the maximum of (logit of t, -t) over a thread's tokens, the lanes of a group, the groups of the
// block.
//
// Sampling, from the sums that kernel_cpu.cpp takes, in its order:
//
//     chain sums    thread 8 k + c adds up p[c], p[8 + c], .. of chunk k
//     chunk sums    of the 8 threads
//     running sums  P[k] of chunks 0 .. k, one after the other, by one thread
//     a chunk       the first k with u P[last] < P[k]
//     a token       of this chunk, one after the other, by one thread
//
// What one thread adds up could be added faster in another order, but then, once in a long while, another
// token than on a CPU would be drawn.
#include <algorithm>

#include "gpu/numbers.cuh"
#include "verify/params.h"

namespace palmette::gpu {

namespace {

constexpr int kMaxThreads = 1024;
constexpr int kNone = -1;  // no token

struct Shared {
  uint64_t key[kMaxThreads / kLanes];  // of groups
  // when sampling:
  float chunk[kSumChunk];  // probabilities, 0 behind the row's end
  int64_t token;
  // and behind it sums of chunks, double [num_chunks]
};

// Keys are ordered by value, NaN above all, and the lower one of two tokens has the greater key.
constexpr uint32_t kNan = 0xFFFFFFFFu;

__device__ __forceinline__ uint64_t make_key(uint32_t value, int token) {
  return uint64_t{value} << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(token));
}
__device__ __forceinline__ int token_of(uint64_t key) {
  return static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(key));
}
// Bits that are ordered like floats.
__device__ __forceinline__ uint32_t ordered(float x) {
  if (x != x) return kNan;
  const uint32_t bits = __float_as_uint(x + 0.0f);  // -0 becomes 0
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t greatest_of_group(uint64_t key) {
#pragma unroll
  for (int step = kLanes / 2; step > 0; step /= 2) {
    const uint64_t other = shuffle_xor(key, step);
    key = other > key ? other : key;
  }
  return key;
}

// On every thread.
__device__ __forceinline__ uint64_t greatest_of_block(uint64_t key, Shared& shared) {
  key = greatest_of_group(key);
  if (lane() == 0) shared.key[warp()] = key;
  __syncthreads();
  key = greatest_of_group(lane() * kLanes < static_cast<int>(blockDim.x) ? shared.key[lane()] : 0);
  __syncthreads();  // the next row's keys go to the same place
  return key;
}

// A visit of a node by a block.
struct Visit {
  int32_t node;
  VerifyFault* fault;

  __device__ __forceinline__ int fail(RowFault kind, int token, double value) const {
    if (threadIdx.x == 0) *fault = {kind, node, token, value};
    return kNone;
  }
};

// The first token of the greatest logit.
template <class E>
__device__ __forceinline__ int argmax(const E* row, int vocab, const Visit& visit, Shared& shared) {
  float best = -INFINITY;
  int token = 0;  // unless something is above -inf
  const auto look = [&](int t, float x) {
    const bool first_nan = x != x && best == best;
    if (x > best || first_nan) {
      best = x;
      token = t;
    }
  };
  // Rows begin anywhere; between the ends they are read 16 bytes at a time. A thread's tokens ascend.
  constexpr int kWidth = 16 / sizeof(E);
  using Part = Pack<E, kWidth>;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const auto unaligned = static_cast<int>(reinterpret_cast<uintptr_t>(row) / sizeof(E) % kWidth);
  const int begin = min(vocab, (kWidth - unaligned) % kWidth);
  const int parts = (vocab - begin) / kWidth;
  if (thread < begin) look(thread, widen(row[thread]));
#pragma unroll 4
  for (int i = thread; i < parts; i += threads) {
    const Part part = load(reinterpret_cast<const Part*>(row + begin) + i);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) look(begin + i * kWidth + k, widen(part.value[k]));
  }
  const int last = begin + parts * kWidth + thread;
  if (last < vocab) look(last, widen(row[last]));

  const uint64_t top = greatest_of_block(make_key(ordered(best), token), shared);
  token = token_of(top);
  return top >> 32 == kNan ? visit.fail(RowFault::nan, token, NAN) : token;
}

// The sums of chunks, and whether one of this thread's probabilities is negative or NaN.
template <class E>
__device__ __forceinline__ bool add_chunks(const E* row, int vocab, double* chunk_sum) {
  constexpr int kTogether = kLanes / kSumChains;  // chunks of a group
  const int chain = lane() % kSumChains, place = lane() / kSumChains;
  const int step = static_cast<int>(blockDim.x) / kSumChains;
  bool bad = false;
  for (int first = warp() * kTogether; first * kSumChunk < vocab; first += step) {
    const int chunk = first + place;
    const E* p = row + chunk * kSumChunk;
    const int count = min(kSumChunk, vocab - chunk * kSumChunk);  // not positive behind the last chunk
    double sum = 0;
    int i = chain;
#pragma unroll 8
    for (; i - chain + kSumChains <= count; i += kSumChains) {
      const float x = widen(p[i]);
      bad = bad || !(x >= 0);
      sum += static_cast<double>(x);
    }
    double total = 0;
#pragma unroll
    for (int c = 0; c < kSumChains; ++c) total += shuffle(sum, place * kSumChains + c);
    if (chain == 0 && count > 0) {
      for (; i < count; ++i) {
        const float x = widen(p[i]);
        bad = bad || !(x >= 0);
        total += static_cast<double>(x);
      }
      chunk_sum[chunk] = total;
    }
  }
  return bad;
}

// The place in a chunk where the running sum of its probabilities, on top of `before`, exceeds `target`.
__device__ __forceinline__ int find(const float (&chunk)[kSumChunk], double before, double target) {
  constexpr int kBatch = 16;  // sums never decrease, so it is enough to look at every 16th at first
  for (int i = 0; i < kSumChunk; i += kBatch) {
    double after = before;
#pragma unroll
    for (int k = 0; k < kBatch; ++k) after += static_cast<double>(chunk[i + k]);
    if (target < after) {
      while (!(target < (before += static_cast<double>(chunk[i])))) ++i;
      return i;
    }
    before = after;
  }
  // Added in this order, the chunk fell short by a rounding error: the last token that can be drawn.
  int i = kSumChunk - 1;
  while (i > 0 && chunk[i] == 0) --i;
  return i;
}

// The token on which `uniform` falls.
template <class E>
__device__ __forceinline__ int sample(const E* row, int vocab, double uniform, double tolerance,
                                      const Visit& visit, Shared& shared) {
  double* sums = reinterpret_cast<double*>(&shared + 1);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int chunks = (vocab + kSumChunk - 1) / kSumChunk;
  if (__syncthreads_or(add_chunks(row, vocab, sums)) != 0) {
    int bad = thread;
    while (bad < vocab && widen(row[bad]) >= 0) bad += threads;
    bad = token_of(greatest_of_block(make_key(0, bad), shared));
    const float value = widen(row[bad]);
    return visit.fail(value < 0 ? RowFault::negative : RowFault::nan, bad, value);
  }
  if (thread == 0) {
    double before = 0;
#pragma unroll 8
    for (int k = 0; k < chunks; ++k) sums[k] = before += sums[k];
  }
  __syncthreads();
  const double total = sums[chunks - 1];
  if (!(total >= 1.0 - tolerance && total <= 1.0 + tolerance)) return visit.fail(RowFault::sum, 0, total);

  const double target = uniform * total;
  int chunk = 0, last_chunk = chunks - 1;
  while (chunk < last_chunk) {
    const int middle = (chunk + last_chunk) / 2;
    if (target < sums[middle]) {
      last_chunk = middle;
    } else {
      chunk = middle + 1;
    }
  }
  const int begin = chunk * kSumChunk, count = min(kSumChunk, vocab - begin);
  for (int i = thread; i < kSumChunk; i += threads) shared.chunk[i] = i < count ? widen(row[begin + i]) : 0;
  __syncthreads();
  if (thread == 0) shared.token = begin + find(shared.chunk, chunk == 0 ? 0 : sums[chunk - 1], target);
  __syncthreads();
  return static_cast<int>(shared.token);
}

template <class E, bool kSample>
__global__ void __launch_bounds__(kMaxThreads, 1) verify_kernel(const __grid_constant__ VerifyParams p) {
  Shared& shared = gpu::shared<Shared>();
  const int64_t r = blockIdx.x;
  const int vocab = static_cast<int>(p.vocab);
  int64_t* accepted = p.accepted + r * p.max_depth;
  if (threadIdx.x == 0) p.fault[r] = {RowFault::none, 0, 0, 0};
  int64_t count = 0;
  int32_t node = p.root[r];
  int token;
  for (;;) {
    const E* row = static_cast<const E*>(p.rows) + node * p.row_stride;
    const Visit visit{node, p.fault + r};
    if constexpr (kSample) {
      token = sample(row, vocab, p.uniforms[r * (p.max_depth + 1) + count], p.tolerance, visit, shared);
    } else {
      token = argmax(row, vocab, visit, shared);
    }
    if (token == kNone) break;
    int32_t child = p.first_child[node];
    while (child >= 0 && p.token[child] != token) child = p.next_sibling[child];
    if (child < 0) break;
    if (threadIdx.x == 0) accepted[count] = child;
    ++count;
    node = child;
  }
  if (token == kNone) count = 0;  // of the path nothing is left, either
  for (int64_t i = count + threadIdx.x; i < p.max_depth; i += blockDim.x) accepted[i] = -1;
  if (threadIdx.x == 0) {
    p.num_accepted[r] = token == kNone ? -1 : count;
    p.bonus[r] = token;
  }
}

// Enough threads for `parts` of a row.
dim3 block_for(int64_t parts) {
  const int64_t groups = (parts + kLanes - 1) / kLanes;
  return dim3(kLanes * static_cast<unsigned>(std::clamp<int64_t>(groups, 1, kMaxThreads / kLanes)));
}

void verify_greedy(const VerifyParams& p, const LaunchContext& context) {
  if (p.num_roots == 0) return;
  with_element(p.dtype, [&]<class E>(E) {
    launch("verify_greedy", &verify_kernel<E, false>, dim3(static_cast<unsigned>(p.num_roots)),
           block_for(p.vocab * static_cast<int64_t>(sizeof(E)) / 16), sizeof(Shared), context, p);
  });
}

void verify_sample(const VerifyParams& p, const LaunchContext& context) {
  if (p.num_roots == 0) return;
  const int64_t chunks = (p.vocab + kSumChunk - 1) / kSumChunk;
  with_element(p.dtype, [&]<class E>(E) {
    launch("verify_sample", &verify_kernel<E, true>, dim3(static_cast<unsigned>(p.num_roots)),
           block_for(chunks * kSumChains), sizeof(Shared) + static_cast<size_t>(chunks) * sizeof(double),
           context, p);
  });
}

const Registration<&verify_greedy> greedy("verify_greedy");
const Registration<&verify_sample> sampling("verify_sample");

}  // namespace

}  // namespace palmette::gpu
