// SPDX-License-Identifier: Apache-2.0
// Numbers that every backend computes with alike. Products and sums are rounded one by one, never fused: so
// all write the same bytes (docs/wire_format.md, "Arithmetic").
#pragma once

#include <cstdint>

#include "codec/wire.h"

namespace palmette {

// log2(1 + f) / f for sqrt(1/2) <= 1 + f < sqrt(2); times f it is off by 2.2e-6.
constexpr float kLog2[6] = {1.4427134990692139f,  -0.7211318612098694f, 0.4793480336666107f,
                            -0.3674899935722351f, 0.3221547603607178f,  -0.2065916359424591f};
constexpr int32_t kSqrtHalf = 0x3F3504F3;
// Running sums of an entropy: element i is added to number i % 32; then halves are added.
constexpr int kEntropySums = 32;
// Steps below are taken for 0: their inverses could overflow.
constexpr float kLeastStep = 1.17549435e-38f;
// Steps and magnitudes that fp16 holds with less than its 11 bits are rounded up to a multiple of its
// smallest number: rounded down, or to 0, they would cut off what they are to cover.
constexpr float kLeastHalf = 6.103515625e-5f, kHalvesPerOne = 16777216.0f;  // 2^-14, 2^24
constexpr float kMostHalf = 65504.0f;
constexpr uint32_t kInfinity = 0x7F800000u;

// 1 / sqrt(2^k), rounded to float.
PALMETTE_ANYWHERE constexpr float inverse_root(int log2) {
  const float power = 1.0f / static_cast<float>(1 << log2 / 2);
  return log2 % 2 == 0 ? power : power * 0.70710678118654752440f;
}

// ---- CRC-32C: polynomials modulo Castagnoli's, reflected, so bit 31 is x^0

constexpr uint32_t kPolynomial = 0x82F63B78;

PALMETTE_ANYWHERE constexpr uint32_t crc_multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 0; i < 32; ++i) {
    product = (product >> 1) ^ (kPolynomial & (0u - (product & 1u)));
    product ^= a & (0u - (b >> i & 1u));
  }
  return product;
}

// x^(8 bytes): what a state is multiplied with when so many zero bytes follow.
PALMETTE_ANYWHERE constexpr uint32_t crc_power(int64_t bytes) {
  uint32_t result = 0x80000000u, square = 0x00800000u;  // 1, x^8
  for (; bytes > 0; bytes >>= 1) {
    if ((bytes & 1) != 0) result = crc_multiply(result, square);
    square = crc_multiply(square, square);
  }
  return result;
}

}  // namespace palmette
