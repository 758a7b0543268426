// SPDX-License-Identifier: Apache-2.0
// Fixed point with one scale per slice, and deltas, on the GPU; kernel_fixpoint_cpu.cpp has the equations.
//
//     fixpoint_scales   x (and m)         -> absmax, steps   maxima by atomics: of integers, in any order the same
//     fixpoint_encode   x (and m), steps  -> codes, and m
//     fixpoint_decode   wire              -> out, or m
//
// Elements go through in the order of memory, eight in each lane: their codes are as many bytes as a code has bits,
// which lanes pass to each other until they are words (wire_gpu.cuh). dtypes are looked up at run time, alike by all.
#include <algorithm>

#include "codec/params.h"
#include "codec/wire_gpu.cuh"

namespace palmette::gpu {

namespace {

constexpr int kGroups = 4;  // per block
constexpr int kSteps = 4;   // of 256 elements, by a group

// What is encoded: x, or x - m.
__device__ __forceinline__ void load_source(const FixpointParams& p, int64_t at, int64_t count,
                                            float (&v)[kEach], float (&m)[kEach]) {
  load_any(p.x, p.dtype, at, count, v);
  if (p.m == nullptr) return;
  load_any(p.m, p.message_dtype, at, count, m);
#pragma unroll
  for (int k = 0; k < kEach; ++k) v[k] = minus(v[k], m[k]);
}

// How a group reads slices for their maxima.
enum class Reading {
  columns,  // `width` columns per lane, row after row
  whole,    // one column: a slice is contiguous
  narrow,   // few columns: a row per lane
};
constexpr int kWholeChunk = 4096, kNarrowChunk = 256;

__global__ void __launch_bounds__(kGroups* kLanes)
    fixpoint_magnitudes_kernel(const __grid_constant__ FixpointParams p, Reading reading, int width, int64_t rows) {
  const int64_t group = int64_t{blockIdx.x} * kGroups + warp();
  float v[kEach], m[kEach];
  if (reading == Reading::columns) {
    const int64_t of_row = p.columns / width, unit = group * kLanes + lane();
    if (unit >= p.outer * of_row) return;
    const int64_t outer = unit / of_row, column = unit % of_row * width;
    const int64_t begin = blockIdx.y * rows, end = min(begin + rows, p.inner);
    uint32_t top[kEach] = {};
#pragma unroll 4
    for (int64_t row = begin; row < end; ++row) {
      load_source(p, (outer * p.inner + row) * p.columns + column, width, v, m);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (k < width) top[k] = max(top[k], magnitude_bits(v[k]));
      }
    }
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      if (k < width) atomicMax(p.magnitudes + outer * p.columns + column + k, top[k]);
    }
    return;
  }
  const int64_t chunk = reading == Reading::whole ? kWholeChunk : kNarrowChunk;
  const int64_t chunks = (p.inner + chunk - 1) / chunk, slice = group / chunks;
  if (slice >= p.outer) return;
  const int64_t begin = group % chunks * chunk, end = min(begin + chunk, p.inner);
  for (int64_t column = 0; column < p.columns; ++column) {
    uint32_t top = 0;
    for (int64_t row = begin + lane() * width; row < end; row += kLanes * width) {
      load_source(p, (slice * p.inner + row) * p.columns + column, width, v, m);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        if (k < width) top = max(top, magnitude_bits(v[k]));
      }
    }
    top = static_cast<uint32_t>(group_max(static_cast<int>(top)));
    if (lane() == 0) atomicMax(p.magnitudes + slice * p.columns + column, top);
  }
}

__device__ __forceinline__ float step_of(float top, int bits, Grid grid) {
  const auto half = static_cast<float>(1 << (bits - 1));
  if (grid == Grid::full_range) return over(top, half - 1.0f);
  return times(top, __uint_as_float(static_cast<uint32_t>(128 - bits) << 23));  // 1 / half
}

__global__ void __launch_bounds__(kGroups* kLanes)
    fixpoint_scales_kernel(const __grid_constant__ FixpointParams p) {
  const int64_t i = int64_t{blockIdx.x} * kGroups * kLanes + threadIdx.x;
  if (i >= p.layout.scales) return;
  const uint32_t most = p.magnitudes[i];
  const fp16 half = narrow<fp16>(__uint_as_float(most));
  if (most >= kInfinity || half.bits >= 0x7C00u)
    note_fault(p.wire, i, most >= kInfinity ? WireStatus::not_finite : WireStatus::out_of_range);
  reinterpret_cast<uint16_t*>(p.wire + p.layout.absmax)[i] = half.bits;
  const float step = step_of(widen(half), p.bits, p.grid);
  p.steps[i] = step;
  p.steps[p.layout.scales + i] = step < kLeastStep ? 0.0f : over(1.0f, step);
}

