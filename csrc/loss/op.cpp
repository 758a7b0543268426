// SPDX-License-Identifier: Apache-2.0
// gather_logprobs and gather_logprobs_backward_: checks, allocation, and the choice of the body. The
// equations are in kernel_cpu.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "core/backend.h"
#include "core/checks.h"
#include "core/gpu.h"
#include "loss/params.h"

namespace palmette {
namespace {

ScalarType state_of(DType dtype) { return dtype == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// What both directions ask of logits and targets. On a GPU nobody looks at the targets' values.
template <class Params>
void check_rows(Params& p, const Tensor& logits, const Tensor& targets, double temperature) {
  check_device(logits, "logits");
  check_device(targets, "targets", logits, "logits");
  check_dim(logits, "logits", "[T, vocab]", 2);
  p.dtype = check_element(logits, "logits", runs_float64());
  require(logits.size(1) > 0, "vocab", "positive", logits.size(1));
  require(logits.stride(1) == 1 || logits.size(1) == 1, "logits", "contiguous in its last dimension",
          "stride ", logits.stride(1));
  check_dtype(targets, "targets", {ScalarType::Long});
  check_shape(targets, "targets", "[T]", {logits.size(0)});
  check_contiguous(targets, "targets");
  require(std::isfinite(temperature) && temperature > 0, "temperature", "positive and finite", temperature);
  p.num_rows = logits.size(0);
  p.vocab = logits.size(1);
  p.row_stride = logits.stride(0);
  p.inverse_temperature = 1.0 / temperature;
  p.targets = static_cast<const int64_t*>(targets.const_data_ptr());
  for (int64_t i = 0; targets.is_cpu() && i < p.num_rows; ++i) {
    require(p.targets[i] >= 0 && p.targets[i] < p.vocab, "targets", text("in [0, ", p.vocab, ")"),
            p.targets[i], " at ", i);
  }
}

const void* check_row_values(const std::optional<Tensor>& t, const char* name, const Tensor& logits,
                             ScalarType dtype) {
  if (!t.has_value()) return nullptr;
  check_device(*t, name, logits, "logits");
  check_dtype(*t, name, {dtype});
  check_shape(*t, name, "[T]", {logits.size(0)});
  check_contiguous(*t, name);
  return t->const_data_ptr();
}

std::tuple<Tensor, Tensor, Tensor> gather_logprobs_op(const Tensor& logits, const Tensor& targets,
                                                      double temperature, bool entropy) {
  LogprobsParams p{};
  check_rows(p, logits, targets, temperature);
  p.logits = logits.const_data_ptr();
  const auto rows = [&](int64_t count) {
    return torch::stable::new_empty(logits, {count}, state_of(p.dtype));
  };
  Tensor logprobs = rows(p.num_rows), lse = rows(p.num_rows), entropies = rows(entropy ? p.num_rows : 0);
  p.logprobs = logprobs.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  if (entropy) p.entropies = entropies.mutable_data_ptr();
  if (GpuLaunch gpu(logits); gpu) {
    gpu.reads(logits, "logits");
    gpu.reads(targets, "targets");
    gpu.writes(logprobs, "logprobs");
    gpu.writes(lse, "lse");
    gpu.writes(entropies, "entropies");
    gpu.run("gather_logprobs", p);
  } else {
    dispatch_isa([&]<Isa isa>() { gather_logprobs<isa>(p); });
  }
  return {logprobs, lse, entropies};
}

void gather_logprobs_backward_op(const std::optional<Tensor>& dlogprobs,
                                 const std::optional<Tensor>& dentropies, const Tensor& logits,
                                 const Tensor& targets, const Tensor& lse,
                                 const std::optional<Tensor>& entropies, double temperature) {
  LogprobsBackwardParams p{};
  check_rows(p, logits, targets, temperature);
  const ScalarType state = state_of(p.dtype);
  p.logits = logits.mutable_data_ptr();
  p.lse = check_row_values(lse, "lse", logits, state);
  p.dlogprobs = check_row_values(dlogprobs, "dlogprobs", logits, state);
  p.dentropies = check_row_values(dentropies, "dentropies", logits, state);
  p.entropies = check_row_values(entropies, "entropies", logits, state);
  require(p.dentropies == nullptr || p.entropies != nullptr, "entropies", "given where dentropies is",
          "none");
  if (GpuLaunch gpu(logits); gpu) {
    gpu.writes(logits, "logits");
    gpu.reads(targets, "targets");
    gpu.reads(lse, "lse");
    if (entropies.has_value()) gpu.reads(*entropies, "entropies");
    if (dlogprobs.has_value()) gpu.reads(*dlogprobs, "dlogprobs");
    if (dentropies.has_value()) gpu.reads(*dentropies, "dentropies");
    return gpu.run("gather_logprobs_backward", p);
  }
  dispatch_isa([&]<Isa isa>() { gather_logprobs_backward<isa>(p); });
}

template <class Library>
void implement(Library& m) {
  m.impl("gather_logprobs", TORCH_BOX(&gather_logprobs_op));
  m.impl("gather_logprobs_backward_", TORCH_BOX(&gather_logprobs_backward_op));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { implement(m); }

}  // namespace palmette
