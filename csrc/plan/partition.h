// SPDX-License-Identifier: Apache-2.0
// The second half of planning: items, whoever made them, become tasks of similar cost, and partial states get
// their rows.
//
// Tables of a plan (attend/params.h has the rows of segment, item and task): queries are sorted by position
// and "query j" is the j-th in that order. Every query is in exactly one task that writes its output
// directly, or in one or more tasks that write partial states, one row per query, which
// merge_row[merge_ptr[j] : merge_ptr[j + 1]] lists in the order to merge them in.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "attend/params.h"
#include "plan/cost.h"

namespace palmette {

// An item before it is given to a task. query_begin does not decrease from one item to the next.
struct DraftItem {
  int32_t segment_begin, segment_end, query_begin, query_end, keys;
  double cost;
};

// Do `keys` follow `last` in every respect, so that one run can hold both?
inline bool continues(const PlanSegment& last, const PlanSegment& keys) {
  return last.hi == keys.hi && last.step == keys.step && last.begin + last.length == keys.begin &&
         last.lo + last.length * last.step == keys.lo && last.depth + last.length == keys.depth;
}

// What a planner hands over: every query is met by at least one item.
struct Draft {
  std::vector<int32_t> index, pos, depth;  // queries: row of q, token number, tokens above; sorted by pos
  std::vector<PlanSegment> segment;
  std::vector<DraftItem> item;

  void clear();
  // Adds keys to the last segment if they continue it and it belongs to the open item (from `first` on), else
  // a segment.
  void add_keys(size_t first, const PlanSegment& keys);
  // Closes the item of the segments from `first` on.
  void close_item(size_t first, int32_t query_begin, int32_t query_end, const CostModel& model);
};

// A finished plan, apart from `slots`.
struct Plan {
  std::vector<PlanSegment> segment;
  std::vector<PlanItem> item;
  std::vector<PlanTask> task;
  std::vector<int32_t> merge_ptr, merge_row;
  int32_t num_partials, max_task_queries, max_item_keys;
  int64_t keys_read;  // keys summed over items
};

// "cpu" or "gpu".
const Target& target_of(const std::string& name);

struct Heads {
  int64_t num_q_heads, num_kv_heads, head_dim;
};

// Queries that fit a task.
int64_t max_task_queries(const Target& target, const Heads& heads);

void partition(const Draft& draft, const CostModel& model, const Heads& heads, Plan& plan);

}  // namespace palmette
