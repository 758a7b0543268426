// SPDX-License-Identifier: Apache-2.0
// Hadamard tile quantization on the GPU; kernel_tah_cpu.cpp has the equations.
//
//     tah_entropy   x                    -> entropies     of tokens or tiles
//     tah_select    entropies            -> bitmap        the rows of each sample that get low_bits
//     tah_count     bitmap               -> ones_before   where a tile's codes begin
//     tah_encode    x, bitmap            -> all other sections
//     tah_decode    wire                 -> out
//
// A group of 32 lanes owns 32 neighbouring tiles, whose flags, pivots and metadata are whole words of the
// wire, and goes through them 256 elements at a time, eight in each lane. What is known per tile is on all of
// its lanes; at the end lane i has what the wire needs of tile i. Eight codes of b bits are b bytes, which
// lanes pass to each other until they are words. Nothing goes through shared memory, and nothing is read or
// written twice.
//
// Every operation that rounds is one of wire_gpu.cuh's, in the order of kernel_tah_cpu.cpp: the bytes must be
// those of every other backend.
#include <algorithm>

#include "codec/wire_gpu.cuh"

namespace palmette::gpu {

namespace {

constexpr int kGroups = 4;  // per block
constexpr int kTiles = 32;  // of a group

// ---- entropies

__device__ __forceinline__ float log2_approximate(float a) {
  const auto bits = static_cast<int32_t>(__float_as_uint(a));
  const int32_t exponent = (bits - kSqrtHalf) >> 23;
  const float f =
      minus(__int_as_float(bits - static_cast<int32_t>(static_cast<uint32_t>(exponent) << 23)), 1.0f);
  constexpr float kFactors[6] = {kLog2[0], kLog2[1], kLog2[2], kLog2[3], kLog2[4], kLog2[5]};
  float p = kFactors[5];
#pragma unroll
  for (int i = 4; i >= 0; --i) p = add(times(p, f), kFactors[i]);
  return add(times(p, f), static_cast<float>(exponent));
}

// `lanes` lanes have a row. Lane i owns running sums kEvery i .. kEvery (i + 1) - 1, which are neighbours in
// memory.
template <class E>
__global__ void __launch_bounds__(kGroups* kLanes)
    tah_entropy_kernel(const __grid_constant__ TahParams p, int64_t rows, int64_t size, int lanes) {
  constexpr int kEvery = kWidth<E>;
  const int64_t group = int64_t{blockIdx.x} * kGroups + warp();
  const int64_t row = group * (kLanes / lanes) + lane() / lanes;
  const int64_t first = (lane() & (lanes - 1)) * kEvery;
  const bool exists = row < rows;
  const E* x = static_cast<const E*>(p.x) + (exists ? row * size : 0);
  float s[kEvery] = {}, t[kEvery] = {};
#pragma unroll 4
  for (int64_t i = first; i < (exists ? size : 0); i += kEntropySums) {
    const auto part = load(reinterpret_cast<const Pack<E, kEvery>*>(x + i));
#pragma unroll
    for (int k = 0; k < kEvery; ++k) {
      const float a = magnitude(widen(part.value[k]));
      s[k] = add(s[k], a);
      t[k] = add(t[k], times(a, log2_approximate(a)));
    }
  }
#pragma unroll
  for (int d = kEntropySums / kEvery / 2; d > 0; d /= 2) {
    if (d >= lanes) continue;
#pragma unroll
    for (int k = 0; k < kEvery; ++k) {
      s[k] = add(s[k], shuffle_xor(s[k], d));
      t[k] = add(t[k], shuffle_xor(t[k], d));
    }
  }
#pragma unroll
  for (int h = kEvery / 2; h > 0; h /= 2) {
#pragma unroll
    for (int k = 0; k < h; ++k) {
      s[k] = add(s[k], s[k + h]);
      t[k] = add(t[k], t[k + h]);
    }
  }
  if (!exists || first != 0) return;
  const float h = minus(log2_approximate(s[0]), over(t[0], s[0]));
  p.entropies[row] = s[0] == 0.0f ? 0.0f : finite(h) ? h : __uint_as_float(kInfinity);
}

// ---- the choice

constexpr int kSelectThreads = 1024, kDigit = 8, kBins = 1 << kDigit;
struct SelectShared {
  int bins[kBins];
  int ties[kSelectThreads / kLanes];
  uint32_t digit;
  int left;
};

// Bits that are ordered like floats that are not NaN.
__device__ __forceinline__ uint32_t ordered(float key) {
  const uint32_t bits = __float_as_uint(key);
  return bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
}

// A block owns a sample: it finds the low_count-th key, eight bits at a time, then sets the bits of what lies
// below it and of the first that equal it.
__global__ void __launch_bounds__(kSelectThreads, 1)
    tah_select_kernel(const __grid_constant__ TahParams p, int64_t rows) {
  SelectShared& shared = gpu::shared<SelectShared>();
  const int thread = static_cast<int>(threadIdx.x);
  const float* keys = p.entropies + int64_t{blockIdx.x} * rows;
  uint32_t key = 0, known = 0;               // the bits found so far
  int left = static_cast<int>(p.low_count);  // of those that begin like the key; the first group's
  for (int shift = 32 - kDigit; shift >= 0; shift -= kDigit) {
    if (thread < kBins) shared.bins[thread] = 0;
    __syncthreads();
    for (int64_t i = warp() * kLanes; i < rows; i += kSelectThreads) {
      const bool exists = i + lane() < rows;
      const uint32_t mine = exists ? ordered(keys[i + lane()]) : 0;
      const bool counts = exists && (mine & known) == key;
      const uint32_t digit = mine >> shift & (kBins - 1);
      // Most keys begin alike: those of the first lane's bin are counted at once.
      const uint32_t voters = ballot(counts);
      if (voters == 0) continue;
      const int leader = __ffs(static_cast<int>(voters)) - 1;
      const uint32_t its_digit = shuffle(digit, leader);
      const bool same = counts && digit == its_digit;
      const uint32_t alike = ballot(same);
      if (lane() == leader) atomicAdd(&shared.bins[digit], __popc(alike));
      if (counts && !same) atomicAdd(&shared.bins[digit], 1);
    }
    __syncthreads();
    if (warp() == 0) {
      constexpr int kMine = kBins / kLanes;
      for (int i = 0; i < kMine; ++i) {  // 32 bins at a time
        const int count = shared.bins[i * kLanes + lane()];
        int sum = count;
#pragma unroll
        for (int d = 1; d < kLanes; d *= 2) {
          const int other = shuffle_up(sum, d);
          if (lane() >= d) sum += other;
        }
        const uint32_t reached = ballot(sum >= left);
        if (reached != 0) {
          const int at = __ffs(static_cast<int>(reached)) - 1;
          left -= shuffle(sum - count, at);
          if (lane() == 0) {
            shared.digit = static_cast<uint32_t>(i * kLanes + at);
            shared.left = left;
          }
          break;
        }
        left -= shuffle(sum, kLanes - 1);
      }
    }
    __syncthreads();
    key |= shared.digit << shift;
    known |= static_cast<uint32_t>(kBins - 1) << shift;
  }
  left = shared.left;

  // Words of the bitmap; samples need not begin with one.
  const int64_t begin = int64_t{blockIdx.x} * rows, end = begin + rows;
  auto* bitmap = reinterpret_cast<uint32_t*>(p.wire + p.layout.low);
  for (int64_t word = begin / 32; word * 32 < end; word += kSelectThreads / kLanes) {
    const int64_t bit = (word + warp()) * 32 + lane();
    const bool exists = bit >= begin && bit < end;
    const uint32_t mine = exists ? ordered(keys[bit - begin]) : 0;
    const uint32_t ties = ballot(exists && mine == key);
    __syncthreads();  // all have read the last round's
    if (lane() == 0) shared.ties[warp()] = __popc(ties);
    __syncthreads();
    int before = __popc(ties & ((1u << lane()) - 1u)), all = 0;
    for (int i = 0; i < kSelectThreads / kLanes; ++i) {
      const int count = shared.ties[i];
      if (i < warp()) before += count;
      all += count;
    }
    const uint32_t low = ballot(exists && (mine < key || (mine == key && before < left)));
    left -= min(left, all);
    const int64_t first = (word + warp()) * 32;
    if (lane() != 0 || first >= end) continue;
    if (first >= begin && first + 32 <= end) {
      bitmap[word + warp()] = low;
    } else {
      atomicOr(bitmap + word + warp(), low);
    }
  }
}

__global__ void __launch_bounds__(kCountThreads, 1)
    tah_count_kernel(const __grid_constant__ TahParams p, int64_t rows) {
  count_ones(p.wire + p.layout.low, rows, p.ones_before, gpu::shared<CountShared>());
}

// ---- tiles

// Of the 32 tiles from `first` on, `count` of which exist: which have low_bits, and how many before them do.
struct LowTiles {
  uint32_t mask;
  int64_t before;
};
__device__ __forceinline__ LowTiles low_tiles(Allocation allocation, const uint8_t* bitmap,
                                              const int64_t* ones_before, int64_t tiles_per_token,
                                              int64_t first, int count) {
  if (allocation == Allocation::none) return {0, 0};
  const int64_t per_row = allocation == Allocation::token ? tiles_per_token : 1;
  const int64_t tile = first + min(lane(), count - 1), row = tile / per_row;
  const int64_t row_of_first = shuffle(row, 0), word = row_of_first / 32;
  const int64_t last_word = shuffle(row, kLanes - 1) / 32;  // at most one more
  const uint32_t mine =
      word + lane() <= last_word ? reinterpret_cast<const uint32_t*>(bitmap)[word + lane()] : 0;
  const bool low = (shuffle(mine, static_cast<int>(row / 32 - word)) >> (row % 32) & 1u) != 0;
  const uint32_t mask = ballot(low && lane() < count);
  int64_t before = 0;
  if (lane() == 0) {
    before = (ones_before[word] + __popc(mine & ((1u << (row % 32)) - 1u))) * per_row;
    if (low) before += first - row * per_row;
  }
  return {mask, shuffle(before, 0)};
}

// The lanes of a tile, as a mask of a group's.
__device__ __forceinline__ uint32_t mates(int lanes) {
  return lanes == kLanes ? ~0u : ((1u << lanes) - 1u) << (lane() & ~(lanes - 1));
}
template <class F>
__device__ __forceinline__ float across(float x, int lanes, F&& f) {
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    if (d < lanes) x = f(x, shuffle_xor(x, d));
  }
  return x;
}
__device__ __forceinline__ float least_of(const float (&v)[kEach], int lanes) {
  float x = v[0];
#pragma unroll
  for (int k = 1; k < kEach; ++k) x = fminf(x, v[k]);
  return across(x, lanes, [](float a, float b) { return fminf(a, b); });
}
__device__ __forceinline__ float most_of(const float (&v)[kEach], int lanes) {
  float x = v[0];
#pragma unroll
  for (int k = 1; k < kEach; ++k) x = fmaxf(x, v[k]);
  return across(x, lanes, [](float a, float b) { return fmaxf(a, b); });
}
__device__ __forceinline__ float pick(const float (&v)[kEach], int index) {
  float x = v[0];
#pragma unroll
  for (int k = 1; k < kEach; ++k) x = index == k ? v[k] : x;
  return x;
}
// Elements 0 and `pivot` of each tile change places.
__device__ __forceinline__ void swap_pivot(float (&v)[kEach], int pivot, int lanes) {
  const int mine = lane() & (lanes - 1), tile = lane() - mine;
  const float front = shuffle(v[0], tile), pulled = shuffle(pick(v, pivot % kEach), tile + pivot / kEach);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (mine == pivot / kEach && k == pivot % kEach) v[k] = front;
  }
  if (mine == 0) v[0] = pulled;
}
__device__ __forceinline__ void rotate(float (&v)[kEach], float root, int lanes) {
  transform_each(v, lanes);
#pragma unroll
  for (int k = 0; k < kEach; ++k) v[k] = times(v[k], root);
}
__device__ __forceinline__ float root_of(int log2) {
  const float power = __uint_as_float(static_cast<uint32_t>(127 - log2 / 2) << 23);
  return log2 % 2 == 0 ? power : times(power, 0.70710678118654752440f);
}

