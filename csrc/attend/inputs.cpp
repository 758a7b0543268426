// SPDX-License-Identifier: Apache-2.0
#include "attend/inputs.h"

#include <algorithm>
#include <cmath>

#include "core/backend.h"

namespace palmette {

namespace {

void check_table(const Tensor& t, const char* name, const Tensor& q, const char* shape, int64_t columns,
                 int64_t dims = 0) {
  check_device(t, name, q, "q");
  check_dtype(t, name, {ScalarType::Int});
  check_dim(t, name, shape, dims > 0 ? dims : columns > 0 ? 2 : 1);
  check_contiguous(t, name);
  if (columns > 0) require(t.size(1) == columns, name, shape, shape_text(t));
}

// The tables, on the device of q, with their capacities in place of counts.
PlanView view_tables(const PlanTensors& t, const Tensor& q) {
  check_table(t.slots, "slots", q, "[tokens]", 0);
  check_table(t.segment, "segment", q, "[capacity, 6]", 6);
  check_table(t.item, "item", q, "[capacity, 4]", 4);
  check_table(t.task, "task", q, "[capacity, 6]", 6);
  check_table(t.merge_ptr, "merge_ptr", q, "[capacity]", 0);
  const bool by_blocks = t.merge_row.dim() == 3;
  check_table(t.merge_row, "merge_row", q, "[capacity]", 0, by_blocks ? 3 : 1);
  if (by_blocks) {
    require(t.merge_row.size(1) == q.size(0) && t.merge_row.size(2) > 0 && t.item_query.has_value() &&
                t.item_query->numel() == t.merge_row.numel(),
            "merge_row", text("[Hk, ", q.size(0), ", n] with as many entries as item_query"),
            shape_text(t.merge_row));
  }
  check_table(t.counts, "counts", q, "[16]", 0);
  check_device(t.query, "query", q, "q");
  check_dtype(t.query, "query", {ScalarType::Int});
  check_dim(t.query, "query", "[4, capacity]", 2);
  require(t.query.size(0) == 4 && t.query.is_contiguous(), "query", "contiguous [4, capacity]",
          shape_text(t.query));
  require(t.counts.numel() >= kPlanCounts, "counts", "[16]", shape_text(t.counts));

  PlanView p{};
  p.counts = t.counts.const_data_ptr<int32_t>();
  p.slots = t.slots.const_data_ptr<int32_t>();
  p.query_index = t.query.const_data_ptr<int32_t>();
  p.query_pos = p.query_index + t.query.size(1);
  p.query_depth = p.query_pos + t.query.size(1);
  p.segment = reinterpret_cast<const PlanSegment*>(t.segment.const_data_ptr<int32_t>());
  p.item = reinterpret_cast<const PlanItem*>(t.item.const_data_ptr<int32_t>());
  if (t.item_query.has_value()) {
    check_table(*t.item_query, "item_query", q, "[capacity]", 0);
    p.item_query = t.item_query->const_data_ptr<int32_t>();
  }
  p.task = reinterpret_cast<const PlanTask*>(t.task.const_data_ptr<int32_t>());
  p.merge_ptr = t.merge_ptr.const_data_ptr<int32_t>();
  p.merge_row = t.merge_row.const_data_ptr<int32_t>();
  p.num_queries = static_cast<int32_t>(q.size(0));
  p.num_tasks = static_cast<int32_t>(t.task.size(0));
  p.num_partials = by_blocks ? 0 : static_cast<int32_t>(t.merge_row.numel());
  p.choices = by_blocks ? static_cast<int32_t>(t.merge_row.size(2)) : 0;
  p.num_places = static_cast<int32_t>(t.slots.numel());
  return p;
}

// Every index of the plan is checked against what it indexes, so that no kernel can leave its arrays. This
// reads each key's slot once: 4 bytes per key, against kilobytes of K and V. Plans on a GPU are not looked
// at: that would wait for everything before.
void check_plan(PlanView& p, const PlanTensors& t, int64_t num_rows_q, int64_t num_slots,
                int64_t num_kv_heads) {
  const int64_t queries = p.counts[kNumQueries], segments = p.counts[kNumSegments],
                items = p.counts[kNumItems], tasks = p.counts[kNumTasks], partials = p.counts[kNumPartials];
  require(queries == num_rows_q, "q", text("[", queries, ", Hq, D] (the plan's queries)"), num_rows_q,
          " rows");
  auto within = [](int64_t count, int64_t capacity, const char* name) {
    require(count >= 0 && count <= capacity, "counts", text("within the capacity of ", name), count, " of ",
            capacity);
  };
  within(queries, t.query.size(1), "query");
  if (p.choices == 0) within(queries, t.merge_ptr.numel() - 1, "merge_ptr");
  within(segments, t.segment.size(0), "segment");
  within(items, t.item.size(0), "item");
  within(tasks, t.task.size(0), "task");
  within(partials, p.choices > 0 ? 0 : t.merge_row.numel(), "merge_row");
  const int64_t listed = t.item_query.has_value() ? p.counts[kNumItemQueries] : 0;
  if (t.item_query.has_value()) within(listed, t.item_query->numel(), "item_query");

  p.num_queries = static_cast<int32_t>(queries);
  p.num_tasks = static_cast<int32_t>(tasks);
  p.num_partials = static_cast<int32_t>(partials);

  auto range = [](int64_t begin, int64_t end, int64_t low, int64_t high, const char* name) {
    require(begin >= low && begin <= end && end <= high, name, text("within [", low, ", ", high, ")"), begin,
            " to ", end);
  };
  int32_t worst = -1, least = 0;
  for (int64_t i = 0; i < segments; ++i) {
    const PlanSegment& s = p.segment[i];
    range(s.begin, int64_t{s.begin} + s.length, 0, t.slots.numel(), "segment");
    const int32_t* slot = p.slots + s.begin;
    for (int32_t k = 0; k < s.length; ++k) {
      worst = std::max(worst, slot[k]);
      least = std::min(least, slot[k]);
    }
  }
  require(worst < num_slots && least >= 0, "slots", text("in [0, ", num_slots, ") (the rows of k)"),
          worst < num_slots ? least : worst);
  for (int64_t i = 0; i < queries; ++i) {
    require(p.query_index[i] >= 0 && p.query_index[i] < queries, "query",
            text("an index into q's ", queries, " rows"), p.query_index[i]);
  }
  for (int64_t i = 0; i < tasks; ++i) {
    const PlanTask& task = p.task[i];
    range(task.query_begin, task.query_end, 0, p.choices > 0 ? listed : queries, "task");
    range(task.item_begin, task.item_end, 0, items, "task");
    require(task.kv_head >= (p.choices > 0 ? 0 : -1) && task.kv_head < num_kv_heads, "task",
            text("of a KV head below ", num_kv_heads), task.kv_head);
    const int32_t count = task.query_end - task.query_begin;
    if (p.choices == 0 && task.partial_begin >= 0)
      range(task.partial_begin, int64_t{task.partial_begin} + count, 0, partials, "task");
    p.max_task_queries = std::max(p.max_task_queries, count);
    for (int32_t k = task.item_begin; k < task.item_end; ++k) {
      range(p.item[k].segment_begin, p.item[k].segment_end, 0, segments, "item");
      if (p.item_query == nullptr) {
        range(p.item[k].query_begin, p.item[k].query_end, task.query_begin, task.query_end, "item");
        continue;
      }
      range(p.item[k].query_begin, p.item[k].query_end, 0, listed, "item");
      const int32_t *first = p.item_query + p.item[k].query_begin, *last = p.item_query + p.item[k].query_end;
      bool ascending = true;
      for (const int32_t* j = first; j + 1 < last; ++j) ascending &= j[0] < j[1];
      require(ascending, "item_query", "ascending in every item", "item ", k);
      const bool any_query = p.choices > 0;
      if (first < last)
        range(first[0], int64_t{last[-1]} + 1, any_query ? 0 : task.query_begin,
              any_query ? queries : task.query_end, "item_query");
    }
  }
  for (int64_t i = 0; p.choices > 0 && i < listed; ++i)
    require(p.merge_row[i] >= -1 && p.merge_row[i] < listed, "merge_row", text("below ", listed),
            p.merge_row[i]);
  if (partials > 0) {
    for (int64_t i = 0; i < queries; ++i) range(p.merge_ptr[i], p.merge_ptr[i + 1], 0, partials, "merge_ptr");
    for (int64_t i = 0; i < partials; ++i) {
      require(p.merge_row[i] >= 0 && p.merge_row[i] < partials, "merge_row", text("below ", partials),
              p.merge_row[i]);
    }
  }
}

}  // namespace

Strided strided(const Tensor& t, const char* name) {
  require(t.size(2) == 0 || t.stride(2) == 1 || t.size(2) == 1, name, "contiguous in its last dimension",
          "stride ", t.stride(2));
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

AttendParams make_params(const Inputs& in, double scale, double softcap, int64_t window) {
  const Tensor &q = in.q, &k = in.k, &v = in.v;
  const PlanTensors& plan = in.plan;
  const std::optional<Tensor>& sinks = in.sinks;
  check_device(q, "q");
  check_device(k, "k", q, "q");
  check_device(v, "v", q, "q");
  check_dim(q, "q", "[Nq, Hq, D]", 3);
  check_dim(k, "k", "[slots, Hk, D]", 3);
  check_dim(v, "v", "[slots, Hk, Dv]", 3);
  AttendParams p{};
  p.dtype = check_element(q, "q", runs_float64());
  check_dtype(k, "k", {q.scalar_type()});
  check_dtype(v, "v", {q.scalar_type()});
  p.num_q_heads = static_cast<int32_t>(q.size(1));
  p.num_kv_heads = static_cast<int32_t>(k.size(1));
  p.head_dim = static_cast<int32_t>(q.size(2));
  p.v_head_dim = static_cast<int32_t>(v.size(2));
  p.num_slots = static_cast<int32_t>(k.size(0));
  require(k.size(2) == q.size(2), "k", text("of q's head_dim ", q.size(2)), k.size(2));
  require(p.head_dim > 0, "head_dim", "at least 1", p.head_dim);
  require(p.v_head_dim > 0, "v's head_dim", "at least 1", p.v_head_dim);
  require(v.size(0) == k.size(0) && v.size(1) == k.size(1), "v",
          text("[", k.size(0), ", ", k.size(1), ", Dv] like k"), shape_text(v));
  require(p.num_kv_heads > 0 && p.num_q_heads > 0 && p.num_q_heads % p.num_kv_heads == 0, "q",
          text("of a multiple of k's ", p.num_kv_heads, " heads"), p.num_q_heads);
  require(std::isfinite(scale), "scale", "finite", scale);
  require(softcap >= 0 && std::isfinite(softcap), "softcap", "finite and at least 0 (0: none)", softcap);
  require(window >= 0 && window <= INT32_MAX, "window", "at least 0 (0: none) and below 2^31", window);
  p.plan = view_tables(plan, q);
  if (q.is_cpu()) {
    const PlanView capacity = p.plan;
    check_plan(p.plan, plan, q.size(0), k.size(0), k.size(1));
    require(p.plan.choices == 0 || emulator_in_use() != nullptr, "merge_row", "[capacity] on the CPU",
            shape_text(plan.merge_row));
    if (emulator_in_use() != nullptr) p.plan = capacity;  // GPU kernels read the counts themselves
  }
  require(p.plan.choices == 0 || (plan.merge_row.size(0) == k.size(1) && window == 0), "merge_row",
          text("[", k.size(1), ", Nq, n], and window 0, in a plan by blocks"), shape_text(plan.merge_row));
  p.q = strided(q, "q");
  p.k = strided(k, "k");
  p.v = strided(v, "v");
  p.scale = scale;
  p.softcap = softcap;
  p.window = static_cast<int32_t>(window);
  if (sinks.has_value()) {
    check_device(*sinks, "sinks", q, "q");
    check_dtype(*sinks, "sinks", {state_type(p.dtype)});
    check_shape(*sinks, "sinks", "[Hq]", {p.num_q_heads});
    check_contiguous(*sinks, "sinks");
    p.sinks = sinks->const_data_ptr();
  }
  return p;
}

void name_inputs(GpuLaunch& gpu, const Inputs& in) {
  gpu.reads(in.q, "q");
  gpu.reads(in.k, "k");
  gpu.reads(in.v, "v");
  gpu.reads(in.plan.slots, "slots");
  gpu.reads(in.plan.query, "query");
  gpu.reads(in.plan.segment, "segment");
  gpu.reads(in.plan.item, "item");
  gpu.reads(in.plan.task, "task");
  gpu.reads(in.plan.merge_ptr, "merge_ptr");
  gpu.reads(in.plan.merge_row, "merge_row");
  gpu.reads(in.plan.counts, "counts");
  if (in.plan.item_query.has_value()) gpu.reads(*in.plan.item_query, "item_query");
  if (in.sinks.has_value()) gpu.reads(*in.sinks, "sinks");
}

}  // namespace palmette
