// SPDX-License-Identifier: Apache-2.0
// CRC-32C (Castagnoli), reflected: by the instruction that x86 has for it since SSE4.2, otherwise by tables,
// eight bytes at a time.
#include "codec/params.h"
#include "cpu/vec.h"

#if defined(__SSE4_2__)
#include <nmmintrin.h>
#endif

namespace palmette::PALMETTE_ISA_NS {
namespace {

#if defined(__SSE4_2__)
uint32_t update(uint32_t state, const uint8_t* data, int64_t bytes) {
  uint64_t s = state;
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    s = _mm_crc32_u64(s, word);
  }
  auto rest = uint32_t(s);
  for (; bytes > 0; --bytes) rest = _mm_crc32_u8(rest, *data++);
  return rest;
}
#else
struct Tables {
  uint32_t after[8][256];  // the state after a byte and that many zero bytes

  constexpr Tables() : after() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t state = byte;
      for (int i = 0; i < 8; ++i) state = (state >> 1) ^ (state & 1 ? 0x82F63B78u : 0);
      after[0][byte] = state;
    }
    for (int k = 1; k < 8; ++k) {
      for (int byte = 0; byte < 256; ++byte)
        after[k][byte] = (after[k - 1][byte] >> 8) ^ after[0][after[k - 1][byte] & 0xFF];
    }
  }
};
constexpr Tables kTables;

uint32_t update(uint32_t state, const uint8_t* data, int64_t bytes) {
  for (; bytes >= 8; bytes -= 8, data += 8) {
    uint64_t word;
    std::memcpy(&word, data, 8);
    word ^= state;
    state = 0;
    for (int i = 0; i < 8; ++i) state ^= kTables.after[7 - i][word >> (8 * i) & 0xFF];
  }
  for (; bytes > 0; --bytes) state = (state >> 8) ^ kTables.after[0][(state ^ *data++) & 0xFF];
  return state;
}
#endif

}  // namespace
}  // namespace palmette::PALMETTE_ISA_NS

namespace palmette {

template <>
uint32_t crc32c<Isa::PALMETTE_ISA_NS>(uint32_t state, const uint8_t* data, int64_t bytes) {
  return PALMETTE_ISA_NS::update(state, data, bytes);
}

}  // namespace palmette
