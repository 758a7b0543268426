// SPDX-License-Identifier: Apache-2.0
// What the codecs' GPU kernels share: arithmetic that is never fused, butterflies, eight codes per lane as
// bytes of a wire, how many rows of low_bits come before one.
#pragma once

#include "codec/arithmetic.h"
#include "codec/params.h"
#include "gpu/numbers.cuh"

#if defined(PALMETTE_HIP)
#pragma clang fp contract(off)
#endif

namespace palmette::gpu {

// ---- kernel_wire_gpu.cu

// The header, zeros where sections are padded, zeros where kernels will count.
void begin_wire(const WireParams& p, const LaunchContext& context);
// The checksum, and what went wrong.
void finish_wire(const WireParams& p, const LaunchContext& context);
// Leaves a WireStatus in the header, and counts rows of low_bits.
void check_wire(const WireParams& p, const LaunchContext& context);

// ---- arithmetic, each operation rounded by itself

#if defined(PALMETTE_HIP)  // whose __fadd_rn and __fmul_rn the compiler may fuse
__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float times(float a, float b) { return a * b; }
__device__ __forceinline__ float over(float a, float b) { return a / b; }
#else
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float times(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ float over(float a, float b) { return __fdiv_rn(a, b); }
#endif
__device__ __forceinline__ float minus(float a, float b) { return add(a, -b); }

__device__ __forceinline__ uint32_t magnitude_bits(float x) { return __float_as_uint(x) & 0x7FFFFFFFu; }
__device__ __forceinline__ float magnitude(float x) { return __uint_as_float(magnitude_bits(x)); }
__device__ __forceinline__ bool finite(float x) { return magnitude_bits(x) < kInfinity; }
// To the nearest, ties to even: 1.5 * 2^23 leaves no room for a fraction.
__device__ __forceinline__ float rounded(float x) { return minus(add(x, 12582912.0f), 12582912.0f); }

// ---- eight neighbours per lane

constexpr int kEach = 8;                   // elements
constexpr int kTogether = kEach * kLanes;  // of a group

template <class E>
constexpr int kWidth = 16 / sizeof(E);  // elements that are loaded as one

template <class E>
__device__ __forceinline__ void load_each(const E* from, float (&v)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; i += kWidth<E>) {
    const auto part = load(reinterpret_cast<const Pack<E, kWidth<E>>*>(from + i));
#pragma unroll
    for (int k = 0; k < kWidth<E>; ++k) v[i + k] = widen(part.value[k]);
  }
}
template <class E>
__device__ __forceinline__ void store_each(E* to, const float (&v)[kEach]) {
#pragma unroll
  for (int i = 0; i < kEach; i += kWidth<E>) {
    Pack<E, kWidth<E>> part;
#pragma unroll
    for (int k = 0; k < kWidth<E>; ++k) part.value[k] = narrow<E>(v[i + k]);
    store(reinterpret_cast<Pack<E, kWidth<E>>*>(to + i), part);
  }
}
// The same of `count` elements; what is not there is 0.
template <class E>
__device__ __forceinline__ void load_some(const E* from, int64_t count, float (&v)[kEach]) {
  if (count >= kEach) return load_each(from, v);
#pragma unroll
  for (int k = 0; k < kEach; ++k) v[k] = k < count ? widen(from[k]) : 0.0f;
}
template <class E>
__device__ __forceinline__ void store_some(E* to, int64_t count, const float (&v)[kEach]) {
  if (count >= kEach) return store_each(to, v);
#pragma unroll
  for (int k = 0; k < kEach; ++k) {
    if (k < count) to[k] = narrow<E>(v[k]);
  }
}

// As fp16, rounded up where it has less than its 11 bits.
__device__ __forceinline__ fp16 narrow_up(float x) {
  return narrow<fp16>(x < kLeastHalf ? times(ceilf(times(x, kHalvesPerOne)), 1.0f / kHalvesPerOne) : x);
}
// What m of a delta becomes: within its dtype's range.
template <class M>
__device__ __forceinline__ float moved(float m, float by) {
  return add(m, by);
}
template <>
__device__ __forceinline__ float moved<fp16>(float m, float by) {
  return fminf(fmaxf(add(m, by), -kMostHalf), kMostHalf);
}

// A group's 256 neighbours, `count` of which exist; all lanes come here. Eight floats are two accesses of 16
// bytes. Two lanes share theirs, so that each access has whole sectors of 32 bytes.
__device__ __forceinline__ void swap_halves(float (&v)[kEach] PALMETTE_COMMA_SITE) {
  const bool odd = (lane() & 1) != 0;
#pragma unroll
  for (int k = 0; k < kEach / 2; ++k) {
    const float other = shuffle_xor(odd ? v[k] : v[k + kEach / 2], 1 PALMETTE_COMMA_PASS);
    v[k] = odd ? other : v[k];
    v[k + kEach / 2] = odd ? v[k + kEach / 2] : other;
  }
}
template <class E>
__device__ __forceinline__ void load_group(const E* from, int64_t count,
                                           float (&v)[kEach] PALMETTE_COMMA_SITE) {
  if constexpr (kWidth<E> < kEach) {
    if (count >= kTogether) {
      const auto* parts = reinterpret_cast<const Pack<E, 4>*>(from) + lane() / 2 * 4 + lane() % 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const auto part = load(parts + 2 * i);
#pragma unroll
        for (int k = 0; k < 4; ++k) v[4 * i + k] = widen(part.value[k]);
      }
      return swap_halves(v PALMETTE_COMMA_PASS);
    }
  }
  load_some(from + lane() * kEach, count - lane() * kEach, v);
}
template <class E>
__device__ __forceinline__ void store_group(E* to, int64_t count,
                                            const float (&v)[kEach] PALMETTE_COMMA_SITE) {
  if constexpr (kWidth<E> < kEach) {
    if (count >= kTogether) {
      float w[kEach];
#pragma unroll
      for (int k = 0; k < kEach; ++k) w[k] = v[k];
      swap_halves(w PALMETTE_COMMA_PASS);
      auto* parts = reinterpret_cast<Pack<E, 4>*>(to) + lane() / 2 * 4 + lane() % 2;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        Pack<E, 4> part;
#pragma unroll
        for (int k = 0; k < 4; ++k) part.value[k] = narrow<E>(w[4 * i + k]);
        store(parts + 2 * i, part);
      }
      return;
    }
  }
  store_some(to + lane() * kEach, count - lane() * kEach, v);
}

