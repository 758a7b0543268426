// SPDX-License-Identifier: Apache-2.0
// The gradient of attend on the GPU: the kernels in their order, and the two that go by rows (D and the
// sinks; equations in backward_gpu.cuh).
//
//   out, dout, dlse --a group of lanes per row and head--> D, the row's part of dsink
//   parts of dsink --a group of lanes per head--> dsinks
#include "attend/backward_gpu.cuh"

namespace palmette::gpu {

namespace {

template <class E>
__global__ void __launch_bounds__(kThreads)
    attend_delta_kernel(const __grid_constant__ AttendBackwardParams b) {
  const AttendParams& p = b.forward;
  const int64_t index = int64_t{blockIdx.x} * kWarps + warp();
  const int64_t row = index / p.num_q_heads, head = index % p.num_q_heads;
  if (row >= p.plan.num_queries) return;
  const E* out = static_cast<const E*>(p.out.data) + row * p.out.token + head * p.out.head;
  const E* dout = static_cast<const E*>(b.dout.data) + row * b.dout.token + head * b.dout.head;
  float sum = 0;
  for (int x = lane(); x < p.v_head_dim; x += kLanes) sum = fmaf(widen(out[x]), widen(dout[x]), sum);
  sum = group_sum(sum);
  if (lane() != 0) return;
  if (b.dlse != nullptr) sum -= static_cast<const float*>(b.dlse)[index];
  static_cast<float*>(b.delta)[index] = sum;
  if (b.dsinks == nullptr) return;
  const float sink = static_cast<const float*>(p.sinks)[head] * kLog2e;
  const float lse = log2_lse(static_cast<const float*>(p.lse)[index]);
  static_cast<float*>(b.dsinks)[index] = -ptx::ex2(sink - lse) * sum;
}

__global__ void __launch_bounds__(kLanes)
    attend_dsinks_kernel(const __grid_constant__ AttendBackwardParams b) {
  const AttendParams& p = b.forward;
  const auto head = static_cast<int64_t>(blockIdx.x);
  float sum = 0;
  for (int64_t row = lane(); row < p.plan.num_queries; row += kLanes)
    sum += static_cast<const float*>(b.dsinks)[row * p.num_q_heads + head];
  sum = group_sum(sum);
  if (lane() == 0) static_cast<float*>(b.sink_sums)[head] = sum;
}

template <class E>
void launch_delta(const AttendBackwardParams& b, const LaunchContext& context) {
  const int64_t groups = int64_t{b.forward.plan.num_queries} * b.forward.num_q_heads;
  if (groups == 0) return;
  launch("attend_delta", &attend_delta_kernel<E>, dim3(static_cast<unsigned>((groups + kWarps - 1) / kWarps)),
         dim3(kThreads), 0, context, b);
}

void attend_backward(const AttendBackwardParams& b, const LaunchContext& context) {
  require_head_dims(b.forward);
  with_element(b.forward.dtype, [&]<class E>(E) { launch_delta<E>(b, context); });
  if (b.sink_sums != nullptr) {
    launch("attend_dsinks", &attend_dsinks_kernel, dim3(static_cast<unsigned>(b.forward.num_q_heads)),
           dim3(kLanes), 0, context, b);
  }
  launch_dq(b, context);
  if (b.index.entry != nullptr) launch_index(b, context);
  launch_dkv(b, context);
}

const Registration<&attend_backward> registration("attend_backward");

}  // namespace

}  // namespace palmette::gpu
