// SPDX-License-Identifier: Apache-2.0
// Plans for packed sequences: the queries q_indptr[b] .. q_indptr[b + 1] meet the keys kv_indptr[b] ..
// kv_indptr[b + 1], all of them or causally (the last query of a sequence sees its last key). What a level of
// a cascade and packed prefill need; only the intervals differ from those of a tree.
//
// The position of a query is its row of q. With n queries from row s and m keys, key i is seen from
//
//     full:    lo = s                        hi = s + n
//     causal:  lo = s + max(0, i - (m - n))  hi = s + n
//
// so the first m - n + 1 keys of a causal sequence are one segment of step 0, and the rest one of step 1.
//
// Keys may also stand for blocks of tokens (compressed keys): key i for the tokens from i * stride on, `size`
// of them. A query sees it when it sees the last of them; of a sequence of N tokens
//
//     causal:  lo = s + max(0, i * stride + size - 1 - (N - n))
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "plan/error.h"
#include "plan/ops.h"
#include "plan/partition.h"
#include "plan/tensors.h"

namespace palmette {

namespace {

struct VarlenRequest {
  IntArray q_indptr, kv_indptr, token_indptr;
  KeyStarts key_start;
  bool causal;
  int32_t key_size, key_stride;  // tokens
  int32_t window;                // keys that a causal query sees at most, 0: all; the kernel hides the others
  Heads heads;
  const Target& target;
};

class VarlenPlanner {
 public:
  void run(const VarlenRequest& request) {
    draft_.clear();
    const CostModel model(request.target, request.heads.num_q_heads / request.heads.num_kv_heads,
                          request.heads.head_dim, max_task_queries(request.target, request.heads));
    for (int64_t b = 0; b + 1 < request.q_indptr.size; ++b) add_sequence(request, b, model);
    partition(draft_, model, request.heads, plan_);
    add_idle_tasks(static_cast<int32_t>(max_task_queries(request.target, request.heads)));
  }

  const Draft& draft() const { return draft_; }
  const Plan& plan() const { return plan_; }

 private:
  struct Sequence {
    int32_t query, num_queries, key, num_keys;
    bool causal;
    int64_t offset, key_size, key_stride;  // offset: tokens before the first query

    // Keys that the query in row `row` sees.
    int32_t seen(int32_t row) const {
      if (!causal) return num_keys;
      const int64_t last = offset + (row - query) - (key_size - 1);  // where the last one may begin
      return last < 0 ? 0 : static_cast<int32_t>(std::min<int64_t>(num_keys, last / key_stride + 1));
    }
    // The first query that sees key `i`.
    int32_t first_query(int32_t i) const {
      if (!causal) return query;
      return query + static_cast<int32_t>(std::max<int64_t>(0, i * key_stride + key_size - 1 - offset));
    }
  };

  void add_sequence(const VarlenRequest& r, int64_t b, const CostModel& model) {
    const Sequence s{static_cast<int32_t>(r.q_indptr[b]),
                     static_cast<int32_t>(r.q_indptr[b + 1] - r.q_indptr[b]),
                     r.key_start(r.kv_indptr, b),
                     static_cast<int32_t>(r.kv_indptr[b + 1] - r.kv_indptr[b]),
                     r.causal,
                     r.token_indptr[b + 1] - r.token_indptr[b] - (r.q_indptr[b + 1] - r.q_indptr[b]),
                     r.key_size,
                     r.key_stride};
    for (int32_t i = 0; i < s.num_queries; ++i) {
      draft_.index.push_back(s.query + i);
      draft_.pos.push_back(s.query + i);
      draft_.depth.push_back(s.causal ? static_cast<int32_t>(std::max<int64_t>(0, s.offset + i)) : 0);
    }
    // Tiles of equal size: every tile of a full level reads all keys.
    const int64_t limit = max_task_queries(r.target, r.heads), tiles = (s.num_queries + limit - 1) / limit;
    for (int64_t t = 0; t < tiles; ++t) {
      const auto begin = static_cast<int32_t>(s.query + t * s.num_queries / tiles),
                 end = static_cast<int32_t>(s.query + (t + 1) * s.num_queries / tiles);
      add_tile(s, begin, end, r.window, model);
    }
  }

