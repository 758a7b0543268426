// SPDX-License-Identifier: Apache-2.0
// Hadamard tile quantization (TAH-Quant, arXiv 2506.01352). Of the magnitudes a of a token (or a tile),
//
//     H = log2 S - T / S        S = sum a        T = sum a log2 a
//
// is the entropy by which the operator allots bits. A tile x of G elements with largest magnitude at `pivot`
// becomes, where the gate fires, x' = H_G swap(x, 0, pivot) / sqrt(G), and then
//
//     zero = min x'     step = (max x' - min x') / (2^bits - 1)     code = round((x' - zero) / step)
//
// with zero and step as they are sent. The receiver runs it backwards.
//
// Tiles go through in batches of one per lane: what is known per element lies along the tile (R vectors of W
// lanes), what is known per tile lies across the batch. So a batch's minima are found with two shuffles per
// tile, and its metadata in single vectors.
//
// csrc/codec is compiled without fused multiply-adds: the bytes must be those of every other backend.
#include <atomic>

#include "codec/arithmetic.h"
#include "codec/bits_cpu.h"
#include "codec/fwht_cpu.h"
#include "codec/params.h"
#include "cpu/chunks.h"
#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {
namespace {

struct Work : Chunks<TahParams> {
  std::atomic<uint64_t> fault{~uint64_t{0}};

  Work(const TahParams& params, int64_t count, int64_t chunk) : Chunks{&params, count, chunk} {}
  void note(int64_t tile, WireStatus status) {
    const uint64_t mine = static_cast<uint64_t>(tile) * 16 + static_cast<uint64_t>(status);
    uint64_t seen = fault.load(std::memory_order_relaxed);
    while (mine < seen && !fault.compare_exchange_weak(seen, mine)) {
    }
  }
};

// ---- entropy

template <int N>
PALMETTE_INLINE typename Simd<float, N>::V log2_approximate(typename Simd<float, N>::V a) {
  using S = Simd<float, N>;
  using V = typename S::V;
  using I = typename S::I;
  const I exponent = ((I)a - kSqrtHalf) >> 23;
  const V f = (V)((I)a - (exponent << 23)) - 1.0f;
  V p = S::splat(kLog2[5]);
#pragma GCC unroll 5
  for (int i = 4; i >= 0; --i) p = p * f + kLog2[i];
  return p * f + __builtin_convertvector(exponent, V);
}

template <class E>
struct Entropy {
  using S = Native<float>;
  using V = S::V;
  using I = S::I;
  static constexpr int L = S::kLanes, kVectors = kEntropySums / L;

  // Both sums of n elements, by halves as far as one vector each.
  static PALMETTE_INLINE void sums(const E* x, int64_t n, V& total, V& weighted) {
    V s[kVectors], t[kVectors];
    for (int v = 0; v < kVectors; ++v) s[v] = t[v] = S::zero();
    int64_t i = 0;
    for (; i + kEntropySums <= n; i += kEntropySums) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) add(S::load(x + i + v * L), s[v], t[v]);
    }
    if (i < n) {
      for (int v = 0; v < kVectors; ++v) {
        const int64_t left = n - i - v * L;
        const int count = int(left < 0 ? 0 : left < L ? left : L);
        add(S::load_n(x + i + v * L, count), s[v], t[v]);
      }
    }
    for (int h = kVectors / 2; h > 0; h /= 2) {
      for (int v = 0; v < h; ++v) {
        s[v] += s[v + h];
        t[v] += t[v + h];
      }
    }
    total = s[0];
    weighted = t[0];
  }
  static PALMETTE_INLINE void add(V x, V& s, V& t) {
    const V a = (V)((I)x & 0x7FFFFFFF);
    s += a;
    t += a * log2_approximate<L>(a);
  }

  // Lane i: the sum of v[i], by halves.
  static PALMETTE_INLINE V gather_sums(V (&v)[L]) {
    halves<L / 2>(v);
    return v[0];
  }
  template <int H>
  static PALMETTE_INLINE void halves(V (&v)[L]) {
    constexpr auto kAll = std::make_integer_sequence<int, L>{};
#pragma GCC unroll 8
    for (int i = 0; i < H; ++i)
      v[i] = S::template blend_low<H>(v[i], v[i + H], kAll) + S::template blend_high<H>(v[i], v[i + H], kAll);
    if constexpr (H > 1) halves<H / 2>(v);
  }

  static void rows(const E* x, int64_t size, int64_t begin, int64_t end, float* out) {
    for (int64_t row = begin; row < end; row += L) {
      const int count = int(end - row < L ? end - row : L);
      V s[L], t[L];
      for (int i = 0; i < L; ++i) {
        s[i] = t[i] = S::zero();
        if (i < count) sums(x + (row + i) * size, size, s[i], t[i]);
      }
      const V total = gather_sums(s), weighted = gather_sums(t);
      V h = log2_approximate<L>(total) - weighted / total;
      h = S::select(total == S::zero(), S::zero(), h);
      const V infinite = S::splat(bit_float(kInfinity));
      h = S::select((V)((I)h & 0x7FFFFFFF) < infinite, h, infinite);
      S::store_n(out + row, h, count);
    }
  }

  static void worker(void* ctx, int64_t) {
    Work& work = *static_cast<Work*>(ctx);
    const TahParams& p = *work.p;
    const int64_t size =
        p.options.allocation == Allocation::token ? p.channels : int64_t{1} << p.options.tile_log2;
    work.each_chunk(
        [&](int64_t begin, int64_t end) { rows(static_cast<const E*>(p.x), size, begin, end, p.entropies); });
  }
};

