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
#include "core/gpu.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "plan/tensors.h"
#include "verify/moves.h"
#include "verify/params.h"

namespace palmette {

namespace {

// Integers from the user beside `like`, on a GPU, where nobody looks at them.
Tensor wide_on_device(const Tensor& t, const char* name, const Tensor& like, const char* like_name) {
  check_device(t, name, like, like_name);
  check_dtype(t, name, {ScalarType::Int, ScalarType::Long});
  return torch::stable::contiguous(torch::stable::to(t, ScalarType::Long));
}

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

// What walks read besides the rows: the draft tokens where the host has them, the tree's links and its roots.
// The result owns what `p` points to.
Tensor walk_table(const TreeState& tree, const std::vector<int32_t>& roots, const IntArray& token,
                  const Tensor& rows, VerifyParams& p) {
  const int64_t num_nodes = tree.num_nodes(), num_roots = static_cast<int64_t>(roots.size());
  const int64_t num_tokens = token.given ? num_nodes : 0;
  const Tensor host = host_table(num_tokens + (2 * num_nodes + num_roots + 1) / 2, rows);
  int64_t* tokens = static_cast<int64_t*>(host.mutable_data_ptr());
  for (int64_t i = 0; i < num_tokens; ++i) tokens[i] = token[i];
  auto* links = reinterpret_cast<int32_t*>(tokens + num_tokens);
  std::copy_n(tree.first_child, num_nodes, links);
  std::copy_n(tree.next_sibling, num_nodes, links + num_nodes);
  std::copy_n(roots.data(), num_roots, links + 2 * num_nodes);

  Tensor table = to_device_of(rows, host);
  p.token = static_cast<const int64_t*>(table.const_data_ptr());
  p.first_child = reinterpret_cast<const int32_t*>(p.token + num_tokens);
  p.next_sibling = p.first_child + num_nodes;
  p.root = p.next_sibling + num_nodes;
  return table;
}

using Verified = std::tuple<Tensor, Tensor, Tensor>;

// `uniforms`: null for greedy.
Verified run_verify(const Tensor& nodes, const Tensor& tree_counts, Tensor draft_tokens, Tensor rows,
                    const char* name, const Tensor* uniforms, int64_t num_roots, int64_t max_depth) {
  const TreeState tree = tree_state(nodes, tree_counts);
  const int64_t num_nodes = tree.num_nodes();
  check_device(rows, name);
  GpuLaunch gpu(rows);
  check_dim(rows, name, "[M, vocab]", 2);
  VerifyParams p{};
  p.dtype = check_element(rows, name, runs_float64());
  p.vocab = rows.size(1);
  require(rows.size(0) == num_nodes && p.vocab > 0, name, text("[", num_nodes, ", vocab], a row per node id"),
          shape_text(rows));
  if (gpu) {
    require(p.vocab <= kMaxGpuVocab, name, text("at most ", kMaxGpuVocab, " tokens wide on a GPU"), p.vocab);
  }
  IntArray token{nullptr, 0, true, false};  // not given
  if (draft_tokens.is_cpu()) {
    draft_tokens = torch::stable::contiguous(draft_tokens);
    token = int_array(draft_tokens, "draft_tokens");
  } else {  // unseen: looking would wait for everything before
    draft_tokens = wide_on_device(draft_tokens, "draft_tokens", rows, name);
  }
  require(draft_tokens.dim() == 1 && draft_tokens.size(0) == num_nodes, "draft_tokens",
          text("[", num_nodes, "], one per node id"), shape_text(draft_tokens));
  const TokenTree checked = check_token_tree(tree, token, token.given ? p.vocab : 0);
  require(num_roots == static_cast<int64_t>(checked.roots.size()), "num_roots", checked.roots.size(),
          num_roots);
  require(max_depth >= checked.max_depth, "max_depth", text("at least ", checked.max_depth), max_depth);
  // Only a few rows will be read, but a row itself is read from end to end.
  if (p.vocab > 1 && rows.stride(1) != 1) rows = torch::stable::contiguous(rows);

  const Tensor table = walk_table(tree, checked.roots, token, rows, p);
  if (!token.given) p.token = static_cast<const int64_t*>(draft_tokens.const_data_ptr());  // on a real GPU
  constexpr int64_t kFaultWords = sizeof(VerifyFault) / sizeof(int64_t);
  Tensor accepted = torch::stable::new_empty(rows, {num_roots, max_depth}, ScalarType::Long);
  Tensor num_accepted = torch::stable::new_empty(rows, {num_roots}, ScalarType::Long);
  Tensor bonus = torch::stable::new_empty(rows, {num_roots}, ScalarType::Long);
  Tensor faults = torch::stable::new_empty(rows, {num_roots, kFaultWords}, ScalarType::Long);
  p.num_roots = num_roots;
  p.max_depth = max_depth;
  p.rows = rows.const_data_ptr();
  p.row_stride = rows.stride(0);
  if (uniforms != nullptr) p.uniforms = static_cast<const double*>(uniforms->const_data_ptr());
  // Rounding to 16 bits moves every probability, and the tiny ones of a flat row all to the same side.
  p.tolerance = p.dtype == DType::bf16 || p.dtype == DType::f16 ? 2e-2 : 1e-3;
  p.accepted = static_cast<int64_t*>(accepted.mutable_data_ptr());
  p.num_accepted = static_cast<int64_t*>(num_accepted.mutable_data_ptr());
  p.bonus = static_cast<int64_t*>(bonus.mutable_data_ptr());
  p.fault = static_cast<VerifyFault*>(faults.mutable_data_ptr());
  if (gpu) {
    gpu.reads(table, "tree");
    gpu.reads(rows, name);
    if (uniforms != nullptr) gpu.reads(*uniforms, "uniforms");
    gpu.writes(accepted, "accepted");
    gpu.writes(num_accepted, "num_accepted");
    gpu.writes(bonus, "bonus");
    gpu.writes(faults, "faults");
    gpu.run(uniforms == nullptr ? "verify_greedy" : "verify_sample", p);
  } else {
    dispatch_isa([&]<Isa isa>() { verify<isa>(p); });
  }
  // Nor does anybody look at a GPU's faults: what they are is in the results.
  for (int64_t r = 0; r < num_roots && rows.is_cpu(); ++r) raise_fault(p.fault[r], name);
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
  check_device(uniforms, "uniforms", target_probs, "target_probs");
  check_dtype(uniforms, "uniforms", {ScalarType::Double});
  check_shape(uniforms, "uniforms", "[num_roots, max_depth + 1]", {num_roots, max_depth + 1});
  const Tensor drawn = torch::stable::contiguous(uniforms);
  if (drawn.is_cpu()) {
    const double* u = static_cast<const double*>(drawn.const_data_ptr());
    for (int64_t i = 0; i < drawn.numel(); ++i) require(u[i] >= 0 && u[i] < 1, "uniforms", "in [0, 1)", u[i]);
  }
  return run_verify(nodes, tree_counts, draft_tokens, target_probs, "target_probs", &drawn, num_roots,
                    max_depth);
}

// ---- compaction

// The rows of a cache. Heads that lie side by side are one piece.
CacheRows cache_rows(const Tensor& cache, const char* name) {
  const auto element = static_cast<int64_t>(cache.element_size());
  const int64_t slots = cache.size(0), heads = cache.size(1), dim = cache.size(2);
  if (slots == 0 || heads == 0 || dim == 0) return {};
  require(dim == 1 || cache.stride(2) == 1, name, "contiguous in its last dimension", "stride ",
          cache.stride(2));
  for (int d = 0; d < 2; ++d) {
    require(cache.size(d) == 1 || cache.stride(d) != 0, name, "free of rows that share memory",
            "stride 0 in dimension ", d);
  }
  const bool apart = heads > 1 && cache.stride(1) != dim;
  CacheRows rows{};
  rows.data = static_cast<char*>(cache.mutable_data_ptr());
  rows.row_stride = cache.stride(0) * element;
  rows.piece_stride = apart ? cache.stride(1) * element : 0;
  rows.num_pieces = apart ? heads : 1;
  rows.piece_bytes = (apart ? dim : heads * dim) * element;
  return rows;
}

// Do two caches [slots, Hk, *] have elements in common? Views of one pool, such as [slots, 2, Hk, D], may lie
// between each other; those whose slots are not equally far apart are not told apart.
bool share_memory(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto element = static_cast<int64_t>(a.element_size());
  const auto end = [&](const Tensor& t) {
    int64_t last = 0;
    for (int64_t d = 0; d < 3; ++d) last += (t.size(d) - 1) * t.stride(d);
    return reinterpret_cast<intptr_t>(t.data_ptr()) + (last + 1) * static_cast<int64_t>(t.element_size());
  };
  const intptr_t a_begin = reinterpret_cast<intptr_t>(a.data_ptr()),
                 b_begin = reinterpret_cast<intptr_t>(b.data_ptr());
  if (end(a) <= b_begin || end(b) <= a_begin) return false;
  const int64_t slots = a.size(0), heads = a.size(1);
  const bool alike = a.element_size() == b.element_size() && (slots == 1 || a.stride(0) == b.stride(0)) &&
                     (b_begin - a_begin) % element == 0;
  if (!alike) return true;
  // Of two heads, and of slots s apart, the row of b begins x - s * stride(0) behind that of a. They meet if
  // that is between -width of b and the width of a.
  const auto floor_div = [](int64_t x, int64_t y) { return x / y - (x % y < 0 ? 1 : 0); };
  const int64_t row = slots > 1 ? a.stride(0) : 1;
  for (int64_t i = 0; i < heads; ++i) {
    for (int64_t j = 0; j < heads; ++j) {
      const int64_t x = (b_begin - a_begin) / element + j * b.stride(1) - i * a.stride(1);
      const int64_t first = floor_div(x - a.size(2), row) + 1, last = floor_div(x + b.size(2) - 1, row);
      if (std::max(first, 1 - slots) <= std::min(last, slots - 1)) return true;
    }
  }
  return false;
}

// A part of every row of a cache: it moves on its own, so parts are what threads share.
struct Part {
  char* data;
  int64_t row_stride;
  int64_t bytes;
};

// A row of one piece is cut into as many parts as there are workers; otherwise every piece is one.
void add_parts(const CacheRows& rows, int64_t workers, std::vector<Part>& parts) {
  constexpr int64_t kLine = 64;
  const int64_t cuts = rows.num_pieces > 1 ? 1 : workers;
  const int64_t part = (rows.piece_bytes + cuts * kLine - 1) / (cuts * kLine) * kLine;
  for (int64_t piece = 0; piece < rows.num_pieces; ++piece) {
    char* data = rows.data + piece * rows.piece_stride;
    for (int64_t at = 0; at < rows.piece_bytes; at += part) {
      parts.push_back({data + at, rows.row_stride, std::min(part, rows.piece_bytes - at)});
    }
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
      return slot == kSpareRow ? spare : part.data + slot * part.row_stride;
    };
    for (const RowMove& m : work.steps) {
      std::memcpy(row(m.dst), row(m.src), static_cast<size_t>(part.bytes));
    }
  }
}

// With one spare row per worker.
void move_in_place(const CacheRows (&caches)[2], const std::vector<RowMove>& steps) {
  constexpr int64_t kPerWorker = 1 << 17;  // bytes that are worth waking a thread for
  const int64_t bytes = static_cast<int64_t>(steps.size()) * (caches[0].bytes() + caches[1].bytes());
  const int64_t workers = std::clamp<int64_t>(bytes / kPerWorker, 1, num_workers());
  std::vector<Part> parts;
  for (const CacheRows& rows : caches) add_parts(rows, workers, parts);
  CompactWork work{steps, parts};
  if (!steps.empty()) run_workers(workers, &compact_worker, &work);
}

// Into rows of their own and back: no order is needed, and all rows move at the same time.
void move_through_scratch(const CacheRows (&caches)[2], const Tensor& k_cache, const Tensor& v_cache,
                          const Tensor& src, const Tensor& dst) {
  CopyRowsParams in{}, out{};
  in.num_rows = out.num_rows = src.numel();
  const int64_t bytes = in.num_rows * (caches[0].bytes() + caches[1].bytes());
  Tensor scratch = torch::stable::new_empty(k_cache, {bytes}, ScalarType::Byte);
  char* data = static_cast<char*>(scratch.mutable_data_ptr());
  for (int c = 0; c < 2; ++c) {
    const CacheRows& rows = caches[c];
    require(rows.bytes() <= INT32_MAX, c == 0 ? "k_cache" : "v_cache", "rows of less than 2 GiB on a GPU",
            rows.bytes(), " bytes");
    in.from[c] = out.to[c] = rows;
    in.to[c] = out.from[c] = {data, rows.bytes(), rows.piece_bytes, rows.num_pieces, rows.piece_bytes};
    data += in.num_rows * rows.bytes();
  }
  in.from_slots = static_cast<const int64_t*>(src.const_data_ptr());
  out.to_slots = static_cast<const int64_t*>(dst.const_data_ptr());
  GpuLaunch gather(k_cache), scatter(k_cache);
  gather.reads(k_cache, "k_cache");
  gather.reads(v_cache, "v_cache");
  gather.reads(src, "src_slots");
  gather.writes(scratch, "scratch");
  gather.run("copy_rows", in);
  scatter.reads(scratch, "scratch");
  scatter.reads(dst, "dst_slots");
  scatter.writes(k_cache, "k_cache");
  scatter.writes(v_cache, "v_cache");
  scatter.run("copy_rows", out);
}

void compact_kv_(const Tensor& k_cache, const Tensor& v_cache, const Tensor& src_slots,
                 const Tensor& dst_slots) {
  check_device(k_cache, "k_cache");
  check_device(v_cache, "v_cache", k_cache, "k_cache");
  const GpuLaunch gpu(k_cache);
  check_dim(k_cache, "k_cache", "[slots, Hk, D]", 3);
  check_dim(v_cache, "v_cache", "[slots, Hk, Dv]", 3);
  require(v_cache.size(0) == k_cache.size(0) && v_cache.size(1) == k_cache.size(1), "v_cache",
          text("[", k_cache.size(0), ", ", k_cache.size(1), ", Dv] like k_cache"), shape_text(v_cache));
  const CacheRows caches[2] = {cache_rows(k_cache, "k_cache"), cache_rows(v_cache, "v_cache")};
  require(!share_memory(k_cache, v_cache), "v_cache", "memory of its own", "some of k_cache's");
  if (!src_slots.is_cpu()) {
    check_dim(src_slots, "src_slots", "[n]", 1);
    check_shape(dst_slots, "dst_slots", "[n]", {src_slots.size(0)});
    return move_through_scratch(caches, k_cache, v_cache,
                                wide_on_device(src_slots, "src_slots", k_cache, "k_cache"),
                                wide_on_device(dst_slots, "dst_slots", k_cache, "k_cache"));
  }
  const Tensor src = torch::stable::contiguous(src_slots), dst = torch::stable::contiguous(dst_slots);
  const IntArray from = int_array(src, "src_slots"), to = int_array(dst, "dst_slots");
  if (!gpu) return move_in_place(caches, order_moves(from, to, k_cache.size(0)));
  check_moves(from, to, k_cache.size(0));
  Tensor table = host_table(2 * from.size, k_cache);
  int64_t* slots = static_cast<int64_t*>(table.mutable_data_ptr());
  for (int64_t i = 0; i < from.size; ++i) {
    slots[i] = from[i];
    slots[from.size + i] = to[i];
  }
  table = to_device_of(k_cache, table);
  move_through_scratch(caches, k_cache, v_cache, torch::stable::narrow(table, 0, 0, from.size),
                       torch::stable::narrow(table, 0, from.size, from.size));
}

template <class Library>
void implement(Library& m) {
  m.impl("verify_greedy", TORCH_BOX(&verify_greedy));
  m.impl("verify_sample", TORCH_BOX(&verify_sample));
  m.impl("compact_kv_", TORCH_BOX(&compact_kv_));
}

}  // namespace

}  // namespace palmette

STABLE_TORCH_LIBRARY_IMPL(palmette, CompositeExplicitAutograd, m) {
  m.impl("verify_extent", TORCH_BOX(&palmette::verify_extent));
}
STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { palmette::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { palmette::implement(m); }
