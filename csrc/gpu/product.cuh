// SPDX-License-Identifier: Apache-2.0
// The two products behind attention and its gradients, for a warp and 16 rows of its own:
//
//     multiply_rows    C[16][N]      = A[16][depth] B[N][depth]^T    A and B in shared memory   (q k, do v)
//     accumulate_rows  C[16][width] += P[16][N] B[N][width]          P in registers             (p v, ds k)
//
// (of B, the columns from b_column on; what C holds of columns from `width` on is nobody's).
// Both leave C and take P as the tensor cores hold an accumulator: lane l has, of every 8 columns, with
// g = l / 4 and t = 2 (l % 4),
//
//     c[n][0] (g, 8 n + t)   c[n][1] (g, 8 n + t + 1)   c[n][2] (g + 8, 8 n + t)   c[n][3] (g + 8, 8 n + t +
//     1)
//
// so what comes out of the first can go into the second. 16-bit elements are multiplied by tensor cores
// (Tensor); float, and everything where there are none that we know (AMD, a wave of 64), by ordinary fused
// multiply-adds in the same layout (Scalar).
#pragma once

#include "gpu/matrix.cuh"

namespace palmette::gpu {

__device__ __forceinline__ int fragment_row() { return lane() / 4; }
__device__ __forceinline__ int fragment_column() { return lane() % 4 * 2; }

template <class E>
struct Scalar {
  using Element = E;

  template <int kN, int kChunks>
  __device__ static __forceinline__ void multiply_rows(float (&c)[kN][4], const Matrix<E, kChunks>& a,
                                                       int a_row, const Matrix<E, kChunks>& b, int b_row) {
    using Chunk = Pack<E, kPerChunk<E>>;
    const int g = fragment_row(), t = fragment_column();
#pragma unroll
    for (int n = 0; n < kN; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
    for (int k = 0; k < a.chunks(); ++k) {
      const auto low = load(reinterpret_cast<const Chunk*>(a.chunk(a_row + g, k)));
      const auto high = load(reinterpret_cast<const Chunk*>(a.chunk(a_row + g + 8, k)));
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const auto column = load(reinterpret_cast<const Chunk*>(b.chunk(b_row + 8 * n + t + e, k)));
#pragma unroll
          for (int i = 0; i < kPerChunk<E>; ++i) {
            c[n][e] = fmaf(widen(low.value[i]), widen(column.value[i]), c[n][e]);
            c[n][2 + e] = fmaf(widen(high.value[i]), widen(column.value[i]), c[n][2 + e]);
          }
        }
      }
    }
  }

  // A row's weights lie in four lanes, which hand them round.
  template <int kN, int kTiles, int kChunks>
  __device__ static __forceinline__ void accumulate_rows(float (&c)[kTiles][4], const float (&p)[kN][4],
                                                         const Matrix<E, kChunks>& b, int b_row, int width,
                                                         int b_column = 0) {
    using Pair = Pack<E, 2>;
    const int t = fragment_column();
#pragma unroll 1
    for (int source = 0; source < 4; ++source) {
      const int from = (lane() & ~3) + source;
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float low = shuffle(p[n][e], from), high = shuffle(p[n][2 + e], from);
          const int row = b_row + 8 * n + 2 * source + e;
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            if (8 * m >= width) continue;  // not break: clang unrolls only what ends at a constant
            const int column = b_column + 8 * m + t;
            const Pair pair = load(
                reinterpret_cast<const Pair*>(b.chunk(row, column / kPerChunk<E>) + column % kPerChunk<E>));
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              const float value = widen(pair.value[i]);
              c[m][i] = fmaf(low, value, c[m][i]);
              c[m][2 + i] = fmaf(high, value, c[m][2 + i]);
            }
          }
        }
      }
    }
  }
};

#if PALMETTE_TENSOR_CORES

template <class E>
struct TensorInstruction;
template <>
struct TensorInstruction<bf16> {
  __device__ static __forceinline__ uint32_t pack(float low, float high) { return ptx::pack_bf16(low, high); }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    ptx::multiply_bf16(d, a, b0, b1);
  }
};
template <>
struct TensorInstruction<fp16> {
  __device__ static __forceinline__ uint32_t pack(float low, float high) { return ptx::pack_fp16(low, high); }
  __device__ static __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                                  uint32_t b1) {
    ptx::multiply_fp16(d, a, b0, b1);
  }
};

