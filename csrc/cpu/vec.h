// SPDX-License-Identifier: Apache-2.0
// The SIMD vocabulary of the CPU kernels.
//
// Simd<T, N> is a vector of N elements of T on the compiler's vector extension, so one kernel source
// becomes SSE/NEON (4 lanes), AVX2 (8) or AVX-512 (16) by choosing N; intrinsics appear only where the
// compiler does not find the instruction by itself. Everything lives in the namespace of the ISA body
// that is being compiled: an inline function with external linkage could otherwise be linked from the
// AVX-512 object into a program that runs on an AVX2 machine.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PALMETTE_LANES
#define PALMETTE_LANES 4
#endif
#ifndef PALMETTE_ISA_NS
#define PALMETTE_ISA_NS scalar
#endif

#define PALMETTE_INLINE inline __attribute__((always_inline))

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"  // vectors are never passed between translation units
#endif

namespace palmette::PALMETTE_ISA_NS {

// Storage formats of 16 bits; arithmetic is always done in float.
struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

PALMETTE_INLINE float bit_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
PALMETTE_INLINE uint32_t float_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

template <class T, int N>
struct Simd {
  static_assert(N > 0 && (N & (N - 1)) == 0, "the number of lanes must be a power of two");
  using Scalar = T;
  using Int = std::conditional_t<sizeof(T) == 8, int64_t, int32_t>;
  static constexpr int kLanes = N;
  typedef T V __attribute__((vector_size(sizeof(T) * N)));
  typedef Int I __attribute__((vector_size(sizeof(T) * N)));  // also the type of comparison masks: 0 or -1

  // ---- constants, loads, stores
  static PALMETTE_INLINE V splat(T x) { return x - V{}; }  // x - 0 is x, for -0 too, so no add is emitted
  static PALMETTE_INLINE I splat_int(Int x) { return I{} + x; }
  static PALMETTE_INLINE V zero() { return V{}; }
  static PALMETTE_INLINE V load(const T* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
  }
  static PALMETTE_INLINE I load_int(const Int* p) {
    I v;
    std::memcpy(&v, p, sizeof(I));
    return v;
  }
  static PALMETTE_INLINE void store(T* p, V v) { std::memcpy(p, &v, sizeof(V)); }
  static PALMETTE_INLINE void store_int(Int* p, I v) { std::memcpy(p, &v, sizeof(I)); }
  static PALMETTE_INLINE V load_n(const T* p, int n, T fill = T(0)) {
    V v = splat(fill);
    for (int i = 0; i < n; ++i) v[i] = p[i];
    return v;
  }
  static PALMETTE_INLINE void store_n(T* p, V v, int n) {
    for (int i = 0; i < n; ++i) p[i] = v[i];
  }

  // ---- arithmetic (a NaN in `a` of max / min survives: comparisons with NaN are false)
  static PALMETTE_INLINE V fma(V a, V b, V c) { return a * b + c; }
  // With a constant in b compilers make two instructions of what x86 has one for, NaN and all.
  static PALMETTE_INLINE V max(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return (V)_mm512_max_ps((__m512)b, (__m512)a);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return (V)_mm256_max_ps((__m256)b, (__m256)a);
#endif
    return b > a ? b : a;
  }
  static PALMETTE_INLINE V min(V a, V b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return (V)_mm512_min_ps((__m512)b, (__m512)a);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return (V)_mm256_min_ps((__m256)b, (__m256)a);
#endif
    return b < a ? b : a;
  }
  static PALMETTE_INLINE I max_int(I a, I b) {
#if defined(__AVX512F__)
    if constexpr (sizeof(I) == 64 && sizeof(T) == 4) return (I)_mm512_max_epi32((__m512i)a, (__m512i)b);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(I) == 32 && sizeof(T) == 4) return (I)_mm256_max_epi32((__m256i)a, (__m256i)b);
#endif
    return a > b ? a : b;
  }
  static PALMETTE_INLINE V select(I mask, V a, V b) { return mask ? a : b; }
  static PALMETTE_INLINE bool any(I mask) {
    Int r = 0;
    for (int i = 0; i < N; ++i) r |= mask[i];
    return r != 0;
  }

