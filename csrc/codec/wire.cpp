// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "codec/params.h"
#include "codec/wire_host.h"
#include "core/backend.h"
#include "core/parallel.h"

namespace palmette {
namespace {

constexpr uint32_t kPolynomial = 0x82F63B78;  // Castagnoli's, reflected
constexpr int64_t kSegment = 1 << 16;         // bytes that one thread takes at a time

// a * b modulo the polynomial; bit 31 is x^0.
uint32_t multiply(uint32_t a, uint32_t b) {
  uint32_t product = 0;
  for (int i = 31; i >= 0; --i) {
    product = (product >> 1) ^ ((product & 1) != 0 ? kPolynomial : 0);
    if ((b >> (31 - i) & 1) != 0) product ^= a;
  }
  return product;
}

// x^(8 bytes): what a state is multiplied with when so many zero bytes follow.
uint32_t power(int64_t bytes) {
  uint32_t result = 0x80000000u, square = 0x00800000u;  // 1, x^8
  for (; bytes > 0; bytes >>= 1) {
    if ((bytes & 1) != 0) result = multiply(result, square);
    square = multiply(square, square);
  }
  return result;
}

struct Segments {
  const uint8_t* data;
  int64_t bytes;
  std::vector<uint32_t> states;
};

template <Isa isa>
void segment_worker(void* ctx, int64_t worker) {
  auto& s = *static_cast<Segments*>(ctx);
  const auto count = static_cast<int64_t>(s.states.size()), workers = std::min(count, num_workers());
  for (int64_t i = count * worker / workers; i < count * (worker + 1) / workers; ++i) {
    const int64_t begin = i * kSegment;
    s.states[static_cast<size_t>(i)] = crc32c<isa>(0, s.data + begin, std::min(kSegment, s.bytes - begin));
  }
}

const char* option_fault(const WireHeader& h, WireKind kind) {
  const auto bits = [](int b) { return b >= 2 && b <= 8; };
  if (!bits(h.low_bits) || !bits(h.high_bits)) return "bits";
  if (kind != WireKind::tah) return h.allocation > static_cast<int>(Grid::full_range) ? "grid" : nullptr;
  if (h.tile_log2 < 3 || h.tile_log2 > 8) return "tile size";
  if (h.allocation > static_cast<int>(Allocation::tile)) return "allocation";
  if (h.gate > static_cast<int>(Gate::always)) return "gate";
  if (h.metadata > static_cast<int>(Metadata::fp32)) return "metadata";
  return nullptr;
}

const char* kind_text(int kind) {
  switch (static_cast<WireKind>(kind)) {
    case WireKind::tah:
      return "tah_encode";
    case WireKind::fixpoint:
      return "fixpoint_encode";
    case WireKind::delta:
      return "delta_encode_";
  }
  return "nobody";
}

double element(const Tensor& t, int64_t i) {
  switch (t.scalar_type()) {
    case ScalarType::BFloat16:
      return static_cast<float>(static_cast<const torch::headeronly::BFloat16*>(t.const_data_ptr())[i]);
    case ScalarType::Half:
      return static_cast<float>(static_cast<const torch::headeronly::Half*>(t.const_data_ptr())[i]);
    default:
      return static_cast<const float*>(t.const_data_ptr())[i];
  }
}

}  // namespace

uint32_t wire_checksum(const uint8_t* wire, int64_t bytes) {
  Segments s{wire + kHeaderBytes, bytes - kHeaderBytes, {}};
  s.states.resize(static_cast<size_t>((s.bytes + kSegment - 1) / kSegment));
  uint32_t state = 0;
  dispatch_isa([&]<Isa isa>() {
    state = crc32c<isa>(~uint32_t{0}, wire, kChecksummedHeaderBytes);
    const auto count = static_cast<int64_t>(s.states.size());
    if (count > 0) run_workers(std::min(count, num_workers()), &segment_worker<isa>, &s);
  });
  const uint32_t segment = power(kSegment);
  for (size_t i = 0; i < s.states.size(); ++i) {
    const int64_t left = s.bytes - static_cast<int64_t>(i) * kSegment;
    state = multiply(state, left >= kSegment ? segment : power(left)) ^ s.states[i];
  }
  return ~state;
}

void clear(uint8_t* wire, int64_t begin, int64_t end) {
  if (begin < end) std::memset(wire + begin, 0, static_cast<size_t>(end - begin));
}

void finish_wire(uint8_t* wire, WireHeader header, int64_t bytes) {
  header.magic = kWireMagic;
  header.version = kWireVersion;
  header.wire_bytes = static_cast<uint64_t>(bytes);
  std::memcpy(wire, &header, sizeof(header));
  header.checksum = wire_checksum(wire, bytes);
  std::memcpy(wire, &header, sizeof(header));
}

WireHeader check_wire(const Tensor& wire, WireKind kind, const char* producer) {
  check_cpu(wire, "wire");
  check_dtype(wire, "wire", {ScalarType::Byte});
  check_dim(wire, "wire", "[wire_size]", 1);
  check_contiguous(wire, "wire");
  const int64_t bytes = wire.numel();
  require(bytes >= kHeaderBytes, "wire", text("at least a header of ", kHeaderBytes, " bytes"), bytes);
  const auto* data = static_cast<const uint8_t*>(wire.const_data_ptr());
  WireHeader h{};
  std::memcpy(&h, data, sizeof(h));
  require(h.magic == kWireMagic, "wire", "bytes that begin with PLMT", "others");
  require(h.version == kWireVersion, "wire", text("of version ", int{kWireVersion}), "version ",
          int{h.version});
  require(h.wire_bytes == static_cast<uint64_t>(bytes), "wire",
          text(h.wire_bytes, " bytes, as its header says"), bytes);
  const uint32_t checksum = wire_checksum(data, bytes);
  require(checksum == h.checksum, "wire", text("bytes of checksum ", h.checksum, ", as its header says"),
          checksum);
  require(h.kind == static_cast<int>(kind), "wire", text("of ", producer), kind_text(h.kind));
  const char* fault = option_fault(h, kind);
  require(fault == nullptr, "wire", "of known options", "an unknown ", fault == nullptr ? "" : fault);
  return h;
}

void check_sizes(const WireHeader& h, const Tensor& result, const char* name) {
  const auto n = static_cast<uint64_t>(result.numel());
  bool same = true;
  uint64_t product = 1;
  for (uint64_t size : h.sizes) {
    same = same && size <= (uint64_t{1} << 40);
    product = same && (size == 0 || product <= (uint64_t{1} << 60) / size) ? product * size : ~uint64_t{0};
  }
  same = same && product == n;
  if (h.kind == static_cast<int>(WireKind::tah) && same) {
    const int64_t d = result.dim();
    same = d >= 2 && static_cast<uint64_t>(result.size(d - 1)) == h.sizes[2] &&
           static_cast<uint64_t>(result.size(d - 2)) == h.sizes[1] &&
           h.sizes[2] % (uint64_t{1} << h.tile_log2) == 0;
  }
  if (same) return;
  require(false, name, text("of the wire's shape, [", h.sizes[0], ", ", h.sizes[1], ", ", h.sizes[2], "]"),
          shape_text(result));
}

void throw_not_finite(const Tensor& x, int64_t begin, int64_t count, int64_t stride, const Tensor* m) {
  int64_t at = begin;
  double value = 0;
  for (int64_t i = 0; i < count; ++i) {
    at = begin + i * stride;
    value = element(x, at);
    if (!std::isfinite(value)) break;
    if (m != nullptr && !std::isfinite(static_cast<float>(value) - static_cast<float>(element(*m, at)))) {
      require(false, "x - m", "finite", value, " - ", element(*m, at));
    }
  }
  std::ostringstream place;
  std::vector<int64_t> index(static_cast<size_t>(x.dim()));
  for (int64_t d = x.dim() - 1, left = at; d >= 0; --d) {
    index[static_cast<size_t>(d)] = left % x.size(d);
    left /= x.size(d);
  }
  for (size_t d = 0; d < index.size(); ++d) place << (d > 0 ? ", " : "") << index[d];
  require(false, "x", "finite", value, " at [", place.str(), "]");
  throw std::runtime_error("x is finite");  // not reached
}

}  // namespace palmette
