// SPDX-License-Identifier: Apache-2.0
// Log-sum-exp merge of attention states on the GPU; kernel_cpu.cpp has the equations.
//
// A group of 32 lanes owns one head of one query and reads its states from the first to the last: once their
// LSEs (a lane each), then their rows, kColumns at a time with head_dim across the lanes. Nothing is shared
// between groups, so the result depends on nothing but the states.
#include "gpu/numbers.cuh"
#include "merge/params.h"

namespace palmette::gpu {

namespace {

constexpr int kGroups = 4;  // per block

struct Rows {
  int64_t begin, count;
};
__device__ __forceinline__ Rows rows_of(const MergeParams& p, int64_t n) {
  if (p.indptr32 != nullptr) return {p.indptr32[n], p.indptr32[n + 1] - p.indptr32[n]};
  if (p.indptr64 != nullptr) return {p.indptr64[n], p.indptr64[n + 1] - p.indptr64[n]};
  return {0, p.num_states};
}

// The head of a query that this group owns.
struct Place {
  int64_t query, head;
  bool exists;
};
__device__ __forceinline__ Place place(const MergeParams& p) {
  const int64_t index = int64_t{blockIdx.x} * kGroups + warp();
  return {index / p.num_heads, index % p.num_heads, index < p.num_queries * p.num_heads};
}

// kWidth neighbours per lane and access.
template <class E, int kWidth>
__global__ void __launch_bounds__(kGroups* kLanes)
    merge_states_kernel(const __grid_constant__ MergeParams p) {
  const Place at = place(p);
  if (!at.exists) return;
  const Rows rows = rows_of(p, at.query);
  const float* lses = static_cast<const float*>(p.lses) + at.query * p.lses_query +
                      rows.begin * p.lses_state + at.head * p.lses_head;
  const E* outs = static_cast<const E*>(p.outs) + at.query * p.outs_query + rows.begin * p.outs_state +
                  at.head * p.outs_head;

  float top = -INFINITY;
  for (int64_t s = lane(); s < rows.count; s += kLanes) top = fmaxf(top, lses[s * p.lses_state]);
  top = group_max(top);
  const float shift = top == -INFINITY ? 0.0f : top;
  float sum = 0;
  for (int64_t s = lane(); s < rows.count; s += kLanes)
    sum += exponential(lses[s * p.lses_state] - shift, p.base2 != 0);
  sum = group_sum(sum);  // NaN if a state has +inf (inf - inf) or NaN
  const float scale = 1.0f / sum;
  const int64_t index = at.query * p.num_heads + at.head;
  if (lane() == 0) {
    const float log_sum = log2f(sum) * (p.base2 ? 1.0f : kLn2);
    static_cast<float*>(p.lse)[index] = top + log_sum;  // -inf where all are empty, as log 0 is -inf
  }

  constexpr int kColumns = kLanes * kWidth;
  using Part = Pack<E, kWidth>;
  for (int64_t x = int64_t{lane()} * kWidth; x < p.head_dim; x += kColumns) {
    float total[kWidth] = {};
    for (int64_t s = 0; s < rows.count; ++s) {
      const float l = lses[s * p.lses_state];
      if (l == -INFINITY) continue;  // empty, whatever its row holds
      const float weight = exponential(l - shift, p.base2 != 0) * scale;
      const Part row = load(reinterpret_cast<const Part*>(outs + s * p.outs_state + x));
#pragma unroll
      for (int i = 0; i < kWidth; ++i) total[i] = fmaf(weight, widen(row.value[i]), total[i]);
    }
    Part result;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) result.value[i] = narrow<E>(total[i]);
    store(reinterpret_cast<Part*>(static_cast<E*>(p.out) + index * p.head_dim + x), result);
  }
}

// do_s = p_s do,  dl_s = p_s (c <do, o_s - o> + dl)
template <class E>
__global__ void __launch_bounds__(kGroups* kLanes)
    merge_states_backward_kernel(const __grid_constant__ MergeBackwardParams b) {
  const MergeParams& p = b.forward;
  const Place at = place(p);
  if (!at.exists) return;
  const Rows rows = rows_of(p, at.query);
  const int64_t index = at.query * p.num_heads + at.head;
  const float* lses = static_cast<const float*>(p.lses) + at.query * p.lses_query +
                      rows.begin * p.lses_state + at.head * p.lses_head;
  const E* outs = static_cast<const E*>(p.outs) + at.query * p.outs_query + rows.begin * p.outs_state +
                  at.head * p.outs_head;
  const E* out = static_cast<const E*>(p.out) + index * p.head_dim;
  const E* dout = static_cast<const E*>(b.dout) + index * p.head_dim;
  const float lse = static_cast<const float*>(p.lse)[index], dlse = static_cast<const float*>(b.dlse)[index];
  for (int64_t s = 0; s < rows.count; ++s) {
    E* douts = static_cast<E*>(b.douts) + at.query * b.douts_query + (rows.begin + s) * b.douts_state +
               at.head * p.head_dim;
    const float l = lses[s * p.lses_state];
    const bool empty = l == -INFINITY;
    const float weight = empty ? 0.0f : exponential(l - lse, p.base2 != 0);
    float dot = 0;
    for (int64_t x = lane(); x < p.head_dim; x += kLanes) {
      const float g = widen(dout[x]);
      if (!empty) dot = fmaf(g, widen(outs[s * p.outs_state + x]) - widen(out[x]), dot);
      douts[x] = narrow<E>(empty ? 0.0f : weight * g);
    }
    dot = group_sum(dot);
    if (lane() == 0) {
      static_cast<float*>(b.dlses)[at.query * b.dlses_query + (rows.begin + s) * b.dlses_state + at.head] =
          empty ? 0.0f : weight * ((p.base2 ? kLn2 : 1.0f) * dot + dlse);
    }
  }
}

dim3 grid_of(const MergeParams& p) {
  return dim3(static_cast<unsigned>((p.num_queries * p.num_heads + kGroups - 1) / kGroups));
}

// Can rows be read `width` elements at a time?
template <class E>
bool divides(const MergeParams& p, int width) {
  const auto aligned = [&](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % (width * sizeof(E)) == 0;
  };
  const auto whole = [&](int64_t stride) { return stride % width == 0; };
  return aligned(p.outs) && aligned(p.out) && whole(p.head_dim) && whole(p.outs_query) &&
         whole(p.outs_state) && whole(p.outs_head);
}

void merge_states(const MergeParams& p, const LaunchContext& context) {
  if (p.num_queries * p.num_heads == 0) return;
  with_element(p.dtype, [&]<class E>(E) {
    const auto kernel = divides<E>(p, 4) ? &merge_states_kernel<E, 4> : &merge_states_kernel<E, 1>;
    launch("merge_states", kernel, grid_of(p), dim3(kGroups * kLanes), 0, context, p);
  });
}

void merge_states_backward(const MergeBackwardParams& b, const LaunchContext& context) {
  if (b.forward.num_queries * b.forward.num_heads == 0) return;
  with_element(b.forward.dtype, [&]<class E>(E) {
    launch("merge_states_backward", &merge_states_backward_kernel<E>, grid_of(b.forward),
           dim3(kGroups * kLanes), 0, context, b);
  });
}

const Registration<&merge_states> forward("merge_states");
const Registration<&merge_states_backward> backward("merge_states_backward");

}  // namespace

}  // namespace palmette::gpu