// Where elements `at` .. `at + 7` have their scales.
__device__ __forceinline__ int64_t quotient(int64_t a, int64_t b) {
  if ((a | b) >> 32 == 0) return static_cast<uint32_t>(a) / static_cast<uint32_t>(b);
  return a / b;
}
struct Slices {
  bool whole, together;  // one column; all eight are columns of one row
  int64_t slice, place, length, inner, row;

  __device__ __forceinline__ Slices(int64_t at, int64_t inner_, int64_t columns)
      : whole(columns == 1), together(columns % kEach == 0), inner(inner_) {
    length = whole ? inner : columns;
    const int64_t run = quotient(at, length);
    place = at - run * length;
    const int64_t outer = whole ? run : quotient(run, inner);
    row = whole ? 0 : run - outer * inner;
    slice = whole ? run : outer * columns + place;
  }
  // value[k] = widen(scales[of element at + k])
  template <class E>
  __device__ __forceinline__ void load(const E* scales, int64_t count, float (&value)[kEach]) const {
    if (together) return load_each(scales + slice, value);
    int64_t s = slice, at = place, r = row;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      value[k] = k < count ? widen(scales[s]) : 0.0f;
      ++at;
      if (!whole) ++s;
      if (at < length) continue;
      at = 0;
      if (whole) {
        ++s;
      } else if (++r < inner) {
        s -= length;
      } else {
        r = 0;
      }
    }
  }
};

__global__ void __launch_bounds__(kGroups* kLanes)
    fixpoint_encode_kernel(const __grid_constant__ FixpointParams p) {
  const auto half = static_cast<float>(1 << (p.bits - 1));
  const float least = p.grid == Grid::full_range ? 1.0f - half : -half, most = half - 1.0f;
  const Stream stream(p.bits, p.bits, kLanes, 0);
  const int64_t first = (int64_t{blockIdx.x} * kGroups + warp()) * kSteps * kTogether;
  // a delta that cannot be sent is added nowhere
  const bool adds = p.m != nullptr && shuffle(static_cast<int>(lane() == 0 && !has_fault(p.wire)), 0) != 0;
  for (int64_t begin = first; begin < min(first + kSteps * kTogether, p.layout.elements); begin += kTogether) {
    const int64_t at = begin + lane() * kEach, count = p.layout.elements - at;
    uint32_t code[kEach] = {};
    if (count > 0) {
      float v[kEach], m[kEach], scale[kEach];
      load_source(p, at, count, v, m);
      const Slices slices(at, p.inner, p.columns);
      slices.load(p.steps + p.layout.scales, count, scale);
#pragma unroll
      for (int k = 0; k < kEach; ++k) {
        v[k] = rounded(fminf(fmaxf(times(v[k], scale[k]), least), most));
        code[k] = k < count ? static_cast<uint32_t>(static_cast<int>(v[k] + half)) : 0;
      }
      if (adds) {
        slices.load(p.steps, count, scale);
#pragma unroll
        for (int k = 0; k < kEach; ++k) m[k] = add(m[k], times(v[k], scale[k]));
        store_any(p.m, p.message_dtype, at, count, m);
      }
    }
    const int64_t left = (p.layout.elements - begin) * p.bits;
    store_codes(stream, 0, 1, pack_each(code, p.bits), p.wire + p.layout.codes + begin / 8 * p.bits,
                static_cast<int>(min((left + 7) / 8, int64_t{Stream::kAnyRoom})));
  }
}

