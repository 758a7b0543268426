// SPDX-License-Identifier: Apache-2.0
// The contract between csrc/loss/op.cpp and the kernels. E is the element type of the logits, A the type of
// everything else: float, or double when E is double. Strides are in elements; the last dimension has
// stride 1.
#pragma once

#include <cstdint>

#include "core/isa.h"

namespace palmette {

struct LogprobsParams {
  DType dtype;
  int64_t num_rows, vocab;
  double inverse_temperature;
  const void* logits;  // E [T, vocab]
  int64_t row_stride;
  const int64_t* targets;  // [T], each in [0, vocab)
  void* logprobs;          // A [T]
  void* lse;               // A [T]: of logits / temperature
  void* entropies;         // A [T] or null: not wanted
};

// Gradients of the logprobs and entropies of a row become those of its logits, in place.
struct LogprobsBackwardParams {
  DType dtype;
  int64_t num_rows, vocab;
  double inverse_temperature;
  void* logits;  // E [T, vocab]
  int64_t row_stride;
  const int64_t* targets;  // [T]
  const void* lse;         // A [T]
  const void* entropies;   // A [T]; null where dentropies is
  const void* dlogprobs;   // A [T] or null: zeros
  const void* dentropies;  // A [T] or null: zeros
};

template <Isa isa>
void gather_logprobs(const LogprobsParams& params);
template <Isa isa>
void gather_logprobs_backward(const LogprobsBackwardParams& params);

}  // namespace palmette
