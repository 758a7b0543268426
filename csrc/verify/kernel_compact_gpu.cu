// SPDX-License-Identifier: Apache-2.0
// Copies rows of K and V caches from slots to slots:  to[to_slots[i]] = from[from_slots[i]].
//
// compact_kv_ runs it twice, from the caches to rows of its own and from there to the caches, so all sources
// are read before a destination is written. A block copies one row of one cache, `Unit` by `Unit`.
#include <algorithm>

#include "gpu/gpu.cuh"
#include "verify/params.h"

namespace palmette::gpu {

namespace {

constexpr int kMaxThreads = 256;

__device__ __forceinline__ char* row_of(const CacheRows& rows, const int64_t* slots, int64_t i) {
  return rows.data + (slots == nullptr ? i : slots[i]) * rows.row_stride;
}

template <class Unit>
__global__ void __launch_bounds__(kMaxThreads) copy_rows_kernel(const __grid_constant__ CopyRowsParams p) {
  const CacheRows &from = p.from[blockIdx.y], &to = p.to[blockIdx.y];
  const char* source = row_of(from, p.from_slots, blockIdx.x);
  char* target = row_of(to, p.to_slots, blockIdx.x);
  const auto of_piece = static_cast<unsigned>(from.piece_bytes / static_cast<int64_t>(sizeof(Unit)));
  const unsigned all = of_piece * static_cast<unsigned>(from.num_pieces);
  for (unsigned i = threadIdx.x; i < all; i += blockDim.x) {
    const int64_t piece = i / of_piece, unit = i % of_piece;
    store(reinterpret_cast<Unit*>(target + piece * to.piece_stride) + unit,
          load(reinterpret_cast<const Unit*>(source + piece * from.piece_stride) + unit));
  }
}

// f(unit): the widest that every piece of every row is a whole number of, and lies at a multiple of.
template <class F>
void with_unit(const CopyRowsParams& p, F&& f) {
  uint64_t bits = 0;
  for (const CacheRows* rows : {&p.from[0], &p.from[1], &p.to[0], &p.to[1]}) {
    bits |= reinterpret_cast<uintptr_t>(rows->data) | static_cast<uint64_t>(rows->row_stride) |
            static_cast<uint64_t>(rows->piece_stride) | static_cast<uint64_t>(rows->piece_bytes);
  }
  if (bits % 16 == 0) return f(uint4{});
  if (bits % 8 == 0) return f(uint2{});
  if (bits % 4 == 0) return f(uint32_t{});
  if (bits % 2 == 0) return f(uint16_t{});
  f(uint8_t{});
}

void copy_rows(const CopyRowsParams& p, const LaunchContext& context) {
  const int64_t bytes = std::max(p.from[0].bytes(), p.from[1].bytes());
  if (p.num_rows == 0 || bytes == 0) return;
  with_unit(p, [&]<class Unit>(Unit) {
    const int64_t groups = (bytes / static_cast<int64_t>(sizeof(Unit)) + kLanes - 1) / kLanes;
    launch("copy_rows", &copy_rows_kernel<Unit>, dim3(static_cast<unsigned>(p.num_rows), 2),
           dim3(kLanes * static_cast<unsigned>(std::min<int64_t>(groups, kMaxThreads / kLanes))), 0, context,
           p);
  });
}

const Registration<&copy_rows> copy("copy_rows");

}  // namespace

}  // namespace palmette::gpu
