// SPDX-License-Identifier: Apache-2.0
// The contract between csrc/sparse/op.cpp, branches_op.cpp and the kernels. T is the arithmetic type: float,
// or double for float64 (scalar body only).
#pragma once

#include <cstdint>

#include "attend/params.h"
#include "core/isa.h"

namespace palmette {

// Queries that are selected for together.
constexpr int kSelectQueries = 32;

// A run of at most kSelectQueries queries of one sequence.
struct SelectTile {
  int32_t query, num_queries;  // rows of q
  int32_t key, num_keys;       // the sequence's compressed keys
  int32_t token;               // of the first query, within the sequence
  int32_t unused;              // makes whole words of 8 bytes, in which tables go to a GPU
};

struct SelectParams {
  Strided q, k;             // [Nq, Hq, D], [C, Hk, D]: compressed keys
  const void* lse;          // T [Nq, Hq] of the compressed attention
  const SelectTile* tiles;  // [num_tiles]
  int32_t num_tiles, num_queries, num_q_heads, num_kv_heads, head_dim;
  int32_t key_strides, block_strides;  // that a compressed key, and a block, covers
  int32_t stride;                      // tokens
  int32_t topk, init_blocks, local_blocks, max_blocks;
  DType dtype;
  double scale;
  int32_t* block_index;   // [Hk, Nq, topk]
  int64_t scratch_bytes;  // per worker
};

// out = sum_i gates[i] part[i], all contiguous and of dtype.
struct MixParams {
  const void* part[3];  // [Nq, Hq, Dv]
  const void* gates;    // [Nq, 3, gate_heads]: one per head, or one for all
  int64_t num_queries, num_heads, gate_heads, head_dim;
  DType dtype;
  void* out;  // [Nq, Hq, Dv]
};

template <Isa isa>
int64_t select_scratch_bytes(const SelectParams& p);
template <Isa isa>
void select_blocks(const SelectParams& p);
template <Isa isa>
void mix_branches(const MixParams& p);

}  // namespace palmette
