// SPDX-License-Identifier: Apache-2.0
// fixpoint_encode and fixpoint_decode, delta_encode_ and delta_decode_: checks and the choice of the body.
// The equations are in kernel_fixpoint_cpu.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "codec/params.h"
#include "codec/wire_host.h"
#include "core/backend.h"
#include "core/checks.h"
#include "core/gpu.h"
#include "core/parallel.h"

namespace palmette {
namespace {

DType check_encoded(const Tensor& t, const char* name) {
  check_dtype(t, name, {ScalarType::Float, ScalarType::BFloat16, ScalarType::Half});
  return check_element(t, name, false);
}

void check_message(const Tensor& m, const Tensor& like, const char* like_name) {
  check_device(m, "m", like, like_name);
  check_encoded(m, "m");
  check_contiguous(m, "m");
}

[[noreturn]] void throw_fault(const FixpointParams& p, const Tensor& x, const Tensor* m, uint64_t fault) {
  const auto slice = static_cast<int64_t>(fault / 16);
  const int64_t column = slice % p.columns, begin = slice / p.columns * p.inner * p.columns + column;
  if (static_cast<WireStatus>(fault % 16) == WireStatus::not_finite)
    throw_not_finite(x, begin, p.inner, p.columns, m);
  require(false, m == nullptr ? "x" : "x - m", "of magnitudes up to 65504, which fp16 scales hold",
          "more in slice ", slice / p.columns, ", column ", column);
  throw std::runtime_error("");  // not reached
}

// ---- on a GPU, without waiting for it

void encode_on_gpu(GpuLaunch& gpu, FixpointParams p, const WireHeader& header, const Tensor& given, Tensor* m,
                   Tensor& wire) {
  const FixpointLayout& l = p.layout;
  const Tensor x = aligned(given);
  Tensor to = aligned(wire);
  Tensor magnitudes = torch::stable::new_empty(x, {l.scales}, ScalarType::Int);
  Tensor steps = torch::stable::new_empty(x, {2 * l.scales}, ScalarType::Float);
  p.x = x.const_data_ptr();
  p.wire = static_cast<uint8_t*>(to.mutable_data_ptr());
  p.magnitudes = static_cast<uint32_t*>(magnitudes.mutable_data_ptr());
  p.steps = static_cast<float*>(steps.mutable_data_ptr());
  WireParams w = wire_to_begin(to, header, {l.codes, l.end});
  w.cleared = p.magnitudes;
  w.num_cleared = l.scales;
  gpu.reads(x, "x");
  std::optional<Tensor> used;
  if (m != nullptr) {
    used = aligned(*m);
    p.m = used->mutable_data_ptr();
    gpu.writes(*used, "m");
  }
  gpu.writes(to, "wire");
  gpu.writes(magnitudes, "magnitudes");
  gpu.writes(steps, "steps");
  gpu.run("fixpoint_encode", FixpointLaunch{p, w});
  copy_back(wire, to);
  if (m != nullptr && used.has_value()) copy_back(*m, *used);
  if (!wire.is_cpu()) return;
  if (const uint64_t fault = take_fault(wire); fault != ~uint64_t{0}) throw_fault(p, given, m, fault);
}

void decode_on_gpu(GpuLaunch& gpu, WireKind kind, DType dtype, const Tensor& wire, const Tensor& result) {
  const bool delta = kind == WireKind::delta;
  Tensor from = aligned(wire), to = aligned(result);
  WireParams w = wire_params(from);
  Tensor sums = torch::stable::new_empty(from, {wire_blocks(w)}, ScalarType::Int);
  w.sums = static_cast<uint32_t*>(sums.mutable_data_ptr());
  w.kind = kind;
  w.elements = result.numel();
  w.cuts[0] = 1;
  for (int64_t i = 0, cut = 0; w.elements > 0 && i < result.dim(); ++i) {
    if (result.size(i) > 1)
      ++cut, w.cuts[cut] = w.cuts[cut - 1] * result.size(i);  // doubles at least: 62 fit
  }
  FixpointParams p{};
  p.kind = kind;
  p.dtype = p.message_dtype = dtype;
  p.layout.elements = w.elements;
  p.wire = w.wire;
  (delta ? p.m : p.out) = to.mutable_data_ptr();
  gpu.writes(from, "wire");
  gpu.writes(to, delta ? "m" : "out");
  gpu.writes(sums, "sums");
  gpu.run("fixpoint_decode", FixpointLaunch{p, w});
  copy_back(wire, from);
  copy_back(result, to);
}

void encode(const Tensor& given, Tensor* m, std::vector<int64_t> groups, int64_t bits, int64_t grid,
            Tensor& wire) {
  FixpointParams p{};
  check_device(given, "x");
  p.dtype = check_encoded(given, "x");
  require(groups.size() == 3, "groups", "[P, R, Q]", groups.size(), " numbers");
  p.outer = groups[0];
  p.inner = groups[1];
  p.columns = groups[2];
  require(p.outer >= 0 && p.inner >= 0 && p.columns >= 0 && p.outer * p.inner * p.columns == given.numel(),
          "groups", text("three factors of the ", given.numel(), " elements of x"), p.outer, ", ", p.inner,
          ", ", p.columns);
  require(bits >= 2 && bits <= 8, "bits", "in [2, 8]", bits);
  require(grid == 0 || grid == 1, "grid", "0 or 1", grid);
  p.bits = static_cast<int32_t>(bits);
  p.grid = static_cast<Grid>(grid);
  p.kind = m == nullptr ? WireKind::fixpoint : WireKind::delta;
  p.layout = FixpointLayout::of(p.bits, p.outer, p.inner, p.columns);
  check_device(wire, "wire", given, "x");
  check_dtype(wire, "wire", {ScalarType::Byte});
  check_shape(wire, "wire", "[wire_size]", {p.layout.end});
  check_contiguous(wire, "wire");
  if (m != nullptr) {
    check_message(*m, given, "x");
    require(m->numel() == given.numel(), "m", text("of the shape of x, ", shape_text(given)), shape_text(*m));
    p.message_dtype = check_encoded(*m, "m");
  }
  const Tensor x = torch::stable::contiguous(given);
  p.x = x.const_data_ptr();
  p.wire = static_cast<uint8_t*>(wire.mutable_data_ptr());

  WireHeader header{};
  header.kind = static_cast<uint8_t>(p.kind);
  header.low_bits = header.high_bits = static_cast<uint8_t>(bits);
  header.allocation = static_cast<uint8_t>(grid);
  for (size_t i = 0; i < 3; ++i) header.sizes[i] = static_cast<uint64_t>(groups[i]);
  if (GpuLaunch gpu(x); gpu) return encode_on_gpu(gpu, p, header, x, m, wire);
  const FixpointLayout& l = p.layout;
  clear(p.wire, std::max(l.absmax, l.codes - kSectionAlignment), l.codes);
  clear(p.wire, std::max(l.codes, l.end - kSectionAlignment), l.end);
  std::vector<uint32_t> magnitudes(static_cast<size_t>(l.scales * num_workers()), 0);
  std::vector<float> steps(static_cast<size_t>(2 * l.scales));
  uint64_t fault = ~uint64_t{0};
  p.magnitudes = magnitudes.data();
  p.steps = steps.data();
  p.fault = &fault;
  if (m != nullptr) p.m = m->mutable_data_ptr();
  dispatch_isa([&]<Isa isa>() { fixpoint_scales<isa>(p); });
  if (fault != ~uint64_t{0}) {
    clear(p.wire, 0, kHeaderBytes);  // nobody shall take it for a wire
    throw_fault(p, x, m, fault);
  }
  dispatch_isa([&]<Isa isa>() { fixpoint_encode<isa>(p); });
  finish_wire(p.wire, header, l.end);
}

void decode(const Tensor& wire, Tensor& result, WireKind kind) {
  const bool delta = kind == WireKind::delta;
  check_device(result, delta ? "m" : "out", wire, "wire");
  FixpointParams p{};
  p.kind = kind;
  const DType dtype = check_encoded(result, delta ? "m" : "out");
  check_contiguous(result, delta ? "m" : "out");
  GpuLaunch gpu(wire);
  if (!wire.is_cpu()) {
    check_wire_tensor(wire);
    return decode_on_gpu(gpu, kind, dtype, wire, result);
  }
  const WireHeader h = check_wire(wire, kind, delta ? "delta_encode_" : "fixpoint_encode");
  check_sizes(h, result, delta ? "m" : "shape");
  p.bits = h.low_bits;
  p.grid = static_cast<Grid>(h.allocation);
  p.outer = static_cast<int64_t>(h.sizes[0]);
  p.inner = static_cast<int64_t>(h.sizes[1]);
  p.columns = static_cast<int64_t>(h.sizes[2]);
  p.layout = FixpointLayout::of(p.bits, p.outer, p.inner, p.columns);
  require(p.layout.end == wire.numel(), "wire", text(p.layout.end, " bytes for its options"), wire.numel());
  if (gpu) return decode_on_gpu(gpu, kind, dtype, wire, result);
  p.wire = const_cast<uint8_t*>(static_cast<const uint8_t*>(wire.const_data_ptr()));  // only a GPU writes
  std::vector<float> steps(static_cast<size_t>(2 * p.layout.scales));
  p.steps = steps.data();
  p.dtype = p.message_dtype = dtype;
  if (delta)
    p.m = result.mutable_data_ptr();
  else
    p.out = result.mutable_data_ptr();
  dispatch_isa([&]<Isa isa>() { fixpoint_decode<isa>(p); });
}

void fixpoint_encode_op(const Tensor& x, std::vector<int64_t> groups, int64_t bits, int64_t grid,
                        Tensor wire) {
  encode(x, nullptr, std::move(groups), bits, grid, wire);
}
void fixpoint_decode_op(const Tensor& wire, Tensor out) { decode(wire, out, WireKind::fixpoint); }
void delta_encode_op(const Tensor& x, Tensor m, std::vector<int64_t> groups, int64_t bits, int64_t grid,
                     Tensor wire) {
  encode(x, &m, std::move(groups), bits, grid, wire);
}
void delta_decode_op(const Tensor& wire, Tensor m) { decode(wire, m, WireKind::delta); }

template <class Library>
void implement(Library& m) {
  m.impl("fixpoint_encode", TORCH_BOX(&fixpoint_encode_op));
  m.impl("fixpoint_decode", TORCH_BOX(&fixpoint_decode_op));
  m.impl("delta_encode_", TORCH_BOX(&delta_encode_op));
  m.impl("delta_decode_", TORCH_BOX(&delta_decode_op));
}

}  // namespace
}  // namespace palmette

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { palmette::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { palmette::implement(m); }
