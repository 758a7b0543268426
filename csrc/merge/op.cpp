// SPDX-License-Identifier: Apache-2.0
// merge_state and merge_states: checks, allocation, and the choice of the body. The equations are in
// kernel_cpu.cpp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "core/backend.h"
#include "core/checks.h"
#include "core/gpu.h"
#include "merge/params.h"

namespace palmette {
namespace {

bool rows_are_contiguous(const Tensor& t) { return t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1; }

// The length of the longest row.
template <class Index>
int64_t check_indptr(const Index* indptr, int64_t num_rows, int64_t num_states) {
  require(indptr[0] == 0, "indptr[0]", 0, indptr[0]);
  int64_t longest = 0;
  for (int64_t n = 0; n < num_rows; ++n) {
    require(indptr[n] <= indptr[n + 1], "indptr", "non-decreasing", indptr[n + 1], " after ", indptr[n],
            " at ", n + 1);
    longest = std::max<int64_t>(longest, indptr[n + 1] - indptr[n]);
  }
  require(indptr[num_rows] == num_states, "indptr[N]", text(num_states, ", the number of states"),
          indptr[num_rows]);
  return longest;
}

// What a list of states and its gradient share. The tensors passed in own the memory that the result points
// to; `out` and `lse` are left to the caller.
MergeParams check_states(Tensor& outs, const Tensor& lses, std::optional<Tensor>& indptr, bool base2) {
  MergeParams p{};
  p.base2 = base2;
  const bool ragged = indptr.has_value();
  check_device(outs, "outs");
  check_device(lses, "lses", outs, "outs");
  check_dim(outs, "outs", ragged ? "[nnz, H, Dv]" : "[N, S, H, Dv]", ragged ? 3 : 4);
  p.dtype = check_element(outs, "outs", runs_float64());
  check_dtype(lses, "lses", {p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float});
  p.num_heads = outs.size(outs.dim() - 2);
  p.head_dim = outs.size(outs.dim() - 1);
  if (!rows_are_contiguous(outs)) outs = torch::stable::contiguous(outs);

  const int state = ragged ? 0 : 1;
  p.outs_state = outs.stride(state);
  p.outs_head = outs.stride(state + 1);
  if (ragged) {
    check_shape(lses, "lses", "[nnz, H]", {outs.size(0), p.num_heads});
    check_device(*indptr, "indptr", outs, "outs");
    check_dtype(*indptr, "indptr", {ScalarType::Int, ScalarType::Long});
    require(indptr->dim() == 1 && indptr->size(0) >= 1, "indptr", "[N + 1]", shape_text(*indptr));
    *indptr = torch::stable::contiguous(*indptr);
    p.num_queries = indptr->size(0) - 1;
    // On a GPU nobody looks at the values: that would wait for everything before.
    const bool look = indptr->is_cpu();
    if (indptr->scalar_type() == ScalarType::Int) {
      p.indptr32 = static_cast<const int32_t*>(indptr->const_data_ptr());
      if (look) p.num_states = check_indptr(p.indptr32, p.num_queries, outs.size(0));
    } else {
      p.indptr64 = static_cast<const int64_t*>(indptr->const_data_ptr());
      if (look) p.num_states = check_indptr(p.indptr64, p.num_queries, outs.size(0));
    }
  } else {
    check_shape(lses, "lses", "[N, S, H]", {outs.size(0), outs.size(1), p.num_heads});
    p.num_queries = outs.size(0);
    p.num_states = outs.size(1);
    p.outs_query = outs.stride(0);
    p.lses_query = lses.stride(0);
  }
  p.lses_state = lses.stride(state);
  p.lses_head = lses.stride(state + 1);
  p.outs = outs.const_data_ptr();
  p.lses = lses.const_data_ptr();
  return p;
}

// Elements from a to b: a pair of tensors of one layout is a list of two states with this stride.
int64_t distance(const Tensor& a, const Tensor& b) {
  const auto from = reinterpret_cast<intptr_t>(a.const_data_ptr()),
             to = reinterpret_cast<intptr_t>(b.const_data_ptr());
  return (to - from) / static_cast<intptr_t>(a.element_size());
}

bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.stride(i) != b.stride(i)) return false;
  }
  const auto from = reinterpret_cast<intptr_t>(a.const_data_ptr()),
             to = reinterpret_cast<intptr_t>(b.const_data_ptr());
  return (to - from) % static_cast<intptr_t>(a.element_size()) == 0;
}

