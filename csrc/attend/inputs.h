// SPDX-License-Identifier: Apache-2.0
// What every attention is given: its tensors and its plan, checked before any kernel runs.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

#include "attend/params.h"
#include "core/checks.h"
#include "core/gpu.h"

namespace palmette {

// The plan arguments of every attend operator, in schema order.
struct PlanTensors {
  const Tensor &slots, &query, &segment, &item, &task, &merge_ptr, &merge_row, &counts;
  const std::optional<Tensor>& item_query;
};

struct Inputs {
  const Tensor &q, &k, &v;
  PlanTensors plan;
  const std::optional<Tensor>& sinks;
};

// Checks them; fills everything but out, lse, partials and units.
AttendParams make_params(const Inputs& in, double scale, double softcap, int64_t window);

// Names to `gpu` what kernels read of every attention.
void name_inputs(GpuLaunch& gpu, const Inputs& in);

// [tokens, heads, channels] as kernels take it.
Strided strided(const Tensor& t, const char* name);

// The dtype of LSE, sinks and partial states.
inline ScalarType state_type(DType d) { return d == DType::f64 ? ScalarType::Double : ScalarType::Float; }

}  // namespace palmette
