// SPDX-License-Identifier: Apache-2.0
// Planning operators that other operators call: one call from Python then does what takes several.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

namespace palmette {

using torch::stable::Tensor;

// slots, query, segment, item, task, merge_ptr, merge_row, counts; and, of chosen blocks, item_query.
using PlanTables = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SelectionTables = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A capacity of -1: as many rows as the plan has. Capacities that are given follow from shapes alone.
PlanTables plan_varlen(const Tensor& q_indptr, const Tensor& kv_indptr, bool causal, int64_t num_queries,
                       int64_t num_keys, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
                       const std::string& target, int64_t item_capacity, int64_t partial_capacity,
                       const std::optional<Tensor>& token_indptr, int64_t key_size, int64_t key_stride,
                       int64_t window, const std::optional<Tensor>& key_start);

SelectionTables plan_selection(const Tensor& block_index, const Tensor& q_indptr, const Tensor& kv_indptr,
                               int64_t num_keys, int64_t block_size, int64_t min_tile_queries,
                               int64_t max_tile_queries, int64_t segment_capacity, int64_t item_capacity,
                               int64_t task_capacity, const std::optional<Tensor>& key_start);

}  // namespace palmette
