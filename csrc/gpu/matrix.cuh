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
__host__ __device__ constexpr int shift_of(int chunks) {
  int shift = 3;  // 3 - log2 g
  for (int g = 2; g <= 8 && chunks % g == 0; g *= 2) --shift;
  return shift;
}
struct Swizzle {
  int chunks, shift;

  static Swizzle of(int chunks) { return {chunks, shift_of(chunks)}; }
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

// A row, and those a multiple of eight rows below it: their chunks lie in the same order.
template <class E>
struct MatrixRow {
  E* data;
  int flip, stride;  // stride: elements from row to row

  __device__ __forceinline__ E* chunk(int chunk) const { return data + (chunk ^ flip) * kPerChunk<E>; }
  __device__ __forceinline__ E* chunk(int chunk, int rows_below) const {
    return this->chunk(chunk) + rows_below * stride;
  }
};

// kChunks: of a row, where it is known when compiling; else 0. It makes most of an address a constant.
template <class E, int kChunks = 0>
struct Matrix {
  E* data;
  Swizzle swizzle;

  __device__ __forceinline__ int chunks() const { return kChunks > 0 ? kChunks : swizzle.chunks; }
  __device__ __forceinline__ int shift() const { return kChunks > 0 ? shift_of(kChunks) : swizzle.shift; }
  __device__ __forceinline__ E* chunk(int row, int chunk) const {
    return data + Swizzle{chunks(), shift()}.place(row, chunk) * kPerChunk<E>;
  }
  __device__ __forceinline__ MatrixRow<E> row(int row) const {
    const int stride = chunks() * kPerChunk<E>;
    return {data + row * stride, (row & 7) >> shift(), stride};
  }
};

#if PALMETTE_TENSOR_CORES
// Where ldmatrix reads: even chunks of a row, or the ones right of them. Where a row is a power of two of
// chunks long, all bits that tell its chunks apart can be flipped in the address itself.
template <class E, int kChunks>
struct ChunkAddress {
  static constexpr bool kFlips = kChunks >= 8 && (kChunks & (kChunks - 1)) == 0;
  ptx::SharedAddress base;
  int flip, stride;  // stride: bytes from row to row

  __device__ __forceinline__ ChunkAddress(const Matrix<E, kChunks>& matrix, int row, bool odd) {
    const MatrixRow<E> at = matrix.row(row);
    flip = at.flip ^ static_cast<int>(odd);
    stride = at.stride * static_cast<int>(sizeof(E));
    base = ptx::shared_address(at.data) + (kFlips ? static_cast<uint32_t>(flip * kChunkBytes) : 0u);
  }
  __device__ __forceinline__ ptx::SharedAddress operator()(int even, int rows_below) const {
    const auto below = static_cast<uint32_t>(rows_below * stride);
    if (kFlips) return (base ^ static_cast<uint32_t>(even * kChunkBytes)) + below;
    return base + static_cast<uint32_t>((even ^ flip) * kChunkBytes) + below;
  }
};
#endif

// Can rows of `width` elements, `strides` apart, be copied 16 bytes at a time?
inline bool copies_by_chunks(const void* data, int64_t element_bytes, int64_t stride0, int64_t stride1) {
  return reinterpret_cast<uintptr_t>(data) % kChunkBytes == 0 && stride0 * element_bytes % kChunkBytes == 0 &&
         stride1 * element_bytes % kChunkBytes == 0;
}

// Rows [0, rows) of `to` from source(row), null for a row of zeros. By chunks, the copy is asynchronous: it
// has arrived when its group of copies has been waited for. Eight threads share a row, so that they read 128
// bytes in a row. `all_there`, the same for all threads: no row is null.
template <class E, int kChunks, class Source>
__device__ __forceinline__ void copy_rows(const Matrix<E, kChunks>& to, int rows, int width, bool by_chunks,
                                          const E* valid, Source source, bool all_there = false) {
  constexpr int kShare = 8, kRowStep = kThreads / kShare;  // a multiple of eight rows
  constexpr int kAtOnce = sizeof(E) == 2 ? 4 : 2;          // rows of a thread
  constexpr int kBytes = static_cast<int>(sizeof(E));
  const int first = static_cast<int>(threadIdx.x) / kShare, mine = static_cast<int>(threadIdx.x) % kShare;
  const MatrixRow<E> target = to.row(first);
  const int chunks = to.chunks();
  const bool whole = by_chunks && all_there && width == chunks * kPerChunk<E> && rows % kRowStep == 0;
#pragma unroll 1
  for (int base = first; base < rows; base += kAtOnce * kRowStep) {
    const E* from[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = base + i * kRowStep;
      from[i] = row < rows ? source(row) : nullptr;
    }
    E* place = target.chunk(mine, base - first);
    if (whole) {
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) from[i] += mine * kPerChunk<E>;
#pragma unroll(kChunks > 0 ? kChunks / kShare : 1)
      for (int chunk = mine; chunk < chunks; chunk += kShare, place += kShare * kPerChunk<E>) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          if (base - first + i * kRowStep < rows)
            ptx::copy_async_16(place + i * kRowStep * target.stride, from[i]);
          from[i] += kShare * kPerChunk<E>;
        }
      }
      continue;
    }
#pragma unroll 1
    for (int chunk = mine; chunk < chunks; chunk += kShare, place += kShare * kPerChunk<E>) {
      const int column = chunk * kPerChunk<E>, there = max(0, min(width - column, kPerChunk<E>));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (base + i * kRowStep >= rows) break;
        const int elements = from[i] == nullptr ? 0 : there;
        E* to_chunk = place + i * kRowStep * target.stride;
        if (by_chunks) {
          ptx::copy_async_16(to_chunk, elements > 0 ? from[i] + column : valid,
                             static_cast<uint32_t>(elements * kBytes));
        } else {
          Pack<E, kPerChunk<E>> values;
#pragma unroll
          for (int j = 0; j < kPerChunk<E>; ++j) values.value[j] = j < elements ? from[i][column + j] : E{};
          store(reinterpret_cast<Pack<E, kPerChunk<E>>*>(to_chunk), values);
        }
      }
    }
  }
}

}  // namespace palmette::gpu
