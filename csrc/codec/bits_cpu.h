// SPDX-License-Identifier: Apache-2.0
// Codes of 2 to 8 bits between bytes and the wire: eight codes are `bits` bytes, the first in the lowest
// bits.
//
// A word of 64 bits holds eight codes as bytes. Three times, neighbours of 8, 16 and 32 bits move together
// (or apart), for several words at once; then the word's first `bits` bytes are its part of the wire.
#pragma once

#include "cpu/vec.h"

namespace palmette::PALMETTE_ISA_NS {

template <int kWords>
struct Words {
  typedef uint64_t U __attribute__((vector_size(8 * kWords)));

  static PALMETTE_INLINE U together(U w, int bits) {
    w = (w & 0x00FF00FF00FF00FFull) | ((w >> (8 - bits)) & (0x00FF00FF00FF00FFull << bits));
    w = (w & 0x0000FFFF0000FFFFull) | ((w >> (16 - 2 * bits)) & (0x0000FFFF0000FFFFull << 2 * bits));
    return (w & 0x00000000FFFFFFFFull) | ((w >> (32 - 4 * bits)) & (0x00000000FFFFFFFFull << 4 * bits));
  }
  static PALMETTE_INLINE U apart(U w, int bits) {
    const uint64_t four = (uint64_t{1} << 4 * bits) - 1;
    w = (w & four) | ((w & (four << 4 * bits)) << (32 - 4 * bits));
    const uint64_t two = ((uint64_t{1} << 2 * bits) - 1) * 0x0000000100000001ull;
    w = (w & two) | ((w & (two << 2 * bits)) << (16 - 2 * bits));
    const uint64_t one = ((uint64_t{1} << bits) - 1) * 0x0001000100010001ull;
    return (w & one) | ((w & (one << bits)) << (8 - bits));
  }
};

// Words that are moved together or apart at a time.
constexpr int kWordsAtATime = 8;

// 8 `words` codes -> `words` * bits bytes. `codes` may be read, and `to` written, to the next multiple of 64
// bytes and 8 bytes beyond the end.
PALMETTE_INLINE void pack_codes(const uint8_t* codes, int words, int bits, uint8_t* to) {
  using W = Words<kWordsAtATime>;
  for (int i = 0; i < words; i += kWordsAtATime) {
    typename W::U w;
    std::memcpy(&w, codes + 8 * i, sizeof(w));
    w = W::together(w, bits);
    if (bits == 4) {  // halves of words, as vectors
      typedef uint32_t Half __attribute__((vector_size(4 * kWordsAtATime)));
      const Half half = __builtin_convertvector(w, Half);
      std::memcpy(to + 4 * i, &half, sizeof(half));
      continue;
    }
    uint64_t word[kWordsAtATime];
    std::memcpy(word, &w, sizeof(w));
#pragma GCC unroll 8
    for (int j = 0; j < kWordsAtATime; ++j) std::memcpy(to + bits * (i + j), word + j, 8);
  }
}

// The other way round. `from` may be read to the next multiple of 8 words and 8 bytes beyond.
PALMETTE_INLINE void unpack_codes(const uint8_t* from, int words, int bits, uint8_t* codes) {
  using W = Words<kWordsAtATime>;
  for (int i = 0; i < words; i += kWordsAtATime) {
    typename W::U w;
    uint64_t word[kWordsAtATime];
#pragma GCC unroll 8
    for (int j = 0; j < kWordsAtATime; ++j) std::memcpy(word + j, from + bits * (i + j), 8);
    std::memcpy(&w, word, sizeof(w));
    w = W::apart(w, bits);
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

// R vectors of N lanes at once, as neighbours.
template <int N, int R>
PALMETTE_INLINE void store_bytes(uint8_t* to, const typename Simd<float, N>::I (&v)[R]) {
#if defined(__AVX2__)
  if constexpr (N == 8 && R % 4 == 0) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);  // packs interleaves the halves
#pragma GCC unroll 8
    for (int i = 0; i < R; i += 4) {
      const __m256i low = _mm256_packus_epi32((__m256i)v[i], (__m256i)v[i + 1]);
      const __m256i high = _mm256_packus_epi32((__m256i)v[i + 2], (__m256i)v[i + 3]);
      const __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(low, high), order);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8 * i), bytes);
    }
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i) store_bytes<N>(to + N * i, v[i]);
}

}  // namespace palmette::PALMETTE_ISA_NS
