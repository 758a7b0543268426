// SPDX-License-Identifier: Apache-2.0
// attend, attend_out, attend_backward: checks, allocation and the division of work; the kernels do the rest.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "attend/params.h"
#include "core/backend.h"
#include "core/checks.h"
#include "core/gpu.h"
#include "core/parallel.h"

namespace palmette {

namespace {

// The plan arguments of every attend operator, in schema order.
struct PlanTensors {
  const Tensor &slots, &query, &segment, &item, &task, &merge_ptr, &merge_row, &counts;
};

void check_table(const Tensor& t, const char* name, const Tensor& q, const char* shape, int64_t columns) {
  check_device(t, name, q, "q");
  check_dtype(t, name, {ScalarType::Int});
  check_dim(t, name, shape, columns > 0 ? 2 : 1);
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
  check_table(t.merge_row, "merge_row", q, "[capacity]", 0);
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
  p.task = reinterpret_cast<const PlanTask*>(t.task.const_data_ptr<int32_t>());
  p.merge_ptr = t.merge_ptr.const_data_ptr<int32_t>();
  p.merge_row = t.merge_row.const_data_ptr<int32_t>();
  p.num_queries = static_cast<int32_t>(q.size(0));
  p.num_tasks = static_cast<int32_t>(t.task.size(0));
  p.num_partials = static_cast<int32_t>(t.merge_row.numel());
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
  within(queries, t.merge_ptr.numel() - 1, "merge_ptr");
  within(segments, t.segment.size(0), "segment");
  within(items, t.item.size(0), "item");
  within(tasks, t.task.size(0), "task");
  within(partials, t.merge_row.numel(), "merge_row");

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
    range(task.query_begin, task.query_end, 0, queries, "task");
    range(task.item_begin, task.item_end, 0, items, "task");
    require(task.kv_head >= -1 && task.kv_head < num_kv_heads, "task",
            text("of a KV head below ", num_kv_heads), task.kv_head);
    const int32_t count = task.query_end - task.query_begin;
    if (task.partial_begin >= 0)
      range(task.partial_begin, int64_t{task.partial_begin} + count, 0, partials, "task");
    p.max_task_queries = std::max(p.max_task_queries, count);
    for (int32_t k = task.item_begin; k < task.item_end; ++k) {
      range(p.item[k].segment_begin, p.item[k].segment_end, 0, segments, "item");
      range(p.item[k].query_begin, p.item[k].query_end, task.query_begin, task.query_end, "item");
    }
  }
  if (partials > 0) {
    for (int64_t i = 0; i < queries; ++i) range(p.merge_ptr[i], p.merge_ptr[i + 1], 0, partials, "merge_ptr");
    for (int64_t i = 0; i < partials; ++i) {
      require(p.merge_row[i] >= 0 && p.merge_row[i] < partials, "merge_row", text("below ", partials),
              p.merge_row[i]);
    }
  }
}

Strided strided(const Tensor& t, const char* name) {
  require(t.size(2) == 0 || t.stride(2) == 1 || t.size(2) == 1, name, "contiguous in its last dimension",
          "stride ", t.stride(2));
  return {const_cast<void*>(t.const_data_ptr()), t.stride(0), t.stride(1)};
}

ScalarType state_type(DType d) { return d == DType::f64 ? ScalarType::Double : ScalarType::Float; }

// What attend and attend_backward share.
struct Inputs {
  const Tensor &q, &k, &v;
  PlanTensors plan;
  const std::optional<Tensor>& sinks;
};

// Its checks; fills everything but out, lse, partials and units.
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
    if (emulator_in_use() != nullptr) p.plan = capacity;  // GPU kernels read the counts themselves
  }
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

