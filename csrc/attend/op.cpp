// SPDX-License-Identifier: Apache-2.0
// attend, attend_out, attend_backward: what they allocate, and what the kernels are told.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "attend/inputs.h"
#include "attend/key_tiles.h"
#include "attend/op.h"
#include "attend/units.h"
#include "core/backend.h"
#include "core/large.h"

namespace palmette {

namespace {

// Partial states of a plan by blocks may take so much memory, or what one KV head needs.
int64_t partial_bytes() {
  const char* given = std::getenv("PALMETTE_PARTIAL_BYTES");
  const int64_t bytes = given == nullptr ? 0 : std::strtoll(given, nullptr, 10);
  return bytes > 0 ? bytes : int64_t{1} << 30;
}

// Partial states of a plan by blocks and one KV head: rows that each have `bytes`. Returns how many there are
// where KV heads take turns, so many of them at a time as p.head_count now says.
int64_t rows_by_blocks(AttendParams& p, int64_t bytes) {
  const int64_t of_head = int64_t{p.plan.num_queries} * p.plan.choices * (p.num_q_heads / p.num_kv_heads);
  p.head_count = static_cast<int32_t>(
      std::clamp<int64_t>(partial_bytes() / std::max<int64_t>(1, of_head * bytes), 1, p.num_kv_heads));
  return p.head_count * of_head;
}

void run_forward(AttendParams& p, const Inputs& in, const Tensor& out, const Tensor& lse) {
  const Tensor& q = in.q;
  p.out = strided(out, "out");
  p.lse = lse.mutable_data_ptr();
  const ScalarType state = state_type(p.dtype);
  Tensor partial_out, partial_max, partial_sum;
  const bool by_blocks = p.plan.choices > 0, partials = by_blocks || p.plan.num_partials > 0;
  if (partials) {
    const int64_t element = static_cast<int64_t>(q.element_size());
    const int64_t rows = by_blocks ? rows_by_blocks(p, p.v_head_dim * element + 8)
                                   : int64_t{p.plan.num_partials} * p.num_q_heads;
    partial_out = torch::stable::new_empty(q, {rows, p.v_head_dim}, by_blocks ? q.scalar_type() : state);
    partial_max = torch::stable::new_empty(q, {rows}, state);
    partial_sum = torch::stable::new_empty(q, {rows}, state);
    p.partial_out = partial_out.mutable_data_ptr();
    p.partial_max = partial_max.mutable_data_ptr();
    p.partial_sum = partial_sum.mutable_data_ptr();
  }
  if (GpuLaunch gpu(q); gpu) {
    name_inputs(gpu, in);
    gpu.writes(out, "out");
    gpu.writes(lse, "lse");
    if (partials) {
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

}  // namespace

std::tuple<Tensor, Tensor> attend_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slots,
                                     const Tensor& query, const Tensor& segment, const Tensor& item,
                                     const Tensor& task, const Tensor& merge_ptr, const Tensor& merge_row,
                                     const Tensor& counts, const std::optional<Tensor>& sinks, double scale,
                                     double softcap, int64_t window,
                                     const std::optional<Tensor>& item_query) {
  const Inputs in{
      q, k, v, {slots, query, segment, item, task, merge_ptr, merge_row, counts, item_query}, sinks};
  AttendParams p = make_params(in, scale, softcap, window);
  Tensor out = new_large(q, {q.size(0), q.size(1), v.size(2)});
  Tensor lse = torch::stable::new_empty(q, {q.size(0), q.size(1)}, state_type(p.dtype));
  run_forward(p, in, out, lse);
  return {out, lse};
}

namespace {

void attend_out_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& slots,
                   const Tensor& query, const Tensor& segment, const Tensor& item, const Tensor& task,
                   const Tensor& merge_ptr, const Tensor& merge_row, const Tensor& counts,
                   const std::optional<Tensor>& sinks, double scale, double softcap, int64_t window,
                   const Tensor& out, const Tensor& lse, const std::optional<Tensor>& item_query) {
  const Inputs in{
      q, k, v, {slots, query, segment, item, task, merge_ptr, merge_row, counts, item_query}, sinks};
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

// Where the gradients of K and V are added to, if the caller has said so.
struct Sums {
  const Tensor &dk, &dv;
};

Tensor to_dtype(const Tensor& t, ScalarType dtype) {
  return t.scalar_type() == dtype ? t : torch::stable::to(t, dtype);
}

// Adds `more` [groups - 1, ..] to `sum`, in their order.
void add_groups(const Tensor& sum, const Tensor& more) {
  const int64_t n = sum.numel(), groups = n == 0 ? 0 : more.numel() / n;
  const auto add = [&](auto* to, const auto* from) {
    for (int64_t g = 0; g < groups; ++g, from += n) {
      for (int64_t i = 0; i < n; ++i) to[i] += from[i];
    }
  };
  if (sum.scalar_type() == ScalarType::Double) {
    add(static_cast<double*>(sum.mutable_data_ptr()), static_cast<const double*>(more.const_data_ptr()));
  } else {
    add(static_cast<float*>(sum.mutable_data_ptr()), static_cast<const float*>(more.const_data_ptr()));
  }
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;  // dq, dk, dv, dsinks

// What the kernels of dk and dv need besides them; empty where they need nothing.
struct KeyScratch {
  Tensor index, part_dk, part_dv, part_met;

  KeyScratch(AttendBackwardParams& b, const Inputs& in, GpuLaunch& gpu) {
    const AttendParams& p = b.forward;
    const Tensor& q = in.q;
    const IndexSizes sizes =
        index_sizes(p, in.plan.segment.size(0), in.plan.item.size(0), in.plan.task.size(0));
    if (sizes.capacity == 0) return;
    index = torch::stable::new_empty(q, {sizes.words()}, ScalarType::Int);
    b.index = sizes.lay_out(index.mutable_data_ptr<int32_t>());
    gpu.writes(index, "index");
    if (sizes.extra == 0) return;
    const auto part = [&](int64_t width, ScalarType dtype, const char* name) {
      Tensor t = torch::stable::new_empty(q, {sizes.slots(), p.num_kv_heads, sizes.keys, width}, dtype);
      gpu.writes(t, name);
      return t;
    };
    part_dk = part(p.head_dim, ScalarType::Float, "part_dk");
    part_dv = part(p.v_head_dim, ScalarType::Float, "part_dv");
    part_met = part(1, ScalarType::Int, "part_met");
    b.part_dk = part_dk.mutable_data_ptr<float>();
    b.part_dv = part_dv.mutable_data_ptr<float>();
    b.part_met = part_met.mutable_data_ptr<int32_t>();
  }
};

// Every gradient has one owner, which writes it in its final dtype.
Gradients run_backward_gpu(GpuLaunch& gpu, AttendBackwardParams& b, const Inputs& in, const Tensor& dout,
                           const Tensor& dlse, const Tensor& out, const Tensor& lse, const Sums* sums) {
  const Tensor& q = in.q;
  const AttendParams& p = b.forward;
  const auto zeros_like = [&](const Tensor& t) {
    return torch::stable::new_zeros(q, {t.size(0), t.size(1), t.size(2)});
  };
  Tensor dq = zeros_like(q);
  Tensor dk = sums == nullptr ? zeros_like(in.k) : sums->dk,
         dv = sums == nullptr ? zeros_like(in.v) : sums->dv;
  Tensor delta = torch::stable::new_empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  Tensor sink_rows,
      dsinks = torch::stable::new_zeros(q, {in.sinks.has_value() ? q.size(1) : 0}, ScalarType::Float);
  b.dq = dq.mutable_data_ptr();
  if (sums == nullptr) {
    b.dk = dk.mutable_data_ptr();
    b.dv = dv.mutable_data_ptr();
  } else {
    b.dk_sum = dk.mutable_data_ptr<float>();
    b.dv_sum = dv.mutable_data_ptr<float>();
  }
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
  Tensor part_dq;
  if (p.plan.choices > 0) {
    const int64_t rows = rows_by_blocks(b.forward, p.head_dim * static_cast<int64_t>(sizeof(float)));
    part_dq = torch::stable::new_empty(q, {rows, p.head_dim}, ScalarType::Float);
    b.part_dq = part_dq.mutable_data_ptr<float>();
    gpu.writes(part_dq, "part_dq");
  }
  const KeyScratch scratch(b, in, gpu);
  gpu.run("attend_backward", b);
  return {dq, dk, dv, dsinks};
}

Gradients run_backward(const Tensor& dout_, const std::optional<Tensor>& dlse_, const Inputs& in,
                       const Tensor& out, const Tensor& lse, double scale, double softcap, int64_t window,
                       const Sums* sums) {
  AttendBackwardParams b{};
  AttendParams& p = b.forward;
  const Tensor &q = in.q, &k = in.k, &v = in.v;
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
  if (sums != nullptr) {
    const auto check_sum = [&](const Tensor& sum, const char* name, const Tensor& like) {
      check_device(sum, name, q, "q");
      check_dtype(sum, name, {state});
      check_shape(sum, name, "[slots, Hk, D]", {like.size(0), like.size(1), like.size(2)});
      check_contiguous(sum, name);
    };
    check_sum(sums->dk, "dk", k);
    check_sum(sums->dv, "dv", v);
  }
  if (GpuLaunch gpu(q); gpu) return run_backward_gpu(gpu, b, in, dout, dlse, out, lse, sums);
  int32_t groups = 1;
  const std::vector<AttendUnit> units = backward_units(p, groups);
  p.units = units.data();
  p.num_units = static_cast<int32_t>(units.size());

  const auto zeros_like = [&](const Tensor& t) {
    return torch::stable::new_zeros(q, {t.size(0), t.size(1), t.size(2)}, state);
  };
  const auto more = [&](const Tensor& t) {
    return torch::stable::new_zeros(q, {groups - 1, t.size(0), t.size(1), t.size(2)}, state);
  };
  Tensor dq = zeros_like(q), dk_more = more(k), dv_more = more(v);
  Tensor dk = sums == nullptr ? zeros_like(k) : sums->dk, dv = sums == nullptr ? zeros_like(v) : sums->dv;
  Tensor dsinks = torch::stable::new_zeros(q, {in.sinks.has_value() ? q.size(1) : 0}, state);
  b.dq = dq.mutable_data_ptr();
  b.dk = dk.mutable_data_ptr();
  b.dv = dv.mutable_data_ptr();
  b.dk_more = dk_more.mutable_data_ptr();
  b.dv_more = dv_more.mutable_data_ptr();
  Tensor sink_rows;
  if (in.sinks.has_value()) {
    sink_rows = torch::stable::new_zeros(q, {q.size(0), q.size(1)}, state);
    b.dsinks = sink_rows.mutable_data_ptr();
  }
  const int64_t group = p.num_q_heads / p.num_kv_heads;
  dispatch_isa([&]<Isa isa>() {
    p.scratch_bytes =
        attend_backward_scratch_bytes<isa>(p, std::max<int64_t>(1, p.plan.max_task_queries) * group);
    attend_backward<isa>(b);
  });
  add_groups(dk, dk_more);
  add_groups(dv, dv_more);
  if (in.sinks.has_value()) {  // rows in order, whatever the number of threads
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
  if (sums != nullptr) return {to_dtype(dq, dtype), dk, dv, dsinks};
  return {to_dtype(dq, dtype), to_dtype(dk, dtype), to_dtype(dv, dtype), dsinks};
}

Gradients attend_backward_op(const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q,
                             const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                             const Tensor& slots, const Tensor& query, const Tensor& segment,
                             const Tensor& item, const Tensor& task, const Tensor& merge_ptr,
                             const Tensor& merge_row, const Tensor& counts,
                             const std::optional<Tensor>& sinks, double scale, double softcap, int64_t window,
                             const std::optional<Tensor>& item_query) {
  const Inputs in{
      q, k, v, {slots, query, segment, item, task, merge_ptr, merge_row, counts, item_query}, sinks};
  return run_backward(dout, dlse, in, out, lse, scale, softcap, window, nullptr);
}

std::tuple<Tensor, Tensor> attend_backward_accumulate_op(
    const Tensor& dout, const std::optional<Tensor>& dlse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& slots, const Tensor& query, const Tensor& segment,
    const Tensor& item, const Tensor& task, const Tensor& merge_ptr, const Tensor& merge_row,
    const Tensor& counts, const std::optional<Tensor>& sinks, double scale, double softcap, int64_t window,
    const Tensor& dk, const Tensor& dv, const std::optional<Tensor>& item_query) {
  const Inputs in{
      q, k, v, {slots, query, segment, item, task, merge_ptr, merge_row, counts, item_query}, sinks};
  const Sums sums{dk, dv};
  Gradients all = run_backward(dout, dlse, in, out, lse, scale, softcap, window, &sums);
  return {std::get<0>(all), std::get<3>(all)};
}

template <class Library>
void implement(Library& m) {
  m.impl("attend", TORCH_BOX(&attend_op));
  m.impl("attend_out", TORCH_BOX(&attend_out_op));
  m.impl("attend_backward", TORCH_BOX(&attend_backward_op));
  m.impl("attend_backward_accumulate_", TORCH_BOX(&attend_backward_accumulate_op));
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { implement(m); }

}  // namespace palmette
