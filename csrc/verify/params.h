// SPDX-License-Identifier: Apache-2.0
// The contract between csrc/verify/op.cpp and the kernels: a token tree, the target's rows, and where the
// walks go; rows of KV caches, and where they go. E is the element type of the target's rows.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace palmette {

// A row's probabilities are added in chunks, and a chunk in chains: chain c adds up p[c], p[c + kSumChains],
// .. Sums of doubles depend on the order, so it is the same on every backend, and all draw the same tokens.
constexpr int kSumChunk = 512, kSumChains = 8;

// The widest row that GPU kernels take: the running sums of its chunks fit into any GPU's shared memory.
constexpr int64_t kMaxGpuVocab = int64_t{1} << 21;

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

  // Kernels write all of these. Where there is a fault, the GPU's are -1 and the CPU's unspecified.
  int64_t* accepted;      // [num_roots, max_depth], -1 behind the path
  int64_t* num_accepted;  // [num_roots]
  int64_t* bonus;         // [num_roots]
  VerifyFault* fault;     // [num_roots]
};

template <Isa isa>
void verify(const VerifyParams& params);

// Rows of a cache, in bytes. A row is of several pieces: its heads, or one where heads lie side by side.
struct CacheRows {
  char* data;
  int64_t row_stride, piece_stride;  // of the second: 0 where there is one piece
  int64_t num_pieces, piece_bytes;
  int64_t bytes() const { return num_pieces * piece_bytes; }
};

// Rows of two caches go elsewhere; nothing that is read is written.
struct CopyRowsParams {
  int64_t num_rows;
  CacheRows from[2], to[2];   // the same pieces on both sides
  const int64_t* from_slots;  // [num_rows], or null: row i is the i-th
  const int64_t* to_slots;
};

}  // namespace palmette
