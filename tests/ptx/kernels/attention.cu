// SPDX-License-Identifier: Apache-2.0
// Attention of 64 queries per block to n keys, width 64: all that is in ptx.cuh but named barriers, as
// kernels use it.
#include "gpu/gpu.cuh"
#include "gpu/ptx.cuh"

namespace {

namespace gpu = palmette::gpu;
namespace ptx = palmette::ptx;

constexpr int kWidth = 64, kQueries = 64, kKeys = 32, kThreads = 128;

struct Tiles {
  gpu::bf16 q[kQueries * kWidth];
  gpu::bf16 k[2][kKeys * kWidth], v[2][kKeys * kWidth];
};

__device__ int place(int row, int chunk) { return (row * 8 + (chunk ^ (row & 7))) * 8; }

// `rows` of `from`, of which those from `limit` on are zeros.
__device__ void fetch(gpu::bf16* to, const gpu::bf16* from, int first, int rows, int limit) {
  for (int i = threadIdx.x; i < rows * 8; i += kThreads) {
    const int row = i / 8, chunk = i % 8;
    ptx::copy_async_16(&to[place(row, chunk)], from + static_cast<int64_t>(first + row) * kWidth + chunk * 8,
                       first + row < limit ? 16 : 0);
  }
}

__device__ float reduce_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xFFFFFFFFu, x, 2));
}
__device__ float reduce_sum(float x) {
  x += __shfl_xor_sync(0xFFFFFFFFu, x, 1);
  return x + __shfl_xor_sync(0xFFFFFFFFu, x, 2);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    attention(const gpu::bf16* q, const gpu::bf16* k, const gpu::bf16* v, gpu::bf16* out, int queries, int n,
              float scale) {
  Tiles& tiles = gpu::shared<Tiles>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int first = blockIdx.x * kQueries;
  const int steps = (n + kKeys - 1) / kKeys;

  fetch(tiles.q, q, first, kQueries, queries);
  fetch(tiles.k[0], k, 0, kKeys, n);
  fetch(tiles.v[0], v, 0, kKeys, n);
  ptx::commit_copies();

  uint32_t query[kWidth / 16][4];
  float sum[kWidth / 8][4] = {};
  float top[2] = {-1e30f, -1e30f}, total[2] = {0, 0};

  for (int step = 0; step < steps; ++step) {
    const int stage = step % 2;
    if (step + 1 < steps) {
      fetch(tiles.k[1 - stage], k, (step + 1) * kKeys, kKeys, n);
      fetch(tiles.v[1 - stage], v, (step + 1) * kKeys, kKeys, n);
      ptx::commit_copies();
      ptx::wait_for_copies<1>();
    } else {
      ptx::wait_for_copies<0>();
    }
    __syncthreads();
    if (step == 0) {
      for (int i = 0; i < kWidth / 16; ++i) {
        ptx::load_matrix_x4<false>(query[i], &tiles.q[place(warp * 16 + lane % 16, i * 2 + lane / 16)]);
      }
    }
    float score[kKeys / 8][4] = {};
    for (int j = 0; j < kKeys / 16; ++j) {
      for (int i = 0; i < kWidth / 16; ++i) {
        uint32_t key[4];
        ptx::load_matrix_x4<false>(
            key, &tiles.k[stage][place(j * 16 + lane / 16 * 8 + lane % 8, i * 2 + lane / 8 % 2)]);
        ptx::multiply_bf16(score[j * 2], query[i], key[0], key[1]);
        ptx::multiply_bf16(score[j * 2 + 1], query[i], key[2], key[3]);
      }
    }
    float high[2] = {top[0], top[1]};
    for (int j = 0; j < kKeys / 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        const int key = step * kKeys + j * 8 + lane % 4 * 2 + i % 2;
        score[j][i] = key < n ? score[j][i] * scale : -1e30f;
        high[i / 2] = fmaxf(high[i / 2], score[j][i]);
      }
    }
    float shrink[2];
    for (int r = 0; r < 2; ++r) {
      high[r] = reduce_max(high[r]);
      shrink[r] = ptx::ex2(top[r] - high[r]);
      top[r] = high[r];
      total[r] *= shrink[r];
    }
    for (int j = 0; j < kKeys / 8; ++j) {
      for (int i = 0; i < 4; ++i) {
        score[j][i] = ptx::ex2(score[j][i] - top[i / 2]);
        total[i / 2] += score[j][i];
      }
    }
    for (int i = 0; i < kWidth / 8; ++i) {
      for (int r = 0; r < 4; ++r) sum[i][r] *= shrink[r / 2];
    }
    for (int j = 0; j < kKeys / 16; ++j) {
      const uint32_t weight[4] = {ptx::pack_bf16(score[j * 2][0], score[j * 2][1]),
                                  ptx::pack_bf16(score[j * 2][2], score[j * 2][3]),
                                  ptx::pack_bf16(score[j * 2 + 1][0], score[j * 2 + 1][1]),
                                  ptx::pack_bf16(score[j * 2 + 1][2], score[j * 2 + 1][3])};
      for (int i = 0; i < kWidth / 16; ++i) {
        uint32_t value[4];
        ptx::load_matrix_x4<true>(value, &tiles.v[stage][place(j * 16 + lane % 16, i * 2 + lane / 16)]);
        ptx::multiply_bf16(sum[i * 2], weight, value[0], value[1]);
        ptx::multiply_bf16(sum[i * 2 + 1], weight, value[2], value[3]);
      }
    }
    if (step + 1 < steps) __syncthreads();
  }

  for (int r = 0; r < 2; ++r) {
    const int row = first + warp * 16 + lane / 4 + r * 8;
    const float inverse = 1.0f / reduce_sum(total[r]);
    if (row >= queries) continue;
    for (int i = 0; i < kWidth / 8; ++i) {
      gpu::store(reinterpret_cast<uint32_t*>(out + row * kWidth + i * 8 + lane % 4 * 2),
                 ptx::pack_bf16(sum[i][r * 2] * inverse, sum[i][r * 2 + 1] * inverse));
    }
  }
}