  // A bit per lane.
  static PALMETTE_INLINE uint32_t bits(I mask) {
#if defined(__AVX512DQ__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) return _mm512_movepi32_mask((__m512i)mask);
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(V) == 32 && sizeof(T) == 4) return uint32_t(_mm256_movemask_ps((__m256)mask));
#endif
    uint32_t r = 0;
    for (int i = 0; i < N; ++i) r |= uint32_t(mask[i] & 1) << i;
    return r;
  }

  // ---- reductions over lanes, in a fixed order
  static PALMETTE_INLINE T sum(V v) {
    T r[N];
    store(r, v);
    for (int n = N / 2; n > 0; n /= 2) {
      for (int i = 0; i < n; ++i) r[i] += r[i + n];
    }
    return r[0];
  }
  static PALMETTE_INLINE T max_lane(V v) {
    T r = v[0];
    for (int i = 1; i < N; ++i) r = v[i] > r ? v[i] : r;
    return r;
  }

  // ---- granules: P neighbouring elements treated as one
  // Loads P elements and repeats them over the vector: x0 .. xP-1 x0 .. xP-1 ...
  template <int P>
  static PALMETTE_INLINE V splat_granule(const T* p) {
    if constexpr (P == 1) {
      return splat(*p);
    } else if constexpr (P == N) {
      return load(p);
    } else if constexpr (P * sizeof(T) == 8) {
      double pair;  // not int64: the integer broadcast costs a change of domain
      std::memcpy(&pair, p, 8);
      typedef double W __attribute__((vector_size(sizeof(T) * N)));
      return (V)(pair - W{});
    } else {
#if defined(__AVX2__)
      if constexpr (P * sizeof(T) == 16 && N * sizeof(T) == 32) {
        return (V)_mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
      }
#endif
#if defined(__AVX512F__)
      if constexpr (P * sizeof(T) == 16 && N * sizeof(T) == 64) {
        return (V)_mm512_broadcast_f32x4(_mm_loadu_ps(reinterpret_cast<const float*>(p)));
      }
      if constexpr (P * sizeof(T) == 32 && N * sizeof(T) == 64) {
        return (V)_mm512_broadcast_f32x8(_mm256_loadu_ps(reinterpret_cast<const float*>(p)));
      }
#endif
      V v;
      for (int i = 0; i < N / P; ++i) std::memcpy(reinterpret_cast<T*>(&v) + i * P, p, P * sizeof(T));
      return v;
    }
  }

  template <int H, int... Is>
  static PALMETTE_INLINE V swap_impl(V v, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(v, v, (Is ^ H)...);
  }
  // Sums over the P lanes of each granule; every lane of the granule receives the sum.
  template <int P>
  static PALMETTE_INLINE V sum_granule(V v) {
    if constexpr (P > 1) v += swap_impl<1>(v, std::make_integer_sequence<int, N>{});
    if constexpr (P > 2) v += swap_impl<2>(v, std::make_integer_sequence<int, N>{});
    if constexpr (P > 4) v += swap_impl<4>(v, std::make_integer_sequence<int, N>{});
    if constexpr (P > 8) v += swap_impl<8>(v, std::make_integer_sequence<int, N>{});
    return v;
  }

  // Transposes in place the N/P x N/P matrix of granules held by N/P vectors (its own inverse):
  // log2(N/P) rounds, each exchanging the off-diagonal blocks of one size.
  template <int P>
  static PALMETTE_INLINE void transpose(V (&r)[N / P]) {
    if constexpr (N / P > 1) transpose_round<P, N / P / 2>(r);
  }
  template <int P, int H>
  static PALMETTE_INLINE void transpose_round(V (&r)[N / P]) {
#pragma GCC unroll 16
    for (int i = 0; i < N / P; ++i) {
      if (i & H) continue;
      V a = r[i], b = r[i + H];
      r[i] = blend_low<H * P>(a, b, std::make_integer_sequence<int, N>{});
      r[i + H] = blend_high<H * P>(a, b, std::make_integer_sequence<int, N>{});
    }
    if constexpr (H > 1) transpose_round<P, H / 2>(r);
  }
  template <int W, int... Is>
  static PALMETTE_INLINE V blend_low(V a, V b, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(a, b, ((Is & W) ? Is - W + N : Is)...);
  }
  template <int W, int... Is>
  static PALMETTE_INLINE V blend_high(V a, V b, std::integer_sequence<int, Is...>) {
    return __builtin_shufflevector(a, b, ((Is & W) ? Is + N : Is + W)...);
  }

  // ---- exponentials
  // 2^x = 2^n * 2^f with n = round(x), |f| <= 1/2. Below -126 the result is flushed to 0 (so -inf gives
  // exactly 0), from 127.5 on it is inf, NaN stays NaN.
  static PALMETTE_INLINE V exp2(V x) {
    if constexpr (sizeof(T) == 8) {
      V r;
      for (int i = 0; i < N; ++i) r[i] = std::exp2(x[i]);
      return r;
    } else {
      V c = max(x, splat(-127.0f));
      c = min(c, splat(128.0f));
      const V magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves round(x) in the low mantissa bits
      V t = c + magic;
      V f = c - (t - magic);
      return scale_by_power(exp2_fraction(f), (I)t);
    }
  }
  // e^x by Cody-Waite reduction: x - n ln2 is exact to well below an ulp over the whole range. 0 below -87.3,
  // inf from 88.4 on, NaN stays NaN.
  static PALMETTE_INLINE V exp(V x) {
    if constexpr (sizeof(T) == 8) {
      V r;
      for (int i = 0; i < N; ++i) r[i] = std::exp(x[i]);
      return r;
    } else {
      V c = max(x, splat(-88.0f));
      c = min(c, splat(88.8f));
      const V magic = splat(12582912.0f);
      V t = c * 1.44269504088896341f + magic;
      V n = t - magic;
      V r = c - n * 0.693359375f;  // ln2 in two pieces; the first has 9 bits, so n * ln2_hi is exact
      r = r - n * -2.12194440e-4f;
      V p = splat(1.98756915e-4f);
      p = p * r + 1.39819995e-3f;
      p = p * r + 8.33345186e-3f;
      p = p * r + 4.16657962e-2f;
      p = p * r + 1.66666654e-1f;
      p = p * r + 5.00000000e-1f;
      p = p * (r * r) + r + 1.0f;
      V y = scale_by_power(p, (I)t);
      return select(x <= splat(-88.0f), zero(), y);
    }
  }

  // Logarithms: x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)) (polynomial: Cephes, logf and log2f). For
  // x normal, 0 (-inf), inf or NaN; log of a negative number is not asked for.
  static PALMETTE_INLINE V log(V x) { return logarithm<false>(x); }
  static PALMETTE_INLINE V log2(V x) { return logarithm<true>(x); }

  // tanh: an odd polynomial where 1 - 2 / (e^2x + 1) would cancel (coefficients: Cephes, tanhf).
  static PALMETTE_INLINE V tanh(V x) {
    if constexpr (sizeof(T) == 8) {
      V r;
      for (int i = 0; i < N; ++i) r[i] = std::tanh(x[i]);
      return r;
    } else {
      V a = max(x, -x), y = x * x;
      V small = splat(-5.70498872745e-3f);
      small = small * y + 2.06390887954e-2f;
      small = small * y - 5.37397155531e-2f;
      small = small * y + 1.33314422036e-1f;
      small = small * y - 3.33332819422e-1f;
      small = small * y * x + x;
      V big = 1.0f - 2.0f / (exp(min(a + a, splat(40.0f))) + 1.0f);
      big = select(x < zero(), -big, big);
      return select(a < splat(0.625f), small, big);
    }
  }

  // ---- 16-bit formats
  static PALMETTE_INLINE V load(const bf16* p) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
      const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
      return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    }