MergeParams check_pair(Tensor& out_a, Tensor& lse_a, Tensor& out_b, Tensor& lse_b, bool base2) {
  MergeParams p{};
  p.base2 = base2;
  check_device(out_a, "out_a");
  check_device(lse_a, "lse_a", out_a, "out_a");
  check_device(out_b, "out_b", out_a, "out_a");
  check_device(lse_b, "lse_b", out_a, "out_a");
  check_dim(out_a, "out_a", "[N, H, Dv]", 3);
  p.dtype = check_element(out_a, "out_a", runs_float64());
  p.num_queries = out_a.size(0);
  p.num_states = 2;
  p.num_heads = out_a.size(1);
  p.head_dim = out_a.size(2);
  const ScalarType lse_type = p.dtype == DType::f64 ? ScalarType::Double : ScalarType::Float;
  check_dtype(lse_a, "lse_a", {lse_type});
  check_dtype(lse_b, "lse_b", {lse_type});
  check_dtype(out_b, "out_b", {out_a.scalar_type()});
  check_shape(lse_a, "lse_a", "[N, H]", {p.num_queries, p.num_heads});
  check_shape(out_b, "out_b", "[N, H, Dv]", {p.num_queries, p.num_heads, p.head_dim});
  check_shape(lse_b, "lse_b", "[N, H]", {p.num_queries, p.num_heads});
  if (!rows_are_contiguous(out_a) || !same_layout(out_a, out_b)) {
    out_a = torch::stable::contiguous(out_a);
    out_b = torch::stable::contiguous(out_b);
  }
  if (!same_layout(lse_a, lse_b)) {
    lse_a = torch::stable::contiguous(lse_a);
    lse_b = torch::stable::contiguous(lse_b);
  }
  p.outs = out_a.const_data_ptr();
  p.outs_query = out_a.stride(0);
  p.outs_state = distance(out_a, out_b);
  p.outs_head = out_a.stride(1);
  p.lses = lse_a.const_data_ptr();
  p.lses_query = lse_a.stride(0);
  p.lses_state = distance(lse_a, lse_b);
  p.lses_head = lse_a.stride(1);
  return p;
}

// A tensor that kernels read or write, and what it is called.
struct Named {
  const Tensor& tensor;
  const char* name;
};

std::tuple<Tensor, Tensor> forward(MergeParams& p, std::initializer_list<Named> states) {
  const Tensor &outs = states.begin()[0].tensor, &lses = states.begin()[1].tensor;
  Tensor out = torch::stable::new_empty(outs, {p.num_queries, p.num_heads, p.head_dim});
  Tensor lse = torch::stable::new_empty(lses, {p.num_queries, p.num_heads});
  p.out = out.mutable_data_ptr();
  p.lse = lse.mutable_data_ptr();
  if (GpuLaunch gpu(outs); gpu) {
    for (const Named& state : states) gpu.reads(state.tensor, state.name);
    gpu.writes(out, "out");
    gpu.writes(lse, "lse");
    gpu.run("merge_states", p);
  } else {
    dispatch_isa([&]<Isa isa>() { merge_states<isa>(p); });
  }
  return {out, lse};
}

// The result of the forward and its gradient, for both forms; the caller adds where douts and dlses go.
MergeBackwardParams check_gradient(const MergeParams& p, Tensor& dout, Tensor& dlse, Tensor& out, Tensor& lse,
                                   const Tensor& like, ScalarType lse_type) {
  const ScalarType type = like.scalar_type();
  struct Argument {
    Tensor& tensor;
    const char* name;
    bool state;
  };
  for (const Argument& a : {Argument{dout, "dout", true}, Argument{out, "out", true},
                            Argument{dlse, "dlse", false}, Argument{lse, "lse", false}}) {
    check_device(a.tensor, a.name, like, "the states");
    check_dtype(a.tensor, a.name, {a.state ? type : lse_type});
    if (a.state) {
      check_shape(a.tensor, a.name, "[N, H, Dv]", {p.num_queries, p.num_heads, p.head_dim});
    } else {
      check_shape(a.tensor, a.name, "[N, H]", {p.num_queries, p.num_heads});
    }
    a.tensor = torch::stable::contiguous(a.tensor);
  }
  MergeBackwardParams b{};
  b.forward = p;
  b.forward.out = out.mutable_data_ptr();
  b.forward.lse = lse.mutable_data_ptr();
  b.dout = dout.const_data_ptr();
  b.dlse = dlse.const_data_ptr();
  return b;
}

// The gradient's kernels. `reads` and `writes` name everything but dout, dlse, out and lse.
void backward(const MergeBackwardParams& b, const Tensor& dout, const Tensor& dlse, const Tensor& out,
              const Tensor& lse, std::initializer_list<Named> reads, std::initializer_list<Named> writes) {
  if (GpuLaunch gpu(dout); gpu) {
    for (const Named& t : {Named{dout, "dout"}, Named{dlse, "dlse"}, Named{out, "out"}, Named{lse, "lse"}})
      gpu.reads(t.tensor, t.name);
    for (const Named& t : reads) gpu.reads(t.tensor, t.name);
    for (const Named& t : writes) gpu.writes(t.tensor, t.name);
    gpu.run("merge_states_backward", b);
  } else {
    dispatch_isa([&]<Isa isa>() { merge_states_backward<isa>(b); });
  }
}

