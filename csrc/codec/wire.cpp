// SPDX-License-Identifier: Apache-2.0
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <vector>

#include "codec/arithmetic.h"
#include "codec/params.h"
#include "codec/wire_host.h"
#include "core/backend.h"
#include "core/parallel.h"

namespace palmette {
namespace {

constexpr int64_t kSegment = 1 << 16;  // bytes that one thread takes at a time

struct Segments {
  const uint8_t* data;
  int64_t bytes;
  std::vector<uint32_t> states;
  std::atomic<int64_t> next{0};
};

template <Isa isa>
void segment_worker(void* ctx, int64_t) {
  auto& s = *static_cast<Segments*>(ctx);
  for (int64_t i; (i = s.next.fetch_add(1)) < static_cast<int64_t>(s.states.size());) {
    const int64_t begin = i * kSegment;
    s.states[static_cast<size_t>(i)] = crc32c<isa>(0, s.data + begin, std::min(kSegment, s.bytes - begin));
  }
}

const char* option_fault(const WireHeader& h, WireKind kind) {
  const auto bits = [](int b) { return b >= 2 && b <= 8; };
  if (!bits(h.low_bits) || !bits(h.high_bits) || h.low_bits > h.high_bits) return "bits";
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
    case WireKind::none:
      break;
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
  const uint32_t segment = crc_power(kSegment);
  for (size_t i = 0; i < s.states.size(); ++i) {
    const int64_t left = s.bytes - static_cast<int64_t>(i) * kSegment;
    state = crc_multiply(state, left >= kSegment ? segment : crc_power(left)) ^ s.states[i];
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

void check_wire_tensor(const Tensor& wire) {
  check_dtype(wire, "wire", {ScalarType::Byte});
  check_dim(wire, "wire", "[wire_size]", 1);
  check_contiguous(wire, "wire");
  require(wire.numel() >= kHeaderBytes, "wire", text("at least a header of ", kHeaderBytes, " bytes"),
          wire.numel());
}

WireHeader check_wire(const Tensor& wire, WireKind kind, const char* producer) {
  check_cpu(wire, "wire");
  check_wire_tensor(wire);
  const int64_t bytes = wire.numel();
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
  if (h.kind != static_cast<int>(WireKind::tah) && same && n > 0) {
    // P and P * R end between dimensions
    uint64_t before = 1;
    bool outer = h.sizes[0] == 1, inner = h.sizes[0] * h.sizes[1] == 1;
    for (int64_t i = 0; i < result.dim(); ++i) {
      before *= static_cast<uint64_t>(result.size(i));
      outer = outer || before == h.sizes[0];
      inner = inner || before == h.sizes[0] * h.sizes[1];
    }
    same = outer && inner;
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

// ---- for GPUs

Tensor aligned(const Tensor& t) {
  return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? t : torch::stable::clone(t);
}

void copy_back(Tensor to, const Tensor& used) {
  if (to.const_data_ptr() != used.const_data_ptr()) torch::stable::copy_(to, used);
}

WireParams wire_params(Tensor& wire) {
  WireParams p{};
  p.wire = static_cast<uint8_t*>(wire.mutable_data_ptr());
  p.bytes = wire.numel();
  uint32_t power = crc_power(1);
  for (uint32_t& square : p.powers) {
    square = power;
    power = crc_multiply(power, power);
  }
  // enough groups for a large GPU; more rows than 64 would not make a group's last steps cheaper
  p.rows_per_group = std::clamp<int64_t>(p.bytes / kWireRow / 2112, 8, 64);
  return p;
}

WireParams wire_to_begin(Tensor& wire, WireHeader header, std::initializer_list<int64_t> section_ends) {
  WireParams p = wire_params(wire);
  p.header = header;
  p.header.magic = kWireMagic;
  p.header.version = kWireVersion;
  p.header.wire_bytes = static_cast<uint64_t>(p.bytes);
  p.header.checksum = ~uint32_t{0};
  p.header.position = ~uint64_t{0};
  std::fill(std::begin(p.section_ends), std::end(p.section_ends), p.bytes);
  std::copy(section_ends.begin(), section_ends.end(), p.section_ends);
  return p;
}

uint64_t take_fault(Tensor& wire) {
  auto* data = static_cast<uint8_t*>(wire.mutable_data_ptr());
  WireHeader h{};
  std::memcpy(&h, data, sizeof(h));
  if (h.status == static_cast<uint32_t>(WireStatus::ok)) return ~uint64_t{0};
  clear(data, 0, kHeaderBytes);
  return h.position * 16 + h.status;
}

}  // namespace palmette