// ---- bits of sections

PALMETTE_INLINE bool bit(const uint8_t* bits, int64_t i) { return bits[i >> 3] >> (i & 7) & 1; }

// Writes numbers of up to 56 bits, from the first bit of a byte on; ends with a whole byte.
struct BitWriter {
  uint8_t* to;
  uint64_t held = 0;
  int count = 0;

  PALMETTE_INLINE void put(uint64_t value, int bits) {
    held |= value << count;
    for (count += bits; count >= 8; count -= 8, held >>= 8) *to++ = uint8_t(held);
  }
  PALMETTE_INLINE void finish() {
    if (count > 0) *to++ = uint8_t(held);
  }
};
struct BitReader {
  const uint8_t* from;
  uint64_t held = 0;
  int count = 0;

  PALMETTE_INLINE uint32_t get(int bits) {
    for (; count < bits; count += 8) held |= uint64_t{*from++} << count;
    const auto value = uint32_t(held & ((uint64_t{1} << bits) - 1));
    held >>= bits;
    count -= bits;
    return value;
  }
};

// Which of a chunk's tiles have low_bits, one after the other.
struct LowBits {
  const uint8_t* bitmap;       // null: none
  int64_t per_row, row, left;  // tiles of a row; of this row still to come

  LowBits(const TahParams& p, int64_t first)
      : bitmap(p.options.allocation == Allocation::none ? nullptr : p.wire + p.layout.low),
        per_row(p.options.allocation == Allocation::token ? p.layout.tiles_per_token : 1),
        row(first / per_row),
        left(per_row) {}
  // A bit for each of the next `tiles`.
  PALMETTE_INLINE uint32_t next(int tiles) {
    if (bitmap == nullptr) return 0;
    uint32_t mask = 0;
    for (int i = 0; i < tiles;) {
      const int run = left < tiles - i ? int(left) : tiles - i;
      if (bit(bitmap, row)) mask |= ((uint32_t{1} << run) - 1) << i;
      i += run;
      left -= run;
      if (left == 0) {
        ++row;
        left = per_row;
      }
    }
    return mask;
  }
};

// ---- tiles of R vectors of W lanes

template <class E, int W, int R>
struct Tiles {
  using S = Simd<float, W>;
  using V = typename S::V;
  using I = typename S::I;
  static constexpr int G = W * R;
  static constexpr int kWords = G / 8;
  static constexpr auto kAll = std::make_integer_sequence<int, W>{};
  using Packed = Words<W / 2>;  // four vectors of codes

