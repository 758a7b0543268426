// SPDX-License-Identifier: Apache-2.0
// 64x64x64 products by cp.async, ldmatrix and mma: a pipeline of two stages, four warps of 16 rows each.
#include "gpu/gpu.cuh"
#include "gpu/ptx.cuh"

namespace {

namespace gpu = palmette::gpu;
namespace ptx = palmette::ptx;

constexpr int kSize = 64, kStep = 16, kThreads = 128;

// Chunks of 16 bytes; kSwizzled spreads the rows' chunks over the banks, otherwise rows follow one another.
template <class T, bool kBTransposed, bool kSwizzled>
struct Tiles {
  T a[2][kSize * kStep];                                 // 64 rows of 16
  T b[2][kBTransposed ? kSize * kStep : kStep * kSize];  // 64 rows of 16, or 16 rows of 64

  __device__ static int narrow(int row, int chunk) {  // a row is two chunks
    return (row * 2 + (kSwizzled ? chunk ^ (row >> 2 & 1) : chunk)) * 8;
  }
  __device__ static int wide(int row, int chunk) {  // a row is eight chunks
    return (row * 8 + (kSwizzled ? chunk ^ (row & 7) : chunk)) * 8;
  }
};

template <bool kBf16>
__device__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (kBf16) {
    ptx::multiply_bf16(d, a, b0, b1);
  } else {
    ptx::multiply_fp16(d, a, b0, b1);
  }
}

// c = a b (64x64 each, row by row), or a transpose(b).
template <class T, bool kBf16, bool kBTransposed, bool kSwizzled>
__device__ void product(const T* a, const T* b, float* c) {
  using S = Tiles<T, kBTransposed, kSwizzled>;
  S& tiles = gpu::shared<S>();
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;

  auto fetch = [&](int step, int stage) {
    {
      const int row = thread / 2, chunk = thread % 2;
      ptx::copy_async_16(&tiles.a[stage][S::narrow(row, chunk)], a + row * kSize + step * kStep + chunk * 8);
    }
    if constexpr (kBTransposed) {
      const int row = thread / 2, chunk = thread % 2;
      ptx::copy_async_16(&tiles.b[stage][S::narrow(row, chunk)], b + row * kSize + step * kStep + chunk * 8);
    } else {
      const int row = thread / 8, chunk = thread % 8;
      ptx::copy_async_16(&tiles.b[stage][S::wide(row, chunk)], b + (step * kStep + row) * kSize + chunk * 8);
    }
    ptx::commit_copies();
  };

  float sum[kSize / 8][4] = {};
  fetch(0, 0);
  for (int step = 0; step < kSize / kStep; ++step) {
    const int stage = step % 2;
    if (step + 1 < kSize / kStep) {
      fetch(step + 1, 1 - stage);
      ptx::wait_for_copies<1>();
    } else {
      ptx::wait_for_copies<0>();
    }
    __syncthreads();
    uint32_t left[4];
    ptx::load_matrix_x4<false>(left, &tiles.a[stage][S::narrow(warp * 16 + lane % 16, lane / 16)]);
    for (int pair = 0; pair < kSize / 16; ++pair) {
      uint32_t right[4];  // b0 and b1 of columns 0 to 7, then those of 8 to 15
      if constexpr (kBTransposed) {
        const int row = pair * 16 + lane / 16 * 8 + lane % 8;
        ptx::load_matrix_x4<false>(right, &tiles.b[stage][S::narrow(row, lane / 8 % 2)]);
      } else {
        ptx::load_matrix_x4<true>(right, &tiles.b[stage][S::wide(lane % 16, pair * 2 + lane / 16)]);
      }
      multiply<kBf16>(sum[pair * 2], left, right[0], right[1]);
      multiply<kBf16>(sum[pair * 2 + 1], left, right[2], right[3]);
    }
    if (step + 1 < kSize / kStep) __syncthreads();
  }

  for (int i = 0; i < kSize / 8; ++i) {
    float* row = c + (warp * 16 + lane / 4) * kSize + i * 8 + lane % 4 * 2;
    gpu::store(reinterpret_cast<float2*>(row), make_float2(sum[i][0], sum[i][1]));
    gpu::store(reinterpret_cast<float2*>(row + 8 * kSize), make_float2(sum[i][2], sum[i][3]));
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(kThreads)
    product_bf16(const gpu::bf16* a, const gpu::bf16* b, float* c) {
  product<gpu::bf16, true, false, true>(a, b, c);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    product_bf16_transposed(const gpu::bf16* a, const gpu::bf16* b, float* c) {
  product<gpu::bf16, true, true, true>(a, b, c);
}

extern "C" __global__ void __launch_bounds__(kThreads)
    product_fp16(const gpu::fp16* a, const gpu::fp16* b, float* c) {
  product<gpu::fp16, false, false, true>(a, b, c);
}

// As product_bf16, but rows of chunks meet in the same banks.
extern "C" __global__ void __launch_bounds__(kThreads)
    product_with_conflicts(const gpu::bf16* a, const gpu::bf16* b, float* c) {
  product<gpu::bf16, true, false, false>(a, b, c);
}
