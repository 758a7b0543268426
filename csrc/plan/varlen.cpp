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
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <numeric>
#include <string>
#include <tuple>
#include <vector>

#include "plan/error.h"
#include "plan/partition.h"
#include "plan/tensors.h"

namespace palmette {

namespace {

struct VarlenRequest {
  IntArray q_indptr, kv_indptr;
  bool causal;
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

    // Keys that the query in row `row` sees.
    int32_t seen(int32_t row) const {
      if (!causal) return num_keys;
      return static_cast<int32_t>(std::max<int64_t>(0, int64_t{num_keys} - num_queries + (row - query) + 1));
    }
    // The first query that sees key `i`.
    int32_t first_query(int32_t i) const {
      return causal ? std::max(query, query + num_queries - num_keys + i) : query;
    }
  };

  void add_sequence(const VarlenRequest& r, int64_t b, const CostModel& model) {
    const Sequence s{static_cast<int32_t>(r.q_indptr[b]),
                     static_cast<int32_t>(r.q_indptr[b + 1] - r.q_indptr[b]),
                     static_cast<int32_t>(r.kv_indptr[b]),
                     static_cast<int32_t>(r.kv_indptr[b + 1] - r.kv_indptr[b]), r.causal};
    for (int32_t i = 0; i < s.num_queries; ++i) {
      draft_.index.push_back(s.query + i);
      draft_.pos.push_back(s.query + i);
      draft_.depth.push_back(s.causal ? std::max(0, s.num_keys - s.num_queries + i) : 0);
    }
    // Tiles of equal size: every tile of a full level reads all keys.
    const int64_t limit = max_task_queries(r.target, r.heads), tiles = (s.num_queries + limit - 1) / limit;
    for (int64_t t = 0; t < tiles; ++t) {
      const auto begin = static_cast<int32_t>(s.query + t * s.num_queries / tiles),
                 end = static_cast<int32_t>(s.query + (t + 1) * s.num_queries / tiles);
      add_tile(s, begin, end, model);
    }
  }

  // The keys that queries [begin, end) see: one item, or, where it is cheaper, one of the keys that all of
  // them see and others, of the kernel's tile each, that the earlier ones have dropped out of.
  void add_tile(const Sequence& s, int32_t begin, int32_t end, const CostModel& model) {
    const int32_t keys = s.seen(end - 1);
    begin = keys > 0 ? std::max(begin, s.first_query(0)) : end;
    if (begin >= end) return;
    const int32_t step = model.target().key_step;
    const int32_t shared = (s.seen(begin) + step - 1) / step * step;
    if (shared < keys) {
      double cost = model.item(end - begin, shared);
      for (int32_t k = shared; k < keys; k += step) {
        cost += model.item(end - s.first_query(k), std::min(step, keys - k));
      }
      if (cost < model.item(end - begin, keys)) {
        add_item(s, 0, shared, begin, end, model);
        for (int32_t k = shared; k < keys; k += step) {
          add_item(s, k, std::min(k + step, keys), s.first_query(k), end, model);
        }
        return;
      }
    }
    add_item(s, 0, keys, begin, end, model);
  }

  void add_item(const Sequence& s, int32_t key_begin, int32_t key_end, int32_t query_begin, int32_t query_end,
                const CostModel& model) {
    const size_t first = draft_.segment.size();
    const int32_t hi = s.query + s.num_queries;
    // Keys before `flat` are seen from the first query on.
    const int32_t flat = s.causal ? std::max(0, s.num_keys - s.num_queries + 1) : s.num_keys;
    const int32_t cut = std::clamp(flat, key_begin, key_end);
    if (key_begin < cut) {
      draft_.add_keys(first, {s.key + key_begin, cut - key_begin, s.query, 0, hi, s.causal ? key_begin : 0});
    }
    if (cut < key_end) {
      draft_.add_keys(first, {s.key + cut, key_end - cut, s.first_query(cut), 1, hi, cut});
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

IntArray check_indptr(const Tensor& t, const char* name, int64_t total, const char* of_what) {
  const IntArray indptr = int_array(t, name);
  check(indptr.size > 0, name, " must be [B + 1], got [0]");
  check(total <= INT_MAX, name, " must be at most ", INT_MAX, " at its end, got ", total);
  check(indptr[0] == 0, name, " must be 0 at its begin, got ", indptr[0]);
  for (int64_t b = 0; b + 1 < indptr.size; ++b) {
    check(indptr[b] <= indptr[b + 1], name, " must be non-decreasing, got ", indptr[b + 1], " after ",
          indptr[b], " at ", b + 1);
  }
  check(indptr[indptr.size - 1] == total, name, " must be ", total, " (", of_what, ") at its end, got ",
        indptr[indptr.size - 1]);
  return indptr;
}

// What a table has to spare is zero, so that equal plans are equal tensors.
void fill_table(const int32_t* from, int64_t size, const Tensor& to) {
  int32_t* data = int32_data(to);
  std::copy_n(from, size, data);
  std::fill(data + size, data + to.numel(), 0);
}

template <class Row>
void fill_table(const std::vector<Row>& from, const Tensor& to) {
  fill_table(reinterpret_cast<const int32_t*>(from.data()),
             static_cast<int64_t>(from.size() * sizeof(Row) / sizeof(int32_t)), to);
}

using PlanTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The capacities come from the caller, so that the sizes of the tables follow from shapes alone.
PlanTensors plan_varlen(const Tensor& q_indptr, const Tensor& kv_indptr, bool causal, int64_t num_queries,
                        int64_t num_keys, int64_t num_q_heads, int64_t num_kv_heads, int64_t head_dim,
                        const std::string& target, int64_t item_capacity, int64_t partial_capacity) {
  check(num_kv_heads > 0, "num_kv_heads must be at least 1, got ", num_kv_heads);
  check(num_q_heads > 0 && num_q_heads % num_kv_heads == 0,
        "num_q_heads must be a multiple of num_kv_heads (", num_kv_heads, "), got ", num_q_heads);
  check(head_dim > 0, "head_dim must be at least 1, got ", head_dim);
  VarlenRequest request{check_indptr(q_indptr, "q_indptr", num_queries, "rows of q"),
                        check_indptr(kv_indptr, "kv_indptr", num_keys, "rows of k"),
                        causal,
                        {num_q_heads, num_kv_heads, head_dim},
                        target_of(target)};
  check(request.q_indptr.size == request.kv_indptr.size, "kv_indptr must be [", request.q_indptr.size,
        "] like q_indptr, got [", request.kv_indptr.size, "]");

  thread_local VarlenPlanner planner;
  planner.run(request);
  const Plan& plan = planner.plan();
  const Draft& draft = planner.draft();
  const auto num_segments = static_cast<int64_t>(plan.segment.size()),
             num_items = static_cast<int64_t>(plan.item.size()),
             num_tasks = static_cast<int64_t>(plan.task.size());
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

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("plan_varlen", TORCH_BOX(&plan_varlen));
}

}  // namespace palmette
