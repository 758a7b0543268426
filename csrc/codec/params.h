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
  float* entropies;           // [batch, length], or Allocation::tile: [tiles]
  int64_t chunk_tokens;       // CPU: a multiple of kChunkTokens
  const int64_t* low_before;  // CPU: [chunks], tiles of low_bits before each
  uint64_t* fault;            // CPU: the first tile at fault * 16 + WireStatus, ~0 if there is none
  int64_t* ones_before;       // a GPU: [words of the bitmap], rows of low_bits before each
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

// A GPU: how a wire begins and ends, and whether it may be decoded.
struct WireParams {
  uint8_t* wire;
  int64_t bytes;
  // the checksum
  int64_t rows_per_group;  // of 512 bytes, by a group of 32 lanes
  uint32_t powers[40];     // x^(8 * 2^k) modulo the polynomial
  uint32_t* sums;          // check: [wire_blocks()], what each block found
  // begin
  WireHeader header;
  int64_t section_ends[6];  // the last is the wire's
  uint32_t* cleared;        // [num_cleared]: counted up, or or-ed, later on
  int64_t num_cleared;
  // check
  WireKind kind;
  int64_t elements, length, channels;  // of the result; the last two for WireKind::tah
  int64_t cuts[64];  // fixpoint, delta: 1 and the products of the result's first sizes, without repetition;
                     // then 0
  int64_t* ones_before;  // tah: as TahParams has it
};

// What the launchers of a GPU's library take.
struct TahLaunch {
  TahParams tah;
  WireParams wire;
};
struct FixpointLaunch {
  FixpointParams fixpoint;
  WireParams wire;
};

// Blocks that look at a wire for its checksum.
constexpr int64_t kWireRow = 512, kWireGroups = 8;
inline int64_t wire_blocks(const WireParams& p) {
  const int64_t rows = (p.bytes - (kHeaderBytes - kChecksummedHeaderBytes) + kWireRow - 1) / kWireRow;
  const int64_t per_block = p.rows_per_group * kWireGroups;
  return (rows + per_block - 1) / per_block;
}

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
__attribute__((visibility("hidden"))) uint32_t crc32c(uint32_t state, const uint8_t* data, int64_t bytes);

}  // namespace palmette