// From here on the largest sum of a tile's elements may overflow, and then leave NaN.
constexpr float kHuge = 1.2e36f;

template <class E>
__global__ void __launch_bounds__(kGroups* kLanes) tah_encode_kernel(const __grid_constant__ TahParams p) {
  const TahOptions& o = p.options;
  const int log2 = o.tile_log2, lanes = 1 << (log2 - 3), together = kLanes / lanes;
  const int64_t first = (int64_t{blockIdx.x} * kGroups + warp()) * kTiles;
  if (first >= p.layout.tiles) return;
  const int count = static_cast<int>(min(p.layout.tiles - first, int64_t{kTiles}));
  const LowTiles low =
      low_tiles(o.allocation, p.wire + p.layout.low, p.ones_before, p.layout.tiles_per_token, first, count);
  const Stream stream(o.low_bits, o.high_bits, lanes, low.mask);
  uint8_t* codes = p.wire + p.layout.codes + TahLayout::code_bytes(o, low.before, first - low.before);
  const int mine = lane() & (lanes - 1);
  const uint32_t tile_mask = mates(lanes);
  const float root = root_of(log2);
  const E* x = static_cast<const E*>(p.x) + (first << log2);

  uint32_t sent = 0;  // of tile lane(): the pivot, and 256 where it fired
  float sent_zero = 0, sent_step = 0;
  float next[kEach];
  load_group(x, int64_t{count} << log2, next);
  for (int step = 0; step * together < count; ++step) {
    const int tile = step * together + lane() / lanes;
    const bool exists = tile < count;
    float v[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) v[k] = next[k];
    load_group(x + (step + 1) * kTogether, (int64_t{count} << log2) - (step + 1) * kTogether, next);

    uint32_t top_bits = 0;  // a NaN is larger than all
#pragma unroll
    for (int k = 0; k < kEach; ++k) top_bits = max(top_bits, magnitude_bits(v[k]));
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
      if (d < lanes) top_bits = max(top_bits, shuffle_xor(top_bits, d));
    }
    const float top = __uint_as_float(top_bits);

    int pivot = 0;
    bool fires = false;
    if (o.gate != Gate::never) {
      int place = kEach;  // the first of the largest
#pragma unroll
      for (int k = kEach - 1; k >= 0; --k) {
        if (magnitude_bits(v[k]) == top_bits) place = k;
      }
      const int leader = __ffs(static_cast<int>(ballot(place < kEach) & tile_mask)) - 1;
      pivot = (leader & (lanes - 1)) * kEach + shuffle(place, leader);
      fires = exists;
      if (o.gate == Gate::ratio) {
        bool rivals = false;  // does another one exceed it when multiplied by the threshold?
#pragma unroll
        for (int k = 0; k < kEach; ++k)
          rivals = rivals || (mine * kEach + k != pivot && times(magnitude(v[k]), p.threshold) > top);
        const uint32_t with_rivals = ballot(rivals);
        fires = exists && (with_rivals & tile_mask) == 0;
      }
    }
    float least = 0, most = 0;
    if (o.gate == Gate::range) {
      least = least_of(v, lanes);
      most = most_of(v, lanes);
    }
    if (any(fires)) {
      float w[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) w[k] = v[k];
      swap_pivot(w, pivot, lanes);
      rotate(w, root, lanes);
      bool overflows = false;  // minima and maxima leave out NaN
      if (any(top > kHuge)) {
#pragma unroll
        for (int k = 0; k < kEach; ++k) overflows = overflows || !finite(w[k]);
        overflows = (ballot(overflows) & tile_mask) != 0;
        if (overflows) w[0] = __uint_as_float(kInfinity);
      }
      if (o.gate == Gate::range) {
        const float w_least = least_of(w, lanes), w_most = most_of(w, lanes);
        fires = fires && minus(w_most, w_least) < minus(most, least);
        least = fires ? w_least : least;
        most = fires ? w_most : most;
      }
#pragma unroll
      for (int k = 0; k < kEach; ++k) v[k] = fires ? w[k] : v[k];
    }
    if (o.gate != Gate::range) {
      least = least_of(v, lanes);
      most = most_of(v, lanes);
    }

    const int bits = stream.bits(tile);
    const auto steps = static_cast<float>((1 << bits) - 1);
    float zero = add(least, 0.0f);  // -0 becomes 0
    float size = over(minus(most, zero), steps);
    if (size < kLeastStep) size = 0;
    const float exact_zero = zero, exact_size = size;
    if (o.metadata == Metadata::fp16) {
      zero = widen(narrow<fp16>(zero));
      size = widen(narrow_up(size));
    }
    if (exists && mine == 0) {
      if (top_bits >= kInfinity) {
        note_fault(p.wire, first + tile, WireStatus::not_finite);
      } else if (!finite(zero) || !(size < __uint_as_float(kInfinity))) {
        note_fault(p.wire, first + tile, WireStatus::out_of_range);
      }
    }
    // lane i takes what tile i of the 32 sends
    const int source = lane() % together * lanes;
    const bool here = lane() / together == step;
    const uint32_t flags = shuffle(fires ? 256u | static_cast<uint32_t>(pivot) : 0u, source);
    const float its_zero = shuffle(zero, source), its_size = shuffle(size, source);
    if (here) {
      sent = flags;
      sent_zero = its_zero;
      sent_step = its_size;
    }

    if (!p.rounded) {
      zero = exact_zero;
      size = exact_size;
    }
    const float inverse = size < kLeastStep ? 0.0f : over(1.0f, size);
    uint32_t code[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const float c = fminf(fmaxf(times(minus(v[k], zero), inverse), 0.0f), steps);
      code[k] = __float_as_uint(add(c, 12582912.0f)) - 0x4B400000u;
    }
    store_codes(stream, step * together, count, exists ? pack_each(code, bits) : 0, codes, Stream::kAnyRoom);
  }

  // what lane i has of tile i
  const bool exists = lane() < count;
  if (exists) {
    uint8_t* metadata = p.wire + p.layout.metadata;
    if (o.metadata == Metadata::fp16) {
      reinterpret_cast<uint32_t*>(metadata)[first + lane()] = ptx::pack_fp16(sent_zero, sent_step);
    } else {
      store(reinterpret_cast<Pack<float, 2>*>(metadata) + first + lane(),
            Pack<float, 2>{{sent_zero, sent_step}});
    }
  }
  if (o.gate == Gate::ratio || o.gate == Gate::range) {
    const uint32_t fired = ballot(exists && (sent & 256u) != 0);
    if (lane() == 0) reinterpret_cast<uint32_t*>(p.wire + p.layout.fired)[first / kTiles] = fired;
  }
  if (o.gate != Gate::never) {
    // lane j: bits 32 j .. 32 j + 31 of the pivots, log2 bits each
    const int begin = 32 * lane(), tile = begin / log2;
    uint32_t word = 0;
    for (int i = 0; i * log2 < 32 + log2; ++i) {
      const uint32_t its_pivot = shuffle(exists ? sent & 255u : 0u, tile + i);
      const int at = (tile + i) * log2 - begin;
      if (tile + i >= kTiles || at >= 32) continue;
      word |= at >= 0 ? its_pivot << at : its_pivot >> -at;
    }
    auto* pivots = reinterpret_cast<uint32_t*>(p.wire + p.layout.pivots) + first / kTiles * log2;
    if (begin < count * log2) pivots[lane()] = word;
  }
}

