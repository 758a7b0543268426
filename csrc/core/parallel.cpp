// SPDX-License-Identifier: Apache-2.0
#include "core/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace palmette {

int64_t num_workers() { return static_cast<int64_t>(torch::stable::get_num_threads()); }

void run_workers(int64_t count, void (*body)(void* ctx, int64_t worker), void* ctx) {
  if (count == 1) {  // no thread is woken for small work
    body(ctx, 0);
    return;
  }
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) body(ctx, worker);
  });
}

}  // namespace palmette
