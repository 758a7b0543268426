// SPDX-License-Identifier: Apache-2.0
// The contract between csrc/merge/op.cpp and the kernels. E is the element type, A the type of the LSE and of
// all arithmetic: float, or double when E is double. Strides are in elements; the last dimension of E tensors
// has stride 1.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace palmette {

// States of query n: dense, `num_states` of them at row n, or ragged, rows indptr[n] .. indptr[n+1] of one
// list. A pair of tensors is dense with two states, the state stride being the distance between the tensors.
struct MergeParams {
  DType dtype;
  bool base2;               // LSE in log2 instead of the natural log
  int64_t num_queries;      // N
  int64_t num_states;       // S; ragged: the longest row
  int64_t num_heads;        // H
  int64_t head_dim;         // Dv
  const int32_t* indptr32;  // [N + 1] or null
  const int64_t* indptr64;  // [N + 1] or null

  const void* outs;  // E [N, S, H, Dv] or [nnz, H, Dv]
  int64_t outs_query, outs_state, outs_head;
  const void* lses;  // A [N, S, H] or [nnz, H]
  int64_t lses_query, lses_state, lses_head;

  void* out;  // E [N, H, Dv], contiguous
  void* lse;  // A [N, H], contiguous
};

// Gradients of a merge; `forward.out` and `forward.lse` are read here.
struct MergeBackwardParams {
  MergeParams forward;
  const void* dout;  // E [N, H, Dv], contiguous
  const void* dlse;  // A [N, H], contiguous
  void* douts;       // E, as outs; the head stride is head_dim
  int64_t douts_query, douts_state;
  void* dlses;  // A, as lses; the head stride is 1
  int64_t dlses_query, dlses_state;
};

template <Isa isa>
void merge_states(const MergeParams& params);

template <Isa isa>
void merge_states_backward(const MergeBackwardParams& params);

}  // namespace palmette
