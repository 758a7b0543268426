// SPDX-License-Identifier: Apache-2.0
// The wire of the codecs: a header, then sections, each padded with zeros to 16 bytes. docs/wire_format.md
// describes it; this header is shared by operators and kernels and needs no torch.
#pragma once

#include <bit>
#include <cstdint>

// Where nvcc compiles for both sides.
#if defined(__CUDACC__) || defined(__HIPCC__)
#define PALMETTE_ANYWHERE __host__ __device__
#else
#define PALMETTE_ANYWHERE
#endif

namespace palmette {

static_assert(std::endian::native == std::endian::little,
              "the wire is the memory of a little-endian machine");

constexpr uint32_t kWireMagic = 0x544D4C50;  // "PLMT"
constexpr uint8_t kWireVersion = 1;
constexpr int64_t kSectionAlignment = 16;

enum class WireKind : uint8_t { none = 0, tah = 1, fixpoint = 2, delta = 3 };
enum class Allocation : uint8_t { none, token, tile };
enum class Gate : uint8_t { never, ratio, range, always };
enum class Metadata : uint8_t { fp16, fp32 };
enum class Grid : uint8_t { ac_sgd, full_range };

// What is wrong with a wire, or with what was to be written to it. GPUs leave it in the header.
enum class WireStatus : uint32_t {
  ok,
  not_finite,    // an element of x; `position` is that of its tile, or of its column
  out_of_range,  // a tile's or a slice's metadata does not fit
  cut,           // shorter than a header
  magic,
  version,
  kind,
  option,
  shape,
  size,
  checksum,
  low_count,
};

// Tile size, allocation, gate and metadata belong to WireKind::tah; of the others, grid is in `allocation`.
struct WireHeader {
  uint32_t magic;
  uint8_t version;
  uint8_t kind;
  uint8_t tile_log2;
  uint8_t low_bits, high_bits;  // fixpoint, delta: both are the bits
  uint8_t allocation;
  uint8_t gate;
  uint8_t metadata;
  uint32_t low_count;   // tokens or tiles of each sample that have low_bits
  uint64_t sizes[3];    // tah: samples, tokens, channels; fixpoint, delta: [P, R, Q]
  uint64_t wire_bytes;  // of the whole wire
  uint32_t checksum;    // CRC-32C of all bytes but the 16 from here on
  uint32_t status;      // WireStatus, by a GPU
  uint64_t position;    // of what `status` is about
};
constexpr int64_t kHeaderBytes = 64;
constexpr int64_t kChecksummedHeaderBytes = 48;
static_assert(sizeof(WireHeader) == kHeaderBytes);

PALMETTE_ANYWHERE constexpr int64_t padded(int64_t bytes) {
  return (bytes + kSectionAlignment - 1) / kSectionAlignment * kSectionAlignment;
}
PALMETTE_ANYWHERE constexpr int64_t bytes_of_bits(int64_t bits) { return (bits + 7) / 8; }

struct TahOptions {
  int tile_log2, low_bits, high_bits;
  Allocation allocation;
  Gate gate;
  Metadata metadata;
};

// Where the sections begin, in bytes from the header's first.
struct TahLayout {
  int64_t tokens, tiles, tiles_per_token;
  int64_t low, fired, pivots, metadata, codes, end;

  PALMETTE_ANYWHERE static constexpr TahLayout of(const TahOptions& o, int64_t batch, int64_t length,
                                                  int64_t channels, int64_t low_count) {
    TahLayout l{};
    l.tiles_per_token = channels >> o.tile_log2;
    l.tokens = batch * length;
    l.tiles = l.tokens * l.tiles_per_token;
    const bool by_token = o.allocation == Allocation::token;
    const int64_t bitmap = o.allocation == Allocation::none ? 0 : by_token ? l.tokens : l.tiles;
    const int64_t low_tiles = batch * low_count * (by_token ? l.tiles_per_token : 1);
    const bool flagged = o.gate == Gate::ratio || o.gate == Gate::range;
    l.low = kHeaderBytes;
    l.fired = l.low + padded(bytes_of_bits(bitmap));
    l.pivots = l.fired + padded(flagged ? bytes_of_bits(l.tiles) : 0);
    l.metadata = l.pivots + padded(o.gate == Gate::never ? 0 : bytes_of_bits(l.tiles * o.tile_log2));
    l.codes = l.metadata + padded(l.tiles * (o.metadata == Metadata::fp16 ? 4 : 8));
    l.end = l.codes + padded(code_bytes(o, low_tiles, l.tiles - low_tiles));
    return l;
  }
  PALMETTE_ANYWHERE static constexpr int64_t code_bytes(const TahOptions& o, int64_t low_tiles,
                                                        int64_t high_tiles) {
    return (low_tiles * o.low_bits + high_tiles * o.high_bits) << (o.tile_log2 - 3);
  }
};

struct FixpointLayout {
  int64_t elements, scales;  // how many
  int64_t absmax, codes, end;

  PALMETTE_ANYWHERE static constexpr FixpointLayout of(int bits, int64_t outer, int64_t inner,
                                                       int64_t columns) {
    FixpointLayout l{};
    l.elements = outer * inner * columns;
    l.scales = outer * columns;
    l.absmax = kHeaderBytes;
    l.codes = l.absmax + padded(2 * l.scales);
    l.end = l.codes + padded(bytes_of_bits(l.elements * bits));
    return l;
  }
};

}  // namespace palmette