// How many KV heads a worker takes at a time. In a token-major pool ([slots, Hk, D]) the heads of a token are
// neighbours, so a task whose items have few rows reads several heads per tile, while their packed rows fit
// the L2 cache and the states of the whole task (o) stay below half a megabyte; never so many that fewer than
// two units per worker are left to share out. No result depends on it.
int64_t heads_at_a_time(const AttendParams& p, const PlanTask& task) {
  constexpr int64_t kHotBytes = 192 << 10, kStateBytes = 512 << 10;
  const int64_t min_units = 2 * num_workers();
  if (p.k.token <= p.k.head) return 1;
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  int64_t widest = 1;
  for (int32_t i = task.item_begin; i < task.item_end; ++i) {
    widest = std::max<int64_t>(widest, (p.plan.item[i].query_end - p.plan.item[i].query_begin) * group);
  }
  const int64_t rows = std::max<int64_t>(1, (task.query_end - task.query_begin) * group);
  const int64_t heads = std::min({kHotBytes / (widest * (p.head_dim + p.v_head_dim) * 4),
                                  kStateBytes / (rows * p.v_head_dim * 4),
                                  p.num_kv_heads * int64_t{p.plan.num_tasks} / min_units});
  return std::clamp<int64_t>(heads, 1, p.num_kv_heads);
}

// About what a task costs per KV head: row-key pairs, where fetching a key counts as much as 16 rows.
int64_t task_work(const AttendParams& p, const PlanTask& task) {
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  int64_t work = 0;
  for (int32_t i = task.item_begin; i < task.item_end; ++i) {
    const PlanItem& item = p.plan.item[i];
    int64_t keys = 0;
    for (int32_t s = item.segment_begin; s < item.segment_end; ++s) keys += p.plan.segment[s].length;
    work += keys * ((item.query_end - item.query_begin) * group + 16);
  }
  return work;
}

// The largest units come first, so that workers finish together.
std::vector<AttendUnit> forward_units(const AttendParams& p) {
  std::vector<AttendUnit> units;
  std::vector<int64_t> work;
  for (int32_t t = 0; t < p.plan.num_tasks; ++t) {
    const PlanTask& task = p.plan.task[t];
    work.push_back(task_work(p, task));
    if (task.kv_head >= 0) {
      units.push_back({t, t + 1, task.kv_head, 1, 0});
      continue;
    }
    const int64_t heads = heads_at_a_time(p, task);
    const int64_t parts = (p.num_kv_heads + heads - 1) / heads;
    for (int64_t i = 0; i < parts; ++i) {
      const auto begin = static_cast<int32_t>(i * p.num_kv_heads / parts),
                 end = static_cast<int32_t>((i + 1) * p.num_kv_heads / parts);
      units.push_back({t, t + 1, begin, end - begin, 0});
    }
  }
  std::stable_sort(units.begin(), units.end(), [&](const AttendUnit& a, const AttendUnit& b) {
    return work[static_cast<size_t>(a.task_begin)] * a.head_count >
           work[static_cast<size_t>(b.task_begin)] * b.head_count;
  });
  return units;
}

// What kernels read of every attention.
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
  if (in.sinks.has_value()) gpu.reads(*in.sinks, "sinks");
}

void run_forward(AttendParams& p, const Inputs& in, const Tensor& out, const Tensor& lse) {
  const Tensor& q = in.q;
  p.out = strided(out, "out");
  p.lse = lse.mutable_data_ptr();
  const ScalarType state = state_type(p.dtype);
  Tensor partial_out, partial_max, partial_sum;
  if (p.plan.num_partials > 0) {
    partial_out = torch::stable::new_empty(q, {p.plan.num_partials, p.num_q_heads, p.v_head_dim}, state);
    partial_max = torch::stable::new_empty(q, {p.plan.num_partials, p.num_q_heads}, state);
    partial_sum = torch::stable::new_empty(q, {p.plan.num_partials, p.num_q_heads}, state);
    p.partial_out = partial_out.mutable_data_ptr();
    p.partial_max = partial_max.mutable_data_ptr();
    p.partial_sum = partial_sum.mutable_data_ptr();
  }
  if (GpuLaunch gpu(q); gpu) {
    name_inputs(gpu, in);
    gpu.writes(out, "out");
    gpu.writes(lse, "lse");
    if (p.plan.num_partials > 0) {
      gpu.writes(partial_out, "partial_out");
      gpu.writes(partial_max, "partial_max");
      gpu.writes(partial_sum, "partial_sum");
    }
    gpu.run("attend", p);
    return;
  }
  const std::vector<AttendUnit> units = forward_units(p);
  p.units = units.data();
  p.num_units = static_cast<int32_t>(units.size());
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  dispatch_isa([&]<Isa isa>() {
    p.scratch_bytes = attend_scratch_bytes<isa>(p, 1, 1);
    for (const AttendUnit& u : units) {
      const PlanTask& task = p.plan.task[u.task_begin];
      p.scratch_bytes =
          std::max(p.scratch_bytes,
                   attend_scratch_bytes<isa>(p, (task.query_end - task.query_begin) * group, u.head_count));
    }
    attend<isa>(p);
  });
}