  struct Max {
    static PALMETTE_INLINE V of(V a, V b) { return S::max(a, b); }
  };
  struct Min {
    static PALMETTE_INLINE V of(V a, V b) { return S::min(a, b); }
  };
  // Lane i: of all lanes of v[i].
  template <class F, int H = W / 2>
  static PALMETTE_INLINE V across(V (&v)[W]) {
    if constexpr (H > 0) {
#pragma GCC unroll 8
      for (int i = 0; i < H; ++i)
        v[i] = F::of(S::template blend_low<H>(v[i], v[i + H], kAll),
                     S::template blend_high<H>(v[i], v[i + H], kAll));
      return across<F, H / 2>(v);
    }
    return v[0];
  }
  static PALMETTE_INLINE V magnitude(V x) { return (V)((I)x & 0x7FFFFFFF); }
  static PALMETTE_INLINE int count(I mask) { return __builtin_popcount(S::bits(mask)); }

  static PALMETTE_INLINE int first_equal(const float* tile, float wanted) {
    for (int r = 0; r < R; ++r) {
      const uint32_t same = S::bits(magnitude(S::load(tile + r * W)) == S::splat(wanted));
      if (same != 0) return r * W + __builtin_ctz(same);
    }
    return 0;
  }

  // Does no other element than the largest, `most`, exceed it when multiplied by the threshold?
  static PALMETTE_INLINE bool stands_out(const float* tile, float most, float threshold) {
    int above = 0;
    for (int r = 0; r < R; ++r) above += count(magnitude(S::load(tile + r * W)) * threshold > S::splat(most));
    return above - int(most * threshold > most) == 0;
  }

