// SPDX-License-Identifier: Apache-2.0
// Tensors of the planning operators: int32 on the CPU and contiguous, integers from users int32 or int64.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <climits>
#include <initializer_list>
#include <optional>
#include <vector>

#include "core/checks.h"
#include "plan/error.h"
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

// Where packed sequences begin, [B + 1], from 0 to `total` (-1: to anywhere).
inline IntArray check_indptr(const Tensor& t, const char* name, int64_t total, const char* of_what) {
  const IntArray indptr = int_array(t, name);
  check(indptr.size > 0, name, " must be [B + 1], got [0]");
  check(total <= INT_MAX, name, " must be at most ", INT_MAX, " at its end, got ", total);
  check(indptr[0] == 0, name, " must be 0 at its begin, got ", indptr[0]);
  for (int64_t b = 0; b + 1 < indptr.size; ++b) {
    check(indptr[b] <= indptr[b + 1], name, " must be non-decreasing, got ", indptr[b + 1], " after ",
          indptr[b], " at ", b + 1);
  }
  check(total < 0 || indptr[indptr.size - 1] == total, name, " must be ", total, " (", of_what,
        ") at its end, got ", indptr[indptr.size - 1]);
  check(indptr[indptr.size - 1] <= INT_MAX, name, " must be at most ", INT_MAX, " at its end, got ",
        indptr[indptr.size - 1]);
  return indptr;
}

// What a table has to spare is zero, so that equal plans are equal tensors.
inline void fill_table(const int32_t* from, int64_t size, const Tensor& to) {
  int32_t* data = int32_data(to);
  std::copy_n(from, size, data);
  std::fill(data + size, data + to.numel(), 0);
}

template <class Row>
void fill_table(const std::vector<Row>& from, const Tensor& to) {
  fill_table(reinterpret_cast<const int32_t*>(from.data()),
             static_cast<int64_t>(from.size() * sizeof(Row) / sizeof(int32_t)), to);
}

// First rows of sequences in k, [B]; each one's keys lie behind it. Not given: one sequence behind the other.
struct KeyStarts {
  IntArray given;
  int32_t operator()(const IntArray& indptr, int64_t b) const {
    return static_cast<int32_t>(given.given ? given[b] : indptr[b]);
  }
};
inline KeyStarts key_starts(const std::optional<Tensor>& t, const char* name, const IntArray& indptr,
                            int64_t num_rows) {
  const KeyStarts starts{int_array(t, name)};
  if (!starts.given.given) return starts;
  check(starts.given.size == indptr.size - 1, name, " must be [", indptr.size - 1, "], got [",
        starts.given.size, "]");
  for (int64_t b = 0; b + 1 < indptr.size; ++b) {
    const int64_t first = starts.given[b], length = indptr[b + 1] - indptr[b];
    check(first >= 0 && first <= num_rows - length, name, " must be such that sequence ", b, " has its ",
          length, " rows of ", num_rows, ", got ", first);
  }
  return starts;
}

// Without the arena: for operators that look at the structure only.
inline TreeState tree_state(const Tensor& nodes, const Tensor& counts) {
  int32_t* rows = check_table(nodes, "nodes", 2, kNodeRows);
  return tree_state(rows, nodes.size(1), check_table(counts, "counts", 1, kTreeCounts), nullptr, 0);
}

}  // namespace palmette