template <class E>
struct Tensor {
  using Element = E;
  using Instruction = TensorInstruction<E>;

  template <int kN, int kChunks>
  __device__ static __forceinline__ void multiply_rows(float (&c)[kN][4], const Matrix<E, kChunks>& a,
                                                       int a_row, const Matrix<E, kChunks>& b, int b_row) {
    static_assert(kN % 2 == 0, "ldmatrix brings the columns of two products");
#pragma unroll
    for (int n = 0; n < kN; ++n) c[n][0] = c[n][1] = c[n][2] = c[n][3] = 0;
    const ChunkAddress<E, kChunks> a_at(a, a_row + (lane() & 15), lane() >= 16);
    const ChunkAddress<E, kChunks> b_at(b, b_row + (lane() & 7) + (lane() >> 4 << 3), (lane() >> 3 & 1) != 0);
    const int steps = a.chunks() / 2;
#pragma unroll(kChunks > 0 ? kChunks / 2 : 4)
    for (int k = 0; k < steps; ++k) {
      // of A: rows 0-7, rows 8-15, and the same of the next chunk
      uint32_t x[4];
      ptx::load_matrix_x4<false>(x, a_at(2 * k, 0));
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
        // of B: columns 8 n .. + 7, both chunks, then the eight columns after them
        uint32_t y[4];
        ptx::load_matrix_x4<false>(y, b_at(2 * k, 8 * n));
        Instruction::multiply(c[n], x, y[0], y[1]);
        Instruction::multiply(c[n + 1], x, y[2], y[3]);
      }
    }
  }

  template <int kN, int kTiles, int kChunks>
  __device__ static __forceinline__ void accumulate_rows(float (&c)[kTiles][4], const float (&p)[kN][4],
                                                         const Matrix<E, kChunks>& b, int b_row, int width,
                                                         int b_column = 0) {
    static_assert(kN % 2 == 0 && kTiles % 8 == 0, "an mma adds 16 rows; 64 columns are multiplied together");
    const ChunkAddress<E, kChunks> b_at(b, b_row + (lane() & 15), lane() >= 16);
    const int last = b.chunks() - 2;
    uint32_t x[kN / 2][4];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      x[n / 2][n % 2 * 2] = Instruction::pack(p[n][0], p[n][1]);
      x[n / 2][n % 2 * 2 + 1] = Instruction::pack(p[n][2], p[n][3]);
    }
    // Columns that B does not have repeat its last ones: a branch would keep these products from overlapping
    // with each other, and nobody reads their sums.
#pragma unroll
    for (int part = 0; part < kTiles; part += 8) {
      if (8 * part >= width) break;
#pragma unroll
      for (int n = 0; n < kN; n += 2) {
#pragma unroll
        for (int m = part; m < part + 8; m += 2) {
          // of B, transposed: rows 0-7, rows 8-15, and the same of the next eight columns
          uint32_t y[4];
          ptx::load_matrix_x4<true>(y, b_at(min(b_column / 8 + m, last), 8 * n));
          Instruction::multiply(c[m], x[n / 2], y[0], y[1]);
          Instruction::multiply(c[m + 1], x[n / 2], y[2], y[3]);
        }
      }
    }
  }
};

#endif

// f(Tensor or Scalar) for a stored type: tensor cores where there are any that we know.
template <class F>
void with_math(DType dtype, F&& f) {
#if PALMETTE_TENSOR_CORES
  if (has_tensor_cores()) {
    if (dtype == DType::bf16) return f(Tensor<bf16>{});
    if (dtype == DType::f16) return f(Tensor<fp16>{});
  }
#endif
#if PALMETTE_SCALAR_16
  if (dtype == DType::bf16) return f(Scalar<bf16>{});
  if (dtype == DType::f16) return f(Scalar<fp16>{});
#endif
  f(Scalar<float>{});
}

}  // namespace palmette::gpu
