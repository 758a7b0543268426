// SPDX-License-Identifier: Apache-2.0
// select_blocks: checks, and the tiles of queries.
#include "sparse/op.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <vector>

#include "attend/inputs.h"
#include "core/backend.h"
#include "plan/tensors.h"
#include "sparse/params.h"

namespace palmette {

namespace {

std::vector<SelectTile> make_tiles(const IntArray& q, const IntArray& keys, const KeyStarts& starts,
                                   const IntArray& tokens) {
  std::vector<SelectTile> tiles;
  for (int64_t b = 0; b + 1 < q.size; ++b) {
    const int64_t queries = q[b + 1] - q[b], offset = tokens[b + 1] - tokens[b] - queries;
    for (int64_t i = 0; i < queries; i += kSelectQueries) {
      tiles.push_back({static_cast<int32_t>(q[b] + i),
                       static_cast<int32_t>(std::min<int64_t>(kSelectQueries, queries - i)), starts(keys, b),
                       static_cast<int32_t>(keys[b + 1] - keys[b]), static_cast<int32_t>(offset + i), 0});
    }
  }
  return tiles;
}

// Every sequence must have the compressed keys that its tokens make, or kernels would leave their scores.
void check_key_counts(const IntArray& keys, const IntArray& tokens, int64_t size, int64_t stride) {
  for (int64_t b = 0; b + 1 < keys.size; ++b) {
    const int64_t n = tokens[b + 1] - tokens[b], wanted = n < size ? 0 : (n - size) / stride + 1;
    check(keys[b + 1] - keys[b] == wanted, "cu_seqlens_cmp must be such that sequence ", b, " of ", n,
          " tokens has ", wanted, " compressed keys, got ", keys[b + 1] - keys[b]);
  }
}

}  // namespace

void check_selection(const SelectSizes& s, const Tensor& q_indptr, int64_t num_queries,
                     const Tensor& cmp_indptr, int64_t num_keys, const Tensor& token_indptr) {
  const auto at_least = [](int64_t least, int64_t n, const char* name) {
    require(n >= least && n <= INT_MAX, name, text("at least ", least, " and below 2^31"), n);
  };
  const auto is_multiple = [&](int64_t n, const char* name) {
    at_least(1, n, name);
    require(n % s.kernel_stride == 0, name, text("a multiple of kernel_stride ", s.kernel_stride), n);
  };
  at_least(1, s.kernel_stride, "kernel_stride");
  is_multiple(s.kernel_size, "kernel_size");
  is_multiple(s.block_size, "block_size");
  at_least(0, s.init_blocks, "init_blocks");
  at_least(0, s.local_blocks, "local_blocks");
  at_least(1, s.topk, "topk");
  require(s.topk >= s.init_blocks + s.local_blocks, "topk",
          text("at least init_blocks + local_blocks = ", s.init_blocks + s.local_blocks), s.topk);
  const IntArray queries = check_indptr(q_indptr, "cu_seqlens", num_queries, "rows of q"),
                 keys = check_indptr(cmp_indptr, "cu_seqlens_cmp", num_keys, "rows of k_cmp"),
                 tokens = check_indptr(token_indptr, "cu_seqlens_k", -1, "tokens");
  check(queries.size == keys.size && queries.size == tokens.size, "cu_seqlens_cmp and cu_seqlens_k must be [",
        queries.size, "] like cu_seqlens, got [", keys.size, "] and [", tokens.size, "]");
  for (int64_t b = 0; b + 1 < queries.size; ++b) {
    const int64_t n = queries[b + 1] - queries[b], m = tokens[b + 1] - tokens[b];
    check(m >= n, "cu_seqlens_k must be such that a sequence has its queries, got ", n, " in ", m,
          " tokens of sequence ", b);
  }
  check_key_counts(keys, tokens, s.kernel_size, s.kernel_stride);
}

Tensor select_blocks_op(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const Tensor& q_indptr,
                        const Tensor& cmp_indptr, const Tensor& token_indptr, int64_t kernel_size,
                        int64_t kernel_stride, int64_t block_size, int64_t topk, int64_t init_blocks,
                        int64_t local_blocks, double scale, const std::optional<Tensor>& key_start) {
  check_device(q, "q");
  check_device(k_cmp, "k_cmp", q, "q");
  check_device(lse, "lse", q, "q");
  check_dim(q, "q", "[Nq, Hq, D]", 3);
  check_dim(k_cmp, "k_cmp", "[C, Hk, D]", 3);
  SelectParams p{};
  p.dtype = check_element(q, "q", runs_float64());
  check_dtype(k_cmp, "k_cmp", {q.scalar_type()});
  require(k_cmp.size(2) == q.size(2) && q.size(2) > 0, "k_cmp", text("of q's head_dim ", q.size(2)),
          k_cmp.size(2));
  require(k_cmp.size(1) > 0 && q.size(1) > 0 && q.size(1) % k_cmp.size(1) == 0, "q",
          text("of a multiple of k_cmp's ", k_cmp.size(1), " heads"), q.size(1));
  check_dtype(lse, "lse", {state_type(p.dtype)});
  check_shape(lse, "lse", "[Nq, Hq]", {q.size(0), q.size(1)});
  check_contiguous(lse, "lse");
  require(std::isfinite(scale), "scale", "finite", scale);
  require(k_cmp.size(0) <= INT_MAX, "k_cmp", "of less than 2^31 rows", k_cmp.size(0));

  check_selection({kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks}, q_indptr,
                  q.size(0), cmp_indptr, key_start.has_value() ? -1 : k_cmp.size(0), token_indptr);
  const IntArray queries = int_array(q_indptr, "cu_seqlens"), keys = int_array(cmp_indptr, "cu_seqlens_cmp"),
                 tokens = int_array(token_indptr, "cu_seqlens_k");
  const std::vector<SelectTile> tiles =
      make_tiles(queries, keys, key_starts(key_start, "cmp_starts", keys, k_cmp.size(0)), tokens);

  p.q = strided(q, "q");
  p.k = strided(k_cmp, "k_cmp");
  p.lse = lse.const_data_ptr();
  p.tiles = tiles.data();
  p.num_tiles = static_cast<int32_t>(tiles.size());
  p.num_queries = static_cast<int32_t>(q.size(0));
  p.num_q_heads = static_cast<int32_t>(q.size(1));
  p.num_kv_heads = static_cast<int32_t>(k_cmp.size(1));
  p.head_dim = static_cast<int32_t>(q.size(2));
  p.key_strides = static_cast<int32_t>(kernel_size / kernel_stride);
  p.block_strides = static_cast<int32_t>(block_size / kernel_stride);
  p.stride = static_cast<int32_t>(kernel_stride);
  p.topk = static_cast<int32_t>(topk);
  p.init_blocks = static_cast<int32_t>(init_blocks);
  p.local_blocks = static_cast<int32_t>(local_blocks);
  for (int64_t b = 0; b + 1 < tokens.size; ++b) {
    const int64_t blocks = (tokens[b + 1] - tokens[b] + block_size - 1) / block_size;
    p.max_blocks = std::max(p.max_blocks, static_cast<int32_t>(blocks));
  }
  p.scale = scale;
  Tensor block_index = torch::stable::new_empty(q, {k_cmp.size(1), q.size(0), topk}, ScalarType::Int);
  p.block_index = static_cast<int32_t*>(block_index.mutable_data_ptr());
  if (GpuLaunch gpu(q); gpu) {
    constexpr int64_t kWords = sizeof(SelectTile) / sizeof(int64_t);
    Tensor table = host_table(kWords * p.num_tiles, q);
    std::memcpy(table.mutable_data_ptr(), tiles.data(), tiles.size() * sizeof(SelectTile));
    table = to_device_of(q, table);
    p.tiles = static_cast<const SelectTile*>(table.const_data_ptr());
    gpu.reads(q, "q");
    gpu.reads(k_cmp, "k_cmp");
    gpu.reads(lse, "lse");
    gpu.reads(table, "tiles");
    gpu.writes(block_index, "block_index");
    gpu.run("select_blocks", p);
    return block_index;
  }
  dispatch_isa([&]<Isa isa>() {
    p.scratch_bytes = select_scratch_bytes<isa>(p);
    select_blocks<isa>(p);
  });
  return block_index;
}

STABLE_TORCH_LIBRARY_IMPL(palmette, CPU, m) { m.impl("select_blocks", TORCH_BOX(&select_blocks_op)); }
STABLE_TORCH_LIBRARY_IMPL(palmette, CUDA, m) { m.impl("select_blocks", TORCH_BOX(&select_blocks_op)); }

}  // namespace palmette
