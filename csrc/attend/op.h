// SPDX-License-Identifier: Apache-2.0
// The attend operator, for operators that call it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <tuple>

namespace palmette {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> attend_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slots,
                                     const Tensor& query, const Tensor& segment, const Tensor& item,
                                     const Tensor& task, const Tensor& merge_ptr, const Tensor& merge_row,
                                     const Tensor& counts, const std::optional<Tensor>& sinks, double scale,
                                     double softcap, int64_t window, const std::optional<Tensor>& item_query);

}  // namespace palmette