std::tuple<Tensor, Tensor> merge_states_op(Tensor outs, const Tensor& lses, std::optional<Tensor> indptr,
                                           bool base2) {
  MergeParams p = check_states(outs, lses, indptr, base2);
  if (!indptr.has_value()) return forward(p, {{outs, "outs"}, {lses, "lses"}});
  return forward(p, {{outs, "outs"}, {lses, "lses"}, {*indptr, "indptr"}});
}

std::tuple<Tensor, Tensor> merge_state_op(Tensor out_a, Tensor lse_a, Tensor out_b, Tensor lse_b,
                                          bool base2) {
  MergeParams p = check_pair(out_a, lse_a, out_b, lse_b, base2);
  return forward(p, {{out_a, "out_a"}, {lse_a, "lse_a"}, {out_b, "out_b"}, {lse_b, "lse_b"}});
}

std::tuple<Tensor, Tensor> merge_states_backward_op(Tensor dout, Tensor dlse, Tensor outs, const Tensor& lses,
                                                    std::optional<Tensor> indptr, Tensor out, Tensor lse,
                                                    bool base2) {
  const MergeParams p = check_states(outs, lses, indptr, base2);
  MergeBackwardParams b = check_gradient(p, dout, dlse, out, lse, outs, lses.scalar_type());
  const bool ragged = indptr.has_value();
  const int64_t first = outs.size(0);
  Tensor douts = ragged ? torch::stable::new_empty(outs, {first, p.num_heads, p.head_dim})
                        : torch::stable::new_empty(outs, {first, p.num_states, p.num_heads, p.head_dim});
  Tensor dlses = ragged ? torch::stable::new_empty(lses, {first, p.num_heads})
                        : torch::stable::new_empty(lses, {first, p.num_states, p.num_heads});
  b.douts = douts.mutable_data_ptr();
  b.douts_state = p.num_heads * p.head_dim;
  b.douts_query = ragged ? 0 : p.num_states * b.douts_state;
  b.dlses = dlses.mutable_data_ptr();
  b.dlses_state = p.num_heads;
  b.dlses_query = ragged ? 0 : p.num_states * b.dlses_state;
  backward(b, dout, dlse, out, lse,
           {{outs, "outs"}, {lses, "lses"}, {ragged ? *indptr : lses, ragged ? "indptr" : "lses"}},
           {{douts, "douts"}, {dlses, "dlses"}});
  return {douts, dlses};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_state_backward_op(Tensor dout, Tensor dlse, Tensor out_a,
                                                                   Tensor lse_a, Tensor out_b, Tensor lse_b,
                                                                   Tensor out, Tensor lse, bool base2) {
  const MergeParams p = check_pair(out_a, lse_a, out_b, lse_b, base2);
  MergeBackwardParams b = check_gradient(p, dout, dlse, out, lse, out_a, lse_a.scalar_type());
  Tensor dout_a = torch::stable::new_empty(dout, {p.num_queries, p.num_heads, p.head_dim});
  Tensor dout_b = torch::stable::new_empty(dout, {p.num_queries, p.num_heads, p.head_dim});
  Tensor dlse_a = torch::stable::new_empty(dlse, {p.num_queries, p.num_heads});
  Tensor dlse_b = torch::stable::new_empty(dlse, {p.num_queries, p.num_heads});
  b.douts = dout_a.mutable_data_ptr();
  b.douts_query = p.num_heads * p.head_dim;
  b.douts_state = distance(dout_a, dout_b);
  b.dlses = dlse_a.mutable_data_ptr();
  b.dlses_query = p.num_heads;
  b.dlses_state = distance(dlse_a, dlse_b);
  backward(b, dout, dlse, out, lse, {{out_a, "out_a"}, {lse_a, "lse_a"}, {out_b, "out_b"}, {lse_b, "lse_b"}},
           {{dout_a, "dout_a"}, {dlse_a, "dlse_a"}, {dout_b, "dout_b"}, {dlse_b, "dlse_b"}});
  return {dout_a, dlse_a, dout_b, dlse_b};
}

template <class Library>
void implement(Library& m) {
  m.impl("merge_state", TORCH_BOX(&merge_state_op));
  m.impl("merge_state_backward", TORCH_BOX(&merge_state_backward_op));
  m.impl("merge_states", TORCH_BOX(&merge_states_op));
  m.impl("merge_states_backward", TORCH_BOX(&merge_states_backward_op));
}

}  // namespace
}  // namespace palmette

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { palmette::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { palmette::implement(m); }