__global__ void __launch_bounds__(kGroups* kLanes)
    fixpoint_decode_kernel(const __grid_constant__ FixpointParams p) {
  const WireHeader header = load_header(p.wire);
  const int bits = header.low_bits;
  const bool ok = header.status == static_cast<uint32_t>(WireStatus::ok);
  if (!ok && p.m != nullptr) return;
  const auto half = static_cast<float>(1 << (ok ? bits - 1 : 0));
  const auto outer = static_cast<int64_t>(header.sizes[0]), inner = static_cast<int64_t>(header.sizes[1]),
             columns = static_cast<int64_t>(header.sizes[2]), elements = p.layout.elements;
  const int64_t first = (int64_t{blockIdx.x} * kGroups + warp()) * kSteps * kTogether;
  const int64_t end = min(first + kSteps * kTogether, elements);
  float v[kEach];
  if (!ok) {
#pragma unroll
    for (int k = 0; k < kEach; ++k) v[k] = NAN;
    for (int64_t at = first + lane() * kEach; at < end; at += kTogether)
      store_any(p.out, p.dtype, at, elements - at, v);
    return;
  }
  const FixpointLayout layout = FixpointLayout::of(bits, outer, inner, columns);
  const Stream stream(bits, bits, kLanes, 0);
  for (int64_t begin = first; begin < end; begin += kTogether) {
    const int64_t at = begin + lane() * kEach, count = elements - at, left = (elements - begin) * bits;
    const uint64_t packed = load_codes(stream, 0, 1, p.wire + layout.codes + begin / 8 * bits,
                                       static_cast<int>(min((left + 7) / 8, int64_t{Stream::kAnyRoom})));
    if (count <= 0) continue;
    float scale[kEach];
    Slices(at, inner, columns)
        .load(reinterpret_cast<const fp16*>(p.wire + layout.absmax), count, scale);
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      v[k] = times(code_of(packed, k, bits) - half, step_of(scale[k], bits, static_cast<Grid>(header.allocation)));
    if (p.m == nullptr) {
      store_any(p.out, p.dtype, at, count, v);
    } else {
      float m[kEach];
      load_any(p.m, p.message_dtype, at, count, m);
#pragma unroll
      for (int k = 0; k < kEach; ++k) v[k] = add(m[k], v[k]);
      store_any(p.m, p.message_dtype, at, count, v);
    }
  }
}

// ---- launches

dim3 blocks_of(int64_t count, int64_t each) {
  return dim3(static_cast<unsigned>(std::max<int64_t>((count + each - 1) / each, 1)));
}
constexpr int64_t kOfBlock = int64_t{kGroups} * kSteps * kTogether;

void fixpoint_scales(const FixpointParams& p, const LaunchContext& context) {
  if (p.layout.scales == 0) return;
  if (p.layout.elements > 0) {
    const bool whole = p.columns == 1;
    const Reading reading = whole                                           ? Reading::whole
                            : p.columns % kEach == 0 || p.columns >= kLanes ? Reading::columns
                                                                            : Reading::narrow;
    const bool wide = whole ? p.inner % kEach == 0 : p.columns % kEach == 0;
    const int width = wide ? kEach : 1;
    const int64_t rows = std::max<int64_t>(64, (p.inner + 65534) / 65535);
    dim3 grid;
    if (reading == Reading::columns) {
      grid = blocks_of(p.outer * (p.columns / width), kGroups * kLanes);
      grid.y = static_cast<unsigned>((p.inner + rows - 1) / rows);
    } else {
      const int64_t chunk = whole ? kWholeChunk : kNarrowChunk;
      grid = blocks_of(p.outer * ((p.inner + chunk - 1) / chunk), kGroups);
    }
    launch("fixpoint_scales", &fixpoint_magnitudes_kernel, grid, dim3(kGroups * kLanes), 0, context, p, reading,
           width, rows);
  }
  launch("fixpoint_scales", &fixpoint_scales_kernel, blocks_of(p.layout.scales, kGroups * kLanes),
         dim3(kGroups * kLanes), 0, context, p);
}

void fixpoint_encode(const FixpointParams& p, const LaunchContext& context) {
  if (p.layout.elements == 0) return;
  launch("fixpoint_encode", &fixpoint_encode_kernel, blocks_of(p.layout.elements, kOfBlock),
         dim3(kGroups * kLanes), 0, context, p);
}

void fixpoint_decode(const FixpointParams& p, const LaunchContext& context) {
  if (p.layout.elements == 0) return;
  launch("fixpoint_decode", &fixpoint_decode_kernel, blocks_of(p.layout.elements, kOfBlock),
         dim3(kGroups * kLanes), 0, context, p);
}

const Registration<&fixpoint_scales> scales("fixpoint_scales");
const Registration<&fixpoint_encode> encode("fixpoint_encode");
const Registration<&fixpoint_decode> decode("fixpoint_decode");

}  // namespace

}  // namespace palmette::gpu
