// SPDX-License-Identifier: Apache-2.0
// The contract between the operators of csrc/codec and the kernels. Tensors are contiguous.
#pragma once

#include <cstdint>

#include "codec/wire.h"
#include "core/isa.h"

namespace palmette {

// out = scale x H^T, or scale x H, by rows; out may be x.
struct HadamardParams {
  const void* x;          // E [rows, size]
  void* out;              // E [rows, size]
  int64_t rows, size;     // size = base * 2^k
  int32_t base;           // 1, 12, 20 or 28
  uint32_t negative[28];  // bit b of word a: is element (a, b) of the small matrix to be applied -1?
  DType dtype;
  double scale;
};

// Tokens are dealt out in chunks whose bits are whole bytes in every section.
constexpr int64_t kChunkTokens = 8;  // or a multiple

struct TahParams {
  TahOptions options;
  TahLayout layout;
  int64_t batch, length, channels, low_count;
  DType dtype;                // of x, or of out
  bool rounded;               // codes refer to rounded metadata
  float threshold;            // of Gate::ratio
  const void* x;              // E [batch, length, channels]: encode
  void* out;                  // E [batch, length, channels]: decode
  uint8_t* wire;              // [layout.end]
  float* entropies;           // [batch, length], or a GPU's and Allocation::tile: [tiles]
  int64_t chunk_tokens;       // CPU: a multiple of kChunkTokens
  const int64_t* low_before;  // CPU: [chunks], tiles of low_bits before each
  uint64_t* fault;            // CPU: the first tile at fault * 16 + WireStatus, ~0 if there is none
};

struct FixpointParams {
  FixpointLayout layout;
  WireKind kind;
  Grid grid;
  int32_t bits;
  DType dtype;                    // of x, or of out
  DType message_dtype;            // of m
  int64_t outer, inner, columns;  // P, R, Q
  const void* x;                  // E [P, R, Q]: encode
  void* out;                      // E [P, R, Q]: decode, fixpoint
  void* m;                        // M [P, R, Q]: delta, updated
  uint8_t* wire;                  // [layout.end]
  uint32_t* magnitudes;           // CPU: [workers, scales], bits of the largest |x| so far; a GPU: [scales]
  float* steps;                   // CPU: [2, scales], steps and their inverses
  uint64_t* fault;                // CPU: the first slice at fault * 16 + WireStatus, ~0 if there is none
};

template <Isa isa>
void hadamard_transform(const HadamardParams& p);

// Entropies of tokens or tiles.
template <Isa isa>
void tah_entropy(const TahParams& p);
// All sections but the bitmap of low_bits, which is there.
template <Isa isa>
void tah_encode(const TahParams& p);
template <Isa isa>
void tah_decode(const TahParams& p);

// Absmax of each slice, to the wire and as steps.
template <Isa isa>
void fixpoint_scales(const FixpointParams& p);
template <Isa isa>
void fixpoint_encode(const FixpointParams& p);
template <Isa isa>
void fixpoint_decode(const FixpointParams& p);

// CRC-32C without its inversions: the state after `bytes` more bytes.
template <Isa isa>
uint32_t crc32c(uint32_t state, const uint8_t* data, int64_t bytes);

}  // namespace palmette