// ---- and back

template <class E>
__global__ void __launch_bounds__(kGroups* kLanes) tah_decode_kernel(const __grid_constant__ TahParams p) {
  const WireHeader header = load_header(p.wire);
  E* out = static_cast<E*>(p.out);
  if (header.status != static_cast<uint32_t>(WireStatus::ok)) {
    const int64_t elements = p.batch * p.length * p.channels;
    float nothing[kEach];
#pragma unroll
    for (int k = 0; k < kEach; ++k) nothing[k] = NAN;
    const int64_t threads = int64_t{gridDim.x} * kGroups * kLanes;
    for (int64_t i = (int64_t{blockIdx.x} * kGroups * kLanes + threadIdx.x) * kEach; i < elements;
         i += threads * kEach)
      store_some(out + i, elements - i, nothing);
    return;
  }
  const TahOptions o = options_of(header);
  const TahLayout layout =
      TahLayout::of(o, static_cast<int64_t>(header.sizes[0]), static_cast<int64_t>(header.sizes[1]),
                    static_cast<int64_t>(header.sizes[2]), header.low_count);
  const int log2 = o.tile_log2, lanes = 1 << (log2 - 3), together = kLanes / lanes;
  const float root = root_of(log2);
  const bool by_flag = o.gate == Gate::ratio || o.gate == Gate::range;
  for (int64_t group = int64_t{blockIdx.x} * kGroups + warp(); group * kTiles < layout.tiles;
       group += int64_t{gridDim.x} * kGroups) {
    const int64_t first = group * kTiles;
    const int count = static_cast<int>(min(layout.tiles - first, int64_t{kTiles}));
    const LowTiles low =
        low_tiles(o.allocation, p.wire + layout.low, p.ones_before, layout.tiles_per_token, first, count);
    const Stream stream(o.low_bits, o.high_bits, lanes, low.mask);
    const uint8_t* codes = p.wire + layout.codes + TahLayout::code_bytes(o, low.before, first - low.before);

    // lane i reads what was sent of tile i
    Pack<float, 2> sent{};
    if (lane() < count) {
      const uint8_t* metadata = p.wire + layout.metadata;
      if (o.metadata == Metadata::fp16) {
        const uint32_t both = reinterpret_cast<const uint32_t*>(metadata)[first + lane()];
        sent = {{ptx::widen_fp16(static_cast<uint16_t>(both)),
                 ptx::widen_fp16(static_cast<uint16_t>(both >> 16))}};
      } else {
        sent = load(reinterpret_cast<const Pack<float, 2>*>(metadata) + first + lane());
      }
    }
    uint32_t fired = o.gate == Gate::always ? ~0u : 0;
    if (by_flag) {
      const uint32_t* flags = reinterpret_cast<const uint32_t*>(p.wire + layout.fired) + group;
      fired = shuffle(lane() == 0 ? *flags : 0u, 0);
    }
    int pivot_of_tile = 0;
    if (o.gate != Gate::never) {
      const auto* pivots = reinterpret_cast<const uint32_t*>(p.wire + layout.pivots) + group * log2;
      const uint32_t word = 32 * lane() < count * log2 ? pivots[lane()] : 0;
      const int at = lane() * log2;
      const uint32_t begin = shuffle(word, at / 32), end = shuffle(word, at / 32 + 1);
      pivot_of_tile = static_cast<int>((uint64_t{end} << 32 | begin) >> (at % 32)) & ((1 << log2) - 1);
    }

    E* to = out + (first << log2);
    for (int step = 0; step * together < count; ++step) {
      const int tile = step * together + lane() / lanes;
      const int bits = stream.bits(tile);
      const uint64_t packed = load_codes(stream, step * together, count, codes, Stream::kAnyRoom);
      const float zero = shuffle(sent.value[0], tile), size = shuffle(sent.value[1], tile);
      const int pivot = shuffle(pivot_of_tile, tile);
      const bool fires = tile < count && (fired >> tile & 1u) != 0;
      float v[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) v[k] = add(zero, times(code_of(packed, k, bits), size));
      if (any(fires)) {
        float w[kEach];
#pragma unroll
        for (int k = 0; k < kEach; ++k) w[k] = v[k];
        rotate(w, root, lanes);
        swap_pivot(w, pivot, lanes);
#pragma unroll
        for (int k = 0; k < kEach; ++k) v[k] = fires ? w[k] : v[k];
      }
      store_group(to + step * kTogether, (int64_t{count} << log2) - step * kTogether, v);
    }
  }
}

