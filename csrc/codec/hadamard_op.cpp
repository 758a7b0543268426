// SPDX-License-Identifier: Apache-2.0
// hadamard_transform: checks, the small matrices, and the choice of the body.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "codec/params.h"
#include "codec/wire_host.h"
#include "core/backend.h"
#include "core/checks.h"
#include "core/gpu.h"
#include "core/large.h"

namespace palmette {
namespace {

constexpr int64_t kMostElements = 40960;  // 40 * 2^10: on a GPU a row lies in shared memory

// Legendre's symbol of a modulo a prime q.
int legendre(int a, int q) {
  a = (a % q + q) % q;
  if (a == 0) return 0;
  for (int i = 1; i < q; ++i) {
    if (i * i % q == a) return 1;
  }
  return -1;
}

// Element (a, b) of Paley's matrices: his first construction, S + I, for 12 and 20; his second, S (x) [1 1; 1
// -1]
// + I (x) [1 -1; -1 -1], for 28.
int paley(int base, int a, int b) {
  const int second = base == 28 ? 2 : 1, q = base / second - 1;
  const int i = a / second, j = b / second;
  const int symbol = i == 0 && j == 0 ? 0 : i == 0 ? 1 : j == 0 ? (second == 2 ? 1 : -1) : legendre(i - j, q);
  if (second == 1) return symbol + (i == j ? 1 : 0);
  const bool lower = a % 2 == 1, right = b % 2 == 1;
  return symbol * (lower && right ? -1 : 1) + (i == j ? (lower || right ? -1 : 1) : 0);
}

HadamardParams check(const Tensor& x, double scale, bool transpose) {
  HadamardParams p{};
  check_device(x, "x");
  p.dtype = check_element(x, "x", runs_float64());
  p.size = x.dim() == 0 ? 0 : x.size(x.dim() - 1);
  const int64_t odd = p.size > 0 ? p.size / (p.size & -p.size) : 0;
  const bool known = odd == 1 || ((odd == 3 || odd == 5 || odd == 7) && p.size % (4 * odd) == 0);
  require(known && p.size <= kMostElements, "x",
          "[..., n] with n = 2^k or 12, 20, 28 or 40 times 2^k, up to 40960", shape_text(x));
  p.rows = x.numel() / p.size;
  p.base = odd == 1 ? 1 : static_cast<int32_t>(4 * odd);
  p.scale = scale;
  for (int a = 0; p.base > 1 && a < p.base; ++a) {
    for (int b = 0; b < p.base; ++b) {
      const int element = transpose ? paley(p.base, b, a) : paley(p.base, a, b);
      p.negative[a] |= static_cast<uint32_t>(element < 0) << b;
    }
  }
  return p;
}

void run(HadamardParams& p, const Tensor& x, Tensor& out) {
  p.x = x.const_data_ptr();
  p.out = out.mutable_data_ptr();
  if (p.rows == 0) return;
  if (GpuLaunch gpu(x); gpu) {
    const Tensor from = aligned(x);
    Tensor to = p.x == p.out ? from : aligned(out);
    p.x = from.const_data_ptr();
    p.out = to.mutable_data_ptr();
    gpu.writes(to, "out");
    gpu.reads(from, "x");
    gpu.run("hadamard_transform", p);
    copy_back(out, to);
  } else {
    dispatch_isa([&]<Isa isa>() { hadamard_transform<isa>(p); });
  }
}

Tensor hadamard_transform_op(Tensor x, double scale, bool transpose) {
  HadamardParams p = check(x, scale, transpose);
  x = torch::stable::contiguous(x);
  Tensor out = torch::stable::empty_like(x);
  ask_for_huge_pages(out);
  run(p, x, out);
  return out;
}

void hadamard_transform_out_op(Tensor x, double scale, bool transpose, Tensor out) {
  HadamardParams p = check(x, scale, transpose);
  check_device(out, "out", x, "x");
  check_dtype(out, "out", {x.scalar_type()});
  check_contiguous(out, "out");
  bool same = out.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = out.size(i) == x.size(i);
  require(same, "out", text("of the shape of x, ", shape_text(x)), shape_text(out));
  x = torch::stable::contiguous(x);
  const auto bytes = x.numel() * static_cast<int64_t>(x.element_size());
  const auto* from = static_cast<const char*>(x.const_data_ptr());
  const auto* to = static_cast<const char*>(out.const_data_ptr());
  require(from == to || from + bytes <= to || to + bytes <= from, "out", "x itself or other memory",
          "memory that overlaps x");
  run(p, x, out);
}

template <class Library>
void implement(Library& m) {
  m.impl("hadamard_transform", TORCH_BOX(&hadamard_transform_op));
  m.impl("hadamard_transform_out", TORCH_BOX(&hadamard_transform_out_op));
}

}  // namespace
}  // namespace palmette

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { palmette::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { palmette::implement(m); }