#endif
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4 && N % 8 == 0) {
      V v;
      for (int i = 0; i < N; i += 8) {
        __m256i w = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
        w = _mm256_slli_epi32(w, 16);
        std::memcpy(reinterpret_cast<T*>(&v) + i, &w, 32);
      }
      return v;
    }
#endif
    V v;
    for (int i = 0; i < N; ++i) v[i] = to_scalar(p[i]);
    return v;
  }
  static PALMETTE_INLINE V load(const fp16* p) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
      return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
#endif
#if defined(__F16C__)
    if constexpr (sizeof(T) == 4 && N % 8 == 0) {
      V v;
      for (int i = 0; i < N; i += 8) {
        __m256 w = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
        std::memcpy(reinterpret_cast<T*>(&v) + i, &w, 32);
      }
      return v;
    }
#endif
    V v;
    for (int i = 0; i < N; ++i) v[i] = T(half_to_float(p[i].bits));
    return v;
  }
  static PALMETTE_INLINE void store(bf16* p, V v) {  // round to nearest even; NaN stays a (quiet) NaN
#if defined(__AVX2__)
    if constexpr (sizeof(T) == 4 && N % 8 == 0) {
      typedef uint32_t U __attribute__((vector_size(4 * N)));
      const U u = (U)v;
      const U even = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
      const U bits = (u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : even;
#if defined(__AVX512F__)
      if constexpr (sizeof(V) == 64) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)bits));
        return;
      }