// ---- launches

dim3 blocks_of(int64_t groups) {
  return dim3(static_cast<unsigned>(std::max<int64_t>((groups + kGroups - 1) / kGroups, 1)));
}
bool by_token(const TahParams& p) { return p.options.allocation == Allocation::token; }

void entropies(const TahParams& p, const LaunchContext& context) {
  const int64_t rows = by_token(p) ? p.layout.tokens : p.layout.tiles;
  const int64_t size = by_token(p) ? p.channels : int64_t{1} << p.options.tile_log2;
  with_element(p.dtype, [&]<class E>(E) {
    const bool whole = size >= kEntropySums || size == 0 || (size & (size - 1)) != 0;
    const int lanes = static_cast<int>(whole ? kEntropySums : size) / kWidth<E>;
    launch("tah_entropy", &tah_entropy_kernel<E>, blocks_of((rows * lanes + kLanes - 1) / kLanes),
           dim3(kGroups * kLanes), 0, context, p, rows, size, lanes);
  });
}

void tah_encode(const TahLaunch& both, const LaunchContext& context) {
  const TahParams& p = both.tah;
  const TahLayout& l = p.layout;
  begin_wire(both.wire, context);
  if (p.low_count > 0) {
    const int64_t rows = by_token(p) ? p.length : p.length * l.tiles_per_token;
    entropies(p, context);
    launch("tah_select", &tah_select_kernel, dim3(static_cast<unsigned>(p.batch)), dim3(kSelectThreads),
           sizeof(SelectShared), context, p, rows);
  }
  if (p.options.allocation != Allocation::none && l.tiles > 0)
    launch("tah_count", &tah_count_kernel, dim3(1), dim3(kCountThreads), sizeof(CountShared), context, p,
           by_token(p) ? l.tokens : l.tiles);
  if (l.tiles > 0) {
    with_element(p.dtype, [&]<class E>(E) {
      launch("tah_encode", &tah_encode_kernel<E>, blocks_of((l.tiles + kTiles - 1) / kTiles),
             dim3(kGroups * kLanes), 0, context, p);
    });
  }
  finish_wire(both.wire, context);
}

// How large tiles are is for the wire to say: groups of tiles of 64 elements each, who go on while there are
// more.
void tah_decode(const TahLaunch& both, const LaunchContext& context) {
  const TahParams& p = both.tah;
  const int64_t elements = both.wire.elements;
  check_wire(both.wire, context);
  if (elements == 0) return;
  with_element(p.dtype, [&]<class E>(E) {
    launch("tah_decode", &tah_decode_kernel<E>, blocks_of((elements + kTiles * 64 - 1) / (kTiles * 64)),
           dim3(kGroups * kLanes), 0, context, p);
  });
}

const Registration<&tah_encode> encode("tah_encode");
const Registration<&tah_decode> decode("tah_decode");

}  // namespace

}  // namespace palmette::gpu