  static PALMETTE_INLINE void transform(V (&v)[R]) {
    fwht<float, W, R>(v);
    const V root = S::splat(inverse_root(log2_of(G)));
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) v[r] = v[r] * root;
  }

  struct Scratch {
    float wide[W][G];  // tiles of 16-bit elements
    float rotated[W][G];
    uint8_t codes[G < 64 ? 64 : G];
    uint8_t packed[(G < 64 ? 64 : G) + 8];
  };

  // Swaps, transforms and stores; the range of what comes out.
  static PALMETTE_INLINE void rotate(const float* tile, int pivot, float* to, V& least, V& most) {
    std::memcpy(to, tile, sizeof(float) * G);
    const float pulled = to[pivot];
    to[pivot] = to[0];
    to[0] = pulled;
    V v[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) v[r] = S::load(to + r * W);
    transform(v);
    least = most = v[0];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      S::store(to + r * W, v[r]);
      least = S::min(least, v[r]);
      most = S::max(most, v[r]);
    }
  }

  static void encode(const TahParams& p, Work& work, int64_t begin, int64_t end, Scratch& scratch) {
    const TahOptions& o = p.options;
    const int64_t first = begin * p.layout.tiles_per_token, last = end * p.layout.tiles_per_token;
    LowBits low_bits(p, first);
    const int64_t low_before = p.low_before == nullptr ? 0 : p.low_before[begin / p.chunk_tokens];
    uint8_t* codes = p.wire + p.layout.codes + TahLayout::code_bytes(o, low_before, first - low_before);
    const bool flagged = o.gate == Gate::ratio || o.gate == Gate::range;
    BitWriter fired{p.wire + p.layout.fired + first / 8};
    BitWriter pivots{p.wire + p.layout.pivots + first * o.tile_log2 / 8};
    uint8_t* metadata = p.wire + p.layout.metadata + first * (o.metadata == Metadata::fp16 ? 4 : 8);
    const typename Packed::Masks low_masks(o.low_bits), high_masks(o.high_bits);
    const float low_steps = float((1 << o.low_bits) - 1), high_steps = float((1 << o.high_bits) - 1);

    for (int64_t tile = first; tile < last; tile += W) {
      const int tiles = int(last - tile < W ? last - tile : W);
      const E* x = static_cast<const E*>(p.x) + tile * G;
      const float* source[W];
      V least[W], most[W], size[W];
      for (int i = tiles; i < W; ++i) least[i] = most[i] = size[i] = S::zero();
      for (int i = 0; i < tiles; ++i) {
        V lo = S::load(x + i * G), hi = lo, top = magnitude(lo);
        if constexpr (sizeof(E) != sizeof(float)) S::store(scratch.wide[i], lo);
#pragma GCC unroll 16
        for (int r = 1; r < R; ++r) {
          const V v = S::load(x + i * G + r * W);
          if constexpr (sizeof(E) != sizeof(float)) S::store(scratch.wide[i] + r * W, v);
          lo = S::min(lo, v);
          hi = S::max(hi, v);
          // as integers, so that a NaN is larger than all
          top = (V)S::max_int((I)magnitude(v), (I)top);
        }
        least[i] = lo;
        most[i] = hi;
        size[i] = top;
        if constexpr (sizeof(E) == sizeof(float)) {
          source[i] = reinterpret_cast<const float*>(x) + i * G;
        } else {
          source[i] = scratch.wide[i];
        }
      }

      V sizes[W];
      for (int i = 0; i < W; ++i) sizes[i] = size[i];
      const V top = across<MaxBits>(sizes);
      const I infinite = (I)top >= int32_t(kInfinity);
      int pivot[W];
      uint32_t fires = 0;
      V raw_least[W], raw_most[W];
      if (o.gate == Gate::range) {
        for (int i = 0; i < W; ++i) {
          raw_least[i] = least[i];
          raw_most[i] = most[i];
        }
      }
      if (o.gate != Gate::never) {
        for (int i = 0; i < tiles; ++i) {
          const float a = top[i];
          if (o.gate == Gate::ratio) {
            // no other lane's largest may exceed it either
            if (count(size[i] * p.threshold > S::splat(a)) > 1) continue;
            if (!stands_out(source[i], a, p.threshold)) continue;
          }
          fires |= uint32_t{1} << i;
          pivot[i] = first_equal(source[i], a);
          rotate(source[i], pivot[i], scratch.rotated[i], least[i], most[i]);
        }
      }
      V zero = across<Min>(least), high = across<Max>(most);
      if (o.gate == Gate::range) {
        const V raw_zero = across<Min>(raw_least), raw_high = across<Max>(raw_most);
        const I smaller = high - zero < raw_high - raw_zero;
        zero = S::select(smaller, zero, raw_zero);
        high = S::select(smaller, high, raw_high);
        fires &= S::bits(smaller);
      }
      zero += S::zero();  // -0 becomes 0
      V steps = S::splat(high_steps);
      const uint32_t low = low_bits.next(tiles);
      if (low != 0) {
        for (int i = 0; i < W; ++i) steps[i] = low >> i & 1 ? low_steps : high_steps;
      }
      V step = (high - zero) / steps;
      step = S::select(step < S::splat(kLeastStep), S::zero(), step);
      const V exact_zero = zero, exact_step = step;
      fp16 half_zero[W], half_step[W];
      if (o.metadata == Metadata::fp16) {
        const V units = step * kHalvesPerOne, magic = S::splat(12582912.0f);
        V whole = (units + magic) - magic;  // to the nearest, then up
        whole = S::select(whole < units, whole + 1.0f, whole);
        step = S::select(step < S::splat(kLeastHalf), whole * (1.0f / kHalvesPerOne), step);
        S::store(half_zero, zero);
        S::store(half_step, step);
        zero = S::load(half_zero);
        step = S::load(half_step);
      }
      const I fits =
          (magnitude(zero) < S::splat(bit_float(kInfinity))) & (step < S::splat(bit_float(kInfinity)));
      if (const I bad = infinite | ~fits; S::any(bad)) {
        for (int i = 0; i < tiles; ++i) {
          if (bad[i] != 0)
            return work.note(tile + i, infinite[i] != 0 ? WireStatus::not_finite : WireStatus::out_of_range);
        }
      }
      if (o.metadata == Metadata::fp16) {
        for (int i = 0; i < tiles; ++i) {
          std::memcpy(metadata + 4 * i, half_zero + i, 2);
          std::memcpy(metadata + 4 * i + 2, half_step + i, 2);
        }
        metadata += 4 * tiles;
      } else {
        for (int i = 0; i < tiles; ++i) {
          const float z = zero[i], s = step[i];
          std::memcpy(metadata + 8 * i, &z, 4);
          std::memcpy(metadata + 8 * i + 4, &s, 4);
        }
        metadata += 8 * tiles;
      }
      if (!p.rounded) {
        zero = exact_zero;
        step = exact_step;
      }
      const V inverse = S::select(step < S::splat(kLeastStep), S::zero(), 1.0f / step);

      if (flagged) fired.put(fires, tiles);
      if (o.gate != Gate::never) {
        for (int i = 0; i < tiles; ++i) pivots.put(fires >> i & 1 ? uint64_t(pivot[i]) : 0, o.tile_log2);
      }
      float zeros[W], inverses[W], tops[W];
      S::store(zeros, zero);
      S::store(inverses, inverse);
      S::store(tops, steps);
      for (int i = 0; i < tiles; ++i) {
        const int bits = low >> i & 1 ? o.low_bits : o.high_bits;
        const float* from = fires >> i & 1 ? scratch.rotated[i] : source[i];
        // what is written behind a tile is overwritten by the next one, but for a chunk's last
        const bool direct = G % 64 == 0 && tile + i + 1 < last;
        quantize(from, zeros[i], inverses[i], tops[i], low >> i & 1 ? low_masks : high_masks,
                 direct ? codes : scratch.packed, scratch.codes);
        if (!direct) put(scratch.packed, bits, codes);
        codes += kWords * bits;
      }
    }
    fired.finish();
    pivots.finish();
  }

  struct MaxBits {  // of non-negative numbers and NaN
    static PALMETTE_INLINE V of(V a, V b) { return (V)S::max_int((I)a, (I)b); }
  };

  static PALMETTE_INLINE void quantize(const float* tile, float zero, float inverse, float steps,
                                       const typename Packed::Masks& masks, uint8_t* to, uint8_t* codes) {
    const V z = S::splat(zero), f = S::splat(inverse), top = S::splat(steps);
    const V magic = S::splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest, ties to even
    I code[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      V c = (S::load(tile + r * W) - z) * f;
      c = S::min(S::max(c, S::zero()), top);
      code[r] = (I)(c + magic) - 0x4B400000;
    }
    if constexpr (R % 4 == 0) {
#pragma GCC unroll 4
      for (int r = 0; r < R; r += 4) {
        const auto w = Packed::together(join_bytes<W>(code + r), masks);
        Packed::store(w, masks.bits, to + r * W / 8 * masks.bits);
      }
    } else {
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) store_bytes<W>(codes + r * W, code[r]);
      pack_codes(codes, kWords, masks.bits, to);
    }
  }

  // Exactly kWords * bits bytes.
  static PALMETTE_INLINE void put(const uint8_t* packed, int bits, uint8_t* to) {
    if constexpr (G % 64 == 0) {
      for (int i = 0; i < kWords * bits; i += 8) std::memcpy(to + i, packed + i, 8);
    } else {
      for (int i = 0; i < kWords * bits; ++i) to[i] = packed[i];
    }
  }

  static void decode(const TahParams& p, int64_t begin, int64_t end, Scratch& scratch) {
    const TahOptions& o = p.options;
    const int64_t first = begin * p.layout.tiles_per_token, last = end * p.layout.tiles_per_token;
    LowBits low_bits(p, first);
    const int64_t low_before = p.low_before == nullptr ? 0 : p.low_before[begin / p.chunk_tokens];
    const uint8_t* codes = p.wire + p.layout.codes + TahLayout::code_bytes(o, low_before, first - low_before);
    const uint8_t* readable = p.wire + p.layout.end - (kWords < 8 ? 8 : kWords) * 8 - 8;
    BitReader pivots{p.wire + p.layout.pivots + first * o.tile_log2 / 8};
    const uint8_t* fired = p.wire + p.layout.fired;
    const bool flagged = o.gate == Gate::ratio || o.gate == Gate::range;
    for (int64_t tile = first; tile < last; tile += W) {
      const int tiles = int(last - tile < W ? last - tile : W);
      float metadata[2 * W] = {};
      if (o.metadata == Metadata::fp16) {
        fp16 halves[2 * W] = {};
        std::memcpy(halves, p.wire + p.layout.metadata + 4 * tile, size_t{4} * size_t(tiles));
        S::store(metadata, S::load(halves));
        S::store(metadata + W, S::load(halves + W));
      } else {
        std::memcpy(metadata, p.wire + p.layout.metadata + 8 * tile, size_t{8} * size_t(tiles));
      }
      const uint32_t low = low_bits.next(tiles);
      for (int i = 0; i < tiles; ++i) {
        const int bits = low >> i & 1 ? o.low_bits : o.high_bits;
        const uint8_t* from = codes;
        if (codes > readable) {  // whole vectors could reach beyond the wire
          std::memcpy(scratch.packed, codes, size_t{kWords} * size_t(bits));
          from = scratch.packed;
        }
        unpack_codes(from, kWords, bits, scratch.codes);
        codes += kWords * bits;
        const bool fires = flagged ? bit(fired, tile + i) : o.gate == Gate::always;
        const uint32_t pivot = o.gate == Gate::never ? 0 : pivots.get(o.tile_log2);
        const V zero = S::splat(metadata[2 * i]), step = S::splat(metadata[2 * i + 1]);
        E* out = static_cast<E*>(p.out) + (tile + i) * G;
        V v[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) v[r] = zero + load_bytes<W>(scratch.codes + r * W) * step;
        if (fires) transform(v);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) S::store(out + r * W, v[r]);
        if (fires) {
          const E pulled = out[pivot];
          out[pivot] = out[0];
          out[0] = pulled;
        }
      }
    }
  }

  static void encode_worker(void* ctx, int64_t) {
    Work& work = *static_cast<Work*>(ctx);
    Scratch scratch;
    std::memset(scratch.codes, 0, sizeof(scratch.codes));
    work.each_chunk([&](int64_t begin, int64_t end) { encode(*work.p, work, begin, end, scratch); });
  }
  static void decode_worker(void* ctx, int64_t) {
    Work& work = *static_cast<Work*>(ctx);
    Scratch scratch;
    std::memset(scratch.packed, 0, sizeof(scratch.packed));
    work.each_chunk([&](int64_t begin, int64_t end) { decode(*work.p, begin, end, scratch); });
  }
};

