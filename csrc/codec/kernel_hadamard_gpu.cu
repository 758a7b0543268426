// SPDX-License-Identifier: Apache-2.0
// The Hadamard transform of rows on the GPU: out = scale * x (H_base (x) H_2^k)^T, with the butterflies of
// kernel_hadamard_cpu.cpp in its order.
//
// A group of 32 lanes loads 256 elements, eight in each lane: distances 1, 2, 4 lie within a lane, 8 .. 128
// between lanes. Rows of up to 256 are done then, several to a group. Longer ones lie in shared memory as
// floats, one row per block or as many as make 2048 elements: passes of up to three distances take two
// neighbours times eight per thread, the last one from shared memory to `out`. Then comes the small matrix, a
// column of it per thread.
//
// Where a small matrix meets rows of less than 32 columns, lanes take neighbouring elements instead, and in
// the end each adds up one element of the result.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "codec/wire_gpu.cuh"

namespace palmette::gpu {

namespace {

constexpr int kRowThreads = 256, kMostThreads = 1024;
constexpr int64_t kBlock = 2048;  // elements, where rows are shorter

// ---- rows of 1 .. 256

template <class E>
__global__ void __launch_bounds__(kRowThreads)
    hadamard_rows_kernel(const __grid_constant__ HadamardParams p) {
  const int64_t elements = p.rows * p.size;
  const int64_t at = (int64_t{blockIdx.x} * (kRowThreads / kLanes) + warp()) * kTogether;
  const int size = static_cast<int>(p.size);
  const auto scale = static_cast<float>(p.scale);
  float v[kEach];
  load_group(static_cast<const E*>(p.x) + at, elements - at, v);
  butterflies_in_lane(v, size);
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    if (d * kEach < size) butterflies_of_lanes(v, d);
  }
#pragma unroll
  for (int k = 0; k < kEach; ++k) v[k] = times(v[k], scale);
  store_group(static_cast<E*>(p.out) + at, elements - at, v);
}

// ---- longer rows

// Where element i lies: of the chunks of 16 bytes, pairs change places in every other 128 bytes, so that
// eight lanes which store every other chunk meet eight different groups of banks.
__device__ __forceinline__ int place_of(int i) { return i ^ (i >> 3 & 4); }

__device__ __forceinline__ void store_two(float* to, float a, float b) {
  store(reinterpret_cast<Pack<float, 2>*>(to), Pack<float, 2>{{a, b}});
}
__device__ __forceinline__ void store_two(bf16* to, float a, float b) {
  *reinterpret_cast<uint32_t*>(to) = ptx::pack_bf16(a, b);
}
__device__ __forceinline__ void store_two(fp16* to, float a, float b) {
  *reinterpret_cast<uint32_t*>(to) = ptx::pack_fp16(a, b);
}

// Distances h .. kRadix h / 2 of elements [0, count) of shared memory, two neighbours per thread.
template <int kRadix, class Store>
__device__ __forceinline__ void pass(float* row, int count, int h, Store&& finish) {
  using Two = Pack<float, 2>;
  const int half = h / 2;
  for (int t = static_cast<int>(threadIdx.x); t < count / (2 * kRadix); t += static_cast<int>(blockDim.x)) {
    const int first = t / half * (kRadix * h) + t % half * 2;
    float v[kRadix][2];
#pragma unroll
    for (int r = 0; r < kRadix; ++r) {
      const Two two = load(reinterpret_cast<const Two*>(row + place_of(first + r * h)));
      v[r][0] = two.value[0];
      v[r][1] = two.value[1];
    }
#pragma unroll
    for (int d = 1; d < kRadix; d *= 2) {
#pragma unroll
      for (int r = 0; r < kRadix; ++r) {
        if ((r & d) != 0) continue;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float a = v[r][i], b = v[r + d][i];
          v[r][i] = add(a, b);
          v[r + d][i] = minus(a, b);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < kRadix; ++r) finish(first + r * h, Two{{v[r][0], v[r][1]}});
  }
}

// kBase: 1, 12, 20 or 28, of rows of at least 512, or of kBase times at least 32.
template <class E, int kBase>
__global__ void __launch_bounds__(kMostThreads, 1)
    hadamard_kernel(const __grid_constant__ HadamardParams p, int64_t rows_of_block) {
  using Two = Pack<float, 2>;
  float* row = &gpu::shared<float>();
  const int64_t first = blockIdx.x * rows_of_block * p.size;
  const int count = static_cast<int>(min(rows_of_block * p.size, p.rows * p.size - first));
  const int width = static_cast<int>(p.size) / kBase, thread = static_cast<int>(threadIdx.x),
            threads = static_cast<int>(blockDim.x);
  const auto scale = static_cast<float>(p.scale);
  const E* x = static_cast<const E*>(p.x) + first;
  E* out = static_cast<E*>(p.out) + first;

  for (int begin = warp() * kTogether; begin < count; begin += threads / kLanes * kTogether) {
    const int at = begin + lane() * kEach;
    float v[kEach];
    load_group(x + begin, count - begin, v);  // counts are multiples of 8
    butterflies_in_lane(v, kEach);
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
      if (d * kEach < width) butterflies_of_lanes(v, d);
    }
    if (at >= count) continue;
#pragma unroll
    for (int k = 0; k < kEach; k += 4)
      store(reinterpret_cast<Pack<float, 4>*>(row + place_of(at + k)),
            Pack<float, 4>{{v[k], v[k + 1], v[k + 2], v[k + 3]}});
  }
  __syncthreads();

  for (int h = kTogether; h < width;) {
    const int radix = min(width / h, 8);
    const bool last = kBase == 1 && h * radix == width;
    const auto finish = [&](int i, Two two) {
      if (last) {
        store_two(out + i, times(two.value[0], scale), times(two.value[1], scale));
      } else {
        store(reinterpret_cast<Two*>(row + place_of(i)), two);
      }
    };
    if (radix == 8) {
      pass<8>(row, count, h, finish);
    } else if (radix == 4) {
      pass<4>(row, count, h, finish);
    } else {
      pass<2>(row, count, h, finish);
    }
    h *= radix;
    if (!last) __syncthreads();
  }

  if constexpr (kBase > 1) {
    // out[a, j] = sum over b of x[b, j] or -x[b, j], the first b first
    for (int t = thread; t < count / kBase; t += threads) {
      const int begin = t / width * static_cast<int>(p.size) + t % width;
      float in[kBase];
#pragma unroll
      for (int b = 0; b < kBase; ++b) in[b] = row[place_of(begin + b * width)];
      for (int a = 0; a < kBase; ++a) {
        const uint32_t negative = p.negative[a];
        float sum = 0;
#pragma unroll
        for (int b = 0; b < kBase; ++b) {
          const float term = __uint_as_float(__float_as_uint(in[b]) ^ (negative << (31 - b) & 0x80000000u));
          sum = b == 0 ? term : add(sum, term);
        }
        out[begin + a * width] = narrow<E>(times(sum, scale));
      }
    }
  }
}

// ---- a small matrix and rows of less than 32

struct SmallShared {
  uint32_t negative[28];
  float row[kBlock];
};

template <class E>
__global__ void __launch_bounds__(kRowThreads)
    hadamard_small_kernel(const __grid_constant__ HadamardParams p, int64_t rows_of_block) {
  SmallShared& shared = gpu::shared<SmallShared>();
  const int64_t first = blockIdx.x * rows_of_block * p.size;
  const int count = static_cast<int>(min(rows_of_block * p.size, p.rows * p.size - first));
  const int size = static_cast<int>(p.size), width = size / p.base, thread = static_cast<int>(threadIdx.x);
  const auto scale = static_cast<float>(p.scale);
  const E* x = static_cast<const E*>(p.x) + first;
  E* out = static_cast<E*>(p.out) + first;
  if (thread < p.base) shared.negative[thread] = p.negative[thread];
  for (int begin = warp() * kLanes; begin < count; begin += kRowThreads) {
    const int i = begin + lane();
    float v[1] = {i < count ? widen(x[i]) : 0.0f};
    for (int d = 1; d < width; d *= 2) butterflies_of_lanes(v, d);
    if (i < count) shared.row[i] = v[0];
  }
  __syncthreads();
  for (int i = thread; i < count; i += kRowThreads) {
    const int begin = i / size * size + i % width;
    const uint32_t negative = shared.negative[i % size / width];
    float sum = 0;
    for (int b = 0; b < p.base; ++b) {
      const uint32_t sign = negative << (31 - b) & 0x80000000u;
      const float term = __uint_as_float(__float_as_uint(shared.row[begin + b * width]) ^ sign);
      sum = b == 0 ? term : add(sum, term);
    }
    out[i] = narrow<E>(times(sum, scale));
  }
}

template <class E, int kBase>
void launch_long(const HadamardParams& p, const LaunchContext& context) {
  const int64_t rows = std::max<int64_t>(kBlock / p.size, 1), elements = rows * p.size;
  const auto bytes = static_cast<size_t>(elements) * sizeof(float);
  if (bytes > shared_limit())
    throw std::runtime_error("x must be of rows that fit the " + std::to_string(shared_limit()) +
                             " bytes of shared memory, got " + std::to_string(p.size) + " elements");
  const int64_t threads = std::min<int64_t>((elements / kEach + kLanes - 1) / kLanes * kLanes, kMostThreads);
  launch("hadamard_transform", &hadamard_kernel<E, kBase>,
         dim3(static_cast<unsigned>((p.rows + rows - 1) / rows)), dim3(static_cast<unsigned>(threads)), bytes,
         context, p, rows);
}

void hadamard_transform(const HadamardParams& p, const LaunchContext& context) {
  with_element(p.dtype, [&]<class E>(E) {
    if (p.base == 1 && p.size <= kTogether) {
      const int64_t each = int64_t{kRowThreads} * kEach;
      launch("hadamard_transform", &hadamard_rows_kernel<E>,
             dim3(static_cast<unsigned>((p.rows * p.size + each - 1) / each)), dim3(kRowThreads), 0, context,
             p);
      return;
    }
    if (p.size / p.base < kLanes) {
      const int64_t rows = kBlock / p.size / 4 * 4;  // blocks begin with whole sectors
      launch("hadamard_transform", &hadamard_small_kernel<E>,
             dim3(static_cast<unsigned>((p.rows + rows - 1) / rows)), dim3(kRowThreads), sizeof(SmallShared),
             context, p, rows);
      return;
    }
    if (p.base == 1) return launch_long<E, 1>(p, context);
    if (p.base == 12) return launch_long<E, 12>(p, context);
    if (p.base == 20) return launch_long<E, 20>(p, context);
    launch_long<E, 28>(p, context);
  });
}

const Registration<&hadamard_transform> transform("hadamard_transform");

}  // namespace

}  // namespace palmette::gpu