std::tuple<Tensor, Tensor> attend_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slots,
                                     const Tensor& query, const Tensor& segment, const Tensor& item,
                                     const Tensor& task, const Tensor& merge_ptr, const Tensor& merge_row,
                                     const Tensor& counts, const std::optional<Tensor>& sinks, double scale,
                                     double softcap, int64_t window) {
  const Inputs in{q, k, v, {slots, query, segment, item, task, merge_ptr, merge_row, counts}, sinks};
  AttendParams p = make_params(in, scale, softcap, window);
  Tensor out = torch::stable::new_empty(q, {q.size(0), q.size(1), v.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, state_type(p.dtype));
  run_forward(p, in, out, lse);
  return {out, lse};
}

void attend_out_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slots,
                   const Tensor& query, const Tensor& segment, const Tensor& item, const Tensor& task,
                   const Tensor& merge_ptr, const Tensor& merge_row, const Tensor& counts,
                   const std::optional<Tensor>& sinks, double scale, double softcap, int64_t window,
                   const Tensor& out, const Tensor& lse) {
  const Inputs in{q, k, v, {slots, query, segment, item, task, merge_ptr, merge_row, counts}, sinks};
  AttendParams p = make_params(in, scale, softcap, window);
  check_device(out, "out", q, "q");
  check_device(lse, "lse", q, "q");
  check_dtype(out, "out", {q.scalar_type()});
  check_shape(out, "out", "[Nq, Hq, Dv]", {q.size(0), q.size(1), v.size(2)});
  check_dtype(lse, "lse", {state_type(p.dtype)});
  check_shape(lse, "lse", "[Nq, Hq]", {q.size(0), q.size(1)});
  check_contiguous(lse, "lse");
  run_forward(p, in, out, lse);
}

// Units of the backward pass: each KV head, or each KV head and group of tasks where heads are few. Tasks
// of the same rows stay together, because dQ has one owner. A group costs one copy of dK and dV.
std::vector<AttendUnit> backward_units(const AttendParams& p, int32_t& groups) {
  constexpr int32_t kMinUnits = 8;
  std::vector<int32_t> cuts;  // first tasks whose rows no earlier task touches
  int32_t reached = 0;
  int64_t total = 0;
  std::vector<int64_t> cost(static_cast<size_t>(p.plan.num_tasks));
  for (int32_t t = 0; t < p.plan.num_tasks; ++t) {
    const PlanTask& task = p.plan.task[t];
    if (task.query_begin >= reached) cuts.push_back(t);
    reached = std::max(reached, task.query_end);
    int64_t sum = 1;
    for (int32_t i = task.item_begin; i < task.item_end; ++i) {
      for (int32_t s = p.plan.item[i].segment_begin; s < p.plan.item[i].segment_end; ++s) {
        sum += int64_t{p.plan.segment[s].length} * (p.plan.item[i].query_end - p.plan.item[i].query_begin);
      }
    }
    cost[static_cast<size_t>(t)] = sum;
    total += sum;
  }
  const int32_t wanted = p.num_kv_heads >= kMinUnits ? 1 : 2;
  std::vector<int32_t> first{0};
  int64_t seen = 0;
  for (int32_t t = 0, c = 0; t < p.plan.num_tasks; ++t) {
    while (c < static_cast<int32_t>(cuts.size()) && cuts[static_cast<size_t>(c)] < t) ++c;
    const bool may_cut = c < static_cast<int32_t>(cuts.size()) && cuts[static_cast<size_t>(c)] == t;
    if (may_cut && t > 0 && static_cast<int32_t>(first.size()) < wanted &&
        seen * wanted >= total * static_cast<int64_t>(first.size())) {
      first.push_back(t);
    }
    seen += cost[static_cast<size_t>(t)];
  }
  groups = static_cast<int32_t>(first.size());
  first.push_back(p.plan.num_tasks);
  std::vector<AttendUnit> units;
  for (int32_t g = 0; g < groups; ++g) {
    for (int32_t h = 0; h < p.num_kv_heads; ++h)
      units.push_back({first[static_cast<size_t>(g)], first[static_cast<size_t>(g) + 1], h, 1, g});
  }
  return units;
}

