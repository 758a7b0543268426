// SPDX-License-Identifier: Apache-2.0
// tah_encode and tah_decode: checks, which tokens get fewer bits, and the choice of the body. The equations
// are in kernel_tah_cpu.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>
#include <vector>

#include "codec/params.h"
#include "codec/wire_host.h"
#include "core/backend.h"
#include "core/checks.h"
#include "core/gpu.h"
#include "core/parallel.h"

namespace palmette {
namespace {

constexpr int64_t kChunkElements = 1 << 15;

// Tokens that one worker takes at a time.
int64_t chunk_of(int64_t channels) {
  const int64_t tokens = kChunkElements / std::max<int64_t>(channels, 1) / kChunkTokens * kChunkTokens;
  return std::max(tokens, kChunkTokens);
}

// Order-preserving bits of a float that is not NaN.
uint32_t ordered(float key) {
  const auto bits = std::bit_cast<uint32_t>(key);
  return (bits & 0x80000000u) != 0 ? ~bits : bits | 0x80000000u;
}

// Sets the bits of the `low_count` rows of each sample with the smallest keys, of equal ones the first.
struct Selection {
  const float* keys;
  int64_t batch, rows, low_count;
  std::vector<uint8_t> low{};  // [batch * rows]: a byte each, as samples need not begin with a byte of bits
  std::atomic<int64_t> next{0};

