// SPDX-License-Identifier: Apache-2.0
// Tensors of the planning operators: int32 on the CPU and contiguous, integers from users int32 or int64.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <vector>

#include "core/checks.h"
#include "plan/tree.h"

namespace palmette {

inline int32_t* int32_data(const Tensor& t) { return static_cast<int32_t*>(t.data_ptr()); }

inline Tensor new_int32(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, {sizes.begin(), sizes.size()}, ScalarType::Int);
}

inline Tensor int32_tensor(const Tensor& like, const std::vector<int32_t>& values) {
  Tensor out = new_int32(like, {static_cast<int64_t>(values.size())});
  std::copy(values.begin(), values.end(), int32_data(out));
  return out;
}

// Operators return counts as tensors: an int would be unknown while torch.compile traces.
inline Tensor int64_scalar(const Tensor& like, int64_t value) {
  Tensor out = torch::stable::new_empty(like, {}, ScalarType::Long);
  *static_cast<int64_t*>(out.data_ptr()) = value;
  return out;
}

// A table of the planner: int32, CPU, contiguous, of `dim` dimensions and `first` rows (-1: any number).
inline int32_t* check_table(const Tensor& t, const char* name, int64_t dim, int64_t first = -1) {
  check_cpu(t, name);
  check_dtype(t, name, {ScalarType::Int});
  require(t.dim() == dim && (first < 0 || t.size(0) == first) && t.is_contiguous(), name,
          "a contiguous table of the planner", shape_text(t));
  return int32_data(t);
}

// Integers from the user.
inline IntArray int_array(const Tensor& t, const char* name) {
  check_cpu(t, name);
  check_dtype(t, name, {ScalarType::Int, ScalarType::Long});
  require(t.dim() == 1 && t.is_contiguous(), name, "one-dimensional and contiguous", shape_text(t));
  return {t.data_ptr(), t.numel(), t.scalar_type() == ScalarType::Long, true};
}

inline IntArray int_array(const std::optional<Tensor>& t, const char* name) {
  static const int64_t nothing = 0;
  return t.has_value() ? int_array(*t, name) : IntArray{&nothing, 0, true, false};
}

inline TreeState tree_state(const Tensor& nodes, const Tensor& counts, const Tensor& arena) {
  int32_t* rows = check_table(nodes, "nodes", 2, kNodeRows);
  int32_t* count = check_table(counts, "counts", 1, kTreeCounts);
  return tree_state(rows, nodes.size(1), count, check_table(arena, "slots", 1), arena.size(0));
}

// Without the arena: for operators that look at the structure only.
inline TreeState tree_state(const Tensor& nodes, const Tensor& counts) {
  int32_t* rows = check_table(nodes, "nodes", 2, kNodeRows);
  return tree_state(rows, nodes.size(1), check_table(counts, "counts", 1, kTreeCounts), nullptr, 0);
}

}  // namespace palmette