Tensor finish_gradient(const Tensor& sum, ScalarType dtype) {
  Tensor t =
      sum.size(0) == 1 ? torch::stable::select(sum, 0, 0) : torch::stable::sum(sum, std::vector<int64_t>{0});
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dsinks

// Every gradient has one owner, which writes it in its final dtype.
Gradients run_backward_gpu(GpuLaunch& gpu, AttendBackwardParams& b, const Inputs& in, const Tensor& dout,
                           const Tensor& dlse, const Tensor& out, const Tensor& lse) {
  const Tensor& q = in.q;
  const AttendParams& p = b.forward;
  Tensor dq = torch::stable::new_zeros(q, {q.size(0), q.size(1), q.size(2)});
  Tensor dk = torch::stable::new_zeros(q, {in.k.size(0), in.k.size(1), in.k.size(2)});
  Tensor dv = torch::stable::new_zeros(q, {in.v.size(0), in.v.size(1), in.v.size(2)});
  Tensor delta = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Tensor sink_rows,
      dsinks = torch::stable::new_zeros(q, {in.sinks.has_value() ? q.size(1) : 0}, ScalarType::Float);
  b.dq = dq.mutable_data_ptr();
  b.dk = dk.mutable_data_ptr();
  b.dv = dv.mutable_data_ptr();
  b.delta = delta.mutable_data_ptr();
  name_inputs(gpu, in);
  gpu.reads(dout, "dout");
  if (b.dlse != nullptr) gpu.reads(dlse, "dlse");
  gpu.reads(out, "out");
  gpu.reads(lse, "lse");
  gpu.writes(dq, "dq");
  gpu.writes(dk, "dk");
  gpu.writes(dv, "dv");
  gpu.writes(delta, "delta");
  if (p.sinks != nullptr) {
    sink_rows = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
    b.dsinks = sink_rows.mutable_data_ptr();
    b.sink_sums = dsinks.mutable_data_ptr();
    gpu.writes(sink_rows, "sink_rows");
    gpu.writes(dsinks, "dsinks");
  }
  gpu.run("attend_backward", b);
  return {dq, dk, dv, dsinks};
}

Gradients attend_backward_op(const Tensor& dout_, const std::optional<Tensor>& dlse_, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                             const Tensor& slots, const Tensor& query, const Tensor& segment,
                             const Tensor& item, const Tensor& task, const Tensor& merge_ptr,
                             const Tensor& merge_row, const Tensor& counts,
                             const std::optional<Tensor>& sinks, double scale, double softcap,
                             int64_t window) {
  AttendBackwardParams b{};
  AttendParams& p = b.forward;
  const Inputs in{q, k, v, {slots, query, segment, item, task, merge_ptr, merge_row, counts}, sinks};
  p = make_params(in, scale, softcap, window);
  const ScalarType state = state_type(p.dtype);
  check_device(dout_, "dout", q, "q");
  check_device(out, "out", q, "q");
  check_device(lse, "lse", q, "q");
  if (dlse_.has_value()) check_device(*dlse_, "dlse", q, "q");
  check_dtype(dout_, "dout", {q.scalar_type()});
  check_shape(dout_, "dout", "[Nq, Hq, Dv]", {q.size(0), q.size(1), v.size(2)});
  check_dtype(out, "out", {q.scalar_type()});
  check_shape(out, "out", "[Nq, Hq, Dv]", {q.size(0), q.size(1), v.size(2)});
  check_dtype(lse, "lse", {state});
  check_shape(lse, "lse", "[Nq, Hq]", {q.size(0), q.size(1)});
  check_contiguous(lse, "lse");
  const Tensor dout = torch::stable::contiguous(dout_);
  Tensor dlse;
  if (dlse_.has_value()) {
    check_dtype(*dlse_, "dlse", {state});
    check_shape(*dlse_, "dlse", "[Nq, Hq]", {q.size(0), q.size(1)});
    dlse = torch::stable::contiguous(*dlse_);
    b.dlse = dlse.const_data_ptr();
  }
  p.out = strided(out, "out");
  p.lse = const_cast<void*>(lse.const_data_ptr());
  b.dout = strided(dout, "dout");
  if (GpuLaunch gpu(q); gpu) return run_backward_gpu(gpu, b, in, dout, dlse, out, lse);
  int32_t groups = 1;
  const std::vector<AttendUnit> units = backward_units(p, groups);
  p.units = units.data();
  p.num_units = static_cast<int32_t>(units.size());

  Tensor dq = torch::stable::new_zeros(q, {q.size(0), q.size(1), q.size(2)}, state);
  Tensor dk = torch::stable::new_zeros(q, {groups, k.size(0), k.size(1), k.size(2)}, state);
  Tensor dv = torch::stable::new_zeros(q, {groups, v.size(0), v.size(1), v.size(2)}, state);
  Tensor dsinks = torch::stable::new_zeros(q, {sinks.has_value() ? q.size(1) : 0}, state);
  b.dq = dq.mutable_data_ptr();
  b.dk = dk.mutable_data_ptr();
  b.dv = dv.mutable_data_ptr();
  Tensor sink_rows;
  if (sinks.has_value()) {
    sink_rows = torch::stable::new_zeros(q, {q.size(0), q.size(1)}, state);
    b.dsinks = sink_rows.mutable_data_ptr();
  }
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  dispatch_isa([&]<Isa isa>() {
    p.scratch_bytes =
        attend_backward_scratch_bytes<isa>(p, std::max<int64_t>(1, p.plan.max_task_queries) * group);
    attend_backward<isa>(b);
  });
  if (sinks.has_value()) {  // rows in order, whatever the number of threads
    auto add = [&]<class T>(T) {
      const T* rows = static_cast<const T*>(b.dsinks);
      T* sum = static_cast<T*>(dsinks.mutable_data_ptr());
      for (int64_t i = 0; i < q.size(0); ++i) {
        for (int64_t h = 0; h < q.size(1); ++h) sum[h] += rows[i * q.size(1) + h];
      }
    };
    if (state == ScalarType::Double) {
      add(double{});
    } else {
      add(float{});
    }
  }
  const ScalarType dtype = q.scalar_type();
  return {dq.scalar_type() == dtype ? dq : torch::stable::to(dq, dtype), finish_gradient(dk, dtype),
          finish_gradient(dv, dtype), dsinks};
}

template <class Library>
void implement(Library& m) {
  m.impl("attend", TORCH_BOX(&attend_op));
  m.impl("attend_out", TORCH_BOX(&attend_out_op));
  m.impl("attend_backward", TORCH_BOX(&attend_backward_op));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { implement(m); }

}  // namespace palmette
