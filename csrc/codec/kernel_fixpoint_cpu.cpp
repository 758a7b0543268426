// SPDX-License-Identifier: Apache-2.0
// Fixed point with one scale per slice, and deltas (AQ-SGD, arXiv 2206.01299). x is [P, R, Q]; slice (p, q)
// has
//
//     m = max_r |x|, as fp16      step = m / 2^(bits-1)  or  m / (2^(bits-1) - 1)
//     level = round(x / step), between the least and the greatest     code = level + 2^(bits-1)
//
// A delta's x is x - m, and m gets level * step added: by both sides, so that they stay the same.
//
// First the magnitudes: rows with columns in the lanes, one list of maxima per worker. Then elements in the
// order of memory, some thousand at a time, through a buffer of codes as bytes.
#include "codec/arithmetic.h"
#include "codec/bits_cpu.h"
#include "codec/params.h"
#include "cpu/chunks.h"
#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {
namespace {

using S = Native<float>;
using V = S::V;
using I = S::I;
constexpr int L = S::kLanes;
constexpr int64_t kChunk = 4096;  // elements, a multiple of 64

using Work = Chunks<FixpointParams>;

// What is encoded: x, or x - m.
template <class E, class M>
struct Source {
  const E* x;
  const M* m;  // null: x alone

  PALMETTE_INLINE V load(int64_t i) const {
    const V v = S::load(x + i);
    return m == nullptr ? v : v - S::load(m + i);
  }
  PALMETTE_INLINE V load_n(int64_t i, int n) const {
    const V v = S::load_n(x + i, n);
    return m == nullptr ? v : v - S::load_n(m + i, n);
  }
};

PALMETTE_INLINE I magnitude(V x) { return (I)x & 0x7FFFFFFF; }
PALMETTE_INLINE uint32_t max_lane(I v) {
  int32_t most = v[0];
  for (int i = 1; i < L; ++i) most = v[i] > most ? v[i] : most;
  return uint32_t(most);
}

template <class E, class M>
void magnitudes_worker(void* ctx, int64_t worker) {
  Work& work = *static_cast<Work*>(ctx);
  const FixpointParams& p = *work.p;
  const Source<E, M> source{static_cast<const E*>(p.x), static_cast<const M*>(p.m)};
  uint32_t* most = p.magnitudes + worker * p.layout.scales;
  work.each_chunk([&](int64_t begin, int64_t end) {  // of rows [P * R]
    for (int64_t row = begin; row < end;) {
      uint32_t* slice = most + row / p.inner * p.columns;
      if (p.columns == 1) {
        const int64_t slice_end = (row / p.inner + 1) * p.inner, stop = slice_end < end ? slice_end : end;
        I top[4] = {};
        int64_t i = row;
        for (; i + 4 * L <= stop; i += 4 * L) {
#pragma GCC unroll 4
          for (int k = 0; k < 4; ++k) top[k] = S::max_int(magnitude(source.load(i + k * L)), top[k]);
        }
        for (; i < stop; i += L)
          top[0] = S::max_int(magnitude(source.load_n(i, int(stop - i < L ? stop - i : L))), top[0]);
        const uint32_t found = max_lane(S::max_int(S::max_int(top[0], top[1]), S::max_int(top[2], top[3])));
        if (found > *slice) *slice = found;
        row = stop;
        continue;
      }
      int64_t q = 0;
      for (; q + L <= p.columns; q += L) {
        int32_t* to = reinterpret_cast<int32_t*>(slice) + q;
        S::store_int(to, S::max_int(magnitude(source.load(row * p.columns + q)), S::load_int(to)));
      }
      if (q < p.columns) {
        const int left = int(p.columns - q);
        const I top = magnitude(source.load_n(row * p.columns + q, left));
        for (int i = 0; i < left; ++i) {
          if (uint32_t(top[i]) > slice[q + i]) slice[q + i] = uint32_t(top[i]);
        }
      }
      ++row;
    }
  });
}

// Steps and their inverses of the magnitudes in the wire.
void find_steps(const FixpointParams& p) {
  const auto* absmax = reinterpret_cast<const fp16*>(p.wire + p.layout.absmax);
  const auto half = float(1 << (p.bits - 1));
  const bool full = p.grid == Grid::full_range;
  for (int64_t i = 0; i < p.layout.scales; i += L) {
    const int n = int(p.layout.scales - i < L ? p.layout.scales - i : L);
    const V top = S::load_n(absmax + i, n);
    const V step = full ? top / (half - 1.0f) : top * (1.0f / half);
    const V inverse = S::select(step < S::splat(kLeastStep), S::zero(), 1.0f / step);
    S::store_n(p.steps + i, step, n);
    S::store_n(p.steps + p.layout.scales + i, inverse, n);
  }
}

// f(first element, how many, their slice's number, does every element have the same?) for the runs of
// [begin, end) that lie in one slice, or in one row.
template <class F>
PALMETTE_INLINE void each_run(const FixpointParams& p, int64_t begin, int64_t end, F&& f) {
  const bool whole = p.columns == 1;
  const int64_t length = whole ? p.inner : p.columns;
  for (int64_t i = begin; i < end;) {
    const int64_t run = i / length, stop = (run + 1) * length < end ? (run + 1) * length : end;
    f(i, stop - i, whole ? run : run / p.inner * p.columns + i % length, whole);
    i = stop;
  }
}

// What m becomes: within its dtype's range, whatever a delta's rounding adds.
template <class M>
PALMETTE_INLINE V moved(V m, V by) {
  const V sum = m + by;
  if constexpr (std::is_same_v<M, fp16>)
    return S::min(S::max(sum, S::splat(-kMostHalf)), S::splat(kMostHalf));
  else
    return sum;
}

template <class E, class M>
struct Codes {
  struct Levels {
    V half, least, most;
    explicit Levels(const FixpointParams& p)
        : half(S::splat(float(1 << (p.bits - 1)))),
          least(p.grid == Grid::full_range ? 1.0f - half : -half),
          most(half - 1.0f) {}
  };

