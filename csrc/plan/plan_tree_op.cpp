// SPDX-License-Identifier: Apache-2.0
// The operator behind plan_tree_attention and TreeAttentionPlan.update.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <string>
#include <vector>

#include "plan/error.h"
#include "plan/plan_tree.h"
#include "plan/tensors.h"

namespace palmette {

namespace {

constexpr int64_t kIoFields = 8;

Split split_of(const std::string& name) {
  if (name == "auto") return Split::automatic;
  if (name == "flatten") return Split::flatten;
  if (name == "node") return Split::node;
  if (name == "node_chunk") return Split::node_chunk;
  if (name == "sequence") return Split::sequence;
  fail("split must be auto, flatten, node, node_chunk or sequence, got ", name);
}

QueryKind queries_of(const std::string& name) {
  if (name == "leaves") return QueryKind::leaves;
  if (name == "tokens") return QueryKind::tokens;
  if (name == "explicit") return QueryKind::explicit_;
  fail("queries must be leaves, tokens or explicit, got ", name);
}

template <class Row>
void copy_rows(const std::vector<Row>& from, int32_t* to) {
  if (!from.empty()) std::memcpy(to, from.data(), from.size() * sizeof(Row));
}

// Plans into the given tables and returns true; or, when one of them has too little room, returns false,
// leaves them as they were and only fills io: [keys read, unique, per sequence, then rows needed: queries,
// segments, items, tasks, partials].
Tensor plan_tree(const Tensor& nodes, const Tensor& tree_counts, const std::string& queries,
                 const std::optional<Tensor>& query_node, const std::optional<Tensor>& query_offset,
                 int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim, const std::string& split,
                 int64_t block_len, const std::string& target, const Tensor& counts, const Tensor& query,
                 const Tensor& segment, const Tensor& item, const Tensor& task, const Tensor& merge_ptr,
                 const Tensor& merge_row, const Tensor& io) {
  const TreeState tree = tree_state(nodes, tree_counts);
  check(num_kv_heads > 0, "num_kv_heads must be at least 1, got ", num_kv_heads);
  check(num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
        "num_q_heads must be a multiple of num_kv_heads (", num_kv_heads, "), got ", num_q_heads);
  check(head_dim > 0, "head_dim must be at least 1, got ", head_dim);
  check(block_len > 0, "block_len must be at least 1, got ", block_len);
  int32_t* count = check_table(counts, "counts", 1, kPlanCounts);
  int32_t *query_out = check_table(query, "query", 2, 4), *segment_out = check_table(segment, "segment", 2);
  int32_t *item_out = check_table(item, "item", 2), *task_out = check_table(task, "task", 2);
  int32_t *ptr_out = check_table(merge_ptr, "merge_ptr", 1),
          *row_out = check_table(merge_row, "merge_row", 1);
  require(segment.size(1) == 6 && item.size(1) == 4 && task.size(1) == 6, "segment, item and task",
          "[*, 6], [*, 4] and [*, 6]", shape_text(segment), ", ", shape_text(item), " and ",
          shape_text(task));
  check_cpu(io, "io");
  check_dtype(io, "io", {ScalarType::Long});
  require(io.dim() == 1 && io.size(0) == kIoFields && io.is_contiguous(), "io", "contiguous, [8]",
          shape_text(io));

  TreePlanRequest request{queries_of(queries),
                          int_array(query_node, "the nodes of queries"),
                          int_array(query_offset, "the offsets of queries"),
                          {num_q_heads, num_kv_heads, head_dim},
                          split_of(split),
                          block_len,
                          target_of(target)};
  thread_local TreePlanner planner;
  planner.run(tree, request);
  const Plan& plan = planner.plan();
  const Draft& draft = planner.draft();

  const int64_t num_queries = static_cast<int64_t>(draft.pos.size()), num_partials = plan.num_partials;
  const int64_t needs[5] = {num_queries, static_cast<int64_t>(plan.segment.size()),
                            static_cast<int64_t>(plan.item.size()), static_cast<int64_t>(plan.task.size()),
                            num_partials};
  int64_t* io_out = static_cast<int64_t*>(io.data_ptr());
  io_out[0] = plan.keys_read;
  io_out[1] = planner.io().unique;
  io_out[2] = planner.io().per_sequence;
  std::copy_n(needs, 5, io_out + 3);
  const int64_t row_length = query.size(1);
  const bool fits = num_queries <= row_length && num_queries < merge_ptr.size(0) &&
                    needs[1] <= segment.size(0) && needs[2] <= item.size(0) && needs[3] <= task.size(0) &&
                    num_partials <= merge_row.size(0);
  if (fits) {
    std::copy(draft.index.begin(), draft.index.end(), query_out);
    std::copy(draft.pos.begin(), draft.pos.end(), query_out + row_length);
    std::copy(draft.depth.begin(), draft.depth.end(), query_out + 2 * row_length);
    std::fill_n(query_out + 3 * row_length, num_queries, 0);
    copy_rows(plan.segment, segment_out);
    copy_rows(plan.item, item_out);
    copy_rows(plan.task, task_out);
    copy_rows(plan.merge_ptr, ptr_out);
    copy_rows(plan.merge_row, row_out);
    std::fill_n(count, kPlanCounts, 0);
    for (int i = 0; i < 5; ++i) count[i] = static_cast<int32_t>(needs[i]);
    count[kMaxTaskQueries] = plan.max_task_queries;
    count[kTreeVersion] = tree.version();
    count[kMaxItemKeys] = plan.max_item_keys;
    count[kNumSlots] = planner.layout().max_slot + 1;
  }
  Tensor done = torch::stable::new_empty(counts, {}, ScalarType::Bool);
  *static_cast<bool*>(done.data_ptr()) = fits;
  return done;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("plan_tree", TORCH_BOX(&plan_tree));
}

}  // namespace palmette