template <class E, int G>
using TilesOf =
    Tiles<E, (PALMETTE_LANES < G ? PALMETTE_LANES : G), G / (PALMETTE_LANES < G ? PALMETTE_LANES : G)>;

template <class E, class F>
void with_tile(int tile_log2, F&& f) {
  switch (tile_log2) {
    case 3:
      return f.template operator()<TilesOf<E, 8>>();
    case 4:
      return f.template operator()<TilesOf<E, 16>>();
    case 5:
      return f.template operator()<TilesOf<E, 32>>();
    case 6:
      return f.template operator()<TilesOf<E, 64>>();
    case 7:
      return f.template operator()<TilesOf<E, 128>>();
    default:
      return f.template operator()<TilesOf<E, 256>>();
  }
}

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

namespace body = PALMETTE_ISA_NS;

template <>
void tah_entropy<Isa::PALMETTE_ISA_NS>(const TahParams& p) {
  const bool by_token = p.options.allocation == Allocation::token;
  const int64_t size = by_token ? p.channels : int64_t{1} << p.options.tile_log2;
  const int64_t chunk = 16384 / (size > 0 ? size : 1) / 16 * 16;
  body::Work work(p, by_token ? p.layout.tokens : p.layout.tiles, chunk < 16 ? 16 : chunk);
  body::with_element(p.dtype, [&]<class E>() { work.run(&body::Entropy<E>::worker); });
}

template <>
void tah_encode<Isa::PALMETTE_ISA_NS>(const TahParams& p) {
  *p.fault = ~uint64_t{0};
  if (p.layout.tiles == 0) return;
  body::Work work(p, p.layout.tokens, p.chunk_tokens);
  body::with_element(p.dtype, [&]<class E>() {
    body::with_tile<E>(p.options.tile_log2, [&]<class T>() { work.run(&T::encode_worker); });
  });
  *p.fault = work.fault.load();
}

template <>
void tah_decode<Isa::PALMETTE_ISA_NS>(const TahParams& p) {
  if (p.layout.tiles == 0) return;
  body::Work work(p, p.layout.tokens, p.chunk_tokens);
  body::with_element(p.dtype, [&]<class E>() {
    body::with_tile<E>(p.options.tile_log2, [&]<class T>() { work.run(&T::decode_worker); });
  });
}

}  // namespace palmette