  void run() {
    low.assign(static_cast<size_t>(batch * rows), 0);
    if (low_count == 0 || low.empty()) return;
    run_workers(
        std::min(batch, num_workers()),
        [](void* ctx, int64_t) {
          auto& s = *static_cast<Selection*>(ctx);
          std::vector<uint64_t> order(static_cast<size_t>(s.rows));
          for (int64_t b; (b = s.next.fetch_add(1)) < s.batch;) s.select(b, order);
        },
        this);
  }
  void select(int64_t sample, std::vector<uint64_t>& order) {
    for (int64_t i = 0; i < rows; ++i)
      order[static_cast<size_t>(i)] =
          uint64_t{ordered(keys[sample * rows + i])} << 32 | static_cast<uint64_t>(i);
    std::nth_element(order.begin(), order.begin() + (low_count - 1), order.end());
    for (int64_t i = 0; i < low_count; ++i)
      low[static_cast<size_t>(sample * rows +
                              static_cast<int64_t>(order[static_cast<size_t>(i)] & 0xFFFFFFFF))] = 1;
  }
  void write(uint8_t* bitmap) const {
    for (size_t i = 0; i < low.size(); i += 8) {
      unsigned byte = 0;
      for (size_t j = 0; j < 8 && i + j < low.size(); ++j) byte |= unsigned{low[i + j]} << j;
      bitmap[i / 8] = static_cast<uint8_t>(byte);
    }
  }
};

// How many of bits [begin, end) are set; begin is a multiple of 8.
int64_t ones(const uint8_t* bits, int64_t begin, int64_t end) {
  int64_t count = 0, i = begin;
  for (; i + 64 <= end; i += 64) {
    uint64_t word = 0;
    std::memcpy(&word, bits + i / 8, 8);
    count += std::popcount(word);
  }
  for (; i < end; ++i) count += bits[i / 8] >> (i % 8) & 1;
  return count;
}

// Tiles of low_bits before each chunk.
std::vector<int64_t> low_before(const TahParams& p) {
  if (p.options.allocation == Allocation::none) return {};
  const bool by_token = p.options.allocation == Allocation::token;
  const int64_t tiles = by_token ? p.layout.tiles_per_token : 1,
                rows = by_token ? 1 : p.layout.tiles_per_token;
  std::vector<int64_t> before;
  int64_t count = 0;
  for (int64_t token = 0; token < p.layout.tokens; token += p.chunk_tokens) {
    before.push_back(count);
    const int64_t end = std::min(token + p.chunk_tokens, p.layout.tokens);
    count += tiles * ones(p.wire + p.layout.low, token * rows, end * rows);
  }
  return before;
}

void check_bits(int64_t low_bits, int64_t high_bits) {
  require(high_bits >= 2 && high_bits <= 8, "high_bits", "in [2, 8]", high_bits);
  require(low_bits >= 2 && low_bits <= high_bits, "low_bits", text("in [2, high_bits = ", high_bits, "]"),
          low_bits);
}

int64_t batch_of(const Tensor& x) {
  int64_t batch = 1;
  for (int64_t i = 0; i + 2 < x.dim(); ++i) batch *= x.size(i);
  return batch;
}

[[noreturn]] void throw_fault(const TahParams& p, const Tensor& x, uint64_t fault) {
  const int64_t size = int64_t{1} << p.options.tile_log2, begin = static_cast<int64_t>(fault / 16) * size;
  if (static_cast<WireStatus>(fault % 16) == WireStatus::not_finite)
    throw_not_finite(x, begin, size, 1, nullptr);
  const int64_t token = begin / p.channels, channel = begin % p.channels;
  require(false, "metadata",
          p.options.metadata == Metadata::fp16 ? "fp32 where a tile's range is beyond 65504"
                                               : "of tiles whose range is below 3.4e38",
          p.options.metadata == Metadata::fp16 ? "fp16" : "fp32", " for the tile of token ", token % p.length,
          " of sample ", token / p.length, " at channel ", channel);
  throw std::runtime_error("");  // not reached
}

// ---- on a GPU, without waiting for it

// A count for each word of the bitmap, which has one bit per row.
Tensor ones_before(const Tensor& like, int64_t rows) {
  return torch::stable::new_empty(like, {rows / 32 + 4}, ScalarType::Long);
}

void encode_on_gpu(GpuLaunch& gpu, TahParams p, const WireHeader& header, const Tensor& given, Tensor& wire) {
  const TahLayout& l = p.layout;
  const Tensor x = aligned(given);
  Tensor to = aligned(wire);
  const bool by_token = p.options.allocation == Allocation::token;
  const int64_t rows = p.options.allocation == Allocation::none ? 0 : by_token ? l.tokens : l.tiles;
  require(rows < int64_t{1} << 31, "x", "of fewer than 2^31 tiles on a GPU", rows);
  Tensor entropies = torch::stable::new_empty(x, {p.low_count > 0 ? rows : 0}, ScalarType::Float);
  Tensor before = ones_before(x, rows);
  p.x = x.const_data_ptr();
  p.wire = static_cast<uint8_t*>(to.mutable_data_ptr());
  p.entropies = static_cast<float*>(entropies.mutable_data_ptr());
  p.ones_before = static_cast<int64_t*>(before.mutable_data_ptr());
  WireParams w = wire_to_begin(to, header, {l.fired, l.pivots, l.metadata, l.codes, l.end});
  w.cleared = l.fired > l.low ? reinterpret_cast<uint32_t*>(p.wire + l.low) : nullptr;
  w.num_cleared = (l.fired - l.low) / 4;
  gpu.reads(x, "x");
  gpu.writes(to, "wire");
  gpu.writes(entropies, "entropies");
  gpu.writes(before, "ones_before");
  gpu.run("tah_encode", TahLaunch{p, w});
  copy_back(wire, to);
  if (!wire.is_cpu()) return;
  if (const uint64_t fault = take_fault(wire); fault != ~uint64_t{0}) throw_fault(p, given, fault);
}

void decode_on_gpu(GpuLaunch& gpu, TahParams p, const Tensor& wire, const Tensor& out) {
  Tensor from = aligned(wire), to = aligned(out);
  const int64_t d = out.dim();
  p.length = out.size(d - 2);
  p.channels = out.size(d - 1);
  p.batch = batch_of(out);
  WireParams w = wire_params(from);
  Tensor sums = torch::stable::new_empty(from, {wire_blocks(w)}, ScalarType::Int);
  // which rows the wire has is not known here: tokens, or tiles of 8 at the least
  Tensor before = ones_before(from, std::max(out.numel() / 8, p.batch * p.length));
  w.sums = static_cast<uint32_t*>(sums.mutable_data_ptr());
  w.kind = WireKind::tah;
  w.elements = out.numel();
  w.length = p.length;
  w.channels = p.channels;
  w.ones_before = p.ones_before = static_cast<int64_t*>(before.mutable_data_ptr());
  p.wire = w.wire;
  p.out = to.mutable_data_ptr();
  gpu.writes(from, "wire");
  gpu.writes(to, "out");
  gpu.writes(sums, "sums");
  gpu.writes(before, "ones_before");
  gpu.run("tah_decode", TahLaunch{p, w});
  copy_back(wire, from);
  copy_back(out, to);
}

void tah_encode_op(Tensor x, int64_t tile_size, int64_t low_bits, int64_t high_bits, int64_t low_count,
                   double threshold, int64_t allocation, int64_t gate, int64_t metadata, bool rounded,
                   Tensor wire) {
  TahParams p{};
  check_device(x, "x");
  require(x.dim() >= 2, "x", "[..., S, C]", shape_text(x));
  check_dtype(x, "x", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  p.dtype = check_element(x, "x", false);
  require(tile_size >= 8 && tile_size <= 256 && std::has_single_bit(static_cast<uint64_t>(tile_size)),
          "tile_size", "a power of two in [8, 256]", tile_size);
  check_bits(low_bits, high_bits);
  require(allocation >= 0 && allocation <= 2, "allocation", "in [0, 2]", allocation);
  require(gate >= 0 && gate <= 3, "gate", "in [0, 3]", gate);
  require(metadata == 0 || metadata == 1, "metadata", "0 or 1", metadata);
  require(threshold >= 1, "threshold", "at least 1", threshold);
  p.batch = batch_of(x);
  p.length = x.size(x.dim() - 2);
  p.channels = x.size(x.dim() - 1);
  require(p.channels % tile_size == 0, "tile_size", text("a divisor of the ", p.channels, " channels of x"),
          tile_size);
  p.options = {std::countr_zero(static_cast<uint64_t>(tile_size)),
               static_cast<int>(low_bits),
               static_cast<int>(high_bits),
               static_cast<Allocation>(allocation),
               static_cast<Gate>(gate),
               static_cast<Metadata>(metadata)};
  const bool by_token = p.options.allocation == Allocation::token;
  const int64_t rows = by_token ? p.length : p.length * (p.channels / tile_size);
  require(low_count >= 0 && low_count <= rows && (allocation != 0 || low_count == 0), "low_count",
          text("in [0, ", rows, "]"), low_count);
  require(rows < (int64_t{1} << 32), "x", "samples of fewer than 2^32 tiles", rows);
  p.low_count = low_count;
  p.layout = TahLayout::of(p.options, p.batch, p.length, p.channels, low_count);
  p.rounded = rounded;
  p.threshold = static_cast<float>(threshold);
  check_device(wire, "wire", x, "x");
  check_dtype(wire, "wire", {ScalarType::Byte});
  check_shape(wire, "wire", "[wire_size]", {p.layout.end});
  check_contiguous(wire, "wire");
  x = torch::stable::contiguous(x);
  p.x = x.const_data_ptr();
  p.wire = static_cast<uint8_t*>(wire.mutable_data_ptr());

  WireHeader header{};
  header.kind = static_cast<uint8_t>(WireKind::tah);
  header.tile_log2 = static_cast<uint8_t>(p.options.tile_log2);
  header.low_bits = static_cast<uint8_t>(low_bits);
  header.high_bits = static_cast<uint8_t>(high_bits);
  header.allocation = static_cast<uint8_t>(allocation);
  header.gate = static_cast<uint8_t>(gate);
  header.metadata = static_cast<uint8_t>(metadata);
  header.low_count = static_cast<uint32_t>(low_count);
  header.sizes[0] = static_cast<uint64_t>(p.batch);
  header.sizes[1] = static_cast<uint64_t>(p.length);
  header.sizes[2] = static_cast<uint64_t>(p.channels);

  const TahLayout& l = p.layout;
  if (GpuLaunch gpu(x); gpu) return encode_on_gpu(gpu, p, header, x, wire);
  const int64_t ends[] = {l.low, l.fired, l.pivots, l.metadata, l.codes, l.end};
  // a section's last 16 bytes, at most: what it does not fill stays 0
  for (int i = 1; i < 6; ++i) clear(p.wire, std::max(ends[i - 1], ends[i] - kSectionAlignment), ends[i]);
  std::vector<float> entropies;
  if (low_count > 0) {
    entropies.resize(static_cast<size_t>(p.batch * rows));
    p.entropies = entropies.data();
    dispatch_isa([&]<Isa isa>() { tah_entropy<isa>(p); });
  }
  if (p.options.allocation != Allocation::none) {
    Selection selection{entropies.data(), p.batch, rows, low_count};
    selection.run();
    selection.write(p.wire + l.low);
  }
  p.chunk_tokens = chunk_of(p.channels);
  const std::vector<int64_t> before = low_before(p);
  p.low_before = before.empty() ? nullptr : before.data();
  uint64_t fault = 0;
  p.fault = &fault;
  dispatch_isa([&]<Isa isa>() { tah_encode<isa>(p); });
  if (fault != ~uint64_t{0}) {
    clear(p.wire, 0, kHeaderBytes);  // nobody shall take it for a wire
    throw_fault(p, x, fault);
  }
  finish_wire(p.wire, header, l.end);
}

void tah_decode_op(const Tensor& wire, const Tensor& out) {
  check_device(out, "out", wire, "wire");
  check_dtype(out, "out", {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  check_contiguous(out, "out");
  require(out.dim() >= 2, "shape", "[..., S, C]", shape_text(out));
  TahParams p{};
  p.dtype = check_element(out, "out", false);
  GpuLaunch gpu(wire);
  if (!wire.is_cpu()) {
    check_wire_tensor(wire);
    return decode_on_gpu(gpu, p, wire, out);
  }
  const WireHeader h = check_wire(wire, WireKind::tah, "tah_encode");
  check_sizes(h, out, "shape");
  p.options = {h.tile_log2,
               h.low_bits,
               h.high_bits,
               static_cast<Allocation>(h.allocation),
               static_cast<Gate>(h.gate),
               static_cast<Metadata>(h.metadata)};
  p.batch = static_cast<int64_t>(h.sizes[0]);
  p.length = static_cast<int64_t>(h.sizes[1]);
  p.channels = static_cast<int64_t>(h.sizes[2]);
  p.low_count = h.low_count;
  const bool by_token = p.options.allocation == Allocation::token;
  const int64_t rows = by_token ? p.length : p.length * (p.channels >> h.tile_log2);
  require(p.low_count <= (p.options.allocation == Allocation::none ? 0 : rows), "wire",
          text("of at most ", rows, " rows of low_bits"), p.low_count);
  p.layout = TahLayout::of(p.options, p.batch, p.length, p.channels, p.low_count);
  require(p.layout.end == wire.numel(), "wire", text(p.layout.end, " bytes for its options"), wire.numel());
  p.wire = const_cast<uint8_t*>(static_cast<const uint8_t*>(wire.const_data_ptr()));  // only a GPU writes
  if (p.options.allocation != Allocation::none) {
    // codes are found by counting: the counts must be what the sizes were made for
    const int64_t all = p.batch * rows, found = ones(p.wire + p.layout.low, 0, all);
    require(found == p.batch * p.low_count, "wire", text("of ", p.batch * p.low_count, " rows of low_bits"),
            found);
  }
  if (gpu) return decode_on_gpu(gpu, p, wire, out);
  p.chunk_tokens = chunk_of(p.channels);
  const std::vector<int64_t> before = low_before(p);
  p.low_before = before.empty() ? nullptr : before.data();
  p.out = out.mutable_data_ptr();
  dispatch_isa([&]<Isa isa>() { tah_decode<isa>(p); });
}

template <class Library>
void implement(Library& m) {
  m.impl("tah_encode", TORCH_BOX(&tah_encode_op));
  m.impl("tah_decode", TORCH_BOX(&tah_decode_op));
}

}  // namespace
}  // namespace palmette

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { palmette::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { palmette::implement(m); }