  static PALMETTE_INLINE V level_of(V x, V inverse, const Levels& levels) {
    const V magic = S::splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest, ties to even
    const V clamped = S::min(S::max(x * inverse, levels.least), levels.most);
    return (clamped + magic) - magic;
  }

  static void encode_worker(void* ctx, int64_t) {
    Work& work = *static_cast<Work*>(ctx);
    const FixpointParams& p = *work.p;
    const Source<E, M> source{static_cast<const E*>(p.x), static_cast<const M*>(p.m)};
    const Levels levels(p);
    const float *steps = p.steps, *inverses = p.steps + p.layout.scales;
    uint8_t codes[kChunk + 64] = {}, packed[kChunk + 8];
    work.each_chunk([&](int64_t begin, int64_t end) {
      each_run(p, begin, end, [&](int64_t first, int64_t count, int64_t slice, bool whole) {
        auto* m = static_cast<M*>(p.m);
        for (int64_t i = 0; i < count; i += L) {
          const int64_t at = first + i, s = whole ? slice : slice + i;
          uint8_t* to = codes + (at - begin);
          if (i + L <= count) {
            const V inverse = whole ? S::splat(inverses[s]) : S::load(inverses + s);
            const V level = level_of(source.load(at), inverse, levels);
            store_bytes<L>(to, __builtin_convertvector(level + levels.half, I));
            if (m == nullptr) continue;
            const V step = whole ? S::splat(steps[s]) : S::load(steps + s);
            S::store(m + at, moved<M>(S::load(m + at), level * step));
          } else {
            const int n = int(count - i);
            const V inverse = whole ? S::splat(inverses[s]) : S::load_n(inverses + s, n);
            const V level = level_of(source.load_n(at, n), inverse, levels);
            for (int k = 0; k < n; ++k) to[k] = uint8_t(level[k] + levels.half[k]);
            if (m == nullptr) continue;
            const V step = whole ? S::splat(steps[s]) : S::load_n(steps + s, n);
            S::store_n(m + at, moved<M>(S::load_n(m + at, n), level * step), n);
          }
        }
      });
      const int64_t count = end - begin;
      std::memset(codes + count, 0, size_t(-count & 63));
      pack_codes(codes, int((count + 7) / 8), p.bits, packed);
      std::memcpy(p.wire + p.layout.codes + begin / 8 * p.bits, packed, size_t((count * p.bits + 7) / 8));
    });
  }

