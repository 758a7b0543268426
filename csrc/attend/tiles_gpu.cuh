// SPDX-License-Identifier: Apache-2.0
// What the forward and the backward kernels share: how a block's shared memory is cut up, and how rows of q, k, v
// come into it.
#pragma once

#include <stdexcept>
#include <string>

#include "attend/keys_gpu.cuh"
#include "gpu/product.cuh"

namespace palmette::gpu {

// A tensor [tokens, heads, width] as copy_rows() reads it.
template <class E>
struct Source {
  const E* data;
  int64_t token, head;
  int width;
  bool by_chunks;

  __device__ __forceinline__ const E* row(int64_t index, int64_t h) const {
    return data + index * token + h * head;
  }
};

template <class E>
Source<E> source_of(const Strided& x, int width) {
  return {static_cast<const E*>(x.data), x.token, x.head, width,
          copies_by_chunks(x.data, sizeof(E), x.token, x.head)};
}

// Rows [first, first + rows) of a run of queries, of which `valid` exist.
template <class E>
__device__ __forceinline__ void copy_query_rows(const Matrix<E>& to, int rows, const Source<E>& from,
                                                const PlanView& plan, RowOf at, int first, int valid,
                                                int kv_head) {
  copy_rows(to, rows, from.width, from.by_chunks, from.data, [&](int row) -> const E* {
    if (row >= valid) return nullptr;
    const int r = first + row;
    return from.row(plan.query_index[at.query(r)], kv_head * at.group + r % at.group);
  });
}

template <class E>
__device__ __forceinline__ void copy_key_rows(const Matrix<E>& to, int rows, const Source<E>& from,
                                              const Key* keys, int count, int kv_head) {
  copy_rows(to, rows, from.width, from.by_chunks, from.data, [&](int row) -> const E* {
    return row < count ? from.row(keys[row].slot, kv_head) : nullptr;
  });
}

// Logits in units of log2.
struct Logits {
  float scale, cap;  // without cap: logit * scale; with it: cap * tanh(logit * scale)
  int window;

  static Logits of(const AttendParams& p) {
    const double log2e = 1.4426950408889634;
    if (p.softcap > 0)
      return {static_cast<float>(p.scale / p.softcap), static_cast<float>(p.softcap * log2e), p.window};
    return {static_cast<float>(p.scale * log2e), 0, p.window};
  }
  __device__ __forceinline__ float operator()(float product) const {
    return cap > 0 ? cap * tanhf(product * scale) : product * scale;
  }
};

constexpr int kMaxHeadDim = 256;
constexpr float kEmptyMax = -3e38f;  // not -inf: a difference of maxima is then never NaN

inline void require_head_dims(const AttendParams& p) {
  if (p.head_dim <= kMaxHeadDim && p.v_head_dim <= kMaxHeadDim) return;
  throw std::runtime_error("head_dim must be at most 256 on a GPU, got " + std::to_string(p.head_dim) +
                           " (of v: " + std::to_string(p.v_head_dim) + ")");
}

inline void require_shared(size_t bytes, const AttendParams& p) {
  if (bytes <= shared_limit()) return;
  throw std::runtime_error("head_dim must be such that a block fits the GPU's " +
                           std::to_string(shared_limit()) + " bytes of shared memory, got " +
                           std::to_string(p.head_dim) + " (of v: " + std::to_string(p.v_head_dim) +
                           "), which needs " + std::to_string(bytes));
}

}  // namespace palmette::gpu