#endif
      for (int i = 0; i < N; i += 8) {
        __m128i low, high;
        std::memcpy(&low, reinterpret_cast<const uint32_t*>(&bits) + i, 16);
        std::memcpy(&high, reinterpret_cast<const uint32_t*>(&bits) + i + 4, 16);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm_packus_epi32(low, high));
      }
      return;
    }
#endif
    for (int i = 0; i < N; ++i) p[i].bits = float_to_bf16(float(v[i]));
  }
  static PALMETTE_INLINE void store(fp16* p, V v) {
#if defined(__AVX512F__)
    if constexpr (sizeof(V) == 64 && sizeof(T) == 4) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                          _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
      return;
    }
#endif
#if defined(__F16C__)
    if constexpr (sizeof(T) == 4 && N % 8 == 0) {
      for (int i = 0; i < N; i += 8) {
        __m256 w;
        std::memcpy(&w, reinterpret_cast<T*>(&v) + i, 32);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i), _mm256_cvtps_ph(w, _MM_FROUND_TO_NEAREST_INT));
      }
      return;
    }
#endif
    for (int i = 0; i < N; ++i) p[i].bits = float_to_half(float(v[i]));
  }
  template <class E>
  static PALMETTE_INLINE V load_n(const E* p, int n) {
    V v = zero();
    for (int i = 0; i < n; ++i) v[i] = to_scalar(p[i]);
    return v;
  }
  template <class E>
  static PALMETTE_INLINE void store_n(E* p, V v, int n) {
    for (int i = 0; i < n; ++i) from_scalar(p[i], v[i]);
  }

  // ---- one element at a time
  static PALMETTE_INLINE T to_scalar(T x) { return x; }
  static PALMETTE_INLINE T to_scalar(bf16 x) { return T(bit_float(uint32_t(x.bits) << 16)); }
  static PALMETTE_INLINE T to_scalar(fp16 x) { return T(half_to_float(x.bits)); }
  static PALMETTE_INLINE void from_scalar(T& d, T x) { d = x; }
  static PALMETTE_INLINE void from_scalar(bf16& d, T x) { d.bits = float_to_bf16(float(x)); }
  static PALMETTE_INLINE void from_scalar(fp16& d, T x) { d.bits = float_to_half(float(x)); }

  static PALMETTE_INLINE uint16_t float_to_bf16(float f) {
    uint32_t u = float_bits(f);
    uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return uint16_t((u & 0x7FFFFFFFu) > 0x7F800000u ? (u >> 16) | 0x40u : rounded);
  }
  // Shifting the half's exponent and mantissa into place leaves a float that is 2^112 too small, for
  // normal and denormal halves alike; inf and NaN need their exponent completed.
  static PALMETTE_INLINE float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000u) << 16, em = uint32_t(h & 0x7FFFu) << 13;
    float f = bit_float(em) * bit_float(0x77800000u);  // 2^112
    if (em >= 0x0F800000u) f = bit_float(em | 0x7F800000u);
    return bit_float(float_bits(f) | sign);
  }
  static PALMETTE_INLINE uint16_t float_to_half(float f) {
    uint32_t u = float_bits(f), sign = (u >> 16) & 0x8000u;
    u &= 0x7FFFFFFFu;
    if (u > 0x7F800000u) return uint16_t(sign | 0x7E00u | ((u >> 13) & 0x3FFu));
    if (u >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // 65520 and more round to inf
    if (u < 0x38800000u) {                                  // denormal half: let the float adder round
      float d = bit_float(u) + 0.5f;
      return uint16_t(sign | (float_bits(d) - 0x3F000000u));
    }
    u += 0xC8000FFFu + ((u >> 13) & 1u);
    return uint16_t(sign | (u >> 13));
  }

 private:
  // 2^f on [-1/2, 1/2] (coefficients: Cephes, exp2f). exp2 as a whole is off by at most 0.93 ulp with fused
  // multiply-adds, 1.17 without.
  static PALMETTE_INLINE V exp2_fraction(V f) {
    V p = splat(T(1.5353362e-4f));
    p = p * f + T(1.3398874e-3f);
    p = p * f + T(9.6184373e-3f);
    p = p * f + T(5.5503324e-2f);
    p = p * f + T(2.4022648e-1f);
    p = p * f + T(6.9314720e-1f);
    return p * f + T(1);
  }
  template <bool kBase2>
  static PALMETTE_INLINE V logarithm(V x) {
    if constexpr (sizeof(T) == 8) {
      V r;
      for (int i = 0; i < N; ++i) r[i] = kBase2 ? std::log2(x[i]) : std::log(x[i]);
      return r;
    } else {
      const I root = splat_int(0x3F3504F3);  // sqrt(1/2)
      const I exponent = ((I)x - root) >> 23;
      const V n = __builtin_convertvector(exponent, V);
      const V f = (V)((I)x - (exponent << 23)) - T(1);
      V p = splat(T(7.0376836292e-2f));
      p = p * f - T(1.1514610310e-1f);
      p = p * f + T(1.1676998740e-1f);
      p = p * f - T(1.2420140846e-1f);
      p = p * f + T(1.4249322787e-1f);
      p = p * f - T(1.6668057665e-1f);
      p = p * f + T(2.0000714765e-1f);
      p = p * f - T(2.4999993993e-1f);
      p = p * f + T(3.3333331174e-1f);
      const V rest = p * f * (f * f) - T(0.5) * (f * f);  // log(1 + f) - f
      V y;
      if constexpr (kBase2) {
        y = rest * T(0.44269504088896341f) + f * T(0.44269504088896341f) + rest + f + n;  // log2(e) - 1
      } else {
        y = rest - n * T(2.12194440e-4f) + f + n * T(0.693359375f);  // ln 2 in two parts
      }
      y = select(x == zero(), splat(-T(INFINITY)), y);
      return select(x < splat(T(INFINITY)), y, x);  // inf and NaN as they are
    }
  }
  // y * 2^n, where the low bits of t hold n: two halves keep every intermediate a normal number.
  static PALMETTE_INLINE V scale_by_power(V y, I t) {
    I n = t << 23;  // the bits above the exponent fall off
    return (V)((I)splat(1.0f) + n) * y;
  }
};

template <class T>
using Native = Simd<T, PALMETTE_LANES>;

PALMETTE_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

}  // namespace palmette::PALMETTE_ISA_NS
