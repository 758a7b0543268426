// SPDX-License-Identifier: Apache-2.0
// Numbers that every backend computes with alike. Products and sums are rounded one by one, never fused: so
// all write the same bytes (docs/wire_format.md, "Arithmetic").
#pragma once

#include <cstdint>

namespace palmette {

// log2(1 + f) / f for sqrt(1/2) <= 1 + f < sqrt(2); times f it is off by 2.2e-6.
constexpr float kLog2[6] = {1.4427134990692139f,  -0.7211318612098694f, 0.4793480336666107f,
                            -0.3674899935722351f, 0.3221547603607178f,  -0.2065916359424591f};
constexpr int32_t kSqrtHalf = 0x3F3504F3;
// Running sums of an entropy: element i is added to number i % 32; then halves are added.
constexpr int kEntropySums = 32;
// Steps below are taken for 0: their inverses could overflow.
constexpr float kLeastStep = 1.17549435e-38f;
constexpr uint32_t kInfinity = 0x7F800000u;

// 1 / sqrt(2^k), rounded to float.
constexpr float inverse_root(int log2) {
  const float power = 1.0f / static_cast<float>(1 << log2 / 2);
  return log2 % 2 == 0 ? power : power * 0.70710678118654752440f;
}

}  // namespace palmette
