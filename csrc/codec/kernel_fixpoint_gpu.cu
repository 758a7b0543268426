// SPDX-License-Identifier: Apache-2.0
// Fixed point with one scale per slice, and deltas, on the GPU; kernel_fixpoint_cpu.cpp has the equations.
//
//     fixpoint_magnitudes   x (and m)         -> magnitudes   by atomics: of integers, in any order the same
//     fixpoint_scales       magnitudes        -> absmax, steps
//     fixpoint_encode       x (and m), steps  -> codes, and m
//     fixpoint_decode       wire              -> out, or m
//
// Elements go through in the order of memory, eight in each lane: their codes are as many bytes as a code has
// bits, which lanes pass to each other until they are words (wire_gpu.cuh).
#include <algorithm>
#include <type_traits>

#include "codec/wire_gpu.cuh"

namespace palmette::gpu {

namespace {

constexpr int kGroups = 4;  // per block
constexpr int kSteps = 4;   // of 256 elements, by a group

struct NoMessage {};
template <class M>
constexpr bool kDelta = !std::is_same_v<M, NoMessage>;

// What is encoded, x or x - m: `count` of 256 elements from `at` on, by all lanes.
template <class E, class M>
__device__ __forceinline__ void load_source(const FixpointParams& p, int64_t at, int64_t count,
                                            float (&v)[kEach], float (&m)[kEach]) {
  load_group(static_cast<const E*>(p.x) + at, count, v);
  if constexpr (kDelta<M>) {
    load_group(static_cast<const M*>(p.m) + at, count, m);
#pragma unroll
    for (int k = 0; k < kEach; ++k) v[k] = minus(v[k], m[k]);
  }
}
// kCount neighbours of one lane.
template <class E, class M, int kCount>
__device__ __forceinline__ void load_source(const FixpointParams& p, int64_t at, float (&v)[kCount]) {
  const auto x = load(reinterpret_cast<const Pack<E, kCount>*>(static_cast<const E*>(p.x) + at));
#pragma unroll
  for (int k = 0; k < kCount; ++k) v[k] = widen(x.value[k]);
  if constexpr (kDelta<M>) {
    const auto m = load(reinterpret_cast<const Pack<M, kCount>*>(static_cast<const M*>(p.m) + at));
#pragma unroll
    for (int k = 0; k < kCount; ++k) v[k] = minus(v[k], widen(m.value[k]));
  }
}

// How a group reads slices for their maxima.
enum class Reading {
  columns,  // kCount columns per lane, row after row
  whole,    // one column: a slice is contiguous, in chunks of 256
  rows,     // few columns: a row per lane
};
constexpr int64_t kWholeChunk = 4096, kRowsChunk = 256;

template <class E, class M, int kCount>
__device__ __forceinline__ void read_columns(const FixpointParams& p, int64_t group, int64_t rows) {
  const int64_t of_row = p.columns / kCount, unit = group * kLanes + lane();
  if (unit >= p.outer * of_row) return;
  const int64_t outer = unit / of_row, column = unit % of_row * kCount;
  const int64_t begin = blockIdx.y * rows, end = min(begin + rows, p.inner);
  uint32_t top[kCount] = {};
#pragma unroll 4
  for (int64_t row = begin; row < end; ++row) {
    float v[kCount];
    load_source<E, M>(p, (outer * p.inner + row) * p.columns + column, v);
#pragma unroll
    for (int k = 0; k < kCount; ++k) top[k] = max(top[k], magnitude_bits(v[k]));
  }
#pragma unroll
  for (int k = 0; k < kCount; ++k) atomicMax(p.magnitudes + outer * p.columns + column + k, top[k]);
}

template <class E, class M>
__global__ void __launch_bounds__(kGroups* kLanes)
    fixpoint_magnitudes_kernel(const __grid_constant__ FixpointParams p, Reading reading, int width,
                               int64_t rows) {
  const int64_t group = int64_t{blockIdx.x} * kGroups + warp();
  if (reading == Reading::columns) {
    if (width == 4) return read_columns<E, M, 4>(p, group, rows);
    return read_columns<E, M, 1>(p, group, rows);
  }
  const bool whole = reading == Reading::whole;
  const int64_t chunk = whole ? kWholeChunk : kRowsChunk;
  const int64_t chunks = (p.inner + chunk - 1) / chunk, slice = group / chunks;
  if (slice >= p.outer) return;
  const int64_t begin = group % chunks * chunk, end = min(begin + chunk, p.inner);
  for (int64_t column = 0; column < p.columns; ++column) {
    uint32_t top = 0;
    if (whole && width == kEach) {
      float v[kEach], m[kEach];
      for (int64_t row = begin; row < end; row += kTogether) {
        load_source<E, M>(p, slice * p.inner + row, end - row, v, m);
#pragma unroll
        for (int k = 0; k < kEach; ++k) top = max(top, magnitude_bits(v[k]));
      }
    } else {
      for (int64_t row = begin + lane(); row < end; row += kLanes) {
        float v[1];
        load_source<E, M>(p, (slice * p.inner + row) * p.columns + column, v);
        top = max(top, magnitude_bits(v[0]));
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
  const fp16 half = narrow_up(__uint_as_float(most));
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
    if (together && count > 0) return load_each(scales + slice, value);
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

// Bytes that are left for so many bits.
__device__ __forceinline__ int room_for(int64_t bits) {
  return static_cast<int>(min((bits + 7) / 8, int64_t{Stream::kAnyRoom}));
}

template <class E, class M>
__global__ void __launch_bounds__(kGroups* kLanes)
    fixpoint_encode_kernel(const __grid_constant__ FixpointParams p) {
  const auto half = static_cast<float>(1 << (p.bits - 1));
  const float least = p.grid == Grid::full_range ? 1.0f - half : -half, most = half - 1.0f;
  const Stream stream(p.bits, p.bits, kLanes, 0);
  const int64_t first = (int64_t{blockIdx.x} * kGroups + warp()) * kSteps * kTogether;
  // a delta that cannot be sent is added nowhere
  bool adds = false;
  if constexpr (kDelta<M>) adds = any(lane() == 0 && !has_fault(p.wire));
  for (int64_t begin = first; begin < min(first + kSteps * kTogether, p.layout.elements);
       begin += kTogether) {
    const int64_t all = p.layout.elements - begin, at = begin + lane() * kEach, count = all - lane() * kEach;
    uint32_t code[kEach] = {};
    float v[kEach], m[kEach], scale[kEach];
    load_source<E, M>(p, begin, all, v, m);
    const Slices slices(min(at, p.layout.elements - 1), p.inner, p.columns);
    slices.load(p.steps + p.layout.scales, count, scale);
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      v[k] = rounded(fminf(fmaxf(times(v[k], scale[k]), least), most));
      code[k] = k < count ? static_cast<uint32_t>(static_cast<int>(v[k] + half)) : 0;
    }
    if constexpr (kDelta<M>) {
      if (adds) {
        slices.load(p.steps, count, scale);
#pragma unroll
        for (int k = 0; k < kEach; ++k) m[k] = moved<M>(m[k], times(v[k], scale[k]));
        store_group(static_cast<M*>(p.m) + begin, all, m);
      }
    }
    store_codes(stream, 0, 1, pack_each(code, p.bits), p.wire + p.layout.codes + begin / 8 * p.bits,
                room_for(all * p.bits));
  }
}

// E: of out, or of m.
template <class E, bool kAdds>
__global__ void __launch_bounds__(kGroups* kLanes)
    fixpoint_decode_kernel(const __grid_constant__ FixpointParams p) {
  const WireHeader header = load_header(p.wire);
  const int64_t elements = p.layout.elements;
  const int64_t first = (int64_t{blockIdx.x} * kGroups + warp()) * kSteps * kTogether;
  const int64_t end = min(first + kSteps * kTogether, elements);
  E* out = static_cast<E*>(kAdds ? p.m : p.out);
  float v[kEach];
  if (header.status != static_cast<uint32_t>(WireStatus::ok)) {
    if constexpr (!kAdds) {
#pragma unroll
      for (int k = 0; k < kEach; ++k) v[k] = NAN;
      for (int64_t at = first; at < end; at += kTogether) store_group(out + at, elements - at, v);
    }
    return;
  }
  const int bits = header.low_bits;
  const auto half = static_cast<float>(1 << (bits - 1));
  const auto outer = static_cast<int64_t>(header.sizes[0]), inner = static_cast<int64_t>(header.sizes[1]),
             columns = static_cast<int64_t>(header.sizes[2]);
  const FixpointLayout layout = FixpointLayout::of(bits, outer, inner, columns);
  const Stream stream(bits, bits, kLanes, 0);
  for (int64_t begin = first; begin < end; begin += kTogether) {
    const int64_t all = elements - begin, at = begin + lane() * kEach, count = all - lane() * kEach;
    const uint64_t packed =
        load_codes(stream, 0, 1, p.wire + layout.codes + begin / 8 * bits, room_for(all * bits));
    float scale[kEach];
    Slices(min(at, elements - 1), inner, columns)
        .load(reinterpret_cast<const fp16*>(p.wire + layout.absmax), count, scale);
#pragma unroll
    for (int k = 0; k < kEach; ++k)
      v[k] = times(code_of(packed, k, bits) - half,
                   step_of(scale[k], bits, static_cast<Grid>(header.allocation)));
    if constexpr (kAdds) {
      float m[kEach];
      load_group(out + begin, all, m);
#pragma unroll
      for (int k = 0; k < kEach; ++k) v[k] = moved<E>(m[k], v[k]);
    }
    store_group(out + begin, all, v);
  }
}

// ---- launches

dim3 blocks_of(int64_t count, int64_t each) {
  return dim3(static_cast<unsigned>(std::max<int64_t>((count + each - 1) / each, 1)));
}
// f(E{}, M{})
template <class F>
void with_elements(const FixpointParams& p, F&& f) {
  with_element(p.dtype, [&]<class E>(E) {
    if (p.m == nullptr) return f(E{}, NoMessage{});
    with_element(p.message_dtype, [&]<class M>(M) { f(E{}, M{}); });
  });
}
constexpr int64_t kOfBlock = int64_t{kGroups} * kSteps * kTogether;

void scales(const FixpointParams& p, const LaunchContext& context) {
  if (p.layout.scales == 0) return;
  if (p.layout.elements > 0) {
    const bool whole = p.columns == 1;
    const Reading reading = whole                                       ? Reading::whole
                            : p.columns % 4 == 0 || p.columns >= kLanes ? Reading::columns
                                                                        : Reading::rows;
    const int width = whole ? (p.inner % kEach == 0 ? kEach : 1) : p.columns % 4 == 0 ? 4 : 1;
    const int64_t rows = std::max<int64_t>(64, (p.inner + 65534) / 65535);
    dim3 grid;
    if (reading == Reading::columns) {
      grid = blocks_of(p.outer * (p.columns / width), kGroups * kLanes);
      grid.y = static_cast<unsigned>((p.inner + rows - 1) / rows);
    } else {
      const int64_t chunk = whole ? kWholeChunk : kRowsChunk;
      grid = blocks_of(p.outer * ((p.inner + chunk - 1) / chunk), kGroups);
    }
    with_elements(p, [&]<class E, class M>(E, M) {
      launch("fixpoint_magnitudes", &fixpoint_magnitudes_kernel<E, M>, grid, dim3(kGroups * kLanes), 0,
             context, p, reading, width, rows);
    });
  }
  launch("fixpoint_scales", &fixpoint_scales_kernel, blocks_of(p.layout.scales, kGroups * kLanes),
         dim3(kGroups * kLanes), 0, context, p);
}

void fixpoint_encode(const FixpointLaunch& both, const LaunchContext& context) {
  const FixpointParams& p = both.fixpoint;
  begin_wire(both.wire, context);
  scales(p, context);
  if (p.layout.elements > 0) {
    with_elements(p, [&]<class E, class M>(E, M) {
      launch("fixpoint_encode", &fixpoint_encode_kernel<E, M>, blocks_of(p.layout.elements, kOfBlock),
             dim3(kGroups * kLanes), 0, context, p);
    });
  }
  finish_wire(both.wire, context);
}

void fixpoint_decode(const FixpointLaunch& both, const LaunchContext& context) {
  const FixpointParams& p = both.fixpoint;
  check_wire(both.wire, context);
  if (p.layout.elements == 0) return;
  with_element(p.dtype, [&]<class E>(E) {
    const auto kernel = p.m == nullptr ? &fixpoint_decode_kernel<E, false> : &fixpoint_decode_kernel<E, true>;
    launch("fixpoint_decode", kernel, blocks_of(p.layout.elements, kOfBlock), dim3(kGroups * kLanes), 0,
           context, p);
  });
}

const Registration<&fixpoint_encode> encode("fixpoint_encode");
const Registration<&fixpoint_decode> decode("fixpoint_decode");

}  // namespace

}  // namespace palmette::gpu
