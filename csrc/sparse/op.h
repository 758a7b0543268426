// SPDX-License-Identifier: Apache-2.0
// select_blocks, for operators that call it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>

namespace palmette {

using torch::stable::Tensor;

struct SelectSizes {
  int64_t kernel_size, kernel_stride, block_size, topk, init_blocks, local_blocks;
};

// Checks sizes, and that sequences are what they say of each other: of num_queries rows of q, and num_keys
// compressed keys (-1: in memory that has more).
void check_selection(const SelectSizes& s, const Tensor& q_indptr, int64_t num_queries,
                     const Tensor& cmp_indptr, int64_t num_keys, const Tensor& token_indptr);

Tensor select_blocks_op(const Tensor& q, const Tensor& k_cmp, const Tensor& lse, const Tensor& q_indptr,
                        const Tensor& cmp_indptr, const Tensor& token_indptr, int64_t kernel_size,
                        int64_t kernel_stride, int64_t block_size, int64_t topk, int64_t init_blocks,
                        int64_t local_blocks, double scale, const std::optional<Tensor>& key_start);

}  // namespace palmette
