// SPDX-License-Identifier: Apache-2.0
// Threads that work together: warps, barriers, atomics, asynchronous copies.
#include "gpu/gpu.cuh"
#include "gpu/ptx.cuh"

namespace gpu = palmette::gpu;
namespace ptx = palmette::ptx;

extern "C" __global__ void shuffles(const int* x, int* out) {
  const int i = threadIdx.x;
  const int value = x[i];
  int* row = out + i * 10;
  row[0] = __shfl_sync(0xFFFFFFFFu, value, 5);
  row[1] = __shfl_sync(0xFFFFFFFFu, value, i * 7, 8);
  row[2] = __shfl_up_sync(0xFFFFFFFFu, value, 3);
  row[3] = __shfl_down_sync(0xFFFFFFFFu, value, 3, 16);
  row[4] = __shfl_xor_sync(0xFFFFFFFFu, value, 9);
  int sum = value;
  for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xFFFFFFFFu, sum, step);
  row[5] = sum;
  row[6] = static_cast<int>(__ballot_sync(0xFFFFFFFFu, value % 2));
  row[7] = __any_sync(0xFFFFFFFFu, value == 17) * 2 + __all_sync(0xFFFFFFFFu, value >= 0);
  row[8] = static_cast<int>(__reduce_max_sync(0xFFFFFFFFu, value));
  row[9] = static_cast<int>(__match_any_sync(0xFFFFFFFFu, value % 4));
}

// Halves of a warp shuffle among themselves, in turn; odd lanes do it in a branch.
extern "C" __global__ void parts(const int* x, int* out) {
  const int i = threadIdx.x, lane = i % 32;
  const unsigned half = lane < 16 ? 0x0000FFFFu : 0xFFFF0000u;
  int result = __shfl_xor_sync(half, x[i], 15);
  if (lane % 2) {
    result += __shfl_xor_sync(0xAAAAAAAAu, x[i], 2);
    __syncwarp(0xAAAAAAAAu);
    result += static_cast<int>(__reduce_add_sync(0xAAAAAAAAu, x[i]));
  }
  out[i] = result;
}

// Lanes wait for one that does not come.
extern "C" __global__ void lost_lane(int* out) {
  const int i = threadIdx.x;
  if (i != 9) out[i] = __shfl_sync(0xFFFFFFFFu, i, 0);
  __syncthreads();
}

extern "C" __global__ void votes_of_a_block(const int* x, int* out) {
  const int i = threadIdx.x;
  out[i * 3] = __syncthreads_count(x[i] > 3);
  out[i * 3 + 1] = __syncthreads_and(x[i] > 3);
  out[i * 3 + 2] = __syncthreads_or(x[i] > 3);
}

// The first two warps produce, the last two consume: named barriers 1 and 2.
extern "C" __global__ void produce_and_consume(const int* x, int* out, int rounds) {
  struct S {
    int slot[64];
  };
  S& s = gpu::shared<S>();
  const int i = threadIdx.x;
  if (i < 64) {
    for (int round = 0; round < rounds; ++round) {
      if (round > 0) ptx::barrier_sync(2, 128);
      s.slot[i] = x[round * 64 + i] + round;
      ptx::barrier_arrive(1, 128);
    }
  } else {
    int sum = 0;
    for (int round = 0; round < rounds; ++round) {
      ptx::barrier_sync(1, 128);
      sum += s.slot[127 - i];
      if (round + 1 < rounds) ptx::barrier_arrive(2, 128);
    }
    out[i - 64] = sum;
  }
}

// Each pair of warps meets at a barrier of its own.
extern "C" __global__ void pairs_of_warps(int* out) {
  struct S {
    int slot[128];
  };
  S& s = gpu::shared<S>();
  const int i = threadIdx.x, pair = i / 64;
  s.slot[i] = i * i;
  ptx::barrier_sync(1 + pair, 64);
  out[i] = s.slot[pair * 64 + (i + 37) % 64];
}

extern "C" __global__ void atomics(const int* x, int* ints, float* floats, unsigned long long* longs,
                                   int* old, int n) {
  struct S {
    int count;
    unsigned turn;
  };
  S& s = gpu::shared<S>();
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (threadIdx.x == 0) {
    s.count = 0;
    s.turn = 0;
  }
  __syncthreads();
  atomicAdd(&s.count, x[i]);
  old[i] = static_cast<int>(atomicInc(&s.turn, 4));
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(&ints[0], s.count);
  atomicMax(&ints[1], x[i]);
  atomicMin(&ints[2], x[i]);
  atomicOr(&ints[3], x[i]);
  atomicAdd(&floats[i % 3], 0.5f);
  atomicAdd(&longs[0], static_cast<unsigned long long>(x[i]) << 33);
  if (atomicCAS(&ints[4], i, i + 1) == i) atomicExch(&ints[5], i);
  atomicAdd(&ints[8 + x[i] % n], 1);
}

// Copies of 16 bytes of which `bytes[i]` are read; `groups` are in flight while the first is waited for.
extern "C" __global__ void copies(const int4* from, const unsigned* bytes, int4* to) {
  struct S {
    int4 slot[2][64];
  };
  S& s = gpu::shared<S>();
  const int i = threadIdx.x;
  ptx::copy_async_16(&s.slot[0][i], from + i, bytes[i]);
  ptx::commit_copies();
  ptx::copy_async_16(&s.slot[1][i], from + 64 + i);
  ptx::commit_copies();
  ptx::wait_for_copies<1>();
  __syncthreads();
  gpu::store(&to[i], s.slot[0][63 - i]);
  ptx::wait_for_copies<0>();
  __syncthreads();
  gpu::store(&to[64 + i], s.slot[1][63 - i]);
}

extern "C" __global__ void never_waited_for(const int4* from) {
  struct S {
    int4 slot[64];
  };
  ptx::copy_async_16(&gpu::shared<S>().slot[threadIdx.x], from + threadIdx.x);
  ptx::commit_copies();
}

// 2^x, and pairs of bfloat16.
extern "C" __global__ void numbers(const float* x, float* powers, uint32_t* packed) {
  const int i = threadIdx.x;
  powers[i] = ptx::ex2(x[i]);
  packed[i] = ptx::pack_bf16(x[i], x[(i + 1) % blockDim.x]);
}