  static void decode_worker(void* ctx, int64_t) {
    Work& work = *static_cast<Work*>(ctx);
    const FixpointParams& p = *work.p;
    const Levels levels(p);
    uint8_t codes[kChunk + 64], packed[kChunk + 8] = {};
    work.each_chunk([&](int64_t begin, int64_t end) {
      const int64_t elements = end - begin;
      std::memcpy(packed, p.wire + p.layout.codes + begin / 8 * p.bits, size_t((elements * p.bits + 7) / 8));
      unpack_codes(packed, int((elements + 7) / 8), p.bits, codes);
      each_run(p, begin, end, [&](int64_t first, int64_t count, int64_t slice, bool whole) {
        auto* out = static_cast<E*>(p.out);
        auto* m = static_cast<M*>(p.m);
        for (int64_t i = 0; i < count; i += L) {
          const int64_t at = first + i, s = whole ? slice : slice + i;
          const int n = int(count - i < L ? count - i : L);
          V level = load_bytes<L>(codes + (at - begin)) - levels.half;
          if (n == L) {
            const V value = level * (whole ? S::splat(p.steps[s]) : S::load(p.steps + s));
            if (m == nullptr)
              S::store(out + at, value);
            else
              S::store(m + at, moved<M>(S::load(m + at), value));
          } else {
            const V value = level * (whole ? S::splat(p.steps[s]) : S::load_n(p.steps + s, n));
            if (m == nullptr)
              S::store_n(out + at, value, n);
            else
              S::store_n(m + at, moved<M>(S::load_n(m + at, n), value), n);
          }
        }
      });
    });
  }
};

template <class F>
void with_elements(const FixpointParams& p, F&& f) {
  with_element(p.dtype, [&]<class E>() {
    if (p.m == nullptr) return f.template operator()<E, float>();
    with_element(p.message_dtype, [&]<class M>() { f.template operator()<E, M>(); });
  });
}

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

namespace body = PALMETTE_ISA_NS;

template <>
void fixpoint_scales<Isa::PALMETTE_ISA_NS>(const FixpointParams& p) {
  const int64_t scales = p.layout.scales, row = p.columns > 0 ? p.columns : 1, chunk = 16384 / row;
  body::Work work{&p, p.outer * p.inner, chunk < 1 ? 1 : chunk};
  body::with_elements(p, [&]<class E, class M>() { work.run(&body::magnitudes_worker<E, M>); });
  const int64_t workers = num_workers();
  for (int64_t i = 0; i < scales; ++i) {
    uint32_t most = p.magnitudes[i];
    for (int64_t w = 1; w < workers; ++w) {
      const uint32_t other = p.magnitudes[w * scales + i];
      most = other > most ? other : most;
    }
    body::fp16 half;
    float size = body::bit_float(most);
    if (size < kLeastHalf) {
      const float units = size * kHalvesPerOne, whole = float(int(units));
      size = (whole < units ? whole + 1.0f : whole) * (1.0f / kHalvesPerOne);
    }
    body::S::from_scalar(half, size);
    const bool finite = most < kInfinity;
    if (!finite || half.bits >= 0x7C00) {
      *p.fault = uint64_t(i) * 16 + uint64_t(finite ? WireStatus::out_of_range : WireStatus::not_finite);
      return;
    }
    std::memcpy(p.wire + p.layout.absmax + 2 * i, &half, 2);
  }
}

template <>
void fixpoint_encode<Isa::PALMETTE_ISA_NS>(const FixpointParams& p) {
  body::find_steps(p);
  body::Work work{&p, p.layout.elements, body::kChunk};
  body::with_elements(p, [&]<class E, class M>() { work.run(&body::Codes<E, M>::encode_worker); });
}

template <>
void fixpoint_decode<Isa::PALMETTE_ISA_NS>(const FixpointParams& p) {
  body::find_steps(p);
  body::Work work{&p, p.layout.elements, body::kChunk};
  body::with_elements(p, [&]<class E, class M>() { work.run(&body::Codes<E, M>::decode_worker); });
}

}  // namespace palmette
