// SPDX-License-Identifier: Apache-2.0
// verify_greedy, verify_sample, compact_kv_: the checks, and the moves of rows of the KV cache.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "core/backend.h"
#include "core/checks.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "plan/tensors.h"
#include "verify/moves.h"
#include "verify/params.h"

namespace palmette {

namespace {

// ---- verification

struct TokenTree {
  std::vector<int32_t> roots;
  int64_t max_depth = 0;  // nodes below a root
};

// Visits every live node once; `vocab` 0: there are no tokens to check.
TokenTree check_token_tree(const TreeState& tree, const IntArray& token, int64_t vocab) {
  TokenTree result;
  int64_t depth = 0;  // of `node`
  for (int32_t node = tree.first_root(); node >= 0;) {
    if (tree.parent[node] < 0) {
      result.roots.push_back(node);
    } else {
      require(tree.length[node] == 1, "num_tokens", "1 for nodes below the roots", tree.length[node],
              " for node ", node);
      if (vocab > 0 && (token[node] < 0 || token[node] >= vocab)) {
        require(false, "draft_tokens", text("in [0, ", vocab, ")"), token[node], " at node ", node);
      }
      result.max_depth = std::max(result.max_depth, depth);
    }
    if (tree.first_child[node] >= 0) {
      node = tree.first_child[node];
      ++depth;
      continue;
    }
    while (node >= 0 && tree.next_sibling[node] < 0) {
      node = tree.parent[node];
      --depth;
    }
    if (node >= 0) node = tree.next_sibling[node];
  }
  return result;
}

Tensor verify_extent(const Tensor& nodes, const Tensor& tree_counts) {
  const TokenTree checked = check_token_tree(tree_state(nodes, tree_counts), IntArray{}, 0);
  Tensor extent = torch::stable::new_empty(tree_counts, {2}, ScalarType::Long);
  int64_t* out = static_cast<int64_t*>(extent.mutable_data_ptr());
  out[0] = static_cast<int64_t>(checked.roots.size());
  out[1] = checked.max_depth;
  return extent;
}

void raise_fault(const VerifyFault& fault, const char* name) {
  switch (fault.kind) {
    case RowFault::none:
      return;
    case RowFault::nan:
      return require(false, name, "free of NaN", "NaN at node ", fault.node, ", token ", fault.token);
    case RowFault::negative:
      return require(false, name, "non-negative", fault.value, " at node ", fault.node, ", token ",
                     fault.token);
    case RowFault::sum:
      return require(false, name, "rows that sum to 1", fault.value, " at node ", fault.node);
  }
}

using Verified = std::tuple<Tensor, Tensor, Tensor>;

Verified run_verify(const Tensor& nodes, const Tensor& tree_counts, const Tensor& draft_tokens, Tensor rows,
                    const char* name, const double* uniforms, int64_t num_roots, int64_t max_depth) {
  const TreeState tree = tree_state(nodes, tree_counts);
  const int64_t num_nodes = tree.num_nodes();
  check_cpu(rows, name);
  check_dim(rows, name, "[M, vocab]", 2);
  VerifyParams p{};
  p.dtype = check_element(rows, name, runs_float64());
  p.vocab = rows.size(1);
  require(rows.size(0) == num_nodes && p.vocab > 0, name, text("[", num_nodes, ", vocab], a row per node id"),
          shape_text(rows));
  const Tensor drafts = torch::stable::contiguous(draft_tokens);
  const IntArray token = int_array(drafts, "draft_tokens");
  require(token.size == num_nodes, "draft_tokens", text("[", num_nodes, "], one per node id"),
          shape_text(draft_tokens));
  const TokenTree checked = check_token_tree(tree, token, p.vocab);
  require(num_roots == static_cast<int64_t>(checked.roots.size()), "num_roots", checked.roots.size(),
          num_roots);
  require(max_depth >= checked.max_depth, "max_depth", text("at least ", checked.max_depth), max_depth);
  // Only a few rows will be read, but a row itself is read from end to end.
  if (p.vocab > 1 && rows.stride(1) != 1) rows = torch::stable::contiguous(rows);

  std::vector<int64_t> tokens(static_cast<size_t>(num_nodes));
  for (int64_t i = 0; i < num_nodes; ++i) tokens[i] = token[i];
  std::vector<VerifyFault> faults(static_cast<size_t>(num_roots));
  Tensor accepted = torch::stable::new_empty(rows, {num_roots, max_depth}, ScalarType::Long);
  Tensor num_accepted = torch::stable::new_empty(rows, {num_roots}, ScalarType::Long);
  Tensor bonus = torch::stable::new_empty(rows, {num_roots}, ScalarType::Long);
  p.first_child = tree.first_child;
  p.next_sibling = tree.next_sibling;
  p.token = tokens.data();
  p.root = checked.roots.data();
  p.num_roots = num_roots;
  p.max_depth = max_depth;
  p.rows = rows.const_data_ptr();
  p.row_stride = rows.stride(0);
  p.uniforms = uniforms;
  // Rounding to 16 bits moves every probability, and the tiny ones of a flat row all to the same side.
  p.tolerance = p.dtype == DType::bf16 || p.dtype == DType::f16 ? 2e-2 : 1e-3;
  p.accepted = static_cast<int64_t*>(accepted.mutable_data_ptr());
  p.num_accepted = static_cast<int64_t*>(num_accepted.mutable_data_ptr());
  p.bonus = static_cast<int64_t*>(bonus.mutable_data_ptr());
  p.fault = faults.data();
  std::fill_n(p.accepted, num_roots * max_depth, int64_t{-1});
  dispatch_isa([&]<Isa isa>() { verify<isa>(p); });
  for (const VerifyFault& fault : faults) raise_fault(fault, name);
  return {accepted, num_accepted, bonus};
}

Verified verify_greedy(const Tensor& nodes, const Tensor& tree_counts, const Tensor& draft_tokens,
                       const Tensor& target_logits, int64_t num_roots, int64_t max_depth) {
  return run_verify(nodes, tree_counts, draft_tokens, target_logits, "target_logits", nullptr, num_roots,
                    max_depth);
}

Verified verify_sample(const Tensor& nodes, const Tensor& tree_counts, const Tensor& draft_tokens,
                       const Tensor& target_probs, const Tensor& uniforms, int64_t num_roots,
                       int64_t max_depth) {
  check_cpu(uniforms, "uniforms");
  check_dtype(uniforms, "uniforms", {ScalarType::Double});
  check_shape(uniforms, "uniforms", "[num_roots, max_depth + 1]", {num_roots, max_depth + 1});
  const Tensor drawn = torch::stable::contiguous(uniforms);
  const double* u = static_cast<const double*>(drawn.const_data_ptr());
  for (int64_t i = 0; i < drawn.numel(); ++i) require(u[i] >= 0 && u[i] < 1, "uniforms", "in [0, 1)", u[i]);
  return run_verify(nodes, tree_counts, draft_tokens, target_probs, "target_probs", u, num_roots, max_depth);
}

// ---- compaction

// A part of every row of a cache: it moves on its own, so parts are what threads share.
struct Part {
  char* data;
  int64_t row_bytes;  // from one slot to the next
  int64_t bytes;
};

// Rows whose heads lie side by side are one run of bytes, cut in `pieces`; otherwise every head is a part.
void add_parts(const Tensor& cache, const char* name, int64_t pieces, std::vector<Part>& parts) {
  const auto element = static_cast<int64_t>(cache.element_size());
  const int64_t slots = cache.size(0), heads = cache.size(1), dim = cache.size(2);
  if (slots == 0 || heads == 0 || dim == 0) return;
  require(dim == 1 || cache.stride(2) == 1, name, "contiguous in its last dimension", "stride ",
          cache.stride(2));
  for (int d = 0; d < 2; ++d) {
    require(cache.size(d) == 1 || cache.stride(d) != 0, name, "free of rows that share memory",
            "stride 0 in dimension ", d);
  }
  char* data = static_cast<char*>(cache.mutable_data_ptr());
  const int64_t row_bytes = cache.stride(0) * element, head_bytes = cache.stride(1) * element;
  if (heads > 1 && cache.stride(1) != dim) {
    for (int64_t h = 0; h < heads; ++h) parts.push_back({data + h * head_bytes, row_bytes, dim * element});
    return;
  }
  constexpr int64_t kLine = 64;
  const int64_t total = heads * dim * element;
  const int64_t piece = (total + pieces * kLine - 1) / (pieces * kLine) * kLine;
  for (int64_t at = 0; at < total; at += piece) {
    parts.push_back({data + at, row_bytes, std::min(piece, total - at)});
  }
}

struct CompactWork {
  const std::vector<RowMove>& steps;
  const std::vector<Part>& parts;
  std::atomic<size_t> next{0};
};

void compact_worker(void* ctx, int64_t) {
  CompactWork& work = *static_cast<CompactWork*>(ctx);
  for (size_t i; (i = work.next.fetch_add(1)) < work.parts.size();) {
    const Part& part = work.parts[i];
    char* spare = static_cast<char*>(thread_workspace(part.bytes));
    const auto row = [&](int64_t slot) {
      return slot == kSpareRow ? spare : part.data + slot * part.row_bytes;
    };
    for (const RowMove& m : work.steps) {
      std::memcpy(row(m.dst), row(m.src), static_cast<size_t>(part.bytes));
    }
  }
}

void compact_kv_(const Tensor& k_cache, const Tensor& v_cache, const Tensor& src_slots,
                 const Tensor& dst_slots) {
  check_cpu(k_cache, "k_cache");
  check_cpu(v_cache, "v_cache");
  check_dim(k_cache, "k_cache", "[slots, Hk, D]", 3);
  check_dim(v_cache, "v_cache", "[slots, Hk, Dv]", 3);
  require(v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1), "v_cache",
          text("[", k_cache.size(0), ", ", k_cache.size(1), ", Dv] like k_cache"), shape_text(v_cache));
  require(k_cache.numel() == 0 || v_cache.numel() == 0 || k_cache.data_ptr() != v_cache.data_ptr(), "v_cache",
          "memory of its own", "that of k_cache");
  const Tensor src = torch::stable::contiguous(src_slots), dst = torch::stable::contiguous(dst_slots);
  const std::vector<RowMove> steps =
      order_moves(int_array(src, "src_slots"), int_array(dst, "dst_slots"), k_cache.size(0));

  constexpr int64_t kPerWorker = 1 << 17;  // bytes that are worth waking a thread for
  const int64_t row_bytes =
      k_cache.size(1) * (k_cache.size(2) * static_cast<int64_t>(k_cache.element_size()) +
                         v_cache.size(2) * static_cast<int64_t>(v_cache.element_size()));
  const int64_t workers =
      std::clamp<int64_t>(static_cast<int64_t>(steps.size()) * row_bytes / kPerWorker, 1, num_workers());
  std::vector<Part> parts;
  add_parts(k_cache, "k_cache", workers, parts);
  add_parts(v_cache, "v_cache", workers, parts);
  CompactWork work{steps, parts};
  if (!steps.empty()) run_workers(workers, &compact_worker, &work);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("verify_extent", TORCH_BOX(&verify_extent));
}

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) {
  m.impl("verify_greedy", TORCH_BOX(&verify_greedy));
  m.impl("verify_sample", TORCH_BOX(&verify_sample));
  m.impl("compact_kv_", TORCH_BOX(&compact_kv_));
}

}  // namespace palmette
