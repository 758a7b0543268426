// SPDX-License-Identifier: Apache-2.0
// Log-probabilities of chosen tokens on the GPU; kernel_cpu.cpp has the equations.
//
// A block owns a row and reads it once, 16 bytes per thread and access. A thread keeps (m, s, u) of what it
// has seen; pairs are then combined over lanes and warps, with t = 1 / temperature,
//
//     m = max(m1, m2)    di = t (mi - m)    s = s1 e^d1 + s2 e^d2    u = sum_i e^di (ui + si di),
//
// in an order that depends on nothing. Backward reads and writes a row once.
#include <algorithm>

#include "gpu/numbers.cuh"
#include "loss/params.h"

namespace palmette::gpu {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr float kLeastLogit = -1e4f;  // as on the CPU

struct Seen {
  float most, sum, weighted;
};
struct LogprobsShared {
  Seen seen[kWarps];
};

__device__ __forceinline__ float e_to(float x) { return ptx::ex2(x * kLog2e); }

__device__ __forceinline__ Seen combine(const Seen& a, const Seen& b, float inverse) {
  const float most = fmaxf(a.most, b.most);
  if (most == -INFINITY) return {most, a.sum + b.sum, a.weighted + b.weighted};  // nothing yet, or NaN
  const float da = fmaxf((a.most - most) * inverse, kLeastLogit);
  const float db = fmaxf((b.most - most) * inverse, kLeastLogit);
  const float ea = e_to(da), eb = e_to(db);
  return {most, a.sum * ea + b.sum * eb, ea * (a.weighted + a.sum * da) + eb * (b.weighted + b.sum * db)};
}

// f(first element, how many, pack) over a row, dealt out to the threads; the ends one element at a time.
template <class E, class F>
__device__ __forceinline__ void each_pack(const E* row, int64_t vocab, F&& f) {
  constexpr int kWidth = 16 / sizeof(E);
  using Part = Pack<E, kWidth>;
  const auto unaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(E) % kWidth);
  const int64_t begin = min(vocab, (kWidth - unaligned) % kWidth), parts = (vocab - begin) / kWidth;
  for (int64_t i = threadIdx.x; i < begin; i += kThreads) {
    Part one{};
    one.value[0] = row[i];
    f(i, 1, one);
  }
  for (int64_t i = threadIdx.x; i < parts; i += kThreads)
    f(begin + i * kWidth, kWidth, load(reinterpret_cast<const Part*>(row + begin) + i));
  for (int64_t i = begin + parts * kWidth + threadIdx.x; i < vocab; i += kThreads) {
    Part one{};
    one.value[0] = row[i];
    f(i, 1, one);
  }
}

template <class E>
__global__ void __launch_bounds__(kThreads) gather_logprobs_kernel(const __grid_constant__ LogprobsParams p) {
  constexpr int kWidth = 16 / sizeof(E);
  LogprobsShared& shared = gpu::shared<LogprobsShared>();
  const int64_t index = blockIdx.x;
  const E* row = static_cast<const E*>(p.logits) + index * p.row_stride;
  const auto inverse = static_cast<float>(p.inverse_temperature);
  Seen seen{-INFINITY, 0, 0};
  each_pack(row, p.vocab, [&](int64_t, int count, const Pack<E, kWidth>& pack) {
    float top = seen.most;
    for (int k = 0; k < count; ++k) top = fmaxf(top, widen(pack.value[k]));
    if (top > seen.most) seen = combine(seen, {top, 0, 0}, inverse);
    const float shift = seen.most == -INFINITY ? 0.0f : seen.most;
    for (int k = 0; k < count; ++k) {
      const float z = (widen(pack.value[k]) - shift) * inverse;
      const float kept = z < kLeastLogit ? kLeastLogit : z;  // NaN stays
      const float e = e_to(kept);
      seen.sum += e;
      seen.weighted += e * kept;
    }
  });
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    const Seen other{shuffle_xor(seen.most, step), shuffle_xor(seen.sum, step),
                     shuffle_xor(seen.weighted, step)};
    seen = (lane() & step) == 0 ? combine(seen, other, inverse) : combine(other, seen, inverse);
  }
  if (lane() == 0) shared.seen[warp()] = seen;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kWarps; ++w) seen = combine(seen, shared.seen[w], inverse);
  const float log_sum = log2f(seen.sum) * kLn2;
  static_cast<float*>(p.lse)[index] = seen.most * inverse + log_sum;
  const int64_t target = p.targets[index];
  const bool known = target >= 0 && target < p.vocab;
  static_cast<float*>(p.logprobs)[index] = known ? (widen(row[target]) - seen.most) * inverse - log_sum : NAN;
  if (p.entropies != nullptr) static_cast<float*>(p.entropies)[index] = log_sum - seen.weighted / seen.sum;
}

template <class E>
__global__ void __launch_bounds__(kThreads)
    gather_logprobs_backward_kernel(const __grid_constant__ LogprobsBackwardParams p) {
  constexpr int kWidth = 16 / sizeof(E);
  using Part = Pack<E, kWidth>;
  const int64_t index = blockIdx.x;
  E* row = static_cast<E*>(p.logits) + index * p.row_stride;
  const auto inverse = static_cast<float>(p.inverse_temperature);
  const auto value = [&](const void* of) {
    return of == nullptr ? 0.0f : static_cast<const float*>(of)[index];
  };
  const float lse = value(p.lse), g = value(p.dlogprobs), h = value(p.dentropies);
  const float entropy = h == 0 ? 0.0f : value(p.entropies);
  const int64_t target = p.targets[index];
  const bool nothing = g == 0 && h == 0;
  each_pack(row, p.vocab, [&](int64_t first, int count, Part pack) {
    for (int k = 0; k < count; ++k) {
      const float z = widen(pack.value[k]) * inverse - lse;
      const float kept = z < kLeastLogit ? kLeastLogit : z;
      const float d = (first + k == target ? g : 0.0f) - e_to(kept) * (g + h * (kept + entropy));
      pack.value[k] = narrow<E>(nothing ? 0.0f : d * inverse);
    }
    if (count == 1)
      row[first] = pack.value[0];
    else
      store(reinterpret_cast<Part*>(row + first), pack);
  });
}

void gather_logprobs(const LogprobsParams& p, const LaunchContext& context) {
  if (p.num_rows == 0) return;
  with_element(p.dtype, [&]<class E>(E) {
    launch("gather_logprobs", &gather_logprobs_kernel<E>, dim3(static_cast<unsigned>(p.num_rows)),
           dim3(kThreads), sizeof(LogprobsShared), context, p);
  });
}

void gather_logprobs_backward(const LogprobsBackwardParams& p, const LaunchContext& context) {
  if (p.num_rows == 0) return;
  with_element(p.dtype, [&]<class E>(E) {
    launch("gather_logprobs_backward", &gather_logprobs_backward_kernel<E>,
           dim3(static_cast<unsigned>(p.num_rows)), dim3(kThreads), 0, context, p);
  });
}

const Registration<&gather_logprobs> forward("gather_logprobs");
const Registration<&gather_logprobs_backward> backward("gather_logprobs_backward");

}  // namespace

}  // namespace palmette::gpu
