// SPDX-License-Identifier: Apache-2.0
// The contract between csrc/verify/op.cpp and the kernel: a token tree, the target's rows, and where the
// walks go. E is the element type of the rows.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace palmette {

// Why a row cannot be used, and where.
enum class RowFault : int { none, nan, negative, sum };

struct VerifyFault {
  RowFault kind;
  int64_t node, token;
  double value;
};

struct VerifyParams {
  // The tree, by node id; -1 is "none". Siblings come in the order of their ids.
  const int32_t* first_child;   // [M]
  const int32_t* next_sibling;  // [M]
  const int64_t* token;         // [M]: draft tokens
  const int32_t* root;          // [num_roots]
  int64_t num_roots;
  int64_t max_depth;  // nodes on the longest path below a root

  const void* rows;    // E [M, vocab]: logits (greedy) or probabilities (sampling)
  int64_t row_stride;  // elements
  int64_t vocab;
  DType dtype;
  const double* uniforms;  // [num_roots, max_depth + 1] in [0, 1), or null: greedy
  double tolerance;        // sampling: how far from 1 a row may sum

  int64_t* accepted;      // [num_roots, max_depth], filled with -1
  int64_t* num_accepted;  // [num_roots]
  int64_t* bonus;         // [num_roots]
  VerifyFault* fault;     // [num_roots]
};

template <Isa isa>
void verify(const VerifyParams& params);

}  // namespace palmette