// Butterflies (a, b) -> (a + b, a - b) at distances 1, 2, 4 within a lane, if below `size`.
__device__ __forceinline__ void butterflies_in_lane(float (&v)[kEach], int size) {
#pragma unroll
  for (int h = 1; h < kEach; h *= 2) {
    if (h >= size) break;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if ((i & h) != 0) continue;
      const float a = v[i], b = v[i + h];
      v[i] = add(a, b);
      v[i + h] = minus(a, b);
    }
  }
}
// The same of lanes at `distance`, each of which has `kCount` numbers.
template <int kCount>
__device__ __forceinline__ void butterflies_of_lanes(float (&v)[kCount], int distance PALMETTE_COMMA_SITE) {
  const uint32_t sign = (lane() & distance) != 0 ? 0x80000000u : 0u;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float other = shuffle_xor(v[i], distance PALMETTE_COMMA_PASS);
    v[i] = add(other, __uint_as_float(__float_as_uint(v[i]) ^ sign));
  }
}
// The transform of 8 * lanes elements, the smallest distance first.
__device__ __forceinline__ void transform_each(float (&v)[kEach], int lanes PALMETTE_COMMA_SITE) {
  butterflies_in_lane(v, kEach);
#pragma unroll
  for (int d = 1; d < kLanes; d *= 2) {
    if (d < lanes) butterflies_of_lanes(v, d PALMETTE_COMMA_PASS);
  }
}

// ---- codes

// Eight codes of `bits` bits are `bits` bytes.
__device__ __forceinline__ uint64_t pack_each(const uint32_t (&code)[kEach], int bits) {
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int k = 0; k < kEach / 2; ++k) {
    low |= code[k] << (k * bits);
    high |= code[k + kEach / 2] << (k * bits);
  }
  return uint64_t{high} << (kEach / 2 * bits) | low;
}
__device__ __forceinline__ float code_of(uint64_t packed, int k, int bits) {
  return static_cast<float>(static_cast<uint32_t>(packed >> (k * bits)) & ((1u << bits) - 1u));
}

// The bytes that a group's lanes hold of a wire, `bits` of each lane one after the other. Tiles of `lanes`
// lanes have low or high bits, by the bits of `low`.
struct Stream {
  int low_bits, high_bits, lanes;
  uint32_t low, by_low, by_high;  // 65536 / bits, rounded up

  static constexpr int kAnyRoom = 1 << 20;

  __device__ __forceinline__ Stream(int low_bits_, int high_bits_, int lanes_, uint32_t low_)
      : low_bits(low_bits_),
        high_bits(high_bits_),
        lanes(lanes_),
        low(low_),
        by_low(65536u / static_cast<uint32_t>(low_bits_) + 1u),
        by_high(65536u / static_cast<uint32_t>(high_bits_) + 1u) {}