  // The keys that queries [begin, end) see: one item, or, where it is cheaper, one of the keys that all of
  // them see and others, of the kernel's tile each, that the earlier ones have dropped out of.
  void add_tile(const Sequence& s, int32_t begin, int32_t end, int32_t window, const CostModel& model) {
    const int32_t keys = s.seen(end - 1);
    begin = keys > 0 ? std::max(begin, s.first_query(0)) : end;
    if (begin >= end) return;
    const int32_t step = model.target().key_step;
    const int32_t first = window > 0 && s.causal ? std::max(0, s.seen(begin) - window) : 0;
    const int32_t shared = first + (s.seen(begin) - first + step - 1) / step * step;
    if (shared < keys) {
      double cost = model.item(end - begin, shared - first);
      for (int32_t k = shared; k < keys; k += step) {
        cost += model.item(end - s.first_query(k), std::min(step, keys - k));
      }
      if (cost < model.item(end - begin, keys - first)) {
        add_item(s, first, shared, begin, end, model);
        for (int32_t k = shared; k < keys; k += step) {
          add_item(s, k, std::min(k + step, keys), s.first_query(k), end, model);
        }
        return;
      }
    }
    add_item(s, first, keys, begin, end, model);
  }

  void add_item(const Sequence& s, int32_t key_begin, int32_t key_end, int32_t query_begin, int32_t query_end,
                const CostModel& model) {
    const size_t first = draft_.segment.size();
    const int32_t hi = s.query + s.num_queries;
    // Keys before `flat` are seen from the first query on.
    const int32_t flat = s.seen(s.query);
    const int32_t cut = std::clamp(flat, key_begin, key_end);
    if (key_begin < cut) {
      draft_.add_keys(first, {s.key + key_begin, cut - key_begin, s.query, 0, hi, key_begin});
    }
    if (cut < key_end) {
      draft_.add_keys(first, {s.key + cut, key_end - cut, s.first_query(cut),
                              static_cast<int32_t>(s.key_stride), hi, cut});
    }
    draft_.close_item(first, query_begin, query_end, model);
  }

  // Queries that no item meets see nothing, but somebody has to write that.
  void add_idle_tasks(int32_t max_queries) {
    const auto num_queries = static_cast<int32_t>(draft_.pos.size());
    std::vector<uint8_t> met(static_cast<size_t>(num_queries), 0);
    for (const PlanTask& task : plan_.task) {
      std::fill(met.begin() + task.query_begin, met.begin() + task.query_end, uint8_t{1});
    }
    const auto none = static_cast<int32_t>(plan_.item.size());
    for (int32_t j = 0, end; j < num_queries; j = end) {
      end = j + 1;
      if (met[static_cast<size_t>(j)]) continue;
      while (end < num_queries && !met[static_cast<size_t>(end)] && end - j < max_queries) ++end;
      plan_.task.push_back({none, none, j, end, -1, -1});
      plan_.max_task_queries = std::max(plan_.max_task_queries, end - j);
    }
  }

