// SPDX-License-Identifier: Apache-2.0
// Threads for kernels, which may not include torch. Not inline on purpose: kernel objects must hold no shared
// symbol.
#pragma once

#include <cstdint>

namespace palmette {

// Threads that torch uses for one operator (torch.set_num_threads).
int64_t num_workers();

// Calls body(ctx, worker) once for each worker in [0, count), on up to num_workers() threads. Workers share
// out the work through an atomic counter in ctx; a result must not depend on which worker did what, nor on
// count.
void run_workers(int64_t count, void (*body)(void* ctx, int64_t worker), void* ctx);

}  // namespace palmette