  // Bytes of the first `tiles`, up to 32.
  __device__ __forceinline__ int offset(int tiles) const {
    const uint32_t before = tiles >= 32 ? low : low & ((1u << tiles) - 1u);
    const int of_low = __popc(before);
    return lanes * (of_low * low_bits + (tiles - of_low) * high_bits);
  }
  __device__ __forceinline__ bool is_low(int tile) const { return (low >> tile & 1u) != 0; }
  __device__ __forceinline__ int bits(int tile) const { return is_low(tile) ? low_bits : high_bits; }
  // x / bits(tile), x below 512
  __device__ __forceinline__ int over_bits(int x, int tile) const {
    return static_cast<int>(static_cast<uint32_t>(x) * (is_low(tile) ? by_low : by_high) >> 16);
  }
};

// The part of a lane's bytes that the word at `distance` bytes behind the lane's first gets.
__device__ __forceinline__ uint32_t part_of(uint64_t value, int distance) {
  if (distance >= 8 || distance <= -4) return 0;
  return static_cast<uint32_t>(distance >= 0 ? value >> (8 * distance) : value << (-8 * distance));
}

// Writes what the lanes hold of tiles [first, first + 32 / lanes), `end` of which exist, to a place that is a
// multiple of 4 bytes if tiles have 32 elements or more. Lane j writes words j, j + 32, ..: it looks up which
// lanes have their bytes and fetches these. The first and last word may be another group's too, so of those
// single bytes are written. There is room for `room` bytes.
__device__ __forceinline__ void store_codes(const Stream& s, int first, int end, uint64_t value, uint8_t* to,
                                            int room PALMETTE_COMMA_SITE) {
  const int tiles = kLanes / s.lanes, start = s.offset(first);
  const int stop = min(s.offset(min(first + tiles, end)), start + room);
  const int skipped = static_cast<int>(reinterpret_cast<uintptr_t>(to + start) & 3u);
  uint8_t* words = to + start - skipped;
  const int size = stop - start + skipped, shift = skipped - start;
  for (int slot = 0; slot < size; slot += 4 * kLanes) {
    const int at = slot + 4 * lane();
    int tile = first;
    for (int d = tiles / 2; d > 0; d /= 2) {
      if (tile + d < end && s.offset(tile + d) + shift <= at) tile += d;
    }
    int begin = s.offset(tile) + shift;
    const int place = min(s.over_bits(max(at - begin, 0) & 511, tile), s.lanes - 1);
    begin += place * s.bits(tile);
    const int source = (tile - first) * s.lanes + place;
    uint32_t word = part_of(shuffle(value, source PALMETTE_COMMA_PASS), at - begin);
    begin += s.bits(tile);
    const uint32_t second = part_of(shuffle(value, source + 1 PALMETTE_COMMA_PASS), at - begin);
    if (source + 1 < kLanes) word |= second;
    if (s.lanes < 4) {  // bytes of three lanes may meet in a word
      const int next = source + 1 < kLanes ? tile + (place + 1) / s.lanes : tile;
      begin += s.bits(next);
      const uint32_t third = part_of(shuffle(value, source + 2 PALMETTE_COMMA_PASS), at - begin);
      if (source + 2 < kLanes) word |= third;
    }
    if (at >= skipped && at + 4 <= size) {
      *reinterpret_cast<uint32_t*>(words + at) = word;
    } else {
      for (int i = max(skipped - at, 0); i < min(size - at, 4); ++i)
        words[at + i] = static_cast<uint8_t>(word >> (8 * i));
    }
  }
}

// The other way: the bytes of this lane. Words are read once, but for those that two groups share.
__device__ __forceinline__ uint64_t load_codes(const Stream& s, int first, int end, const uint8_t* from,
                                               int room PALMETTE_COMMA_SITE) {
  const int tiles = kLanes / s.lanes, start = s.offset(first);
  const int stop = min(s.offset(min(first + tiles, end)), start + room);
  const int skipped = static_cast<int>(reinterpret_cast<uintptr_t>(from + start) & 3u);
  const auto* words = reinterpret_cast<const uint32_t*>(from + start - skipped);
  const int size = (stop - start + skipped + 3) / 4;
  uint32_t held[3] = {0, 0, 0};
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    if (i * kLanes + lane() < size) held[i] = words[i * kLanes + lane()];
  }
  const int tile = min(first + lane() / s.lanes, max(end - 1, 0));
  const int at = s.offset(tile) - start + skipped + (lane() & (s.lanes - 1)) * s.bits(tile);
  const auto word = [&](int i) {
    uint32_t found = shuffle(held[0], i PALMETTE_COMMA_PASS);
#pragma unroll
    for (int k = 1; k < 3; ++k) {
      if (size <= k * kLanes) break;
      const uint32_t other = shuffle(held[k], i PALMETTE_COMMA_PASS);
      if (i >= k * kLanes) found = other;
    }
    return found;
  };
  const int k = at / 4, shift = at % 4 * 8;
  uint64_t value = uint64_t{word(k + 1)} << 32 | word(k);
  value >>= shift;
  if (s.high_bits > 4) {  // else what begins within a word ends in the next
    const uint64_t last = word(k + 2);
    if (shift != 0) value |= last << (64 - shift);
  }
  return value;
}

