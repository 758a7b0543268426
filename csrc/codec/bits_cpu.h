// SPDX-License-Identifier: Apache-2.0
// Codes of 2 to 8 bits between bytes and the wire: eight codes are `bits` bytes, the first in the lowest
// bits.
//
// A word of 64 bits holds eight codes as bytes. Three times, neighbours of 8, 16 and 32 bits move together
// (or apart), for several words at once; then the word's first `bits` bytes are its part of the wire.
#pragma once

#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {

// T is uint64_t: vectors of a type that is no parameter are not seen as dependent by GCC.
template <int kWords, class T = uint64_t>
struct Words {
  typedef T U __attribute__((vector_size(8 * kWords)));

  // What moving takes for one number of bits, made once for many words.
  struct Masks {
    int bits;
    U one, two, four;  // of a code, of two that are together, and of four; the first of each pair

    explicit PALMETTE_INLINE Masks(int n)
        : bits(n),
          one(U{} + ((T{1} << n) - 1) * T{0x0001000100010001}),
          two(U{} + ((T{1} << 2 * n) - 1) * T{0x0000000100000001}),
          four(U{} + ((T{1} << 4 * n) - 1)) {}
  };

  static PALMETTE_INLINE U together(U w, const Masks& m) {
    const int n = m.bits;
    w = (w & m.one) | ((w >> (8 - n)) & (m.one << n));
    w = (w & m.two) | ((w >> (16 - 2 * n)) & (m.two << 2 * n));
    return (w & m.four) | ((w >> (32 - 4 * n)) & (m.four << 4 * n));
  }
  static PALMETTE_INLINE U apart(U w, const Masks& m) {
    const int n = m.bits;
    w = (w & m.four) | ((w << (32 - 4 * n)) & (m.four << 32));
    w = (w & m.two) | ((w << (16 - 2 * n)) & (m.two << 16));
    return (w & m.one) | ((w << (8 - n)) & (m.one << 8));
  }
  // `bits` bytes of each word, one after the other. Up to 8 bytes more may be written.
  static PALMETTE_INLINE void store(U w, int bits, uint8_t* to) {
    if (bits == 4) {  // halves of words, as vectors
      typedef std::conditional_t<sizeof(T) == 8, uint32_t, T> Half __attribute__((vector_size(4 * kWords)));
      const Half half = __builtin_convertvector(w, Half);
      std::memcpy(to, &half, sizeof(half));
      return;
    }
    if (bits == 8) return (void)std::memcpy(to, &w, sizeof(w));
#pragma GCC unroll 8
    for (int j = 0; j < kWords; ++j) {
      const uint64_t word = w[j];
      std::memcpy(to + bits * j, &word, 8);
    }
  }
  // The other way round; what else is in the words does not matter to apart(). Up to 8 bytes more are read.
  static PALMETTE_INLINE U load(const uint8_t* from, int bits) {
    if (bits == 4) {
      typedef std::conditional_t<sizeof(T) == 8, uint32_t, T> Half __attribute__((vector_size(4 * kWords)));
      Half half;
      std::memcpy(&half, from, sizeof(half));
      return __builtin_convertvector(half, U);
    }
    U w{};
#pragma GCC unroll 8
    for (int j = 0; j < kWords; ++j) {
      uint64_t word;
      std::memcpy(&word, from + bits * j, 8);
      w[j] = word;
    }
    return w;
  }
};

// Words that are moved at a time: four vectors of codes, one byte each.
constexpr int kWordsAtATime = PALMETTE_LANES / 2;

// 8 `words` codes -> `words` * bits bytes. `codes` may be read, and `to` written, to the next multiple of 64
// bytes and 8 bytes beyond the end.
PALMETTE_INLINE void pack_codes(const uint8_t* codes, int words, int bits, uint8_t* to) {
  using W = Words<kWordsAtATime>;
  const W::Masks masks(bits);
  for (int i = 0; i < words; i += kWordsAtATime) {
    typename W::U w;
    std::memcpy(&w, codes + 8 * i, sizeof(w));
    W::store(W::together(w, masks), bits, to + bits * i);
  }
}

// The other way round. `from` may be read to the next multiple of 8 words and 8 bytes beyond.
PALMETTE_INLINE void unpack_codes(const uint8_t* from, int words, int bits, uint8_t* codes) {
  using W = Words<kWordsAtATime>;
  const W::Masks masks(bits);
  for (int i = 0; i < words; i += kWordsAtATime) {
    const typename W::U w = W::apart(W::load(from + bits * i, bits), masks);
    std::memcpy(codes + 8 * i, &w, sizeof(w));
  }
}

// Small whole vectors to bytes: n elements of [0, 255].
template <int N>
PALMETTE_INLINE void store_bytes(uint8_t* to, typename Simd<float, N>::I v) {
  typedef uint8_t B __attribute__((vector_size(N)));
  const B b = __builtin_convertvector(v, B);
  std::memcpy(to, &b, N);
}
template <int N>
PALMETTE_INLINE typename Simd<float, N>::V load_bytes(const uint8_t* from) {
  using S = Simd<float, N>;
#if defined(__AVX512F__)
  if constexpr (N == 16)
    return (typename S::V)_mm512_cvtepi32_ps(
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
#if defined(__AVX2__)
  if constexpr (N == 8)
    return (typename S::V)_mm256_cvtepi32_ps(
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))));
#endif
  typedef uint8_t B __attribute__((vector_size(N)));
  B b;
  std::memcpy(&b, from, N);
  return __builtin_convertvector(__builtin_convertvector(b, typename S::I), typename S::V);
}

// Four vectors of N small numbers as N / 2 words, in registers.
template <int N>
PALMETTE_INLINE typename Words<N / 2>::U join_bytes(const typename Simd<float, N>::I* v) {
  using U = typename Words<N / 2>::U;
#if defined(__AVX512BW__)
  if constexpr (N == 16) {
    __m512i bytes = _mm512_castsi128_si512(_mm512_cvtepi32_epi8((__m512i)v[0]));
    bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8((__m512i)v[1]), 1);
    bytes = _mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8((__m512i)v[2]), 2);
    return (U)_mm512_inserti32x4(bytes, _mm512_cvtepi32_epi8((__m512i)v[3]), 3);
  }
#endif
#if defined(__AVX2__)
  if constexpr (N == 8) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs interleaves the halves
    const __m256i low = _mm256_packus_epi32((__m256i)v[0], (__m256i)v[1]);
    const __m256i high = _mm256_packus_epi32((__m256i)v[2], (__m256i)v[3]);
    return (U)_mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
  }
#endif
  uint8_t bytes[4 * N];
  for (int i = 0; i < 4; ++i) store_bytes<N>(bytes + N * i, v[i]);
  U w;
  std::memcpy(&w, bytes, sizeof(w));
  return w;
}

}  // namespace palmette::PALMETTE_ISA_NS
