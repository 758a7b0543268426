// SPDX-License-Identifier: Apache-2.0
// Matrices in shared memory: rows of 16-byte chunks, laid out so that what the products read
// (gpu/product.cuh) meets no bank twice, and filled by asynchronous copies.
#pragma once

#include "gpu/numbers.cuh"

namespace palmette::gpu {

constexpr int kThreads = 128, kWarps = kThreads / kLanes;  // of a block that works on matrices
constexpr int kChunkBytes = 16;
constexpr int kPadding = 16;  // rows are filled up with zeros to whole multiples of it: the depth of an mma

// Where chunk c of row r lies. Shared memory serves eight chunks at once if they are different modulo 8, and
// the same chunk of eight neighbouring rows should be: ldmatrix reads them together. With g the largest power
// of two in `chunks`, at most 8, rows 8 / g apart collide, so an exclusive or of the lower bits of c tells
// them apart. For 64 and 128 16-bit elements this is the usual c ^ (r % 8), for 80 only the last bit is
// flipped, and no row is longer than it must be.
struct Swizzle {
  int chunks, shift;  // shift: 3 - log2 g

  static Swizzle of(int chunks) {
    int shift = 3;
    for (int g = 2; g <= 8 && chunks % g == 0; g *= 2) --shift;
    return {chunks, shift};
  }
  __device__ __forceinline__ int place(int row, int chunk) const {
    return row * chunks + (chunk ^ (row & 7) >> shift);
  }
};

// Elements per row, filled up.
__host__ __device__ __forceinline__ int padded(int width) {
  return (width + kPadding - 1) / kPadding * kPadding;
}

template <class E>
constexpr int kPerChunk = kChunkBytes / static_cast<int>(sizeof(E));

template <class E>
Swizzle swizzle_of(int width) {
  return Swizzle::of(padded(width) / kPerChunk<E>);
}

template <class E>
struct Matrix {
  E* data;
  Swizzle swizzle;

  __device__ __forceinline__ E* chunk(int row, int chunk) const {
    return data + swizzle.place(row, chunk) * kPerChunk<E>;
  }
};

// Can rows of `width` elements, `strides` apart, be copied 16 bytes at a time?
inline bool copies_by_chunks(const void* data, int64_t element_bytes, int64_t stride0, int64_t stride1) {
  return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && stride0 * element_bytes % kChunkBytes == 0 &&
         stride1 * element_bytes % kChunkBytes == 0;
}

// Rows [0, rows) of `to` from source(row), null for a row of zeros. By chunks, the copy is asynchronous: it
// has arrived when its group of copies has been waited for. Eight threads share a row, so that they read 128
// bytes in a row.
template <class E, class Source>
__device__ __forceinline__ void copy_rows(const Matrix<E>& to, int rows, int width, bool by_chunks,
                                          const E* valid, Source source) {
  for (int row = static_cast<int>(threadIdx.x) / 8; row < rows; row += kThreads / 8) {
    const E* from = source(row);
    for (int chunk = static_cast<int>(threadIdx.x) % 8; chunk < to.swizzle.chunks; chunk += 8) {
      const int column = chunk * kPerChunk<E>;
      const int there = from == nullptr ? 0 : max(0, min(width - column, kPerChunk<E>));
      E* place = to.chunk(row, chunk);
      if (by_chunks) {
        ptx::copy_async_16(place, there > 0 ? from + column : valid,
                           static_cast<uint32_t>(there * static_cast<int>(sizeof(E))));
      } else {
        Pack<E, kPerChunk<E>> values;
#pragma unroll
        for (int i = 0; i < kPerChunk<E>; ++i) values.value[i] = i < there ? from[column + i] : E{};
        store(reinterpret_cast<Pack<E, kPerChunk<E>>*>(place), values);
      }
    }
  }
}

}  // namespace palmette::gpu