  Draft draft_;
  Plan plan_;
};

}  // namespace

PlanTables plan_varlen(const Tensor& q_indptr, const Tensor& kv_indptr, bool causal, int64_t num_queries,
                       int64_t num_keys, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
                       const std::string& target, int64_t item_capacity, int64_t partial_capacity,
                       const std::optional<Tensor>& token_indptr, int64_t key_size, int64_t key_stride,
                       int64_t window, const std::optional<Tensor>& key_start) {
  check(num_kv_heads > 0, "num_kv_heads must be at least 1, got ", num_kv_heads);
  check(num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
        "num_q_heads must be a multiple of num_kv_heads (", num_kv_heads, "), got ", num_q_heads);
  check(head_dim > 0, "head_dim must be at least 1, got ", head_dim);
  check(key_size > 0 && key_size <= INT_MAX, "key_size must be at least 1 and below 2^31, got ", key_size);
  check(key_stride > 0 && key_stride <= INT_MAX, "key_stride must be at least 1 and below 2^31, got ",
        key_stride);
  check(num_keys >= 0 && num_keys <= INT_MAX, "k must be of less than 2^31 rows, got ", num_keys);
  check(window >= 0, "window must be at least 0 (0: none), got ", window);
  const IntArray queries = check_indptr(q_indptr, "q_indptr", num_queries, "rows of q"),
                 keys =
                     check_indptr(kv_indptr, "kv_indptr", key_start.has_value() ? -1 : num_keys, "rows of k");
  VarlenRequest request{
      queries,
      keys,
      token_indptr.has_value() ? check_indptr(*token_indptr, "token_indptr", -1, "tokens") : keys,
      key_starts(key_start, "k_starts or cmp_starts", keys, num_keys),
      causal,
      static_cast<int32_t>(key_size),
      static_cast<int32_t>(key_stride),
      static_cast<int32_t>(std::min<int64_t>(window, INT_MAX)),
      {num_q_heads, num_kv_heads, head_dim},
      target_of(target)};
  check(request.q_indptr.size == request.kv_indptr.size, "kv_indptr must be [", request.q_indptr.size,
        "] like q_indptr, got [", request.kv_indptr.size, "]");
  check(request.q_indptr.size == request.token_indptr.size, "token_indptr must be [", request.q_indptr.size,
        "] like q_indptr, got [", request.token_indptr.size, "]");

  thread_local VarlenPlanner planner;
  planner.run(request);
  const Plan& plan = planner.plan();
  const Draft& draft = planner.draft();
  const auto num_segments = static_cast<int64_t>(plan.segment.size()),
             num_items = static_cast<int64_t>(plan.item.size()),
             num_tasks = static_cast<int64_t>(plan.task.size());
  if (item_capacity < 0) item_capacity = std::max({num_items, num_tasks, (num_segments + 1) / 2});
  if (partial_capacity < 0) partial_capacity = plan.num_partials;
  check(num_items <= item_capacity && num_tasks <= item_capacity && num_segments <= 2 * item_capacity,
        "item_capacity must be at least ", std::max({num_items, num_tasks, (num_segments + 1) / 2}), ", got ",
        item_capacity);
  check(plan.num_partials <= partial_capacity, "partial_capacity must be at least ", plan.num_partials,
        ", got ", partial_capacity);

  Tensor slots = new_int32(q_indptr, {num_keys}), query = new_int32(q_indptr, {4, num_queries});
  Tensor segment = new_int32(q_indptr, {2 * item_capacity, 6}),
         item = new_int32(q_indptr, {item_capacity, 4});
  Tensor task = new_int32(q_indptr, {item_capacity, 6}), merge_ptr = new_int32(q_indptr, {num_queries + 1});
  Tensor merge_row = new_int32(q_indptr, {partial_capacity}), counts = new_int32(q_indptr, {kPlanCounts});
  std::iota(int32_data(slots), int32_data(slots) + num_keys, 0);
  int32_t* row = int32_data(query);
  std::copy(draft.index.begin(), draft.index.end(), row);
  std::copy(draft.pos.begin(), draft.pos.end(), row + num_queries);
  std::copy(draft.depth.begin(), draft.depth.end(), row + 2 * num_queries);
  std::fill_n(row + 3 * num_queries, num_queries, 0);
  fill_table(plan.segment, segment);
  fill_table(plan.item, item);
  fill_table(plan.task, task);
  fill_table(plan.merge_ptr, merge_ptr);
  fill_table(plan.merge_row, merge_row);
  int32_t* count = int32_data(counts);
  std::fill_n(count, kPlanCounts, 0);
  count[kNumQueries] = static_cast<int32_t>(num_queries);
  count[kNumSegments] = static_cast<int32_t>(num_segments);
  count[kNumItems] = static_cast<int32_t>(num_items);
  count[kNumTasks] = static_cast<int32_t>(num_tasks);
  count[kNumPartials] = plan.num_partials;
  count[kMaxTaskQueries] = plan.max_task_queries;
  count[kMaxItemKeys] = plan.max_item_keys;
  count[kNumSlots] = static_cast<int32_t>(num_keys);
  return {slots, query, segment, item, task, merge_ptr, merge_row, counts};
}

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("plan_varlen", TORCH_BOX(&plan_varlen));
}

}  // namespace palmette