// ---- what goes wrong

// The lowest place is kept; the header holds ~0 there until finish_wire().
__device__ __forceinline__ void note_fault(uint8_t* wire, int64_t place, WireStatus status) {
  atomicMin(reinterpret_cast<unsigned long long*>(wire + offsetof(WireHeader, position)),
            static_cast<unsigned long long>(place) * 16 + static_cast<unsigned long long>(status));
}
__device__ __forceinline__ bool has_fault(const uint8_t* wire) {
  return *reinterpret_cast<const unsigned long long*>(wire + offsetof(WireHeader, position)) != ~0ULL;
}

// A header on every lane of a group, which reads it once.
__device__ __forceinline__ WireHeader load_header(const uint8_t* wire PALMETTE_COMMA_SITE) {
  constexpr int kWords = sizeof(WireHeader) / 4;
  const uint32_t mine = lane() < kWords ? reinterpret_cast<const uint32_t*>(wire)[lane()] : 0;
  uint32_t word[kWords];
#pragma unroll
  for (int i = 0; i < kWords; ++i) word[i] = shuffle(mine, i PALMETTE_COMMA_PASS);
  const auto byte = [&](int i) { return static_cast<uint8_t>(word[i / 4] >> (i % 4 * 8)); };
  const auto wide = [&](int i) { return uint64_t{word[i + 1]} << 32 | word[i]; };
  return {word[0],
          byte(4),
          byte(5),
          byte(6),
          byte(7),
          byte(8),
          byte(9),
          byte(10),
          byte(11),
          word[3],
          {wide(4), wide(6), wide(8)},
          wide(10),
          word[12],
          word[13],
          wide(14)};
}
__device__ __forceinline__ TahOptions options_of(const WireHeader& h) {
  return {h.tile_log2,
          h.low_bits,
          h.high_bits,
          static_cast<Allocation>(h.allocation),
          static_cast<Gate>(h.gate),
          static_cast<Metadata>(h.metadata)};
}

// ---- rows of low_bits

constexpr int kCountThreads = 1024;
struct CountShared {
  int64_t ones[kCountThreads / kLanes];
};

// By a block of kCountThreads: how many of `count` bits are set before each word; of all of them.
__device__ __forceinline__ int64_t count_ones(const uint8_t* bits, int64_t count, int64_t* before,
                                              CountShared& shared) {
  constexpr int kWidth = 4;  // words; sections are padded to 16 bytes
  const int64_t words = (count + 31) / 32;
  int64_t total = 0;
  for (int64_t begin = 0; begin < words; begin += kCountThreads * kWidth) {
    const int64_t first = begin + int64_t{threadIdx.x} * kWidth;
    Pack<uint32_t, kWidth> w{};
    if (first < words) w = load(reinterpret_cast<const Pack<uint32_t, kWidth>*>(bits + 4 * first));
    int ones[kWidth], mine = 0;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      const int64_t left = count - (first + i) * 32;
      const uint32_t real = left >= 32 ? ~0u : left > 0 ? (1u << left) - 1u : 0u;
      ones[i] = __popc(w.value[i] & real);
      mine += ones[i];
    }
    int sum = mine;  // of the lanes up to this one
#pragma unroll
    for (int d = 1; d < kLanes; d *= 2) {
      const int other = shuffle_up(sum, d);
      if (lane() >= d) sum += other;
    }
    __syncthreads();  // all have read the last round's
    if (lane() == kLanes - 1) shared.ones[warp()] = sum;
    __syncthreads();
    int64_t here = total + sum - mine;
    for (int i = 0; i < kCountThreads / kLanes; ++i) {
      const int64_t ones_there = shared.ones[i];
      if (i < warp()) here += ones_there;
      total += ones_there;
    }
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      if (first + i < words) before[first + i] = here;
      here += ones[i];
    }
  }
  return total;
}

}  // namespace palmette::gpu
