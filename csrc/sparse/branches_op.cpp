// SPDX-License-Identifier: Apache-2.0
// sparse_branches: the gated sum of NSA's three branches (arXiv 2502.11089, equation 5) for few queries, in
// one call.
//
//   q, compressed keys --plan_varlen, attend--> out_cmp, lse
//   q, compressed keys, lse --select_blocks, plan_selection--> q, tokens --attend--> out_slc
//   q, tokens --plan_varlen with a window, attend--> out_win
//   out = g_cmp out_cmp + g_slc out_slc + g_win out_win
//
// Nothing here computes attention: it calls the operators that palmette/sparse_attention.py calls one by one.
// For the one query of a step of decoding, calling takes longer than computing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>

#include "attend/inputs.h"
#include "attend/op.h"
#include "core/backend.h"
#include "plan/ops.h"
#include "plan/tensors.h"
#include "sparse/op.h"
#include "sparse/params.h"

namespace palmette {

namespace {

struct Sequences {
  const Tensor &queries, &tokens;
  double scale;
};

std::tuple<Tensor, Tensor> meet(const Tensor& q, const Tensor& k, const Tensor& v, const PlanTables& plan,
                                double scale, int64_t window) {
  return std::apply(
      [&](const auto&... table) {
        return attend_op(q, k, v, table..., std::nullopt, scale, 0.0, window, std::nullopt);
      },
      plan);
}

// Causal attention to all tokens, or to the last `window` of them.
Tensor attend_tokens(const Sequences& s, const Tensor& q, const Tensor& k, const Tensor& v, int64_t window,
                     const std::optional<Tensor>& start) {
  const PlanTables plan = plan_varlen(s.queries, s.tokens, true, q.size(0), k.size(0), q.size(1), k.size(1),
                                      q.size(2), "cpu", -1, -1, std::nullopt, 1, 1, window, start);
  return std::get<0>(meet(q, k, v, plan, s.scale, window));
}

Tensor attend_blocks(const Sequences& s, const Tensor& q, const Tensor& k, const Tensor& v,
                     const Tensor& block_index, int64_t block_size, int64_t min_tile, int64_t max_tile,
                     const std::optional<Tensor>& start) {
  const auto [slots, query, segment, item, task, merge_ptr, merge_row, counts, item_query] = plan_selection(
      block_index, s.queries, s.tokens, k.size(0), block_size, min_tile, max_tile, -1, -1, -1, start);
  return std::get<0>(attend_op(q, k, v, slots, query, segment, item, task, merge_ptr, merge_row, counts,
                               std::nullopt, s.scale, 0.0, 0, item_query));
}

int64_t longest(const Tensor& indptr) {
  const IntArray ends = int_array(indptr, "cu_seqlens_k");
  int64_t most = 0;
  for (int64_t b = 0; b + 1 < ends.size; ++b) most = std::max(most, ends[b + 1] - ends[b]);
  return most;
}

Tensor sparse_branches_op(const Tensor& q, const Tensor& k_cmp, const Tensor& v_cmp, const Tensor& k_slc,
                          const Tensor& v_slc, const Tensor& k_win, const Tensor& v_win, const Tensor& gates,
                          const Tensor& q_indptr, const Tensor& cmp_indptr, const Tensor& token_indptr,
                          int64_t kernel_size, int64_t kernel_stride, int64_t block_size, int64_t topk,
                          int64_t init_blocks, int64_t local_blocks, int64_t window,
                          std::optional<double> given_scale, int64_t rows_per_block, int64_t tile_bytes,
                          const std::optional<Tensor>& cmp_start, const std::optional<Tensor>& slc_start,
                          const std::optional<Tensor>& win_start) {
  check_device(q, "q");
  check_dim(q, "q", "[Nq, Hq, D]", 3);
  for (const auto& [t, name, symbols] : {std::tuple{&k_cmp, "k_cmp", "[C, Hk, D]"},
                                         {&v_cmp, "v_cmp", "[C, Hk, Dv]"},
                                         {&k_slc, "k_slc", "[slots, Hk, D]"},
                                         {&v_slc, "v_slc", "[slots, Hk, Dv]"},
                                         {&k_win, "k_win", "[slots, Hk, D]"},
                                         {&v_win, "v_win", "[slots, Hk, Dv]"}}) {
    check_device(*t, name, q, "q");
    check_dtype(*t, name, {q.scalar_type()});
    check_dim(*t, name, symbols, 3);
    require(t->size(1) == k_cmp.size(1), name, text("of k_cmp's ", k_cmp.size(1), " heads"), t->size(1));
  }
  for (const Tensor* v : {&v_slc, &v_win}) {
    require(v->size(2) == v_cmp.size(2), "v_slc and v_win", text("of v_cmp's head_dim ", v_cmp.size(2)),
            v->size(2));
  }
  check_device(gates, "gates", q, "q");
  check_dtype(gates, "gates", {q.scalar_type()});
  check_contiguous(gates, "gates");
  check_dim(gates, "gates", "[Nq, 3, Hq or 1]", 3);
  require(
      gates.size(0) == q.size(0) && gates.size(1) == 3 && (gates.size(2) == 1 || gates.size(2) == q.size(1)),
      "gates", text("[", q.size(0), ", 3, ", q.size(1), " or 1]"), shape_text(gates));
  require(window > 0, "window", "at least 1", window);
  const int64_t heads = k_cmp.size(1), head_dim = q.size(2), v_head_dim = v_cmp.size(2);
  require(heads > 0 && q.size(1) > 0 && q.size(1) % heads == 0, "q",
          text("of a positive multiple of k_cmp's ", heads, " heads"), q.size(1));
  for (const auto& [t, name] : {std::pair{&k_cmp, "k_cmp"}, {&k_slc, "k_slc"}, {&k_win, "k_win"}})
    require(t->size(2) == head_dim && head_dim > 0, name, text("of q's positive head_dim ", head_dim),
            t->size(2));
  const SelectSizes sizes{kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks};
  check_selection(sizes, q_indptr, q.size(0), cmp_indptr, cmp_start.has_value() ? -1 : k_cmp.size(0),
                  token_indptr);
  require(rows_per_block > 0 && tile_bytes > 0, "rows_per_block and tile_bytes", "at least 1",
          text(rows_per_block, " and ", tile_bytes));
  const double scale = given_scale.value_or(std::pow(static_cast<double>(head_dim), -0.5));
  require(std::isfinite(scale), "scale", "finite", scale);
  const int64_t group = q.size(1) / heads, min_tile = std::max<int64_t>(1, rows_per_block / group),
                max_tile = std::max(min_tile, tile_bytes / (4 * (head_dim + v_head_dim)) / group);

  const Sequences s{q_indptr, token_indptr, scale};
  const PlanTables plan =
      plan_varlen(q_indptr, cmp_indptr, true, q.size(0), k_cmp.size(0), q.size(1), k_cmp.size(1), q.size(2),
                  "cpu", -1, -1, token_indptr, kernel_size, kernel_stride, 0, cmp_start);
  const auto [compressed, lse] = meet(q, k_cmp, v_cmp, plan, scale, 0);
  Tensor selected;
  if (const int64_t tokens = longest(token_indptr); tokens <= topk * block_size) {  // all blocks are chosen
    selected = attend_tokens(s, q, k_slc, v_slc, std::max<int64_t>(1, tokens), slc_start);
  } else {
    const Tensor block_index =
        select_blocks_op(q, k_cmp, lse, q_indptr, cmp_indptr, token_indptr, kernel_size, kernel_stride,
                         block_size, topk, init_blocks, local_blocks, scale, cmp_start);
    selected = attend_blocks(s, q, k_slc, v_slc, block_index, block_size, min_tile, max_tile, slc_start);
  }
  const Tensor windowed = attend_tokens(s, q, k_win, v_win, std::min<int64_t>(window, INT_MAX), win_start);

  MixParams p{};
  p.dtype = check_element(q, "q", runs_float64());
  p.part[0] = compressed.const_data_ptr();
  p.part[1] = selected.const_data_ptr();
  p.part[2] = windowed.const_data_ptr();
  p.gates = gates.const_data_ptr();
  p.num_queries = q.size(0);
  p.num_heads = q.size(1);
  p.gate_heads = gates.size(2);
  p.head_dim = v_cmp.size(2);
  Tensor out = torch::stable::new_empty(q, {p.num_queries, p.num_heads, p.head_dim});
  p.out = out.mutable_data_ptr();
  dispatch_isa([&]<Isa isa>() { mix_branches<isa>(p); });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { m.impl("sparse_branches", TORCH_BOX(&sparse_branches_op)); }

}  // namespace palmette
